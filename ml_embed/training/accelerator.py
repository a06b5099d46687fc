"""The accelerator and the engine of a run; those that would not train as asked are refused."""

import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from ml_embed.config import TrainConfig
from ml_embed.distributed import zero2
from ml_embed.distributed.collectives import (
    choose_gloo_interface,
    compute_on_all_processes,
    world_size,
)
from ml_embed.distributed.engine import AccelerateEngine, Engine
from ml_embed.distributed.meeting import meeting
from ml_embed.errors import UserError
from ml_embed.kernels.attention import choose_kernel
from ml_embed.kernels.precision import has_bfloat16
from ml_embed.training.optimizer import check_engine

# accelerate's own choice would also sum gradients and return vectors in bf16
FSDP2_IN_BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# The engines that keep one copy of the weights per process.
_COPIES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator as `accelerate launch` set it up.

    Under plain python it computes in bf16 where the device has it.

    Raises:
        UserError: fp16, gradient accumulation, an attention kernel that cannot run here, or a
            tracker that is not installed.
    """
    _check_trackers(config)
    set_deterministic(config.deterministic)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        zero2.check_installed()
    _check_parallelism()
    choose_gloo_interface()
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    device = training_device()
    with meeting() as timeout:
        accelerator = Accelerator(
            # said aloud, or accelerate takes launched processes for single ones
            cpu=device.type == "cpu",
            mixed_precision=None if launched else ("bf16" if has_bfloat16(device) else "no"),
            log_with=list(config.report_to) or None,
            project_dir=config.tb_dir,
            kwargs_handlers=[
                # The only buffers are constants, and GradCache makes forward passes that other
                # processes do not.
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, gradient_as_bucket_view=True
                ),
                InitProcessGroupKwargs(timeout=timeout),
            ],
        )
    compute_on_all_processes(lambda: _check(accelerator, config))
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = FSDP2_IN_BF16
    return accelerator


def _check(accelerator: Accelerator, config: TrainConfig) -> None:
    _check_engine(accelerator, config)
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(
            f"mixed_precision: {accelerator.mixed_precision!r} is not supported; use 'bf16' or 'no'"
        )
    # refuses a kernel that cannot run here
    choose_kernel(config.attention, accelerator.device, compute_dtype(accelerator))


def set_deterministic(on: bool) -> None:
    """Let torch use only operations that add in a fixed order, or any again.

    On GPUs the backward passes of attention, of looking up token vectors and of picking rows add
    with atomics, whose order changes from run to run. Must be called before the first product there
    (cuBLAS reads its setting once).
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # filling is for debugging, and slow
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(on)


def _check_trackers(config: TrainConfig) -> None:
    trackers = [str(tracker) for tracker in get_available_trackers()]
    missing = [name for name in config.report_to if name not in trackers]
    if missing:
        raise UserError(
            f"report_to: {', '.join(missing)} is not installed or not known; available: "
            f"{', '.join(trackers)}"
        )


def training_device() -> torch.device:
    """The kind of device that training runs on: a GPU if there is one that it may use.

    A Mac trains on its CPU: losses are summed in float64, which its GPU (mps) does not have.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type == "mps" or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return found


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """What forward passes compute in; weights are float32 all the same."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def make_engine(
    accelerator: Accelerator,
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> Engine:
    """The engine that accelerate was launched with."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        samples = config.samples_per_process(accelerator.num_processes)
        return zero2.Zero2Engine(accelerator, encoder, optimizer, config.max_grad_norm, samples)
    return AccelerateEngine(accelerator, encoder, optimizer, config.max_grad_norm)


def _check_parallelism() -> None:
    """Refuse what accelerate's parallelism_config asks for, unless it is HSDP of all processes."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") != "true":
        return
    names = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
    sizes = {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", 1)) for name in names}
    copies, shards = sizes.pop("dp_replicate_size"), sizes.pop("dp_shard_size")
    for name, size in sizes.items():
        if size > 1:
            raise UserError(
                f"accelerate's parallelism_config: {name} is {size}, but training here splits no "
                "text and no matrix; use dp_replicate_size and dp_shard_size, as in "
                "configs/accelerate_hsdp.yaml"
            )
    if shards < 2:
        raise UserError(
            f"accelerate's parallelism_config: dp_shard_size is {shards}, so nothing is shared; "
            "set it to the GPUs of a machine, or use configs/accelerate_config.yaml"
        )
    if copies * shards != (processes := int(os.environ.get("WORLD_SIZE", 1))):
        raise UserError(
            f"accelerate's parallelism_config is for {copies} x {shards} processes, but there are "
            f"{processes}; give accelerate launch --parallelism_config_dp_replicate_size (the "
            "number of machines) and --parallelism_config_dp_shard_size (the GPUs of each)"
        )


def _check_engine(accelerator: Accelerator, config: TrainConfig) -> None:
    """Refuse engines that steps here cannot work with, and what accelerate would do differently."""
    # accelerate would divide the gradients of every step by it
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            "accelerate's gradient_accumulation_steps is "
            f"{accelerator.gradient_accumulation_steps}; it must be 1, also in the environment "
            "variable ACCELERATE_GRADIENT_ACCUMULATION_STEPS. For larger batches in the same "
            "memory set max_tokens_per_forward in the training config"
        )
    check_engine(config, accelerator)
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        zero2.check_settings(accelerator)
    elif accelerator.distributed_type is not DistributedType.FSDP:
        _check_copies(accelerator)
    elif not accelerator.is_fsdp2:
        raise UserError(
            "FSDP version 1 is not supported; set fsdp_version: 2, as in "
            "configs/accelerate_fsdp2.yaml"
        )


def _check_copies(accelerator: Accelerator) -> None:
    """Refuse a copy of the weights per process where the launcher was asked for something else."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            "accelerate uses DeepSpeed only on GPUs and would silently copy the optimizer to every "
            "process here; on CPUs use configs/accelerate_cpu.yaml"
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.num_processes > 1:
        raise UserError(
            "accelerate shards parameters (FSDP) only on GPUs and would silently copy them to "
            "every process here; on CPUs use configs/accelerate_cpu.yaml"
        )
    if world_size() != accelerator.num_processes:
        raise UserError(
            f"the launcher started {world_size()} processes, but accelerate sees "
            f"{accelerator.num_processes}; to train on the CPUs of a machine with GPUs, set the "
            "environment variable ACCELERATE_USE_CPU=true"
        )
    if accelerator.distributed_type not in _COPIES:
        raise UserError(
            f"the engine {accelerator.distributed_type.value} is not supported; use one of those "
            "in configs/"
        )
