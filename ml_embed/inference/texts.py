"""What a caller gives to be encoded: texts and a prompt, checked; texts cut into windows."""

import itertools
from collections.abc import Iterable, Iterator, Mapping

from ml_embed.errors import UserError
from ml_embed.notices import warn


def as_several(given: str | Iterable[str], name: str) -> Iterable[str]:
    """One string counts as a list of one.

    Raises:
        UserError: bytes, whose items are numbers; tables and mappings, whose items are names; or
            what has no items.
    """
    if isinstance(given, str):
        return [given]
    if isinstance(given, Mapping) or hasattr(given, "columns") or hasattr(given, "column_names"):
        raise UserError(
            f"{name} is a {type(given).__name__}, whose items are names of columns; give the texts "
            "of one column as a list"
        )
    if isinstance(given, bytes | bytearray | memoryview) or not isinstance(given, Iterable):
        raise UserError(
            f"{name} is of type {type(given).__name__}; give a string, or several in a list"
        )
    return given


def prompt_text(
    prompts: Mapping[str, str], name: str | None, text: str | None, default: str | None
) -> str:
    """What is put before each text, as sentence-transformers chooses it.

    Args:
        prompts: saved name -> text.
        name: of a saved prompt.
        text: the prompt itself, which counts before `name`.
        default: name of the prompt where neither is given; None is no prompt.
    Raises:
        UserError: there is no prompt of this name.
    """
    if text is not None:
        if name is not None:
            warn(f"prompt_name {name!r} is ignored, because prompt is given")
        if text not in prompts:
            return text
        warn(
            f"prompt {text!r} is the name of a saved prompt and is taken as that; say "
            f"prompt_name={text!r}, or put another text in front of the texts yourself"
        )
        return prompts[text]
    name = default if name is None else name
    if name is not None and name not in prompts:
        known = ", ".join(map(repr, prompts)) or "none"
        raise UserError(
            f"prompt_name {name!r} is not one of the model's saved prompts ({known}); "
            "a text of your own is given as prompt"
        )
    return "" if name is None else prompts[name]


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
