"""Processes meet before they form a process group, so that none waits for hours for a dead one."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from ml_embed.distributed import heartbeat

# Processes wait for one that converts the data or writes a checkpoint. Dead ones are noticed much
# sooner: by closed connections, and over several machines by the heartbeat.
_COLLECTIVE_TIMEOUT = timedelta(hours=2)


@contextlib.contextmanager
def meeting() -> Iterator[timedelta]:
    """Wait for all processes, then let the body form their group; after it they wait for long.

    While torch forms a group of gloo it holds Python's lock, and no heartbeat is heard. So all
    processes come to it together, and it has no more time than the heartbeat gives.

    Yields:
        the timeout to form the group with.
    """
    store = _wait_for_all() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None
    yield timedelta(seconds=heartbeat.LOST_AFTER_SECONDS)
    del store  # which the group shares by now, where this process keeps it
    if (group := dist.group.WORLD) is not None:
        group.set_timeout(_COLLECTIVE_TIMEOUT)
        group.get_group_store().set_timeout(_COLLECTIVE_TIMEOUT)


def _wait_for_all() -> dist.Store:
    store = heartbeat.connect_to_store(heartbeat.START_SECONDS)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keys = [f"ml_embed/here/{attempt}/{n}" for n in range(int(os.environ["WORLD_SIZE"]))]
    store.set(keys[int(os.environ["RANK"])], "")
    store.wait(keys, _COLLECTIVE_TIMEOUT)  # the heartbeat ends it if one of them dies
    return store
