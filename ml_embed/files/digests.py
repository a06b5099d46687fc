"""Digests of content: tell files and settings apart by what they hold."""

import functools
import json
from pathlib import Path
from typing import Any

import xxhash

_PIECE = 1 << 20  # bytes


def file_digest(path: Path) -> str:
    """The xxh3_128 of a file's bytes, hexadecimal; read once as long as the file stays the same."""
    status = path.stat()
    return _file_digest(path.resolve(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(4096)
def _file_digest(path: Path, size: int, changed: int) -> str:
    digest, piece = xxhash.xxh3_128(), bytearray(_PIECE)
    view = memoryview(piece)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(view[:count])
    return digest.hexdigest()


def value_digest(value: Any) -> str:
    """The xxh3_128 of a JSON value, whatever the order of its keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())
