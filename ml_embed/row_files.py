"""Files of equally long rows that grow at their end, so that long work can go on where it stopped."""

from pathlib import Path

import numpy as np


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

    def mapped(self) -> np.ndarray:
        """(rows, width), memory-mapped, read-only."""
        if self.rows == 0:
            return np.empty((0, self._width), self._dtype)
        return np.memmap(self.path, self._dtype, "r", shape=(self.rows, self._width))
