"""Timing several versions of the same work, and printing what is needed to judge the result."""

import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

MIB = 1024**2
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "sentence-transformers")


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, float]:
        """Seconds: median, fastest, slowest; and the number of repeats."""
        return {
            "median": self.median,
            "min": min(self.seconds),
            "max": max(self.seconds),
            "repeats": len(self.seconds),
        }

    def in_unit(self, scale: float, unit: str) -> str:
        """Median (fastest .. slowest), for a table."""
        low, high = min(self.seconds) * scale, max(self.seconds) * scale
        return f"{self.median * scale:.3g} {unit} ({low:.3g} .. {high:.3g})"


def measure(
    candidates: Mapping[str, Callable[[], Any]],
    repeats: int,
    warm_up: int = 1,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time candidates that take turns, so that other work on the machine slows all of them alike.

    Args:
        candidates: what to run, by name.
        repeats: timed calls of each.
        warm_up: calls of each before that are not timed.
        synchronize: waits for a GPU; called before and after each timed call.
    """
    for _ in range(warm_up):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times faster `fast` is: the median of the ratios of neighbouring repeats."""
    return statistics.median(s / f for s, f in zip(slow.seconds, fast.seconds, strict=True))


def ratio_range(slow: Timing, fast: Timing) -> tuple[float, float]:
    """The smallest and the largest ratio of neighbouring repeats."""
    ratios = [s / f for s, f in zip(slow.seconds, fast.seconds, strict=True)]
    return min(ratios), max(ratios)


def memory_mib(kind: str) -> float:
    """This process's memory now, in MiB, on Linux.

    `kind` "Private" is memory that no other process shares, "Rss" all that is resident.
    """
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def matrix_peak(size: int, repeats: int, device: Any = "cpu", dtype: Any = None) -> float:
    """FLOP/s of a large square matrix product, the best of `repeats`.

    To be measured in the same run as the work that it is compared with.
    """
    import torch

    device = torch.device(device)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = left @ right
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    timing = measure(
        {"product": lambda: torch.mm(left, right, out=out)}, repeats, synchronize=wait
    )["product"]
    return 2 * size**3 / min(timing.seconds)


class SquareProducts:
    """Large square matrix products on the CPU, with at least as many FLOPs as some other work.

    They take turns with that work, for about as long. On a shared machine a short burst can be
    twice as fast as what lasts for seconds; no long work could reach such a peak.
    """

    def __init__(self, size: int, flops: float):
        import torch

        self._left, self._right = torch.randn(2, size, size)
        self._out = torch.empty_like(self._left)
        self._count = math.ceil(flops / (2 * size**3))
        self.flops = self._count * 2 * size**3

    def seconds(self) -> float:
        """The time that they take now."""
        import torch

        start = time.perf_counter()
        for _ in range(self._count):
            torch.mm(self._left, self._right, out=self._out)
        return time.perf_counter() - start


def environment(device: str = "cpu") -> dict[str, Any]:
    """Date, commit, versions and hardware. `device` is "cpu" or "cuda"."""
    import torch

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "python": platform.python_version(),
        # torch says its build as well (+cpu, +cu130), which its package's version may lack
        "versions": {name: version(name) for name in LIBRARIES} | {"torch": str(torch.__version__)},
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU: {_cpu_name()}",
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with "+" if files were changed since; None outside a checkout."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "ml_embed").strip()
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a markdown table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]
    rule = " | ".join("-" * width for width in widths)
    print("\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:])))


def print_result(benchmark: str, result: Mapping[str, Any], device: str = "cpu") -> None:
    """Print a benchmark's last line: one JSON object, with its environment."""
    print(
        json.dumps(
            {"benchmark": benchmark, **result, "environment": environment(device)}, default=_plain
        )
    )


def _plain(value: Any) -> Any:
    """For json: what `to_json` gives, or the Python number of NumPy's and torch's."""
    return value.to_json() if hasattr(value, "to_json") else value.item()


def require_agreement(name: str, difference: float, tolerance: float) -> None:
    """Stop the benchmark if two versions differ: their speeds would mean nothing."""
    if not difference <= tolerance:
        raise SystemExit(
            f"{name}: the two versions differ by {difference:.3g}, more than {tolerance:.3g}"
        )
