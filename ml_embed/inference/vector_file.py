"""Vectors written into a .npy file, for more of them than fit in memory."""

import shutil
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ml_embed.distributed.collectives import compute_on_main_process
from ml_embed.distributed.shares import Rows
from ml_embed.distributed.sole_launch import sole_launch_into
from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_file, partial_path, sync_folder
from ml_embed.files.paths import check_writable

BLOCK = 2048  # texts between two writes to disk (see `Rows.block`)
HEAD_BYTES = 4096


def check_vector_file(path: Path, overwrite: bool) -> None:
    """Check before the work that a .npy file may and can be written.

    Raises:
        UserError: it may not or cannot be.
    """
    if path.suffix != ".npy":
        raise UserError(f"{path} must end in .npy, the format that is written")
    if path.is_dir():
        raise UserError(f"{path} is a folder, which is not replaced by a file; give another path")
    if path.exists() and not overwrite:
        raise UserError(
            f"{path} exists already; give another path, or --overwrite (overwrite=True)"
        )
    check_writable(path.parent, "folder")


def write_vectors(path: Path, windows: Iterable[np.ndarray], dim: int) -> int:
    """Write (n, dim) float32 windows one behind another; the file appears whole or not at all.

    Returns:
        the number of rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        return _write(partial, windows, dim)


def _write(path: Path, windows: Iterable[np.ndarray], dim: int) -> int:
    """The header is written again when the number of rows is known."""
    count = 0
    with path.open("wb") as file:
        file.write(_head(0, dim))
        for rows in windows:
            rows.tofile(file)
            count += len(rows)
        file.seek(0)
        file.write(_head(count, dim))
    return count


def _count(texts: Iterable[str]) -> int:
    count = sum(1 for _ in texts)
    if not count:
        raise UserError("there is no text to encode; the input is empty")
    return count


def encode_into_file(
    path: Path,
    texts: Callable[[], Iterable[str]],
    encode: Callable[[list[str]], np.ndarray],
    dim: int,
    made_of: Any,
    progress: bool = True,
) -> int:
    """Write the vectors of texts that can be read again; an interrupted call is continued.

    The processes of a launch encode together. The file appears whole or not at all. A collective.

    Args:
        path: of the .npy file.
        texts: gives them from the first on, each time it is called.
        encode: n texts -> (n, dim) float32 vectors.
        made_of: JSON that tells the texts, the model and how it is used from others.
        progress: a bar on stderr, of the first process.
    Returns:
        the number of texts.
    Raises:
        UserError: there is none.
    """
    count = compute_on_main_process(lambda: _count(texts()))
    work = partial_path(path.with_name(f"{path.name}.rows"))
    with sole_launch_into(work, ".lock", "encoding in"):
        head, shape = _head(count, dim), (count, dim)
        file = Rows(work / path.name, np.float32, shape, BLOCK, made_of, head)
        reader, position = iter(texts()), 0

        def make(start: int, stop: int) -> np.ndarray:
            nonlocal position
            next(islice(reader, start - position, start - position), None)  # blocks of others
            position = stop
            return encode(list(islice(reader, stop - start)))

        file.fill(make, "encoding", progress)

        def finish() -> None:
            file.path.replace(path)
            sync_folder(path.parent)
            shutil.rmtree(work, ignore_errors=True)  # NFS keeps the lock, which is open, in it

        compute_on_main_process(finish)
    return count


def _head(rows: int, dim: int) -> bytes:
    """A .npy file's header, filled up to a page (see `Rows`): so long for any number of rows."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)}
    text = str(header).encode().ljust(HEAD_BYTES - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
