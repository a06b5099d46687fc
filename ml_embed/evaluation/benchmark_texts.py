"""The texts of benchmarks, mteb's tasks and evaluation files, to look for them in training data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_embed.errors import UserError
from ml_embed.evaluation.data import WHOLE, CandidateSet, has_candidates, read_test_sets
from ml_embed.evaluation.mteb import load_task
from ml_embed.prepare.raw import RawDataset, check_and_count_rows, list_raw_datasets, read_rows

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

ROLES = ("query", "document", "pair")
NO_LANGUAGE = "-"
"""Where the data says none."""
_COLUMNS = (("sentence1", "sentence2"), ("sentences",), ("text",))
"""Of tasks that do not say theirs."""


@dataclass(frozen=True)
class Place:
    """Where a text stands in a benchmark."""

    task: str
    language: str
    """code, several joined by +; NO_LANGUAGE where the data says none"""


@dataclass
class BenchmarkTexts:
    """The texts of one place."""

    place: Place
    queries: list[str] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    """a query and a document that answers it"""


def texts_of_files(paths: Sequence[Path]) -> Iterator[BenchmarkTexts]:
    """The texts of evaluation files, or of folders of them, as evaluate.py reads them.

    Raises:
        UserError: a file is missing or broken.
    """
    for path in paths:
        if not path.exists():
            raise UserError(
                f"evaluation data {path} does not exist; give a .parquet or .jsonl file, or a "
                "folder of them"
            )
        for dataset in list_raw_datasets(path) if path.is_dir() else [RawDataset(path.stem, path)]:
            if has_candidates(dataset.path):
                yield from _texts_of_candidates(dataset.path)
            else:
                yield from _texts_of_rows(dataset)


def _texts_of_candidates(path: Path) -> Iterator[BenchmarkTexts]:
    texts, sets = read_test_sets(path)
    for test_set in sets:
        assert isinstance(test_set, CandidateSet)
        language = NO_LANGUAGE if test_set.split == WHOLE else test_set.split
        queries = [texts.texts[n] for n in test_set.queries.tolist()]
        numbers = {n for row in test_set.candidates.tolist() for n in row if n >= 0}
        right = test_set.candidates.gather(1, test_set.positive[:, None])[:, 0].tolist()
        yield BenchmarkTexts(
            Place(test_set.dataset, language),
            queries,
            [texts.texts[n] for n in sorted(numbers)],
            list(zip(queries, (texts.texts[n] for n in right), strict=True)),
        )


def _texts_of_rows(dataset: RawDataset) -> Iterator[BenchmarkTexts]:
    check_and_count_rows(dataset)
    found: dict[str, BenchmarkTexts] = {}
    for row in read_rows(dataset):
        language = row.language or NO_LANGUAGE
        place = found.setdefault(language, BenchmarkTexts(Place(dataset.name, language)))
        place.queries.append(row.query)
        place.documents += (row.passage, *row.negatives)
        place.pairs.append((row.query, row.passage))
    yield from found.values()


def texts_of_tasks(tasks: Iterable["AbsTask"]) -> Iterator[BenchmarkTexts]:
    """The texts of mteb's tasks: of the splits that are evaluated, each subset for itself.

    Texts of tasks without documents are queries; those of two columns are pairs, too.

    Raises:
        UserError: a task's data cannot be loaded, or it is not known which of its columns are
            texts.
    """
    for task in tasks:
        for part in task.metadata.tasks if task.is_aggregate else [task]:
            load_task(part)
            for subset, languages in part.metadata.hf_subsets_to_langscripts.items():
                if subset in part.hf_subsets:
                    place = Place(part.metadata.name, "+".join(languages))
                    yield _texts_of_subset(part, subset, place)
            part.unload_data()


def _texts_of_subset(task: "AbsTask", subset: str, place: Place) -> BenchmarkTexts:
    found, data = BenchmarkTexts(place), task.dataset or {}
    data = data.get(subset, data)  # a task in one language may have no subsets
    for split in task.eval_splits:
        if split not in data:
            continue
        if isinstance(data[split], Mapping) and "relevant_docs" in data[split]:
            _add_retrieval(found, data[split])
        else:
            _add_texts(found, task, data[split])
    return found


def _add_retrieval(found: BenchmarkTexts, split: Mapping[str, Any]) -> None:
    def texts(table: Iterable[Mapping[str, Any]]) -> dict[str, str]:
        return {row["id"]: _joined(row.get("title"), row["text"]) for row in table}

    queries, documents = texts(split["queries"]), texts(split["corpus"])
    found.queries += queries.values()
    found.documents += documents.values()
    for query, judged in split["relevant_docs"].items():
        right = [name for name, score in judged.items() if score > 0 and name in documents]
        found.pairs += [(queries[query], documents[name]) for name in right if query in queries]


def _joined(title: str | None, text: str | Sequence[Any]) -> str:
    """A document as mteb gives it to models; a conversation is its turns."""
    if not isinstance(text, str):
        turns = (turn if isinstance(turn, str) else turn.get("content", "") for turn in text)
        text = "\n".join(turns)
    return f"{title} {text}".strip() if title else text


def _add_texts(found: BenchmarkTexts, task: "AbsTask", rows: Iterable[Mapping[str, Any]]) -> None:
    names = getattr(rows, "column_names", [])
    columns = _columns(task, names)
    for row in rows:
        texts = [row[name] for name in columns]
        for text in texts:
            found.queries += [text] if isinstance(text, str) else text
        if len(texts) == 2 and all(isinstance(text, str) for text in texts):
            found.pairs.append((texts[0], texts[1]))


def _columns(task: "AbsTask", names: Sequence[str]) -> tuple[str, ...]:
    """The columns of a split that hold the texts of a task."""
    two = tuple(getattr(task, f"input{n}_column_name", None) for n in (1, 2))
    said = (two, getattr(task, "column_names", None), (getattr(task, "input_column_name", None),))
    for columns in (*said, *_COLUMNS):
        if columns and all(isinstance(name, str) and name in names for name in columns):
            return tuple(columns)
    raise UserError(
        f"task {task.metadata.name}: it is not known which of its columns {', '.join(names)} hold "
        "texts; leave it out, or write its texts to a file for --files"
    )
