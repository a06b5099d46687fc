"""The key `mel_refactor`: turned factors in model folders and validation, or in training too.

Training moves the factors wherever the whole rank r is best. Turned (`ml_embed.model.turn_factors`)
they give the same token table, and the best one at every smaller rank.

Letters: A (V, r) and B (r, H) the factors, G (r, r) and C (r, H) what turns them: A G C = A B.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ml_embed.distributed.collectives import compute_on_main_process
from ml_embed.distributed.engine import AVERAGE, MOMENTS, WEIGHT
from ml_embed.errors import UserError
from ml_embed.model import FactorizedEmbedding, rows_times, turn_factors
from ml_embed.model_folders.turning import A, B, turned_state
from ml_embed.model_folders.write import NotFiniteError, check_finite
from ml_embed.training.run import Run


def turned(run: Run, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """An encoder's whole state as model folders get it. Raises NotFiniteError."""
    if run.token_share is None:
        return state
    check_finite(state)  # of other factors there are no turned ones
    return turned_state(state, run.token_share)


@contextlib.contextmanager
def smaller_ranks_as_saved(run: Run) -> Iterator[None]:
    """Within it the model computes smaller ranks than r as its saved folder would. A collective.

    Raises:
        UserError: a weight is not finite.
    """
    grid, share = run.resolved.valid_grid, run.token_share
    if share is None or grid is None or min(grid.ranks) == run.record.ranks[-1]:
        yield
        return
    turn, basis = _how_to_turn(run, run.engine.model_state(), share)
    modules = run.engine.model.modules()
    (embedding,) = (module for module in modules if isinstance(module, FactorizedEmbedding))
    device = run.accelerator.device
    embedding.turned = (turn.to(device), basis.to(device))
    try:
        yield
    finally:
        embedding.turned = None


def turn_trained(run: Run, step: int) -> None:
    """Turn the factors that are trained, and their moments, if that is due. A collective.

    The gradients of A G and C are those of A and B, times G^-T and G^T; so are their means. The
    means of their squares are turned as if components varied on their own. Averages of weights are
    turned like the weights. Which components of nearly equal weight come first hangs on last
    digits, and AdamW then moves each by its own: so runs on other numbers of processes part by more
    than these after a turn.

    Raises:
        UserError: a weight is not finite.
    """
    every, share = run.config.mel_refactor, run.token_share
    if not isinstance(every, int) or share is None or step % every:
        return
    a, b = (run.engine.whole_parameter(name) for name in (A, B))
    turn, basis = _how_to_turn(run, {A: a[WEIGHT], B: b[WEIGHT]}, share)
    # from one process: libraries do not promise the same last digits on all
    back = compute_on_main_process(lambda: torch.linalg.pinv(turn.double()).T)
    turn, back, basis = (matrix.to(a[WEIGHT].device) for matrix in (turn, back, basis))
    across = turn.double().T
    mean, squares = MOMENTS
    run.engine.replace_parameter(
        A,
        {
            WEIGHT: rows_times(a[WEIGHT], turn, turn.dtype),
            mean: rows_times(a[mean], back, turn.dtype),
            squares: rows_times(a[squares], back.square(), turn.dtype),
            **{key: rows_times(a[key], turn, turn.dtype) for key in a.keys() & {AVERAGE}},
        },
    )
    run.engine.replace_parameter(
        B,
        {
            WEIGHT: basis,
            mean: rows_times(across, b[mean], turn.dtype),
            squares: rows_times(across.square(), b[squares], turn.dtype),
            **{key: rows_times(back.T, b[key], turn.dtype) for key in b.keys() & {AVERAGE}},
        },
    )


def _how_to_turn(run: Run, state: Mapping[str, Tensor], share: Tensor) -> tuple[Tensor, Tensor]:
    """G and C for the factors in a state that the first process has. A collective."""

    def turn() -> tuple[Tensor, Tensor]:
        try:
            check_finite(state)
        except NotFiniteError as error:
            last = run.last_good_checkpoint()
            raise UserError(f"{error}; {last}. Lower learning_rate") from None
        turn, basis = turn_factors(state[A], state[B], share)
        return turn.cpu(), basis.cpu()

    return compute_on_main_process(turn)
