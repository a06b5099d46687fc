"""Runs under FSDP2 on CPUs, also in its hybrid form (HSDP)."""

import copy

import yaml
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import run as run_script
from helpers import ROOT
from helpers.tiny_runs import run_each
from ml_embed.training import accelerator as run_accelerator


def run_each_sharded(configs: list[str]) -> int:
    shard_on_cpu()
    return run_each(configs)


def run_each_hybrid(configs: list[str]) -> int:
    """With two copies of two shards."""
    shard_on_cpu(ParallelismConfig(dp_replicate_size=2, dp_shard_size=2))
    return run_each(configs)


def run_sharded(arguments: list[str]) -> int:
    shard_on_cpu()
    return run_script.main(arguments)


def shard_on_cpu(parallelism: ParallelismConfig | None = None) -> None:
    """Make accelerate shard as configs/accelerate_fsdp2.yaml says, which it does on GPUs only.

    All that comes after this choice is accelerate's own code, and torch's, over gloo.

    Args:
        parallelism: as in configs/accelerate_hsdp.yaml; accelerate refuses it on CPUs, too.
    """
    settings = yaml.safe_load((ROOT / "configs" / "accelerate_fsdp2.yaml").read_text())[
        "fsdp_config"
    ]
    make = run_accelerator.make_accelerator

    def make_sharded(config) -> Accelerator:
        accelerator = make(config)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=settings["fsdp_version"],
            auto_wrap_policy=settings["fsdp_auto_wrap_policy"],
            transformer_cls_names_to_wrap=[settings["fsdp_transformer_layer_cls_to_wrap"]],
            reshard_after_forward=settings["fsdp_reshard_after_forward"],
            cpu_ram_efficient_loading=settings["fsdp_cpu_ram_efficient_loading"],
            state_dict_type=settings["fsdp_state_dict_type"],
        )
        if accelerator.mixed_precision == "bf16":
            plugin.mixed_precision_policy = run_accelerator.FSDP2_IN_BF16
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        assert accelerator.is_fsdp2
        if parallelism is not None:  # as Accelerator() goes on
            own = copy.deepcopy(parallelism)
            AcceleratorState._shared_state["parallelism_config"] = own
            accelerator.state.device_mesh = own.get_device_mesh("cpu")
            own._validate_accelerator(accelerator)
        return accelerator

    run_accelerator.make_accelerator = make_sharded
