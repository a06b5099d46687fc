"""Rows, negatives and ranks depend on seed, epoch and step alone, not on how many processes run."""

from collections import Counter

import numpy as np
import pytest

from ml_embed.config import DatasetConfig, check_dataset_names, match_settings
from ml_embed.data.random import Permutation
from ml_embed.data.schedule import (
    DatasetPlan,
    Schedule,
    draw_negatives,
    draw_rank,
    share_of,
)
from ml_embed.data.split import random_split
from ml_embed.errors import UserError

ROWS = {"big": 57, "small": 3, "middle": 20}
VALID = {"big": 5, "small": 0, "middle": 2}


def make_schedule(seed=0, global_batch=8, weights=None, max_samples=None) -> Schedule:
    plans = []
    for name, rows in ROWS.items():
        train_rows = min(rows - VALID[name], (max_samples or {}).get(name, rows))
        draws = round(train_rows * (weights or {}).get(name, 1))
        plans.append(DatasetPlan(name, "retrieval", 2, train_rows, VALID[name], draws))
    splits = {name: random_split(name, rows, VALID[name], seed) for name, rows in ROWS.items()}
    return Schedule(plans, splits, global_batch, seed)


def epoch_batches(schedule: Schedule, epoch: int):
    steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
    return schedule.batches(steps)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000])
def test_a_permutation_is_one(size):
    assert sorted(Permutation(size, 3, "x")(np.arange(size))) == list(range(size))


def test_permutations_of_four_are_about_equally_likely():
    counts = Counter(tuple(Permutation(4, seed)(np.arange(4))) for seed in range(4800))
    assert len(counts) == 24
    assert max(counts.values()) < 2 * min(counts.values())


def test_an_epoch_has_every_training_row_once_and_no_held_out_row():
    schedule = make_schedule()
    for epoch in range(2):
        seen = Counter(
            (b.dataset, int(row)) for b in epoch_batches(schedule, epoch) for row in b.rows
        )
        held_out = {
            (name, int(r)) for name in ROWS for rows in schedule.valid_batches(name) for r in rows
        }
        assert set(seen.values()) == {1}
        assert len(seen) == sum(ROWS.values()) - sum(VALID.values())
        assert len(held_out) == sum(VALID.values())
        assert not held_out & seen.keys()


def test_epochs_differ_and_datasets_are_interleaved():
    schedule = make_schedule()
    first, second = epoch_batches(schedule, 0), epoch_batches(schedule, 1)
    assert [b.dataset for b in first] != [b.dataset for b in second]
    assert [b.rows.tolist() for b in first] != [b.rows.tolist() for b in second]
    assert {b.epoch for b in second} == {1}


def test_weights_multiply_how_often_rows_are_drawn():
    schedule = make_schedule(weights={"big": 0.5, "small": 3})
    drawn = Counter()
    for batch in epoch_batches(schedule, 0):
        drawn[batch.dataset] += len(batch.rows)
    assert drawn == {"big": 26, "small": 9, "middle": 18}
    small = Counter(
        int(r) for b in epoch_batches(schedule, 0) if b.dataset == "small" for r in b.rows
    )
    assert set(small.values()) == {3}


def test_max_samples_is_one_fixed_choice():
    schedule = make_schedule(max_samples={"big": 10})
    chosen = [
        {int(r) for b in epoch_batches(schedule, e) if b.dataset == "big" for r in b.rows}
        for e in range(3)
    ]
    assert len(chosen[0]) == 10
    assert chosen[0] == chosen[1] == chosen[2]


def test_a_dataset_smaller_than_a_batch_trains():
    schedule = make_schedule(global_batch=64)
    assert {b.dataset: len(b.rows) for b in epoch_batches(schedule, 0)} == {
        "big": 52,
        "small": 3,
        "middle": 18,
    }


def test_rows_are_spread_evenly_over_batches():
    """Nine rows at four are three times three, and never four, four and one."""
    plans = [DatasetPlan("nine", "retrieval", 0, 9, 0, 9)]
    schedule = Schedule(plans, {"nine": random_split("nine", 9, 0, seed=0)}, 4, seed=0)
    assert [len(batch.rows) for batch in epoch_batches(schedule, 0)] == [3, 3, 3]
    sizes = {b.dataset: set() for b in epoch_batches(make_schedule(), 0)}
    for batch in epoch_batches(make_schedule(), 0):
        sizes[batch.dataset].add(len(batch.rows))
    assert sizes == {"big": {7, 8}, "small": {3}, "middle": {6}}


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 4, 7, 15])
def test_shares_partition_the_batch_in_order(rows, processes):
    shares = [np.arange(rows)[share_of(rows, p, processes)] for p in range(processes)]
    assert np.concatenate(shares).tolist() == list(range(rows))
    assert max(map(len, shares)) <= -(-rows // processes)


def test_negatives_are_drawn_without_replacement_and_by_row():
    counts, rows = np.array([10, 3, 0, 10]), np.array([5, 6, 7, 8])
    drawn = draw_negatives(counts, rows, 4, key=1)
    assert (drawn >= 0).sum(axis=1).tolist() == [4, 3, 0, 4]
    assert drawn[1].tolist() == [0, 1, 2, -1]
    assert all(0 <= a < b < c < d < 10 for a, b, c, d in drawn[[0, 3]].tolist()), (
        "ascending, so none twice"
    )
    alone = draw_negatives(counts[3:], rows[3:], 4, key=1)
    assert alone[0].tolist() == drawn[3].tolist(), "a row's draw does not depend on its batch"
    assert draw_negatives(counts, rows, 4, key=2)[0].tolist() != drawn[0].tolist()


def test_each_negative_is_drawn_about_equally_often():
    counts = Counter()
    for key in range(3000):
        counts.update(draw_negatives(np.array([6]), np.array([0]), 2, key)[0].tolist())
    assert min(counts.values()) > 0.85 * 1000
    assert max(counts.values()) < 1.15 * 1000


def test_ranks_are_drawn_in_proportion_to_the_rank():
    ranks = (64, 128, 256)
    counts = Counter(draw_rank(ranks, 0, step) for step in range(7000))
    for rank in ranks:
        assert counts[rank] == pytest.approx(7000 * rank / 448, rel=0.1)
    assert draw_rank(ranks, 0, 5) == draw_rank(ranks, 0, 5)


def test_settings_go_by_name_before_pattern():
    settings = {"wiki_*": DatasetConfig(weight=2), "wiki_fr": DatasetConfig(weight=3)}
    assert match_settings("wiki_fr", settings).weight == 3
    assert match_settings("wiki_de", settings).weight == 2
    assert match_settings("news", settings).weight == 1
    with pytest.raises(UserError, match="newz"):
        check_dataset_names(["news"], {"newz": DatasetConfig()})
