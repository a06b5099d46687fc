"""End a run over several machines when one of them stops answering, instead of waiting for hours.

A machine that loses power closes no connection. The others would wait in a collective until its
timeout, which must be long, because one machine may convert data or write a checkpoint while the
others wait. So each machine counts up a number in the rendezvous store that the launcher keeps on
the first one, and every process watches the numbers.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch.distributed as dist

BEAT_SECONDS = 3.0
LOST_AFTER_SECONDS = 30.0  # a stalled network or a swapping machine must be able to recover
START_SECONDS = 600.0  # to a machine's first beat: it may load libraries from a slow disk
LOST_EXIT_CODE = 69  # EX_UNAVAILABLE of sysexits.h


class Heartbeat:
    """Beats for this machine and watches the others, in two threads, until `stop`.

    Two, because an operation on a store whose machine is gone may never return.
    """

    def __init__(
        self,
        machine: int,
        machines: int,
        leads: bool,
        connect: Callable[[], dist.Store],
        lost: Callable[[str], None],
    ):
        """
        Args:
            machine: this one's number, of `machines`.
            leads: this process is the one that beats for its machine.
            connect: opens a connection of our own to the store.
            lost: called once, in a thread, with a sentence that says who does not answer.
        """
        self._machine, self._leads = machine, leads
        self._others = [number for number in range(machines) if number != machine]
        self._connect, self._lost = connect, lost
        self._stopped = threading.Event()
        first_due = time.monotonic() + START_SECONDS
        self._store_answered = first_due
        self._heard = dict.fromkeys(self._others, first_due)
        for target in (self._beat, self._watch):
            threading.Thread(target=target, daemon=True, name=f"heartbeat{target.__name__}").start()

    def stop(self) -> None:
        """The run is over: nobody needs to answer any more."""
        self._stopped.set()

    def _beat(self) -> None:
        counts: dict[int, int] = {}
        with contextlib.suppress(RuntimeError):  # the store is gone: `_watch` will say so
            store = self._connect()
            while not self._stopped.is_set():
                if self._leads:
                    store.add(_key(self._machine), 1)
                for other in self._others:
                    count = store.add(_key(other), 0)
                    if counts.get(other, 0) != count:
                        counts[other] = count
                        self._heard[other] = time.monotonic()
                self._store_answered = time.monotonic()
                self._stopped.wait(BEAT_SECONDS)

    def _watch(self) -> None:
        while not self._stopped.wait(1.0):
            now = time.monotonic()
            silent = [
                other for other, heard in self._heard.items() if now - heard > LOST_AFTER_SECONDS
            ]
            if now - self._store_answered > LOST_AFTER_SECONDS:
                silent = [0]  # the store is on the first machine: nothing is known of the others
            if silent and not self._stopped.is_set():
                names = ", ".join(map(str, silent))
                self._lost(
                    f"machine {names} (counted from 0) has not answered for "
                    f"{LOST_AFTER_SECONDS:.0f} seconds"
                )
                return


def _key(machine: int) -> str:
    return f"ml_embed/heartbeat/{machine}"


@contextlib.contextmanager
def heartbeat() -> Iterator[None]:
    """While the body runs, end this process (LOST_EXIT_CODE) if a machine stops answering.

    Does nothing where all processes are on one machine: there a dead process closes its
    connections.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes <= on_this_machine:
        yield
        return
    leads = os.environ["LOCAL_RANK"] == "0"

    def connect() -> dist.Store:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(address, port, timeout=timedelta(seconds=START_SECONDS))

    def lost(problem: str) -> None:
        if leads:
            advice = "start all machines again with --resume auto once they are well"
            print(f"error: {problem}; this one stops too: {advice}", file=sys.stderr, flush=True)
        os._exit(LOST_EXIT_CODE)  # the main thread may never return from its collective

    # torchrun, which accelerate launches with, counts the machines; without it they are taken to
    # have equally many processes
    machine = int(os.environ.get("GROUP_RANK", int(os.environ["RANK"]) // on_this_machine))
    machines = int(os.environ.get("GROUP_WORLD_SIZE", processes // on_this_machine))
    beating = Heartbeat(machine, machines, leads, connect, lost)
    try:
        yield
    finally:
        beating.stop()
