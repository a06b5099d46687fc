"""Validation at full rank: losses on held-out rows, and how well the deepest, whole vectors retrieve.

Letters: R rows of this process, K negatives, H hidden size, Q queries and P distinct passages of a dataset.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ml_embed.data.batch import BatchBuilder, ContrastiveBatch
from ml_embed.data.schedule import Schedule
from ml_embed.data.store import Store
from ml_embed.distributed import all_reduce_sum, gather_uneven, world_size
from ml_embed.evaluation import metrics_of_ranks, ranks_of_positives, ranks_of_scores
from ml_embed.losses import MatryoshkaSpec
from ml_embed.objective import batch_objective

VALIDATION_EPOCH = -1  # negatives are drawn as in an epoch that training never has: always the same ones


def valid_batches(
    schedule: Schedule, store: Store, builder: BatchBuilder, dataset: str
) -> Iterator[tuple[int, ContrastiveBatch]]:
    """(rows of the global batch, this process's share of it) over a dataset's held-out rows."""
    for rows in schedule.valid_batches(dataset):
        yield len(rows), builder.build(store.datasets[dataset], schedule.plans[dataset], rows, VALIDATION_EPOCH)


@torch.no_grad()
def validate(
    encode: Callable[[ContrastiveBatch], Tensor],
    schedule: Schedule,
    store: Store,
    builder: BatchBuilder,
    spec: MatryoshkaSpec,
    device: torch.device,
) -> dict[str, float]:
    """Losses and retrieval metrics of every dataset that has held-out rows. A collective.

    Args:
        encode: batch -> (E, N, H) vectors at full rank, in evaluation mode.
        schedule, store, builder: as in training; no training randomness is advanced, for there is none to advance.
        spec: the losses' dims, weights and temperature.
    Returns:
        "<dataset>/valid_loss_hard" and so on, their means over the datasets of a task as "Avg/<task>/…", and "loss",
        the mean over datasets. The same on every process; empty if nothing is held out.
    """
    values: dict[str, float] = {}
    by_task: dict[str, list[float]] = defaultdict(list)
    totals = []
    for name, plan in schedule.plans.items():
        if plan.valid_rows == 0:
            continue
        own = _validate_dataset(encode, valid_batches(schedule, store, builder, name), spec, device)
        totals.append(own["valid_loss_hard"] + own.get("valid_loss_in_batch", 0.0))
        for metric, value in own.items():
            values[f"{name}/{metric}"] = value
            by_task[f"Avg/{plan.task}/{metric}"].append(value)
    values |= {key: sum(entries) / len(entries) for key, entries in by_task.items()}
    if totals:
        values["loss"] = sum(totals) / len(totals)
    return values


def _validate_dataset(encode, batches, spec: MatryoshkaSpec, device: torch.device) -> dict[str, float]:
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    num_rows, queries, passages, documents, ranks = 0, [], [], [], []
    retrieval = False
    for rows, on_host in batches:
        batch = on_host.to(device)
        vectors = encode(batch)
        terms = batch_objective(vectors, batch, spec)
        sums += rows * torch.stack([terms.hard, terms.in_batch]).double()
        num_rows += rows
        retrieval = batch.task == "retrieval"
        whole = normalize(vectors[-1], dim=-1)
        real = batch.sample_weights > 0
        if retrieval:
            used, numbers = candidate_documents(batch)
            queries.append(whole[batch.query[real]])
            passages.append(whole[used])
            documents.append((numbers, batch.passage_documents[real]))
        else:
            ranks.append(_ranks_among_own(whole, batch)[real])
    hard, in_batch = (all_reduce_sum(sums) / (world_size() * num_rows)).tolist()
    losses = {"valid_loss_hard": hard}
    if retrieval:
        losses["valid_loss_in_batch"] = in_batch
        found = _ranks_in_pool(queries, passages, documents)
    else:
        found = gather_uneven(torch.cat(ranks))
    return losses | metrics_of_ranks(found.cpu())


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


def _ranks_in_pool(queries: list[Tensor], passages: list[Tensor], documents: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(Q,) rank of each positive among all distinct documents of the held-out rows."""
    query = gather_uneven(torch.cat(queries))
    passage = gather_uneven(torch.cat(passages))
    number = gather_uneven(torch.cat([numbers for numbers, _ in documents]))
    wanted = gather_uneven(torch.cat([own for _, own in documents]))
    distinct, place = torch.unique(number, return_inverse=True)  # sorted
    pool = passage.new_zeros((len(distinct), passage.shape[1]))
    pool[place] = passage  # the same document has the same vector
    return ranks_of_positives(query, pool, torch.searchsorted(distinct, wanted))
