"""Errors that are addressed to the person who runs the program."""

import errno
import functools
import importlib.metadata
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

from packaging.version import Version

USER_ERROR_EXIT_CODE = 2
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
}
"""Errors of the operating system that no program makes: disks that are full or fail, places."""
_ERROR_IN_TEXT = re.compile(r"(?:os error |errno )(\d+)")


class UserError(ValueError):
    """A mistake in the user's input: says what is wrong, where, and what to do about it.

    Entry points print it without a traceback. Errors of our own are `assert`s or other exceptions
    and keep theirs.
    """


def check_installed(key: str, package: str, oldest: str, instead: str) -> None:
    """Refuse what a key of the config asks for where an optional package is not there.

    Args:
        key: what needs it.
        oldest: version.
        instead: what else the user may do.
    Raises:
        UserError: it is not there, or too old.
    """
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found == "none" or Version(found) < Version(oldest):
        raise UserError(
            f"{key} needs {package} {oldest} or newer (here: {found}); pip install "
            f"'{package}>={oldest}', or {instead}"
        )


def one_line(error: BaseException) -> str:
    """The reason that another library gives, as one line: its first, and those after it that this
    one announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    end = next(
        (number for number, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1
    )
    return " ".join(lines[: end + 1])


def disk_error(error: BaseException) -> OSError | None:
    """What a disk says no with, also where a library has made a text of it; None for all else."""
    if isinstance(error, OSError) and error.errno is not None:
        return error if error.errno in DISK_ERRORS else None
    said = _ERROR_IN_TEXT.search(str(error))  # of safetensors, tokenizers, Arrow
    number = int(said[1]) if said else 0
    return OSError(number, os.strerror(number)) if number in DISK_ERRORS else None


def message_for_user(error: BaseException) -> str | None:
    """What a UserError or a disk's error says to the user; None for all else."""
    if isinstance(error, UserError):
        return str(error)
    if (problem := disk_error(error)) is not None:
        return f"{problem}. See to that disk or place, then run the same command again"
    return None


def exit_on_user_error(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap an entry point: a UserError or a disk's error becomes a message and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> int:
        hook, threading.excepthook = threading.excepthook, _silent_about_disks
        try:
            return main(*args, **kwargs) or 0
        except Exception as error:
            if (said := message_for_user(error)) is None:
                raise
        finally:
            threading.excepthook = hook
        print(f"error: {said}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT_CODE

    return wrapped


def _silent_about_disks(thrown: threading.ExceptHookArgs) -> None:
    """For threads of libraries (TensorBoard's), whose errors their next caller meets again."""
    if thrown.exc_value is None or disk_error(thrown.exc_value) is None:
        threading.__excepthook__(thrown)
