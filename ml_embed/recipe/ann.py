"""Approximate nearest-neighbour search for large corpora, with faiss, but with exact scores.

The documents are sorted into about 4 sqrt(N) cells (k-means over a sample), each document as a code
of a few bits per dimension. A query looks into the `nprobe` nearest cells and ranks what lies there
by code; the best of it are scored again with their float32 vectors, which stay on disk. So a
document may be missed, but no score is wrong.

Letters: Q queries of a block, N documents, K neighbours, C candidates, D vector length, P pairs.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ml_embed.distributed.collectives import compute_on_main_process, world_size
from ml_embed.distributed.shares import Rows, usable_cores
from ml_embed.errors import UserError
from ml_embed.files.arrays import blocks
from ml_embed.files.atomic import atomic_file
from ml_embed.files.digests import value_digest
from ml_embed.recipe.search import nearest

FEWEST_DOCUMENTS = 100_000
"""Below this many documents the exact search is quick, and cells would hold too few."""
CODES = {8: "SQ8", 4: "SQ4", 2: "PQ{quarter}"}
"""faiss's name for the codes of so many bits per dimension; PQ takes a byte for four dimensions."""
CANDIDATES_PER_NEIGHBOUR = 3
"""Scored again for each neighbour that is asked for. Measured with 100,000 clustered vectors, D =
256, 4 bits: with 2, 0.2 % of the neighbours in the probed cells are lost, with 4 none."""
SAMPLE_PER_CELL = 64  # faiss asks for 39 to 256; k-means takes most of the time of building
BLOCK = 65536  # documents encoded at a time: with D = 1,024, 256 MB
SCORED_FLOATS = 2**25  # candidate vectors in memory at a time: 128 MB
MEASURED_QUERIES = 256
SEED = 0

Search = Callable[[Tensor, np.ndarray, int, Tensor], tuple[Tensor, Tensor]]
"""`search.nearest`, or what takes its place."""


@dataclass(frozen=True)
class Approximation:
    """How exact the approximate search is."""

    nprobe: int = 64
    """cells that a query looks into; with more, more true neighbours are found in more time"""
    code_bits: int = 4
    """8, 4 or 2 bits per dimension of a document in memory"""

    def check(self) -> None:
        """Raise UserError for values that mean nothing, or if faiss is missing."""
        if self.nprobe < 1:
            raise UserError(f"--nprobe is {self.nprobe}; it must be at least 1")
        if self.code_bits not in CODES:
            raise UserError(
                f"--code-bits is {self.code_bits}; it must be one of {', '.join(map(str, CODES))}"
            )
        if importlib.util.find_spec("faiss") is None:
            raise UserError(
                "the approximate search needs faiss, which is not installed: pip install "
                "'ml-embed[ann]'"
            )


def cell_count(documents: int) -> int:
    """Cells for so many documents."""
    return max(1, round(4 * math.sqrt(documents)))


class ApproximateIndex:
    """The documents of a memory map, searchable.

    Memory, of a process that searches: N (code_bits D / 8 + 8) bytes, blocks of vectors, and 256
    sqrt(N) sampled vectors while the first process finds the cells.

    What was built lies in a folder and is used again, at the block where an interruption stopped
    it. The same documents and settings give the same index. Processes of a launch build it
    together.
    """

    def __init__(
        self,
        folder: Path,
        documents: np.ndarray,
        approximation: Approximation,
        made_of: Any = None,
        title: str = "",
        progress: bool = True,
    ):
        """Build, unless it was built. A collective.

        Args:
            folder: for the index's files.
            documents: (N, D) float32, rows of unit length; may be a memory map.
            approximation: how exact the search is.
            made_of: JSON that tells the documents from others: an index of others is made anew.
            title, progress: of the bars on stderr, of the first process.
        Raises:
            UserError: D cannot be cut into codes of so many bits.
        """
        import faiss

        approximation.check()
        made_of = [made_of, approximation.code_bits]
        path = folder / f"cells-{value_digest(made_of)}.faiss"
        use_all_cores()
        with tqdm(
            desc=f"{title}finding {cell_count(len(documents))} cells",
            leave=False,
            disable=not progress,
        ):
            compute_on_main_process(lambda: _write_cells(path, documents, approximation.code_bits))
        self._nprobe = approximation.nprobe
        self._cells = faiss.deserialize_index(np.fromfile(path, np.uint8))
        self.cells = self._cells.nlist
        shape = (len(documents), self._cells.sa_code_size())
        self._codes = Rows(folder / "codes.bin", np.uint8, shape, BLOCK, made_of)

        def encode(start: int, stop: int) -> np.ndarray:
            return self._cells.sa_encode(np.ascontiguousarray(documents[start:stop]))

        self._codes.fill(encode, f"{title}building the index", progress)

    @functools.cached_property
    def _index(self) -> Any:
        """The cells with all codes in memory, on a process that searches."""
        codes = self._codes.mapped()
        for rows in blocks(len(codes), BLOCK):
            self._cells.add_sa_codes(np.ascontiguousarray(codes[rows]))
        self._cells.nprobe = min(self._nprobe, self.cells)
        return self._cells

    def nearest(
        self, queries: Tensor, documents: np.ndarray, count: int, excluded: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Like `search.nearest` over the indexed documents; some neighbours may be missed."""
        count = min(count, len(documents))
        candidates = CANDIDATES_PER_NEIGHBOUR * count
        most_excluded = int(excluded[:, 0].bincount().max()) if len(excluded) else 0
        asked = min(candidates + most_excluded, len(documents))
        _, found = self._index.search(queries.cpu().numpy(), asked)
        found = _without(found, excluded.cpu().numpy(), len(documents))[:, :candidates]
        block = max(1, SCORED_FLOATS // (found.shape[1] * queries.shape[1]))
        parts = [
            _score(queries[rows], documents, found[rows], count)
            for rows in blocks(len(queries), block)
        ]
        scores, rows = zip(*parts, strict=True)
        return torch.cat(scores), torch.cat(rows)


def use_all_cores() -> None:
    """Let faiss compute on all cores of the machine, of which a launcher gives a process one.

    Only one process of a machine searches or looks for cells at a time.
    """
    import faiss

    if world_size() > 1:
        faiss.omp_set_num_threads(usable_cores())


def sample_queries(queries: int) -> np.ndarray:
    """(at most MEASURED_QUERIES,) the sorted numbers of queries to measure the recall with."""
    chosen = np.random.default_rng(SEED).choice(
        queries, min(queries, MEASURED_QUERIES), replace=False
    )
    return np.sort(chosen)


def recall(
    search: Search, queries: Tensor, documents: np.ndarray, count: int, excluded: Tensor
) -> float:
    """The share of the exact nearest `count` documents that a search finds.

    The other arguments are those of `nearest`.
    """
    exact_scores, exact = nearest(queries, documents, count, excluded)
    scores, found = search(queries, documents, count, excluded)
    found = found.masked_fill(scores == -torch.inf, -1)
    there = exact_scores > -torch.inf
    hits = [
        torch.isin(row, other) & real for row, other, real in zip(exact, found, there, strict=True)
    ]
    return float(torch.stack(hits).sum() / there.sum())


def _write_cells(path: Path, documents: np.ndarray, code_bits: int) -> None:
    import faiss

    if not path.is_file():
        trained = _trained(documents, code_bits)
        with atomic_file(path) as partial:
            faiss.serialize_index(trained).tofile(partial)


def _trained(documents: np.ndarray, code_bits: int) -> Any:
    """An index without documents: where the cells are, and how vectors become codes."""
    import faiss

    width, cells = documents.shape[1], cell_count(len(documents))
    if width % 4 and code_bits == 2:
        raise UserError(
            f"--code-bits 2 needs a vector length that 4 divides, not {width}; take 4 or 8"
        )
    name = f"IVF{cells},{CODES[code_bits].format(quarter=width // 4)}"
    index = faiss.index_factory(width, name, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = SEED
    if code_bits == 2:
        # It takes minutes, for a search by Hamming distance that is not used.
        index.do_polysemous_training = False
        index.pq.cp.seed, index.pq.cp.max_points_per_centroid = SEED, SAMPLE_PER_CELL
    sampled = min(len(documents), cells * SAMPLE_PER_CELL)
    rows = np.random.default_rng(SEED).choice(len(documents), sampled, replace=False)
    index.train(np.ascontiguousarray(documents[np.sort(rows)]))
    return index


def _without(found: np.ndarray, excluded: np.ndarray, documents: int) -> np.ndarray:
    """The (Q, C) document rows that were found, excluded ones moved to the end as -1.

    Args:
        found: (Q, C), with faiss's -1 for none.
        excluded: (P, 2) pairs of query and document rows.
        documents: N.
    """
    pairs = np.arange(len(found))[:, None] * documents + found
    dropped = (found < 0) | np.isin(pairs, excluded[:, 0] * documents + excluded[:, 1])
    order = dropped.argsort(axis=1, kind="stable")
    return np.take_along_axis(np.where(dropped, -1, found), order, axis=1)


def _score(
    queries: Tensor, documents: np.ndarray, candidates: np.ndarray, count: int
) -> tuple[Tensor, Tensor]:
    """The best K of (Q, C) candidates by exact scores: what `search.nearest` returns."""
    # Sorted, so that the memory map is read from front to back.
    distinct, places = np.unique(candidates, return_inverse=True)
    vectors = torch.from_numpy(documents[distinct.clip(0)]).to(queries.device)
    scores = torch.einsum(
        "qd,qcd->qc", queries, vectors[torch.from_numpy(places).to(queries.device)]
    )
    rows = torch.from_numpy(candidates).to(queries.device)
    best, order = scores.masked_fill(rows < 0, -torch.inf).topk(count, dim=1)
    return best, rows.gather(1, order).clamp(min=0)
