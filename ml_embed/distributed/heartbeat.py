"""End a run when a process or machine of it does not answer, instead of waiting for hours.

Collectives wait for long, because one machine may convert data or write a checkpoint while the
others wait. A process that dies closes its connections; but before all processes have met there are
none, and a machine that loses power closes none. So each counts up a number in the rendezvous store
(which the launcher keeps on the first machine, or else the first process) and watches the numbers
of the others: of the processes of its machine until all have met, of machines to the end.
"""

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch.distributed as dist

BEAT_SECONDS = 3.0
LOST_AFTER_SECONDS = 30.0  # a stalled network or a swapping machine must be able to recover
START_SECONDS = 600.0  # to a machine's first beat: it may load libraries from a slow disk
LOST_EXIT_CODE = 69  # EX_UNAVAILABLE of sysexits.h


class Heartbeat:
    """Beats for one name and watches others, in two threads, until `stop`.

    Two, because an operation on a store whose machine is gone may never return.
    """

    def __init__(
        self,
        own: str | None,
        others: Sequence[str],
        keeper: str,
        patience: float,
        lost: Callable[[str], None],
    ):
        """
        Args:
            own: the name that this process beats for; None = another process does.
            others: the names to watch.
            keeper: the name of who keeps the store, without which nothing is known of the others.
            patience: seconds that the first answer of each may take, besides LOST_AFTER_SECONDS.
            lost: called once, in a thread, with a sentence that says who does not answer.
        """
        self._own, self._others, self._keeper = own, others, keeper
        self._patience, self._lost = patience, lost
        self._stopped = threading.Event()
        first_due = time.monotonic() + patience
        self._store_answered = first_due
        self._heard = dict.fromkeys(others, first_due)
        for target in (self._beat, self._watch):
            threading.Thread(target=target, daemon=True, name=f"heartbeat{target.__name__}").start()

    def stop(self) -> None:
        """Nobody needs to answer any more."""
        self._stopped.set()

    def _beat(self) -> None:
        counts: dict[str, int] = {}
        with contextlib.suppress(RuntimeError):  # the store is gone: `_watch` will say so
            store = connect_to_store(self._patience + LOST_AFTER_SECONDS)
            while not self._stopped.is_set():
                if self._own is not None:
                    store.add(_key(self._own), 1)
                for other in self._others:
                    count = store.add(_key(other), 0)
                    if counts.get(other, 0) != count:
                        counts[other] = count
                        self._heard[other] = time.monotonic()
                self._store_answered = time.monotonic()
                self._stopped.wait(BEAT_SECONDS)

    def _watch(self) -> None:
        woken = counted_from = time.monotonic()
        while not self._stopped.wait(LOST_AFTER_SECONDS / 30):
            before, woken = woken, time.monotonic()
            if woken - before > LOST_AFTER_SECONDS / 2:  # this process itself was stopped (Ctrl-Z)
                counted_from = woken
            last = {self._keeper: self._store_answered} | self._heard
            silent = [
                name
                for name, heard in last.items()
                if woken - max(heard, counted_from) > LOST_AFTER_SECONDS
            ]
            if self._keeper in silent:
                silent = [self._keeper]
            if silent and not self._stopped.is_set():
                names = ", ".join(silent)
                self._lost(f"{names} has not answered for {LOST_AFTER_SECONDS:.0f} seconds")
                return


def _key(name: str) -> str:
    return f"ml_embed/heartbeat/{name}"


def connect_to_store(seconds: float) -> dist.Store:
    """A connection of our own to the rendezvous store; where no launcher keeps it, rank 0 does."""
    launcher_keeps_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=os.environ["RANK"] == "0" and not launcher_keeps_it,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,  # the process group will share it
    )


@contextlib.contextmanager
def heartbeat(remedy: str) -> Iterator[Callable[[], None]]:
    """While the body runs, end this process (LOST_EXIT_CODE) if another does not answer.

    Args:
        remedy: what the user is told to do, once all are well.
    Yields:
        to be called when all processes have met: those of this machine are watched no more, because
        a dead process closes its connections.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with contextlib.ExitStack() as machines, contextlib.ExitStack() as neighbours:
        if processes > local:
            machines.callback(_among_machines(processes, local, remedy).stop)
        if local > 1:
            neighbours.callback(_among_neighbours(processes, local, remedy).stop)
        yield neighbours.close


def _among_machines(processes: int, local: int, remedy: str) -> Heartbeat:
    # torchrun, which accelerate launches with, counts the machines; without it they are taken to
    # have equally many processes
    machine = int(os.environ.get("GROUP_RANK", int(os.environ["RANK"]) // local))
    machines = int(os.environ.get("GROUP_WORLD_SIZE", processes // local))
    names = [f"machine {number} (counted from 0)" for number in range(machines)]
    others = [name for name in names if name != names[machine]]
    leads = os.environ["LOCAL_RANK"] == "0"  # beats, and speaks, for its machine
    own = names[machine] if leads else None
    lost = functools.partial(_say_and_end, remedy) if leads else _end
    return Heartbeat(own, others, names[0], START_SECONDS, lost)


def _among_neighbours(processes: int, local: int, remedy: str) -> Heartbeat:
    own = int(os.environ["RANK"])
    first = own - int(os.environ["LOCAL_RANK"])
    others = [f"process {number}" for number in range(first, first + local) if number != own]
    # one launcher starts all processes of a machine together
    patience = START_SECONDS if processes > local else 0.0
    lost = functools.partial(_say_and_end, remedy)
    return Heartbeat(f"process {own}", others, "process 0", patience, lost)


def _say_and_end(remedy: str, problem: str) -> None:
    advice = f"once all are well, {remedy}"
    print(f"error: {problem}; this one stops too: {advice}", file=sys.stderr, flush=True)
    _end(problem)


def _end(problem: str) -> None:
    os._exit(LOST_EXIT_CODE)  # the main thread may never return from its collective
