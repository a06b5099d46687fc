"""Fresh Qwen3 backbones: preset shapes with random weights.

A backbone folder is a plain `Qwen3Model` (safetensors) with its tokenizer:
`AutoModel.from_pretrained` and `AutoTokenizer.from_pretrained` load it, and so does `run.py` as
`model_path`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_folder
from ml_embed.files.paths import check_model_output, home_path
from ml_embed.prepare.tokenizer_training import MAX_POSITIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3Config

DTYPES = ("float32", "bfloat16")
VOCAB_MULTIPLE = 64  # rows of the token table: a number that matrix kernels are fast at


@dataclass(frozen=True)
class Preset:
    """The shape of a Qwen3 decoder; everything else is as in Qwen3."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128


# 80M to 14B: F2LLM-v2 (arXiv 2603.19223), table 1; those names count the embedding table of Qwen3's
# 151,936 tokens. "tiny" is ours, for laptops and tests: 1.2 million parameters beside the table.
PRESETS = {
    "tiny": Preset(128, 384, 6, 4, 2, head_dim=32),
    "80M": Preset(320, 2048, 8, 16, 8),
    "160M": Preset(640, 1536, 9, 16, 8),
    "330M": Preset(896, 2560, 16, 16, 8),
    "0.6B": Preset(1024, 3072, 28, 16, 8),
    "1.7B": Preset(2048, 6144, 28, 16, 8),
    "4B": Preset(2560, 9728, 36, 32, 8),
    "8B": Preset(4096, 12288, 36, 32, 8),
    "14B": Preset(5120, 17408, 40, 40, 8),
}


def backbone_config(
    preset: str, vocab_size: int, eos_token_id: int, pad_token_id: int | None
) -> Qwen3Config:
    """The Qwen3 configuration of a preset, with a token table of exactly `vocab_size` rows."""
    from transformers import Qwen3Config

    if preset not in PRESETS:
        raise UserError(f"preset {preset!r} is not known; take one of {', '.join(PRESETS)}")
    return Qwen3Config(
        **vars(PRESETS[preset]),
        vocab_size=vocab_size,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )


def init_backbone(
    preset: str,
    tokenizer: PreTrainedTokenizerBase,
    output: str | Path,
    seed: int = 0,
    dtype: str = "float32",
    vocab_size: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a backbone folder with random weights of a preset shape, and its tokenizer.

    The token table has one row per token id, rounded up to a multiple of 64. Memory needed is the
    weights in `dtype` and half a gigabyte (measured: 2.8 GB for 0.6B in float32, 3.9 GB for 1.7B in
    bfloat16).

    Args:
        preset: a key of PRESETS.
        tokenizer: must have an EOS token.
        output: the new folder; it appears whole or not at all.
        seed: of the weights.
        dtype: of the weights, one of DTYPES.
        vocab_size: rows of the token table if more than the tokenizer needs; None is what it needs.
        overwrite: replace a model folder at `output`.
    Raises:
        UserError: one of these is not possible, or `output` must not or cannot be written.
    """
    import torch
    from transformers import Qwen3Model

    from ml_embed.model_folders.write import save_backbone

    output = home_path(output)
    check_model_output(output, overwrite)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; take one of {', '.join(DTYPES)}")
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no EOS token, where a text's vector is read; set `eos_token` in "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = table_rows(tokenizer, vocab_size)
    config = backbone_config(preset, rows, tokenizer.eos_token_id, tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        model = Qwen3Model._from_config(config, dtype=getattr(torch, dtype))

    with atomic_folder(output) as partial:
        save_backbone(partial, model, tokenizer)
    return output


def table_rows(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> int:
    """Rows of the token table: for every id and for `vocab_size`, rounded up to a multiple of 64.

    Raises:
        UserError: `vocab_size` is less than the tokenizer needs.
    """
    needed = max(tokenizer.get_vocab().values()) + 1
    if vocab_size is not None and vocab_size < needed:
        raise UserError(
            f"vocab size {vocab_size} is less than the tokenizer's {needed} ids; leave it out, or "
            "give at least that"
        )
    return -(-max(needed, vocab_size or 0) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
