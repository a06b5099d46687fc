"""Processes meet before they form a process group, so that none waits for hours for a dead one."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from ml_embed.distributed import heartbeat

# Processes wait for one that converts the data or writes a checkpoint. Dead ones are noticed much
# sooner: by closed connections, and over several machines by the heartbeat.
_COLLECTIVE_TIMEOUT = timedelta(hours=2)


@contextlib.contextmanager
def meeting(patience: timedelta = _COLLECTIVE_TIMEOUT) -> Iterator[timedelta]:
    """Wait for all processes, then let the body form their group; after it they wait for long.

    While torch forms a group of gloo it holds Python's lock, and no heartbeat is heard. So all
    processes come to it together, and it has no more time than the heartbeat gives.

    Args:
        patience: how long they wait for each other from then on.
    Yields:
        the timeout to form the group with.
    """
    store = _wait_for_all() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None
    yield timedelta(seconds=heartbeat.LOST_AFTER_SECONDS)
    del store  # which the group shares by now, where this process keeps it
    if (group := dist.group.WORLD) is not None:
        group.set_timeout(patience)
        group.get_group_store().set_timeout(patience)
        _keep_for_ever(group)


def _keep_for_ever(group: dist.ProcessGroup) -> None:
    """Let a group live until its process ends, also after destroy_process_group.

    torch would hold Python's lock while it waits for gloo's threads to end; and a thread that is
    late to let go of the last collective's tensor waits for that lock. The process would hang after
    its work is done. Seen in about 1 of 100 ends of runs on a machine under load.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _wait_for_all() -> dist.Store:
    store = heartbeat.connect_to_store(heartbeat.START_SECONDS)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keys = [f"ml_embed/here/{attempt}/{n}" for n in range(int(os.environ["WORLD_SIZE"]))]
    store.set(keys[int(os.environ["RANK"])], "")
    store.wait(keys, _COLLECTIVE_TIMEOUT)  # the heartbeat ends it if one of them dies
    return store
