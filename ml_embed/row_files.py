"""Files of equally long rows that grow at their end, so that long work can go on where it stopped."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm


class RowFile:
    """Rows of `width` items of one dtype, one behind another. A row that was not written whole does not count."""

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
        self, total: int, block: int, make: Callable[[int, int], np.ndarray], title: str, progress: bool = True
    ) -> None:
        """Append rows until there are `total`; rows that are there already are kept.

        Args:
            block: rows made at a time; what an interruption costs at most.
            make: (start, stop) -> (stop - start, width) rows.
            title, progress: of the bar on stderr.
        """
        with tqdm(total=total, initial=self.rows, desc=title, leave=False, disable=not progress) as bar:
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
