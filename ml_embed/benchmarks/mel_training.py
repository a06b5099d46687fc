"""The two starts of the token factors, trained: a pretrained table under a fresh decoder, on the
embedded corpus.

Both runs of a seed share data, order, ranks drawn and all other weights; only the factors they
start from differ.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

from ml_embed.benchmarks.mel_comparison import STARTS
from ml_embed.config import parse_config
from ml_embed.errors import UserError
from ml_embed.evaluation.cube import evaluate_cube
from ml_embed.prepare.tokenization import TokenizeOptions, tokenize_folder
from ml_embed.sample_data.datasets import build_datasets
from ml_embed.training.accelerator import make_accelerator
from ml_embed.training.loop import train
from ml_embed.training.setup import open_inputs, set_up

LANGUAGES = 12  # of the embedded corpus, the most spoken first
ROWS = 2000
LAYERS = 2
HEAD_DIM = 64
DATASET = "udhr_retrieval"
TABLE_NAMES = ("embeddings.word_embeddings.weight", "embed_tokens.weight")


def compare_trained(
    folder: Path, work: Path, ranks: Sequence[int], steps: int, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Train both starts with every seed; a row for each start, seed, rank and split with its
    recall@1.

    Args:
        folder: a model folder with a token table and a fast tokenizer.
        work: folder for data and models; must be empty or new.
        ranks: to train and to measure; the largest is the factors' r.
        steps: optimizer steps of each run.
        seeds: of the fresh decoder, the data order and the ranks drawn.
    Raises:
        UserError: the folder has no table that is known, or `work` holds something.
    """
    if work.exists() and (not work.is_dir() or any(work.iterdir())):
        raise UserError(f"{work} is not an empty folder; give another one with --work")
    build_datasets(work / "raw", work / "eval", LANGUAGES, rows=ROWS)
    for name in ("raw", "eval"):
        for file in (work / name).glob("*.parquet"):
            if file.stem != DATASET:  # the other tasks are easy at any rank
                file.unlink()
    rows = []
    for seed in seeds:
        backbone = _write_backbone(folder, work / "backbone", seed)
        if not (work / "tokenized").exists():
            tokenize_folder(
                TokenizeOptions(str(backbone), work / "raw", work / "tokenized"), progress=False
            )
        for start in STARTS:
            model = _train(work, backbone, start, ranks, steps, seed)
            result = evaluate_cube(
                model, work / "eval", ranks=ranks, depths=[LAYERS], dims=None, progress=False
            )
            whole = max(row["dim"] for row in result["rows"])
            rows += [
                {key: row[key] for key in ("rank", "split", "recall@1")}
                | {"start": start, "seed": seed}
                for row in result["rows"]
                if row["dim"] == whole
            ]
    return rows


def _write_backbone(folder: Path, output: Path, seed: int) -> Path:
    """A small Qwen3 with random layers, the pretrained table and its tokenizer."""
    table = _read_table(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    hidden = table.shape[1]
    config = Qwen3Config(
        vocab_size=len(table),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=max(1, hidden // HEAD_DIM),
        num_key_value_heads=max(1, hidden // HEAD_DIM),
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3Model(config)
    model.embed_tokens.weight.data.copy_(table)
    shutil.rmtree(output, ignore_errors=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return output


def _read_table(folder: Path) -> torch.Tensor:
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} has no model.safetensors, from which the token table is read")
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            if name.endswith(TABLE_NAMES):
                return file.get_tensor(name).float()
    raise UserError(f"{path} holds no tensor called {' or '.join(TABLE_NAMES)}")


def _train(
    work: Path, backbone: Path, start: str, ranks: Sequence[int], steps: int, seed: int
) -> Path:
    given = {
        "model_path": str(backbone),
        "experiment_id": f"{start}-{seed}",
        "output_dir": str(work),
        "tb_dir": str(work / "tensorboard"),
        "cache_dir": str(work / "cache"),
        "train_data_path": str(work / "tokenized"),
        "train_batch_size": 16,
        "num_hard_neg": 3,
        "max_seq_length": 64,
        "learning_rate": 5e-4,
        "min_lr": 5e-6,
        "warmup_steps": min(10, steps),
        "train_steps": steps,
        "use_mel": True,
        "r": max(ranks),
        "mel_ranks": sorted(ranks),
        "mel_init": start,
        "valid_fraction": 0,
        "checkpointing_steps": steps,
        "save_total_limit": 1,
        "report_to": [],
        "seed": seed,
    }
    config = parse_config(given)
    accelerator = make_accelerator(config)
    inputs = open_inputs(config, accelerator.num_processes, progress=False)
    train(set_up(config, given, accelerator, inputs, resume="no", allow_changes=False))
    accelerator.end_training()
    return config.run_dir / f"step_{steps}"


def trained_table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean recall@1 over seeds: a line a rank, for each split svd and frequency side by side."""
    splits = list(dict.fromkeys(row["split"] for row in rows))
    titles = [f"{split} {start}" for split in splits for start in STARTS]
    lines = ["| rank | " + " | ".join(titles) + " |", "|---:" * (1 + len(titles)) + "|"]
    for rank in sorted({row["rank"] for row in rows}):
        cells = [
            f"{fmean(_values(rows, rank, split, start)):.3f}"
            for split in splits
            for start in STARTS
        ]
        lines.append(f"| {rank} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _values(rows: Sequence[dict[str, Any]], rank: int, split: str, start: str) -> list[float]:
    return [
        row["recall@1"]
        for row in rows
        if (row["rank"], row["split"], row["start"]) == (rank, split, start)
    ]
