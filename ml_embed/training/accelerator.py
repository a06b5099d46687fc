"""The accelerator of a run, and a refusal of engines and settings that would train otherwise than
asked."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy

from ml_embed.config import TrainConfig
from ml_embed.distributed import zero2
from ml_embed.distributed.collectives import choose_gloo_interface
from ml_embed.distributed.collectives import world_size as processes_of_group
from ml_embed.errors import UserError
from ml_embed.kernels.attention import choose_kernel

# Processes wait for one that converts the data or writes a checkpoint. Dead ones are noticed much
# sooner: by closed connections, and over several machines by `ml_embed.distributed.heartbeat`.
_COLLECTIVE_TIMEOUT = timedelta(hours=2)
_ENGINES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator as `accelerate launch` set it up; under plain python, bf16 where the device
    has it.

    Raises:
        UserError: fp16, gradient accumulation, an attention kernel that cannot run here, or a
            tracker that is not installed.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    trackers = [str(tracker) for tracker in get_available_trackers()]
    missing = [name for name in config.report_to if name not in trackers]
    if missing:
        raise UserError(
            f"report_to: {', '.join(missing)} is not installed or not known; available: "
            f"{', '.join(trackers)}"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        zero2.check_installed()
    choose_gloo_interface()
    accelerator = Accelerator(
        cpu=not _has_gpu(),  # said aloud, or accelerate takes launched processes for single ones
        mixed_precision=None if launched else ("bf16" if has_bf16 else "no"),
        log_with=list(config.report_to) or None,
        project_dir=config.tb_dir,
        kwargs_handlers=[
            # The only buffers are constants, and GradCache makes forwards that other processes do
            # not.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT),
        ],
    )
    _check_engine(accelerator)
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        # accelerate's own choice would also sum gradients and return vectors in bf16
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(
            f"mixed_precision: {accelerator.mixed_precision!r} is not supported; use 'bf16' or 'no'"
        )
    choose_kernel(
        config.attention, accelerator.device, _compute_dtype(accelerator)
    )  # refuses an impossible one
    return accelerator


def _has_gpu() -> bool:
    """Whether there is an accelerator to train on. Apple's (mps) is none: it has no float64, which
    losses are summed in, so that a Mac trains on its CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type != "mps"


def _compute_dtype(accelerator: Accelerator) -> torch.dtype:
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def _check_engine(accelerator: Accelerator) -> None:
    """Refuse what accelerate would do otherwise than asked, or this project's steps cannot work
    with."""
    if (
        accelerator.gradient_accumulation_steps != 1
    ):  # accelerate would divide the gradients of every step by it
        raise UserError(
            "accelerate's gradient_accumulation_steps is "
            f"{accelerator.gradient_accumulation_steps}; it must be 1, "
            "also in the environment variable ACCELERATE_GRADIENT_ACCUMULATION_STEPS. For larger "
            "batches in the same "
            "memory set max_tokens_per_forward in the training config"
        )
    if accelerator.distributed_type is DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UserError(
                "FSDP version 1 is not supported; set fsdp_version: 2, as in "
                "configs/accelerate_fsdp2.yaml"
            )
        return
    if zero2.uses_zero2(accelerator):
        zero2.check_settings(accelerator)
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            "accelerate uses DeepSpeed only on GPUs and would silently copy the optimizer to every "
            "process here; "
            "on CPUs use configs/accelerate_cpu.yaml"
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.num_processes > 1:
        raise UserError(
            "accelerate shards parameters (FSDP) only on GPUs and would silently copy them to "
            "every process here; "
            "on CPUs use configs/accelerate_cpu.yaml"
        )
    if processes_of_group() != accelerator.num_processes:
        raise UserError(
            f"the launcher started {processes_of_group()} processes, but accelerate sees "
            f"{accelerator.num_processes}; "
            "to train on the CPUs of a machine with GPUs, set the environment variable "
            "ACCELERATE_USE_CPU=true"
        )
    if accelerator.distributed_type not in _ENGINES:
        raise UserError(
            f"the engine {accelerator.distributed_type.value} is not supported; use one of those "
            "in configs/"
        )
