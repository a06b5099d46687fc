"""The engine of a run: what averages gradients over processes, moves weights and gathers states.

`AccelerateEngine` serves one process, a copy of the weights per process (DDP) and sharded weights
(FSDP2, or HSDP, where each machine has a copy of all shards);
`ml_embed.distributed.zero2.Zero2Engine` serves DeepSpeed. Training knows only `Engine`.
"""

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ml_embed.errors import UserError

Moments = dict[str, dict[str, Tensor]]
"""parameter -> name of one of the optimizer's tensors -> that tensor; one that is made of several,
such as codes and scales of 8 bits, as "name.part" for each of them"""

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's tensors of a parameter's shape, the means of its gradients and of their squares; beside
them it counts steps"""
AVERAGE = "average"
"""a running average of a parameter, where the optimizer keeps one beside its moments"""
LR_SCALE = "lr_scale"
"""key of an optimizer's parameter group: the factor on its learning rate; 1 if it is not there"""

# The same calls serve one process, copies and shards: tensors come whole, on the CPU, on the first
# process.
_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SCATTER = StateDictOptions(full_state_dict=True, strict=False)  # frozen weights stay as they are


class Engine(ABC):
    """A model and its optimizer, prepared for all processes of a run.

    The methods are collectives: every process must call them.
    """

    model: nn.Module
    """the prepared encoder; a forward pass is a call of it"""
    optimizer: torch.optim.Optimizer
    needs_equal_chunks: bool
    """whether every forward or backward pass communicates, so that all processes must make equally
    many"""

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Surrounds the forward and backward pass of each of several chunks, `last` at the last.

        Only the last chunk's backward pass needs to average gradients over processes.
        """
        return contextlib.nullcontext()

    @abstractmethod
    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradients of `loss`; after the `last` of a step they are averaged."""

    @abstractmethod
    def clip_gradients(self) -> Tensor:
        """Scale the gradients down to the largest norm allowed; returns the norm before, a scalar.

        The norm is not finite if a gradient is not. DeepSpeed scales them later, in `step`.
        """

    def step(self, learning_rate: float) -> None:
        """Move the weights, those of a group with `LR_SCALE` by so much more."""
        for group in self.optimizer.param_groups:
            rate = learning_rate * group.get(LR_SCALE, 1.0)
            if isinstance(group["lr"], Tensor):  # as torchao's optimizers want it
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._move_weights()

    @abstractmethod
    def _move_weights(self) -> None: ...

    @abstractmethod
    def weights_written(self) -> None:
        """After others wrote into the optimizer's weights: the model's are these from now on."""

    @abstractmethod
    def trained_parameters(self) -> set[str]:
        """Names of the parameters that are not frozen."""

    @abstractmethod
    def model_state(self) -> dict[str, Tensor]:
        """The whole model's weights by name, on the CPU of the first process.

        What other processes get depends on the engine, and may be nothing.
        """

    @abstractmethod
    def optimizer_state(self) -> Moments:
        """The optimizer's whole tensors, on the CPU of the first process, like `model_state`."""

    @abstractmethod
    def whole_parameter(self, name: str) -> dict[str, Tensor]:
        """A trained parameter, under WEIGHT, its MOMENTS, and its AVERAGE if there is one.

        Whole, on every process's device.
        """

    @abstractmethod
    def replace_parameter(self, name: str, whole: Mapping[str, Tensor]) -> None:
        """Take over what `whole_parameter` gives, the same on every process."""

    @abstractmethod
    def load_state(self, weights: Mapping[str, Tensor], moments: Moments) -> None:
        """Take over whole weights and moments, the same on every process; frozen weights stay."""


class AccelerateEngine(Engine):
    """One process, DDP, FSDP2 or HSDP, prepared by accelerate."""

    def __init__(
        self,
        accelerator: Accelerator,
        encoder: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_norm: float = 0.0,
    ):
        """`max_norm`: the largest norm of all gradients together, for `clip_gradients`; 0 = any."""
        self._accelerator = accelerator
        self._max_norm = max_norm or float("inf")
        self.needs_equal_chunks = accelerator.distributed_type is DistributedType.FSDP
        with warnings.catch_warnings():
            # accelerate has no other name yet for the option that torch renames
            warnings.filterwarnings(
                "ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning
            )
            self.model, self.optimizer = accelerator.prepare(encoder, optimizer)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if not self.needs_equal_chunks:
            return contextlib.nullcontext() if last else self._accelerator.no_sync(self.model)
        # Shared weights: each chunk's gradients are shared out at once, because their sum may not
        # fit whole. Only what copies of a share (HSDP) have is added up at the last chunk.
        cast("FSDPModule", self.model).set_requires_all_reduce(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool = True) -> None:
        self._accelerator.backward(loss)

    def clip_gradients(self) -> Tensor:
        norm = self._accelerator.clip_grad_norm_(self.model.parameters(), self._max_norm)
        return _whole(norm)  # sharded gradients have a sharded norm

    def _move_weights(self) -> None:
        self.optimizer.step()

    def weights_written(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # or what was gathered before would go on being used

    def trained_parameters(self) -> set[str]:
        options = StateDictOptions(ignore_frozen_params=True)
        return set(get_model_state_dict(self.model, options=options))

    def model_state(self) -> dict[str, Tensor]:
        state = get_model_state_dict(self.model, options=_GATHER)
        return cast("dict[str, Tensor]", state)  # torch names it more broadly

    def optimizer_state(self) -> Moments:
        gathered = get_optimizer_state_dict(self.model, self.optimizer, options=_GATHER)
        whole = cast("Moments", gathered.get("state", {}))
        return {name: _plain(tensors) for name, tensors in whole.items()}

    def whole_parameter(self, name: str) -> dict[str, Tensor]:
        return {key: _whole(tensor).clone() for key, tensor in self._tensors_of(name).items()}

    def replace_parameter(self, name: str, whole: Mapping[str, Tensor]) -> None:
        for key, tensor in self._tensors_of(name).items():
            new = whole[key].to(tensor.dtype)
            if isinstance(tensor, DTensor):
                new = distribute_tensor(new, tensor.device_mesh, tensor.placements)
            tensor.copy_(new)

    def _tensors_of(self, name: str) -> dict[str, Tensor]:
        parameter = self._accelerator.unwrap_model(self.model).get_parameter(name)
        optimizer: Any = self.optimizer  # accelerate's wrapper of the real one
        state = optimizer.optimizer.state[parameter]
        held = {key: state[key] for key in (*MOMENTS, AVERAGE) if key in state}
        return {WEIGHT: parameter.detach()} | held

    def load_state(self, weights: Mapping[str, Tensor], moments: Moments) -> None:
        optimizer: Any = self.optimizer  # accelerate's wrapper of the real one
        set_model_state_dict(self.model, {**weights}, options=_SCATTER)
        own: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer.optimizer)
        held = {name: _as_held(saved, own["state"][name]) for name, saved in moments.items()}
        # learning rate and betas are the config's
        state: dict[str, Any] = {"state": held, "param_groups": own["param_groups"]}
        set_optimizer_state_dict(self.model, optimizer.optimizer, state, options=_SCATTER)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _plain(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """An optimizer's whole tensors of one parameter, those made of several taken apart."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _is_made_of_several(tensor):
            parts, _ = tensor.__tensor_flatten__()
            plain |= {f"{name}.{part}": getattr(tensor, part) for part in parts}
        else:
            plain[name] = tensor
    return plain


def _as_held(saved: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """What `_plain` took apart, as an optimizer that has `own` tensors holds it.

    Raises:
        UserError: it is of another kind of optimizer.
    """
    held, left = {}, dict(saved)
    try:
        for name, tensor in own.items():
            if _is_made_of_several(tensor):
                parts, context = tensor.__tensor_flatten__()
                inner = {part: left.pop(f"{name}.{part}") for part in parts}
                held[name] = type(tensor).__tensor_unflatten__(
                    inner, context, tensor.size(), tensor.stride()
                )
            else:
                held[name] = left.pop(name)
    except KeyError as missing:
        raise other_optimizer(missing.args[0]) from None
    if left:
        raise other_optimizer(min(left))
    return held


def _is_made_of_several(tensor: Any) -> bool:
    return hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, DTensor)


def other_optimizer(name: str) -> UserError:
    return UserError(
        f"--resume: the state's moments are of another optimizer (they differ in {name}); restore "
        "the keys optimizer and ema_decay, or start another run under another experiment_id"
    )
