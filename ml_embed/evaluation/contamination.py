"""Texts of benchmarks in training data: the same text, or N_GRAM of the same tokens in a row.

Texts are compared in small letters, with the same letters written the same way (NFKC) and single
spaces. Tokens are compared and not words, because not every language has spaces. What is held in
memory is the benchmark's side: 12 bytes per n-gram, and the texts; training rows pass through.

Letters: T tokens of some texts joined, G n-grams of the benchmark.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ml_embed.evaluation.benchmark_texts import ROLES, BenchmarkTexts, Place
from ml_embed.files.atomic import atomic_folder
from ml_embed.prepare.raw import (
    RawDataset,
    notes_in_file,
    read_row_batches,
    read_rows,
    task_in_file,
)
from ml_embed.prepare.raw_parquet import write_raw
from ml_embed.prepare.rows import RowBatch
from ml_embed.prepare.tokenizer import TextTokenizer

KINDS = ("exact", "near")
N_GRAM = 13
"""As GPT-3 (arXiv 2005.14165, appendix C); shorter texts match as a whole only."""
COMMON = 100
"""texts of the benchmark; what stands in more is a formula, and no sign of any of them"""
TOKENIZED_CHARACTERS = 2_000_000
"""Tokenized at a time: 150 bytes of memory per token."""
EXAMPLES = 3
"""shown of each dataset, task, language and role"""
SHOWN_CHARACTERS = 300
WHOLE_TEXT = 1 << 40  # tokens: more than a text has
_FACTORS = np.random.Generator(np.random.PCG64(13)).integers(
    1 << 62, 1 << 63, N_GRAM, dtype=np.uint64
) * np.uint64(2) + np.uint64(1)


@dataclass(frozen=True)
class Match:
    """A role of a place that a row meets."""

    place: Place
    role: str
    """one of ROLES"""


@dataclass(frozen=True)
class Example:
    """One row that matches."""

    row: int
    """from 0"""
    match: Match
    kind: str
    """one of KINDS"""
    training: str
    benchmark: str
    """the beginnings of the two texts; of a pair, its query's"""


@dataclass
class Found:
    """What is found in a training dataset."""

    dataset: str
    rows: int = 0
    matching: list[int] = field(default_factory=list)
    """numbers of the rows that match, ascending"""
    counts: Counter[tuple[Match, str]] = field(default_factory=Counter)
    """(match, kind) -> rows; a row counts once for a match, exact before near"""
    texts: dict[Match, set] = field(default_factory=lambda: defaultdict(set))
    """numbers of the benchmark's texts, or pairs of them, that are met"""
    examples: list[Example] = field(default_factory=list)


def normalized(text: str) -> str:
    """A text as it is compared."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class BenchmarkIndex:
    """The texts of a benchmark, found by what a text has in common with them."""

    def __init__(
        self,
        benchmark: Iterable[BenchmarkTexts],
        tokenizer: TextTokenizer,
        roles: Sequence[str] = ROLES,
    ):
        """Index texts in these roles; of pairs, the queries and documents that they are made of."""
        self.tokenizer = tokenizer
        self.texts: list[str] = []
        """distinct, by number"""
        self.uses: list[set[Match]] = []
        """of each text, as a query or a document"""
        self.pairs: dict[tuple[int, int], set[Match]] = defaultdict(set)
        """numbers of query and document -> where they are a pair"""
        self.sizes: dict[Match, int] = {}
        """different texts, or pairs"""
        self.common = 0
        """n-grams that stand in more than COMMON texts"""
        self._numbers: dict[bytes, int] = {}
        for part in benchmark:
            self._add(part, roles)
        uses = [*self.uses, *self.pairs.values()]
        for use in (match for found in uses for match in found):
            self.sizes[use] = self.sizes.get(use, 0) + 1
        self._index_grams()

    def _add(self, part: BenchmarkTexts, roles: Sequence[str]) -> None:
        for role, texts in (("query", part.queries), ("document", part.documents)):
            for text in texts if role in roles else ():
                if (number := self._number(text)) is not None:
                    self.uses[number].add(Match(part.place, role))
        for query, document in part.pairs if "pair" in roles else ():
            asked, answer = self._number(query), self._number(document)
            if asked is not None and answer is not None and asked != answer:
                self.pairs[asked, answer].add(Match(part.place, "pair"))

    def _number(self, text: str) -> int | None:
        """None for a text of nothing but spaces."""
        text = normalized(text)
        if not text:
            return None
        number = self._numbers.setdefault(_digest(text), len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
            self.uses.append(set())
        return number

    def _index_grams(self) -> None:
        parts = list(self._grams(self.texts))
        grams = np.concatenate([hashes for hashes, _ in parts] or [np.empty(0, np.uint64)])
        owners = np.concatenate([texts for _, texts in parts] or [np.empty(0, np.int32)])
        order = np.argsort(grams, kind="stable")  # owners ascend already
        grams, owners = grams[order], owners[order]
        again = np.zeros(len(grams), bool)
        again[1:] = (grams[1:] == grams[:-1]) & (owners[1:] == owners[:-1])
        grams, owners = grams[~again], owners[~again]
        counts = np.unique(grams, return_counts=True)[1]
        self.common = int((counts > COMMON).sum())
        kept = np.repeat(counts <= COMMON, counts)
        self._hashes, self._owners = grams[kept], owners[kept]  # (G,)

    def _grams(self, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Hashes of all n-grams of texts, and the number of the text that each is of."""
        ends = np.cumsum([len(text) for text in texts])
        cuts = np.searchsorted(
            ends, np.arange(0, ends[-1] if len(ends) else 0, TOKENIZED_CHARACTERS)
        )
        for start, end in pairwise([*np.unique(cuts).tolist(), len(texts)]):
            # Before a space a word's tokens are those that it has within a text.
            encodings = self.tokenizer.tokenize([f" {text}" for text in texts[start:end]])
            tokens = [np.array(encoding.ids, np.uint64) for encoding in encodings]
            hashes, of = gram_hashes(tokens)
            yield hashes, (of + start).astype(np.int32)

    def matches(self, texts: Sequence[str]) -> list[dict[int, str]]:
        """For each normalized text, the benchmark's texts that it meets: number -> kind."""
        found: list[dict[int, str]] = [{} for _ in texts]
        for hashes, of in self._grams(texts):
            first = np.searchsorted(self._hashes, hashes, "left")
            counts = np.searchsorted(self._hashes, hashes, "right") - first
            hit = counts > 0
            met = np.unique(np.stack([of[hit], first[hit], counts[hit]], axis=1), axis=0)
            of, first, counts = met.T
            # the places first[i], first[i] + 1, ..., of all i joined
            places = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
            pairs = np.stack([np.repeat(of, counts), self._owners[places]], axis=1)
            for text, number in np.unique(pairs, axis=0).tolist():
                found[text][number] = "near"
        for numbers, text in zip(found, texts, strict=True):
            if (number := self._numbers.get(_digest(text))) is not None:
                numbers[number] = "exact"
        return found


def gram_hashes(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all N_GRAM tokens in a row, and the number of the text that they stand in.

    Args:
        texts: (tokens,) uint64 of each.
    """
    lengths = np.array([len(tokens) for tokens in texts], np.int64)
    joined = np.concatenate([*texts, np.empty(0, np.uint64)])  # (T,)
    of = np.repeat(np.arange(len(texts)), lengths)
    count = max(0, len(joined) - N_GRAM + 1)
    hashes = np.zeros(count, np.uint64)
    for place, factor in enumerate(_FACTORS):
        hashes += (joined[place : place + count] + np.uint64(1)) * factor  # modulo 2^64
    inside = of[:count] == of[N_GRAM - 1 : N_GRAM - 1 + count]
    return hashes[inside], of[:count][inside]


def _digest(text: str) -> bytes:
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def search_dataset(dataset: RawDataset, index: BenchmarkIndex) -> Found:
    """What rows of a training dataset have in common with the benchmark, in bounded memory.

    Raises:
        UserError: the file is broken, or rows are faulty.
    """
    found = Found(dataset.name)
    for batch in read_row_batches(dataset):
        texts, rows = _texts_of_rows(batch)
        matches = index.matches(texts)
        for row in rows:
            if any(matches[text] for text in row):
                _add_row(found, index, texts, matches, row)
            found.rows += 1
    return found


def _texts_of_rows(batch: RowBatch) -> tuple[list[str], list[list[int]]]:
    """The distinct normalized texts of rows, and of each row its query, passage and negatives."""
    documents = batch.decode(range(len(batch.documents)))
    numbers: dict[str, int] = {}

    def number(text: str) -> int:
        return numbers.setdefault(normalized(text), len(numbers))

    ends = np.cumsum(batch.counts).tolist()
    rows = [
        [number(query), *map(number, documents[start:end])]
        for query, (start, end) in zip(batch.queries, pairwise([0, *ends]), strict=True)
    ]
    return list(numbers), rows


def _add_row(
    found: Found,
    index: BenchmarkIndex,
    texts: Sequence[str],
    matches: Sequence[dict[int, str]],
    row: Sequence[int],
) -> None:
    """Note what a row (its texts' numbers: query, passage, negatives) meets, if anything."""
    best: dict[Match, tuple[str, int, int]] = {}  # kind, text of the row, text of the benchmark

    def note(match: Match, kind: str, text: int, number: int) -> None:
        if match not in best or (kind == "exact" and best[match][0] == "near"):
            best[match] = kind, text, number

    for text in row:
        for number, kind in matches[text].items():
            for match in index.uses[number]:
                note(match, kind, text, number)
                found.texts[match].add(number)
    for asking, answer in (row[:2], row[1::-1]):
        for asked, kind in matches[asking].items():
            for number, other in matches[answer].items():
                for match in index.pairs.get((asked, number), ()):
                    both = "exact" if kind == other == "exact" else "near"
                    note(match, both, asking, asked)
                    found.texts[match].add((asked, number))
    for match, (kind, text, number) in best.items():
        shown = sum(found.counts[match, k] for k in KINDS)
        found.counts[match, kind] += 1
        if shown < EXAMPLES:
            ours, theirs = texts[text][:SHOWN_CHARACTERS], index.texts[number][:SHOWN_CHARACTERS]
            found.examples.append(Example(found.rows, match, kind, ours, theirs))
    if best:
        found.matching.append(found.rows)


def contamination_report(found: Sequence[Found], index: BenchmarkIndex) -> dict[str, Any]:
    """All numbers as JSON.

    Returns:
        n_gram; common_n_grams, which are not looked for; datasets: name -> rows, matching;
            benchmark: for each task, language and role the number of different `texts` (or pairs)
            and how many of them are `found` in the data;
            matches: for each dataset, task, language and role the rows that match, exact and near;
            examples: of these, with the number of the row and the beginnings of both texts.
    """
    met: dict[Match, set] = defaultdict(set)
    for item in found:
        for match, numbers in item.texts.items():
            met[match] |= numbers
    by_name = sorted(index.sizes, key=lambda m: (m.place.task, m.place.language, m.role))
    return {
        "n_gram": N_GRAM,
        "common_n_grams": index.common,
        "datasets": {f.dataset: {"rows": f.rows, "matching": len(f.matching)} for f in found},
        "benchmark": [
            {**_named(match), "texts": index.sizes[match], "found": len(met[match])}
            for match in by_name
        ],
        "matches": [
            {"dataset": item.dataset, **_named(match)}
            | {kind: item.counts[match, kind] for kind in KINDS}
            for item in found
            for match in by_name
            if match in item.texts
        ],
        "examples": [
            {"dataset": item.dataset, "row": example.row, **_named(example.match)}
            | {name: getattr(example, name) for name in ("kind", "training", "benchmark")}
            for item in found
            for example in item.examples
        ],
    }


def _named(match: Match) -> dict[str, str]:
    return {"task": match.place.task, "language": match.place.language, "role": match.role}


def write_clean(datasets: Sequence[RawDataset], found: Sequence[Found], output: Path) -> None:
    """Write raw data without the rows that match, whole or not at all; what a file notes stays.

    Args:
        datasets: the training data.
        found: of each dataset. One of which no row is left is not written.
        output: the new folder.
    """
    with atomic_folder(output) as new:
        for dataset, item in zip(datasets, found, strict=True):
            gone = set(item.matching)
            if len(gone) == item.rows:
                continue
            notes = notes_in_file(dataset)
            left_out = Counter(notes.get("left_out", {})) + Counter(contaminated=len(gone))
            notes |= {"left_out": dict(left_out)} if left_out else {}
            rows = (row for number, row in enumerate(read_rows(dataset)) if number not in gone)
            path = new / f"{dataset.name}.parquet"
            write_raw(path, rows, task_in_file(dataset), partial(dict, notes))
