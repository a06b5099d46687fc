"""What every client's script does with its arguments; it runs in the client's environment."""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path


def run(encode: Callable[[str, list[str]], tuple[list, list | None]], *packages: str) -> None:
    """Encode the given texts and write the vectors.

    Args:
        encode: folder, texts -> vectors, and vectors with the folder's prompt "query", or None
            where the client has no prompts.
        packages: whose versions are written.
    """
    folder, texts, output = sys.argv[1:]
    vectors, queries = encode(folder, json.loads(Path(texts).read_text(encoding="utf-8")))
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    found = {"versions": versions, "vectors": as_lists(vectors)}
    found["queries"] = None if queries is None else as_lists(queries)
    Path(output).write_text(json.dumps(found), encoding="utf-8")


def as_lists(vectors: list) -> list[list[float]]:
    return [[float(value) for value in vector] for vector in vectors]
