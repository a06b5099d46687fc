"""Raw data of all three tasks, a tokenizer, a backbone and the tokenized folder, all tiny."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import Qwen3Config, Qwen3Model

from ml_embed.data.manifest import Manifest
from ml_embed.files.atomic import write_json
from ml_embed.files.digests import file_digest
from ml_embed.prepare.tokenization import TokenizeOptions, tokenize_folder
from ml_embed.prepare.tokenizer_training import train_tokenizer

HIDDEN, LAYERS, VOCABULARY = 64, 2, 384
TASKS = {"facts": "retrieval", "topics": "clustering", "sentiment": "classification"}
WORDS = (
    "river",
    "stone",
    "light",
    "moon",
    "forest",
    "bread",
    "music",
    "winter",
    "harbour",
    "candle",
    "garden",
)


@dataclass(frozen=True)
class TinyWorld:
    raw: Path
    backbone: Path
    tokenized: Path
    folder: Path

    def config(self, experiment_id: str = "run", **changes) -> dict:
        """A config that trains everything at once, in a second."""
        return {
            "model_path": str(self.backbone),
            "experiment_id": experiment_id,
            "output_dir": str(self.folder / "runs"),
            "tb_dir": str(self.folder / "tensorboard"),
            "cache_dir": str(self.folder / "cache"),
            "train_data_path": str(self.tokenized),
            "datasets": {name: {"task": task} for name, task in TASKS.items()},
            "train_batch_size": 4,
            "num_hard_neg": 2,
            "num_hard_neg_clustering": 3,
            "max_seq_length": 24,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "train_steps": 4,
            "use_mel": True,
            "r": 32,
            "mel_ranks": [16],
            "use_mll": True,
            "use_mrl": True,
            "valid_fraction": 0.1,
            "log_interval": 1,
            "report_to": [],
            **changes,
        }

    def write_config(self, path: Path, experiment_id: str = "run", **changes) -> Path:
        path.write_text(json.dumps(self.config(experiment_id, **changes)))
        return path


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randrange(100)) for _ in range(words))


def raw_rows(name: str, rng: random.Random) -> list[dict]:
    """Rows with ragged negatives, repeated documents, and for one sample its own positive among the
    negatives."""
    if name == "sentiment":
        return [
            {"query": sentence(rng, 5), "passage": "good", "negatives": ["bad"]} for _ in range(13)
        ]
    documents = [sentence(rng, rng.randrange(2, 12)) for _ in range(30)]
    rows = []
    for i in range(21):
        negatives = rng.sample(documents, rng.randrange(0, 5) if name == "facts" else 4)
        rows.append(
            {"query": sentence(rng, 3), "passage": documents[i % 17], "negatives": negatives}
        )
    rows[0]["negatives"] = [rows[0]["passage"], documents[-1]]
    return rows


def write_manifest(folder: Path, content: dict) -> None:
    """A manifest that agrees with the files beside it, as if they had been written so."""
    for name, entry in content["datasets"].items():
        for kind in entry.get("digests", ()):
            entry["digests"][kind] = file_digest(folder / f"{name}_{kind}.parquet")
    write_json(folder / "manifest.json", Manifest.from_json(content).to_json())


def make_world(folder: Path) -> TinyWorld:
    """Write a tiny world into an empty folder."""
    rng = random.Random(0)
    (folder / "raw").mkdir()
    texts = []
    for name in TASKS:
        rows = raw_rows(name, rng)
        texts += [row["query"] for row in rows] + [row["passage"] for row in rows]
        pq.write_table(pa.Table.from_pylist(rows), folder / "raw" / f"{name}.parquet")
    tokenizer = train_tokenizer(texts, VOCABULARY)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.1,
        max_position_embeddings=256,
    )
    Qwen3Model(config).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    tokenize_folder(
        TokenizeOptions(
            tokenizer=str(folder / "backbone"), input=folder / "raw", output=folder / "tokenized"
        ),
        progress=False,
    )
    return TinyWorld(folder / "raw", folder / "backbone", folder / "tokenized", folder)
