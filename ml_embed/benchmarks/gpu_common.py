"""What the GPU benchmark (`gpu`) and the GPU check (`gpu_check`) share: shapes, data, measuring."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from ml_embed.benchmarks.common import MIB, Timing, measure
from ml_embed.benchmarks.samples import QWEN3_VOCABULARY
from ml_embed.benchmarks.training_setup import (
    Contender,
    TrainingShape,
    parameters_without_table,
    pick_batch,
)
from ml_embed.data.batch import ContrastiveBatch
from ml_embed.data.store import TokenizedDataset
from ml_embed.training.cost import GPUS

EOS = 1
GIB = 2**30
SMALL = TrainingShape(batch_size=4, negatives=3, max_length=128, rank=64, layers=4, hidden=256)
SMALL_MODEL = {"vocab_size": 8192, "num_attention_heads": 4, "head_dim": 128}
SHAPE_06B = TrainingShape(
    batch_size=4, negatives=7, max_length=1024, rank=512, layers=28, hidden=1024
)
MODEL_06B = {
    "vocab_size": QWEN3_VOCABULARY,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


@dataclass(frozen=True)
class Setting:
    """Where the sections of the GPU check run, and how large they are."""

    device: torch.device
    small: bool
    """tiny shapes in float32, which a CPU rehearses in minutes; False is Qwen3-0.6B in bfloat16"""
    output: Path
    """folder for profiles"""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What large products are computed in."""
        return torch.float32 if self.small else torch.bfloat16

    def accelerator(self, precision: str | None = None) -> Accelerator:
        """One of a given precision, "bf16" or "no"; None is that of the setting."""
        usual = "no" if self.small else "bf16"
        return make_accelerator(precision or usual, cpu=not self.on_gpu)

    def shape(self, batch_size: int) -> tuple[TrainingShape, dict[str, int]]:
        """What is trained on, and the model as `make_backbone` takes it."""
        if self.small:
            return replace(SMALL, batch_size=batch_size), SMALL_MODEL
        return replace(SHAPE_06B, batch_size=batch_size), MODEL_06B

    def seconds(self, run: Callable[[], Any], repeats: int = 10, warm_up: int = 3) -> float:
        """Median seconds of a call, after some that are not counted."""
        return measure({"run": run}, repeats, warm_up, lambda: wait(self.device))["run"].median

    def peak_gib(self) -> float:
        """Most memory in use at once since `free_memory`."""
        return peak_mib(self.device) / 1024


def make_accelerator(precision: str, cpu: bool = False) -> Accelerator:
    """An accelerator, whatever precision an earlier one had: accelerate allows one per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=cpu, mixed_precision=precision)


def wait(device: torch.device) -> None:
    """Until a GPU has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_memory(device: torch.device) -> None:
    """Give back memory that nothing uses, and measure the peak from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mib(device: torch.device) -> float:
    """Most memory of a GPU in use at once since `free_memory`, in MiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / MIB if device.type == "cuda" else 0.0


def relative_error(found: Tensor, expected: Tensor, least: float = 1e-30) -> float:
    """|found - expected| / |expected| of whole tensors, the divisor being at least `least`."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(least))


def random_dataset(rows: int, vocabulary: int, longest: int, seed: int = 0) -> TokenizedDataset:
    """Random token ids in texts of realistic lengths.

    Lengths are log-normal, cut at `longest`: around 40 tokens for queries, 250 for documents.
    """
    rng = np.random.default_rng(seed)

    def texts(count: int, median: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lengths = np.clip(rng.lognormal(np.log(median), 0.8, count), 4, longest).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        tokens = rng.integers(2, vocabulary, offsets[-1], dtype=np.int32)
        tokens[offsets[1:] - 1] = EOS
        return tokens, offsets, lengths

    names = ("tokens", "offsets", "lengths")
    arrays = {f"query_{name}": array for name, array in zip(names, texts(rows, 40), strict=True)}
    arrays |= {
        f"document_{name}": array for name, array in zip(names, texts(10 * rows, 250), strict=True)
    }
    arrays["passage_documents"] = rng.integers(0, 10 * rows, rows)
    arrays["negative_offsets"] = np.arange(rows + 1, dtype=np.int64) * 24
    arrays["negative_documents"] = rng.integers(0, 10 * rows, rows * 24)
    # every query is asked once, and every document has its own text
    arrays["query_numbers"] = np.arange(rows, dtype=np.int64)
    arrays["positive_offsets"] = np.arange(rows + 1, dtype=np.int64)
    arrays["positive_documents"] = arrays["passage_documents"]
    arrays["document_hashes"] = np.arange(10 * rows, dtype=np.uint64)
    arrays |= dict.fromkeys(
        ("scores", "passage_scores", "negative_scores", "language_numbers"), np.zeros(0, np.float32)
    )
    arrays["token_counts"] = np.zeros(0, np.int64)
    return TokenizedDataset(Path(), "random", arrays, vocabulary - 1, ("", ""))


def random_batch(
    shape: TrainingShape, model: dict[str, int], rows: int = 256, seed: int = 0
) -> ContrastiveBatch:
    """A batch of a random dataset with that many rows, in a model's vocabulary."""
    dataset = random_dataset(rows, model["vocab_size"], shape.max_length, seed)
    return pick_batch(dataset, shape, EOS, seed)


@dataclass(frozen=True)
class Measured:
    """Speed and memory of one version of the training step."""

    timing: Timing
    tokens_per_second: float
    """real tokens, repeated texts counted as often as they occur"""
    flops_per_second: float
    """6 FLOPs per real token and parameter of the layers"""
    peak_mib: float
    """most memory in use at once during a step, weights, gradients and moments included"""
    first_seconds: float
    """the first step, which compiles and allocates"""

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"timing": self.timing.to_json()}


def measure_step(
    contender: Contender, tokens: float, repeats: int, device: torch.device, warm_up: int = 2
) -> Measured:
    """Measure a step of so many real tokens."""
    start = perf_counter()
    contender.step()  # gradients and moments exist from here on
    wait(device)
    first = perf_counter() - start
    free_memory(device)
    timing = measure({"step": contender.step}, repeats, warm_up, lambda: wait(device))["step"]
    rate = 6 * parameters_without_table(contender.model) * tokens / timing.median
    return Measured(timing, tokens / timing.median, rate, peak_mib(device), first)


def share_of_data_sheet(device: torch.device, flops_per_second: float) -> float | None:
    """A speed as a share of what the GPU's data sheet says; None where it is not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    stated = (gpu.flops for part, gpu in GPUS.items() if part in name)
    return next((flops_per_second / flops for flops in stated), None)
