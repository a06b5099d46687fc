"""Forward and backward of one batch, whole or in chunks of tokens (GradCache, arXiv 2101.06983).

In chunks, vectors are first computed without a graph; the loss gives the gradient of each vector;
then each chunk is encoded again with a graph and that gradient is sent through it. The gradients
are the same, and memory holds the graph of one chunk at a time.

Letters: E exits, N texts of a batch, H hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ml_embed.data.batch import slice_texts, token_chunks
from ml_embed.data.packing import PackedBatch
from ml_embed.distributed.collectives import all_reduce_max
from ml_embed.distributed.engine import Engine
from ml_embed.losses.objective import LossTerms

LossOfVectors = Callable[[Tensor], LossTerms]
"""(E, N, H) vectors of a batch's texts -> its loss terms; may communicate"""


def forward_backward(
    engine: Engine,
    texts: PackedBatch,
    rank: int | None,
    objective: LossOfVectors,
    max_tokens: int,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> LossTerms:
    """Add the objective's gradients to the model's parameters. A collective.

    Args:
        texts: N texts, shortest first.
        rank: MEL's rank of this step, the same in all chunks.
        objective: the loss of the vectors.
        max_tokens: budget of a chunk; 0 = the whole batch at once.
        watch: is shown the vectors and the gradients at them, both (E, N, H).
    Returns:
        the loss terms of this process.
    """
    own = split_texts(texts, max_tokens)
    # All processes go one way, whole or in chunks: DDP's second synchronising forward communicates,
    # and must stand on the same side of the objective's own communication everywhere.
    rounds = _most_chunks(own, max_tokens)
    if rounds == 1:
        vectors = engine.model(texts.input_ids, texts.packed, rank)
        if watch is not None:
            vectors.retain_grad()
        terms = objective(vectors)
        engine.backward(_with_path_to(vectors, terms.total))
        if watch is not None:
            assert vectors.grad is not None
            watch(vectors.detach(), vectors.grad)
        return terms
    chunks = own + _padding_chunks(engine, texts, rounds - len(own))
    vectors = _encode(engine, chunks, rank)[:, : len(texts.packed.lengths)].requires_grad_()
    terms = objective(vectors)
    # a plain backward, up to the vectors only: no parameter is involved
    _with_path_to(vectors, terms.total).backward()
    assert vectors.grad is not None
    gradients = list(vectors.grad.split([len(chunk.packed.lengths) for chunk in own], dim=1))
    gradients += [torch.zeros_like(gradients[0][:, :1])] * (len(chunks) - len(own))
    _backward_in_chunks(engine, chunks, rank, gradients)
    if watch is not None:
        watch(vectors.detach(), vectors.grad)
    return terms


def _backward_in_chunks(
    engine: Engine, chunks: list[PackedBatch], rank: int | None, gradients: list[Tensor]
) -> None:
    """Encode each chunk again and send the gradients (E, n, H) of its n vectors through it."""
    for number, (chunk, gradient) in enumerate(zip(chunks, gradients, strict=True), start=1):
        last = number == len(chunks)
        with engine.accumulating(last):
            vectors = engine.model(chunk.input_ids, chunk.packed, rank)
            # the gradient of this sum at `vectors` is `gradient`
            engine.backward((vectors * gradient).sum(), last)


def encode_in_chunks(
    engine: Engine, texts: PackedBatch, rank: int | None, max_tokens: int
) -> Tensor:
    """(E, N, H) vectors without gradients, with `forward_backward`'s arguments. A collective."""
    own = split_texts(texts, max_tokens)
    chunks = own + _padding_chunks(engine, texts, _most_chunks(own, max_tokens) - len(own))
    return _encode(engine, chunks, rank)[:, : len(texts.packed.lengths)]


def split_texts(texts: PackedBatch, max_tokens: int) -> list[PackedBatch]:
    """The texts in order, in chunks of at most `max_tokens` tokens; 0 = one chunk.

    A text that has more tokens is a chunk of its own.
    """
    if not max_tokens:
        return [texts]
    return [slice_texts(texts, *chunk) for chunk in token_chunks(texts.packed, max_tokens)]


def _most_chunks(own: list[PackedBatch], max_tokens: int) -> int:
    """The number of chunks of the process that has most."""
    return all_reduce_max(len(own), own[0].input_ids.device) if max_tokens else 1


def _padding_chunks(engine: Engine, texts: PackedBatch, count: int) -> list[PackedBatch]:
    """`count` chunks whose vectors nobody uses, where all processes must make as many passes."""
    return [slice_texts(texts, 0, 1)] * count if engine.needs_equal_chunks else []


@torch.no_grad()
def _encode(engine: Engine, chunks: list[PackedBatch], rank: int | None) -> Tensor:
    """(E, n, H) vectors of the texts of all chunks."""
    return torch.cat([engine.model(chunk.input_ids, chunk.packed, rank) for chunk in chunks], dim=1)


def _with_path_to(vectors: Tensor, total: Tensor) -> Tensor:
    """`total`, so that its backward pass reaches `vectors` even where it does not depend on them.

    The loss of a share without any negatives is a constant, but its process must take part in the
    averaging of gradients all the same.
    """
    return total if total.requires_grad else total + 0 * vectors.sum()
