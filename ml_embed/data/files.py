"""Writing files so that they are whole whenever they exist."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from ml_embed.errors import UserError

PARTIAL_SUFFIX = ".partial"


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


def lock_folder(path: Path, doing: str) -> AcquireReturnProxy:
    """Hold the lock file `path` until the returned context ends, so that two runs never write the same files.

    Raises:
        UserError: another process holds it; it is `doing` something ("mining into") the lock file's folder.
    """
    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another process is {doing} {path.parent}. Wait for it, or stop it first") from error
