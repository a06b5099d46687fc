"""Builds the batches of steps, a little ahead of their use.

A batch depends on its step alone. Steps are built in groups, because that is faster.
"""

import collections
import itertools
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from ml_embed.data.batch import ContrastiveBatch
from ml_embed.data.batch_builder import BatchBuilder
from ml_embed.data.schedule import Schedule
from ml_embed.data.store import Store
from ml_embed.data.teacher_vectors import TeacherVectors

PREFETCHED_GROUPS = 2
ROWS_PER_GROUP = 512
"""most rows of this process in a group; from about this many on, array operations cost little per
row"""
TOKENS_PER_GROUP = 2**21
"""most tokens of a group, were every text as long as texts may be: 16 MiB of ids"""
VALIDATION_EPOCH = -1
"""an epoch that training never has: validation draws the same negatives every time"""


@dataclass(frozen=True)
class Validation:
    """Data with rows that are held out, and which rows they are."""

    schedule: Schedule
    store: Store


@dataclass(frozen=True)
class Loader:
    """Makes this process's share of every step."""

    schedule: Schedule
    store: Store
    builder: BatchBuilder
    teacher_vectors: TeacherVectors | None
    """vectors that a teacher computed beforehand, to go along with training batches; or None"""
    validation: Validation | None = None
    """data of its own for validation; None = the rows that `schedule` holds out"""

    def training_batches(self, steps: range) -> Generator[ContrastiveBatch, None, None]:
        """The batches of `steps` (counted from 0), in order; a thread builds them ahead of use."""
        size = self.steps_per_group
        groups = (steps[start : start + size] for start in range(0, len(steps), size))
        with ThreadPoolExecutor(1) as pool:
            pending = collections.deque(
                pool.submit(self.build, group)
                for group in itertools.islice(groups, PREFETCHED_GROUPS)
            )
            try:
                while pending:
                    batches = pending.popleft().result()
                    pending.extend(
                        pool.submit(self.build, group) for group in itertools.islice(groups, 1)
                    )
                    yield from batches
            finally:
                for future in pending:
                    future.cancel()

    @property
    def held_out(self) -> Validation:
        """What validation goes through."""
        return self.validation or Validation(self.schedule, self.store)

    @property
    def steps_per_group(self) -> int:
        """Steps whose batches are built together.

        A batch in use keeps its whole group in memory. Three groups are there at a time: the one in
        use and two ahead of it.
        """
        rows = -(-self.schedule.global_batch // self.builder.processes)
        texts = rows * (2 + max(plan.num_negatives for plan in self.schedule.plans.values()))
        by_tokens = TOKENS_PER_GROUP // (texts * self.builder.max_length)
        return max(1, min(ROWS_PER_GROUP // rows, by_tokens))

    def build(self, steps: Iterable[int]) -> list[ContrastiveBatch]:
        """The batch of each step; steps of the same dataset, epoch and size are built together."""
        chosen = self.schedule.batches(steps)
        alike = collections.defaultdict(list)
        for place, batch in enumerate(chosen):
            alike[batch.dataset, batch.epoch, len(batch.rows)].append(place)
        built: dict[int, ContrastiveBatch] = {}
        for (name, epoch, _), places in alike.items():
            rows = np.stack([chosen[place].rows for place in places])
            dataset, plan = self.store.datasets[name], self.schedule.plans[name]
            batches = self.builder.build_group(dataset, plan, rows, epoch)
            built.update(zip(places, batches, strict=True))
        return [self._with_teacher(built[place], batch.rows) for place, batch in enumerate(chosen)]

    def _with_teacher(self, batch: ContrastiveBatch, rows: np.ndarray) -> ContrastiveBatch:
        if self.teacher_vectors is None:
            return batch
        vectors = self.teacher_vectors.of_batch(batch, self.builder.own_rows(rows))
        return replace(batch, teacher=vectors)

    def held_out_batches(self, dataset: str) -> Iterator[tuple[int, ContrastiveBatch]]:
        """(rows of the global batch, this process's share of it) over a dataset's held-out rows."""
        schedule, store = self.held_out.schedule, self.held_out.store
        data, plan = store.datasets[dataset], schedule.plans[dataset]
        for rows in schedule.valid_batches(dataset):
            yield len(rows), self.builder.build(data, plan, rows, VALIDATION_EPOCH)
