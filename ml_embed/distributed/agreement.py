"""Processes of one run compare what they are about to run, and stop where it is not the same."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ml_embed.distributed.collectives import compute_on_all_processes, gather_objects, world_size
from ml_embed.errors import UserError
from ml_embed.files.digests import file_digest, value_digest

SHOWN = 20
"""Differences that an error lists; more are only counted."""
_SHOWN_LETTERS = 100  # of a value
_MISSING = "nothing"

Facts = Mapping[str, Any]
"""What a process is about to run, by the name that its user knows it by. Values are JSON; an object
in it is compared entry by entry."""


def check_agreement(facts: Callable[[], Facts]) -> None:
    """Stop all processes of a run unless they hold the same facts. A collective.

    The processes exchange one digest; only where it differs, the facts themselves.

    Args:
        facts: gives this process's; not called where there is only one process.
    Raises:
        UserError: on all processes alike, with each fact that differs and what each process holds.
    """
    if world_size() == 1:
        return
    own = compute_on_all_processes(facts)
    if len(set(gather_objects(value_digest(_entries(own))))) == 1:
        return
    raise UserError(
        "the processes of this run do not run the same thing:\n"
        + "".join(f"  - {line}\n" for line in differences(gather_objects(own)))
        + "start all of them with the same config, code, data, models and libraries"
    )


def software() -> Facts:
    """The code and the libraries that what a process computes depends on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,  # draws the order of the data
        "digest of ml_embed": _code(),
    }


def _code() -> dict[str, str]:
    """The digest of each file of the package's code, by its path in the package."""
    package = Path(__file__).parents[1]
    return {
        path.relative_to(package).as_posix(): file_digest(path)
        for path in sorted(package.rglob("*.py"))
    }


def differences(held: Sequence[Facts]) -> list[str]:
    """A line for each fact in which processes differ: which of them hold which value."""
    entries = [_entries(facts) for facts in held]
    told = []
    for name in dict.fromkeys(name for each in entries for name in each):
        values = [each.get(name, _MISSING) for each in entries]
        if len(set(values)) > 1:
            told.append(f"{name}: {_values(values)}")
    if len(told) > SHOWN:
        told[SHOWN:] = [f"and {len(told) - SHOWN} more"]
    return told


def _entries(facts: Facts) -> dict[str, str]:
    """Each value as JSON; those in objects under the names of the objects, too."""
    entries: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            entries |= {f"{name}: {inner}": text for inner, text in _entries(value).items()}
        else:
            entries[name] = json.dumps(value, sort_keys=True, default=str)
    return entries


def _values(values: list[str]) -> str:
    """One line that says which processes hold which value."""
    held = sorted(range(len(values)), key=lambda process: (values.index(values[process]), process))
    return ", ".join(
        f"{_shortened(value)} on {_numbered(list(processes))}"
        for value, processes in groupby(held, key=values.__getitem__)
    )


def _shortened(value: str) -> str:
    return value if len(value) <= _SHOWN_LETTERS else f"{value[:_SHOWN_LETTERS]}…"


def _numbered(processes: list[int]) -> str:
    """Process 3; processes 0-2 and 5."""
    runs = [
        [process for _, process in run]
        for _, run in groupby(enumerate(processes), key=lambda pair: pair[1] - pair[0])
    ]
    named = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    listed = " and ".join(filter(None, [", ".join(named[:-1]), named[-1]]))
    return f"process{'es' if len(processes) > 1 else ''} {listed}"
