"""A run that cannot learn says so at the start, by the dataset's name."""

import pytest
from helpers.in_process import train
from helpers.tiny_models import make_tokenizer
from helpers.tiny_runs import Inputs, write_backbone, write_tokenized

import run as run_script


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learnable")
    write_backbone(folder / "backbone")
    return Inputs(folder)


def dry_run(inputs, name: str, datasets: dict, tasks: dict, **changes) -> int:
    """run.py --dry-run on datasets of the given (task, rows, documents, negatives)."""
    folder = inputs.folder / name
    write_tokenized(folder, make_tokenizer(), datasets)
    settings = {dataset: {"task": task} for dataset, task in tasks.items()}
    config = inputs.config(name, train_data_path=str(folder), datasets=settings, **changes)
    return run_script.main(["--config", str(config), "--dry-run"])


GOOD = {"good": ("retrieval", 9, 9, (1, 2))}


@pytest.mark.parametrize(
    ("task", "shape", "changes", "reason"),
    [
        ("clustering", (7, 5, (0, 0)), {}, "it has no negatives"),
        ("classification", (7, 5, (0, 0)), {}, "it has no negatives"),
        ("clustering", (7, 5, (3, 3)), {"num_hard_neg_clustering": 0}, "num_hard_neg is 0"),
        ("retrieval", (1, 5, (0, 0)), {}, "a batch has one row"),
        ("retrieval", (7, 5, (0, 0)), {"train_batch_size": 1}, "a batch has one row"),
        ("retrieval", (7, 1, (0, 0)), {}, "all rows have the same passage"),
    ],
)
def test_a_dataset_without_a_loss_is_named(inputs, capsys, request, task, shape, changes, reason):
    name = f"bad{request.node.callspec.indices}".translate(str.maketrans(" ':{},[]", "_" * 8))
    both = GOOD | {"empty": (task, *shape)}
    tasks = {"good": "retrieval", "empty": task}
    assert dry_run(inputs, f"{name}_both", both, tasks, **changes) == 0
    said = capsys.readouterr().err
    assert "no batch of these datasets has a loss" in said
    assert "- empty: " in said
    assert reason in said
    assert "- good" not in said
    alone = {"empty": (task, *shape)}
    assert dry_run(inputs, f"{name}_alone", alone, {"empty": task}, **changes) != 0
    said = capsys.readouterr().err
    assert "no dataset has a loss" in said
    assert reason in said


def test_nothing_is_said_where_all_datasets_have_a_loss(inputs, capsys):
    datasets = GOOD | {"pairs": ("retrieval", 5, 9, (0, 0)), "lonely": ("retrieval", 1, 4, (2, 2))}
    assert dry_run(inputs, "fine", datasets, dict.fromkeys(datasets, "retrieval")) == 0
    assert "loss" not in capsys.readouterr().err


def test_a_warm_up_longer_than_the_run_is_said(world, tmp_path, capsys):
    assert train(world, tmp_path, "long", ["--dry-run"], warmup_steps=4, train_steps=4)[0] == 0
    assert "the warm-up of 4 steps is not over when the run of 4 steps" in capsys.readouterr().err
    assert train(world, tmp_path, "short", ["--dry-run"], warmup_steps=3, train_steps=4)[0] == 0
    assert "warm-up" not in capsys.readouterr().err


def test_what_validation_lacks_is_said(inputs, capsys):
    """A query of many passages is trained on wherever one of them is held out."""
    shape = ("retrieval", 30, 30, (1, 2))
    datasets = {"good": shape, "asked_again": shape}
    tasks = dict.fromkeys(datasets, "retrieval")
    assert dry_run(inputs, "lacking", datasets, tasks, valid_fraction=0.1) == 0
    said = capsys.readouterr().err
    assert "3 held-out rows are not used, because their queries are trained on" in said
    assert "validation has no rows of asked_again:" in said
    assert dry_run(inputs, "whole", {"good": shape}, {"good": "retrieval"}, valid_fraction=0.1) == 0
    assert "held-out" not in capsys.readouterr().err
