"""How token factors are trained: their learning rate, a step's rank, and turned factors."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.held_out import held_out_rows, measured
from helpers.in_process import train
from safetensors.torch import load_file

from ml_embed import Embedder
from ml_embed.data.store import open_store
from ml_embed.model import FactorizedEmbedding, factorize_table, turn_factors

SETTINGS = {"valid_fraction": 0.5, "num_hard_neg": 9, "num_hard_neg_clustering": 9}


def state_of(folder, step):
    return load_file(folder / f"resume/step_{step}/model.safetensors")


def factors_of(folder, step):
    factors = load_file(folder / f"step_{step}/nested/embedding_factors.safetensors")
    return factors["A"], factors["B"]


def table_of(folder, step):
    return load_file(folder / f"step_{step}/model.safetensors")["embed_tokens.weight"]


def without_clock(lines):
    clock = {"time", "seconds", "tokens_per_second"}
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


@pytest.mark.parametrize("r", [32, 0])
def test_the_token_table_has_a_learning_rate_of_its_own(world, tmp_path, r):
    """AdamW's first step moves each weight by the learning rate times something that is the same in
    both runs; so the table, or A, moves eight times as far, and all others as before. "auto" makes
    its rate 0.015."""
    settings = {"train_steps": 1, "learning_rate": 0.015 / 8}
    if not r:
        settings |= {"use_mel": False, "r": 0, "mel_ranks": None}
    still = settings | {"learning_rate": 1e-12, "min_lr": 0}
    assert train(world, tmp_path, "start", **still)[0] == 0
    moved = {}
    for scale in (1.0, 8.0, "auto"):
        name = f"scale_{scale}"
        code, _ = train(world, tmp_path, name, embedding_lr_scale=scale, **settings)
        assert code == 0
        moved[scale] = state_of(tmp_path / name, 1)
    table = "embedding.A" if r else "embedding.weight"
    before = state_of(tmp_path / "start", 1)
    step = moved[1.0][table] - before[table]
    assert step.abs().max() > 1e-4
    torch.testing.assert_close(moved[8.0][table] - before[table], 8 * step, atol=1e-6, rtol=1e-4)
    for name in before.keys() - {table}:
        assert torch.equal(moved[1.0][name], moved[8.0][name]), name
    assert all(torch.equal(moved["auto"][name], moved[8.0][name]) for name in before)
    resolved = json.loads((tmp_path / "scale_auto/resolved.json").read_text())
    assert resolved["embedding_lr_scale"] == 8


def test_turned_factors_stand_in_the_folder_alone(world, tmp_path):
    """Training is the same to the bit, rank r is the same model, smaller ranks are the best, and
    validation measures them as they are saved."""
    grid = {"valid_ranks": [16, 32], "valid_layers": [2], "valid_dims": [64]}
    lines = {}
    for refactor in ("never", "save"):
        settings = SETTINGS | grid | {"learning_rate": 3e-2, "mel_refactor": refactor}
        code, lines[refactor] = train(world, tmp_path, refactor, **settings)
        assert code == 0
    plain, turned = (without_clock(lines[refactor]) for refactor in ("never", "save"))
    for one, other in zip(plain, turned, strict=True):
        smaller = {key for key in one if "rank_16" in key}
        assert {k: v for k, v in one.items() if k not in smaller} == {
            k: v for k, v in other.items() if k not in smaller
        }
    never, save = tmp_path / "never", tmp_path / "save"
    trained = state_of(save, 4)
    for name, tensor in state_of(never, 4).items():
        assert torch.equal(tensor, trained[name]), name
    torch.testing.assert_close(table_of(save, 4), table_of(never, 4), atol=2e-5, rtol=0)
    store = open_store(world.tokenized, tmp_path / "cache")
    whole = trained["embedding.A"] @ trained["embedding.B"]
    A, B = factorize_table(whole, 32, torch.from_numpy(store.token_share(len(whole))))
    saved_A, saved_B = factors_of(save, 4)
    for rank in (1, 16, 32):
        best = A[:, :rank] @ B[:rank]
        torch.testing.assert_close(saved_A[:, :rank] @ saved_B[:rank], best, atol=2e-4, rtol=0)
    assert not np.allclose(factors_of(never, 4)[1], saved_B, atol=1e-3), "training turns them away"
    model = Embedder.from_pretrained(save / "step_4", rank=16, device="cpu")
    config = world.config(**SETTINGS, cache_dir=str(tmp_path / "cache"))
    expected = measured(model, held_out_rows(config, world.raw)["facts"], "retrieval")
    for metric, value in expected.items():
        found = turned[-1][f"facts/{metric}/rank_16_depth_2_dim_64"]
        assert found == pytest.approx(value), metric
    assert any(plain[-1][key] != turned[-1][key] for key in plain[-1] if "rank_16" in key)


def test_factors_are_turned_in_training(world, tmp_path):
    """With their moments: the next step's gradients find means as if they had always been turned.

    The two runs part only by the last digits and by AdamW's division, which is not the same in
    turned components: at the turn the table is the same, and so is the mean of its gradients.
    """
    for name, refactor in (("never", "never"), ("turned", 3)):
        settings = SETTINGS | {"mel_refactor": refactor, "checkpointing_steps": 3}
        code, _ = train(world, tmp_path, name, **settings, learning_rate=3e-2, train_steps=5)
        assert code == 0
    plain, turned = (state_of(tmp_path / name, 3) for name in ("never", "turned"))
    A, B = (plain[f"embedding.{factor}"].double() for factor in "AB")
    store = open_store(world.tokenized, tmp_path / "cache")
    G, C = turn_factors(A, B, torch.from_numpy(store.token_share(len(A))))
    assert (G - torch.eye(len(G))).abs().max() > 1e-2, "training turns them away"
    torch.testing.assert_close(turned["embedding.A"].double(), A @ G, atol=1e-5, rtol=0)
    torch.testing.assert_close(turned["embedding.B"].double(), C, atol=1e-5, rtol=0)
    moments, found = (
        load_file(tmp_path / name / "resume/step_3/optimizer.safetensors")
        for name in ("never", "turned")
    )
    inverse = torch.linalg.inv(G)
    for factor, naive in (
        ("A", lambda m, matrix: torch.stack([row @ matrix.T for row in m])),
        ("B", lambda m, matrix: torch.stack([matrix.T @ column for column in m.T]).T),
    ):
        matrix = inverse if factor == "A" else G
        for moment, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            key = next(k for k in moments if f"embedding.{factor}" in k and k.endswith(moment))
            wanted = naive(moments[key].double(), matrix**power)
            scale = wanted.abs().max()
            assert scale > 0
            torch.testing.assert_close(
                found[key].double() / scale, wanted / scale, atol=1e-5, rtol=0
            )
    for name in plain.keys() - {"embedding.A", "embedding.B"}:
        assert torch.equal(plain[name], turned[name]), name
    assert not torch.equal(
        state_of(tmp_path / "never", 5)["norms.0.weight"],
        state_of(tmp_path / "turned", 5)["norms.0.weight"],
    )


def test_a_run_with_turned_factors_resumes_to_the_bit(world, tmp_path):
    settings = SETTINGS | {"mel_refactor": 2, "checkpointing_steps": 3, "train_steps": 6}
    ended = []
    for name in ("whole", "resumed"):
        assert train(world, tmp_path, name, **settings)[0] == 0
        ended.append(state_of(tmp_path / name, 6))
        if name == "resumed":
            shutil.rmtree(tmp_path / name / "resume/step_6")
            assert train(world, tmp_path, name, ["--resume", "auto"], **settings)[0] == 0
            ended.append(state_of(tmp_path / name, 6))
    for name, tensor in ended[0].items():
        assert torch.equal(tensor, ended[1][name]), name
        assert torch.equal(tensor, ended[2][name]), name


def test_turned_factors_in_half_precision():
    """As FSDP2 hands them out, and what they are turned by in float32."""
    A, B = torch.randn(20, 8), torch.randn(8, 16)
    embedding = FactorizedEmbedding(A, B).bfloat16()
    embedding.turned = turn_factors(A, B, torch.full((20,), 0.05))
    assert embedding(torch.arange(5), 4).dtype == torch.bfloat16


def test_a_whole_rank_in_every_step(world, tmp_path, capsys):
    """It is the run with r alone, but for the ranks that its folder names."""
    states = {}
    for name, ranks in {
        "full": {"mel_sampling": "full"},
        "alone": {"use_mel": False, "mel_ranks": None},
    }.items():
        code, _ = train(world, tmp_path, name, **ranks)
        assert code == 0
        states[name] = state_of(tmp_path / name, 4)
    assert "set mel_refactor to 'save'" in capsys.readouterr().err
    for name, tensor in states["full"].items():
        assert torch.equal(tensor, states["alone"][name]), name
    model = Embedder.from_pretrained(tmp_path / "full/step_4", rank=16, device="cpu")
    assert model.encode("a text").shape == (64,)
