"""Batches come in order and ahead of their use, the same in whatever group they are built."""

import contextlib
import threading
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from helpers.tiny_models import make_tokenizer
from helpers.tiny_runs import DATASETS, write_tokenized

from ml_embed.data import loader as loader_module
from ml_embed.data.batch import ContrastiveBatch
from ml_embed.data.batch_builder import BatchBuilder
from ml_embed.data.loader import Loader
from ml_embed.data.schedule import DatasetPlan, Schedule
from ml_embed.data.split import random_split
from ml_embed.data.store import open_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    return open_store(
        write_tokenized(folder / "tokenized", make_tokenizer()), folder / "cache", progress=False
    )


def make_loader(store, process=0, processes=1, max_length=12) -> Loader:
    """Eight datasets, two smaller than a batch; rows have 0 to more negatives than asked."""
    plans = [
        DatasetPlan(name, DATASETS[name][0], 5, d.num_rows, 0, 2 * d.num_rows)
        for name, d in store.datasets.items()
    ]
    splits = {n: random_split(n, d.num_rows, 0, seed=0) for n, d in store.datasets.items()}
    schedule = Schedule(plans, splits, 4, seed=0)
    return Loader(schedule, store, BatchBuilder(0, max_length, 1, True, process, processes), None)


def assert_equal(a: ContrastiveBatch, b: ContrastiveBatch) -> None:
    for field in fields(ContrastiveBatch):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "texts":
            assert torch.equal(x.input_ids, y.input_ids)
            assert torch.equal(x.packed.cu_seqlens, y.packed.cu_seqlens)
            assert x.packed.lengths == y.packed.lengths
        elif isinstance(x, np.ndarray):
            assert np.array_equal(x, y), field.name
        elif isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype
            assert torch.equal(x, y), field.name
        else:
            assert x == y, field.name


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_batch_does_not_depend_on_the_steps_it_is_built_with(store, processes):
    for process in range(processes):
        loader = make_loader(store, process, processes)
        steps = range(3, 2 * loader.schedule.steps_per_epoch)  # into the second epoch
        together = loader.build(steps)
        for step, batch in zip(steps, together, strict=True):
            assert_equal(loader.build([step])[0], batch)
        widths = {batch.negatives.shape[1] for batch in together if batch.dataset == "answers"}
        assert len(widths) > 1, "batches of one group that are not equally wide"


@pytest.mark.parametrize("rows_per_group", [1, 8, 1000])
def test_training_batches_come_in_order_from_any_step(store, monkeypatch, rows_per_group):
    monkeypatch.setattr(loader_module, "ROWS_PER_GROUP", rows_per_group)
    loader = make_loader(store)
    steps = range(2, 25)
    for step, batch in zip(steps, loader.training_batches(steps), strict=True):
        assert_equal(loader.build([step])[0], batch)


def test_a_group_is_bounded_by_rows_and_by_tokens(store):
    """Of four rows of at most seven texts."""
    assert make_loader(store, max_length=12).steps_per_group == 512 // 4
    assert make_loader(store, max_length=4096).steps_per_group == 2**21 // (4 * 7 * 4096)
    assert make_loader(store, processes=2, max_length=4096).steps_per_group == 2**21 // (
        2 * 7 * 4096
    )
    assert make_loader(store, max_length=10**6).steps_per_group == 1


def test_what_goes_wrong_while_building_reaches_the_user_of_the_batches(store):
    loader = replace(make_loader(store), store=None)
    with pytest.raises(AttributeError):
        next(loader.training_batches(range(5)))


def test_leaving_early_ends_the_thread(store):
    threads = threading.active_count()
    with contextlib.closing(make_loader(store).training_batches(range(10_000))) as batches:
        next(batches)
    assert threading.active_count() == threads
