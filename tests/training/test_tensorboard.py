"""What TensorBoard shows: the tags of datasets and of task groups, with the numbers of
metrics.jsonl."""

import pytest
from helpers.in_process import train
from helpers.tiny_world import TASKS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RETRIEVED = {"recall@1", "mrr@10", "ndcg@10"}


def expected_tags(tasks: dict[str, str]) -> set[str]:
    """Of one training over datasets that all had a step and all have held-out rows."""
    tags = set()
    for name, task in tasks.items():
        metrics = {"training_loss_hard", "valid_loss_hard", *RETRIEVED}
        if task == "retrieval":
            metrics |= {"training_loss_in_batch", "valid_loss_in_batch"}
        tags |= {f"{group}/{metric}" for group in (name, f"Avg/{task}") for metric in metrics}
    return tags


def scalars(folder) -> dict[str, dict[int, float]]:
    """Tag -> step -> value."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def logged(lines: list[dict], of_dataset_or_task: bool) -> dict[str, dict[int, float]]:
    """The same from metrics.jsonl: names with or without a slash; validation's own plain names
    stand under valid/."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name in ("split", "step", "time") or ("/" in name) != of_dataset_or_task:
                continue
            tag = name if of_dataset_or_task or line["split"] == "train" else f"valid/{name}"
            found.setdefault(tag, {})[line["step"]] = value
    return found


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """Scalars and metrics of a run in which every dataset has steps of its own: one epoch."""
    folder = tmp_path_factory.mktemp("tensorboard")
    changes = {
        "train_steps": -1,
        "train_epochs": 1,
        "valid_fraction": 0.3,
        "log_interval": 2,
        "validation_steps": 3,
    }
    code, lines = train(
        world, folder, report_to=["tensorboard"], tb_dir=str(folder / "tb"), **changes
    )
    assert code == 0
    return scalars(folder / "tb" / "run"), lines


def test_datasets_and_task_groups_have_exactly_these_tags(run):
    tags, _ = run
    assert {tag for tag in tags if tag.split("/")[0] in {*TASKS, "Avg"}} == expected_tags(TASKS)


def test_tensorboard_has_the_numbers_of_the_metrics_file(run):
    tags, lines = run
    expected = logged(lines, True) | logged(lines, False)
    assert tags.keys() == expected.keys()
    for tag, values in expected.items():
        assert tags[tag] == pytest.approx(values, rel=1e-6), tag
    assert sum(len(values) for values in expected.values()) > 50


def test_a_group_is_the_mean_over_its_datasets_and_an_empty_one_logs_nothing(world, tmp_path):
    tasks = {"facts": "retrieval", "topics": "retrieval", "sentiment": "classification"}
    datasets = {name: {"task": task} for name, task in tasks.items()}
    changes = {"train_steps": -1, "train_epochs": 1, "log_interval": 100, "valid_fraction": 0.3}
    code, lines = train(world, tmp_path, datasets=datasets, **changes)
    assert code == 0
    assert {name for line in lines for name in line if "/" in name} == expected_tags(tasks)
    train_line, valid_line = lines
    for line, metric in (
        (train_line, "training_loss_hard"),
        (train_line, "training_loss_in_batch"),
        (valid_line, "ndcg@10"),
    ):
        mean = (line[f"facts/{metric}"] + line[f"topics/{metric}"]) / 2
        assert line[f"Avg/retrieval/{metric}"] == pytest.approx(mean)
        assert line[f"facts/{metric}"] != line[f"topics/{metric}"]
    assert (
        train_line["Avg/classification/training_loss_hard"]
        == train_line["sentiment/training_loss_hard"]
    )
