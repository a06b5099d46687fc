"""Where data comes from goes all the way: rows, manifest, model record and card, next stages."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.in_process import train
from helpers.tiny_models import make_tokenizer, random_backbone, write_model
from huggingface_hub import ModelCard

from ml_embed.config import DatasetConfig
from ml_embed.files.digests import SEAL
from ml_embed.model_folders.averaging import Average
from ml_embed.model_folders.card import Form, origin_of, write_card
from ml_embed.model_folders.read import ModelFolder
from ml_embed.model_folders.record import ModelRecord, TrainedOn
from ml_embed.model_folders.write import save_backbone
from ml_embed.prepare.raw_parquet import write_raw
from ml_embed.prepare.rows import RawRow
from ml_embed.prepare.tokenization import TokenizeOptions, tokenize_folder
from ml_embed.recipe.pruning import prune_backbone

HUB = {"source": "ada/answers", "revision": "abc123", "license": "cc-by-4.0"}
SAID = {"gifts": DatasetConfig(source="https://example.org/gifts", license="odbl|1.0")}


def write_rows(path, word, notes=None):
    rows = [RawRow(f"{word} {n}", f"{word} stone {n}", []) for n in range(12)]
    write_raw(path, rows, "retrieval", notes and (lambda: notes))


@pytest.fixture(scope="module")
def tokenized(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("provenance")
    (folder / "raw").mkdir()
    write_rows(folder / "raw" / "answers.parquet", "moon", {"provenance": HUB})
    write_rows(folder / "raw" / "gifts.parquet", "river")
    write_rows(folder / "raw" / "found.parquet", "harbour")
    tokenize_folder(options(world, folder, datasets=SAID), progress=False)
    return folder


def options(world, folder, **changes):
    return TokenizeOptions(str(world.backbone), folder / "raw", folder / "tokenized", **changes)


def said_by(folder):
    entries = json.loads((folder / "tokenized" / "manifest.json").read_text())["datasets"]
    return {name: entry.get("provenance") for name, entry in entries.items()}


def test_the_manifest_has_what_the_data_and_the_config_say(world, tokenized, caplog):
    gifts = {"source": "https://example.org/gifts", "license": "odbl|1.0"}
    assert said_by(tokenized) == {"answers": HUB, "gifts": gifts, "found": None}
    caplog.set_level("INFO", "ml_embed")  # a license that is corrected costs no tokenizing
    before = (tokenized / "tokenized" / "gifts_query.parquet").stat().st_mtime_ns
    corrected = {"*": DatasetConfig(license="mit"), **SAID}
    tokenize_folder(options(world, tokenized, datasets=corrected), progress=False)
    assert "answers: source, revision and license are written anew" in caplog.messages
    renewed = {"answers": HUB | {"license": "mit"}, "gifts": gifts, "found": {"license": "mit"}}
    assert said_by(tokenized) == renewed
    assert (tokenized / "tokenized" / "gifts_query.parquet").stat().st_mtime_ns == before
    tokenize_folder(options(world, tokenized, datasets=SAID), progress=False)
    assert said_by(tokenized)["found"] is None


def test_models_carry_it_on(world, tokenized, tmp_path):
    settings = {
        "train_data_path": str(tokenized / "tokenized"),
        "cache_dir": str(tmp_path / "cache"),
        "train_steps": 1,
        "valid_fraction": 0.25,
    }
    found = {"found": {"revision": "v2"}}  # what the config of training adds
    assert train(world, tmp_path, "first", datasets=found, **settings)[0] == 0
    resolved = json.loads((tmp_path / "first" / "resolved.json").read_text())
    rows = {plan["name"]: plan["train_rows"] for plan in resolved["datasets"]}
    assert 0 < rows["answers"] <= 12
    own = (
        TrainedOn("answers", **HUB, rows=rows["answers"]),
        TrainedOn("found", revision="v2", rows=rows["found"]),
        TrainedOn("gifts", "https://example.org/gifts", None, "odbl|1.0", rows["gifts"]),
    )
    model = tmp_path / "first" / "step_1"
    origin = ModelRecord.load(model).origin
    assert (origin.trained_on, origin.all_data_known) == (own, True)
    card = ModelCard.load(model / "README.md")
    assert card.data.datasets == ["ada/answers"]
    assert f"| answers | ada/answers | abc123 | cc-by-4.0 | {rows['answers']} |" in card.text
    gifts = f"https://example.org/gifts | not known | odbl&#124;1.0 | {rows['gifts']} |"
    assert gifts in card.text
    assert "is not known." not in card.text

    # the next stage, from the world's own data, whose manifest says nothing
    prune_backbone(model, tmp_path / "pruned", layers=1)
    further = {"model_path": str(tmp_path / "pruned"), "train_steps": 1, "mll_layers": [1]}
    assert train(world, tmp_path, "second", datasets={}, **further)[0] == 0
    after = ModelRecord.load(tmp_path / "second" / "step_1").origin
    assert after.trained_on[:3] == own, "the chain goes through the pruned backbone"
    assert after.all_data_known
    assert after.datasets[3:] == tuple(sorted(world_datasets(world)))


def world_datasets(world):
    return {path.stem.removesuffix("_query") for path in world.tokenized.glob("*_query.parquet")}


def test_data_that_are_not_known_are_not_claimed(tmp_path):
    """Of a start that gives vectors already, or of an older record, nobody can say "no others"."""
    tokenizer = make_tokenizer()

    def model(name, ema_decay=0.0, **origin):
        folder = write_model(tmp_path / name, tokenizer)
        path = folder / "ml_embed.json"
        record = json.loads(path.read_text()) | {"origin": origin, "ema_decay": ema_decay}
        del record[SEAL]
        path.write_text(json.dumps(record))
        return str(folder)

    older = model("older", datasets=["facts"])
    origin = ModelRecord.load(Path(older)).origin
    assert origin.trained_on == (TrainedOn("facts"),)
    assert not origin.all_data_known
    facts = {"trained_on": [{"dataset": "a", "rows": 5}], "all_data_known": True}
    known = model("known", ema_decay=0.9, **facts)
    mixed = Average.of([known, older]).record()
    assert mixed.ema_decay == 0, "not that of the first"
    both = mixed.origin
    assert both.trained_on == (TrainedOn("a", rows=5), TrainedOn("facts"))
    assert not both.all_data_known
    same = shutil.copytree(known, tmp_path / "same")
    mean = Average.of([known, str(same)]).record().origin
    assert mean.trained_on == (TrainedOn("a", rows=5),), "each once"
    assert mean.all_data_known

    plain = tmp_path / "plain"
    plain.mkdir()
    save_backbone(plain, random_backbone(tokenizer), tokenizer)
    record = ModelFolder.open(plain).record
    further = origin_of(plain, record, both.trained_on, ())
    assert (further.trained_on, further.all_data_known) == (both.trained_on, True)
    (plain / "README.md").write_text("---\nlicense: [mit, apache-2.0]\nlanguage: [en, no]\n---\n")
    (plain / "modules.json").write_text(Path(older, "modules.json").read_text())
    embedding = origin_of(plain, record, both.trained_on, ())
    assert not embedding.all_data_known
    assert embedding.languages == ("en", "no")
    lines = replace(embedding, trained_on=(TrainedOn("b", "two\nlines", license="x\r\n|y"),))
    write_card(tmp_path, replace(record, origin=lines), Form("onnx", "", 7, 64))
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "mit, apache-2.0")
    assert "What was trained on before these datasets is not known." in card.text
    assert "| b | two lines | not known | x &#124;y | not known |\n" in card.text
