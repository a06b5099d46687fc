"""A second stage of training: `model_path` is a model folder that a first stage wrote."""

import json

import pytest
import torch
from helpers.in_process import train
from safetensors.torch import load_file
from transformers import AutoModel

from ml_embed import Embedder
from ml_embed.config import parse_config
from ml_embed.model import factorize_table
from ml_embed.training.build import build_encoder
from ml_embed.training.inputs import open_inputs

TEXTS = ["river12 stone7", "a longer text about the moon and the winter harbour", "candle"]


@pytest.fixture(scope="module")
def first_stage(world, tmp_path_factory):
    """A folder trained for some steps at ranks 16 and 32, with each exit's own norm."""
    folder = tmp_path_factory.mktemp("stage1")
    code, _ = train(
        world, folder, "stage1", train_steps=12, learning_rate=1e-2, mll_norm="per_layer"
    )
    assert code == 0
    return folder / "stage1" / "step_12"


def start_of(world, model_path, **changes):
    """The encoder that training would start from."""
    config = parse_config(world.config(model_path=str(model_path), **changes))
    inputs = open_inputs(config, world_size=1, progress=False)
    return build_encoder(config, inputs, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("mel_init", ["svd", "frequency"])
def test_factors_are_taken_as_they_are(world, first_stage, mel_init):
    trained = load_file(first_stage / "nested" / "embedding_factors.safetensors")
    encoder = start_of(world, first_stage, mll_norm="per_layer", mel_init=mel_init)
    assert torch.equal(encoder.embedding.A, trained["A"])
    assert torch.equal(encoder.embedding.B, trained["B"])
    again, _ = factorize_table(trained["A"] @ trained["B"], 32)
    assert (again - trained["A"]).abs().max() > 1e-3, "factorising again would have changed them"


def test_every_weight_is_that_of_the_first_stage(world, first_stage):
    """All of the encoder, so that a second stage starts exactly where the first ended."""
    state = load_file(first_stage.parent / "resume" / "step_12" / "model.safetensors")
    encoder = start_of(world, first_stage, mll_norm="per_layer")
    own = dict(encoder.named_parameters())
    assert own.keys() == {name.removeprefix("module.") for name in state}
    for name, parameter in own.items():
        assert torch.equal(parameter, state[name]), name


def test_a_smaller_rank_factorises_the_trained_table_again(world, first_stage):
    trained = load_file(first_stage / "nested" / "embedding_factors.safetensors")
    table = trained["A"] @ trained["B"]
    encoder = start_of(world, first_stage, r=24, mel_ranks=[8])
    assert encoder.rank == 24
    best, cut = factorize_table(table, 24), (trained["A"][:, :24], trained["B"][:24])
    product = encoder.embedding.A @ encoder.embedding.B
    torch.testing.assert_close(product, best[0] @ best[1], rtol=1e-4, atol=1e-5)
    errors = [
        (table - A @ B).square().sum() for A, B in ((encoder.embedding.A, encoder.embedding.B), cut)
    ]
    assert errors[0] < errors[1], "no worse than cutting the trained factors"


def test_a_whole_table_is_the_factors_multiplied(world, first_stage):
    trained = load_file(first_stage / "nested" / "embedding_factors.safetensors")
    encoder = start_of(world, first_stage, r=0, use_mel=False, mel_ranks=None)
    torch.testing.assert_close(encoder.embedding.weight, trained["A"] @ trained["B"])


def test_norms_of_exits_are_taken_over(world, first_stage):
    norms = load_file(first_stage / "nested" / "exit_norms.safetensors")
    assert not torch.equal(norms["1"], norms["2"])
    encoder = start_of(world, first_stage, mll_norm="per_layer")
    assert [
        torch.equal(norm.weight, norms[name])
        for norm, name in zip(encoder.norms, "12", strict=True)
    ] == [True] * 2
    shared = start_of(world, first_stage)
    assert torch.equal(shared.norms[0].weight, norms["2"]), (
        "one norm for all exits starts from the deepest one's"
    )


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_more_rank_than_the_first_stage_had_is_refused(
    world, first_stage, tmp_path, capsys, arguments
):
    code, _ = train(world, tmp_path, model_path=str(first_stage), r=48, arguments=arguments)
    assert code == 2
    assert "r: 48 is more than the 32" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_stages_end_to_end(world, first_stage, tmp_path):
    """A vanishing learning rate leaves the vectors alone; the second folder loads everywhere."""
    tiny = {"learning_rate": 1e-12, "min_lr": 0, "weight_decay": 0, "mll_norm": "per_layer"}
    code, _ = train(world, tmp_path, model_path=str(first_stage), train_steps=2, **tiny)
    assert code == 0
    second = tmp_path / "run" / "step_2"
    assert json.loads((second / "ml_embed.json").read_text())["ranks"] == [16, 32]
    for cut in ({}, {"depth": 1, "rank": 16, "dim": 16}):
        before, after = (
            Embedder.from_pretrained(folder, **cut).encode(TEXTS)
            for folder in (first_stage, second)
        )
        assert abs(before - after).max() < 1e-5
    AutoModel.from_pretrained(second)
