"""Runs that are killed or told to stop at any moment, on one process or two, then continued."""

from pathlib import Path

from faults.broken_runs import BrokenRuns, broken_runs


def try_one(seed: int, folder: Path) -> dict:
    runs = broken_runs(folder.parent, 1 + seed % 2)
    return runs.try_one("kill", seed, BrokenRuns.KILLS)
