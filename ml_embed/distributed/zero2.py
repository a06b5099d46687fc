"""DeepSpeed ZeRO-2: gradients and optimizer state in parts, one per process; weights whole.

DeepSpeed's engine is called directly. accelerate's wrapper moves the weights within `backward`:
nothing could stop an update that is not finite, and GradCache would move them once per chunk.
"""

import importlib.util
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ml_embed.distributed.engine import AVERAGE, MOMENTS, WEIGHT, Engine, Moments, other_optimizer
from ml_embed.errors import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def check_installed() -> None:
    """Refuse to train with DeepSpeed where it is not installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "DeepSpeed is not installed: pip install deepspeed, or use "
            "configs/accelerate_fsdp2.yaml"
        )


def check_settings(accelerator: Accelerator) -> None:
    """Refuse settings of DeepSpeed that training here does not follow.

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
            "memory set max_tokens_per_forward in the training config"
        )


class Zero2Engine(Engine):
    """DeepSpeed's engine at stage 2, with float32 weights, gradients and sums of them."""

    model: "DeepSpeedEngine"
    needs_equal_chunks = True

    def __init__(
        self,
        accelerator: Accelerator,
        encoder: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_norm: float,
        batch_size: int,
    ):
        """
        Args:
            max_norm: what `step` clips the norm of the gradients to; 0 = not at all.
            batch_size: rows per process and step; DeepSpeed wants to know them, for its own
                counters only.
        """
        import deepspeed

        if accelerator.mixed_precision == "bf16":
            # Not DeepSpeed's bf16: that would also keep weights, and sum gradients, in bf16.
            encoder.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(
                encoder.forward
            )
        settings = {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_norm,
            "steps_per_print": sys.maxsize,
            "zero_allow_untested_optimizer": True,  # that is: one that is not DeepSpeed's own
            "zero_optimization": {"stage": 2},
        }
        self.model, self.optimizer, _, _ = deepspeed.initialize(
            model=encoder.float(),  # frozen matrices may be narrower
            optimizer=optimizer,
            config=settings,
        )

    def backward(self, loss: Tensor, last: bool = True) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss)  # moves no weights

    def clip_gradients(self) -> Tensor:
        norm = torch.as_tensor(self.model.optimizer.scaled_global_norm())
        return torch.where(norm >= 0, norm, math.nan)  # DeepSpeed writes -1 for infinity and NaN

    def _move_weights(self) -> None:
        self.model.step()  # clips, moves the weights and drops the gradients

    def weights_written(self) -> None:
        self.model.optimizer.update_lp_params()

    def trained_parameters(self) -> set[str]:
        return {name for name, _ in self._trained()}

    def model_state(self) -> dict[str, Tensor]:
        if self.model.global_rank != 0:
            return {}
        # copies even on the CPU: DeepSpeed keeps the weights as views of one long tensor, which
        # safetensors does not take
        return {
            name: torch.empty_like(weight, device="cpu").copy_(weight)
            for name, weight in self.model.module.state_dict().items()
        }

    def optimizer_state(self) -> Moments:
        self._link_moments()
        step = self._step_counters()[0]  # all count alike
        state: Moments = {}
        for name, parameter in self._trained():
            whole = self._moments_of(parameter)
            if self.model.global_rank == 0:
                state[name] = {moment: tensor.cpu() for moment, tensor in whole.items()}
                state[name]["step"] = step.detach().clone().cpu()
        return state

    def whole_parameter(self, name: str) -> dict[str, Tensor]:
        self._link_moments()
        parameter = dict(self._trained())[name]
        return {WEIGHT: parameter.detach().clone(), **self._moments_of(parameter)}

    def replace_parameter(self, name: str, whole: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter = dict(self._trained())[name]
        safe_set_full_fp32_param(parameter, whole[WEIGHT])
        for moment in self._moments_held():
            safe_set_full_optimizer_state(parameter, whole[moment], moment)
        self.weights_written()

    def load_state(self, weights: Mapping[str, Tensor], moments: Moments) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        _make_moments(self.model.optimizer.optimizer)
        self._link_moments()
        held = self._moments_held()
        for name, parameter in self._trained():
            if different := {*held, "step"} ^ moments[name].keys():
                raise other_optimizer(min(different))
            safe_set_full_fp32_param(parameter, weights[name].to(parameter))
            for moment in held:
                safe_set_full_optimizer_state(
                    parameter, moments[name][moment].to(parameter), moment
                )
            for counter in self._step_counters():
                counter.copy_(moments[name]["step"])
        self.weights_written()

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        named = self.model.module.named_parameters()
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]

    def _moments_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        held = self._moments_held()
        return {moment: safe_get_full_optimizer_state(parameter, moment) for moment in held}

    def _moments_held(self) -> list[str]:
        optimizer = self.model.optimizer.optimizer
        held = optimizer.state[_parts(optimizer)[0]]  # all have the same
        return [moment for moment in (*MOMENTS, AVERAGE) if moment in held]

    def _step_counters(self) -> list[Tensor]:
        optimizer = self.model.optimizer.optimizer
        return [optimizer.state[part]["step"] for part in _parts(optimizer)]

    def _link_moments(self) -> None:
        """Tell each parameter where its moments lie in this process's flat parts.

        DeepSpeed 0.19.8 does so once, after the first group's first step, when the other groups
        have no moments yet.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        sharded = self.model.optimizer
        for parameters, part in zip(sharded.bit16_groups, _parts(sharded.optimizer), strict=True):
            lazy_init_hp_params_optimizer_state(parameters, part, sharded.optimizer.state)


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
