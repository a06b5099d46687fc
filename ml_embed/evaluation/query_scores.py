"""What systems achieve at each query of mteb's retrieval tasks: found once, and kept in files.

A system is a cut of the model, another model, or BM25. The measures are mteb's own, per query.

Letters: Q queries, N documents, D vector length.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ml_embed.distributed.shares import Rows
from ml_embed.errors import UserError
from ml_embed.evaluation.cube import BLOCK
from ml_embed.evaluation.lexical import Bm25Index, pieces_of
from ml_embed.evaluation.mteb import CutEncoder, SharedVectors, TaskPrompts, load_task
from ml_embed.evaluation.suites import Part
from ml_embed.files.atomic import write_json
from ml_embed.files.digests import seal_is_broken, sealed, texts_digest, value_digest
from ml_embed.files.json_file import parse_json
from ml_embed.inference.text_models import TextModel
from ml_embed.model_folders.cut import Cut
from ml_embed.model_folders.sizes import BYTES_PER_COMPONENT
from ml_embed.notices import warn

if TYPE_CHECKING:
    from mteb.models import ModelMeta

METRICS = {"ndcg_at_10": "ndcg_cut_10", "recall_at_100": "recall_100"}
"""what mteb calls a mean -> what it calls the same of one query"""
BM25 = "bm25"
SAMPLE = 32
"""Documents of a task and language that are kept, evenly spaced, to measure speed with."""


@dataclass(frozen=True)
class QueryScores:
    """What a system achieves at each query of a task in one language."""

    queries: tuple[str, ...]
    """their names, sorted"""
    values: Mapping[str, np.ndarray]
    """metric -> (Q,)"""


@dataclass(frozen=True)
class TaskData:
    """What is known of the data of a task in one language, once it was loaded."""

    queries: int
    documents: int
    digest: str
    """of all texts, their names, and what is right"""
    sample: tuple[str, ...]
    """documents to measure speed with"""


class System(Protocol):
    """What answers queries."""

    @property
    def name(self) -> str:
        """In names of files."""

    @property
    def made_of(self) -> Any:
        """JSON that its scores depend on."""

    def searcher(self, part: Part) -> Any:
        """A model as mteb evaluates it."""

    def sizes(self) -> dict[str, Any]:
        """Columns of its rows that are not measured."""


@dataclass(frozen=True)
class CutSystem:
    """A cut of the model."""

    cut: Cut
    described: Mapping[str, Any]
    """see `CubeModel.describe`"""
    vectors: SharedVectors
    prompts: TaskPrompts
    made_of: Any

    @property
    def name(self) -> str:
        return self.cut.name

    def searcher(self, part: Part) -> CutEncoder:
        return CutEncoder(self.vectors.of_cut(self.cut), self.prompts, _meta(self.name))

    def sizes(self) -> dict[str, Any]:
        return dict(self.described)


@dataclass
class ModelVectors:
    """Vectors of lists of texts by another model, which the processes of a launch compute."""

    open: Callable[[], TextModel]
    folder: Path
    """for the files, while a task runs"""
    progress: bool
    _opened: list[TextModel] = field(default_factory=list)

    @property
    def model(self) -> TextModel:
        """Read at first use."""
        if not self._opened:
            self._opened.append(self.open())
        return self._opened[0]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) unit vectors, memory-mapped. A collective."""
        model = self.model
        made_of = [model.identity, texts_digest(texts), model.device.type]
        self.folder.mkdir(exist_ok=True)
        rows = Rows(
            self.folder / f"{value_digest(made_of)}.vectors",
            np.float32,
            (len(texts), model.dim),
            BLOCK,
            made_of,
        )
        return rows.fill(
            lambda start, stop: model.encode(texts[start:stop]), "baseline", self.progress
        )


@dataclass(frozen=True)
class ModelSystem:
    """Another model, with its folder's own prompts."""

    name: str
    vectors: ModelVectors
    ask: Callable[[Sequence[str]], np.ndarray]
    """lets all processes encode"""

    @property
    def content(self) -> Any:
        """JSON of what it is, wherever it runs."""
        return [self.vectors.model.identity, self.vectors.model.prompts]

    @property
    def made_of(self) -> Any:
        return [*self.content, self.vectors.model.device.type]

    def searcher(self, part: Part) -> CutEncoder:
        prompts = TaskPrompts(self.vectors.model.prompts, {})
        # Copied, because torch warns of vectors that cannot be written.
        return CutEncoder(lambda texts: np.array(self.ask(texts)), prompts, _meta("model"))

    def sizes(self) -> dict[str, Any]:
        model = self.vectors.model
        return {
            "parameters": model.parameters,
            "bytes_per_vector": BYTES_PER_COMPONENT * model.dim,
        }


@dataclass(frozen=True)
class Bm25System:
    """BM25 over words, or over pairs of characters where there are no spaces between words."""

    name: str = BM25
    content = (BM25,)

    @property
    def made_of(self) -> Any:
        from importlib.metadata import version

        return [*self.content, version("bm25s")]

    def searcher(self, part: Part) -> "Bm25Searcher":
        return Bm25Searcher(part.language)

    def sizes(self) -> dict[str, Any]:
        return {"parameters": 0, "bytes_per_vector": None}


class Bm25Searcher:
    """BM25 as mteb's `SearchProtocol`. Documents that share nothing with a query are not found."""

    def __init__(self, language: str):
        self._pieces = pieces_of(language)
        self.mteb_model_meta = _meta(BM25)

    def index(self, corpus: Any, **_: Any) -> None:
        """Read the documents."""
        self._names = list(corpus["id"])
        self._index = Bm25Index([self._pieces(text) for text in document_texts(corpus)])

    def search(self, queries: Any, *, top_k: int, **_: Any) -> dict[str, dict[str, float]]:
        """Query -> the best documents and their scores."""
        return {
            name: self._best(self._index.scores(self._pieces(text)), top_k)
            for name, text in zip(queries["id"], queries["text"], strict=True)
        }

    def _best(self, scores: np.ndarray, count: int) -> dict[str, float]:
        order = np.argsort(-scores, kind="stable")[:count]
        return {self._names[i]: float(scores[i]) for i in order if scores[i] > 0}


def _meta(name: str) -> "ModelMeta":
    """mteb wants one of every model; no file is named after it."""
    from mteb.models import ModelMeta

    return ModelMeta.create_empty({"name": f"local/{name}", "revision": "none"})


def document_texts(corpus: Any) -> Iterable[str]:
    """The documents of a task, each behind its title, as mteb gives them to models."""
    titles = corpus["title"] if "title" in corpus.column_names else itertools.repeat("")
    return (f"{t} {text}".strip() if t else text for t, text in zip(titles, corpus["text"]))  # noqa: B905


@dataclass(frozen=True)
class ScoreStore:
    """Files of what each system achieves: FOLDER/TASK/LANGUAGE/SYSTEM.json."""

    folder: Path

    def complete(
        self, part: Part, groups: Iterable[Sequence[System]], done: Callable[[], None]
    ) -> None:
        """Find the scores that are not there yet.

        Args:
            groups: systems that share their vectors; `done` is called after each.
        Raises:
            UserError: the task's data cannot be loaded.
        """
        for systems in groups:
            missing = [system for system in systems if self.load(part, system) is None]
            if missing and not part.task.data_loaded:
                self._load_data(part)
            for system in missing:
                self._keep(part, system, score_queries(part, system.searcher(part)))
            if missing:
                done()
        if self.data(part) is None:
            self._load_data(part)
        part.task.unload_data()

    def load(self, part: Part, system: System) -> QueryScores | None:
        """What a system achieves; None where that is not known, or of other data."""
        kept = self._read(self._path(part, system.name), self._made_of(part, system))
        if kept is None:
            return None
        values = {metric: np.array(kept[metric], np.float64) for metric in METRICS}
        return QueryScores(tuple(kept["queries"]), values)

    def data(self, part: Part) -> TaskData | None:
        """What is known of a task's data; None where it was not loaded yet."""
        kept = self._read(self._path(part, "data"), part.source)
        if kept is None:
            return None
        return TaskData(kept["queries"], kept["documents"], kept["content"], tuple(kept["sample"]))

    def _path(self, part: Part, name: str) -> Path:
        return self.folder / part.name / part.language / f"{name}.json"

    def _made_of(self, part: Part, system: System) -> Any:
        import mteb

        return {"data": part.source, "system": system.made_of, "mteb": mteb.__version__}

    def _read(self, path: Path, made_of: Any) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        try:
            kept = parse_json(path.read_bytes())
            if not seal_is_broken(kept):
                return kept if kept["made_of"] == made_of else None
        except (ValueError, KeyError, TypeError):
            pass
        warn(f"{path} is damaged; it is made anew")
        return None

    def _keep(self, part: Part, system: System, scores: QueryScores) -> None:
        values = {metric: own.tolist() for metric, own in scores.values.items()}
        content = {"made_of": self._made_of(part, system), "queries": list(scores.queries)}
        self._write(self._path(part, system.name), content | values)

    def _load_data(self, part: Part) -> None:
        load_task(part.task)
        part.task.convert_v1_dataset_format_to_v2(None)
        data = part.task.dataset[part.subset][part.split]
        read, documents = {kind: data[kind] for kind in ("queries", "corpus")}, data["corpus"]
        names = [texts_digest(read[kind]["id"]) for kind in read]
        contents = [texts_digest(read["queries"]["text"]), texts_digest(document_texts(documents))]
        step = max(1, len(documents) / SAMPLE)
        rows = [int(i * step) for i in range(min(SAMPLE, len(documents)))]
        content = {
            "made_of": part.source,
            "queries": len(_judged(data["relevant_docs"])),
            "documents": len(documents),
            "content": value_digest([names, contents, data["relevant_docs"]]),
            "sample": list(document_texts(documents.select(rows))),
        }
        self._write(self._path(part, "data"), content)

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, sealed(content))


def _judged(relevant: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The queries that mteb asks: those with judged documents."""
    return sorted(name for name, documents in relevant.items() if documents)


def score_queries(part: Part, searcher: Any) -> QueryScores:
    """What mteb's own evaluation of a task finds for each query; a query without answer gets 0.

    Raises:
        UserError: mteb found no query.
    """
    task, found = part.task, {}
    own_scores = task.task_specific_scores

    def keep(scores: dict[str, dict[str, float]], *rest: Any, **named: Any) -> dict[str, float]:
        found.update(scores)
        return own_scores(scores, *rest, **named)

    # The place where mteb lets tasks look at the scores of each query.
    task.task_specific_scores = keep
    try:
        task.evaluate(searcher, part.split, subsets_to_run=[part.subset], encode_kwargs={})
    finally:
        del task.task_specific_scores
    queries = _judged(task.dataset[part.subset][part.split]["relevant_docs"])
    if not queries:
        raise UserError(f"task {part.name} has no queries in {part.language}; leave it out")
    values = {
        metric: np.array([found.get(query, {}).get(name, 0.0) for query in queries])
        for metric, name in METRICS.items()
    }
    return QueryScores(tuple(queries), values)
