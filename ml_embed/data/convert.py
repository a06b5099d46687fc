"""Converts tokenized parquet files to flat arrays, which training maps into memory.

There is one file per kind of array, shared by all datasets, because a process may not hold
thousands of open maps. `index.json` says which slice of each file belongs to which dataset.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from ml_embed.data.document_ids import DocumentIds, hash_lists, hash_strings
from ml_embed.data.random import scramble
from ml_embed.data.sources import Sources
from ml_embed.errors import UserError
from ml_embed.files.arrays import ArrayFile
from ml_embed.files.digests import TextsDigest, file_digest, sealed
from ml_embed.files.parquet import (
    Ragged,
    broken_content_is_user_error,
    first_true,
    is_text,
    open_parquet,
    ragged_integers,
    read_batches,
    require_columns,
    row_of_value,
)

FORMAT_VERSION = 5
INDEX = "index.json"
ARRAYS: dict[str, type[np.number]] = {
    "query_tokens": np.int32,
    "query_offsets": np.int64,
    "query_lengths": np.int32,
    "document_tokens": np.int32,
    "document_offsets": np.int64,
    "document_lengths": np.int32,
    "document_hashes": np.uint64,
    "passage_documents": np.int64,
    "negative_offsets": np.int64,
    "negative_documents": np.int64,
    "query_numbers": np.int64,
    "positive_offsets": np.int64,
    "positive_documents": np.int64,
    "scores": np.float32,
    "passage_scores": np.float32,
    "negative_scores": np.float32,
    "language_numbers": np.int32,
    "token_counts": np.int64,
}
"""The array files and their types. Offsets start at 0 in each dataset or corpus, and there is one
more of them than rows."""

BLOCK_ROWS = 16384
"""rows of a parquet file that are read at once"""
COUNTED_DOCUMENTS = 65536
"""documents whose tokens are counted at once"""
UNDETERMINED = "und"
"""The language of a row that says none: ISO 639's code for "undetermined"."""
LARGEST_TOKEN_ID = 2**24 - 1
"""far beyond any vocabulary: a larger id means that the file is no token file"""

Slices = dict[str, tuple[int, int]]
"""(start, stop) in the file of each named array"""


@dataclass
class TokenCounts:
    """How often each token id occurs; as long as the largest id seen needs."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, tokens: np.ndarray) -> None:
        """Count a one-dimensional array of ids."""
        self.add_counts(np.bincount(tokens, minlength=len(self.counts)))

    def add_counts(self, counts: np.ndarray) -> None:
        """Add counts by id, of any length."""
        grown = np.zeros(max(len(counts), len(self.counts)), np.int64)
        grown[: len(self.counts)] = self.counts
        grown[: len(counts)] += counts
        self.counts = grown


@dataclass(frozen=True)
class Corpus:
    """A corpus that was converted."""

    slices: Slices
    counts: np.ndarray
    """(largest id + 1,) occurrences of each token id in all documents"""
    ids: DocumentIds | None
    """None in our own layout, whose ids are row numbers"""
    digest: str
    """of all tokens of its documents"""

    @property
    def num_documents(self) -> int:
        start, stop = self.slices["document_lengths"]
        return stop - start


@dataclass(frozen=True)
class Queries:
    """The rows of a dataset that were converted."""

    slices: Slices
    counts: np.ndarray
    """(largest id + 1,) occurrences of each token id, in documents that rows refer to as well"""
    digest: str
    """of all tokens of the queries"""
    languages: list[str]
    """codes, in the order of their numbers; empty if there is no such column"""


@dataclass(frozen=True)
class Block:
    """Some rows of a parquet file, read at once."""

    path: Path
    first_row: int
    """number of the first of them in the file"""
    rows: pa.RecordBatch

    def token_lists(self, column: str) -> Ragged:
        """A column of lists of token ids, none of them empty and all ids possible."""
        tokens = ragged_integers(self.rows, column, self.path, self.first_row)
        if (tokens.lengths == 0).any():
            row = self.first_row + first_true(tokens.lengths == 0)
            raise UserError(f"{self.path}: column {column!r} has no tokens in row {row}.")
        wrong = (tokens.values < 0) | (tokens.values > LARGEST_TOKEN_ID)
        if wrong.any():
            at = first_true(wrong)
            raise UserError(
                f"{self.path}: column {column!r} holds token id {tokens.values[at]} in row "
                f"{self.first_row + row_of_value(tokens.lengths, at)}; ids are 0 to "
                f"{LARGEST_TOKEN_ID}."
            )
        return tokens

    def strings(self, column: str, nulls_allowed: bool) -> pa.Array:
        """A column of ids or codes as strings."""
        strings = self.rows.column(column)
        if pa.types.is_null(strings.type) and nulls_allowed:
            return strings.cast(pa.string())
        if pa.types.is_dictionary(strings.type):
            strings = strings.dictionary_decode()
        if not is_text(strings.type):
            raise UserError(
                f"{self.path}: column {column!r} is {strings.type}; it must hold strings."
            )
        if pa.types.is_string_view(strings.type):
            strings = strings.cast(pa.large_string())
        if strings.null_count and not nulls_allowed:
            row = self.first_row + first_true(strings.is_null())
            raise UserError(f"{self.path}: column {column!r} is null in row {row}.")
        return strings

    def query_hashes(self, tokens: Ragged) -> np.ndarray:
        """(rows,) uint64, equal for the same query: the same query_id, or else the same tokens."""
        hashes = hash_lists(tokens.values, tokens.lengths)
        if "query_id" not in self.rows.schema.names:
            return hashes
        ids = self.strings("query_id", nulls_allowed=True)
        named = ids.is_valid().to_numpy(zero_copy_only=False)
        # scrambled, so that an id's bytes are never taken for tokens
        hashes[named] = scramble(hash_strings(ids.drop_null()))
        return hashes

    def languages(self) -> list[str]:
        """The language of each row, "und" for none; empty if there is no such column."""
        if "language" not in self.rows.schema.names:
            return []
        codes = self.strings("language", nulls_allowed=True).to_pylist()
        return [code or UNDETERMINED for code in codes]

    def scores(self, column: str) -> np.ndarray:
        """(rows,) float32: NaN where a row has none; (0,) if there is no such column."""
        if column not in self.rows.schema.names:
            return np.empty(0, np.float32)
        return self._numbers(self.rows.column(column), column)

    def negative_scores(self, lengths: np.ndarray) -> np.ndarray:
        """(total negatives,) float32: NaN where a row has none; (0,) if there is no such column.

        `lengths` says how many negatives each row has.
        """
        if "neg_scores" not in self.rows.schema.names:
            return np.empty(0, np.float32)
        lists = self.rows.column("neg_scores")
        if pa.types.is_null(lists.type):
            return np.full(lengths.sum(), np.nan, np.float32)
        if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
            kind = lists.type
            raise UserError(f"{self.path}: column 'neg_scores' is {kind}; it must hold lists.")
        given = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        has_some = lists.is_valid().to_numpy(zero_copy_only=False)
        if (wrong := has_some & (given != lengths)).any():
            at = first_true(wrong)
            raise UserError(
                f"{self.path}: 'neg_scores' has {given[at]} numbers in row {self.first_row + at}, "
                f"which has {lengths[at]} negatives."
            )
        scores = np.full(lengths.sum(), np.nan, np.float32)
        scores[np.repeat(has_some, lengths)] = self._numbers(lists.flatten(), "neg_scores")
        return scores

    def _numbers(self, values: pa.Array, column: str) -> np.ndarray:
        """float32, NaN for null."""
        kind = values.type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise UserError(f"{self.path}: column {column!r} is {kind}; it must hold numbers.")
        return values.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)


class ArrayWriter:
    """All array files of one store, open for appending."""

    def __init__(self, folder: Path):
        self.files = {
            name: ArrayFile(folder / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()
        }

    def position(self, names: list[str]) -> dict[str, int]:
        """The length of each named array so far."""
        return {name: self.files[name].length for name in names}

    def slices_since(self, starts: dict[str, int]) -> Slices:
        """What was appended since `position`."""
        return {name: (start, self.files[name].length) for name, start in starts.items()}

    def append_offsets(self, name: str, lengths: np.ndarray, base: int) -> int:
        """Append where texts of these lengths end, the first one beginning at `base`.

        Returns:
            where the last one ends.
        """
        ends = base + np.cumsum(lengths)
        self.files[name].append(ends)
        return int(ends[-1]) if len(ends) else base


def convert(sources: Sources, identity: dict[str, str], folder: Path, progress: bool) -> None:
    """Write every array and index.json of `sources` into the existing, empty `folder`.

    The index holds `identity` and the digest of each array file.

    Files are read block by block, so memory does not grow with the data, except for about 60 bytes
    per row of one dataset, and 16 bytes per document in the released layout.

    Raises:
        UserError: data that cannot be right; the message names file, column and row.
    """
    writer = ArrayWriter(folder)
    rows = _total_rows(sources)
    try:
        with tqdm(total=rows, unit=" rows", desc="converting data", disable=not progress) as bar:
            index = _convert_all(sources, writer, bar)
        for file in writer.files.values():
            file.close()
    except BaseException:
        for file in writer.files.values():
            file.discard()
        raise
    digests = {name: file_digest(folder / f"{name}.npy") for name in ARRAYS}
    index = sealed(index | {"identity": identity, "digests": digests})
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _convert_all(sources: Sources, writer: ArrayWriter, bar: tqdm) -> dict:
    datasets: dict[str, Slices] = {}
    texts: dict[str, tuple[str, str]] = {}
    languages: dict[str, list[str]] = {}
    corpora: dict[Path, Corpus] = {}
    uses = list(sources.corpora.values())
    largest_id = 0
    for name, query_path in sources.queries.items():
        corpus_path = sources.corpora[name]
        if corpus_path not in corpora:
            with broken_content_is_user_error(corpus_path):
                corpora[corpus_path] = _convert_corpus(corpus_path, sources, writer, bar)
        corpus = corpora[corpus_path]
        with broken_content_is_user_error(query_path):
            queries = _convert_queries(query_path, corpus_path, corpus, writer, bar)
        texts[name], languages[name] = (queries.digest, corpus.digest), queries.languages
        _check_against_manifest(sources, name, queries.slices, corpus)
        starts = writer.position(["token_counts"])
        writer.files["token_counts"].append(queries.counts)
        datasets[name] = queries.slices | corpus.slices | writer.slices_since(starts)
        largest_id = max(largest_id, len(queries.counts) - 1, len(corpus.counts) - 1)
        uses.remove(corpus_path)
        if corpus_path not in uses:  # its table of ids is not needed again
            del corpora[corpus_path]
    return {
        "format_version": FORMAT_VERSION,
        "manifest": None if sources.manifest is None else sources.manifest.to_json(),
        "max_token_id": largest_id,
        "lengths": writer.position(list(ARRAYS)),
        "datasets": datasets,
        "texts": texts,
        "languages": languages,
    }


def _convert_corpus(path: Path, sources: Sources, writer: ArrayWriter, bar: tqdm) -> Corpus:
    released = sources.manifest is None
    columns = ["doc_id", "input_ids"] if released else ["input_ids"]
    starts = writer.position([name for name in ARRAYS if name.startswith("document")])
    ids = DocumentIds() if released else None
    counts, digest = TokenCounts(), TextsDigest()
    writer.files["document_offsets"].append(np.zeros(1, np.int64))
    end = 0
    for block in _blocks(path, columns, bar):
        tokens = block.token_lists("input_ids")
        end = _append_texts(writer, "document", tokens, end)
        writer.files["document_hashes"].append(hash_lists(tokens.values, tokens.lengths))
        digest.add(tokens.lengths, tokens.values)
        counts.add(tokens.values)
        if ids is not None:
            ids.add(block.strings("doc_id", nulls_allowed=False))
    corpus = Corpus(writer.slices_since(starts), counts.counts, ids, digest.hexdigest())
    if ids is not None:
        _check_repeated_ids(ids.finish(), path, corpus, writer)
    return corpus


def _convert_queries(
    path: Path, corpus_path: Path, corpus: Corpus, writer: ArrayWriter, bar: tqdm
) -> Queries:
    """Append one dataset's rows."""
    negative_columns = _negative_columns(path) if corpus.ids is not None else ["negative_doc_ids"]
    passage_column = "passage_doc_id" if corpus.ids is None else "passage_input_ids"
    starts = writer.position(
        [name for name in ARRAYS if not name.startswith("document") and name != "token_counts"]
    )
    writer.files["query_offsets"].append(np.zeros(1, np.int64))
    writer.files["negative_offsets"].append(np.zeros(1, np.int64))
    counts, digest = TokenCounts(), TextsDigest()
    languages: dict[str, int] = {}
    used = np.zeros(corpus.num_documents, bool)
    query_end = negative_end = 0
    hashes = []
    columns = ["query_input_ids", passage_column, *negative_columns, *_optional_columns(path)]
    for block in _blocks(path, columns, bar):
        queries = block.token_lists("query_input_ids")
        query_end = _append_texts(writer, "query", queries, query_end)
        hashes.append(block.query_hashes(queries))
        digest.add(queries.lengths, queries.values)
        writer.files["scores"].append(block.scores("score"))
        writer.files["passage_scores"].append(block.scores("pos_score"))
        numbers = [languages.setdefault(code, len(languages)) for code in block.languages()]
        writer.files["language_numbers"].append(np.array(numbers, np.int32))
        counts.add(queries.values)
        if corpus.ids is None:
            passages, negatives = _numbered_documents(block, corpus.num_documents, corpus_path)
        else:
            passages, negatives = _named_documents(block, negative_columns, corpus.ids, corpus_path)
        writer.files["passage_documents"].append(passages)
        writer.files["negative_documents"].append(negatives.values)
        writer.files["negative_scores"].append(block.negative_scores(negatives.lengths))
        negative_end = writer.append_offsets("negative_offsets", negatives.lengths, negative_end)
        used[passages] = True
        used[negatives.values] = True
    passages = writer.files["passage_documents"].mapped()[starts["passage_documents"] :]
    _append_positives(writer, np.concatenate(hashes), passages)
    if used.all():
        counts.add_counts(corpus.counts)
    else:
        counts.add_counts(_count_documents(np.flatnonzero(used), corpus, writer))
    return Queries(writer.slices_since(starts), counts.counts, digest.hexdigest(), list(languages))


def _blocks(path: Path, columns: list[str], bar: tqdm) -> Iterator[Block]:
    """All rows of a file, which must have the columns and at least one row."""
    with open_parquet(path) as file:
        require_columns(path, file.schema_arrow, columns)
        if file.metadata.num_rows == 0:
            raise UserError(f"{path} has no rows. Remove the dataset or write it again.")
    first_row = 0
    for rows in read_batches(path, columns, BLOCK_ROWS):
        yield Block(path, first_row, rows)
        first_row += rows.num_rows
        bar.update(rows.num_rows)


def _optional_columns(path: Path) -> list[str]:
    """Those of the columns that training uses where they are there."""
    with open_parquet(path) as file:
        known = ("query_id", "language", "score", "pos_score", "neg_scores")
        return [name for name in known if name in file.schema_arrow.names]


def _append_positives(writer: ArrayWriter, hashes: np.ndarray, passages: np.ndarray) -> None:
    """Append the number of each row's query, and the documents that each query is paired with.

    `hashes` and `passages` are (rows,); rows with equal hashes have the same query.
    """
    distinct, numbers = np.unique(hashes, return_inverse=True)
    order = np.lexsort((passages, numbers))
    pairs = np.stack([numbers[order], passages[order]])
    new = np.concatenate([[True], (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)])
    queries, documents = pairs[:, new]
    writer.files["query_numbers"].append(numbers)
    writer.files["positive_documents"].append(documents)
    writer.files["positive_offsets"].append(
        np.searchsorted(queries, np.arange(len(distinct) + 1), side="left")
    )


def _append_texts(writer: ArrayWriter, kind: str, tokens: Ragged, end: int) -> int:
    """Append texts, "query" or "document", after those that end at `end`; return the new end."""
    writer.files[f"{kind}_tokens"].append(tokens.values)
    writer.files[f"{kind}_lengths"].append(tokens.lengths)
    return writer.append_offsets(f"{kind}_offsets", tokens.lengths, end)


def _numbered_documents(
    block: Block, num_documents: int, corpus_path: Path
) -> tuple[np.ndarray, Ragged]:
    """Passages (rows,) and negatives of our own layout, whose ids are row numbers of the corpus."""
    path, first_row, column = block.path, block.first_row, block.rows.column("passage_doc_id")
    if not pa.types.is_integer(column.type):
        raise UserError(f"{path}: column 'passage_doc_id' is {column.type}; it must be an integer.")
    if column.null_count:
        row = first_row + first_true(column.is_null())
        raise UserError(f"{path}: 'passage_doc_id' is null in row {row}.")
    passages = column.to_numpy()
    negatives = ragged_integers(block.rows, "negative_doc_ids", path, first_row)
    one_per_row = Ragged(passages, np.ones(len(passages), np.int64))
    for name, documents in (("passage_doc_id", one_per_row), ("negative_doc_ids", negatives)):
        wrong = (documents.values < 0) | (documents.values >= num_documents)
        if wrong.any():
            at = first_true(wrong)
            raise UserError(
                f"{path}: column {name!r} names document {documents.values[at]} in row "
                f"{first_row + row_of_value(documents.lengths, at)}, but {corpus_path.name} has "
                f"{num_documents} documents. The two files are not of one tokenization: make them "
                "again."
            )
    return passages, negatives


def _named_documents(
    block: Block, negative_columns: list[str], ids: DocumentIds, corpus_path: Path
) -> tuple[np.ndarray, Ragged]:
    """Passages (rows,) and negatives of the released layout, whose ids are strings."""

    def documents(column: str, nulls_allowed: bool) -> np.ndarray:
        """(rows,) row numbers in the corpus, -1 for none."""
        names = block.strings(column, nulls_allowed)
        found = ids.rows_of(names.fill_null(""))
        absent = names.is_null().to_numpy(zero_copy_only=False)
        if nulls_allowed:
            absent |= names.fill_null("").to_numpy(zero_copy_only=False) == ""
        unknown = (found < 0) & ~absent
        if unknown.any():
            at = first_true(unknown)
            raise UserError(
                f"{block.path}: column {column!r} names document {names[at].as_py()!r} in row "
                f"{block.first_row + at}, which is not in {corpus_path}."
            )
        return np.where(absent, -1, found)

    passages = documents("passage_input_ids", nulls_allowed=False)
    # (rows, K), with -1 where a row has fewer negatives than K.
    negatives = np.full((block.rows.num_rows, len(negative_columns)), -1, np.int64)
    for i, column in enumerate(negative_columns):
        negatives[:, i] = documents(column, nulls_allowed=True)
    present = negatives >= 0
    return passages, Ragged(negatives[present], present.sum(axis=1))


def _negative_columns(path: Path) -> list[str]:
    """negative_1_input_ids, negative_2_input_ids, ... in the order of their numbers."""
    with open_parquet(path) as file:
        names = file.schema_arrow.names
    numbered = {
        int(number): name
        for name in names
        if (number := name.removeprefix("negative_").removesuffix("_input_ids")).isdecimal()
        and name == f"negative_{number}_input_ids"
    }
    return [numbered[number] for number in sorted(numbered)]


def _check_repeated_ids(pairs: np.ndarray, path: Path, corpus: Corpus, writer: ArrayWriter) -> None:
    """Refuse a corpus that has two different documents with the same id.

    `pairs` (n, 2) are rows with the same id. Equal documents are allowed.
    """
    offsets, tokens = _mapped_documents(corpus, writer)
    for first, again in pairs:
        one, other = (tokens[offsets[row] : offsets[row + 1]] for row in (first, again))
        if not np.array_equal(one, other):
            raise UserError(
                f"{path}: rows {first} and {again} have the same 'doc_id' but different tokens."
            )


def _count_documents(rows: np.ndarray, corpus: Corpus, writer: ArrayWriter) -> np.ndarray:
    """Occurrences of each token id in the given documents of a corpus."""
    offsets, tokens = _mapped_documents(corpus, writer)
    counts = TokenCounts()
    for start in range(0, len(rows), COUNTED_DOCUMENTS):
        chosen = rows[start : start + COUNTED_DOCUMENTS]
        lengths = offsets[chosen + 1] - offsets[chosen]
        # From a token's position among the chosen documents to its position in the corpus.
        shift = offsets[chosen] - (np.cumsum(lengths) - lengths)
        counts.add(tokens[np.arange(lengths.sum()) + np.repeat(shift, lengths)])
    return counts.counts


def _mapped_documents(corpus: Corpus, writer: ArrayWriter) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (documents + 1,) and tokens of a corpus that was just written."""
    names = "document_offsets", "document_tokens"
    offsets, tokens = (writer.files[n].mapped()[slice(*corpus.slices[n])] for n in names)
    return offsets, tokens


def _check_against_manifest(sources: Sources, name: str, slices: Slices, corpus: Corpus) -> None:
    if sources.manifest is None:
        return
    start, stop = slices["passage_documents"]
    entry = sources.manifest.datasets[name]
    for key, promised, found, path in (
        ("rows", entry.rows, stop - start, sources.queries[name]),
        ("documents", entry.documents, corpus.num_documents, sources.corpora[name]),
    ):
        if found != promised:
            raise UserError(
                f"{path} has {found} rows, but the manifest promises {promised} {key}. Run "
                "tokenize_data_qwen.py again."
            )


def _total_rows(sources: Sources) -> int:
    total = 0
    for path in sources.files():
        with open_parquet(path) as file:
            total += file.metadata.num_rows
    return total
