"""Two processes under DeepSpeed ZeRO-2 are one process without it."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import DeepSpeedPlugin
from helpers.comparing import CASES, GLOBAL_BATCH, assert_same_metrics, assert_same_tensors
from helpers.tiny_runs import Inputs, final_state, metrics, run
from helpers.zero2_runs import CPU, run_zero2

from ml_embed.distributed import zero2
from ml_embed.errors import UserError
from ml_embed.training import step as training

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return Inputs.write(tmp_path_factory.mktemp("deepspeed") / "inputs")


@pytest.fixture(scope="module")
def run_dirs(inputs):
    """(case, "one" or "zero2") -> the run's folder."""
    # Weights of the dims as published: AdamW's first steps, clipped from a loss three times as
    # large, let the last digits grow beyond what is compared here.
    own = {"max_grad_norm": 0.5, "mrl_weights": "paper"}
    for case in ("everything", "in_chunks"):
        settings = CASES[case] | own
        run(inputs, inputs.config(f"{case}-one", train_batch_size=GLOBAL_BATCH, **settings))
        config = inputs.config(f"{case}-zero2", train_batch_size=GLOBAL_BATCH // 2, **settings)
        assert (
            run(inputs, config, processes=2, main=run_zero2, environment=CPU).count("under ZeRO-2")
            == 2
        )
    return lambda case, name: inputs.run_dir(f"{case}-{name}")


@pytest.mark.parametrize("case", ["everything", "in_chunks"])
def test_partitioned_processes_are_one(run_dirs, case):
    one, zero2 = run_dirs(case, "one"), run_dirs(case, "zero2")
    lines = metrics(one)
    assert any(line.get("grad_norm", 0) > 0.5 for line in lines), "clipping was at work"
    assert_same_metrics(lines, metrics(zero2))
    assert_same_tensors(final_state(one), final_state(zero2))
    moments = final_state(one, "optimizer.safetensors")
    assert any(name.endswith("|exp_avg_sq") for name in moments)
    assert_same_tensors(moments, final_state(zero2, "optimizer.safetensors"))


def test_a_partitioned_run_continues_a_copied_one_and_the_reverse(inputs):
    settings = {"train_steps": 6, "checkpointing_steps": 3, "train_batch_size": 2}
    settings |= {"embedding_lr_scale": 4.0, "ema_decay": 0.8}
    run(inputs, inputs.config("whole", **settings), processes=2)
    for name, first, then in (("to_zero2", None, run_zero2), ("from_zero2", run_zero2, None)):
        run(inputs, inputs.config(name, **settings), processes=2, main=first, environment=CPU)
        for path in inputs.run_dir(name).glob("**/step_6"):
            path.rename(inputs.folder / f"{name}-{path.parent.name}-set-aside")
        config = inputs.config(name, **settings)
        printed = run(inputs, config, "--resume", "auto", processes=2, main=then, environment=CPU)
        assert "continuing after step 3" in printed
        assert_same_metrics(metrics(inputs.run_dir("whole")), metrics(inputs.run_dir(name)))
        for file in ("model.safetensors", "optimizer.safetensors"):
            whole, found = (final_state(inputs.run_dir(x), file) for x in ("whole", name))
            assert_same_tensors(whole, found)


def test_bf16_computes_over_float32_weights(inputs):
    """As without DeepSpeed, whose own bf16 would round the weights."""
    environment = CPU | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    for name, main in (("copied", None), ("partitioned", run_zero2)):
        config = inputs.config(f"bf16-{name}", train_steps=4, train_batch_size=2)
        run(inputs, config, processes=2, main=main, environment=environment)
    copied, partitioned = inputs.run_dir("bf16-copied"), inputs.run_dir("bf16-partitioned")
    assert_same_metrics(metrics(copied), metrics(partitioned), relative=1e-4)
    weights = final_state(partitioned)
    assert_same_tensors(final_state(copied), weights)
    assert not any(torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())


def main_with_a_broken_gradient(arguments: list[str]) -> int:
    """One process's gradient, and not its loss, is NaN in the third step."""
    forward_backward, steps = training.forward_backward, []

    def broken(engine, *rest):
        steps.append(None)
        if len(steps) == 3 and torch.distributed.get_rank() == 1:
            first = next(engine.model.module.parameters())
            first.register_hook(lambda gradient: gradient * math.nan)
        return forward_backward(engine, *rest)

    training.forward_backward = broken
    return run_zero2(arguments)


def test_a_gradient_that_is_not_finite_stops_all_before_the_update(inputs):
    config = inputs.config("broken", train_steps=6, checkpointing_steps=2, train_batch_size=2)
    printed = run(
        inputs, config, processes=2, expected=2, main=main_with_a_broken_gradient, environment=CPU
    )
    assert printed.count("stopped before the update") == 2, printed
    assert "step 3, " in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"zero_stage": 3}, "ZeRO stage 3 is not supported"),
        ({"offload_optimizer_device": "cpu"}, "offload_optimizer_device: 'cpu' is not"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be 1"),
    ],
)
def test_other_settings_are_refused(changed, message):
    plugin = DeepSpeedPlugin(**changed)
    with pytest.raises(UserError, match=message):
        zero2.check_settings(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
