"""Vectors written into a .npy file, for more of them than fit in memory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_file
from ml_embed.files.paths import check_writable


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
        _write_header(file, 0, dim)
        start = file.tell()
        for rows in windows:
            rows.tofile(file)
            count += len(rows)
        file.seek(0)
        _write_header(file, count, dim)
        assert file.tell() == start, "numpy pads headers so that the first axis can grow"
    return count


def _write_header(file: Any, rows: int, dim: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, header | {"shape": (rows, dim)})
