"""Runs under DeepSpeed's ZeRO-2 on CPUs."""

import os

import yaml
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import run as run_script
from helpers import ROOT
from ml_embed.distributed import zero2
from ml_embed.training import accelerator as run_accelerator

CPU = {"DS_ACCELERATOR": "cpu"}


def use_zero2(**changes) -> None:
    """Make accelerate take DeepSpeed as our config file says, which it does on GPUs only.

    All that comes after this choice is this project's own code, and DeepSpeed's, over gloo.
    """
    settings = yaml.safe_load((ROOT / "configs" / "accelerate_deepspeed_zero2.yaml").read_text())[
        "deepspeed_config"
    ]
    make = run_accelerator.make_accelerator

    def make_with_zero2(config) -> Accelerator:
        accelerator = make(config)
        plugin = DeepSpeedPlugin(**(settings | changes))
        plugin.set_mixed_precision(os.environ["ACCELERATE_MIXED_PRECISION"])
        AcceleratorState._shared_state["deepspeed_plugins"] = plugin
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        zero2.check_settings(accelerator)
        return accelerator

    run_accelerator.make_accelerator = make_with_zero2


class CheckedEngine(zero2.Zero2Engine):
    """Says that it was used, after a look at what each process keeps."""

    def __init__(self, *given):
        super().__init__(*given)
        assert self.model.zero_optimization_stage() == 2
        groups = self.optimizer.optimizer.param_groups
        kept = sum(part.numel() for group in groups for part in group["params"])
        trained = (p for p in self.model.module.parameters() if p.requires_grad)
        whole = sum(parameter.numel() for parameter in trained)
        assert whole / 2 <= kept < whole * 0.51, "each process has half"
        print("under ZeRO-2")


def run_zero2(arguments: list[str]) -> int:
    use_zero2()
    zero2.Zero2Engine = CheckedEngine
    return run_script.main(arguments)
