"""What validation should find, from the raw rows and the Embedder."""

from pathlib import Path

import pyarrow.parquet as pq
from oracles import naive_metrics
from transformers import AutoConfig

from ml_embed import Embedder
from ml_embed.config import parse_config
from ml_embed.data.store import open_store
from ml_embed.training.resolve import resolve


def held_out_rows(given: dict, raw: Path) -> dict[str, list[dict]]:
    config = parse_config(given)
    store = open_store(config.train_data_path, config.cache_dir, progress=False)
    _, schedule = resolve(config, AutoConfig.from_pretrained(config.model_path), store, 1)
    rows = {name: pq.read_table(raw / f"{name}.parquet").to_pylist() for name in store.datasets}
    return {
        name: [rows[name][i] for batch in schedule.valid_batches(name) for i in batch]
        for name in rows
    }


def searched(rows: list[dict], task: str) -> list[list[str]]:
    """The texts that each row's query is compared with."""
    if task == "retrieval":
        pool = sorted({text for row in rows for text in (row["passage"], *row["negatives"])})
        return [pool] * len(rows)
    return [
        [row["passage"], *(text for text in row["negatives"] if text != row["passage"])]
        for row in rows
    ]


def measured(model: Embedder, rows: list[dict], task: str) -> dict[str, float]:
    """The naive metrics of a model on rows."""
    scores, positive = [], []
    for row, texts in zip(rows, searched(rows, task), strict=True):
        scores.append((model.encode(texts) @ model.encode(row["query"])).tolist())
        positive.append(texts.index(row["passage"]))
    return naive_metrics(scores, positive)
