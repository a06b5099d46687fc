"""Break, damage and mistake everything in every way at hand, and see what comes of it.

    python tests/faults/storm.py --minutes 60 --jobs 2 --kinds kill,fault,fuzz [--seed 0] [--runs N]

A kind is a file beside this one with `try_one(seed, folder) -> dict`. The folder is empty and is
removed afterwards; what the cases of a kind share lies in its parent. A case says its `kind`,
`what` was done, the `outcome` and a `detail`. Outcomes: "equal" to what comes of sound input (for
wrong input that is accepted: it ran to its end), "error" (a message for people), "traceback",
"silent" (other results without a word), "lost" (something sound is gone, or half files are left),
"hang".
Each case is one JSON line; the table at the end counts them.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]  # as a script

KINDS = ("kill", "fault", "flip", "fuzz", "disagree")
OUTCOMES = ("equal", "error", "traceback", "silent", "lost", "hang")
GOOD = ("equal", "error")
SEEDS = 1_000_000
"""Between the first seeds of two jobs."""


def try_one(kind: str, seed: int, folder: Path) -> dict:
    """A case of a kind; what it raises itself is its outcome."""
    own = folder / kind / str(seed)
    own.mkdir(parents=True)
    try:
        case = importlib.import_module(f"faults.{kind}").try_one(seed, own)
    except Exception:
        case = {"kind": kind, "what": "", "outcome": "traceback", "detail": traceback.format_exc()}
    shutil.rmtree(own, ignore_errors=True)
    return {**case, "seed": seed}


def storm_in_processes(
    jobs: int, kinds: list[str], seed: int, minutes: float, runs: int, folder: Path
) -> list[dict]:
    """Cases of `jobs` storms side by side, each with seeds and a folder of its own."""
    with ProcessPoolExecutor(jobs) as pool:
        storms = [
            pool.submit(storm, kinds, seed + job * SEEDS, minutes, runs // jobs, folder / str(job))
            for job in range(jobs)
        ]
        return [case for running in storms for case in running.result()]


def storm(kinds: list[str], seed: int, minutes: float, runs: int, folder: Path) -> list[dict]:
    """Cases until the time is up or there are so many; each kind gets the same time."""
    spent, cases = dict.fromkeys(kinds, 0.0), []
    seeds = {kind: itertools.count(seed) for kind in kinds}
    while sum(spent.values()) < 60 * minutes and len(cases) < runs:
        kind = min(kinds, key=spent.__getitem__)
        started = time.monotonic()
        cases.append(try_one(kind, next(seeds[kind]), folder))
        spent[kind] += time.monotonic() - started
        print(json.dumps(cases[-1]), flush=True)
    return cases


def table(cases: list[dict]) -> str:
    """Kind: tried, and how many of each outcome."""
    counts = Counter((case["kind"], case["outcome"]) for case in cases)
    lines = [f"{'kind':10}{'tried':>10}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES)]
    for kind in dict.fromkeys(case["kind"] for case in cases):
        numbers = [counts[kind, outcome] for outcome in OUTCOMES]
        lines.append(f"{kind:10}" + "".join(f"{n:>10,}" for n in (sum(numbers), *numbers)))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="how long (default: for ever)"
    )
    parser.add_argument("--runs", type=int, default=sys.maxsize, help="so many cases at most")
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time (default: 1)")
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help=f"of cases (default: {','.join(KINDS)})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first cases (default: 0)")
    parser.add_argument(
        "--folder", type=Path, help="where to work; default: a temporary folder, removed at the end"
    )
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--kinds {unknown[0]!r} is none of {', '.join(KINDS)}")
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cases = storm_in_processes(
            options.jobs, kinds, options.seed, options.minutes, options.runs, folder
        )
    print(table(cases))
    return 0 if all(case["outcome"] in GOOD for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
