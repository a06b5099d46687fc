"""Lock files: two processes never write the same folder."""

import errno
import fcntl
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from ml_embed.errors import UserError
from ml_embed.notices import notice

_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP)
"""What some shared file systems answer; for ENOSYS filelock has another way."""


def take_lock(path: Path, seconds: float = 0, waiting: str | None = None) -> AcquireReturnProxy:
    """Hold the lock file `path` until the returned context ends, or this process dies.

    On a file system without locks nothing is held: `is_locked` of the context's value tells.

    Args:
        path: the lock file; made if it does not exist.
        seconds: how long to wait for another process; -1 = as long as it takes.
        waiting: said before waiting.
    Raises:
        Timeout: another process holds it for longer.
        OSError: the file cannot be made, or not be locked by anybody.
    """
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _check_held(path)
            if seconds == 0:
                raise
            if waiting:
                notice(waiting)
            lock.acquire(timeout=seconds)
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
    return AcquireReturnProxy(lock)


def _check_held(path: Path) -> None:
    """Raise OSError if a lock is refused for another reason than that a process holds it.

    filelock takes "permission denied" for a lock that is held, and would wait without end.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return


def lock_folder(path: Path, doing: str) -> AcquireReturnProxy:
    """Hold the lock file of a folder, so that two commands never write the same files.

    Args:
        path: the lock file.
        doing: what the holder of the lock does with the folder, e.g. "mining into".
    Raises:
        UserError: another process holds the lock.
    """
    try:
        return take_lock(path)
    except Timeout as error:
        raise UserError(
            f"another process is {doing} {path.parent}. Wait for it, or stop it first"
        ) from error
