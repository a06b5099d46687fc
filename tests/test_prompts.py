"""Prompts: in the tokenized text, in the manifest, checked in training, and offered by the model folder."""

import json

import pyarrow.parquet as pq
import pytest
from conftest import TASKS
from test_training import train
from transformers import AutoTokenizer

import tokenize_data_qwen
from ml_embed import Embedder
from ml_embed.errors import UserError
from ml_embed.prompts import Prompts
from ml_embed.raw import RawRow

FACTS = "Instruct: Find the fact.\nQuery: "
OTHER = "Instruct: Say which kind.\nQuery: "


@pytest.fixture(scope="module")
def prompted(world, tmp_path_factory):
    """(settings of the datasets, tokenized folder): a prompt of its own for facts, another for all that begin with s,
    which also get it on half of their documents; none for topics."""
    folder = tmp_path_factory.mktemp("prompted")
    symmetric = {"prompt": OTHER, "passage_prompt": OTHER, "passage_prompt_share": 0.5}
    settings = {"facts": {"prompt": FACTS}, "s*": symmetric, "topics": {"task": "clustering"}}
    world.write_config(folder / "config.json", datasets=settings)
    flags = ["--tokenizer", str(world.backbone), "--input", str(world.raw), "--output", str(folder / "tokens")]
    assert tokenize_data_qwen.main([*flags, "--config", str(folder / "config.json")]) == 0
    return settings, folder / "tokens"


def texts(world, folder, name):
    tokenizer = AutoTokenizer.from_pretrained(world.backbone)
    queries = pq.read_table(folder / f"{name}_query.parquet").column("query_input_ids").to_pylist()
    documents = pq.read_table(folder / f"{name}_corpus.parquet").column("input_ids").to_pylist()
    return [[tokenizer.decode(ids[:-1]) for ids in column] for column in (queries, documents)]


def test_prompts_stand_in_front_of_the_tokenized_texts(world, prompted):
    _, folder = prompted
    plain = {name: texts(world, world.tokenized, name) for name in TASKS}
    got = {name: texts(world, folder, name) for name in TASKS}
    assert got["facts"] == [[FACTS + text for text in plain["facts"][0]], plain["facts"][1]]
    assert got["topics"] == plain["topics"]
    assert got["sentiment"][0] == [OTHER + text for text in plain["sentiment"][0]]
    manifest = json.loads((folder / "manifest.json").read_text())["datasets"]
    assert manifest["facts"]["prompts"] == {"query": FACTS, "passage": "", "passage_share": 1.0}
    assert manifest["sentiment"]["prompts"] == {"query": OTHER, "passage": OTHER, "passage_share": 0.5}
    assert "prompts" not in manifest["topics"]
    assert manifest["topics"]["task"] == "clustering"


@pytest.mark.parametrize("damaged", [[], {"query": 3}, {"passage_share": "much"}, "text"])
def test_a_manifest_with_damaged_prompts_is_named(damaged):
    with pytest.raises(UserError, match="are damaged"):
        Prompts.of_manifest({"prompts": damaged})


def test_a_share_of_documents_gets_the_prompt_always_the_same_ones():
    rows = [RawRow("q", f"p{i}", [f"p{i + 1}", f"n{i}"]) for i in range(2000)]
    used = Prompts("", "> ", 0.3)
    got = list(used.apply(rows, seed=1))
    assert got == list(used.apply(rows, seed=1))
    assert got != list(used.apply(rows, seed=2))
    passages = {row.passage.removeprefix("> "): row.passage for row in got}
    share = sum(text.startswith("> ") for text in passages.values()) / len(passages)
    assert share == pytest.approx(0.3, abs=0.04)
    for before, row in zip(rows, got, strict=True):
        if before.negatives[0] in passages:
            assert row.negatives[0] == passages[before.negatives[0]], "one document stays one document"
    assert all(row.passage.startswith("> ") for row in Prompts("", "> ").apply(rows, 0))
    assert list(Prompts("", "> ", 0.0).apply(rows, 0)) == rows


def test_the_model_folder_offers_the_prompts(world, prompted, tmp_path):
    settings, folder = prompted
    code, _ = train(world, tmp_path, train_data_path=str(folder), datasets=settings, train_steps=1)
    assert code == 0
    model = tmp_path / "run" / "step_1"
    expected = {"facts": FACTS, "sentiment": OTHER}
    assert json.loads((model / "config_sentence_transformers.json").read_text())["prompts"] == expected
    embedder = Embedder.from_pretrained(model)
    assert embedder.prompts == expected
    with_name, by_hand = embedder.encode(["moon1"], prompt="facts"), embedder.encode([FACTS + "moon1"])
    assert abs(with_name - by_hand).max() < 1e-6
    # A second stage on data without prompts keeps what the model offers.
    code, _ = train(world, tmp_path, "second", model_path=str(model), train_steps=1)
    assert code == 0
    assert Embedder.from_pretrained(tmp_path / "second" / "step_1").prompts == expected


def test_a_prompt_that_all_share_is_also_called_query(world, tmp_path):
    world.write_config(tmp_path / "config.json", datasets={"*": {"prompt": FACTS, "passage_prompt": "D: "}})
    flags = ["--tokenizer", str(world.backbone), "--input", str(world.raw), "--output", str(tmp_path / "tokens")]
    assert tokenize_data_qwen.main([*flags, "--config", str(tmp_path / "config.json")]) == 0
    train(world, tmp_path, train_data_path=str(tmp_path / "tokens"), datasets={}, train_steps=1)
    prompts = Embedder.from_pretrained(tmp_path / "run" / "step_1").prompts
    assert prompts == {**dict.fromkeys(TASKS, FACTS), "query": FACTS, "document": "D: "}


def test_a_config_with_other_prompts_than_the_data_is_refused(world, prompted, tmp_path, capsys):
    _, folder = prompted
    changes = {"datasets": {"facts": {"prompt": "else: "}, "topics": {"passage_prompt": "new: "}}}
    code, _ = train(world, tmp_path, train_data_path=str(folder), **changes)
    assert code == 2
    message = capsys.readouterr().err
    assert f"datasets.facts.prompt: the config says 'else: ', the data was made with {FACTS!r}" in message
    assert "datasets.topics.passage_prompt: the config says 'new: ', the data was made with ''" in message
    assert not (tmp_path / "run").exists()


def test_a_config_with_another_share_than_the_data_is_refused(world, prompted, tmp_path, capsys):
    settings, folder = prompted
    changed = {"s*": settings["s*"] | {"passage_prompt_share": 0.9}, "facts": {"passage_prompt_share": 0.2}}
    code, _ = train(world, tmp_path, train_data_path=str(folder), datasets=changed)
    assert code == 2
    message = capsys.readouterr().err
    assert "sentiment.passage_prompt_share: the config says 0.9, the data was made with 0.5" in message
    assert "facts" not in message, "no passage prompt, so its share says nothing"


def test_tokenizing_again_with_other_prompts_is_refused(world, prompted, tmp_path, capsys):
    _, folder = prompted
    before = (folder / "manifest.json").read_bytes()
    flags = ["--tokenizer", str(world.backbone), "--input", str(world.raw), "--output", str(folder)]
    assert tokenize_data_qwen.main(flags) == 2
    assert "'facts' made with other prompts than now" in capsys.readouterr().err
    assert (folder / "manifest.json").read_bytes() == before
    world.write_config(tmp_path / "config.json", datasets={"fatcs": {"prompt": FACTS}})
    assert tokenize_data_qwen.main([*flags, "--config", str(tmp_path / "config.json")]) == 2
    assert "'fatcs' matches none of the datasets" in capsys.readouterr().err
