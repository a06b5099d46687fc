"""Which task a dataset trains, by its name. The list lies beside this file, in dataset_tasks.json,
with its source."""

import functools
import json
from importlib import resources

from ml_embed.config import TASKS, Task


def task_of(name: str) -> Task:
    """The task of the dataset called `name` (a raw file's stem); "retrieval" for any name that is
    not listed."""
    return _listed_tasks().get(name, "retrieval")


@functools.cache
def _listed_tasks() -> dict[str, Task]:
    listed = json.loads(
        resources.files(__package__).joinpath("dataset_tasks.json").read_text(encoding="utf-8")
    )
    return {name: task for task in TASKS for name in listed.get(task, [])}
