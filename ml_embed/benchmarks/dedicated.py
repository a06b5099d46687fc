"""Cuts of one nested run beside models that are trained alone for what each cut gives.

A model alone is the first layers of the same start, with token factors of one rank in every step
and a loss on the leading components alone. Data, order, steps and seed are those of the nested run.
That run may be taught by the whole model alone of its seed (`Comparison.taught`).
"""

import contextlib
import functools
import itertools
import re
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ml_embed.config import parse_config
from ml_embed.distributed.collectives import compute_on_main_process
from ml_embed.errors import UserError
from ml_embed.evaluation.cube import RANKS, evaluate_cube
from ml_embed.evaluation.data import read_test_sets
from ml_embed.evaluation.intervals import bootstrap, difference, interaction
from ml_embed.evaluation.metrics import values_of_ranks
from ml_embed.files.atomic import write_json
from ml_embed.files.digests import value_digest
from ml_embed.files.locks import take_lock
from ml_embed.files.model_identity import model_identity
from ml_embed.files.model_source import find_model_folder
from ml_embed.files.paths import numbered_folders
from ml_embed.model_folders.cut import Cut, single_axes, whole_cut
from ml_embed.model_folders.export import write_cut
from ml_embed.model_folders.read import ModelFolder

NESTING = (
    *("use_mel", "mel_ranks", "mel_sampling", "mel_refactor", "valid_ranks"),
    *("use_mll", "mll_layers", "mll_weights", "mll_prior_weight", "mll_norm", "valid_layers"),
    *("use_mrl", "mrl_dims", "mrl_weights", "valid_dims", "self_distillation"),
)
"""Keys that a model alone has no use for."""
TEACHING = {"kd_loss": "similarity", "kd_weight": 5.0}
"""How the whole model alone teaches the nested one."""
AXES = ("rank", "depth", "dim")
Values = list[np.ndarray]
"""(Q,) of each test set: what a model achieves at each query"""
Rates = dict[str, dict[str, Any]]
"""label of a model -> {learning rate: its score} and "best"; one rate alone has no score"""
Train = Callable[[Path], int]
"""config file of a run -> its exit code; a run that has ended is left as it is"""


@dataclass(frozen=True)
class Comparison:
    """What is compared, on what."""

    given: Mapping[str, Any]
    """config of the nested run, as the user wrote it"""
    cuts: tuple[Cut, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    """each model takes the best of these at the first seed"""
    data: Path
    """evaluation data, for `read_test_sets`"""
    tuning: Path
    """the same, by which learning rates are chosen"""
    output: Path
    metric: str = "recall@1"
    max_queries: int | None = 1000
    taught: bool = False
    """the nested run learns from the whole model alone, which is then one of `cuts`"""

    @property
    def nested(self) -> "Model":
        return Model(self, None)

    @property
    def alone(self) -> list["Model"]:
        return [Model(self, cut) for cut in self.cuts]

    @property
    def models(self) -> list["Model"]:
        """All, those alone first: the nested one may learn from one of them."""
        return [*self.alone, self.nested]

    @property
    def whole(self) -> Cut:
        """What the nested run has without a cut."""
        backbone = self.start.config
        rank = parse_config(dict(self.given)).r
        return Cut(rank, backbone.num_hidden_layers, backbone.hidden_size)

    @contextlib.contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Held by one process of a launch at a time; they have not met yet."""
        self.output.mkdir(parents=True, exist_ok=True)
        with take_lock(self.output / ".lock", -1):
            yield

    @functools.cached_property
    def start(self) -> ModelFolder:
        """What all models start from."""
        return ModelFolder.open(find_model_folder(self.given["model_path"]))


@dataclass(frozen=True)
class Model:
    """One kind of model: nested, or trained alone for a cut; a run for each seed and rate."""

    comparison: Comparison
    alone: Cut | None
    """None is the nested one"""

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """What it is compared at."""
        return self.comparison.cuts if self.alone is None else (self.alone,)

    @property
    def label(self) -> str:
        """What it is called in names of runs and in the result."""
        if self.alone is not None:
            return self.alone.name
        return "taught" if self.comparison.taught else "nested"

    def name(self, seed: int, rate: float) -> str:
        """The run's experiment_id."""
        return f"{self.label}_seed_{seed}_lr_{rate:g}"

    def config(self, seed: int, rate: float, teacher: Path | None = None) -> dict[str, Any]:
        """The config of a run."""
        own = {
            "seed": seed,
            "learning_rate": rate,
            "experiment_id": self.name(seed, rate),
            "output_dir": str(self.comparison.output / "runs"),
        }
        given = dict(self.comparison.given)
        if self.alone is not None:
            given = alone_config(given, self.alone, self.comparison.start)
            given["model_path"] = str(self._start())
        elif teacher is not None:
            given |= {"teacher_model_path": str(teacher)} | TEACHING
        return given | own

    def _start(self) -> Path:
        """The first layers of the start, written where they are not there yet."""
        assert self.alone is not None
        start = self.comparison.start
        whole = whole_cut(start.record, start.config)
        if self.alone.depth == whole.depth:
            return start.path
        content = value_digest(model_identity(start.path))[:8]
        folder = self.comparison.output / "starts" / f"depth_{self.alone.depth}_{content}"
        with self.comparison.one_at_a_time():
            if not folder.exists():
                write_cut(start, Cut(whole.rank, self.alone.depth, whole.dim), folder)
        return folder

    def folder(self, seed: int, rate: float) -> Path:
        """The model folder at the end of a run."""
        runs = Path(self.config(seed, rate)["output_dir"])
        return numbered_folders(runs / self.name(seed, rate))[-1][1]


def alone_config(given: Mapping[str, Any], cut: Cut, start: ModelFolder) -> dict[str, Any]:
    """The config of a model that is trained alone for a cut, without its seed, rate and names."""
    config = {key: value for key, value in given.items() if key not in NESTING}
    config["r"] = cut.rank
    if not cut.rank:
        config.pop("mel_init", None)
    if cut.dim < start.config.hidden_size:
        config |= {"use_mrl": True, "mrl_dims": [cut.dim], "mrl_weights": [0, 1]}
    return config


def parse_cut(text: str) -> Cut:
    """A cut as it stands in a command: rank:depth:dim, rank 0 for a whole token table.

    Raises:
        UserError: it does not look so.
    """
    if re.fullmatch(r"\d+:[1-9]\d*:[1-9]\d*", text) is None:
        raise UserError(
            f"--cuts {text!r} must have the form rank:depth:dim, such as 64:4:32 (rank 0 is a "
            "whole token table)"
        )
    return Cut(*map(int, text.split(":")))


def check(comparison: Comparison) -> None:
    """Refuse what cannot be compared, before anything is trained.

    Raises:
        UserError: a config that a run would refuse, a cut that the nested run does not have, or
            evaluation data that cannot be read.
    """
    largest = comparison.whole
    for cut in comparison.cuts:
        for axis, size, most in zip(AXES, astuple(cut), astuple(largest), strict=True):
            if size > most or bool(size) != bool(most):
                raise UserError(
                    f"--cuts {cut.rank}:{cut.depth}:{cut.dim}: the nested run has no {axis} "
                    f"{size}; its whole is {largest.rank}:{largest.depth}:{largest.dim}"
                )
    if comparison.taught:
        _check_teaching(comparison)
    for model in comparison.models:
        names = []
        for seed, rate in itertools.product(comparison.seeds, comparison.learning_rates):
            parse_config(model.config(seed, rate))
            names.append(model.name(seed, rate))
        if len(set(names)) < len(names):
            raise UserError("--learning-rates: two are alike in their first six digits; give one")
    for data in {comparison.data, comparison.tuning}:
        read_test_sets(data, comparison.max_queries)


def _check_teaching(comparison: Comparison) -> None:
    if parse_config(dict(comparison.given)).is_taught:
        raise UserError("--taught: the config names a teacher already; leave one of them out")
    whole = comparison.whole
    if whole not in comparison.cuts:
        raise UserError(
            f"--taught: the teacher is the whole model alone; add {whole.rank}:{whole.depth}:"
            f"{whole.dim} to --cuts"
        )


def train_all(comparison: Comparison, train: Train, progress: bool = True) -> tuple[int, Rates]:
    """Train what is not trained yet. A collective.

    Learning rates are compared at the first seed; the other seeds take the best.

    Returns:
        0, or the exit code of the first run that did not end; and what was found about rates.
    """
    first, *others = comparison.seeds
    rates: Rates = {}
    for model in comparison.models:
        for rate in comparison.learning_rates:
            if code := _train_one(model, first, rate, rates, train):
                return code, rates
        rates[model.label] = _compare_rates(model, progress)
        for seed in others:
            if code := _train_one(model, seed, rates[model.label]["best"], rates, train):
                return code, rates
    return 0, rates


def _train_one(model: Model, seed: int, rate: float, rates: Rates, train: Train) -> int:
    comparison = model.comparison
    path = comparison.output / "configs" / f"{model.name(seed, rate)}.json"
    teacher = None
    if comparison.taught and model.alone is None:
        whole = Model(comparison, comparison.whole)
        teacher = whole.folder(seed, rates[whole.label]["best"])
    config = model.config(seed, rate, teacher)
    with comparison.one_at_a_time():
        path.parent.mkdir(exist_ok=True)
        write_json(path, config)
    return train(path)


def compare(comparison: Comparison, rates: Rates, progress: bool = True) -> dict[str, Any]:
    """Evaluate all that is trained, at the rates that `train_all` found. A collective.

    Returns:
        JSON-able: "metric", "data", "taught", "seeds", "learning_rates" (model -> rate -> its
        score, and "best"), and "rows", one for each cut: rank, depth, dim, the means over seeds
        "nested", "alone" and "difference", "range" of the differences, and "seeds", one object
        each, with "nested", "alone", "difference" and, where several axes are cut, "interaction",
        the last two as [value, low, high].
    """
    nested, alone = comparison.nested, comparison.alone
    by_seed: dict[Cut, list[dict[str, Any]]] = {cut: [] for cut in comparison.cuts}
    for seed in comparison.seeds:
        rate = rates[nested.label]["best"]
        whole = _whole(nested.folder(seed, rate))
        parts = _with_single_axes(comparison.cuts, whole)
        found = _values(nested, seed, rate, parts, progress)
        for model in alone:
            (cut,) = model.cuts
            own = _values(model, seed, rates[model.label]["best"], [cut], progress)[cut]
            by_seed[cut].append({"seed": seed} | _one_seed(cut, whole, found, own))
    return {
        "metric": comparison.metric,
        "data": str(comparison.data),
        "taught": comparison.taught,
        "seeds": list(comparison.seeds),
        "learning_rates": rates,
        "rows": [_row(cut, seeds) for cut, seeds in by_seed.items()],
    }


def _compare_rates(model: Model, progress: bool) -> dict[str, Any]:
    """Mean over the model's cuts of each rate at the first seed, and the best of them."""
    rates = model.comparison.learning_rates
    if len(rates) == 1:
        return {"best": rates[0]}
    seed, tuning = model.comparison.seeds[0], model.comparison.tuning
    scores = {
        rate: statistics.fmean(
            map(_mean, _values(model, seed, rate, model.cuts, progress, tuning).values())
        )
        for rate in rates
    }
    best = max(scores, key=scores.__getitem__)
    return {f"{rate:g}": score for rate, score in scores.items()} | {"best": best}


def _whole(folder: Path) -> Cut:
    opened = ModelFolder.open(folder)
    return whole_cut(opened.record, opened.config)


def _with_single_axes(cuts: Sequence[Cut], whole: Cut) -> list[Cut]:
    """The cuts, those of one of their axes alone, and the whole: what an interaction is made of."""
    return sorted({each for cut in cuts for each in (cut, *single_axes(cut, whole), whole)})


def _values(
    model: Model,
    seed: int,
    rate: float,
    cuts: Sequence[Cut],
    progress: bool,
    data: Path | None = None,
) -> dict[Cut, Values]:
    """What a run achieves at each query at each of the cuts; `data` None is that of all."""
    comparison = model.comparison
    ranks, depths, dims = (sorted({getattr(cut, axis) for cut in cuts}) for axis in AXES)
    work = comparison.output / "work"
    result = evaluate_cube(
        model.folder(seed, rate),
        data or comparison.data,
        ranks if any(ranks) else None,
        depths,
        dims,
        max_queries=comparison.max_queries,
        work=work / model.name(seed, rate),
        progress=progress,
        per_query=True,
    )
    compute_on_main_process(lambda: shutil.rmtree(work, ignore_errors=True))
    found: dict[Cut, Values] = {cut: [] for cut in cuts}
    for row in result["rows"]:
        if (cut := Cut.of_row(row)) in found:
            found[cut].append(values_of_ranks(row[RANKS])[comparison.metric])
    return found


def _mean(values: Values) -> float:
    """Each test set counts the same."""
    return statistics.fmean(own.mean() for own in values)


def _one_seed(cut: Cut, whole: Cut, found: dict[Cut, Values], alone: Values) -> dict[str, Any]:
    own = {
        "nested": _mean(found[cut]),
        "alone": _mean(alone),
        "difference": bootstrap(_side_by_side([found[cut], alone]), difference).to_list(),
    }
    single = single_axes(cut, whole)
    if sum(each != whole for each in single) > 1 and _mean(found[whole]) > 0:
        models = [found[each] for each in (cut, *single, whole)]
        own["interaction"] = bootstrap(_side_by_side(models), interaction).to_list()
    return own


def _side_by_side(models: Sequence[Values]) -> Values:
    """(M, Q) of each test set."""
    return [np.stack(of_set) for of_set in zip(*models, strict=True)]


def _row(cut: Cut, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    differences = [own["difference"][0] for own in seeds]
    means = {name: statistics.fmean(own[name] for own in seeds) for name in ("nested", "alone")}
    return {
        "rank": cut.rank,
        "depth": cut.depth,
        "dim": cut.dim,
        **means,
        "difference": statistics.fmean(differences),
        "range": [min(differences), max(differences)],
        "seeds": seeds,
    }
