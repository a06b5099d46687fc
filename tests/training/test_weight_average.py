"""The key `ema_decay`: a running average of weights against the mean of every step's folder."""

import shutil

import pytest
import torch
from helpers.held_out import held_out_rows, measured
from helpers.in_process import train
from helpers.tiny_runs import final_state
from oracles import average_of_steps
from safetensors.torch import load_file

from ml_embed import Embedder
from ml_embed.model_folders.record import ModelRecord

DECAY, STEPS = 0.7, 5
SETTINGS = {"learning_rate": 1e-2, "train_steps": STEPS, "valid_fraction": 0.5}
SETTINGS |= {"num_hard_neg": 9, "num_hard_neg_clustering": 9}
KINDS = {"factors": {}, "table": {"use_mel": False, "r": 0, "mel_ranks": None}}
KINDS["adapters"] = {"lora_r": 4}


def trained_in(folder):
    """The tensors of a model folder that are no product of others."""
    tensors = load_file(folder / "model.safetensors")
    factors = folder / "nested/embedding_factors.safetensors"
    if factors.exists():
        tensors = {name: x for name, x in tensors.items() if "embed_tokens" not in name}
        tensors |= load_file(factors)
    return tensors


@pytest.mark.parametrize("kind", ["factors", "table"])
def test_folders_and_validation_have_the_mean_of_all_steps(world, tmp_path, kind):
    """And training is the same to the bit as without an average."""
    settings = SETTINGS | KINDS[kind]
    code, plain = train(world, tmp_path, "plain", checkpointing_steps=1, **settings)
    assert code == 0
    saved = {"keep_best": "facts/ndcg@10", "validation_steps": 2, "checkpointing_steps": 3}
    code, lines = train(world, tmp_path, "average", ema_decay=DECAY, **settings | saved)
    assert code == 0
    losses = [[x["loss"] for x in run if x["split"] == "train"] for run in (plain, lines)]
    assert losses[0] == losses[1]
    ended, last = final_state(tmp_path / "average"), final_state(tmp_path / "plain")
    assert all(torch.equal(ended[name], last[name]) for name in last)
    of_steps = [trained_in(tmp_path / f"plain/step_{step}") for step in range(1, STEPS + 1)]
    valid = [line for line in lines if line["split"] == "valid"]
    best = max(valid, key=lambda line: line["facts/ndcg@10"])["step"]
    for name, step in (("step_3", 3), (f"step_{STEPS}", STEPS), ("best", best)):
        found = trained_in(tmp_path / "average" / name)
        assert found.keys() == of_steps[0].keys()
        for key, tensor in found.items():
            expected = average_of_steps([state[key] for state in of_steps[:step]], DECAY)
            torch.testing.assert_close(tensor, expected, atol=2e-6, rtol=0)
        assert any((found[key] - of_steps[step - 1][key]).abs().max() > 1e-3 for key in found)
    model = Embedder.from_pretrained(tmp_path / f"average/step_{STEPS}", device="cpu")
    rows = held_out_rows(world.config(**settings), world.raw)["facts"]
    for metric, value in measured(model, rows, "retrieval").items():
        assert lines[-1][f"facts/{metric}"] == pytest.approx(value), metric
    assert ModelRecord.load(tmp_path / "average/best").ema_decay == DECAY


@pytest.mark.parametrize("kind", ["factors", "adapters"])
def test_an_average_is_continued_to_the_bit(world, tmp_path, kind):
    settings = SETTINGS | KINDS[kind] | {"ema_decay": DECAY, "checkpointing_steps": 3}
    for name in ("whole", "continued"):
        assert train(world, tmp_path, name, **settings)[0] == 0
    for path in (tmp_path / "continued").glob(f"**/step_{STEPS}"):
        shutil.rmtree(path)
    assert train(world, tmp_path, "continued", ["--resume", "auto"], **settings)[0] == 0
    for path in (tmp_path / "whole").glob(f"**/step_{STEPS}/**/*.safetensors"):
        other = tmp_path / "continued" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes(), path


def test_averages_of_factors_are_turned_with_them(world, tmp_path):
    """The average's token table is the same, and the turned one is what goes on."""
    tables = {}
    for name, refactor in (("never", "never"), ("turned", 3)):
        settings = SETTINGS | {"mel_refactor": refactor, "train_steps": 3, "ema_decay": DECAY}
        assert train(world, tmp_path, name, **settings)[0] == 0
        moments = final_state(tmp_path / name, "optimizer.safetensors")
        A, B = (moments[f"embedding.{factor}|average"].double() for factor in "AB")
        tables[name] = A, A @ B
    assert (tables["never"][0] - tables["turned"][0]).abs().max() > 1e-2
    torch.testing.assert_close(tables["never"][1], tables["turned"][1], atol=1e-5, rtol=0)


def test_a_state_without_an_average_is_refused_by_name(world, tmp_path, capsys):
    settings = SETTINGS | {"checkpointing_steps": 3}
    assert train(world, tmp_path, **settings)[0] == 0
    for flags, said in (
        (["--resume", "auto"], "ema_decay: 0.0 -> 0.7"),
        (["--resume", "auto", "--allow-changes"], "restore the keys optimizer and ema_decay"),
    ):
        assert train(world, tmp_path, arguments=flags, ema_decay=DECAY, **settings)[0] == 2
        assert said in capsys.readouterr().err
