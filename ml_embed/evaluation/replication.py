"""Replication of a nested model's savings, language by language, and the check of a replication.

Letters: M systems, Q queries of a task.
"""

import dataclasses
import functools
import itertools
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ml_embed.config import load_datasets
from ml_embed.distributed.agreement import check_agreement
from ml_embed.distributed.shares import conduct
from ml_embed.distributed.sole_launch import sole_launch_into
from ml_embed.errors import UserError
from ml_embed.evaluation.comparing import (
    BASELINE,
    UNCUT,
    ScoredLanguage,
    adjust_over_languages,
    macro_rows,
    rows_of_language,
)
from ml_embed.evaluation.cube import CubeModel
from ml_embed.evaluation.intervals import RESAMPLES
from ml_embed.evaluation.lexical import require_bm25s
from ml_embed.evaluation.mteb import SharedVectors, TaskPrompts, content_digest
from ml_embed.evaluation.query_scores import (
    BM25,
    Bm25System,
    CutSystem,
    ModelSystem,
    ModelVectors,
    ScoreStore,
    System,
    TaskData,
)
from ml_embed.evaluation.speeds import Speeds
from ml_embed.evaluation.suites import (
    Part,
    find_parts,
    resource_class,
    training_rows,
)
from ml_embed.files.atomic import write_json
from ml_embed.files.digests import sealed, value_digest
from ml_embed.files.paths import home_path
from ml_embed.inference.embedder import Embedder
from ml_embed.inference.text_models import load_text_model
from ml_embed.model_folders.cut import Cut, choose_cube, whole_cut
from ml_embed.model_folders.sizes import BYTES_PER_COMPONENT

RESULT_FILE = "replication.json"
LOCK, WORK, SCORES, SPEEDS = ".replication.lock", ".vectors", "scores", "speeds.json"
SEED = 0
"""of the resamples"""
PACKAGES = ("ml-embed", "mteb", "torch", "transformers", "numpy", "bm25s", "pytrec_eval-terrier")


@dataclass(frozen=True)
class Asked:
    """What is replicated, as the user says it."""

    model: str
    suite: str
    languages: tuple[str, ...] | None = None
    """None is all"""
    data: str | None = None
    """of the suite own"""
    rank: tuple[int, ...] = ()
    depth: tuple[int, ...] = ()
    dim: tuple[int, ...] = ()
    """beside the whole of each, which is always there"""
    baselines: tuple[str, ...] = ()
    """"bm25", or models: folders, or names on the hub"""
    query_prompt: str | None = None
    passage_prompt: str | None = None
    """instead of what config and folder say; "" is none"""
    config: str | None = None
    """file whose `datasets` give the prompts of tasks"""

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> "Asked":
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**known)


@dataclass(frozen=True)
class Replication:
    """A model and tasks, read but for weights and data."""

    asked: Asked
    model: CubeModel
    prompts: TaskPrompts
    parts: tuple[Part, ...]
    places: Mapping[str, str]
    """name of a baseline -> where it lies here; "bm25" for that one"""
    batch_tokens: int | None = None
    progress: bool = True

    @classmethod
    def open(
        cls,
        asked: Asked,
        device: str | None = None,
        batch_tokens: int | None = None,
        progress: bool = True,
        places: Sequence[str] = (),
    ) -> "Replication":
        """Read all but weights and data.

        Args:
            places: where the baselines lie here; empty where their names say it.
        Raises:
            UserError: a model, a size, a language or a suite is not there, or `places` does not
                fit the baselines.
        """
        placed = _placed(asked.baselines, places)
        parts = find_parts(
            asked.suite, asked.languages, None if asked.data is None else home_path(asked.data)
        )
        if BM25 in placed.values():
            require_bm25s()
        model = CubeModel.open(asked.model, device=device)
        whole = whole_cut(model.folder.record, model.folder.config)
        ranks = [*asked.rank, *([whole.rank] if whole.rank else [])]
        cube = choose_cube(
            model.folder.record,
            model.folder.config,
            ranks or None,
            [*asked.depth, whole.depth],
            [*asked.dim, whole.dim],
        )
        given = {"query": asked.query_prompt, "document": asked.passage_prompt}
        prompts = TaskPrompts(
            model.folder.record.prompts,
            {role: text for role, text in given.items() if text is not None},
            load_datasets(home_path(asked.config)) if asked.config else {},
        )
        model = dataclasses.replace(model, cube=cube)
        return cls(asked, model, prompts, tuple(parts), placed, batch_tokens, progress)

    @functools.cached_property
    def revision(self) -> str:
        """A digest of the model's content and prompts."""
        return content_digest(self.model, self.prompts)

    @property
    def whole(self) -> Cut:
        return whole_cut(self.model.folder.record, self.model.folder.config)

    @property
    def languages(self) -> dict[str, list[Part]]:
        """Language -> its tasks."""
        return languages_of(self.parts)


def _placed(baselines: Sequence[str], places: Sequence[str]) -> dict[str, str]:
    """Name of a baseline -> where it lies. Raises UserError."""
    if UNCUT in baselines:
        raise UserError(
            f"no baseline can be called {UNCUT}, as the model itself is; give ./{UNCUT} for a "
            "folder of that name"
        )
    if places and len(places) != len(baselines):
        raise UserError(
            f"--baselines says where {len(places)} of them lie, the file has {len(baselines)}: "
            + ", ".join(baselines)
        )
    return dict(zip(baselines, places or baselines, strict=True))


def replicate(replication: Replication, output: Path) -> dict[str, Any]:
    """Score every cut and baseline in every language; what `output` has is not computed again.

    Of a launch, all processes encode, and the first one runs the tasks.

    Returns:
        what is written to output/replication.json: "asked", "model" (revision, device, dtype, ...),
        "versions", "tasks" (source, digest and size of the data, training rows), "rows" and "macro"
        (see `comparing`), "baselines" (name -> digest of its content), "seed" and "resamples".
    Raises:
        UserError: data or a baseline cannot be loaded, or `output` cannot be written.
    """

    def finish(systems: "Systems") -> dict[str, Any]:
        store = ScoreStore(output / SCORES)
        systems.score(replication.parts, store)
        speeds = _speeds(replication, systems, store, output / SPEEDS)
        scored = scored_languages(replication, systems.all, store, speeds)
        rows = [row for language in scored for row in rows_of_language(language, SEED)]
        adjust_over_languages(rows)
        result = about(replication, store) | {"baselines": systems.revisions(replication.asked)}
        result |= {"rows": rows, "macro": macro_rows(scored, SEED)}
        write_json(output / RESULT_FILE, sealed(without_nan(result)))
        return result

    return with_systems(replication, output, finish)


@dataclass(frozen=True)
class Systems:
    """All that answers queries."""

    cuts: dict[Cut, CutSystem]
    baselines: Sequence[Bm25System | ModelSystem]
    forget: Callable[[], None]
    """removes the files of vectors"""

    @property
    def all(self) -> list[System]:
        return [*self.cuts.values(), *self.baselines]

    def revisions(self, asked: Asked) -> dict[str, str]:
        """Name of a baseline -> digest of its content."""
        return {
            name: value_digest(system.content)
            for name, system in zip(asked.baselines, self.baselines, strict=True)
        }

    def score(
        self, parts: Iterable[Part], store: ScoreStore, cuts: Iterable[Cut] | None = None
    ) -> None:
        """Find what is not known yet, of some cuts (None is all) and all baselines."""
        wanted = [self.cuts[cut] for cut in sorted(self.cuts if cuts is None else cuts)]
        of_rank: dict[int, list[System]] = {}
        for system in wanted:
            of_rank.setdefault(system.cut.rank, []).append(system)
        alone: list[list[System]] = [[system] for system in self.baselines]
        groups = [*of_rank.values(), *alone]
        for part in parts:
            store.complete(part, groups, self.forget)


def with_systems(
    replication: Replication, output: Path, finish: Callable[[Systems], dict[str, Any]]
) -> dict[str, Any]:
    """Let the first process finish the work with systems for which all processes encode."""
    check_agreement(lambda: {"model and prompts": replication.revision})
    with sole_launch_into(output, LOCK, "replicating into"):
        work = output / WORK
        own = SharedVectors(
            replication.model,
            work,
            replication.revision,
            replication.batch_tokens,
            replication.progress,
        )
        device = str(replication.model.device)  # of this process
        others = {
            name: ModelVectors(
                functools.partial(load_text_model, place, device), work, replication.progress
            )
            for name, place in replication.places.items()
            if place != BM25
        }

        def serve(request: tuple[str | None, Any]) -> np.ndarray:
            name, content = request
            return own.encode(content) if name is None else others[name].encode(content)

        def run(ask: Callable[[tuple[str | None, Any]], np.ndarray]) -> dict[str, Any]:
            own.ask = lambda request: ask((None, request))

            def baseline(name: str, place: str) -> Bm25System | ModelSystem:
                if place == BM25:
                    return Bm25System()
                vectors = others[name]
                key = f"model_{value_digest([name, vectors.model.identity])[:8]}"
                return ModelSystem(key, vectors, lambda texts: ask((name, texts)))

            model = replication.model
            made_of = [replication.revision, model.device.type, str(model.dtype)]
            cuts = {
                cut: CutSystem(cut, model.describe(cut), own, replication.prompts, made_of)
                for cut in model.cube.cuts
            }
            baselines = list(itertools.starmap(baseline, replication.places.items()))
            return finish(Systems(cuts, baselines, own.forget))

        return conduct(run, serve)


def scored_languages(
    replication: Replication,
    systems: Sequence[System],
    store: ScoreStore,
    speeds: Mapping[tuple[str, str], float],
    parts: Sequence[Part] | None = None,
) -> list[ScoredLanguage]:
    """What is known of each language of some parts (None is all), systems in their order."""
    cuts = [system for system in systems if isinstance(system, CutSystem)]
    named: list[dict[str, str]] = [{} for _ in cuts]
    named += [{BASELINE: name} for name in replication.asked.baselines]
    found = []
    for language, own in languages_of(replication.parts if parts is None else parts).items():
        columns = [
            {"language": language}
            | name
            | system.sizes()
            | {"texts_per_second": speeds.get((language, system.name))}
            for name, system in zip(named, systems, strict=True)
        ]
        scores = {part.name: [_known(store, part, system) for system in systems] for part in own}
        group = resource_class(language)
        found.append(ScoredLanguage(language, group, columns, replication.whole, scores))
    return found


def languages_of(parts: Iterable[Part]) -> dict[str, list[Part]]:
    """Language -> its tasks."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(part.language, []).append(part)
    return found


def _known(store: ScoreStore, part: Part, system: System) -> Any:
    scores = store.load(part, system)
    assert scores is not None, (part.name, system.name)
    return scores


def _speeds(
    replication: Replication, systems: Systems, store: ScoreStore, path: Path
) -> dict[tuple[str, str], float]:
    """(language, system) -> texts per second; BM25, which has no vectors, has none."""
    samples = {}
    for language, (part, *_) in replication.languages.items():
        data = store.data(part)
        assert data is not None
        samples[language] = list(data.sample)
    model = replication.model
    made_of = [replication.revision, str(model.device), torch.get_num_threads(), samples]
    speeds = Speeds(path, value_digest(made_of))
    found: dict[tuple[str, str], float] = {}
    for system in systems.all:
        if isinstance(system, CutSystem):  # whose speed does not depend on its dim
            name = f"rank_{system.cut.rank}_depth_{system.cut.depth}"
            load = functools.partial(_encoding, model, system.cut)
        elif isinstance(system, ModelSystem):
            name, load = system.name, functools.partial(getattr, system.vectors.model, "encode")
        else:
            continue
        measured = speeds.of(name, samples, load)
        found |= {(language, system.name): speed for language, speed in measured.items()}
    return found


def _encoding(model: CubeModel, cut: Cut) -> Callable[[Sequence[str]], np.ndarray]:
    """A cut held alone, as one would serve it."""
    embedder = Embedder.from_pretrained(
        model.folder.path,
        depth=cut.depth,
        rank=cut.rank or None,
        device=str(model.device),
        allow_untrained=True,
    )
    return functools.partial(embedder.encode, prompt="", show_progress=False)


def about(
    replication: Replication, store: ScoreStore, parts: Iterable[Part] | None = None
) -> dict[str, Any]:
    """Identities: of the model, the data, the programs, the device."""
    model = replication.model
    on_gpu = model.device.type == "cuda"
    return {
        "asked": dataclasses.asdict(replication.asked),
        "model": {
            "revision": replication.revision,
            "prompts": replication.prompts.to_json(),
            "max_seq_length": model.folder.record.max_seq_length,
            "whole": vars(replication.whole),
            "device": torch.cuda.get_device_name(model.device) if on_gpu else platform.machine(),
            "device_type": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
        "versions": versions(),
        "tasks": [
            {
                "task": part.name,
                "language": part.language,
                "subset": part.subset,
                "split": part.split,
                "source": part.source,
                "training_rows": training_rows(part, model.folder.record.origin),
            }
            | _size(store.data(part))
            for part in (replication.parts if parts is None else parts)
        ],
        "seed": SEED,
        "resamples": RESAMPLES,
    }


def _size(data: TaskData | None) -> dict[str, Any]:
    assert data is not None
    return {"queries": data.queries, "documents": data.documents, "digest": data.digest}


def versions() -> dict[str, str | None]:
    """Of Python and the packages that decide scores; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: without_nan(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plan(replication: Replication, output: Path) -> dict[str, Any]:
    """What would be loaded and computed, as far as it is known without loading data.

    Returns:
        JSON-able: "model", "cuts", "baselines", "rows" (of the result), and "tasks": task,
        language, where its data comes from, queries and documents (None where mteb does not say),
        vector_bytes (of a rank, held while the task runs), systems, and known (of these, the
        scores that are there).
    """
    model, store = replication.model, output / SCORES
    cube, baselines = model.cube, list(replication.asked.baselines)
    systems = len(cube.cuts) + len(baselines)
    tasks = []
    for part in replication.parts:
        sizes = part.described()
        texts = None if None in sizes.values() else sum(filter(None, sizes.values()))
        width = len(cube.depths) * cube.dims[-1] * BYTES_PER_COMPONENT
        kept = (store / part.name / part.language).glob("*.json")
        tasks.append(
            {"task": part.name, "language": part.language, **part.source, **sizes}
            | {"vector_bytes": None if texts is None else texts * width}
            | {"known": sum(path.stem != "data" for path in kept), "systems": systems}
        )
    return {
        "model": replication.asked.model,
        "cuts": [model.describe(cut) for cut in cube.cuts],
        "baselines": baselines,
        "rows": systems * len(replication.languages),
        "tasks": tasks,
    }
