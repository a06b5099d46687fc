"""Everything that needs a CUDA GPU, in one call: agreement first, then tokens a second, memory and
MFU.

Letters: T tokens, N texts, E exits, H hidden size.
"""

import contextlib
import gc
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ml_embed.benchmarks.common import MIB, Timing, matrix_peak, measure, require_agreement
from ml_embed.benchmarks.training import compare_gradients
from ml_embed.benchmarks.training_setup import (
    Contender,
    TrainingShape,
    fast_contender,
    layer_parameters,
    naive_contender,
    pick_batch,
)
from ml_embed.data.batch import ContrastiveBatch
from ml_embed.data.store import TokenizedDataset
from ml_embed.errors import UserError
from ml_embed.kernels.attention import available_kernels

EOS = 1
SMALL = TrainingShape(batch_size=4, negatives=3, max_length=128, rank=64, layers=4, hidden=256)
SMALL_MODEL = {"vocab_size": 8192}
MODEL_06B = {
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
SHAPE_06B = TrainingShape(
    batch_size=4, negatives=7, max_length=1024, rank=512, layers=28, hidden=1024
)
KERNEL_TOLERANCE = (
    0.02  # guess: 1 - cosine of bf16 vectors of two kernels; to be replaced by the measured one
)
NAIVE_TOLERANCE = (
    1e-3  # float32 without TF32: the order of sums differs, and gradients pass four layers
)


def random_dataset(rows: int, vocabulary: int, longest: int, seed: int = 0) -> TokenizedDataset:
    """Random ids in a realistic mix of lengths: queries of some dozens of tokens, documents
    log-normal around 250."""
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
    arrays["token_counts"] = np.zeros(0, np.int64)
    return TokenizedDataset(Path(), "random", arrays, vocabulary - 1)


@dataclass(frozen=True)
class Measured:
    """One version of the step."""

    timing: Timing
    tokens_per_second: float
    """real tokens"""
    mfu: float
    peak_mib: float
    """largest allocation of a step, weights, gradients and moments included"""

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"timing": self.timing.to_json()}


def check_naive() -> dict[str, float]:
    """Losses and gradients of a small model in float32 on the GPU: packed against padded."""
    accelerator = _accelerator("no")
    batch = pick_batch(random_dataset(64, SMALL_MODEL["vocab_size"], SMALL.max_length), SMALL, EOS)
    naive = naive_contender(batch, SMALL, accelerator, SMALL_MODEL)
    fast = fast_contender(batch, SMALL, accelerator, SMALL_MODEL)
    return compare_gradients(fast.gradients(), naive.gradients(), NAIVE_TOLERANCE)


@contextlib.contextmanager
def liger_kernels() -> Iterator[None]:
    """Inside of it, Qwen3 models are made and run with liger-kernel's norms, rotary embedding and
    MLP.

    liger-kernel replaces them for the whole process; here they are put back, for the other
    versions' sake.

    Raises:
        UserError: liger-kernel is not installed.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("--liger: liger-kernel is not installed; pip install liger-kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3
    from transformers.models.qwen3 import modeling_qwen3

    replaced = ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP")
    own = {name: getattr(modeling_qwen3, name) for name in replaced}
    try:
        apply_liger_kernel_to_qwen3(cross_entropy=False, fused_linear_cross_entropy=False)
        yield
    finally:
        for name, value in own.items():
            setattr(modeling_qwen3, name, value)


def check_liger() -> dict[str, float]:
    """Losses and gradients of a small model in float32: with liger's kernels against the naive
    version without."""
    accelerator = _accelerator("no")
    batch = pick_batch(random_dataset(64, SMALL_MODEL["vocab_size"], SMALL.max_length), SMALL, EOS)
    naive = naive_contender(batch, SMALL, accelerator, SMALL_MODEL)
    expected = naive.gradients()
    with liger_kernels():
        liger = fast_contender(batch, SMALL, accelerator, SMALL_MODEL)
        return compare_gradients(liger.gradients(), expected, NAIVE_TOLERANCE)


def check_kernels() -> dict[str, float]:
    """Largest 1 - cosine between vectors of each variable-length kernel and of SDPA sequence by
    sequence, in bf16."""
    accelerator = _accelerator("bf16")
    batch = pick_batch(random_dataset(64, SMALL_MODEL["vocab_size"], SMALL.max_length), SMALL, EOS)
    model = fast_contender(batch, SMALL, accelerator, SMALL_MODEL).model
    texts = batch.texts.to(accelerator.device)

    def vectors(kernel: str) -> torch.Tensor:
        accelerator.unwrap_model(model).kernel = kernel
        with torch.no_grad():
            return model(texts.input_ids, texts.packed)

    reference = vectors("sdpa")
    differences: dict[str, float] = {}
    for kernel in available_kernels(accelerator.device, torch.bfloat16):
        if kernel != "sdpa":
            cosines = torch.nn.functional.cosine_similarity(vectors(kernel), reference, dim=-1)
            differences[kernel] = 1 - cosines.min().item()
            require_agreement(f"{kernel} and sdpa", differences[kernel], KERNEL_TOLERANCE)
    return differences


def measure_training(
    shape: TrainingShape, repeats: int, compiled: bool, liger: bool, **model: int
) -> dict[str, Any]:
    """The naive step, ours and (on request) ours compiled or with liger's kernels, each alone on
    the GPU."""
    accelerator = _accelerator("bf16")
    batch = pick_batch(random_dataset(256, 151_936, shape.max_length), shape, EOS)
    peak = matrix_peak(8192, 10, accelerator.device, torch.bfloat16)
    versions = {
        "naive": lambda: naive_contender(batch, shape, accelerator, model),
        "fast": lambda: fast_contender(batch, shape, accelerator, model),
    }
    if compiled:
        versions["compiled"] = lambda: fast_contender(
            batch, shape, accelerator, model, compiled=True
        )
    if liger:
        versions["liger"] = versions["fast"]
    measured: dict[str, Measured | None] = {}
    for name, make in versions.items():
        try:
            with liger_kernels() if name == "liger" else contextlib.nullcontext():
                measured[name] = _measure(make(), batch, repeats, peak)
        except torch.OutOfMemoryError:
            measured[name] = None
        gc.collect()
        torch.cuda.empty_cache()
    return {
        "peak_tflops": peak / 1e12,
        "versions": measured,
        "real_tokens": batch.num_tokens,
        "sizes": vars(shape),
    }


def _measure(contender: Contender, batch: ContrastiveBatch, repeats: int, peak: float) -> Measured:
    contender.step()  # gradients and moments exist from here on
    torch.cuda.reset_peak_memory_stats()
    timing = measure(
        {"step": contender.step}, repeats, warm_up=2, synchronize=torch.cuda.synchronize
    )["step"]
    flops = 6 * layer_parameters(contender.model) * batch.num_tokens
    peak_mib = torch.cuda.max_memory_allocated() / MIB
    return Measured(
        timing, batch.num_tokens / timing.median, flops / timing.median / peak, peak_mib
    )


def _accelerator(precision: str) -> Accelerator:
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # accelerate has one precision a process
    return Accelerator(mixed_precision=precision)
