"""One launch at a time writes into a folder."""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import AcquireReturnProxy, Timeout

from ml_embed.distributed.collectives import (
    compute_on_all_processes,
    compute_on_main_process,
    world_size,
)
from ml_embed.errors import UserError
from ml_embed.files.atomic import disk_errors_are_user_errors
from ml_embed.files.locks import lock_folder, take_lock

ENDS_WITHIN_SECONDS = 60  # a launch that was told to stop saves first, and its launcher gives it 30
MARK = ".launch-"  # the beginning of a file's name, which says that this is the folder of a launch
SEEN_WITHIN_SECONDS = 10.0  # by other machines: a shared file system may be late to tell


@contextlib.contextmanager
def sole_launch(run_dir: Path) -> Iterator[None]:
    """Hold a lock beside the run folder while the body runs.

    Raises:
        UserError: another launch holds it and does not end within a minute; on all processes alike.
    """
    with _held_by_main_process(lambda: _lock_beside(run_dir)):
        yield


@contextlib.contextmanager
def sole_launch_into(folder: Path, lock: str, doing: str) -> Iterator[None]:
    """Make the folder that all processes write into, and hold its lock while the body runs.

    Args:
        lock: name of the lock file in it.
        doing: what is done with the folder, e.g. "mining into".
    Raises:
        UserError: another process holds it, the folder cannot be written, or the processes do not
            see the same folder; on all processes alike.
    """
    mark = compute_on_main_process(lambda: folder / f"{MARK}{uuid.uuid4().hex}")

    def take() -> AcquireReturnProxy:
        with disk_errors_are_user_errors(folder, "Choose another --output."):
            folder.mkdir(parents=True, exist_ok=True)
            held = lock_folder(folder / lock, doing)
            for left in folder.glob(f"{MARK}*"):  # by a launch that was killed
                left.unlink()
            if world_size() > 1:
                mark.touch()
            return held

    with _held_by_main_process(take):
        try:
            if world_size() > 1:
                compute_on_all_processes(lambda: _check_seen(mark.name, folder))
        finally:
            mark.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def _held_by_main_process(take: Callable[[], AcquireReturnProxy]) -> Iterator[None]:
    """Let the first process hold a lock; the system releases it when that process dies."""
    with contextlib.ExitStack() as held:

        def enter() -> None:
            held.enter_context(take())

        compute_on_main_process(enter)
        yield


def _check_seen(name: str, folder: Path) -> None:
    due = time.monotonic() + SEEN_WITHIN_SECONDS
    while not (folder / name).exists():
        if time.monotonic() > due:
            raise UserError(
                f"{folder} is not the folder that the first process of this launch writes into; "
                "give one that all machines share"
            )
        time.sleep(0.1)


def _lock_beside(run_dir: Path) -> AcquireReturnProxy:
    waiting = f"waiting for another launch that trains into {run_dir}"
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        return take_lock(run_dir.with_name(f".{run_dir.name}.lock"), ENDS_WITHIN_SECONDS, waiting)
    except Timeout:
        raise UserError(
            f"another launch is training into {run_dir}; stop it first, or choose another "
            "experiment_id"
        ) from None
    except OSError as error:
        raise UserError(
            f"output_dir: {run_dir.parent} cannot be written ({error.strerror}); see to that or "
            "choose another output_dir"
        ) from None
