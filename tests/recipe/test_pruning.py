"""Pruned backbones: the identity at full shape, the right dimensions at smaller ones, folders that
load and train."""

import json

import pytest
import torch
from helpers.in_process import train
from transformers import AutoModel, Qwen3Config, Qwen3Model

from ml_embed.errors import UserError
from ml_embed.prepare.tokenizer import load_tokenizer
from ml_embed.recipe.pruning import calibration_texts, most_important, prune_backbone
from scripts.prune_backbone import main

TEXTS = ["river1 stone2 light3", "moon4", "forest5 bread6 music7 winter8"]
IDS = torch.tensor([[5, 90, 301, 7, 260, 33]])


@pytest.fixture
def backbone(world, tmp_path):
    """Four layers; hidden dimensions 3, 4 and 5 and MLP dimensions 0 to 9 of every layer do
    nothing."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=384,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        max_position_embeddings=256,
    )
    model = Qwen3Model(config)
    dead = [3, 4, 5]
    model.embed_tokens.weight.data[:, dead] = 0
    for layer in model.layers:
        torch.nn.init.uniform_(layer.input_layernorm.weight, 0.5, 1.5)
        layer.self_attn.o_proj.weight.data[dead] = 0
        layer.mlp.down_proj.weight.data[dead] = 0
        layer.mlp.up_proj.weight.data[:10] = 0
    model.save_pretrained(tmp_path / "backbone")
    load_tokenizer(world.backbone).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def states(folder):
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(IDS, output_hidden_states=True)


def test_at_full_width_and_depth_it_is_the_identity(backbone, tmp_path):
    result = prune_backbone(backbone, tmp_path / "same", texts=TEXTS)
    assert result["parameters"] == result["parameters_before"]
    old, new = (
        AutoModel.from_pretrained(folder).state_dict() for folder in (backbone, tmp_path / "same")
    )
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_dimensions_that_do_nothing_are_what_goes(backbone, tmp_path):
    """Without them the model computes the same, because each norm's gain makes up for the smaller
    width."""
    result = prune_backbone(backbone, tmp_path / "pruned", None, 21, 30, TEXTS, progress=False)
    assert (result["layers"], result["hidden"], result["intermediate"]) == (4, 21, 30)
    kept = [dim for dim in range(24) if dim not in (3, 4, 5)]
    old, new = states(backbone).last_hidden_state, states(tmp_path / "pruned").last_hidden_state
    torch.testing.assert_close(new, old[..., kept], rtol=1e-3, atol=1e-4)
    table = AutoModel.from_pretrained(backbone).embed_tokens.weight
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path / "pruned").embed_tokens.weight, table[:, kept]
    )


def test_the_first_layers_are_kept_and_no_text_is_needed(backbone, tmp_path):
    prune_backbone(backbone, tmp_path / "shallow", layers=2)
    old, new = states(backbone).hidden_states, states(tmp_path / "shallow").hidden_states
    assert len(new) == 3
    torch.testing.assert_close(new[1], old[1])
    norm = AutoModel.from_pretrained(backbone).norm
    torch.testing.assert_close(new[2], norm(old[2]))


def test_the_most_important_keep_their_order_and_ties_go_to_the_first():
    assert most_important(torch.tensor([1.0, 9.0, 5.0, 5.0, 5.0]), 3).tolist() == [1, 2, 3]


def test_importance_is_measured_in_the_layers_that_are_kept(backbone, tmp_path):
    """Cutting depth and width at once is cutting depth, then width."""
    prune_backbone(backbone, tmp_path / "at_once", 2, 12, 20, TEXTS, progress=False)
    prune_backbone(backbone, tmp_path / "depth", layers=2)
    prune_backbone(tmp_path / "depth", tmp_path / "then_width", None, 12, 20, TEXTS, progress=False)
    old, new = (
        AutoModel.from_pretrained(tmp_path / name).state_dict()
        for name in ("at_once", "then_width")
    )
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_the_script_prunes_and_the_result_trains(world, backbone, tmp_path, capsys):
    flags = [
        "--layers",
        "3",
        "--hidden-size",
        "16",
        "--intermediate-size",
        "32",
        "--texts",
        str(world.raw),
    ]
    assert main(["--model", str(backbone), "--output", str(tmp_path / "small"), *flags]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["calibration_tokens"] > 100
    assert result["parameters"] == sum(
        p.numel() for p in AutoModel.from_pretrained(tmp_path / "small").parameters()
    )
    code, lines = train(
        world, tmp_path, model_path=str(tmp_path / "small"), r=8, mel_ranks=[4], train_steps=2
    )
    assert code == 0
    assert lines[-1]["loss"] > 0


def test_calibration_texts_come_from_all_files_in_turn(tmp_path):
    (tmp_path / "a.txt").write_text("a1\na2\na3\n")
    (tmp_path / "b.txt").write_text("b1\n")
    assert calibration_texts([tmp_path], 3) == ["a1", "b1", "a2"]
    assert calibration_texts([tmp_path], 99) == ["a1", "b1", "a2", "a3"]


def test_mistakes(backbone, tmp_path, capsys):
    with pytest.raises(
        UserError, match=r"layers 9 is not possible.*hidden size 25 is not possible"
    ):
        prune_backbone(backbone, tmp_path / "x", layers=9, hidden=25)
    with pytest.raises(UserError, match="no calibration text"):
        prune_backbone(backbone, tmp_path / "x", hidden=8, progress=False)
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="the model that is read"):
        prune_backbone(backbone, backbone, overwrite=True)
    assert (
        main(
            [
                "--model",
                str(backbone),
                "--output",
                str(tmp_path / "x"),
                "--preset",
                "80M",
                "--layers",
                "2",
            ]
        )
        == 2
    )
    assert "gives all three sizes" in capsys.readouterr().err
