"""Memory of a training step as the batch grows while GradCache's chunks stay as large."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ml_embed.benchmarks.common import MIB, print_result, print_table
from ml_embed.benchmarks.samples import make_sample
from ml_embed.benchmarks.training_setup import (
    TrainingShape,
    fast_contender,
    open_sample,
    pick_batch,
)
from ml_embed.evaluation.costs import peak_memory

MAX_TOKENS = 2048
"""of a chunk"""
LARGEST_WHOLE = 512
"""rows of a batch that is also run whole; 4,096 would need over 10 GiB"""
NEGATIVES, MAX_LENGTH = 1, 32
MODEL = {
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 4096,
}
HIDDEN, LAYERS, RANK = 64, 4, 64
_CHILD = "import sys; from ml_embed.benchmarks.gradcache import child; child(*sys.argv[1:])"


def measure_batch(
    tokenized: Path, cache: Path, eos_id: int, batch_size: int, budgets: Sequence[int]
) -> list[dict[str, Any]]:
    """Seconds and peak resident MiB of a step, at each budget, in one new process.

    A budget is the most tokens of a chunk; 0 = the whole batch at once.
    """
    arguments = [str(tokenized), str(cache), str(eos_id), str(batch_size), *map(str, budgets)]
    output = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments], check=True, capture_output=True, text=True
    )
    return json.loads(output.stdout.splitlines()[-1])


def child(tokenized: str, cache: str, eos_id: str, batch_size: str, *budgets: str) -> None:
    """What the new process runs: prints the list of results as JSON."""
    shape = TrainingShape(int(batch_size), NEGATIVES, MAX_LENGTH, RANK, LAYERS, HIDDEN)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    batch = pick_batch(open_sample(Path(tokenized), Path(cache)), shape, int(eos_id))
    results = []
    for budget in budgets:
        contender = fast_contender(batch, shape, accelerator, MODEL, int(budget))
        contender.step()  # allocates gradients, the optimizer's moments and the libraries' buffers
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        start = time.perf_counter()
        contender.step()
        result = {
            "batch_size": shape.batch_size,
            "max_tokens": int(budget),
            "tokens": batch.num_encoded_tokens,
        }
        seconds = time.perf_counter() - start
        results.append(result | {"seconds": seconds, "peak_mib": peak_memory() / MIB})
    print(json.dumps(results))


def report_gradcache(folder: Path, batch_sizes: list[int]) -> None:
    """Measure each batch size in chunks, small ones also whole; print a table and the JSON line."""
    sample = make_sample(
        folder / "sample", rows=max(6000, max(batch_sizes)), languages=150, vocabulary=4000
    )
    cache, eos_id = folder / "cache", sample.tokenizer.eos_token_id
    runs = [(size, MAX_TOKENS) for size in batch_sizes] + [
        (size, 0) for size in batch_sizes if size <= LARGEST_WHOLE
    ]
    results = [
        measure_batch(sample.tokenized, cache, eos_id, size, [budget])[0] for size, budget in runs
    ]
    rows = [
        [
            f"{x['batch_size']:,}",
            f"{x['max_tokens']:,}" if x["max_tokens"] else "whole",
            f"{x['tokens']:,}",
            f"{x['peak_mib']:.0f} MiB",
            f"{x['seconds']:.1f} s",
        ]
        for x in results
    ]
    print_table(
        ["batch", "tokens a forward pass", "tokens", "peak resident memory", "one step"], rows
    )
    chunked = [x["peak_mib"] for x in results if x["max_tokens"]]
    print_result("gradcache", {"ratio": max(chunked) / min(chunked), "runs": results})
