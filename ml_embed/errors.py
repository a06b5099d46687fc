"""Errors that are addressed to the person who runs the program."""

import functools
import sys
from collections.abc import Callable
from typing import Any

USER_ERROR_EXIT_CODE = 2


class UserError(ValueError):
    """A mistake in the user's input: says what is wrong, where, and what to do about it.

    Entry points print it without a traceback. Errors of our own are `assert`s or other exceptions
    and keep theirs.
    """


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


def exit_on_user_error(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap an entry point: a UserError becomes a message on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return USER_ERROR_EXIT_CODE

    return wrapped
