"""Layers that keep only their input, and are computed again in the backward pass."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_in_place(layers: Iterable[nn.Module]) -> None:
    """Let each layer keep only its (T, H) input for the backward pass, while it trains.

    Around what `compile_in_place` made of a layer, not within: torch.compile leaves a layer as it
    is that has both a checkpoint and attention, of which it makes no graph. transformers' own
    checkpoints stand within.
    """
    for layer in layers:
        setattr(layer, "forward", functools.partial(_forward, layer, layer.forward))  # noqa: B010


def _forward(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    # nothing in a layer is random
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
