"""Runs whose disk fails and whose newest checkpoint is damaged, then continued."""

from pathlib import Path

from faults.broken_runs import BrokenRuns, broken_runs


def try_one(seed: int, folder: Path) -> dict:
    return broken_runs(folder.parent, 1).try_one("fault", seed, BrokenRuns.DAMAGES)
