"""The key `log_exit_gradients`: whether exits pull one way, and whether their vectors collapse.

Letters: E exits, N texts of this process, n rows of the global batch, H hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ml_embed.data.batch import ContrastiveBatch
from ml_embed.distributed.collectives import all_reduce_sum, gather_rows, world_size

SMALLEST = 1e-30  # of a product of norms: exits that ask nothing have the cosine 0


@torch.no_grad()
def exit_statistics(
    vectors: Tensor,
    gradients: Tensor,
    batch: ContrastiveBatch,
    exits: Sequence[int],
    dims: Sequence[int],
) -> dict[str, float]:
    """Numbers of one batch for metrics.jsonl, the same on every process. A collective.

    A gradient is that of the whole loss with respect to one linear map, here the identity, that all
    exits would share behind their vectors: the sum over texts of g v^T, of the gradient g at an
    exit's vector v. It is what an exit asks of weights that it shares with others, and a negative
    cosine is a conflict. Texts that several processes encode change nothing in it.

    Args:
        vectors, gradients: (E, N, H) of this process's texts; its loss is a share, of which the
            mean over processes is the loss.
        batch: which of the texts are queries.
        exits: E layers.
        dims: vector lengths.
    Returns:
        for each exit "gradient_norm_depth_L" and "gradient_cosine_depth_L", with the deepest
        exit's; and of the queries of the global batch, for each exit and dim,
        "mean_cosine_depth_L_dim_D" over all two (if there are two) and
        "effective_rank_depth_L_dim_D": exp of the entropy of their singular values' shares
        (Roy and Vetterli 2007), from 1 for one direction to the dim. Empty if a query's vector is
        not finite.
    """
    own = vectors[:, batch.query].transpose(0, 1).contiguous()
    queries = gather_rows(own).index_select(0, batch.gathered_rows).transpose(0, 1)  # (E, n, H)
    if not queries.isfinite().all():  # alike on all processes, which the step itself then stops
        return {}
    asked = [_asked_of_shared(*pair) for pair in zip(gradients, vectors, strict=True)]
    values: dict[str, float] = {}
    for number, exit in enumerate(exits):
        own_norm, norm = asked[number].norm(), asked[-1].norm()
        cosine = (asked[number] * asked[-1]).sum() / (own_norm * norm).clamp_min(SMALLEST)
        values[f"gradient_norm_depth_{exit}"] = float(own_norm)
        values[f"gradient_cosine_depth_{exit}"] = float(cosine)
        for dim in dims:
            cut, name = queries[number, :, :dim].double(), f"depth_{exit}_dim_{dim}"
            if len(cut) > 1:
                values[f"mean_cosine_{name}"] = _mean_cosine(cut)
            values[f"effective_rank_{name}"] = _effective_rank(cut)
    return values


def _asked_of_shared(gradients: Tensor, vectors: Tensor) -> Tensor:
    """(H, H), summed over the texts (N, H) of all processes."""
    return all_reduce_sum(gradients.T @ vectors / world_size())


def _mean_cosine(vectors: Tensor) -> float:
    """Over all two of (n, d): the square of their sum holds each two twice, and n squares."""
    count = len(vectors)
    total = normalize(vectors, dim=1).sum(0).square().sum()
    return float(total - count) / (count * (count - 1))


def _effective_rank(vectors: Tensor) -> float:
    values = torch.linalg.svdvals(vectors)
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
