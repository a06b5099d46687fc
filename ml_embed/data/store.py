"""The store: tokenized data in memory-mapped arrays, for training.

The parquet files are converted once, into flat arrays in the cache directory (`convert`). Opening
a converted store reads no data. A text is a slice of a memory map; no token is a Python object.
"""

import shutil
import tempfile
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ml_embed.data.convert import ARRAYS, FORMAT_VERSION, INDEX, UNDETERMINED, convert
from ml_embed.data.manifest import Manifest
from ml_embed.data.sources import Sources, find_sources
from ml_embed.errors import UserError
from ml_embed.files.arrays import map_array
from ml_embed.files.atomic import disk_errors_are_user_errors, umask
from ml_embed.files.digests import SEAL, digests_of, sealed, value_digest
from ml_embed.files.json_file import parse_json
from ml_embed.files.locks import take_lock


class TokenizedDataset:
    """The rows of one dataset (query, passage, negatives) and the corpus of its documents.

    A document is named by its row number in the corpus. All arrays are read-only views of memory
    maps. Datasets that share a corpus, as in the released layout, share its arrays. Pickling passes
    on only where the files are.
    """

    def __init__(
        self,
        store_folder: Path,
        name: str,
        arrays: dict[str, np.ndarray],
        max_token_id: int,
        texts: Sequence[str],
        languages: Sequence[str] = (),
    ):
        self.name = name
        self.languages = tuple(languages)
        """codes of the rows' languages; empty if no dataset of the folder says languages"""
        self.language_numbers = arrays["language_numbers"]
        """(rows,) int32: each row's place in `languages`; (0,) if there are none"""
        self.query_digest, self.document_digest = texts
        """of all tokens of the queries, and of the documents, in their order"""
        self.query_lengths = arrays["query_lengths"]
        """(rows,) int32: number of tokens of each query."""
        self.document_lengths = arrays["document_lengths"]
        """(documents,) int32: number of tokens of each document."""
        self.passage_documents = arrays["passage_documents"]
        """(rows,) int64: the document that is each row's positive."""
        self.negative_offsets = arrays["negative_offsets"]
        """(rows + 1,) int64: row i's negatives are
        negative_documents[negative_offsets[i]:negative_offsets[i + 1]]."""
        self.negative_documents = arrays["negative_documents"]
        """(total negatives,) int64."""
        self.query_numbers = arrays["query_numbers"]
        """(rows,) int64: rows with the same query (query_id, or else tokens) share a number."""
        self.positive_offsets = arrays["positive_offsets"]
        """(distinct queries + 1,) int64: query number q's right answers, ascending, are
        positive_documents[positive_offsets[q]:positive_offsets[q + 1]]."""
        self.positive_documents = arrays["positive_documents"]
        """(distinct pairs of a query and its passage,) int64."""
        self.document_hashes = arrays["document_hashes"]
        """(documents,) uint64, equal for equal tokens."""
        self.scores = _or_none(arrays["scores"])
        """(rows,) float32 graded similarity of each pair, NaN for none; None without any."""
        self.passage_scores = _or_none(arrays["passage_scores"])
        """(rows,) float32 a teacher's score of each pair, NaN for none; None without any."""
        self.negative_scores = _or_none(arrays["negative_scores"])
        """(total negatives,) float32 the same of each of `negative_documents`."""
        self.query_tokens = arrays["query_tokens"]
        """(tokens of all queries,) int32, in the order of the rows."""
        self.document_tokens = arrays["document_tokens"]
        """(tokens of all documents,) int32, in the order of the corpus."""
        self._store_folder = store_folder
        self._query_offsets = arrays["query_offsets"]
        self._document_offsets = arrays["document_offsets"]
        self._token_counts = arrays["token_counts"]
        self._max_token_id = max_token_id

    def say_languages(self) -> None:
        """Where other datasets say languages, rows of one that does not are of language "und"."""
        if not self.languages:
            self.languages = (UNDETERMINED,)
            self.language_numbers = np.broadcast_to(np.int32(0), (self.num_rows,))

    @property
    def num_rows(self) -> int:
        return len(self.query_lengths)

    @cached_property
    def is_scored(self) -> bool:
        """Whether every row has a score."""
        return self.scores is not None and not np.isnan(self.scores).any()

    @cached_property
    def unscored_rows(self) -> int:
        """How many rows have negatives, but no teacher's scores of all their candidates."""
        counts = np.diff(self.negative_offsets)
        if self.passage_scores is None or self.negative_scores is None:
            return int((counts > 0).sum())
        row = np.repeat(np.arange(len(counts)), counts)
        without = np.bincount(row[~np.isfinite(self.negative_scores)], minlength=len(counts)) > 0
        return int(((counts > 0) & (without | ~np.isfinite(self.passage_scores))).sum())

    @property
    def num_documents(self) -> int:
        return len(self.document_lengths)

    def query(self, row: int) -> np.ndarray:
        """(tokens,) int32 view: the query of a row."""
        return self.query_tokens[self._query_offsets[row] : self._query_offsets[row + 1]]

    def document(self, document: int) -> np.ndarray:
        """(tokens,) int32 view: a document of the dataset's corpus."""
        return self.document_tokens[
            self._document_offsets[document] : self._document_offsets[document + 1]
        ]

    def query_bytes(self, rows: np.ndarray) -> list[bytes]:
        """The token ids (int32) of the queries of several rows, (n,) int64, as bytes.

        Bytes can be dictionary keys and are joined quickly.
        """
        return _byte_slices(self.query_tokens, self._query_offsets, rows)

    def document_bytes(self, documents: np.ndarray) -> list[bytes]:
        """The token ids (int32) of several documents, (n,) int64, as bytes."""
        return _byte_slices(self.document_tokens, self._document_offsets, documents)

    def negatives(self, row: int) -> np.ndarray:
        """(number of this row's negatives, may be 0,) int64 view: documents."""
        return self.negative_documents[self.negative_offsets[row] : self.negative_offsets[row + 1]]

    def right_answers(self, queries: np.ndarray) -> np.ndarray:
        """How many documents the data pairs with each of some query numbers, in their shape."""
        return self.positive_offsets[queries + 1] - self.positive_offsets[queries]

    def are_right(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Whether the data pairs query numbers with documents, bool in their common shape."""
        low, last = self.positive_offsets[queries], self.positive_offsets[queries + 1] - 1
        most = int((last - low).max(initial=0)) + 1
        for _ in range((most - 1).bit_length()):  # bisects all lists at once
            middle = (low + last) // 2
            above = self.positive_documents[middle] < documents
            low, last = (
                np.where(above, np.minimum(middle + 1, last), low),
                np.where(above, last, middle),
            )
        return self.positive_documents[low] == documents

    @cached_property
    def token_counts(self) -> np.ndarray:
        """(max_token_id + 1,) int64: how often each token id occurs.

        In all queries, and in all documents that rows refer to, each counted once.
        """
        counts = np.zeros(self._max_token_id + 1, np.int64)
        counts[: len(self._token_counts)] = self._token_counts
        return counts

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen_dataset, (self._store_folder, self.name)


def _or_none(array: np.ndarray) -> np.ndarray | None:
    return array if len(array) else None


_BOTH_ENDS = np.arange(2)  # a text lies between its offset and the next one


def _byte_slices(tokens: np.ndarray, offsets: np.ndarray, numbers: np.ndarray) -> list[bytes]:
    """The tokens of several texts as bytes; `offsets` say where each text begins."""
    # Slices of a memoryview cost half as much as slices of an array.
    view = tokens.data.cast("B") if len(tokens) else memoryview(b"")
    bounds = offsets[numbers[:, None] + _BOTH_ENDS] * tokens.itemsize
    return [bytes(view[start:stop]) for start, stop in bounds.tolist()]


class Store:
    """Every dataset of a folder of tokenized data."""

    def __init__(self, folder: Path, index: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.folder = folder
        """Where the converted arrays lie."""
        manifest = index["manifest"]
        self.manifest = None if manifest is None else Manifest.from_json(manifest)
        """of the tokenized folder; None in the released layout, which has none"""
        self.eos_id = None if self.manifest is None else self.manifest.eos_id
        self.identity: dict[str, str] = index["identity"]
        """what the data is: `Sources.identity`"""
        self.max_token_id: int = index["max_token_id"]
        """The largest token id in the data: the model's vocabulary must be larger."""
        self.datasets: dict[str, TokenizedDataset] = {
            name: TokenizedDataset(
                folder,
                name,
                {key: array[slice(*slices[key])] for key, array in arrays.items()},
                self.max_token_id,
                index["texts"][name],
                index["languages"][name],
            )
            for name, slices in sorted(index["datasets"].items())
        }
        if any(dataset.languages for dataset in self.datasets.values()):
            for dataset in self.datasets.values():
                dataset.say_languages()

    def token_share(self, vocabulary: int) -> np.ndarray:
        """(vocabulary,) float64: the share of each token in the data, add-one smoothed.

        Raises:
            UserError: the data was made with a larger vocabulary.
        """
        if self.max_token_id >= vocabulary:
            raise UserError(
                f"the data holds token id {self.max_token_id}, but the model's vocabulary has only "
                f"{vocabulary}; tokenize the data with the model's tokenizer"
            )
        counts = np.ones(vocabulary)
        for dataset in self.datasets.values():
            counts[: len(dataset.token_counts)] += dataset.token_counts
        return counts / counts.sum()

    def __reduce__(self) -> tuple[Any, ...]:
        return open_converted, (self.folder,)


def open_store(
    folder: str | Path, cache_dir: str | Path, progress: bool = True, verify: bool = False
) -> Store:
    """Open a folder of tokenized data, in our own or the released layout; convert it if needed.

    The converted arrays lie in `cache_dir/store-<digest of the data's identity>`. Several processes
    may call this at once: one converts and the others wait.

    Args:
        folder: of the data.
        cache_dir: for the converted arrays.
        progress: a bar on stderr.
        verify: compare all of the data and of the arrays with their digests; otherwise what has
            not changed since it was last read whole is taken for whole.
    Raises:
        UserError: data is missing, wrong or damaged.
    """
    sources, cache_dir = find_sources(Path(folder)), Path(cache_dir).resolve()
    identity = sources.identity(cache_dir, verify)
    target = _place(cache_dir, identity)
    if not (target / INDEX).is_file():
        identity = sources.identity(cache_dir, verify=True)
        target = _place(cache_dir, identity)
        _convert_once(sources, identity, target, progress)
    _check_arrays(target, identity, (target, cache_dir), verify)  # before a header is believed
    return open_converted(target)


def _place(cache_dir: Path, identity: dict[str, str]) -> Path:
    return cache_dir / f"store-{value_digest([FORMAT_VERSION, identity])}"


@lru_cache(maxsize=8)
def open_converted(folder: Path) -> Store:
    """Map the arrays of a converted store.

    Raises:
        UserError: they are damaged.
    """
    try:
        index = _read_index(folder)
        arrays = {name: map_array(folder / f"{name}.npy") for name in ARRAYS}
        for name, array in arrays.items():
            if len(array) != index["lengths"][name]:
                raise ValueError(
                    f"{name} has {len(array)} items instead of {index['lengths'][name]}"
                )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error
    return Store(folder, index, arrays)


def _read_index(folder: Path) -> dict[str, Any]:
    """Raises OSError, ValueError, KeyError or TypeError if it is damaged."""
    index = parse_json((folder / INDEX).read_bytes())
    if index[SEAL] != sealed(index)[SEAL]:
        raise ValueError(f"{INDEX} does not match its digest")
    return index


def _damaged(folder: Path, problem: object) -> UserError:
    return UserError(
        f"the converted data in {folder} is damaged ({problem}). Remove that folder: it is made "
        "again."
    )


def _check_arrays(
    folder: Path, identity: dict[str, str], memory: Sequence[Path], verify: bool
) -> None:
    """Raise UserError if a converted store is of other data, or its arrays are not as written."""
    try:
        index = _read_index(folder)
        if index["identity"] != identity:
            raise ValueError("it is that of other data")
        found = digests_of((folder / f"{name}.npy" for name in ARRAYS), memory, verify)
        for path, digest in found.items():
            if digest != index["digests"][path.stem]:
                raise ValueError(f"{path.name} does not match its digest")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error


def _convert_once(sources: Sources, identity: dict[str, str], target: Path, progress: bool) -> None:
    """Convert into a temporary folder and rename it: `target` is whole whenever it exists."""
    remedy = "It takes about 4 bytes per token. Free space there or set cache_dir to another disk."
    with disk_errors_are_user_errors(target.parent, remedy):
        target.parent.mkdir(parents=True, exist_ok=True)
        path = target.with_name(f"{target.name}.lock")
        waiting = (
            f"waiting for another process that converts the data ({path})" if progress else None
        )
        with take_lock(path, seconds=-1, waiting=waiting) as lock:
            if (target / INDEX).is_file():  # another process was faster
                return
            if lock.is_locked:  # otherwise they may belong to a process that is at work
                for leftover in target.parent.glob(f"{target.name}.partial-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
            try:
                convert(sources, identity, partial, progress)
                _rename_unless_there(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


def _rename_unless_there(partial: Path, target: Path) -> None:
    """Rename a finished store; where another process was faster, its store is as good."""
    # mkdtemp makes a private folder; other users of a shared cache must be able to read it.
    partial.chmod(0o755 & ~umask())
    try:
        partial.rename(target)
    except OSError:  # without locks on this file system, two processes may get here
        if not (target / INDEX).is_file():
            raise


def _reopen_dataset(folder: Path, name: str) -> TokenizedDataset:
    return open_converted(folder).datasets[name]
