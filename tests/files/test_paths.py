"""What users give as paths: home folders, runs in place of models, places that refuse writing."""

import json
import re
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.scripts import load_script

from ml_embed import Embedder
from ml_embed.commands import tokenize
from ml_embed.errors import UserError, one_line
from ml_embed.files.model_source import find_model_folder
from ml_embed.files.paths import (
    check_model_output,
    check_writable,
    expand_home,
    home_path,
    is_hub_name,
)
from ml_embed.inference.text_models import load_text_model
from ml_embed.model_folders.export import export_model


def test_home_is_expanded_and_nothing_else_is_changed(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    written = ["~/models/x", "~", "./models/x", "models/~x", "~nobody-of-that-name/x", "x/"]
    expected = ["/home/ada/models/x", "/home/ada", *written[2:]]
    assert [expand_home(path) for path in written] == expected
    assert home_path("~/x") == home_path(Path("~/x")) == Path("/home/ada/x")


def test_home_in_flags_that_a_shell_does_not_expand(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    options = tokenize.parse_arguments(
        ["--tokenizer=x", "--input=x", "--output=~/out", "--config=~/c.json"]
    )
    assert (options.output, options.config) == (Path("/home/ada/out"), Path("/home/ada/c.json"))
    for command in (ROOT / "ml_embed" / "commands").glob("[!b]*.py"):
        assert "type=Path" not in command.read_text(encoding="utf-8"), command


def test_hub_names_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "here").mkdir(parents=True)
    assert all(map(is_hub_name, ["Qwen/Qwen3-0.6B", "gpt2", "models/elsewhere"]))
    paths = [
        "/nowhere/x",
        "./x",
        "../x",
        ".x",
        "~/x",
        "a/b/c",
        "name/",
        "models/here",
        "models",
        tmp_path,
    ]
    assert not any(map(is_hub_name, paths))


@pytest.fixture
def offline(monkeypatch):
    """Where the hub is asked all the same, that fails at once and with another message."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("read", [find_model_folder, load_text_model, Embedder.from_pretrained])
def test_a_path_that_is_missing_is_not_looked_for_on_the_hub(read, tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    for given in ("./missing", "models/", Path("./missing"), Path("a/b")):
        with pytest.raises(UserError, match=f"model folder {given} does not exist"):
            read(given)


@pytest.mark.parametrize(
    "command",
    ["export_model.py --output new --model", "prune_backbone.py --output new --model"],
)
def test_scripts_do_not_take_a_missing_path_for_a_hub_name(
    command, tmp_path, monkeypatch, capsys, offline
):
    monkeypatch.chdir(tmp_path)
    name, *flags = command.split()
    assert load_script(name.removesuffix(".py")).main([*flags, "./missing"]) == 2
    assert "model folder ./missing does not exist" in capsys.readouterr().err


def test_only_trained_folders_are_exported(world, tmp_path):
    with pytest.raises(UserError, match="is not a trained model folder"):
        export_model(world.backbone, tmp_path / "new")


def test_places_are_tried_without_leaving_anything(tmp_path):
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("precious")
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError, match=f"--output {place}.* is a file"):
            check_writable(place)
    with pytest.raises(UserError, match="--work /proc/x/y cannot be written"):
        check_writable(Path("/proc/x/y"), "--work")


def test_only_model_folders_are_replaced(tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    for folder, config in ((model, {"model_type": "qwen3"}), (run, {"model_path": "models/x"})):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "link_to_proc").symlink_to("/proc/x/y")
    for free in (tmp_path / "empty", tmp_path / "new"):
        check_model_output(free, overwrite=False)
    for replaced in (model, tmp_path / "link"):
        check_model_output(replaced, overwrite=True)
    for output, overwrite, source, message in (
        (model, False, None, "exists already"),
        (run, True, None, "not a model folder"),
        (model, True, model, "is, or holds, the model that is read"),
        (model, True, model / "step_1", "is, or holds, the model that is read"),
        (tmp_path / "link", False, None, "exists already"),
        (tmp_path / "link", True, model, "is, or holds, the model that is read"),
        (Path("/proc/x/y"), True, None, "cannot be written"),
        (tmp_path / "link_to_proc", False, None, "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            check_model_output(output, overwrite, source)


# Nothing else that the commands name exists: a place that cannot be written is noticed first.
COMMANDS = (
    "evaluate.py --model /nowhere --data /nowhere --output",
    "evaluate_mteb.py --model /nowhere --tasks SciFact --output",
    "export_model.py --model /nowhere --output",
    "import_model.py --model /nowhere --output",
    "init_backbone.py --preset tiny --tokenizer /nowhere --output",
    "prune_backbone.py --model /nowhere --output",
    "embed_teacher.py --model /nowhere --data /nowhere --tokenizer /nowhere --output",
    "mine_hard_negatives.py --model /nowhere --input /nowhere --output",
    "make_sample_datasets.py --output . --eval-output",
    "make_sample_datasets.py --eval-output . --output",
    "build_sample_data.py --package /nowhere --output",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_scripts_look_at_their_output_before_they_work(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, *flags = command.split()
    assert load_script(name.removesuffix(".py")).main([*flags, "/proc/x/y"]) == 2
    assert re.match(rf"error: {flags[-1]} /proc/x(/y)? cannot be written", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a reason\nand more", "a reason"),
        ("\nErrors:\n\t in x:\n\t  size\nmore", "Errors: in x: size"),
        ("", "ValueError"),
        ("end:", "end:"),
    ],
)
def test_the_reason_is_one_line(text, line):
    assert one_line(ValueError(text)) == line
