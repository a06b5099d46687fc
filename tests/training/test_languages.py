"""Runs that draw by language: on one process as on two, resumed to the bit, and what they log by
language against their rows."""

import itertools
import json
import shutil
from collections import Counter

import pytest
import torch
from helpers.tiny_models import make_tokenizer
from helpers.tiny_runs import (
    DATASETS,
    Inputs,
    config_of,
    final_bytes,
    final_state,
    metrics,
    run,
    write_tokenized,
)
from transformers import AutoConfig

from ml_embed.config import parse_config
from ml_embed.data.loader import Validation
from ml_embed.data.store import open_store
from ml_embed.files.paths import numbered_folders
from ml_embed.training.by_language import add_ranks, means_of
from ml_embed.training.resolve import resolve
from ml_embed.training.validation import metric_names

CODES = ("eng", "eng", "eng", "eng", "swa", "yor", None)
LANGUAGES = {
    name: [code for _, code in zip(range(rows), itertools.cycle(CODES), strict=False)]
    for name, (_, rows, *_) in DATASETS.items()
    if name != "pairs"  # says none
}
SAMPLING = {"language_sampling": {"alpha": 0.2, "cap": 3}, "valid_fraction": 0.3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    inputs = Inputs.write(tmp_path_factory.mktemp("languages"))
    shutil.rmtree(inputs.folder / "tokenized")
    write_tokenized(inputs.folder / "tokenized", make_tokenizer(), languages=LANGUAGES)
    return inputs


@pytest.fixture(scope="module")
def unbroken(inputs):
    printed = run(inputs, config_of(inputs, "unbroken", **SAMPLING))
    return inputs.run_dir("unbroken"), printed


def schedule_of(inputs):
    """The plans and the schedule of the unbroken run."""
    config = parse_config(json.loads((inputs.folder / "unbroken.json").read_text()))
    store = open_store(config.train_data_path, config.cache_dir, progress=False)
    backbone = AutoConfig.from_pretrained(config.model_path)
    resolved, schedule = resolve(config, backbone, store, 1)
    return resolved.datasets, schedule, store


def test_what_is_logged_by_language_is_of_the_rows_of_the_step(inputs, unbroken):
    """Samples and tokens of each step; losses whose means make up those of the dataset."""
    run_dir, printed = unbroken
    _, schedule, _ = schedule_of(inputs)
    lines = [line for line in metrics(run_dir) if line["split"] == "train"]
    assert "languages, drawn with alpha 0.2 and cap 3:" in printed
    seen = set()
    for line, batch in zip(lines, schedule.batches(range(len(lines))), strict=True):
        name, rows = batch.dataset, batch.rows.tolist()
        said = LANGUAGES.get(name, [None] * 100)
        samples = Counter(said[row] or "und" for row in rows)
        found = {
            key.split("/")[1]: value
            for key, value in line.items()
            if key.startswith("language/") and key.endswith("/samples")
        }
        assert found == samples
        tokens = sum(line[f"language/{code}/tokens"] for code in samples)
        assert tokens == line["tokens"]
        for loss in ("training_loss_hard", "training_loss_in_batch"):
            if f"{name}/{loss}" not in line:
                assert not any(f"language/{code}/{loss}" in line for code in samples)
                continue
            total = sum(line[f"language/{code}/{loss}"] * n for code, n in samples.items())
            assert total / len(rows) == pytest.approx(line[f"{name}/{loss}"], rel=1e-5)
            seen |= {(loss, len(samples) > 1)}
    assert {("training_loss_hard", True), ("training_loss_in_batch", True)} <= seen
    resolved = json.loads((run_dir / "resolved.json").read_text())
    assert resolved["languages"].keys() == {"eng", "swa", "yor", "und"}


def test_validation_by_language_makes_up_that_of_the_datasets(inputs, unbroken):
    run_dir, _ = unbroken
    plans, schedule, store = schedule_of(inputs)
    valid = [line for line in metrics(run_dir) if line["split"] == "valid"][-1]
    rows, wanted = {loss: Counter() for loss in ("hard", "in_batch", "ndcg@10")}, Counter()
    for plan in plans:
        said = LANGUAGES.get(plan.name, [None] * 100)
        own = Counter(
            said[r] or "und" for batch in schedule.valid_batches(plan.name) for r in batch
        )
        names = {"hard": "valid_loss_hard", "in_batch": "valid_loss_in_batch"}
        names |= {"ndcg@10": "ndcg@10"} if plan.task == "retrieval" else {}
        for loss, name in names.items():
            if own and f"{plan.name}/{name}" in valid:
                rows[loss] += own
                wanted[loss] += valid[f"{plan.name}/{name}"] * own.total()
    names = {"hard": "valid_loss_hard", "in_batch": "valid_loss_in_batch", "ndcg@10": "ndcg@10"}
    for loss, name in names.items():
        assert len(rows[loss]) > 1
        found = sum(valid[f"language/{code}/{name}"] * n for code, n in rows[loss].items())
        assert found == pytest.approx(wanted[loss], rel=1e-5)
    given = {key for key in valid if key.startswith("language/")}
    names = metric_names(Validation(schedule, store), None)
    assert given == {name for name in names if name.startswith("language/")}, "keep_best takes them"


def test_ranks_are_counted_with_their_languages():
    sums = {}
    add_ranks(sums, ("a", "b"), torch.tensor([1, 0, 1]), torch.tensor([1.0, 2.0, 4.0]))
    add_ranks(sums, ("b",), torch.tensor([0]), torch.tensor([11.0]))
    means = means_of(sums, "valid_loss_")
    assert means["language/a/recall@1"] == 0
    assert means["language/a/mrr@10"] == 0.5
    assert means["language/b/recall@1"] == pytest.approx(1 / 3)
    assert means["language/b/mrr@10"] == pytest.approx((1 + 0.25) / 3)


def test_two_processes_are_one(inputs, unbroken):
    run(inputs, config_of(inputs, "two", **SAMPLING, train_batch_size=2), processes=2)
    one, two = metrics(unbroken[0]), metrics(inputs.run_dir("two"))
    for line, other in zip(one, two, strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            exact = isinstance(value, str) or key.endswith(("/samples", "tokens"))
            if key != "encoded_tokens":
                assert other[key] == (value if exact else pytest.approx(value, rel=2e-4, abs=1e-5))
    weights = (final_state(run_dir) for run_dir in (unbroken[0], inputs.run_dir("two")))
    for (name, tensor), other in zip(*(w.items() for w in weights), strict=True):
        torch.testing.assert_close(other[1], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_a_resumed_run_ends_bit_equal(inputs):
    """Continued within a log window, which holds sums by language."""
    config = config_of(inputs, "whole", **SAMPLING, log_interval=4)
    run(inputs, config)
    folder = inputs.run_dir("whole")
    wanted, lines = final_bytes(folder), metrics(folder)
    for number, path in [*numbered_folders(folder / "resume"), *numbered_folders(folder)]:
        if number > 6:
            shutil.rmtree(path)
    run(inputs, config, "--resume", "auto")
    assert final_bytes(folder) == wanted
    assert metrics(folder) == lines
    assert sum("language/swa/training_loss_hard" in line for line in lines) > 1


def test_another_sampling_is_another_run(inputs, unbroken):
    shutil.copytree(unbroken[0], inputs.run_dir("changed"))
    changes = SAMPLING | {"language_sampling": {"alpha": 0.3}, "train_steps": 12}
    printed = run(inputs, config_of(inputs, "changed", **changes), "--resume", "auto", expected=2)
    assert "language_sampling: {'alpha': 0.2, 'cap': 3.0} -> {'alpha': 0.3, 'cap': None}" in printed
