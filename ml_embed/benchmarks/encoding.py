"""Embedder.encode against sentence-transformers' encode of the same model and texts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ml_embed.benchmarks.common import (
    MIB,
    measure,
    print_result,
    print_table,
    ratio,
    ratio_range,
    require_agreement,
)
from ml_embed.benchmarks.samples import QWEN3_VOCABULARY, make_backbone
from ml_embed.inference.embedder import Embedder
from ml_embed.model import (
    MatryoshkaEncoder,
    default_dims,
    default_exits,
    default_ranks,
    factorize_table,
)
from ml_embed.model_folders.record import ModelRecord
from ml_embed.model_folders.write import save_model_folder
from ml_embed.prepare.tokenizer_training import train_tokenizer
from ml_embed.sample_data.plan import plan_datasets, training_texts

TOLERANCE = 1e-4  # of unit vectors' components, float32; measured 4e-7
MAX_LENGTH = 512


def mixed_texts(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts to encode, of a few words to several articles, and texts to train a tokenizer on."""
    articles = training_texts(plan_datasets(50, seed))
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        joined = " ".join(articles[i] for i in rng.integers(0, len(articles), 4))
        # without white space at the end, which sentence-transformers 5.2 strips
        texts.append(joined[: int(np.exp(rng.uniform(np.log(10), np.log(1500))))].strip())
    return texts, articles


def write_model(folder: Path, tokenizer: Any, rank: int, **shape: int) -> None:
    """Write a model folder with random weights and all default exits, dims and ranks."""
    backbone = make_backbone(tokenizer, **shape)
    config = backbone.config
    layers, hidden = config.num_hidden_layers, config.hidden_size
    exits = default_exits(layers)
    encoder = MatryoshkaEncoder(
        backbone, exits, factorize_table(backbone.embed_tokens.weight.detach(), rank)
    )
    record = ModelRecord(
        exits, default_dims(hidden), default_ranks(rank), 0.05, MAX_LENGTH, "shared"
    )
    save_model_folder(folder, encoder.state_dict(), config, tokenizer, record)


def compare_encoding(folder: Path, texts: list[str], repeats: int) -> dict[str, Any]:
    """Time both, after checking that their vectors agree (SystemExit if not)."""
    from sentence_transformers import SentenceTransformer

    ours = Embedder.from_pretrained(folder, device="cpu")
    theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    contenders: dict[str, Callable[[], np.ndarray]] = {
        "sentence-transformers": lambda: theirs.encode(texts, show_progress_bar=False),
        "Embedder": lambda: ours.encode(texts, show_progress=False),
    }
    difference = float(
        np.abs(contenders["Embedder"]() - contenders["sentence-transformers"]()).max()
    )
    require_agreement("vectors", difference, TOLERANCE)
    timing = measure(contenders, repeats, warm_up=0)
    pair = timing["sentence-transformers"], timing["Embedder"]
    return {
        "ratio": ratio(*pair),
        "ratio_range": ratio_range(*pair),
        "difference": difference,
        "seconds": timing,
    }


def measure_depths(
    folder: Path, texts: list[str], depths: list[int], repeats: int
) -> dict[int, float]:
    """Median seconds to encode the texts at each depth."""
    embedders = {
        depth: Embedder.from_pretrained(folder, depth=depth, device="cpu") for depth in depths
    }
    runs = {
        str(d): (lambda e=e: e.encode(texts, show_progress=False)) for d, e in embedders.items()
    }
    return {int(depth): timing.median for depth, timing in measure(runs, repeats).items()}


def rank_memory(folder: Path, ranks: list[int]) -> dict[int, float]:
    """MiB of all parameters held at each rank."""
    return {
        rank: Embedder.from_pretrained(folder, rank=rank, device="cpu").num_parameters * 4 / MIB
        for rank in ranks
    }


def report_encoding(folder: Path, count: int, repeats: int) -> None:
    """Measure the encoding of `count` texts; print tables and the JSON line."""
    texts, articles = mixed_texts(count)
    write_model(folder, train_tokenizer(articles, 16_384), rank=256)
    result = compare_encoding(folder, texts, repeats)
    depths = measure_depths(folder, texts, [1, 2, 4, 8], repeats)
    ranks = rank_memory(folder, [64, 128, 256])
    encoders = [[name, timing.in_unit(1, "s")] for name, timing in result["seconds"].items()]
    print_table(["encode", "time"], encoders)
    print(f"ratio {result['ratio']:.2f}; vectors agree within {result['difference']:.1e}")
    shares = [[depth, f"{s:.2f} s", f"{s / depths[8]:.0%}"] for depth, s in depths.items()]
    print_table(["depth", "time", "of 8 layers"], shares)
    sizes = [[rank, f"{size:.0f} MiB"] for rank, size in ranks.items()]
    print_table(["rank", "parameters in memory"], sizes)
    print(f"(the whole table alone: {QWEN3_VOCABULARY * 256 * 4 / MIB:.0f} MiB)")
    shape = {"texts": count, "layers": 8, "hidden": 256, "vocabulary": QWEN3_VOCABULARY}
    more = {"seconds_at_depth": depths, "mib_at_rank": ranks, "sizes": shape}
    print_result("encode", result | more)
