"""The training step on the CPU, against the naive one: same gradients, then speed."""

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ml_embed.benchmarks.common import (
    SquareProducts,
    Timing,
    print_result,
    print_table,
    ratio,
    ratio_range,
    require_agreement,
)
from ml_embed.benchmarks.samples import make_sample
from ml_embed.benchmarks.training_setup import (
    Contender,
    Gradients,
    TrainingShape,
    fast_contender,
    largest_difference,
    naive_contender,
    open_sample,
    parameters_without_table,
    pick_batch,
)
from ml_embed.errors import UserError
from ml_embed.kernels.allocator import keep_freed_memory
from ml_embed.kernels.compilation import check_compiler, check_transformers
from ml_embed.notices import notice

TOLERANCE = 1e-4
"""share of a gradient's largest entry, in float32; measured 3e-6, and 5e-6 compiled"""
PEAK_SIZE = 1536
"""rows and columns of the square products"""
STEPS_PER_TURN = 2


def compare_training(
    folder: Path,
    shape: TrainingShape,
    repeats: int,
    compiled: bool = False,
    tokenizer: Path | None = None,
    **model: int,
) -> dict[str, Any]:
    """Time steps of the naive and the fast version, which take turns, on one batch.

    A turn is several steps, as in training. Its first step is not timed: it asks for memory that
    another version gave back.

    Args:
        folder: empty folder for data.
        shape: sizes of batch and model.
        repeats: turns of each version.
        compiled: also the fast version with `compile_layers`.
        tokenizer: folder of a tokenizer; None trains one.
        model: more sizes, as `make_backbone` takes them.
    Returns:
        what `_judge` says of the fast version; the same of the compiled one, as "compiled"; and
        what they have in common.
    Raises:
        SystemExit: losses or gradients differ.
    """
    sample = make_sample(folder / "sample", rows=500, tokenizer_folder=tokenizer)
    batch = pick_batch(
        open_sample(sample.tokenized, folder / "cache"), shape, sample.tokenizer.eos_token_id
    )
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    contenders = {
        "naive": naive_contender(batch, shape, accelerator, model),
        "fast": fast_contender(batch, shape, accelerator, model),
    }
    if compiled:
        contenders["compiled"] = fast_contender(batch, shape, accelerator, model, compiled=True)
    parameters = parameters_without_table(contenders["fast"].model)
    agreement = check_agreement(contenders)
    turns = take_turns(
        contenders, SquareProducts(PEAK_SIZE, 6 * parameters * batch.num_tokens), repeats
    )
    judged = {
        name: _judge(name, turns, 6 * parameters * batch.num_tokens) | agreement[name]
        for name in agreement
    }
    return judged.pop("fast") | {
        **judged,
        "seconds": turns.seconds,
        "real_tokens_per_second": {
            name: batch.num_tokens / timing.median for name, timing in turns.seconds.items()
        },
        "peak_gflops": turns.flops / turns.products.median / 1e9,
        "peak_gflops_best": turns.flops / min(turns.products.seconds) / 1e9,
        "sizes": vars(shape)
        | {
            "layer_parameters": parameters,
            "real_tokens": batch.num_tokens,
            "encoded_tokens": batch.num_encoded_tokens,
        },
    }


def check_agreement(contenders: Mapping[str, Contender]) -> dict[str, dict[str, float]]:
    """`compare_gradients` of each version with "naive"."""
    naive = contenders["naive"].gradients()
    others = (name for name in contenders if name != "naive")
    return {
        name: compare_gradients(contenders[name].gradients(), naive, TOLERANCE) for name in others
    }


def compare_gradients(fast: Gradients, naive: Gradients, tolerance: float) -> dict[str, float]:
    """Compare losses and gradients; differences are shares of a gradient's largest entry.

    Raises:
        SystemExit: a difference exceeds the tolerance.
    """
    (fast_loss, fast_gradients), (naive_loss, naive_gradients) = fast, naive
    require_agreement("losses", abs(fast_loss - naive_loss) / abs(naive_loss), tolerance)
    difference = largest_difference(fast_gradients, naive_gradients)
    require_agreement("gradients", difference, tolerance)
    return {"loss": fast_loss, "naive_loss": naive_loss, "gradient_difference": difference}


@dataclass(frozen=True)
class Turns:
    """Times of versions that took turns, and of square products in between."""

    seconds: dict[str, Timing]
    """per step of each version, one value per turn"""
    cpu_seconds: dict[str, float]
    """of all timed steps of each version"""
    products: Timing
    """of the square products, one value per turn"""
    flops: float
    """of the square products of one turn"""


def take_turns(
    contenders: Mapping[str, Contender], products: SquareProducts, repeats: int
) -> Turns:
    """Let versions take turns, so that other work on the machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_seconds = dict.fromkeys(contenders, 0.0)
    of_products = []
    for _ in range(repeats):
        for name, contender in contenders.items():
            # As run.py does; the naive step runs with the C library's defaults.
            keep_freed_memory(name != "naive")
            contender.step()
            cpu_before, start = _cpu_seconds(), time.perf_counter()
            for _ in range(STEPS_PER_TURN):
                contender.step()
            seconds[name].append((time.perf_counter() - start) / STEPS_PER_TURN)
            cpu_seconds[name] += _cpu_seconds() - cpu_before
            if name == "fast":  # in the middle, beside both versions whose share they judge
                of_products.append(products.seconds())
    timing = {name: Timing(tuple(values)) for name, values in seconds.items()}
    return Turns(timing, cpu_seconds, Timing(tuple(of_products)), products.flops)


def _judge(name: str, turns: Turns, work: float) -> dict[str, Any]:
    """How much faster a version is than the naive one, and its share of the products' speed.

    `work` are the FLOPs of a step.
    """
    naive, own = turns.seconds["naive"], turns.seconds[name]
    share = work / turns.flops
    return {
        "ratio": ratio(naive, own),
        "ratio_range": ratio_range(naive, own),
        "cpu_seconds_ratio": turns.cpu_seconds["naive"] / turns.cpu_seconds[name],
        "share_of_peak": share * ratio(turns.products, own),
        "share_of_peak_range": [share * r for r in ratio_range(turns.products, own)],
    }


def report_training(folder: Path, repeats: int, compiled: bool, tokenizer: Path | None) -> None:
    """Measure; print a table and the JSON line."""
    if compiled:
        try:
            check_transformers()
            check_compiler(torch.device("cpu"), "compile_layers", "false")
        except UserError as error:
            notice(f"left out: {error}")
            compiled = False
    result = compare_training(folder, TrainingShape(), repeats, compiled, tokenizer)
    rows = []
    for name, timing in result["seconds"].items():
        row = [name, timing.in_unit(1, "s"), f"{result['real_tokens_per_second'][name]:,.0f}"]
        rows.append(
            row
            + (
                ["", "", ""]
                if name == "naive"
                else _verdict(result if name == "fast" else result[name])
            )
        )
    print_table(
        ["version", "one step", "real tokens/s", "ratio", "share of the peak", "gradients differ"],
        rows,
    )
    print(
        f"peak: {result['peak_gflops']:.0f} GFLOP/s, of square products of a step's FLOPs in turn "
        "with the steps; "
        "gradients: of their largest entries"
    )
    print_result("training", result)


def _verdict(judged: Mapping[str, Any]) -> list[str]:
    """The last cells of a version's line in the table."""
    low, high = judged["ratio_range"]
    least, most = judged["share_of_peak_range"]
    return [
        f"{judged['ratio']:.2f} ({low:.2f} .. {high:.2f}; {judged['cpu_seconds_ratio']:.2f} in CPU "
        "seconds)",
        f"{judged['share_of_peak']:.0%} ({least:.0%} .. {most:.0%})",
        f"{judged['gradient_difference']:.1e}",
    ]


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
