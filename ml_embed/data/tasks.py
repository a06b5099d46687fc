"""The task of a dataset by its name: a list in dataset_tasks.json, which also names its source."""

import functools
import json
from importlib import resources

from ml_embed.config import TASKS, Task


def task_of(name: str) -> Task:
    """The task of the dataset called `name` (its file's stem); "retrieval" if it is not listed."""
    return _listed_tasks().get(name, "retrieval")


@functools.cache
def _listed_tasks() -> dict[str, Task]:
    file = resources.files(__package__).joinpath("dataset_tasks.json")
    listed = json.loads(file.read_text(encoding="utf-8"))
    return {name: task for task in TASKS for name in listed.get(task, [])}
