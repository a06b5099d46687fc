"""Forward and backward of one batch, whole or in chunks of a token budget (GradCache, arXiv
2101.06983).

In chunks, vectors are first computed without a graph; the loss gives the gradient of each vector;
then each chunk is encoded again with a graph and that gradient is sent through it. The gradients
are the same, the memory is a chunk's.
"""

import contextlib
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ml_embed.data.batch import slice_texts, token_chunks
from ml_embed.data.packing import PackedBatch
from ml_embed.distributed import zero2
from ml_embed.distributed.collectives import all_reduce_max
from ml_embed.losses.objective import LossTerms

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def forward_backward(
    model: nn.Module,
    accelerator: Accelerator,
    texts: PackedBatch,
    rank: int | None,
    objective: Callable[[Tensor], LossTerms],
    max_tokens: int,
) -> LossTerms:
    """Add the objective's gradients to the model's parameters. A collective.

    Args:
        model: prepared encoder.
        texts: N texts, shortest first.
        rank: MEL's rank of this step, the same in all chunks.
        objective: vectors (E, N, H) -> loss terms; may communicate.
        max_tokens: budget of a chunk; 0 = the whole batch at once.
    Returns:
        the loss terms of this process.
    """
    own = split_texts(texts, max_tokens)
    # All processes go one way, whole or in chunks: DDP's second synchronising forward communicates,
    # and must stand on the same side of the objective's own communication everywhere.
    rounds = all_reduce_max(len(own), accelerator.device) if max_tokens else 1
    if rounds == 1:
        vectors = model(texts.input_ids, texts.packed, rank)
        terms = objective(vectors)
        _backward(model, accelerator, _reaching(terms.total, vectors), last=True)
        return terms

    pieces = own + _fillers(texts, rounds - len(own), accelerator)
    vectors = _encode(model, pieces, rank)[
        :, : len(texts.packed.lengths)
    ].requires_grad_()  # (E, N, H)
    terms = objective(vectors)
    _reaching(
        terms.total, vectors
    ).backward()  # up to the vectors only: a plain backward, no engine is involved
    assert vectors.grad is not None
    gradients = list(vectors.grad.split([len(piece.packed.lengths) for piece in own], dim=1))
    gradients += [torch.zeros_like(gradients[0][:, :1])] * (len(pieces) - len(own))
    for number, (piece, gradient) in enumerate(zip(pieces, gradients, strict=True), start=1):
        last = number == len(pieces)
        with (
            contextlib.nullcontext()
            if last or zero2.is_engine(model)
            else accelerator.no_sync(model)
        ):
            again = model(piece.input_ids, piece.packed, rank)
            _backward(
                model, accelerator, (again * gradient).sum(), last
            )  # its gradient at `again` is `gradient`
    return terms


def encode_in_chunks(
    model: nn.Module,
    accelerator: Accelerator,
    texts: PackedBatch,
    rank: int | None,
    max_tokens: int,
) -> Tensor:
    """(E, N, H) vectors without gradients, with `forward_backward`'s arguments. A collective."""
    own = split_texts(texts, max_tokens)
    rounds = all_reduce_max(len(own), accelerator.device) if max_tokens else 1
    pieces = own + _fillers(texts, rounds - len(own), accelerator)
    return _encode(model, pieces, rank)[:, : len(texts.packed.lengths)]


def split_texts(texts: PackedBatch, max_tokens: int) -> list[PackedBatch]:
    """The texts in order, in chunks of at most `max_tokens` tokens (or one text that has more); 0 =
    all in one."""
    if not max_tokens:
        return [texts]
    return [slice_texts(texts, *chunk) for chunk in token_chunks(texts.packed, max_tokens)]


def _fillers(texts: PackedBatch, count: int, accelerator: Accelerator) -> list[PackedBatch]:
    """What to encode beside the own chunks, for nothing: sharded engines communicate in each
    forward or backward, so that all processes must make as many as the one with most chunks."""
    return [slice_texts(texts, 0, 1)] * count if accelerator.distributed_type in SHARDED else []


@torch.no_grad()
def _encode(model: nn.Module, pieces: list[PackedBatch], rank: int | None) -> Tensor:
    """(E, n, H) vectors of the texts of all pieces."""
    return torch.cat([model(piece.input_ids, piece.packed, rank) for piece in pieces], dim=1)


def _backward(model: nn.Module, accelerator: Accelerator, loss: Tensor, last: bool) -> None:
    if zero2.is_engine(model):
        zero2.backward(model, loss, last)
    else:
        accelerator.backward(loss)


def _reaching(total: Tensor, vectors: Tensor) -> Tensor:
    """`total` with a path back to `vectors`, of gradient 0 where nothing was to be learned.

    A share without any negatives has no loss, but its process must take part in the engine's
    averaging all the same.
    """
    return total if total.requires_grad else total + 0 * vectors.sum()
