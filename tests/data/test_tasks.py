import json
from pathlib import Path

import ml_embed
from ml_embed.config import TASKS
from ml_embed.data.tasks import task_of


def test_listed_names_and_all_others():
    assert task_of("imdb") == "classification"
    assert task_of("banking77") == "clustering"
    assert task_of("msmarco") == task_of("") == task_of("IMDB") == "retrieval"


def test_every_listed_name_has_one_task_and_the_source_is_kept():
    listed = json.loads(
        (Path(ml_embed.__file__).parent / "data" / "dataset_tasks.json").read_text()
    )
    assert "2603.19223" in listed.pop("about")
    assert listed.keys() <= set(TASKS)
    names = [name for task in listed for name in listed[task]]
    assert len(names) == len(set(names)) == 43
    assert all(task_of(name) == task for task in listed for name in listed[task])
