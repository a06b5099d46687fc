"""The key `optimizer`: AdamW with its moments in 8 bits."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from helpers.comparing import assert_same_metrics, assert_same_tensors
from helpers.tiny_runs import (
    Inputs,
    Launch,
    config_of,
    final_bytes,
    final_state,
    metrics,
    rewrite_state,
    run_each,
)

import run as run_script
from ml_embed.config import load_config
from ml_embed.distributed.engine import _plain
from ml_embed.errors import UserError
from ml_embed.training import optimizer as optimizers
from ml_embed.training.cost import MOMENTS_BYTES

EIGHT_BIT = {
    "optimizer": "adamw_8bit",
    "learning_rate": 1e-5,
    "warmup_steps": 0,
    "train_steps": 6,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    pytest.importorskip("torchao", reason="torchao is not installed")
    return Inputs.write(tmp_path_factory.mktemp("optimizer") / "inputs")


def train(inputs: Inputs, name: str, *flags: str, expected: int = 0, **changes):
    """The folder of a run in this process; torchao's update is not compiled: a minute on CPUs."""
    config = config_of(inputs, name, **EIGHT_BIT | changes)
    with torch.compiler.set_stance("force_eager"):
        assert run_script.main(["--config", str(config), *flags]) == expected
    return inputs.run_dir(name)


@pytest.fixture(scope="module")
def whole(inputs):
    return train(inputs, "whole")


def forget_the_end(folder: Path) -> None:
    for path in (folder, folder / "resume"):
        shutil.rmtree(path / "step_6")


def test_the_first_step_is_adamws_and_the_others_are_near(inputs):
    """Moments are rounded after they have moved the weights."""
    first = {
        name: final_state(train(inputs, f"first-{name}", optimizer=name, train_steps=1))
        for name in ("adamw", "adamw_8bit")
    }
    assert_same_tensors(first["adamw"], first["adamw_8bit"])
    exact, rounded = (
        [line["loss"] for line in metrics(train(inputs, f"six-{n}", optimizer=n))]
        for n in ("adamw", "adamw_8bit")
    )
    assert rounded == pytest.approx(exact, rel=0.01)
    assert rounded != exact


def test_moments_are_kept_in_8_bits(whole):
    state = final_state(whole, "optimizer.safetensors")
    codes = {name for name, tensor in state.items() if tensor.dtype == torch.uint8}
    assert codes == {name for name in state if name.endswith(".codes")}
    numbers = sum(tensor.numel() for tensor in state.values())
    assert sum(state[name].numel() for name in codes) > 0.8 * numbers


def test_a_run_is_continued_to_the_bit(inputs, whole):
    folder = train(inputs, "continued")
    forget_the_end(folder)
    train(inputs, "continued", "--resume", "auto")
    assert metrics(folder) == metrics(whole)
    assert final_bytes(folder, 6) == final_bytes(whole, 6)


def train_two_and_continue_one(configs: list[str]) -> int:
    torch.compiler.set_stance("force_eager")
    code = run_each(configs)
    if os.environ["RANK"] == "0":
        forget_the_end(Path(configs[1]).parent / "runs" / "two-continued")
    return code or run_each(configs[1:], ["--resume", "auto"])


def test_two_processes_are_one_and_continue_to_the_bit(inputs, whole):
    names = ("two", "two-continued")
    configs = [config_of(inputs, name, **EIGHT_BIT | {"train_batch_size": 2}) for name in names]
    launch = Launch(
        inputs.folder / "printed" / "two", configs, 2, main=train_two_and_continue_one, groups=3
    )
    assert launch.wait() == [0, 0], launch.printed()
    assert "continuing after step 3" in launch.printed()
    two, continued = map(inputs.run_dir, names)
    assert metrics(continued) == metrics(two)
    assert final_bytes(continued, 6) == final_bytes(two, 6)
    # a rounding of the sums over processes may move a moment to the next of its 256 values
    assert_same_metrics(metrics(whole), metrics(two), relative=1e-3)
    assert_same_tensors(final_state(whole), final_state(two))


@pytest.mark.parametrize(("before", "after"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_moments_of_the_other_optimizer_are_refused(inputs, capsys, before, after):
    name = f"from-{before}"
    train(inputs, name, optimizer=before, train_steps=1)
    capsys.readouterr()
    train(inputs, name, "--resume", "auto", optimizer=after, expected=2)
    assert f"optimizer: '{before}' -> '{after}'" in capsys.readouterr().err
    train(inputs, name, "--resume", "auto", "--allow-changes", optimizer=after, expected=2)
    assert "of another optimizer" in capsys.readouterr().err


def test_a_state_from_before_the_key_is_adamws(inputs):
    folder = train(inputs, "old", optimizer="adamw", train_steps=1)
    rewrite_state(folder / "resume" / "step_1", lambda p: p["fingerprint"].pop("optimizer"))
    train(inputs, "old", "--resume", "auto", optimizer="adamw", train_steps=1)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_share_moments_are_refused(inputs, engine):
    asked = SimpleNamespace(distributed_type=DistributedType[engine])
    config, _ = load_config(config_of(inputs, "refused", **EIGHT_BIT))
    with pytest.raises(UserError, match="optimizer: 'adamw_8bit' works on one process and"):
        optimizers.check_engine(config, asked)


def test_without_torchao_it_is_refused(inputs, monkeypatch, capsys):
    monkeypatch.setattr(optimizers, "OLDEST_TORCHAO", "99")
    config = config_of(inputs, "refused", **EIGHT_BIT)
    assert run_script.main(["--config", str(config), "--dry-run"]) == 2
    assert "optimizer: 'adamw_8bit' needs torchao 99 or newer" in capsys.readouterr().err


def test_a_dry_run_counts_its_moments(inputs, capsys):
    memory, needs = {}, []
    for name in ("adamw", "adamw_8bit"):
        config = config_of(inputs, "dry", **EIGHT_BIT | {"optimizer": name})
        assert run_script.main(["--config", str(config), "--dry-run"]) == 0
        resolved = json.loads(capsys.readouterr().out)
        memory[name], needs = resolved["memory_gib"]["optimizer"], resolved["on_h100"]
    assert memory["adamw_8bit"] == pytest.approx(memory["adamw"] * 2.03 / 8, abs=1e-3)
    # engines that share moments are not offered
    assert {need["engine"] for need in needs} == {"one process", "DDP"}


def test_a_parameters_moments_take_a_quarter():
    """As the estimate says, but for two tables of 256 values."""
    ao = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    weight = torch.nn.Parameter(torch.randn(512, 256))
    optimizer = ao.AdamW8bit([weight])
    weight.grad = torch.randn_like(weight)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    held = _plain(optimizer.state[weight])
    size = sum(x.numel() * x.element_size() for name, x in held.items() if name != "step")
    assert size == MOMENTS_BYTES["adamw_8bit"] * weight.numel() + 2 * 256 * 4


def test_where_its_update_cannot_be_compiled_it_is_refused(inputs, monkeypatch, capsys):
    def no_compiler(function):
        raise RuntimeError("no g++")

    monkeypatch.setattr(torch, "compile", no_compiler)
    config = config_of(inputs, "no_compiler", **EIGHT_BIT)
    assert run_script.main(["--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert "optimizer: torch.compile does not work" in said
    assert "set optimizer to 'adamw'" in said
