"""Arrays on disk that are written block by block and read as memory maps."""

import tokenize
from collections.abc import Iterator
from pathlib import Path

import numpy as np

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


def blocks(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `size` rows, the last one shorter."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
