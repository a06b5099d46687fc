"""Writing files so that they are whole whenever they exist."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout
from tqdm import tqdm

from ml_embed.errors import UserError

PARTIAL_SUFFIX = ".partial"
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP)  # some shared file systems; for ENOSYS filelock has another way


def partial_path(path: Path) -> Path:
    """Where a file is written before it is whole."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def commit(path: Path) -> None:
    """Rename the finished partial file of `path` to `path`, after its bytes reached the disk."""
    partial = partial_path(path)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step."""
    partial_path(path).write_text(text, encoding="utf-8")
    commit(path)


@contextmanager
def disk_errors_are_user_errors(folder: Path, remedy: str) -> Iterator[None]:
    """A full disk, missing permission or the like below `folder` becomes a UserError that ends in `remedy`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left while writing to {folder}. {remedy}") from error
        raise UserError(f"cannot write to {folder}: {error}. {remedy}") from error


def take_lock(path: Path, seconds: float = 0, waiting: str | None = None) -> AcquireReturnProxy:
    """Hold the lock file `path` until the returned context ends; the system lets go of it when this process dies.

    On a file system without locks nothing is held: `is_locked` of the context's value tells.

    Args:
        path: the lock file; made if it does not exist.
        seconds: how long to wait for another process; -1 = as long as it takes.
        waiting: said before waiting.
    Raises:
        Timeout: another process holds it for longer.
        OSError: the file cannot be made.
    """
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if seconds == 0:
                raise
            if waiting:
                tqdm.write(waiting)
            lock.acquire(timeout=seconds)
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
    return AcquireReturnProxy(lock)


def lock_folder(path: Path, doing: str) -> AcquireReturnProxy:
    """`take_lock`, so that two runs never write the same files.

    Raises:
        UserError: another process holds it; it is `doing` something ("mining into") the lock file's folder.
    """
    try:
        return take_lock(path)
    except Timeout as error:
        raise UserError(f"another process is {doing} {path.parent}. Wait for it, or stop it first") from error
