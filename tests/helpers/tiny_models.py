"""Tiny random model folders, and a naive way to compute their vectors: shared by tests of what
reads such folders."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, Qwen3Config, Qwen3Model

from ml_embed.model import MatryoshkaEncoder, factorize_table
from ml_embed.model_folders.record import ModelRecord
from ml_embed.model_folders.seal import seal
from ml_embed.model_folders.write import save_model_folder
from ml_embed.prepare.tokenizer_training import train_tokenizer

TEXTS = [
    "All human beings are born free and equal in dignity and rights.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "",
    "人人生而自由,在尊严和权利上一律平等。",
    "a",
    # No space at its ends: sentence-transformers before 6 strips what it is given.
    ("Everyone has the right to life, liberty and security of person. " * 3).strip(),
    "This one says <|im_end|> in the middle, and at its end <|im_end|>",
    "a",
]
# A prompt before nothing ends in a space as well.
SPOKEN = [text for text in TEXTS if text]
PROMPTS = {"query": "Instruct: find the article\nQuery: "}
MAX_SEQ_LENGTH = 48
LAYERS, HIDDEN, RANK = 3, 64, 32
EXITS, DIMS, RANKS = (1, 3), (64, 32, 16, 8), (16, 32)


def make_tokenizer():
    return train_tokenizer(TEXTS * 3, 400)


def random_backbone(tokenizer, rope: dict | None = None, head_dim: int = 16) -> Qwen3Model:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=448,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"rope_parameters": rope} if rope else {},
    )
    return Qwen3Model(config).float()


def write_model(
    folder: Path,
    tokenizer,
    norm_sharing: str = "shared",
    factorized: bool = True,
    head_dim: int = 16,
) -> Path:
    backbone = random_backbone(tokenizer, head_dim=head_dim)
    config = backbone.config
    factors = factorize_table(backbone.embed_tokens.weight.data, RANK) if factorized else None
    encoder = MatryoshkaEncoder(backbone, EXITS, factors, norm_sharing)
    for scale, norm in enumerate(encoder.norms, start=1):
        torch.nn.init.uniform_(norm.weight, 0.1 * scale, 2.0)
    record = ModelRecord(
        EXITS,
        DIMS,
        RANKS if factorized else (),
        0.05,
        MAX_SEQ_LENGTH,
        norm_sharing,
        prompts=PROMPTS,
    )
    save_model_folder(folder, encoder.state_dict(), config, tokenizer, record)
    return folder


def reseal(folder: Path) -> None:
    """After a change of a folder's content: as if it had been written so."""
    seal(folder, ModelRecord.load(folder))


@torch.no_grad()
def naive(
    folder: Path, texts: list[str], depth: int = LAYERS, dim: int = HIDDEN, rank: int = RANK
) -> np.ndarray:
    """transformers' model and the saved tokenizer, one text at a time."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if rank < RANK:
        factors = load_file(folder / "nested" / "embedding_factors.safetensors")
        model.embed_tokens.weight.data = factors["A"][:, :rank] @ factors["B"][:rank]
    if (folder / "nested" / "exit_norms.safetensors").exists():
        model.norm.weight.data = load_file(folder / "nested" / "exit_norms.safetensors")[str(depth)]
    model.layers = model.layers[:depth]
    model.config.num_hidden_layers = depth
    rows = []
    for text in texts:
        ids = tokenizer(text, truncation=True, return_tensors="pt").input_ids
        assert ids[0, -1] == tokenizer.eos_token_id
        row = model(ids).last_hidden_state[0, -1, :dim]
        rows.append(row / row.norm())
    return torch.stack(rows).numpy()


def assert_equal_vectors(left: np.ndarray, right: np.ndarray) -> None:
    np.testing.assert_allclose(left, right, atol=2e-5)
