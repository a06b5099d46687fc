"""The key `ema_decay`: a running average of the weights, which is what is validated and saved.

The average after step t is sum_k d^(t - k) w_k / sum_k d^(t - k) over the steps k = 1 .. t, with
the decay d: the start model does not count. It lies beside the optimizer's moments, so engines
share it out, and states save and continue it, as they do these.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ml_embed.distributed.engine import AVERAGE, Engine


class WeightAverage:
    """The average of an optimizer's weights."""

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float):
        """`optimizer`: it has not been given to an engine yet."""
        self._optimizer, self._decay = optimizer, decay
        # where it makes its moments, in a first step or to load a state
        optimizer.register_step_post_hook(self._make_place)

    @torch.no_grad()
    def _make_place(self, *_: Any) -> None:
        for weight in self._weights():
            state = self._optimizer.state[weight]
            if AVERAGE not in state:
                state[AVERAGE] = torch.zeros_like(weight)

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1."""
        share = (1 - self._decay) / (1 - self._decay**step)
        for weight in self._weights():
            self._optimizer.state[weight][AVERAGE].lerp_(weight, share)

    def _weights(self) -> Iterator[Tensor]:
        """Those that have moved: others have no state."""
        state = self._optimizer.state
        for group in self._optimizer.param_groups:
            yield from (weight for weight in group["params"] if weight in state)

    @contextlib.contextmanager
    def in_place(self, engine: Engine) -> Iterator[None]:
        """Within it the model has the average, and the average's place holds the weights.

        Args:
            engine: has the optimizer; its model makes no backward pass meanwhile.
        """
        self._exchange(engine)
        try:
            yield
        finally:
            self._exchange(engine)

    @torch.no_grad()
    def _exchange(self, engine: Engine) -> None:
        for weight in self._weights():
            average = self._optimizer.state[weight][AVERAGE]
            held = weight.detach().clone()
            weight.copy_(average)
            average.copy_(held)
        engine.weights_written()
