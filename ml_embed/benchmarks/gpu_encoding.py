"""Sections of the GPU check that compare with sentence-transformers: encoding and training."""

from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch

from ml_embed.benchmarks.encoding import mixed_texts, write_model
from ml_embed.benchmarks.gpu_common import MODEL_06B, Setting, free_memory, wait
from ml_embed.inference.embedder import Embedder
from ml_embed.model import default_dims
from ml_embed.prepare.tokenizer_training import train_tokenizer

LARGE_MODEL = MODEL_06B | {"num_hidden_layers": 28, "hidden_size": 1024}
SMALL_MODEL = {"num_hidden_layers": 4, "vocab_size": 8192}
TOKENS_PER_WORD = 2.5
"""of the tokenizer trained here; about"""


def _write_folder(setting: Setting, folder: Path) -> list[str]:
    """A model folder with random weights; return texts to encode."""
    texts, articles = mixed_texts(40 if setting.small else 4000)
    tokenizer = train_tokenizer(articles[:400], 4000)
    write_model(folder, tokenizer, 64, **(SMALL_MODEL if setting.small else LARGE_MODEL))
    return texts


def encoding(setting: Setting) -> dict[str, Any]:
    """`Embedder.encode` against sentence-transformers' encode, both in bfloat16 on a GPU.

    A good answer: our vectors are no farther from the float32 ones than theirs ("1-cosine"), and
    "ratio", our speed in theirs at their better batch size, is above 1.
    """
    with TemporaryDirectory() as name:
        texts = _write_folder(setting, Path(name))
        return _compare_encoding(setting, name, texts)


def _compare_encoding(setting: Setting, folder: str, texts: list[str]) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer

    device, dtype = setting.device, torch.bfloat16 if setting.on_gpu else torch.float32
    ours = Embedder.from_pretrained(folder, device=device, dtype=dtype)
    exact = Embedder.from_pretrained(folder, device=device, dtype=torch.float32)
    theirs = SentenceTransformer(folder, device=str(device), model_kwargs={"dtype": dtype})
    few = texts[:200]
    expected = exact.encode(few, show_progress=False)
    found = {
        "ours": ours.encode(few, show_progress=False),
        "theirs": theirs.encode(few, batch_size=64, show_progress_bar=False),
    }
    result: dict[str, Any] = {
        f"1-cosine {name}": float(1 - (vectors * expected).sum(1).min())
        for name, vectors in found.items()
    }

    def their_encode(size: int) -> Any:
        return lambda: theirs.encode(texts, batch_size=size, show_progress_bar=False)

    runs = {"ours": lambda: ours.encode(texts, show_progress=False)}
    runs |= {f"theirs_{size}": their_encode(size) for size in (32, 128)}
    tokens = sum(map(len, ours._text_tokenizer(texts)))
    for name, run in runs.items():
        seconds = setting.seconds(run, 2, 1)
        result[name] = {
            "s": seconds,
            "texts_per_s": len(texts) / seconds,
            "tokens_per_s": tokens / seconds,
        }
    result["ratio"] = min(result["theirs_32"]["s"], result["theirs_128"]["s"]) / result["ours"]["s"]
    return result


def trainer(setting: Setting) -> dict[str, Any]:
    """sentence-transformers' trainer on texts as long as those of section `training`.

    bfloat16, MatryoshkaLoss over MultipleNegativesRankingLoss, fused AdamW. A good answer has fewer
    `tokens_per_s` than "fast_4" of section `training`.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.losses import (
        MatryoshkaLoss,
        MultipleNegativesRankingLoss,
    )

    steps, rows = (3, 2) if setting.small else (10, 4)
    with TemporaryDirectory() as name:
        texts = _write_folder(setting, Path(name))
        model = SentenceTransformer(name, device=str(setting.device))
        model.max_seq_length = 64 if setting.small else 1024
        columns = _random_columns(" ".join(texts[:300]).split(), steps * rows)
        tokens = sum(
            len(ids)
            for column in columns.values()
            for ids in model.tokenizer(column, truncation=True, max_length=model.max_seq_length)[
                "input_ids"
            ]
        )
        dims = list(default_dims(model.get_embedding_dimension()))
        ends = _StepEnds(setting)
        free_memory(setting.device)
        SentenceTransformerTrainer(
            model=model,
            args=_trainer_arguments(setting, Path(name) / "trainer", steps, rows),
            train_dataset=Dataset.from_dict(columns),
            loss=MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), dims),
            callbacks=[ends.callback()],
        ).train()
    seconds = float(np.median(np.diff(ends.times)))
    return {
        "ms_a_step": seconds * 1e3,
        "tokens_a_step": tokens / steps,
        "tokens_per_s": tokens / steps / seconds,
        "peak_GiB": setting.peak_gib(),
    }


def _random_columns(words: list[str], rows: int) -> dict[str, list[str]]:
    """An anchor, a positive and 7 negatives per row, of log-normal length in tokens."""
    rng = np.random.default_rng(0)

    def text(median: int) -> str:
        tokens = np.clip(rng.lognormal(np.log(median), 0.8), 4, 1000)
        start = int(rng.integers(0, len(words) - 1000))
        return " ".join(words[start : start + max(1, int(tokens / TOKENS_PER_WORD))])

    columns = {"anchor": [text(40) for _ in range(rows)]}
    for name in ("positive", *(f"negative_{number}" for number in range(7))):
        columns[name] = [text(250) for _ in range(rows)]
    return columns


def _trainer_arguments(setting: Setting, folder: Path, steps: int, rows: int) -> Any:
    from sentence_transformers import SentenceTransformerTrainingArguments

    return SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=rows,
        bf16=setting.on_gpu,
        optim="adamw_torch_fused",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not setting.on_gpu,
    )


class _StepEnds:
    """When each step of a transformers' trainer ended, in seconds."""

    def __init__(self, setting: Setting):
        self.times: list[float] = []
        self._device = setting.device

    def callback(self) -> Any:
        from transformers import TrainerCallback

        def on_step_end(*_: Any, **__: Any) -> None:
            wait(self._device)
            self.times.append(perf_counter())

        callback = TrainerCallback()
        callback.on_step_end = on_step_end  # type: ignore[method-assign]
        return callback
