"""Long work in pieces, dealt out among the processes of a launch: who is free takes the next one.

Which process does a piece does not change what it makes. So the result is that of one process, and
work that was interrupted is continued by any number of them.
"""

import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from ml_embed.distributed.collectives import (
    compute_on_all_processes,
    compute_on_main_process,
    gather_objects,
    process_index,
    world_size,
)
from ml_embed.errors import UserError, message_for_user
from ml_embed.files.arrays import blocks
from ml_embed.files.atomic import sync_folder, write_json
from ml_embed.files.digests import bytes_digest, seal_is_broken, sealed, value_digest
from ml_embed.files.json_file import parse_json
from ml_embed.notices import warn

Piece = TypeVar("Piece")
Request = TypeVar("Request")
Result = TypeVar("Result")
Outcome = TypeVar("Outcome")


def work_through(
    pieces: Sequence[Piece],
    work: Callable[[Piece], Any],
    bar: tqdm | None = None,
    takes_part: bool = True,
) -> None:
    """Do `work` on each piece, once, on the first process that is free for it. A collective.

    Args:
        pieces: the same on all processes; best the largest first.
        work: what it does to different pieces may happen at the same time.
        bar: of the first process; it is moved by the pieces that all have begun.
        takes_part: False on a process that leaves the work to the others.
    Raises:
        UserError: `work` raised one somewhere, or met an error of a disk; on all processes alike.
            Pieces that nobody had begun are left.
    """
    numbers = _Numbers(len(pieces))

    def own_share() -> None:
        try:
            for number in numbers if takes_part else ():
                if bar is not None:
                    bar.update(number - bar.n)
                work(pieces[number])
        except Exception:
            numbers.stop()
            raise

    compute_on_all_processes(own_share)
    if bar is not None:
        bar.update(len(pieces) - bar.n)


def compute_shared(pieces: Sequence[Piece], compute: Callable[[Piece], Result]) -> list[Result]:
    """`compute` of each piece, in their order, computed as in `work_through`. A collective."""
    own: dict[int, Result] = {}

    def work(number: int) -> None:
        own[number] = compute(pieces[number])

    work_through(range(len(pieces)), work)
    results = {number: result for made in gather_objects(own) for number, result in made.items()}
    return [results[number] for number in range(len(pieces))]


def conduct(
    run: Callable[[Callable[[Request], Result]], Outcome], serve: Callable[[Request], Result]
) -> Outcome:
    """Let the first process do what only one can; what it asks for, all do together. A collective.

    Args:
        run: called on the first process, with a function that asks: it calls `serve` on all
            processes, with the same request.
        serve: a collective, too.
    Returns:
        what `run` returns; on all processes.
    """

    def ask(request: Request) -> Result:
        compute_on_main_process(lambda: (False, request))
        return serve(request)

    while True:
        content: Any  # the outcome, or a request
        done, content = compute_on_main_process(lambda: (True, run(ask)))
        if done:
            return content
        try:
            serve(content)
        except Exception as error:
            if message_for_user(error) is None:
                raise  # else the first process has it too, and will say so


class _Numbers:
    """The numbers from 0 to `count` - 1, each given to one process. Making it is a collective."""

    def __init__(self, count: int):
        self._count = count
        self._given = 0
        # A number of its own in the store that the processes met in, counted up by all of them.
        self._key = compute_on_main_process(lambda: f"ml_embed/shares/{uuid.uuid4().hex}")

    def __iter__(self) -> Iterator[int]:
        while (number := self._take(1)) < self._count:
            yield number

    def stop(self) -> None:
        """Give no more."""
        self._take(self._count)

    def _take(self, amount: int) -> int:
        if (group := dist.group.WORLD) is not None and world_size() > 1:
            return group.get_group_store().add(self._key, amount) - amount
        self._given += amount
        return self._given - amount


def leads_its_machine() -> bool:
    """Whether this is the first process of its machine, for work that takes a machine's memory."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def usable_cores() -> int:
    """Cores that this process may use, as far as the system says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Rows:
    """A file of rows that all processes fill together, block by block.

    Which blocks are done stands beside it: in a journal of each process while they work, and in one
    record of all from the next beginning on. A block counts when its rows are on the disk, as long
    as they have the digest that they were written with.
    """

    path: Path
    dtype: type
    shape: tuple[int, ...]
    """(..., rows, width); what comes before the rows is filled together, as (..., block, width)"""
    block: int
    """rows that are made at a time: what an interruption costs at most. With a power of two from
    2,048 up no two blocks of a two-dimensional file share a page of memory or a block of a disk,
    which a file system of several machines might write back whole."""
    made_of: Any
    """JSON; rows that were made of something else are made anew"""
    head: bytes = b""
    """what stands before the rows; of a whole number of pages, for the same reason"""

    def fill(
        self,
        make: Callable[[int, int], np.ndarray],
        title: str,
        progress: bool = True,
        takes_part: bool = True,
    ) -> np.ndarray:
        """Make all rows that are not there yet. A collective.

        Args:
            make: (start, stop) -> (..., stop - start, width) rows.
            title, progress: of the bar on stderr, of the first process.
            takes_part: see `work_through`.
        Returns:
            all of them, memory-mapped, read-only.
        """
        todo = compute_on_main_process(self._open)
        journal = self._journal(process_index())

        def fill_block(rows: slice) -> None:
            digest = self._write(rows, make(rows.start, rows.stop))
            with journal.open("a") as file:
                file.write(f"{rows.start // self.block} {digest}\n")
                file.flush()
                os.fsync(file.fileno())

        with tqdm(
            total=len(todo),
            desc=title,
            unit=" blocks",
            leave=False,
            disable=not progress or process_index() > 0,
        ) as bar:
            work_through(todo, fill_block, bar, takes_part)
        rows = self.mapped()
        gather_objects(None)  # from here on one of them may rename or remove the file
        return rows

    def mapped(self) -> np.ndarray:
        """The rows, memory-mapped, read-only."""
        if 0 in self.shape:  # mmap takes no empty range
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", len(self.head), self.shape)

    def forget(self) -> None:
        """Remove what says which blocks are done, where nobody needs to know it any more."""
        for path in (self._record, *self._journals()):
            path.unlink(missing_ok=True)

    @property
    def _record(self) -> Path:
        return self.path.with_name(f"{self.path.name}.done.json")

    def _journal(self, process: int) -> Path:
        return self.path.with_name(f"{self.path.name}.done-{process}")

    def _journals(self) -> list[Path]:
        prefix = f"{self.path.name}.done-"
        return [path for path in self.path.parent.iterdir() if path.name.startswith(prefix)]

    def _open(self) -> list[slice]:
        """Make the file as long as it will be, and one record of what is done; the other blocks."""
        dtype = np.dtype(self.dtype)
        form = value_digest([self.made_of, dtype.str, self.shape, self.block, len(self.head)])
        done = self._done(form)
        if not done:
            self.forget()  # before what it speaks of is gone
            sync_folder(self.path.parent)
        with self.path.open("ab") as file:
            if not done:
                file.truncate(0)
                file.write(self.head)
            file.truncate(len(self.head) + math.prod(self.shape) * dtype.itemsize)
        todo = [
            rows for rows in blocks(self.shape[-2], self.block) if not self._is_done(rows, done)
        ]
        for rows in todo:
            done.pop(self._number(rows), None)
        write_json(self._record, sealed({"form": form, "done": done}))
        for journal in self._journals():
            journal.unlink()
        return todo

    def _number(self, rows: slice) -> str:
        """What a block is called in records."""
        return str(rows.start // self.block)

    def _is_done(self, rows: slice, done: Mapping[str, str]) -> bool:
        """Whether a block's rows are on the disk as they were written. A warning if they differ."""
        wanted = done.get(self._number(rows))
        if wanted is None:
            return False
        if bytes_digest(np.ascontiguousarray(self.mapped()[..., rows, :]).tobytes()) == wanted:
            return True
        warn(f"{self.path}: rows {rows.start} to {rows.stop} are damaged; they are made anew")
        return False

    def _done(self, form: str) -> dict[str, str]:
        """Digests of the blocks that are on the disk, by number, if they are of this form."""
        if not (self.path.exists() and self._record.exists()):
            return {}
        try:
            record = parse_json(self._record.read_bytes())
            if seal_is_broken(record):
                raise ValueError("it has changed since it was written")
            if record["form"] != form:
                return {}
            # the last line of a process that was killed may be torn
            texts = [path.read_text().rpartition("\n")[0] for path in self._journals()]
            lines = [line.split(" ") for text in texts for line in text.splitlines()]
            return record["done"] | {str(int(number)): digest for number, digest in lines}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._record} or a file {self._journal(0).name[:-1]}* beside it is damaged "
                f"({error}); remove these to make {self.path.name} anew"
            ) from None

    def _write(self, rows: slice, made: np.ndarray) -> str:
        """The digest of a block that is then on the disk."""
        *planes, total, width = self.shape
        assert made.shape == (*planes, rows.stop - rows.start, width), made.shape
        row_bytes = np.dtype(self.dtype).itemsize * width
        made = np.ascontiguousarray(made, self.dtype).reshape(-1, rows.stop - rows.start, width)
        # Opened for writing alone: what is read back might be written back, over others' rows.
        with os.fdopen(os.open(self.path, os.O_WRONLY), "wb") as file:
            for plane in range(len(made)):
                file.seek(len(self.head) + (plane * total + rows.start) * row_bytes)
                file.write(made[plane].data.cast("B"))
            file.flush()
            os.fsync(file.fileno())
        return bytes_digest(made.tobytes())
