"""Validation during a run: losses on held-out rows, and how well whole and cut vectors retrieve.

Letters: E exits, N texts of a batch, R rows of this process, K negatives, H hidden size, Q queries
and P distinct passages of a dataset.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ml_embed.config import Task
from ml_embed.data.batch import ContrastiveBatch
from ml_embed.data.loader import Loader, Validation
from ml_embed.data.schedule import DatasetPlan
from ml_embed.data.store import TokenizedDataset
from ml_embed.distributed.collectives import all_reduce_sum, gather_uneven, world_size
from ml_embed.evaluation.metrics import (
    METRICS,
    metrics_of_ranks,
    ranks_of_positives,
    ranks_of_scores,
    spearman,
)
from ml_embed.losses.nested import MatryoshkaSpec
from ml_embed.losses.objective import Objective
from ml_embed.model_folders.cut import Cube, Cut
from ml_embed.training.by_language import (
    LOSSES,
    LanguageValues,
    Sums,
    add_losses,
    add_ranks,
    language_values,
    means_of,
    own_sums,
)
from ml_embed.training.resolve import Resolved

Encode = Callable[[ContrastiveBatch, int], Tensor]
"""encodes a batch's texts: (batch, rank; 0 is a whole token table) -> (E, N, H) vectors"""
Vectors = Mapping[int, Tensor]
"""exit layer -> (N, H), of one rank"""
LOSS = "valid_loss_"
"""what the names of a dataset's losses begin with"""
_LOSSES = ("hard", "in_batch", "similarity")


@torch.no_grad()
def validate(
    encode: Encode,
    loader: Loader,
    spec: MatryoshkaSpec,
    resolved: Resolved,
    device: torch.device,
) -> dict[str, float]:
    """Losses and retrieval metrics of every dataset that has held-out rows. A collective.

    Texts are encoded once per rank; all exits and vector lengths come from that. Losses are at full
    rank. They mask the sample's own document, but nothing by false_negative_margin: what the margin
    masks depends on the model, and models could not be compared.

    Args:
        encode: the model, in evaluation mode.
        loader: as in training, whose order and random draws do not depend on validation.
        spec: the losses' dims, weights and temperature.
        resolved: sizes of the model, and the grid of cuts to measure beside the whole of it.
    Returns:
        "<dataset>/valid_loss_hard", "<dataset>/ndcg@10" and so on (similarity datasets have
        "spearman" instead of retrieval metrics); with a grid also "<dataset>/ndcg@10/<name of a
        cut>" and so on; the means of all these over the datasets of a task as "Avg/<task>/…"; where
        the data says languages, means over all rows of a language as "language/<code>/…", of the
        whole model, with metrics of retrieval alone; and "loss", the mean over datasets.
        The same on every process; empty if nothing is held out. A
        clustering or classification dataset has losses only if none of its held-out rows has a
        negative, and a similarity dataset if its held-out scores are equal.
    """
    values: dict[str, float] = {}
    by_task: dict[str, list[float]] = defaultdict(list)
    totals, by_language = [], Sums()
    for name, plan in loader.held_out.schedule.plans.items():
        if plan.valid_rows == 0:
            continue
        languages = loader.held_out.store.datasets[name].languages
        losses = _Losses(Objective(spec), languages, device)
        own = _validate_dataset(encode, loader, plan, losses, resolved, by_language)
        totals.append(sum(own[LOSS + term] for term in _losses_of(plan.task)))
        for metric, value in own.items():
            values[f"{name}/{metric}"] = value
            by_task[f"Avg/{plan.task}/{metric}"].append(value)
    values |= {key: sum(entries) / len(entries) for key, entries in by_task.items()}
    if totals:
        values["loss"] = sum(totals) / len(totals)
    return values | means_of(by_language, LOSS)


def _validate_dataset(
    encode: Encode,
    loader: Loader,
    plan: DatasetPlan,
    losses: "_Losses",
    resolved: Resolved,
    by_language: Sums,
) -> dict[str, float]:
    rank = resolved.ranks[-1] if resolved.ranks else 0
    whole = Cut(rank, resolved.exits[-1], resolved.dims[0])
    grid = resolved.valid_grid.cuts if resolved.valid_grid else ()
    wanted = {whole, *grid}
    dataset = loader.held_out.store.datasets[plan.name]
    found: dict[Cut, dict[str, float]] = {}
    for rank in sorted({cut.rank for cut in wanted}):
        search = _SEARCH_OF_TASK[plan.task]({cut for cut in wanted if cut.rank == rank}, dataset)
        for rows, on_host in loader.held_out_batches(plan.name):
            batch = on_host.to(losses.device)
            vectors = encode(batch, rank)
            if rank == whole.rank:
                losses.add(vectors, batch, rows)
            search.add(dict(zip(resolved.exits, vectors, strict=True)), batch)
        found |= search.metrics()
        if rank == whole.rank and dataset.languages:
            search.add_to_languages(by_language, whole)
    add_losses(by_language, plan.task, losses.by_language())
    values = losses.means(plan.task) | found[whole]
    for cut in grid:
        values |= {f"{metric}/{cut.name}": value for metric, value in found[cut].items()}
    return values


class _Losses:
    """Losses of a dataset: means over the held-out rows of all processes."""

    def __init__(self, objective: Objective, languages: Sequence[str], device: torch.device):
        """`languages`: of the dataset."""
        self.device = device
        self._objective = objective
        self._sums = torch.zeros(len(_LOSSES), dtype=torch.float64, device=device)
        self._rows = 0
        self._languages = languages
        self._of_languages = self._sums.new_zeros((3, len(languages)))
        self._language_samples = np.zeros(len(languages), np.int64)

    def add(self, vectors: Tensor, batch: ContrastiveBatch, rows: int) -> None:
        """vectors: (E, N, H); rows: of the global batch."""
        terms = self._objective(vectors, batch)
        self._sums += rows * torch.stack([getattr(terms, term) for term in _LOSSES]).double()
        self._rows += rows
        self._of_languages += own_sums(terms, batch)
        self._language_samples += batch.language_samples

    def by_language(self) -> dict[str, LanguageValues]:
        """Sums over the rows of each language of the dataset."""
        sums = all_reduce_sum(self._of_languages).flatten().tolist()
        return language_values(self._languages, self._language_samples, sums)

    def means(self, task: Task) -> dict[str, float]:
        means = (all_reduce_sum(self._sums) / (world_size() * self._rows)).tolist()
        by_term = dict(zip(_LOSSES, means, strict=True))
        return {f"{LOSS}{term}": by_term[term] for term in _losses_of(task)}


def metric_names(held_out: Validation, grid: Cube | None) -> list[str]:
    """The names of all numbers that `validate` may give."""
    names = ["loss"]
    for plan in held_out.schedule.plans.values():
        if plan.valid_rows == 0:
            continue
        rows = np.concatenate(held_out.schedule.valid_batches(plan.name))
        dataset = held_out.store.datasets[plan.name]
        metrics = _metrics_for(plan, dataset, rows)
        cuts = grid.cuts if grid else ()
        own = [LOSS + term for term in _losses_of(plan.task)] + [*metrics]
        own += [f"{metric}/{cut.name}" for cut in cuts for metric in metrics]
        names += [f"{group}/{name}" for group in (plan.name, f"Avg/{plan.task}") for name in own]
        of_language = [LOSS + loss for loss in LOSSES[plan.task]]
        of_language += METRICS if plan.task == "retrieval" else ()
        numbers = np.unique(dataset.language_numbers[rows]) if dataset.languages else ()
        codes = [dataset.languages[number] for number in numbers]
        names += [f"language/{code}/{name}" for code in codes for name in of_language]
    return list(dict.fromkeys(names))


def _metrics_for(plan: DatasetPlan, dataset: TokenizedDataset, rows: np.ndarray) -> tuple[str, ...]:
    """Names of the metrics that held-out rows give."""
    if plan.task == "similarity":
        return ("spearman",)
    have_negatives = (dataset.negative_offsets[rows + 1] > dataset.negative_offsets[rows]).any()
    if plan.task == "retrieval" or (plan.num_negatives and have_negatives):
        return METRICS
    return ()


def _losses_of(task: Task) -> tuple[str, ...]:
    return LOSSES[task] or ("similarity",)


class _Search:
    """What is measured of a dataset of one task, at some cuts of one rank."""

    def __init__(self, cuts: Collection[Cut], dataset: TokenizedDataset): ...

    def add(self, vectors: Vectors, batch: ContrastiveBatch) -> None:
        """Take in this process's rows of a batch."""
        raise NotImplementedError

    def metrics(self) -> dict[Cut, dict[str, float]]:
        """Of all processes' rows. A collective."""
        raise NotImplementedError

    def add_to_languages(self, sums: Sums, cut: Cut) -> None:
        """Add what retrieval found at a cut, after `metrics`; nothing of other tasks."""


class _PoolSearch(_Search):
    """Retrieval: each query searches all distinct documents of the dataset's held-out rows.

    Other right answers of a query, as far as the data says, do not compete with its positive.
    Keeps the vectors of this process's queries and documents at the exits that are measured.
    """

    def __init__(self, cuts: Collection[Cut], dataset: TokenizedDataset):
        self._dataset = dataset
        self._cuts = sorted(cuts)
        self._found: dict[Cut, Tensor] = {}
        """(Q,) ranks at each cut, all processes' queries, when `metrics` has found them"""
        self._languages: list[Tensor] = []
        """each query's place in the dataset's languages, in the order of this process's queries"""
        self._numbers: list[Tensor] = []
        self._queries: dict[int, list[Tensor]] = {cut.depth: [] for cut in self._cuts}
        self._passages: dict[int, list[Tensor]] = {cut.depth: [] for cut in self._cuts}
        self._documents: list[Tensor] = []
        self._wanted: list[Tensor] = []

    def add(self, vectors: Vectors, batch: ContrastiveBatch) -> None:
        real = batch.sample_weights > 0
        used, numbers = candidate_documents(batch)
        self._documents.append(numbers)
        self._wanted.append(batch.passage_documents[real])
        self._numbers.append(batch.query_numbers[real])
        if batch.language_numbers is not None:
            self._languages.append(batch.language_numbers[real])
        for depth in self._queries:
            self._queries[depth].append(vectors[depth][batch.query[real]])
            self._passages[depth].append(vectors[depth][used])

    def metrics(self) -> dict[Cut, dict[str, float]]:
        self._found = dict(self._ranks())
        return _metrics_of(self._found.items())

    def add_to_languages(self, sums: Sums, cut: Cut) -> None:
        languages = gather_uneven(torch.cat(self._languages))
        add_ranks(sums, self._dataset.languages, languages, self._found[cut])

    def _ranks(self) -> Iterator[tuple[Cut, Tensor]]:
        """Each cut with the (Q,) ranks of the positives."""
        number, wanted, queries_numbers = (
            gather_uneven(torch.cat(parts))
            for parts in (self._documents, self._wanted, self._numbers)
        )
        distinct, place = torch.unique(number, return_inverse=True)  # sorted
        positive = torch.searchsorted(distinct, wanted)
        others = _other_right_answers(self._dataset, queries_numbers, wanted, distinct)
        for depth, cuts in groupby(self._cuts, key=lambda cut: cut.depth):
            query, passage = (
                gather_uneven(torch.cat(parts.pop(depth)))
                for parts in (self._queries, self._passages)
            )
            pool = passage.new_zeros((len(distinct), passage.shape[1]))
            pool[place] = passage  # the same document has the same vector
            for cut in cuts:
                queries, documents = (normalize(v[:, : cut.dim], dim=-1) for v in (query, pool))
                yield cut, ranks_of_positives(queries, documents, positive, excluded=others)


class _CandidateSearch(_Search):
    """Clustering and classification: each query chooses among its passage and its own negatives.

    Rows without negatives do not count: with one passage to choose from they are always right.
    """

    def __init__(self, cuts: Collection[Cut], dataset: TokenizedDataset):
        self._ranks: dict[Cut, list[Tensor]] = {cut: [] for cut in sorted(cuts)}

    def add(self, vectors: Vectors, batch: ContrastiveBatch) -> None:
        chooses = ~batch.excluded_candidates[:, 1:].all(1) & (batch.sample_weights > 0)  # (R,)
        for cut, ranks in self._ranks.items():
            unit = normalize(vectors[cut.depth][:, : cut.dim], dim=-1)
            ranks.append(_ranks_among_own(unit, batch)[chooses])

    def metrics(self) -> dict[Cut, dict[str, float]]:
        return _metrics_of(
            (cut, gather_uneven(torch.cat(ranks))) for cut, ranks in self._ranks.items()
        )


class _PairOrder(_Search):
    """Similarity: whether the cosines of all held-out pairs have the order of their scores."""

    def __init__(self, cuts: Collection[Cut], dataset: TokenizedDataset):
        self._cosines: dict[Cut, list[Tensor]] = {cut: [] for cut in sorted(cuts)}
        self._scores: list[Tensor] = []

    def add(self, vectors: Vectors, batch: ContrastiveBatch) -> None:
        assert batch.scores is not None
        real = batch.sample_weights > 0
        self._scores.append(batch.scores[batch.target[real]])
        for cut, cosines in self._cosines.items():
            unit = normalize(vectors[cut.depth][:, : cut.dim], dim=-1)
            cosines.append((unit[batch.query] * unit[batch.passage]).sum(-1)[real])

    def metrics(self) -> dict[Cut, dict[str, float]]:
        scores = gather_uneven(torch.cat(self._scores))
        found = {}
        for cut, cosines in self._cosines.items():
            correlation = spearman(gather_uneven(torch.cat(cosines)), scores)
            found[cut] = {"spearman": correlation} if math.isfinite(correlation) else {}
        return found


_SEARCH_OF_TASK: Mapping[Task, type[_Search]] = {
    "retrieval": _PoolSearch,
    "clustering": _CandidateSearch,
    "classification": _CandidateSearch,
    "similarity": _PairOrder,
}


def _metrics_of(ranks: Iterable[tuple[Cut, Tensor]]) -> dict[Cut, dict[str, float]]:
    return {cut: metrics_of_ranks(own.cpu()) if len(own) else {} for cut, own in ranks}


def _other_right_answers(
    dataset: TokenizedDataset, queries: Tensor, wanted: Tensor, pool: Tensor
) -> Tensor:
    """(P, 2) pairs (row of `queries`, row of `pool`) that are right besides the wanted documents.

    Args:
        queries: (Q,) query numbers.
        wanted: (Q,) documents.
        pool: (documents,) ascending document numbers.
    """
    several = torch.from_numpy(dataset.right_answers(queries.cpu().numpy()) > 1)
    pairs = [pool.new_empty((0, 2))]
    for row in several.nonzero().flatten().tolist():
        right = dataset.are_right(queries[row].cpu().numpy(), pool.cpu().numpy())
        places = torch.from_numpy(np.flatnonzero(right)).to(pool.device)
        places = places[pool[places] != wanted[row]]
        pairs.append(torch.stack([torch.full_like(places, row), places], dim=1))
    return torch.cat(pairs)


def candidate_documents(batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """Text index and document number of every real passage and negative of this process's rows."""
    real = batch.sample_weights > 0
    is_negative = batch.negative_weights > 0
    texts = torch.cat([batch.passage[real], batch.negatives[is_negative]])
    return texts, torch.cat([batch.passage_documents[real], batch.negative_documents[is_negative]])


def _ranks_among_own(vectors: Tensor, batch: ContrastiveBatch) -> Tensor:
    """(R,) rank of each positive among itself and its own negatives."""
    candidates = torch.cat([batch.passage.unsqueeze(1), batch.negatives], dim=1)  # (R, 1 + K)
    scores = (vectors[batch.query].unsqueeze(1) * vectors[candidates]).sum(-1)
    scores = scores.masked_fill(batch.excluded_candidates, -torch.inf)
    return ranks_of_scores(scores, torch.zeros_like(batch.passage))
