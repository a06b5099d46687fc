"""mteb's tasks at any cuts of a model: a text is encoded once per rank, for all depths and dims.

mteb is optional and slow to import, so it is imported where it is used.

Letters: E exits, N texts, D vector length.
"""

import dataclasses
import functools
import importlib.util
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ml_embed.config import DatasetConfig
from ml_embed.distributed.agreement import check_agreement
from ml_embed.distributed.collectives import compute_on_all_processes
from ml_embed.distributed.shares import conduct
from ml_embed.distributed.sole_launch import sole_launch_into
from ml_embed.errors import UserError, one_line
from ml_embed.evaluation.cube import CubeModel, encode_all_exits
from ml_embed.evaluation.data import ROLES
from ml_embed.files.atomic import write_json
from ml_embed.files.digests import texts_digest, value_digest
from ml_embed.files.model_identity import model_identity
from ml_embed.files.paths import home_path
from ml_embed.inference.embedder import Embedder
from ml_embed.model_folders.cut import Cut, choose_cube, choose_cut, whole_cut
from ml_embed.model_folders.sizes import embedding_parameters
from ml_embed.prepare.prompts import prompt_of_input

if TYPE_CHECKING:
    from mteb import Benchmark, ResultCache
    from mteb.abstasks import AbsTask
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import ModelMeta
    from mteb.results import TaskResult
    from mteb.types import PromptType

SUMMARY_FILE = "summary.json"
LOCK = ".evaluation.lock"
WORK = ".vectors"
"""Folder in the output folder for the vectors of a task, while it runs."""


@dataclass(frozen=True)
class TaskPrompts:
    """Which text stands in front of which input.

    What is given for a role goes first, then what a config says for the task: its prompt, and for
    documents its passage prompt. Else mteb takes the first of these names that the folder has:
    task-role, task, task type-role, task type, role. A role is "query" or "document"; the texts of
    many tasks (clustering, STS) have none, and get the prompt.
    """

    folder: Mapping[str, str]
    """name -> text"""
    given: Mapping[str, str]
    """role -> text, instead of what config and folder say"""
    datasets: Mapping[str, DatasetConfig] = field(default_factory=dict)
    """of a config, by the names of tasks or patterns; null there leaves it to the folder"""

    def to_json(self) -> dict[str, Any]:
        """All that decides what stands in front of texts."""
        said = {
            name: {
                role: prompt
                for role in ROLES
                if (prompt := prompt_of_input(name, role, {name: settings})) is not None
            }
            for name, settings in self.datasets.items()
        }
        config = {name: own for name, own in said.items() if own}
        json = {"folder": dict(self.folder), "given": dict(self.given)}
        return json | ({"config": config} if config else {})

    def of_task(self, task: "AbsTask") -> dict[str, str]:
        """Role -> what stands in front of a task's inputs; those without a role are "text"."""
        metadata = task.metadata
        return {role.value if role else "text": self.text(metadata, role) for role in roles(task)}

    def text(self, task_metadata: "TaskMetadata", role: "PromptType | None") -> str:
        from mteb.models.abs_encoder import get_prompt

        if role is not None and role.value in self.given:
            return self.given[role.value]
        is_document = role is not None and role.value == "document"
        said = prompt_of_input(
            task_metadata.name, "document" if is_document else "query", self.datasets
        )
        if said is not None:
            return said
        return get_prompt(dict(self.folder), task_metadata, role) or ""


def roles(task: "AbsTask") -> tuple["PromptType | None", ...]:
    """The roles that a task's texts have; None is a text without one."""
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.types import PromptType

    if isinstance(task, AbsTaskRetrieval):
        return PromptType.query, PromptType.document
    first, second = (getattr(task, f"input{i}_prompt_type", None) for i in (1, 2))
    return (first,) if first == second else (first, second)


def parts_of(tasks: Iterable["AbsTask"]) -> list["AbsTask"]:
    """The tasks that have texts of their own: an aggregate's parts instead of it."""
    parts = ((*t.metadata.tasks,) if t.is_aggregate else (t,) for t in tasks)
    return list({part.metadata.name: part for own in parts for part in own}.values())


def require_mteb() -> None:
    """Raises UserError where mteb is not installed."""
    if importlib.util.find_spec("mteb") is None:
        raise UserError("mteb is not installed; pip install 'ml-embed[mteb]'")


def find_tasks(
    names: Sequence[str], benchmark: str | None = None, languages: Sequence[str] | None = None
) -> list["AbsTask"]:
    """mteb's tasks of these names and of a benchmark, in these languages.

    Args:
        names: of tasks.
        benchmark: e.g. "MTEB(Multilingual, v2)"; None is none.
        languages: ISO 639-3 codes, with a script if wanted (eng, deu-Latn); tasks in none of them
            are left out.
    Raises:
        UserError: unknown names, each with the nearest known one; or no task in these languages.
    """
    require_mteb()
    import mteb

    tasks: list[AbsTask] = []
    unknown = []
    wanted: list[tuple[Callable[[str], Any], str]] = [(mteb.get_task, name) for name in names]
    if benchmark:
        wanted.append((_benchmark, benchmark))
    for find, name in wanted:
        try:
            found = find(name)
            tasks += found.tasks if name == benchmark else [found]
        except KeyError as error:
            unknown.append(str(error.args[0]).removeprefix("KeyError: "))
    if unknown:
        raise UserError("mteb has no such task or benchmark: " + " ".join(unknown))
    tasks = list({task.metadata.name: task for task in tasks}.values())
    return tasks if languages is None else _in_languages(tasks, languages)


def _benchmark(name: str) -> "Benchmark":
    """A benchmark of mteb's, also one that its register lacks. Raises KeyError as mteb does."""
    import mteb
    from mteb.benchmarks.benchmarks import benchmarks

    made = {b.name: b for b in vars(benchmarks).values() if isinstance(b, mteb.Benchmark)}
    return made[name] if name in made else mteb.get_benchmark(name)


def text_tasks(tasks: Iterable["AbsTask"]) -> tuple[list["AbsTask"], list[str]]:
    """The tasks that are of text alone, which is all that this model reads; names of the others."""
    sorted_out: dict[bool, list[AbsTask]] = {True: [], False: []}
    for task in tasks:
        sorted_out[set(task.metadata.modalities) == {"text"}].append(task)
    return sorted_out[True], [task.metadata.name for task in sorted_out[False]]


def _in_languages(tasks: Iterable["AbsTask"], languages: Sequence[str]) -> list["AbsTask"]:
    kept = []
    for task in tasks:
        try:
            # A set, because some tasks have 40,000 pairs of languages.
            kept.append(task.filter_languages(languages, hf_subsets=set(task.hf_subsets)))
        except ValueError:  # it has none of them
            continue
    if not kept:
        raise UserError(
            f"no task is in the languages {', '.join(languages)}; give ISO 639-3 codes, such as "
            "eng deu"
        )
    return kept


def evaluate_mteb(
    folder: str | Path,
    tasks: Sequence["AbsTask"],
    output: Path,
    ranks: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    batch_tokens: int | None = None,
    device: str | None = None,
    overwrite: bool = False,
    name: str | None = None,
    languages: Sequence[str] | None = None,
    progress: bool = True,
    datasets: Mapping[str, DatasetConfig] | None = None,
) -> dict[str, Any]:
    """Scores of every task at every rank, depth and dim; what `output` has is not computed again.

    mteb's own result files lie in output/results/, named after the model, its content and prompts,
    and the cut. While a task runs, its vectors are held in `output`: texts x depths x longest dim
    x 4 bytes. Of a launch, all processes encode, and the first one runs the tasks.

    Args:
        folder: a model folder, a plain backbone, or the name of one on the hub.
        tasks: from `find_tasks`, or tasks of one's own.
        output: folder for results.
        ranks, depths, dims: None is the largest of each; untrained sizes are taken too.
        query_prompt, passage_prompt: put in front of queries and of documents; "" is none, None
            takes those of `datasets`, or else the folder's (see `TaskPrompts`).
        batch_tokens: tokens per forward pass; None is the device's default.
        device: None is the first GPU if there is one, else the CPU.
        overwrite: compute everything again.
        name: "owner/name" that mteb's files give the model; None takes it from its folder.
        languages: of which scores are told one by one, as in `find_tasks`; None is all.
        progress: bars on stderr, on terminals.
        datasets: of a config, by the names of tasks or patterns: their prompts.

    Returns:
        what is written to output/summary.json: model, revision (of content and prompts), mteb
        (version), prompts, prompts_used (task -> role -> text), and "rows", one for each task and
        cut: task, type, metric, score (mteb's main score, the mean over its splits and subsets),
        languages (code -> mean score of the subsets that it is in, and their number), rank, depth,
        dim, trained, parameters, bytes_per_vector.

    Raises:
        UserError: mteb is missing, the model cannot be read, a size is not one that it has, a task
            is not of text alone, or its data cannot be loaded.
    """
    require_mteb()
    import mteb

    _check_text_only(tasks)
    model = compute_on_all_processes(lambda: _open_model(folder, ranks, depths, dims, device))
    given = {"query": query_prompt, "document": passage_prompt}
    prompts = TaskPrompts(
        model.folder.record.prompts,
        {role: text for role, text in given.items() if text is not None},
        datasets or {},
    )
    revision = content_digest(model, prompts)
    check_agreement(lambda: {"model and prompts": revision})
    with sole_launch_into(output, LOCK, "evaluating into"):
        vectors = SharedVectors(model, output / WORK, revision, batch_tokens, progress)

        def run(ask: Callable[[Request], np.ndarray]) -> dict[str, Any]:
            vectors.ask = ask
            cache = mteb.ResultCache(output)
            run = _MtebRun(model, prompts, revision, cache, vectors, name, languages)
            rows = [row for task in tasks for row in run.rows_of(task, overwrite)]
            summary = {"model": model.name, "revision": revision, "mteb": mteb.__version__}
            used = {part.metadata.name: prompts.of_task(part) for part in parts_of(tasks)}
            summary |= {"prompts": prompts.to_json(), "prompts_used": used, "rows": rows}
            write_json(output / SUMMARY_FILE, summary)
            return summary

        return conduct(run, vectors.encode)


def model(
    folder: str | Path,
    rank: int | None = None,
    depth: int | None = None,
    dim: int | None = None,
    device: str | None = None,
    allow_untrained: bool = False,
) -> "CutEncoder":
    """A cut as a model for `mteb.evaluate`, with its ModelMeta and the folder's prompts.

    `evaluate_mteb` is faster for several cuts: it encodes each text once per rank.

    Args:
        folder: a model folder, a plain backbone, or the name of one on the hub.
        rank, depth, dim: None is the largest that was trained.
        device: None is the first GPU if there is one, else the CPU.
        allow_untrained: take values that were not trained.
    Raises:
        UserError: mteb is missing, the model cannot be read, or a value was not trained.
    """
    require_mteb()
    source = CubeModel.open(folder, device=device)
    record, config = source.folder.record, source.folder.config
    cut = choose_cut(record, config, depth, dim, rank, allow_untrained)
    sizes = vars(cut) | {"rank": cut.rank or None}
    embedder = Embedder.from_pretrained(
        source.folder.path, **sizes, device=device, allow_untrained=True
    )
    prompts = TaskPrompts(record.prompts, {})
    return CutEncoder(
        functools.partial(embedder.encode, prompt=""),
        prompts,
        _meta(source, prompts, content_digest(source, prompts), cut),
    )


def _open_model(
    folder: str | Path,
    ranks: Sequence[int] | None,
    depths: Sequence[int] | None,
    dims: Sequence[int] | None,
    device: str | None,
) -> CubeModel:
    """The model with the largest of each size, where none is asked for."""
    model = CubeModel.open(folder, device=device)
    record, config = model.folder.record, model.folder.config
    cube = choose_cube(
        record,
        config,
        ranks or record.ranks[-1:],
        depths or [config.num_hidden_layers],
        dims or record.dims[:1],
    )
    return dataclasses.replace(model, cube=cube)


def _check_text_only(tasks: Iterable["AbsTask"]) -> None:
    if others := text_tasks(tasks)[1]:
        raise UserError(
            f"these tasks are not of text alone, which is all this model reads: {', '.join(others)}"
            "; --only-text leaves them out"
        )


def content_digest(model: CubeModel, prompts: TaskPrompts) -> str:
    """Tells apart what gives different scores under the same name."""
    content = [
        model_identity(model.folder.path),
        prompts.to_json(),
        model.folder.record.max_seq_length,
    ]
    return value_digest(content)


@dataclass(frozen=True)
class _MtebRun:
    """One model over tasks, with mteb's store of results."""

    model: CubeModel
    prompts: TaskPrompts
    revision: str
    cache: "ResultCache"
    vectors: "SharedVectors"
    name: str | None
    languages: Sequence[str] | None

    def rows_of(self, task: "AbsTask", overwrite: bool) -> list[dict[str, Any]]:
        """The results of a task, computed where they are not there or are not wanted."""
        parts = task.metadata.tasks if task.is_aggregate else [task]
        if overwrite:
            self.forget([task, *parts])
        for part in parts:
            self.complete(part)
        return self.rows(task)

    def complete(self, task: "AbsTask") -> None:
        """Compute the cuts of a task that have no result yet.

        Raises:
            UserError: the task's data cannot be loaded.
        """
        missing = [cut for cut in self.model.cube.cuts if not self._is_done(task, cut)]
        if not missing:
            return
        load_task(task)
        for _, cuts in groupby(missing, key=lambda cut: cut.rank):
            for cut in cuts:
                self._evaluate(task, cut, self.vectors.of_cut(cut))
            self.vectors.forget()
        task.unload_data()

    def rows(self, task: "AbsTask") -> list[dict[str, Any]]:
        """The finished results of a task, an aggregate's computed from its parts'."""
        named = {
            "task": task.metadata.name,
            "type": task.metadata.type,
            "metric": task.metadata.main_score,
        }
        rows = []
        for cut in self.model.cube.cuts:
            if task.is_aggregate:
                self._evaluate(task, cut, _never_encoded)
            parts = task.metadata.tasks if task.is_aggregate else [task]
            scores = {
                "score": float(self._result(task, cut).get_score()),
                "languages": by_language(
                    (self._result(part, cut) for part in parts), self.languages
                ),
            }
            rows.append(named | scores | self.model.describe(cut))
        return rows

    def _result(self, task: "AbsTask", cut: Cut) -> "TaskResult":
        """What is kept of a task's splits and subsets that are wanted."""
        result = self.cache.load_task_result(task.metadata.name, self._meta(cut))
        return result.validate_and_filter_scores(task)

    def forget(self, tasks: Iterable["AbsTask"]) -> None:
        """Remove earlier results."""
        for task in tasks:
            for cut in self.model.cube.cuts:
                path = self.cache.get_task_result_path(task.metadata.name, self._meta(cut))
                path.unlink(missing_ok=True)

    def _is_done(self, task: "AbsTask", cut: Cut) -> bool:
        result = self.cache.load_task_result(task.metadata.name, self._meta(cut))
        return result is not None and not result.get_missing_evaluations(task)

    def _evaluate(
        self, task: "AbsTask", cut: Cut, vectors: Callable[[list[str]], np.ndarray]
    ) -> None:
        import mteb

        encoder = CutEncoder(vectors, self.prompts, self._meta(cut))
        mteb.evaluate(encoder, task, cache=self.cache, co2_tracker=False, show_progress_bar=False)

    def _meta(self, cut: Cut) -> "ModelMeta":
        return _meta(self.model, self.prompts, self.revision, cut, self.name)


def _meta(
    model: CubeModel, prompts: TaskPrompts, revision: str, cut: Cut, name: str | None = None
) -> "ModelMeta":
    """mteb keeps results by this name, revision and cut; a name of None is the folder's."""
    from mteb.models import ModelMeta
    from mteb.models.model_meta import ScoringFunction

    path, folder = home_path(model.name).resolve(), model.folder
    record, whole = folder.record, whole_cut(folder.record, folder.config)
    known = {
        "name": name or f"{path.parent.name or 'local'}/{path.name}",
        "revision": revision,
        "n_parameters": model.describe(cut)["parameters"],
        "n_embedding_parameters": embedding_parameters(folder.config, cut.rank),
        "max_tokens": record.max_seq_length,
        "embed_dim": cut.dim,
        "license": record.origin.license,
        "adapted_from": record.origin.base_model,
        "training_datasets": set(record.origin.datasets) if record.origin.all_data_known else None,
        "open_weights": True,
        "framework": ["PyTorch", "Sentence Transformers"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": any({**prompts.folder, **prompts.given}.values()),
        # of the whole model none, so that its results lie where a leaderboard looks for them
        "experiment_kwargs": None if cut == whole else vars(cut),
    }
    return ModelMeta.create_empty(known)


def by_language(
    results: Iterable["TaskResult"], languages: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """Each language's mean score over the subsets that it is in, and how many these are.

    A subset of two languages, such as a pair to be matched, counts for both.

    Args:
        results: of one task, or of the parts of an aggregate.
        languages: only these, with or without their script (swa, zho-Hans); None is all.
    """
    found: dict[str, dict[tuple[int, str], list[float]]] = {}
    for number, result in enumerate(results):
        for scores in (entry for of_split in result.scores.values() for entry in of_split):
            for code in sorted(set(scores["languages"])):
                if languages is None or {code, code.partition("-")[0]} & set(languages):
                    subsets = found.setdefault(code, {}).setdefault
                    subsets((number, scores["hf_subset"]), []).append(scores["main_score"])
    return {
        code: {
            "score": float(np.mean([np.mean(of_splits) for of_splits in subsets.values()])),
            "subsets": len(subsets),
        }
        for code, subsets in sorted(found.items())
    }


def load_task(task: "AbsTask") -> None:
    """Load a task's data. Raises UserError where it cannot be."""
    try:
        task.load_data()
    except UserError:  # of a task of one's own
        raise
    except Exception as error:  # the hub's client, datasets and each task's loader have their own
        raise UserError(
            f"task {task.metadata.name}: its data {task.metadata.dataset['path']!r} could not be "
            f"loaded ({type(error).__name__}: {one_line(error)}); connect to the hub, or set "
            "HF_HOME to a folder that holds it"
        ) from error


def _never_encoded(texts: list[str]) -> np.ndarray:
    raise AssertionError("an aggregate's parts are complete before it is put together")


@dataclass(frozen=True)
class Request:
    """Texts whose vectors are wanted."""

    rank: int
    texts: list[str]


class SharedVectors:
    """Vectors of lists of texts: all depths, the longest dim, kept in files that all cuts read.

    The processes of a launch compute them together.
    """

    ask: Callable[[Request], np.ndarray]
    """on the first process: lets all processes `encode`"""

    def __init__(
        self,
        model: CubeModel,
        folder: Path,
        revision: str,
        batch_tokens: int | None,
        progress: bool,
    ):
        self._model = model
        self._folder = folder
        self._revision = revision
        self._batch_tokens = batch_tokens
        self._progress = progress
        self._known: dict[tuple[int, str], np.ndarray] = {}

    def encode(self, request: Request) -> np.ndarray:
        """(E, N, longest dim), memory-mapped. A collective."""
        self._folder.mkdir(exist_ok=True)
        texts, tokenizer = request.texts, self._model.text_tokenizer
        return encode_all_exits(
            self._model,
            lambda part: tokenizer(texts[part]),
            len(texts),
            request.rank,
            self._folder,
            [self._revision, texts_digest(texts)],
            self._batch_tokens,
            self._progress,
        )

    def of_cut(self, cut: Cut) -> Callable[[list[str]], np.ndarray]:
        """A function: texts -> (N, dim) float32 unit vectors."""
        place = self._model.cube.depths.index(cut.depth)

        def vectors(texts: list[str]) -> np.ndarray:
            key = cut.rank, texts_digest(texts)
            if key not in self._known:
                self._known[key] = self.ask(Request(cut.rank, texts))
            leading = torch.from_numpy(np.array(self._known[key][place, :, : cut.dim]))
            return normalize(leading, dim=-1).numpy()

        return vectors

    def forget(self) -> None:
        """Remove the files, also those that an interrupted call left."""
        self._known = {}
        shutil.rmtree(self._folder, ignore_errors=True)


class CutEncoder:
    """A cut of a model as mteb's `EncoderProtocol`."""

    def __init__(
        self,
        vectors: Callable[[list[str]], np.ndarray],
        prompts: TaskPrompts,
        mteb_model_meta: "ModelMeta",
    ):
        """`vectors`: texts -> (N, D) float32 unit vectors."""
        self._vectors = vectors
        self._prompts = prompts
        self.mteb_model_meta = mteb_model_meta

    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[str]]],
        *,
        task_metadata: "TaskMetadata",
        hf_split: str,
        hf_subset: str,
        prompt_type: "PromptType | None" = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """(N, D) vectors of the texts in batches {"text": [...]}, behind their prompt."""
        prompt = self._prompts.text(task_metadata, prompt_type)
        return self._vectors([prompt + text for batch in inputs for text in batch["text"]])

    def similarity(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> Tensor:
        """(N, M) cosines of (N, D) and (M, D) unit vectors."""
        left, right = (torch.atleast_2d(torch.as_tensor(e)) for e in (embeddings1, embeddings2))
        return left @ right.T

    def similarity_pairwise(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> Tensor:
        """(N,) cosines of (N, D) and (N, D) unit vectors, row by row."""
        return (torch.as_tensor(embeddings1) * torch.as_tensor(embeddings2)).sum(-1)
