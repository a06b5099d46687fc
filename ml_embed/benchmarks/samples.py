"""Text and models for the benchmarks: tokenized articles of the embedded corpus, random backbones.

The tokenizer is trained on the articles and is small; token tables have Qwen3's 151,936 rows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3Model

from ml_embed.prepare.tokenization import TokenizeOptions, tokenize_folder
from ml_embed.prepare.tokenizer import load_tokenizer
from ml_embed.prepare.tokenizer_training import train_tokenizer
from ml_embed.sample_data.datasets import build_datasets
from ml_embed.sample_data.plan import training_texts

QWEN3_VOCABULARY = 151_936


@dataclass(frozen=True)
class Sample:
    """Folders of raw and of tokenized data of one retrieval dataset, and its tokenizer."""

    raw: Path
    tokenized: Path
    tokenizer_folder: Path
    tokenizer: PreTrainedTokenizerBase


def make_sample(
    folder: Path,
    rows: int,
    languages: int = 50,
    tokenizer_folder: Path | None = None,
    vocabulary: int = 16_384,
) -> Sample:
    """Write a retrieval dataset and its token ids: rows of a query, a passage and 23 negatives.

    Args:
        folder: an empty or new folder.
        rows: rows of the retrieval dataset.
        languages: translations that the rows are made of.
        tokenizer_folder: a tokenizer to use; None trains one.
        vocabulary: tokens of a tokenizer that is trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = build_datasets(
        folder / "all", folder / "evaluation", languages=languages, rows=max(rows, 6), eval_rows=6
    )
    (folder / "raw").mkdir()
    (folder / "all" / "udhr_retrieval.parquet").rename(folder / "raw" / "udhr_retrieval.parquet")
    if tokenizer_folder is None:
        tokenizer_folder = folder / "tokenizer"
        train_tokenizer(training_texts(plan), vocabulary).save_pretrained(tokenizer_folder)
    tokenize_folder(
        TokenizeOptions(str(tokenizer_folder), folder / "raw", folder / "tokenized"), progress=False
    )
    return Sample(
        folder / "raw", folder / "tokenized", tokenizer_folder, load_tokenizer(tokenizer_folder)
    )


def make_backbone(tokenizer: PreTrainedTokenizerBase | None, **shape: int) -> Qwen3Model:
    """A Qwen3 model with random weights (seed 0) in float32.

    Args:
        tokenizer: what its end and padding ids come from; None for none.
        shape: entries of Qwen3Config that replace those of the CPU benchmark.
    """
    settings: dict[str, Any] = {
        "vocab_size": QWEN3_VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
    }
    if tokenizer is not None:
        settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    return Qwen3Model(Qwen3Config(**(settings | shape))).float()
