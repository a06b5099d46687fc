"""The training step on one CUDA GPU: first whether it is right, then speed, memory and MFU."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ml_embed.benchmarks.common import matrix_peak, print_result, print_table, require_agreement
from ml_embed.benchmarks.gpu_common import (
    MODEL_06B,
    SHAPE_06B,
    SMALL,
    SMALL_MODEL,
    Measured,
    free_memory,
    make_accelerator,
    measure_step,
    random_batch,
)
from ml_embed.benchmarks.training import compare_gradients
from ml_embed.benchmarks.training_setup import TrainingShape, fast_contender, naive_contender
from ml_embed.kernels.attention import available_kernels

KERNEL_TOLERANCE = 0.02
"""1 - cosine of bfloat16 vectors of two kernels; a guess, to be replaced by a measured one"""
NAIVE_TOLERANCE = 1e-3
"""float32 without TF32: sums have another order, and gradients pass four layers"""


def check_naive() -> dict[str, float]:
    """Compare losses and gradients of packed and padded steps: a small model in float32."""
    accelerator = make_accelerator("no")
    batch = random_batch(SMALL, SMALL_MODEL, rows=64)
    naive = naive_contender(batch, SMALL, accelerator, SMALL_MODEL)
    fast = fast_contender(batch, SMALL, accelerator, SMALL_MODEL)
    return compare_gradients(fast.gradients(), naive.gradients(), NAIVE_TOLERANCE)


def check_kernels() -> dict[str, float]:
    """Compare vectors of each variable-length kernel with those of SDPA, in bfloat16.

    Returns:
        the largest 1 - cosine of each kernel.
    """
    accelerator = make_accelerator("bf16")
    batch = random_batch(SMALL, SMALL_MODEL, rows=64)
    model = fast_contender(batch, SMALL, accelerator, SMALL_MODEL).model
    texts = batch.texts.to(accelerator.device)

    def vectors(kernel: str) -> Tensor:
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
    shape: TrainingShape, model: dict[str, int], repeats: int, compiled: bool
) -> dict[str, Any]:
    """Measure the naive step, ours, and ours compiled if asked for, each alone on the GPU.

    A version that needs more memory than there is has None as its result.
    """
    accelerator = make_accelerator("bf16")
    device = accelerator.device
    batch = random_batch(shape, model)
    peak = matrix_peak(8192, 10, device, torch.bfloat16)
    contenders = {
        "naive": partial(naive_contender, batch, shape, accelerator, model),
        "fast": partial(fast_contender, batch, shape, accelerator, model),
    }
    if compiled:
        contenders["compiled"] = partial(contenders["fast"], compiled=True)
    measured: dict[str, Measured | None] = {}
    for name, make in contenders.items():
        try:
            measured[name] = measure_step(make(), batch, repeats, device, peak)
        except torch.OutOfMemoryError:
            measured[name] = None
        accelerator.free_memory()  # it keeps what it prepared
        free_memory(device)
    return {
        "peak_tflops": peak / 1e12,
        "versions": measured,
        "real_tokens": batch.num_tokens,
        "sizes": vars(shape),
    }


def report_gpu(batch_size: int, repeats: int, compiled: bool) -> None:
    """Check and measure Qwen3-0.6B's shape; print a table and the JSON line."""
    agreement = {"naive": check_naive(), "kernels": check_kernels()}
    print(f"agreement: {agreement}")
    shape = replace(SHAPE_06B, batch_size=batch_size)
    result = measure_training(shape, MODEL_06B, repeats, compiled)
    rows = [[name, *_cells(measured)] for name, measured in result["versions"].items()]
    print_table(["version", "one step", "real tokens/s", "MFU", "peak memory"], rows)
    naive, fast = result["versions"]["naive"], result["versions"]["fast"]
    both = naive is not None and fast is not None
    result["ratio"] = naive.timing.median / fast.timing.median if both else None
    result["memory_share"] = fast.peak_mib / naive.peak_mib if both else None
    print_result("gpu", result | {"agreement": agreement}, device="cuda")


def _cells(measured: Measured | None) -> list[str]:
    """A version's cells of the table."""
    if measured is None:
        return ["out of memory", "", "", ""]
    return [
        measured.timing.in_unit(1000, "ms"),
        f"{measured.tokens_per_second:,.0f}",
        f"{measured.mfu:.1%}",
        f"{measured.peak_mib:,.0f} MiB",
    ]
