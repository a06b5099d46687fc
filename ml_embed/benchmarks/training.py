"""The training step against the naive one: agreement, seconds, CPU seconds, share of the matrix-product peak."""

import resource
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ml_embed.allocator import keep_freed_memory
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
    layer_parameters,
    naive_contender,
    open_sample,
    pick_batch,
)

TOLERANCE = 1e-4  # of a gradient's largest entry, float32; measured 2e-6, and 7e-6 compiled
PEAK_SIZE = 1536
STEPS_A_TURN = 2


def compare_training(
    folder: Path,
    shape: TrainingShape,
    repeats: int,
    compiled: bool = False,
    tokenizer: Path | None = None,
    **model: int,
) -> dict[str, Any]:
    """Steps of both versions in turn on one batch. Raises SystemExit if losses or gradients differ.

    Each version makes several steps in a turn, as training does, and the first is not timed: it would pay for memory
    that the other version gave back.
    """
    sample = make_sample(folder / "sample", rows=500, tokenizer_folder=tokenizer)
    batch = pick_batch(open_sample(sample.tokenized, folder / "cache"), shape, sample.tokenizer.eos_token_id)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    naive = naive_contender(batch, shape, accelerator, model)
    fast = fast_contender(batch, shape, accelerator, model, compiled=compiled)
    agreement = check_agreement(fast, naive)
    cpu: dict[str, list[float]] = {"naive": [], "fast": []}
    work = 6 * layer_parameters(fast.model) * batch.num_tokens
    products = SquareProducts(PEAK_SIZE, work)

    def turn(name: str, contender: Contender, keep_memory: bool) -> float:
        """Seconds of a step; run.py keeps freed memory, the naive step runs with the C library's defaults."""
        keep_freed_memory(keep_memory)
        contender.step()
        before = _cpu_seconds()
        start = time.perf_counter()
        for _ in range(STEPS_A_TURN):
            contender.step()
        cpu[name].append(_cpu_seconds() - before)
        return (time.perf_counter() - start) / STEPS_A_TURN

    seconds: dict[str, list[float]] = {"naive": [], "fast": [], "products": []}
    for _ in range(repeats):
        seconds["naive"].append(turn("naive", naive, keep_memory=False))
        seconds["fast"].append(turn("fast", fast, keep_memory=True))
        seconds["products"].append(products.seconds())
    timing = {name: Timing(tuple(values)) for name, values in seconds.items()}
    return agreement | {
        "ratio": ratio(timing["naive"], timing["fast"]),
        "ratio_range": ratio_range(timing["naive"], timing["fast"]),
        "cpu_seconds_ratio": sum(cpu["naive"]) / sum(cpu["fast"]),
        "seconds": {name: timing[name] for name in ("naive", "fast")},
        "real_tokens_per_second": {name: batch.num_tokens / timing[name].median for name in ("naive", "fast")},
        "peak_gflops": products.flops / timing["products"].median / 1e9,
        "share_of_peak": work / products.flops * ratio(timing["products"], timing["fast"]),
        "share_of_peak_range": [work / products.flops * r for r in ratio_range(timing["products"], timing["fast"])],
        "peak_gflops_best": products.flops / min(timing["products"].seconds) / 1e9,
        "sizes": vars(shape)
        | {
            "layer_parameters": layer_parameters(fast.model),
            "real_tokens": batch.num_tokens,
            "encoded_tokens": batch.num_encoded_tokens,
            "compiled": compiled,
        },
    }


def check_agreement(fast: Contender, naive: Contender, tolerance: float = TOLERANCE) -> dict[str, float]:
    """Both losses, and the largest difference of any gradient. Raises SystemExit beyond the tolerance."""
    return compare_gradients(fast.gradients(), naive.gradients(), tolerance)


def compare_gradients(fast: Gradients, naive: Gradients, tolerance: float) -> dict[str, float]:
    """The same of what two contenders' `gradients` gave."""
    (fast_loss, fast_gradients), (naive_loss, naive_gradients) = fast, naive
    require_agreement("losses", abs(fast_loss - naive_loss) / abs(naive_loss), tolerance)
    difference = largest_difference(fast_gradients, naive_gradients)
    require_agreement("gradients", difference, tolerance)
    return {"loss": fast_loss, "naive_loss": naive_loss, "gradient_difference": difference}


def report_training(folder: Path, repeats: int, compiled: bool, tokenizer: Path | None) -> None:
    """Measure, and print the table and the JSON line."""
    result = compare_training(folder, TrainingShape(), repeats, compiled, tokenizer)
    rows = [
        [name, t.in_unit(1, "s"), f"{result['real_tokens_per_second'][name]:,.0f}"]
        for name, t in result["seconds"].items()
    ]
    print_table(["version", "one step", "real tokens/s"], rows)
    print(
        f"ratio {result['ratio']:.2f} ({result['cpu_seconds_ratio']:.2f} in CPU seconds); "
        f"{result['share_of_peak']:.0%} ({' to '.join(f'{s:.0%}' for s in result['share_of_peak_range'])}) of the "
        f"{result['peak_gflops']:.0f} GFLOP/s that square products of the same FLOPs reach in turn; "
        f"gradients agree within {result['gradient_difference']:.1e} of their largest entries"
    )
    print_result("training", result)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
