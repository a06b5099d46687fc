"""Turning a model's factors, so that their leading components are the best ones at every rank."""

from collections.abc import Mapping

from torch import Tensor

from ml_embed.model import rows_times, turn_factors

A, B = "embedding.A", "embedding.B"
"""Names of the factors in an encoder's state."""
WHOLE_TABLE = "embedding.weight"
"""Name there of a token table without factors."""


def turned_state(state: Mapping[str, Tensor], token_share: Tensor | None) -> dict[str, Tensor]:
    """An encoder's state with turned factors: the same model at its whole rank.

    Args:
        state: of an encoder with factors, whole; it is left as it is.
        token_share: (V,) of each token in the data that the model is for; None is all alike.
    """
    turn, basis = turn_factors(state[A], state[B], token_share)
    return {**state, A: rows_times(state[A], turn, state[A].dtype), B: basis}
