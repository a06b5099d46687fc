"""JSON files: whatever is wrong with one, its reader says so in a sentence."""

import json
from pathlib import Path
from typing import Any

from ml_embed.errors import UserError

KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number"}
"""What values are called in messages."""
DEEPEST = 50


def parse_json(text: str | bytes) -> Any:
    """A value of JSON text; ValueError for all that Python's own reader cannot make one of."""
    text = text if isinstance(text, str) else text.decode()
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _is_deep(value):
        raise ValueError("it is nested too deeply")
    if "\\ud" in text.lower():  # half a character, which can be neither written nor be a path
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _is_deep(value: Any) -> bool:
    """Whether it is nested deeper than anything here, and too deep to be written or shown."""
    level = [value]
    for _ in range(DEEPEST):
        holders = [v for v in level if isinstance(v, dict | list)]
        level = [i for v in holders for i in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return False
    return True


def read_json(path: Path, remedy: str, kind: type = dict) -> Any:
    """The value that a JSON file holds.

    Args:
        path: of the file.
        remedy: what the person who has a damaged file is to do, the end of a sentence.
        kind: dict or list: what the value must be.
    Raises:
        UserError: the file cannot be read, is no JSON, or holds a value of another kind.
    """
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None
    if not isinstance(value, kind):
        raise UserError(f"{path} is damaged (it must hold {KINDS[kind]}); {remedy}")
    return value
