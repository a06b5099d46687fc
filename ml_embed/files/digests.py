"""Digests of content: tell files, folders and settings apart by what they hold.

The one digest of files that are written here is xxh3_128, hexadecimal. (Of raw data a manifest
notes the SHA-256, which hubs say of their files.) Names, sizes and dates of files decide nothing,
but that a file is not read again as long as they stay as they are: `digests_of` remembers what it
has read. `--verify` reads all the same, so that damage of the disk itself is met.
"""

import functools
import json
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ml_embed.files.json_file import parse_json
from ml_embed.notices import notice

MEMORY = ".digests.json"
"""What `digests_of` remembers in a folder."""
SEAL = "digest"
"""Key of a JSON object that holds the digest of all its others."""
_PIECE = 1 << 20  # bytes
_SETTLED = 50_000_000
"""ns since the last change of a file before its state tells another change apart: clocks of file
systems tick every 10 ms at most"""


def file_digest(path: Path) -> str:
    """The xxh3_128 of a file's bytes, hexadecimal; read once as long as the file stays the same."""
    return _file_digest(path.resolve(), _state(path))


@functools.lru_cache(4096)
def _file_digest(path: Path, state: str) -> str:
    digest, piece = xxhash.xxh3_128(), bytearray(_PIECE)
    view = memoryview(piece)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(view[:count])
    return digest.hexdigest()


def _state(path: Path) -> str:
    """Changes whenever a program writes the file, whatever date it gives it."""
    s = path.stat()
    return f"{s.st_dev}:{s.st_ino}:{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}"


class TextsDigest:
    """The digest of texts in their order, as token ids that are added block by block."""

    def __init__(self) -> None:
        self._lengths, self._tokens = xxhash.xxh3_128(), xxhash.xxh3_128()

    def add(self, lengths: np.ndarray, tokens: np.ndarray) -> None:
        """Add n texts: (n,) lengths and all their ids joined, (T,), of any integer types."""
        self._lengths.update(np.ascontiguousarray(lengths, np.int64).data)
        self._tokens.update(np.ascontiguousarray(tokens, np.int32).data)

    def hexdigest(self) -> str:
        return value_digest([self._lengths.hexdigest(), self._tokens.hexdigest()])


def texts_digest(texts: Iterable[str]) -> str:
    """The xxh3_128 of texts in their order; one after another, because there may be millions."""
    digest = xxhash.xxh3_128()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def bytes_digest(content: bytes) -> str:
    """The xxh3_128 of bytes."""
    return xxhash.xxh3_128_hexdigest(content)


def value_digest(value: Any) -> str:
    """The xxh3_128 of a JSON value, whatever the order of its keys."""
    return bytes_digest(json.dumps(value, sort_keys=True).encode())


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of all else in it under SEAL."""
    unsealed = {key: value for key, value in content.items() if key != SEAL}
    return unsealed | {SEAL: value_digest(unsealed)}


def seal_is_broken(content: dict[str, Any]) -> bool:
    """Whether a JSON object has changed since it was `sealed`; one without a seal has not."""
    return SEAL in content and content[SEAL] != sealed(content)[SEAL]


def only_differing(before: Any, now: Any) -> tuple[Any, Any]:
    """Two values; of two objects, which may be long, what is not the same in both."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return before, now
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    old, new = ({key: side[key] for key in keys if key in side} for side in (before, now))
    return old, new


def digests_of(
    paths: Iterable[Path], memory: Sequence[Path] = (), verify: bool = False
) -> dict[Path, str]:
    """The digest of each file: remembered while the file stays the same, or else read.

    Says how many bytes were read, and how long that took.

    Args:
        paths: files, each of them once or more.
        memory: folders to remember in; all are asked, and the first that can be written is told.
        verify: read all files, whatever is remembered.
    """
    paths = list(paths)
    if memory:
        _let_settle(paths)
    states = {path: _state(path) for path in paths}
    remembered = {} if verify else {k: v for folder in memory for k, v in _recall(folder).items()}
    unknown = [path for path, state in states.items() if state not in remembered]
    found = {path: remembered.get(state, "") for path, state in states.items()}
    if unknown:
        begin, settled = time.perf_counter(), time.time_ns() - _SETTLED
        with ThreadPoolExecutor() as pool:  # a large model has many files
            found |= dict(zip(unknown, pool.map(file_digest, unknown), strict=True))
        if memory:
            megabytes = sum(path.stat().st_size for path in unknown) / 1e6
            notice(
                f"digests: read {len(unknown)} file{'s' * (len(unknown) > 1)} whole, "
                f"{megabytes:,.1f} MB in {time.perf_counter() - begin:.2f} s"
            )
        new = {
            states[path]: found[path]
            for path in unknown
            if path.stat().st_ctime_ns < settled and _state(path) == states[path]
        }
        any(_remember(folder, new) for folder in memory)
    return found


def _let_settle(paths: Iterable[Path]) -> None:
    """Wait until files that were just written have dates that a further change would move."""
    newest = max((path.stat().st_ctime_ns for path in paths), default=0)
    wait = newest + _SETTLED - time.time_ns()
    if 0 < wait <= _SETTLED:  # a date in the future comes from another clock
        time.sleep(wait / 1e9)


def _recall(folder: Path) -> dict[str, str]:
    """State of a file -> its digest; empty where nothing is remembered, or that is damaged."""
    try:
        content = parse_json((folder / MEMORY).read_bytes())
        return dict(content["files"]) if content[SEAL] == sealed(content)[SEAL] else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _remember(folder: Path, new: dict[str, str]) -> bool:
    """Add to what a folder remembers; whether that could be written."""
    if not new:
        return True
    inodes = {_inode(state) for state in new}
    files = {k: v for k, v in _recall(folder).items() if _inode(k) not in inodes} | new
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a name of its own: other processes may be writing theirs
        handle, name = tempfile.mkstemp(".partial", MEMORY, folder)
    except OSError:
        return False
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            os.fchmod(handle, 0o644)
            json.dump(sealed({"files": files}), file)
        Path(name).replace(folder / MEMORY)
    except OSError:
        with suppress(OSError):
            Path(name).unlink()
        return False
    return True


def _inode(state: str) -> str:
    return state.rsplit(":", 3)[0]
