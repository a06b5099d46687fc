"""Tokenizing under a watch: a pattern that finds no end on some text is named, not waited for."""

import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from ml_embed.errors import UserError, one_line

SECONDS = 60.0
"""Longest time for no text at all: a guess, far beyond what a busy machine needs."""
CHARACTERS_PER_SECOND = 20_000
"""Of the slowest tokenizer on a busy machine: a guess; measured are millions on one core."""
SHOWN_CHARACTERS = 60

T = TypeVar("T")


def watched(encode: Callable[[list[str]], T], texts: list[str]) -> T:
    """What `encode` makes of texts.

    Raises:
        UserError: the tokenizer finds no end, or breaks; names the text.
    """
    try:
        return _in_time(partial(encode, texts), texts)
    except TimeoutError:
        problem = "its pattern finds no end there"
    except BaseException as error:
        if not is_panic(error):
            raise
        problem = one_line(error)
    text = _culprit(encode, texts)
    if text is None:  # the machine stood still, not the tokenizer
        return encode(texts)
    shown = text[:SHOWN_CHARACTERS] + "..." * (len(text) > SHOWN_CHARACTERS)
    raise UserError(
        f"the tokenizer cannot read a text of {len(text):,} characters, {shown!r} ({problem}); "
        "remove the text, or take a tokenizer with another pattern"
    )


def is_panic(error: BaseException) -> bool:
    """Whether Rust code gave up; its class, no Exception, is importable from nowhere."""
    return type(error).__name__ == "PanicException"


def _culprit(encode: Callable[[list[str]], T], texts: Sequence[str]) -> str | None:
    """The first text that cannot be read alone; None if each can."""
    for text in texts:
        try:
            _in_time(partial(encode, [text]), [text])
        except BaseException as error:
            if isinstance(error, TimeoutError) or is_panic(error):
                return text
            raise
    return None


def _in_time(work: Callable[[], T], texts: Sequence[str]) -> T:
    """What `work` returns; TimeoutError if it takes longer than any tokenizer does for the texts.

    The work then goes on in its thread, which ends with the process: Rust cannot be interrupted.
    """
    done: queue.SimpleQueue[tuple[list[T], BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put(([work()], None))
        except BaseException as error:
            done.put(([], error))

    threading.Thread(target=run, daemon=True).start()
    try:
        found, error = done.get(timeout=SECONDS + sum(map(len, texts)) / CHARACTERS_PER_SECOND)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return found[0]
