"""Which rows each optimizer step trains on: a function of seed, epoch and step alone.

A global batch is a list of rows of one dataset; it does not depend on how many processes share it.
Nothing here grows with the data: an epoch of a billion rows is a handful of counters and keyed
permutations.

Letters: W processes, B samples per process, G = B W rows of a full global batch, n <= G rows of
one, K negatives.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ml_embed.config import Task, TrainConfig, match_settings
from ml_embed.data.languages import LanguageDraws
from ml_embed.data.random import Permutation, mix, scramble, uniform
from ml_embed.data.split import Split, split_dataset
from ml_embed.data.store import TokenizedDataset
from ml_embed.data.tasks import task_of

SCHEDULE_VERSION = 2
"""Counted up whenever the same seed, data and settings give other rows than before: a run is not
continued on rows that it has not been trained on in the same order."""
_LARGEST_KEY = np.iinfo(np.uint64).max


@dataclass(frozen=True)
class DatasetPlan:
    """How one dataset is used: its task, and how many rows and negatives."""

    name: str
    task: Task
    num_negatives: int
    """K, negatives drawn per sample; a sample that has fewer uses all it has"""
    train_rows: int
    """rows that training draws from"""
    valid_rows: int
    """rows held out for validation"""
    draws: int
    """samples drawn per epoch: train_rows times the dataset's weight, or what language_sampling
    makes of it"""
    dropped_rows: int = 0
    """rows that are neither trained on nor validated: held out, but their query is trained on"""


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one step, over all processes."""

    dataset: str
    rows: np.ndarray
    """(n,) int64 row numbers in the dataset"""
    epoch: int
    """counts from 0"""


def plan_dataset(
    dataset: TokenizedDataset, config: TrainConfig, task: Task | None = None
) -> DatasetPlan:
    """How the config trains on a dataset and validates with it.

    The task is what the config says; else similarity if all rows have a score; else `task`, which
    the data says; else that of the name.
    """
    settings = match_settings(dataset.name, config.datasets)
    scored: Task | None = "similarity" if dataset.is_scored else None
    task = settings.task or scored or task or task_of(dataset.name)
    default_negatives = {
        "retrieval": config.num_hard_neg,
        "clustering": config.num_hard_neg_clustering,
        "classification": 1,
        "similarity": 0,
    }
    negatives = default_negatives[task] if settings.num_hard_neg is None else settings.num_hard_neg
    split = split_dataset(dataset, task, config.held_out_fraction, config.seed)
    train_rows = min(split.train_rows, settings.max_samples or split.train_rows)
    draws = max(1, int(train_rows * settings.weight + 0.5))
    return DatasetPlan(
        name=dataset.name,
        task=task,
        num_negatives=negatives,
        train_rows=train_rows,
        valid_rows=len(split.held_out),
        draws=draws,
        dropped_rows=split.dropped_rows,
    )


class Schedule:
    """All steps of a run. In an epoch each dataset's batches come as often as its draws fill them.

    A dataset's draws are spread evenly over its batches: their sizes differ by one row at most. The
    order of the batches is random in each epoch.
    """

    def __init__(
        self,
        plans: Sequence[DatasetPlan],
        splits: Mapping[str, Split],
        global_batch: int,
        seed: int,
        languages: Mapping[str, LanguageDraws] | None = None,
    ):
        """
        Args:
            plans: one per dataset.
            splits: of each dataset, which rows it trains on.
            global_batch: G, rows per step.
            seed: the run's.
            languages: how often each language of each dataset is drawn; None = each row alike.
        """
        self.plans = {plan.name: plan for plan in sorted(plans, key=lambda plan: plan.name)}
        self.global_batch = global_batch
        self.seed = seed
        self._splits = dict(splits)
        self._languages = languages
        self._names = list(self.plans)
        batches = [_batches_of(plan.draws, global_batch) for plan in self.plans.values()]
        self._first_batch = np.concatenate([[0], np.cumsum(batches)])

    @property
    def steps_per_epoch(self) -> int:
        return int(self._first_batch[-1])

    def batches(self, steps: Iterable[int]) -> list[GlobalBatch]:
        """The rows of each step; steps count from 0 over all epochs.

        Many steps at once cost hardly more than one.
        """
        epochs, positions = np.divmod(np.fromiter(steps, np.int64), self.steps_per_epoch)
        found: dict[int, GlobalBatch] = {}
        for epoch in np.unique(epochs).tolist():
            places = np.flatnonzero(epochs == epoch)
            batches = self._epoch_order(epoch)(positions[places])
            datasets = np.searchsorted(self._first_batch, batches, side="right") - 1
            for dataset in np.unique(datasets).tolist():
                plan = self.plans[self._names[dataset]]
                chosen = datasets == dataset
                numbers = batches[chosen] - self._first_batch[dataset]
                rows = self._rows_of_batches(plan, numbers, epoch)
                found |= zip(
                    places[chosen].tolist(),
                    (GlobalBatch(plan.name, r, epoch) for r in rows),
                    strict=True,
                )
        return [found[place] for place in range(len(epochs))]

    @lru_cache(maxsize=2)  # noqa: B019 - one Schedule lives as long as the run
    def _epoch_order(self, epoch: int) -> Permutation:
        return Permutation(self.steps_per_epoch, self.seed, "order", epoch)

    def _rows_of_batches(
        self, plan: DatasetPlan, numbers: np.ndarray, epoch: int
    ) -> list[np.ndarray]:
        """The rows of some of a dataset's batches of an epoch, which are numbered from 0."""
        count = _batches_of(plan.draws, self.global_batch)
        if self._languages is not None:
            key = self.seed, plan.name, epoch
            return self._languages[plan.name].rows_of_batches(numbers, count, plan.draws, key)
        draws = [
            np.arange(share.start, share.stop)
            for number in numbers.tolist()
            for share in [share_of(plan.draws, number, count)]
        ]
        rows = self._rows(plan, np.concatenate(draws), epoch)
        return np.split(rows, np.cumsum([len(own) for own in draws])[:-1])

    def _rows(self, plan: DatasetPlan, draws: np.ndarray, epoch: int) -> np.ndarray:
        """The rows that some of a dataset's draws (0 to plan.draws - 1) take, (len(draws),).

        Draws beyond the number of rows begin the next pass, which has another random order.
        """
        rows = np.empty_like(draws)
        passes, places = np.divmod(draws, plan.train_rows)
        for number in np.unique(passes):
            order = Permutation(plan.train_rows, self.seed, "rows", plan.name, epoch, int(number))
            chosen = passes == number
            rows[chosen] = self._splits[plan.name].training_rows(order(places[chosen]))
        return rows

    def valid_batches(self, name: str) -> list[np.ndarray]:
        """The held-out rows of a dataset in global batches, the same every time."""
        rows = self._splits[name].held_out
        count = _batches_of(len(rows), self.global_batch)
        return [rows[share_of(len(rows), number, count)] for number in range(count)]


def _batches_of(rows: int, global_batch: int) -> int:
    return -(-rows // global_batch)


def share_of(rows: int, number: int, shares: int) -> slice:
    """Share `number` of some rows: contiguous, and as long as the others to one row."""
    return slice(number * rows // shares, (number + 1) * rows // shares)


def draw_negatives(counts: np.ndarray, rows: np.ndarray, asked: int, key: int) -> np.ndarray:
    """Draw negatives without replacement: `asked` of each sample's own, or all if it has no more.

    Args:
        counts: (n,) negatives that each row has.
        rows: (n,) row numbers. A row's draw depends on (key, row) alone, not on the other rows.
        asked: K, negatives wanted per row.
        key: hash of seed, dataset and epoch; another key, another draw.
    Returns:
        (n, w) int64: the places of the drawn ones among the row's own, ascending, then -1; w is the
        most that any row uses.
    """
    used = np.minimum(counts, asked)[:, None]
    most = int(counts.max(initial=0))
    width = min(most, asked)
    places = np.arange(most)
    if most > asked:
        # One random key per place, mix(place, the row's key): the `asked` smallest of a row win.
        # Places that a row lacks have the largest key.
        keys = scramble(places.astype(np.uint64) + mix(rows, key)[:, None])
        keys[places >= counts[:, None]] = _LARGEST_KEY
        winners = keys.argsort(axis=1, kind="stable")[:, :width]
    else:
        winners = np.repeat(places[None], len(rows), axis=0)
    absent = places[:width] >= used
    winners[absent] = most  # sorted to the end
    winners.sort(axis=1)
    winners[absent] = -1
    return winners


def draw_rank(ranks: Sequence[int], seed: int, step: int) -> int:
    """The rank of one training step, drawn in proportion to the rank; the same on every process."""
    edges = np.cumsum(ranks)
    return ranks[int(np.searchsorted(edges, uniform(seed, "rank", step) * edges[-1], side="right"))]
