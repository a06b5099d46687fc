"""Arrays on disk that are written block by block and read as memory maps."""

import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ml_embed.errors import one_line


class ArrayFile:
    """A one-dimensional .npy file that grows by appending; its length need not be known beforehand.

    `length` is the number of items so far. The header is rewritten on `close`, in place: NumPy pads
    headers so that the first axis can grow.
    """

    def __init__(self, path: Path, dtype: type[np.number]):
        self.length = 0
        self._path = path
        self._dtype = np.dtype(dtype)
        self._file = path.open("wb")
        self._write_header()
        self._header_bytes = self._file.tell()

    def append(self, values: np.ndarray) -> None:
        """Add a one-dimensional array at the end, cast to the file's type without a check."""
        assert values.ndim == 1
        # write() and not tofile(): tofile turns "disk full" into an error without its errno.
        if len(values):
            self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data.cast("B"))
        self.length += len(values)

    def mapped(self) -> np.ndarray:
        """A read-only memory map of what was appended so far."""
        self._file.flush()
        if self.length == 0:  # mmap takes no empty range
            return np.empty(0, self._dtype)
        mapped = np.memmap(self._path, self._dtype, "r", self._header_bytes, (self.length,))
        return mapped.view(np.ndarray)

    def close(self) -> None:
        """Write the true length into the header and close the file."""
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._header_bytes
        self._file.close()

    def discard(self) -> None:
        """Close the file as it is, where its folder is about to be removed."""
        try:
            self._file.close()
        except OSError:  # flushing to a full disk fails once more
            return

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def map_array(path: Path) -> np.ndarray:
    """A read-only array over the file's memory map; nothing is read before it is used.

    It is a plain ndarray: slices of a np.memmap cost several times as much.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no array, or fewer items than its header says.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except (EOFError, SyntaxError, OverflowError, tokenize.TokenError) as error:  # of the header
        raise ValueError(f"{path.name} holds no array ({one_line(error)})") from None


class RowFile:
    """A file of rows of `width` items, without a header; half a row at its end does not count."""

    def __init__(self, path: Path, dtype: type, width: int):
        self.path = path
        self._dtype = np.dtype(dtype)
        self._width = width
        self._row_bytes = self._dtype.itemsize * width
        path.touch()
        self.rows = path.stat().st_size // self._row_bytes

    def append(self, rows: np.ndarray) -> None:
        """Add (n, width) rows."""
        assert rows.shape[1:] == (self._width,), rows.shape
        with self.path.open("r+b") as file:
            file.truncate(self.rows * self._row_bytes)
            file.seek(0, 2)
            file.write(np.ascontiguousarray(rows, self._dtype).data)
        self.rows += len(rows)

    def fill(
        self,
        total: int,
        block: int,
        make: Callable[[int, int], np.ndarray],
        title: str,
        progress: bool = True,
    ) -> None:
        """Append rows until there are `total`; rows that are there already are kept.

        Args:
            block: rows made at a time; what an interruption costs at most.
            make: (start, stop) -> (stop - start, width) rows.
            title, progress: of the bar on stderr.
        """
        with tqdm(
            total=total, initial=self.rows, desc=title, leave=False, disable=not progress
        ) as bar:
            for start in range(self.rows, total, block):
                stop = min(start + block, total)
                self.append(make(start, stop))
                bar.update(stop - start)

    def mapped(self) -> np.ndarray:
        """(rows, width), memory-mapped, read-only."""
        if self.rows == 0:
            return np.empty((0, self._width), self._dtype)
        return np.memmap(self.path, self._dtype, "r", shape=(self.rows, self._width))


def blocks(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `size` rows, the last one shorter."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
