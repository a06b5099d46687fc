"""The key `ema_decay`: a running average of the weights, which is what is validated and saved.

The average after step t is sum_k d^(t - k) w_k / sum_k d^(t - k) over the steps k = 1 .. t, with
the decay d: the start model does not count. It lies beside the optimizer's moments, so engines
share it out, and states save and continue it, as they do these.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ml_embed.distributed.engine import AVERAGE


class WeightAverage:
    """Keeps the average of an optimizer's weights up to date, after each of its steps."""

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float):
        self._optimizer, self._decay = optimizer, decay
        self.steps = 0
        """that the average is of"""
        optimizer.register_step_post_hook(self._add)

    @torch.no_grad()
    def _add(self, *_: Any) -> None:
        self.steps += 1
        share = (1 - self._decay) / (1 - self._decay**self.steps)
        for weight in self._weights():
            state = self._optimizer.state[weight]
            if AVERAGE in state:
                state[AVERAGE].lerp_(weight, share)
            else:
                state[AVERAGE] = weight.detach().clone()

    def _weights(self) -> Iterator[Tensor]:
        """Those that have moved: others have no state."""
        state = self._optimizer.state
        for group in self._optimizer.param_groups:
            yield from (weight for weight in group["params"] if weight in state)

    @contextlib.contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Within it the model has the average, and the average's place holds the weights.

        Args:
            model: prepared, with the optimizer's weights; it makes no backward pass meanwhile.
        """
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for weight in self._weights():
            average = self._optimizer.state[weight][AVERAGE]
            held = weight.detach().clone()
            weight.copy_(average)
            average.copy_(held)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # or what was gathered before would go on being used
