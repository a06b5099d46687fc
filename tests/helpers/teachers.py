"""Teachers that cost nothing."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, Qwen3Config, Qwen3Model

from ml_embed.recipe.teacher import TeacherOptions


def random_model(hidden: int, layers: int, seed: int) -> Qwen3Model:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=384,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.1,
        max_position_embeddings=256,
    )
    model = Qwen3Model(config)
    torch.nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    return model


class LetterModel:
    """Texts to vectors by their letters and order; not of unit length; costs nothing."""

    name, dim, device = "letters", 6, torch.device("cpu")
    identity: ClassVar[dict[str, str]] = {"letters": "1"}

    def __init__(self, scale: float = 1.0):
        self.scale = scale
        self.seen: list[str] = []

    def encode(self, texts, normalize=True):
        self.seen += texts
        rows = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for place, letter in enumerate(text.encode()):
                row[(letter + place) % self.dim] += self.scale * (1 + letter / 64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize else rows


def teacher_options(world, output, data=None, **changes) -> TeacherOptions:
    settings = {"dtype": "float32", "cache_dir": world.folder / "cache", **changes}
    return TeacherOptions(data or world.tokenized, str(world.backbone), output, **settings)


def write_cross_encoder(folder: Path, tokenizer, labels: int = 1) -> Path:
    """A random cross-encoder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=448,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
