"""One launch at a time writes into a run folder."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ml_embed.distributed import asked_of_first
from ml_embed.errors import UserError

ENDS_WITHIN_SECONDS = 60  # a launch that was told to stop saves first, and its launcher gives it 30
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # some shared file systems


@contextlib.contextmanager
def sole_launch(run_dir: Path) -> Iterator[None]:
    """Hold a lock beside the run folder; the system lets go of it when the first process dies, however that is.

    Raises:
        UserError: another launch holds it and does not end within a minute; on all processes alike.
    """
    lock = FileLock(run_dir.with_name(f".{run_dir.name}.lock"))

    def take() -> None:
        try:
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            _wait_for(lock, run_dir)
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise UserError(
                    f"output_dir: {run_dir.parent} cannot be written ({error.strerror}); see to that or choose another "
                    "output_dir"
                ) from None

    asked_of_first(take)
    try:
        yield
    finally:
        lock.release()


def _wait_for(lock: FileLock, run_dir: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another launch that trains into {run_dir}")
        try:
            lock.acquire(timeout=ENDS_WITHIN_SECONDS)
        except Timeout:
            raise UserError(
                f"another launch is training into {run_dir}; stop it first, or choose another experiment_id"
            ) from None
