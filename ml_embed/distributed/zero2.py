"""DeepSpeed ZeRO-2: each process keeps all weights, and its part of the gradients and the optimizer
state.

The engine is called directly: accelerate's own wrapper moves the weights within `backward`, where a
gradient that is
not finite could not be stopped before the update, and gradient caching would move them once a
chunk.
"""

import importlib.util
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ml_embed.errors import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = (
    "exp_avg",
    "exp_avg_sq",
)  # AdamW's, of a parameter's shape; beside them it keeps one "step" for all


def check_installed() -> None:
    """
    Raises:
        UserError: the launcher asked for DeepSpeed, and it is not there.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "DeepSpeed is not installed: pip install deepspeed, or use "
            "configs/accelerate_fsdp2.yaml"
        )


def check_settings(accelerator: Accelerator) -> None:
    """
    Raises:
        UserError: another stage than 2, offloading, or gradient accumulation.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage != 2:
        raise UserError(
            f"DeepSpeed ZeRO stage {plugin.zero_stage} is not supported; set zero_stage: 2, as in "
            "configs/accelerate_deepspeed_zero2.yaml, or shard the weights too with "
            "configs/accelerate_fsdp2.yaml"
        )
    for place in ("offload_optimizer_device", "offload_param_device"):
        if getattr(plugin, place) not in (None, "none"):
            raise UserError(
                f"DeepSpeed's {place}: {getattr(plugin, place)!r} is not supported; set it to none"
            )
    if plugin.gradient_accumulation_steps not in (1, "auto"):
        raise UserError(
            "DeepSpeed's gradient_accumulation_steps must be 1; for larger batches in the same "
            "memory set "
            "max_tokens_per_forward in the training config"
        )


def prepare(
    accelerator: Accelerator,
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    max_norm: float,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The encoder and its optimizer under ZeRO-2, with float32 weights, gradients and sums of them.

    Args:
        batch_size: rows of one process and step; DeepSpeed wants to know, and uses it for its own
            counters only.
        max_norm: what `DeepSpeedEngine.step` clips the gradient to; 0 = not at all.
    Returns:
        the DeepSpeedEngine, and its optimizer.
    """
    import deepspeed

    if accelerator.mixed_precision == "bf16":
        # Not DeepSpeed's bf16: that would also keep weights, and sum gradients, in bf16.
        encoder.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(encoder.forward)
    settings = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_norm,
        "steps_per_print": sys.maxsize,
        "zero_allow_untested_optimizer": True,  # that is: one that is not DeepSpeed's own
        "zero_optimization": {"stage": 2},
    }
    engine, sharded, _, _ = deepspeed.initialize(
        model=encoder, optimizer=optimizer, config=settings
    )
    return engine, sharded


def is_engine(model: nn.Module) -> TypeGuard["DeepSpeedEngine"]:
    """Whether `model` was prepared here; does not import DeepSpeed."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


def uses_zero2(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type is DistributedType.DEEPSPEED


def backward(engine: "DeepSpeedEngine", loss: Tensor, last: bool) -> None:
    """Add the gradients of `loss`, averaged over processes, to each process's part of them; moves
    no weights.

    Args:
        last: no more will be added before `engine.step()`.
    """
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss)


def gradient_norm(engine: "DeepSpeedEngine") -> Tensor:
    """The total norm over all processes' parts, before clipping, scalar; NaN if it is not finite. A
    collective."""
    norm = torch.as_tensor(engine.optimizer.scaled_global_norm())
    return torch.where(norm >= 0, norm, math.nan)  # DeepSpeed's word for infinity and NaN is -1


def model_state(engine: "DeepSpeedEngine") -> dict[str, Tensor]:
    """The whole weights by name, on the CPU of the first process, empty on others."""
    if engine.global_rank != 0:
        return {}
    weights = engine.module.state_dict()
    # copies even on the CPU: DeepSpeed keeps the weights as views of one long tensor, which
    # safetensors does not take
    return {
        name: torch.empty_like(weight, device="cpu").copy_(weight)
        for name, weight in weights.items()
    }


def optimizer_state(engine: "DeepSpeedEngine") -> dict[str, dict[str, Tensor]]:
    """Whole moments as {parameter: {moment: tensor}}, on the CPU of the first process, empty on
    others.

    A collective.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    step = _step_counter(engine)
    state: dict[str, dict[str, Tensor]] = {}
    for name, parameter in _trained_parameters(engine):
        whole = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
        if engine.global_rank == 0:
            state[name] = {moment: tensor.cpu() for moment, tensor in whole.items()}
            state[name]["step"] = step.detach().clone().cpu()
    return state


def load_state(
    engine: "DeepSpeedEngine", weights: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Put whole weights and moments, by parameter name, into the parts that each process keeps."""
    from deepspeed.utils import (
        lazy_init_hp_params_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    sharded = engine.optimizer
    _make_moments(sharded.optimizer)
    for parameters, part in zip(sharded.bit16_groups, _parts(sharded.optimizer), strict=True):
        lazy_init_hp_params_optimizer_state(parameters, part, sharded.optimizer.state)
    for name, parameter in _trained_parameters(engine):
        safe_set_full_fp32_param(parameter, weights[name].to(parameter))
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, state[name][moment].to(parameter), moment)
        _step_counter(engine).copy_(state[name]["step"])
    sharded.update_lp_params()


def _trained_parameters(engine: "DeepSpeedEngine") -> list[tuple[str, nn.Parameter]]:
    return [
        (name, parameter)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    ]


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its moments, which it does at its first step: one of length 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for part in _parts(optimizer):
        part.grad = torch.zeros_like(part)
    optimizer.step()
    for part in _parts(optimizer):
        part.grad = None
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _parts(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """This process's part of each group's weights, flat."""
    return [part for group in optimizer.param_groups for part in group["params"]]


def _step_counter(engine: "DeepSpeedEngine") -> Tensor:
    optimizer = engine.optimizer.optimizer
    (part,) = _parts(optimizer)
    return optimizer.state[part]["step"]
