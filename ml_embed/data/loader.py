"""From step numbers to batches, a little ahead of their use.

A batch is a pure function of its step; which steps are built together only decides how fast that
is.
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

PREFETCHED_BLOCKS = 2
# A block is what one process builds at once. From about so many rows on, array operations cost
# little a row.
ROWS_OF_A_BLOCK = 512
TOKENS_OF_A_BLOCK = 2**21  # at most, if every text were as long as texts may be: 16 MiB of ids
VALIDATION_EPOCH = (
    -1
)  # negatives are drawn as in an epoch that training never has: always the same ones


@dataclass(frozen=True)
class Loader:
    """This process's share of every step."""

    schedule: Schedule
    store: Store
    builder: BatchBuilder
    teacher_vectors: TeacherVectors | None
    """vectors computed beforehand, which go along with the training batches"""

    def training_batches(self, steps: range) -> Generator[ContrastiveBatch, None, None]:
        """The batches of `steps` (counted from 0), in order, built by a thread ahead of their
        use."""
        size = self.steps_of_a_block
        blocks = (steps[start : start + size] for start in range(0, len(steps), size))
        with ThreadPoolExecutor(1) as pool:
            pending = collections.deque(
                pool.submit(self.build, b) for b in itertools.islice(blocks, PREFETCHED_BLOCKS)
            )
            try:
                while pending:
                    batches = pending.popleft().result()
                    pending.extend(
                        pool.submit(self.build, block) for block in itertools.islice(blocks, 1)
                    )
                    yield from batches
            finally:
                for future in pending:
                    future.cancel()

    @property
    def steps_of_a_block(self) -> int:
        """Steps whose batches are built together. A batch that is kept keeps its block in memory,
        and three blocks are
        there at a time: one in use, the others ahead."""
        rows = -(-self.schedule.global_batch // self.builder.processes)
        texts = rows * (2 + max(plan.num_negatives for plan in self.schedule.plans.values()))
        return max(
            1, min(ROWS_OF_A_BLOCK // rows, TOKENS_OF_A_BLOCK // (texts * self.builder.max_length))
        )

    def build(self, steps: Iterable[int]) -> list[ContrastiveBatch]:
        """The batch of each step; steps of one dataset, epoch and size are built together."""
        chosen = self.schedule.batches(steps)
        alike = collections.defaultdict(list)
        for place, batch in enumerate(chosen):
            alike[batch.dataset, batch.epoch, len(batch.rows)].append(place)
        built: dict[int, ContrastiveBatch] = {}
        for (name, epoch, _), places in alike.items():
            rows = np.stack([chosen[place].rows for place in places])
            dataset, plan = self.store.datasets[name], self.schedule.plans[name]
            built.update(
                zip(places, self.builder.build_block(dataset, plan, rows, epoch), strict=True)
            )
        return [self._with_teacher(built[place], batch.rows) for place, batch in enumerate(chosen)]

    def _with_teacher(self, batch: ContrastiveBatch, rows: np.ndarray) -> ContrastiveBatch:
        if self.teacher_vectors is None:
            return batch
        return replace(
            batch, teacher=self.teacher_vectors.of_batch(batch, self.builder.own_rows(rows))
        )

    def held_out_batches(self, dataset: str) -> Iterator[tuple[int, ContrastiveBatch]]:
        """(rows of the global batch, this process's share of it) over a dataset's held-out rows."""
        plan = self.schedule.plans[dataset]
        for rows in self.schedule.valid_batches(dataset):
            yield (
                len(rows),
                self.builder.build(self.store.datasets[dataset], plan, rows, VALIDATION_EPOCH),
            )
