"""Naive, independent versions of the mathematics: one sequence, one sample, one dim at a time;
plain transformers.

Nothing of `ml_embed` is used here. Slow and obviously right, from the formulas.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import Qwen3Model


def exit_vectors(model: Qwen3Model, ids: Sequence[int], exits: Sequence[int]) -> dict[int, Tensor]:
    """{exit: (H,)}: FinalRMSNorm(h_l) at the last token of one sequence, by transformers' own
    forward."""
    output = model(torch.tensor([list(ids)]), output_hidden_states=True)
    last_layer = model.config.num_hidden_layers
    vectors = {}
    for layer in exits:
        hidden = output.hidden_states[layer][0, -1]
        # transformers gives hidden states before the final norm, except the last, which is after
        # it.
        vectors[layer] = hidden if layer == last_layer else model.norm(hidden)
    return vectors


def dims_and_weights(hidden_size: int, use_mrl: bool) -> list[tuple[int, float]]:
    dims = [hidden_size]
    if use_mrl:
        dims = sorted(
            {8 * 2**k for k in range(20) if 8 * 2**k < hidden_size} | {hidden_size}, reverse=True
        )
    return [(dim, 1 / (n * math.sqrt(hidden_size / dim))) for n, dim in enumerate(dims, start=1)]


def cosine(a: Tensor, b: Tensor, dim: int) -> Tensor:
    a, b = a[:dim], b[:dim]
    return (a / a.norm()).dot(b / b.norm())


def cross_entropy(logits: list[Tensor], target: int, masked: Mapping[int, float] = {}) -> Tensor:
    """`masked`: how much of a logit's exponential is left out of the sum; 1 = all of it."""
    shares = [1 - masked.get(place, 0.0) for place in range(len(logits))]
    terms = [
        share * (logit - logits[target]).exp() for share, logit in zip(shares, logits, strict=True)
    ]
    return sum(terms).log()


def hard_loss(
    queries: list[Tensor],
    passages: list[Tensor],
    negatives: list[list[Tensor]],
    dims,
    temperature: float,
    masked: list[dict[int, float]] | None = None,
) -> Tensor:
    """Mean over samples, sum over dims, of CE(positive among [positive, own negatives]), of which
    `masked` says how much of each is left out."""
    total = torch.zeros(())
    for dim, weight in dims:
        for i, (query, own) in enumerate(zip(queries, negatives, strict=True)):
            logits = [cosine(query, c, dim) / temperature for c in [passages[i], *own]]
            out = {1 + place: share for place, share in (masked[i] if masked else {}).items()}
            total = total + weight * cross_entropy(logits, 0, out) / len(queries)
    return total


def in_batch_loss(
    queries: list[Tensor],
    passages: list[Tensor],
    masked: list[dict[int, float]],
    dims,
    temperature: float,
    targets: list[int] | None = None,
    further: list[list[tuple[Tensor, Tensor, float]]] | None = None,
) -> Tensor:
    """Mean over samples, sum over dims, of CE(positive among all passages), of which `masked` says
    how much of each the sample leaves out; `targets` are the positives' places, by default 0, 1, …;
    `further` are other two vectors that each sample compares, and how much of them it leaves out.
    """
    targets = targets or list(range(len(queries)))
    total = torch.zeros(())
    for dim, weight in dims:
        for i, query in enumerate(queries):
            logits = [cosine(query, passage, dim) / temperature for passage in passages]
            out = dict(masked[i])
            for left, right, share in further[i] if further else []:
                out[len(logits)] = share
                logits.append(cosine(left, right, dim) / temperature)
            total = total + weight * cross_entropy(logits, targets[i], out) / len(queries)
    return total


def cosent_loss(
    queries: list[Tensor], passages: list[Tensor], scores: list[float], dims, temperature: float
) -> Tensor:
    """Sum over dims of log(1 + the sum over all two pairs, the first of a lower score, of
    exp((its cosine - the other's) / temperature)): sentence-transformers' CoSENTLoss."""
    total = torch.zeros(())
    for dim, weight in dims:
        cosines = [cosine(q, p, dim) for q, p in zip(queries, passages, strict=True)]
        terms = [
            (cosines[i] - cosines[j]) / temperature
            for i, low in enumerate(scores)
            for j, high in enumerate(scores)
            if low < high
        ]
        total = total + weight * torch.logsumexp(torch.stack([torch.zeros(()), *terms]), dim=0)
    return total


def naive_spearman(left: list[float], right: list[float]) -> float:
    """Pearson's correlation of ranks, each counted; equal values get the mean of their places."""

    def ranks(values: list[float]) -> list[float]:
        return [
            sum(other < own for other in values) + (sum(other == own for other in values) + 1) / 2
            for own in values
        ]

    a, b = ranks(left), ranks(right)
    mean = (len(a) + 1) / 2
    products = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return products / math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))


def right_documents(data: list[tuple], query_ids: list[str | None] | None = None) -> list[set[int]]:
    """For each row, the passages of all rows with its query: the same id, or else the same text."""
    names = [
        ("id", query_ids[row]) if query_ids and query_ids[row] is not None else ("text", *query)
        for row, (query, _, _) in enumerate(data)
    ]
    return [
        {data[other][1] for other in range(len(data)) if names[other] == name} for name in names
    ]


def masked_by_margin(
    query: Tensor,
    positive: Tensor,
    others: list[Tensor],
    margin: float | None,
    temperature: float,
    rounding: float = 1e-6,
    left: Tensor | None = None,
) -> dict[int, float]:
    """How much of the others is masked because it is nearer to the query than the positive.

    Or nearer to `left`, than the query to the positive. Nothing up to the margin; all of it from a
    quarter of the margin (at least 0.005) above it on.
    """
    if margin is None:
        return {}
    query = query.detach()
    limit = float(cosine(query, positive.detach(), len(query))) + margin + rounding
    masked = {}
    left = query if left is None else left.detach()
    for number, other in enumerate(others):
        place = (float(cosine(left, other.detach(), len(query))) - limit) / max(margin / 4, 0.005)
        if place >= 1:
            masked[number] = 1.0
        elif place > 0:
            steepness = 1 + margin / temperature
            masked[number] = 1 - math.exp(-steepness * place / (1 - place))
    return masked


def cut(ids: Sequence[int], max_length: int, eos_id: int) -> list[int]:
    ids = list(ids)
    return ids if len(ids) <= max_length else [*ids[: max_length - 1], eos_id]


def objective(
    model: Qwen3Model,
    samples: list[tuple[Sequence[int], int, list[int]]],
    documents: list[Sequence[int]],
    *,
    task: str,
    exits: Sequence[int],
    use_mrl: bool,
    temperature: float,
    max_length: int,
    eos_id: int,
    mask: bool = True,
    right: list[set[int]] | None = None,
    scores: list[float] | None = None,
    margin: float | None = None,
    counts: dict[str, float] | None = None,
    exit_weights: Sequence[float] | None = None,
    from_itself: float = 0.0,
    all_negatives: bool = False,
    all_pairs: bool = False,
) -> Tensor:
    """The whole loss of a global batch: mean over exits of (hard + in-batch) or similarity, plus
    `from_itself` times the self-distillation.

    `samples`: (query ids, passage document, negative documents) each; `documents`: ids of every
    document; `right`: the right answers of each sample, by default those that the samples say;
    `all_negatives`: the in-batch loss looks at every document of the batch, once; `all_pairs`: it
    compares queries with queries and passages with both, too; `counts` takes
    how many logits were left out by document and by margin.
    """
    dims = dims_and_weights(model.config.hidden_size, use_mrl)

    def encode(ids):
        return exit_vectors(model, cut(ids, max_length, eos_id), exits)

    queries = [encode(query) for query, _, _ in samples]
    passages = [encode(documents[passage]) for _, passage, _ in samples]
    negatives = [[encode(documents[n]) for n in own] for _, _, own in samples]
    pool = [(document, passages[j]) for j, (_, document, _) in enumerate(samples)]
    targets = list(range(len(samples)))
    if all_negatives:
        pool += [
            (document, vectors)
            for (_, _, own), theirs in zip(samples, negatives, strict=True)
            for document, vectors in zip(own, theirs, strict=True)
        ]
        pool = list(dict(pool).items())
        targets = [[document for document, _ in pool].index(own) for _, own, _ in samples]
    deepest = max(exits)
    negatives_out, passages_out, by_document, by_margin = [], [], 0, 0.0
    right = right_documents(samples) if right is None else right
    for i, (_, _, own) in enumerate(samples):
        query, positive = queries[i][deepest], passages[i][deepest]
        same = {place for place, n in enumerate(own) if mask and n in right[i]}
        near = masked_by_margin(
            query, positive, [v[deepest] for v in negatives[i]], margin, temperature
        )
        parts = [(same, near, negatives_out)]
        if task == "retrieval":
            others = {
                j for j, (other, _) in enumerate(pool) if j != targets[i] and other in right[i]
            }
            near = masked_by_margin(
                query, positive, [v[deepest] for _, v in pool], margin, temperature
            )
            parts.append((others if mask else set(), near, passages_out))
        for same, near, out in parts:
            out.append(near | dict.fromkeys(same, 1.0))
            by_document += len(same)
            by_margin += sum(share for place, share in near.items() if place not in same)
    further: list[list] = [[] for _ in samples]  # (left, right, share that is left out)
    for i, (_, passage, _) in enumerate(samples if all_pairs else []):
        related = {
            j
            for j, (_, other, _) in enumerate(samples)
            if j == i or (mask and (other in right[i] or passage in right[j]))
        }
        others = [v for j, v in enumerate(queries) if j not in related]
        pairs = [(queries[i], v) for v in others] + [(passages[i], v) for v in others]
        places = range(len(samples)) if not all_negatives else range(len(pool))
        for place in places:
            rows = [place]
            if all_negatives:
                rows = [j for j, (_, other, _) in enumerate(samples) if other == pool[place][0]]
            if rows and not related & set(rows):
                pairs.append((passages[i], pool[place][1]))
        for left, other in pairs:
            near = masked_by_margin(
                queries[i][deepest],
                passages[i][deepest],
                [other[deepest]],
                margin,
                temperature,
                left=left[deepest],
            )
            further[i].append((left, other, near.get(0, 0.0)))
    if counts is not None:
        counts |= {"masked_by_document": by_document, "masked_by_margin": by_margin}
    total = torch.zeros(())
    exit_weights = exit_weights or [1.0] * len(exits)
    for layer, weight in zip(exits, exit_weights, strict=True):
        q, p = [v[layer] for v in queries], [v[layer] for v in passages]
        if task == "similarity":
            total = total + weight * cosent_loss(q, p, scores, dims, temperature)
            continue
        n = [[v[layer] for v in own] for own in negatives]
        if any(own for _, _, own in samples):
            total = total + weight * hard_loss(q, p, n, dims, temperature, negatives_out)
        if task == "retrieval":
            others = [v[layer] for _, v in pool]
            pairs = [[(a[layer], b[layer], share) for a, b, share in own] for own in further]
            total = total + weight * in_batch_loss(
                q, others, passages_out, dims, temperature, targets, pairs
            )
        for i, (_, own_passage, own_negatives) in enumerate(samples if from_itself else []):
            choices = {own_passage: (passages[i], 1.0)}  # document -> vectors, share that counts
            for place, document in enumerate(own_negatives):
                share = 1 - negatives_out[i].get(place, 0.0)
                choices.setdefault(document, (negatives[i][place], share))
            for j, (document, vectors) in enumerate(pool if task == "retrieval" else []):
                share = 1 - passages_out[i].get(j, 0.0)
                choices.setdefault(document, (vectors, share))
            best = choice(queries[i], choices.values(), deepest, dims[0][0], temperature)
            best = [value.detach() for value in best]
            for dim, dim_weight in dims:
                own = choice(queries[i], choices.values(), layer, dim, temperature)
                divergence = sum(
                    p * (p / q).log() for p, q in zip(best, own, strict=True) if p > 1e-30
                )
                total = total + from_itself * weight * dim_weight * divergence / len(samples)
    return total / sum(exit_weights)


def choice(query, documents, layer: int, dim: int, temperature: float) -> list[Tensor]:
    """The probability of each document: in proportion to its share times exp(cosine / tau)."""
    terms = [
        share * (cosine(query[layer], vectors[layer], dim) / temperature).exp()
        for vectors, share in documents
    ]
    return [term / sum(terms) for term in terms]


def distillation(
    student: Qwen3Model,
    teacher: Qwen3Model,
    samples: list[tuple[Sequence[int], int, list[int]]],
    documents: list[Sequence[int]],
    *,
    exits: Sequence[int],
    teacher_exits: Sequence[int],
    max_length: int,
    eos_id: int,
) -> Tensor:
    """Mean over the exits paired from the deepest of: mean squared error of all queries + of all
    passages + of all negatives, each to the leading components of the teacher's vector, nothing
    normalised."""
    pairs = list(
        zip(sorted(exits, reverse=True), sorted(teacher_exits, reverse=True), strict=False)
    )

    def error(ids: Sequence[int]) -> Tensor:
        ids = cut(ids, max_length, eos_id)
        vectors = exit_vectors(student, ids, exits)
        with torch.no_grad():
            wanted = exit_vectors(teacher, ids, teacher_exits)
        return sum(
            ((vectors[a] - wanted[b][: len(vectors[a])]) ** 2).mean() for a, b in pairs
        ) / len(pairs)

    queries = [error(query) for query, _, _ in samples]
    passages = [error(documents[passage]) for _, passage, _ in samples]
    negatives = [error(documents[negative]) for _, _, own in samples for negative in own]
    return sum(torch.stack(errors).mean() for errors in (queries, passages, negatives) if errors)


def similarity(
    student: Qwen3Model,
    teacher: Qwen3Model,
    samples: list[tuple[Sequence[int], int, list[int]]],
    documents: list[Sequence[int]],
    *,
    exits: Sequence[int],
    teacher_exit: int,
    use_mrl: bool,
    max_length: int,
    eos_id: int,
) -> Tensor:
    """Mean over exits and samples of: mean over the sample's candidates, plus mean over all
    positives, of the squared difference between the student's cosine (at each dim, weighted) and
    the teacher's."""
    dims = dims_and_weights(student.config.hidden_size, use_mrl)
    all_weights = sum(weight for _, weight in dims)

    def encode(ids: Sequence[int]) -> tuple[dict[int, Tensor], Tensor]:
        ids = cut(ids, max_length, eos_id)
        with torch.no_grad():
            wanted = exit_vectors(teacher, ids, [teacher_exit])[teacher_exit]
        return exit_vectors(student, ids, exits), wanted

    queries = [encode(query) for query, _, _ in samples]
    passages = [encode(documents[passage]) for _, passage, _ in samples]
    negatives = [[encode(documents[negative]) for negative in own] for _, _, own in samples]

    def error(query, others, layer: int) -> Tensor:
        errors = []
        for own, taught in others:
            wanted = cosine(query[1], taught, len(taught))
            for dim, weight in dims:
                errors.append(
                    weight / all_weights * (cosine(query[0][layer], own[layer], dim) - wanted) ** 2
                )
        return torch.stack(errors).sum() / len(others)

    total = torch.zeros(())
    for layer in exits:
        for query, passage, own in zip(queries, passages, negatives, strict=True):
            total = total + error(query, [passage, *own], layer) + error(query, passages, layer)
    return total / len(samples) / len(exits)


def by_scores(
    model: Qwen3Model,
    samples: list[tuple[Sequence[int], int, list[int]]],
    scores: list[list[float]],
    documents: list[Sequence[int]],
    *,
    kind: str,
    exits: Sequence[int],
    use_mrl: bool,
    temperature: float,
    max_length: int,
    eos_id: int,
) -> Tensor:
    """Mean over exits, sum over dims. "kl": the mean over samples of the KL divergence of the
    softmax of cosines / temperature from the softmax of a teacher's scores. "margin_mse": the mean
    over all negatives of the squared difference of margins, dims' weights divided by their sum.

    `scores`: of each sample's passage, then of its negatives.
    """
    dims = dims_and_weights(model.config.hidden_size, use_mrl)

    def encode(ids: Sequence[int]) -> dict[int, Tensor]:
        return exit_vectors(model, cut(ids, max_length, eos_id), exits)

    total = torch.zeros(())
    count = sum(len(own) for _, _, own in samples)
    for (query, passage, negatives), taught in zip(samples, scores, strict=True):
        asked = encode(query)
        candidates = [encode(documents[number]) for number in (passage, *negatives)]
        wanted = torch.tensor(taught)
        for layer in exits:
            for dim, weight in dims:
                logits = torch.stack(
                    [cosine(asked[layer], c[layer], dim) / temperature for c in candidates]
                )
                if kind == "kl":
                    p, q = wanted.exp() / wanted.exp().sum(), logits.exp() / logits.exp().sum()
                    total = total + weight * (p * (p / q).log()).sum() / len(samples)
                for own, other in zip(logits[1:], wanted[1:], strict=True):
                    if kind == "margin_mse":
                        error = (logits[0] - own - (wanted[0] - other)) ** 2 / count
                        total = total + weight / sum(w for _, w in dims) * error
    return total / len(exits)


def draws_of_languages(
    rows: Mapping[str, int], total: float, alpha: float, cap: float
) -> dict[str, float]:
    """Samples per epoch in proportion to rows^alpha, but at most cap x rows: the common factor is
    found by halving intervals."""

    def with_factor(factor: float) -> dict[str, float]:
        return {code: min(factor * n**alpha, cap * n) for code, n in rows.items()}

    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        if sum(with_factor(middle).values()) < total:
            low = middle
        else:
            high = middle
    return with_factor(low)


def deal(samples: Mapping[str, int], batches: int) -> list[dict[str, list[int]]]:
    """An epoch's samples of each language, one after another, dealt to batches like cards.

    Returns:
        per batch: language -> which of the language's samples it trains on, when the batches take
        them in their order.
    """
    cards = [code for code, count in samples.items() for _ in range(count)]
    hands = [cards[first::batches] for first in range(batches)]
    taken = dict.fromkeys(samples, 0)
    dealt = []
    for hand in hands:
        own: dict[str, list[int]] = {}
        for code in hand:
            own.setdefault(code, []).append(taken[code])
            taken[code] += 1
        dealt.append(own)
    return dealt


def average_of_steps(weights: Sequence[Tensor], decay: float) -> Tensor:
    """The mean of one parameter's values after each step, the last one first in weight."""
    shares = [decay ** (len(weights) - step) for step in range(1, len(weights) + 1)]
    total = sum(share * weight.double() for share, weight in zip(shares, weights, strict=True))
    return (total / sum(shares)).float()


def naive_metrics(scores: list[list[float]], positive: list[int]) -> dict[str, float]:
    """Sort each row; no ties."""
    reciprocal = gain = first = 0.0
    for row, right in zip(scores, positive, strict=True):
        order = sorted(range(len(row)), key=lambda column: -row[column])
        rank = order.index(right) + 1
        first += rank == 1
        if rank <= 10:
            reciprocal += 1 / rank
            gain += 1 / math.log2(rank + 1)
    count = len(scores)
    return {"recall@1": first / count, "mrr@10": reciprocal / count, "ndcg@10": gain / count}
