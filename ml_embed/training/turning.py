"""The key `mel_refactor`: model folders and validation have turned factors, training its own.

Training moves the factors wherever the whole rank r is best. Turned (`ml_embed.model.turn_factors`)
they give the same token table, and the best one at every smaller rank.
"""

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from ml_embed.distributed.collectives import compute_on_main_process
from ml_embed.errors import UserError
from ml_embed.model import FactorizedEmbedding, turn_factors
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
    state = run.engine.model_state()

    def turn() -> tuple[Tensor, Tensor]:
        try:
            check_finite(state)
        except NotFiniteError as error:
            last = run.last_good_checkpoint()
            raise UserError(f"{error} at a validation; {last}. Lower learning_rate") from None
        return turn_factors(state[A], state[B], share)

    factors = compute_on_main_process(turn)
    modules = run.engine.model.modules()
    (embedding,) = (module for module in modules if isinstance(module, FactorizedEmbedding))
    device = run.accelerator.device
    embedding.turned = (factors[0].to(device), factors[1].to(device))
    try:
        yield
    finally:
        embedding.turned = None
