"""What a caller gives to be encoded: one string or many, checked and cut into windows."""

import itertools
from collections.abc import Iterable, Iterator

from ml_embed.errors import UserError


def as_several(given: str | Iterable[str], name: str) -> Iterable[str]:
    """One string counts as a list of one.

    Raises:
        UserError: bytes, whose items are numbers, or what has no items.
    """
    if isinstance(given, str):
        return [given]
    if isinstance(given, bytes | bytearray | memoryview) or not isinstance(given, Iterable):
        raise UserError(
            f"{name} is of type {type(given).__name__}; give a string, or several in a list"
        )
    return given


def windows_of(texts: Iterable[str], prefix: str, size: int) -> Iterator[list[str]]:
    """Texts behind the prefix, `size` at a time, read only as far as they are asked for.

    Raises:
        UserError: for the first text that is none.
    """
    start = 0
    iterator = iter(texts)
    while window := list(itertools.islice(iterator, size)):
        for number, text in enumerate(window, start):
            _check_text(text, number)
        yield [prefix + text for text in window]
        start += len(window)


def _check_text(text: object, number: int) -> None:
    if not isinstance(text, str):
        raise UserError(
            f"text {number} (from 0) is of type {type(text).__name__}; encode takes strings"
        )
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"text {number} (from 0) has half a surrogate pair, which is no character; repair it"
        ) from None
