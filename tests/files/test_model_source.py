"""Models named on the hub: read just as from a folder, wherever a model can be named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.in_process import train
from helpers.scripts import load_script
from helpers.tiny_models import PROMPTS, TEXTS, make_tokenizer, write_model
from huggingface_hub.utils import filter_repo_objects

from ml_embed import Embedder
from ml_embed.errors import UserError
from ml_embed.evaluation.cube import evaluate_baseline, evaluate_cube
from ml_embed.files.model_identity import model_identity
from ml_embed.files.model_source import (
    find_model_folder,
    find_released_folder,
    find_tokenizer_folder,
)
from ml_embed.inference.text_models import OwnModel, SentenceTransformersModel, load_text_model
from ml_embed.model_folders.export import export_model
from ml_embed.model_folders.record import ModelRecord
from ml_embed.prepare.tokenizer import load_tokenizer

COMMIT = "0123456789" * 4
FILES = (
    "config.json",
    "model-00001-of-00002.safetensors",
    "pytorch_model.bin",
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
    "2_Dense/pytorch_model.bin",
    "nested/embedding_factors.safetensors",
    "tokenizer.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "U.pth",
    "optimizer.pt",
    "modeling_qwen.py",
    "onnx/model.onnx",
)


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "nested", make_tokenizer(), "per_layer")


@pytest.fixture
def hub(nested, tmp_path, monkeypatch):
    """A cache of the hub that holds ada/nested; whoever asks the hub itself fails."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    put_on_hub(cache, "ada/nested", nested)
    return cache


def put_on_hub(cache: Path, name: str, folder: Path) -> None:
    """Lay a folder out as a download does: files as links to blobs, under a commit."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "blobs")
    for path in sorted((repository / "blobs").rglob("*")):
        place = repository / "snapshots" / COMMIT / path.relative_to(repository / "blobs")
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            place.symlink_to(path)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def test_a_nested_model_keeps_its_cuts_and_prompts(hub, nested):
    cut = {"rank": 16, "depth": 1, "dim": 16}
    model = Embedder.from_pretrained("ada/nested", **cut, device="cpu")
    assert (model.rank, model.depth, model.dim, model.prompts) == (16, 1, 16, PROMPTS)
    expected = Embedder.from_pretrained(nested, **cut, device="cpu").encode(
        TEXTS, prompt_name="query"
    )
    np.testing.assert_array_equal(model.encode(TEXTS, prompt_name="query"), expected)
    with pytest.raises(UserError, match="dim 24 was not trained"):
        Embedder.from_pretrained("ada/nested", dim=24)


def test_a_text_model_is_read_as_one_of_ours_and_keeps_its_name(hub, nested):
    model = load_text_model("ada/nested", "cpu")
    assert isinstance(model, OwnModel)
    assert model.name == "ada/nested"
    expected = load_text_model(nested, "cpu").encode(TEXTS)
    np.testing.assert_array_equal(model.encode(TEXTS), expected)


def test_a_model_of_sentence_transformers(hub, nested, tmp_path):
    pytest.importorskip("sentence_transformers")
    other = shutil.copytree(nested, tmp_path / "other")
    (other / "ml_embed.json").unlink()
    put_on_hub(hub, "bob/other", other)
    model = load_text_model("bob/other", "cpu")
    assert isinstance(model, SentenceTransformersModel)
    assert model.name == "bob/other"
    np.testing.assert_array_equal(model.encode(TEXTS), load_text_model(other, "cpu").encode(TEXTS))


def test_evaluation(hub, nested, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [
        {"query": TEXTS[i], "passage": TEXTS[i + 1], "negatives": [TEXTS[i + 3]]} for i in (0, 3)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"device": "cpu", "progress": False}
    result = evaluate_cube("ada/nested", data, **options)
    assert result == evaluate_cube(nested, data, **options) | {"model": "ada/nested"}
    assert {row["rank"] for row in result["rows"]} == {16, 32}
    assert evaluate_baseline("ada/nested", data, result, **options)["model"] == "ada/nested"


def test_export(hub, nested, tmp_path):
    export_model("ada/nested", tmp_path / "named", rank=16)
    export_model(nested, tmp_path / "folder", rank=16)
    assert ModelRecord.load(tmp_path / "named") == ModelRecord.load(tmp_path / "folder")
    assert model_identity(tmp_path / "named") == model_identity(tmp_path / "folder")


def test_a_tokenizer(hub, tmp_path):
    tokenizer = load_tokenizer(find_tokenizer_folder("ada/nested"))
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    flags = ["--preset", "tiny", "--tokenizer", "ada/nested", "--output", str(tmp_path / "new")]
    assert load_script("init_backbone").main(flags) == 0
    assert load_tokenizer(tmp_path / "new").get_vocab() == tokenizer.get_vocab()


def test_training_and_its_teacher(hub, world, tmp_path):
    put_on_hub(hub, "ada/backbone", world.backbone)
    clock = {"time", "seconds", "tokens_per_second"}
    lines = {}
    for run, model in (("named", "ada/backbone"), ("folder", str(world.backbone))):
        settings = {"model_path": model, "teacher_model_path": model, "train_steps": 1}
        code, metrics = train(world, tmp_path, run, **settings)
        assert code == 0
        lines[run] = [{k: v for k, v in line.items() if k not in clock} for line in metrics]
        assert json.loads((tmp_path / run / "config.json").read_text())["model_path"] == model
    assert lines["named"] == lines["folder"]
    assert lines["named"][0]["distillation_loss"] > 0


def test_what_is_not_on_the_hub_is_said(hub):
    for find in (find_model_folder, find_tokenizer_folder):
        with pytest.raises(UserError, match=r"bob/none is not a folder here.*Without network"):
            find("bob/none")


def test_no_pickle_and_no_code_is_fetched(monkeypatch):
    fetched = {}

    def record(name: str, allow_patterns: list[str]) -> str:
        fetched[name] = set(filter_repo_objects(FILES, allow_patterns=allow_patterns))
        return "/nowhere"

    monkeypatch.setattr("huggingface_hub.snapshot_download", record)
    find_model_folder("ada/model")
    find_tokenizer_folder("ada/tokenizer")
    left = {file for file in FILES if Path(file).suffix in (".bin", ".pth", ".pt", ".py", ".onnx")}
    assert fetched["ada/model"] == set(FILES) - left
    find_released_folder("ada/model")  # the one command that reads a pickle asks for its factors
    assert fetched["ada/model"] == set(FILES) - left | {"U.pth"}
    weights = {file for file in FILES if file.endswith(".safetensors")}
    assert fetched["ada/tokenizer"] == set(FILES) - left - weights


def test_a_path_is_never_a_name(hub):
    for given in ("./ada/nested", Path("ada/nested"), "ada/nested/"):
        with pytest.raises(UserError, match="does not exist"):
            find_model_folder(given)
