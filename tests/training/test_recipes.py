"""The published recipes: what `--dry-run` says of each, from a config and a tokenizer alone."""

import json
import shutil

import pytest
from helpers import ROOT
from helpers.in_process import train

import run as run_script
from ml_embed.config import parse_config
from ml_embed.errors import UserError
from ml_embed.model_folders.backbone import PRESETS, backbone_config

# F2LLM-v2 (arXiv 2603.19223), table 1: highest learning rate, epochs, teacher.
PUBLISHED = {
    "80M": (4e-5, 4, "0.6B"),
    "160M": (3e-5, 3, "0.6B"),
    "330M": (2e-5, 3, "0.6B"),
    "0.6B": (1e-5, 2, "1.7B"),
    "1.7B": (9e-6, 2, "4B"),
    "4B": (7e-6, 2, None),
    "8B": (6e-6, 2, None),
    "14B": (5e-6, 2, None),
}


@pytest.fixture(scope="module")
def shapes(world, tmp_path_factory):
    """Size -> a folder with the config and a tokenizer of such a model, and no weights."""
    folders = {}
    for size in PUBLISHED:
        folders[size] = folder = tmp_path_factory.mktemp("shapes") / size
        shutil.copytree(world.backbone, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        backbone_config(size, 151_936, 1, 0).save_pretrained(folder)
    return folders


def test_there_is_a_recipe_of_each_published_size():
    recipes = {path.stem for path in (ROOT / "configs" / "recipes").glob("*.json")}
    assert recipes == PUBLISHED.keys() == PRESETS.keys() - {"tiny"}


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_recipe_is_resolved_without_weights(size, shapes, world, tmp_path, capsys):
    path = ROOT / "configs" / "recipes" / f"{size}.json"
    recipe = json.loads(path.read_text())
    learning_rate, epochs, teacher = PUBLISHED[size]
    assert (recipe["learning_rate"], recipe["train_epochs"]) == (learning_rate, epochs)
    settings = {"model_path": shapes[size], "train_data_path": world.tokenized}
    settings |= {"cache_dir": tmp_path, "output_dir": tmp_path}
    if teacher:
        assert recipe["teacher_model_path"].split("/")[1] == f"recipe-{teacher}"
        assert PUBLISHED[teacher][1] == int(recipe["teacher_model_path"][-1]), "its last epoch"
        settings["teacher_model_path"] = shapes[teacher]
    flags = [f"{key}={value}" for key, value in settings.items()]
    assert run_script.main(["--config", str(path), "--dry-run", "--quiet", "--set", *flags]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["global_batch_size"], said["world_size"]) == (512, 1)
    assert said["mean_tokens_per_step"] > 0
    assert said["memory_gib"]["total"] > 0
    preset = PRESETS[size]
    assert said["exits"][-1] == preset.num_hidden_layers
    assert said["dims"][0] == preset.hidden_size >= said["ranks"][-1] == recipe["r"]


def test_a_global_batch_is_shared_equally(world):
    def samples(processes, **sizes):
        given = world.config()
        del given["train_batch_size"]
        return parse_config(given | sizes).samples_per_process(processes)

    whole = {"global_batch_size": 512}
    assert [samples(processes, **whole) for processes in (1, 8, 64)] == [512, 64, 8]
    assert samples(8, train_batch_size=64, global_batch_size=512) == 64
    assert [samples(3), samples(3, train_batch_size=5)] == [8, 5]
    with pytest.raises(UserError, match=r"512 samples cannot be shared equally by 6 processes"):
        samples(6, **whole)
    with pytest.raises(UserError, match=r"8 samples x 8 processes are 64, but global_batch"):
        samples(8, train_batch_size=8, **whole)


def test_a_global_batch_trains_as_its_share_does(world, tmp_path, capsys):
    sizes = {"share": {"train_batch_size": 6}, "whole": {"global_batch_size": 6}}
    losses = {}
    for name, size in sizes.items():
        given = world.config(name, output_dir=str(tmp_path), train_steps=2)
        del given["train_batch_size"]
        (tmp_path / f"{name}.json").write_text(json.dumps(given | size))
        assert run_script.main(["--config", str(tmp_path / f"{name}.json")]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
        resolved = json.loads((tmp_path / name / "resolved.json").read_text())
        assert resolved["global_batch_size"] == 6
    assert losses["share"] == losses["whole"]
    assert train(world, tmp_path, "no", train_batch_size=5, global_batch_size=6)[0] == 2
    assert "5 samples x 1 processes are 5" in capsys.readouterr().err
