"""Prompts: in the tokenized text, in the manifest, checked in training, and offered by the model
folder."""

import json
import random
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.in_process import train
from helpers.tiny_world import TASKS
from transformers import AutoTokenizer

import tokenize_data_qwen
from ml_embed.data.manifest import DatasetEntry
from ml_embed.errors import UserError
from ml_embed.inference.embedder import Embedder
from ml_embed.prepare import tokenization
from ml_embed.prepare.prompts import Prompts
from ml_embed.prepare.rows import RowBatch
from ml_embed.prepare.tokenization import read_blocks

FACTS = "Instruct: Find the fact.\nQuery: "
OTHER = "Instruct: Say which kind.\nQuery: "


@pytest.fixture(scope="module")
def prompted(world, tmp_path_factory):
    """(settings of the datasets, tokenized folder): a prompt of its own for facts, another for all
    that begin with s, which also get it on half of their documents; none for topics."""
    folder = tmp_path_factory.mktemp("prompted")
    symmetric = {"prompt": OTHER, "passage_prompt": OTHER, "passage_prompt_share": 0.5}
    settings = {"facts": {"prompt": FACTS}, "s*": symmetric, "topics": {"task": "clustering"}}
    world.write_config(folder / "config.json", datasets=settings)
    flags = [
        "--tokenizer",
        str(world.backbone),
        "--input",
        str(world.raw),
        "--output",
        str(folder / "tokens"),
    ]
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
    assert manifest["sentiment"]["prompts"] == {
        "query": OTHER,
        "passage": OTHER,
        "passage_share": 0.5,
    }
    assert "prompts" not in manifest["topics"]
    assert manifest["topics"]["task"] == "clustering"


@pytest.mark.parametrize("damaged", [[], {"query": 3}, {"passage_share": "much"}, "text"])
def test_a_manifest_with_damaged_prompts_is_named(damaged):
    with pytest.raises(UserError, match="are damaged"):
        Prompts.of_manifest(DatasetEntry(rows=1, documents=1, prompts=damaged))


def test_a_share_of_documents_gets_the_prompt_always_the_same_ones():
    documents = [f"p{i}".encode() for i in range(2000)]
    used = Prompts("", "> ", 0.3)
    chosen = used.choose(documents, seed=1)
    assert chosen.mean() == pytest.approx(0.3, abs=0.04)
    assert (chosen != used.choose(documents, seed=2)).any()
    assert (used.choose(documents[::-1], seed=1) == chosen[::-1]).all(), (
        "wherever a document stands"
    )
    assert Prompts("", "> ").choose(documents, 0).all()
    assert not Prompts("", "> ", 0.0).choose(documents, 0).any()
    assert not Prompts("query: ").choose(documents, 0).any()


def test_a_prompted_document_that_equals_another_is_that_one(monkeypatch):
    """Numbers count what is tokenized; blocks are as large as that."""
    monkeypatch.setattr(tokenization, "BLOCK_CHARACTERS", 30)
    generator = random.Random(0)
    texts = [f"{'> ' * (i % 3)}{i // 3}" for i in range(60)]
    rows = [(f"q{i}", *generator.choices(texts, k=1 + i % 4)) for i in range(300)]
    documents = [text for _, *texts in rows for text in texts]
    batches = [
        RowBatch(
            queries=[row[0] for row in rows[start : start + 70]],
            documents=[text.encode() for row in rows[start : start + 70] for text in row[1:]],
            characters=np.array(
                [len(text) for row in rows[start : start + 70] for text in row[1:]]
            ),
            counts=np.array([len(row) - 1 for row in rows[start : start + 70]]),
            where="here",
        )
        for start in range(0, 300, 70)
    ]
    used = Prompts("Q: ", "> ", 0.5)
    chosen = used.choose([text.encode() for text in documents], seed=3)
    prompted = [("> " if yes else "") + text for text, yes in zip(documents, chosen, strict=True)]
    assert len(set(prompted)) < len(set(documents)), "some are the same with the prompt"
    number = {text: i for i, text in enumerate(dict.fromkeys(prompted))}

    blocks = list(read_blocks(iter(batches), used, seed=3))
    assert [text for block in blocks for text in block.documents] == list(number)
    assert [text for block in blocks for text in block.queries] == [f"Q: {row[0]}" for row in rows]
    got, sizes = [], []
    for block in blocks:
        negatives = iter(block.negatives)
        before = len(got)
        for passage, count in zip(block.passages, block.negative_counts, strict=True):
            got += [passage, *islice(negatives, count)]
        sizes.append(sum(map(len, prompted[before : len(got)])) + sum(map(len, block.queries)))
        assert sizes[-1] == block.characters
    assert got == [number[text] for text in prompted]
    assert all(30 <= size < 60 for size in sizes[:-1])


def test_the_model_folder_offers_the_prompts(world, prompted, tmp_path):
    settings, folder = prompted
    code, _ = train(world, tmp_path, train_data_path=str(folder), datasets=settings, train_steps=1)
    assert code == 0
    model = tmp_path / "run" / "step_1"
    expected = {"facts": FACTS, "sentiment": OTHER}
    assert (
        json.loads((model / "config_sentence_transformers.json").read_text())["prompts"] == expected
    )
    embedder = Embedder.from_pretrained(model)
    assert embedder.prompts == expected
    with_name, by_hand = (
        embedder.encode(["moon1"], prompt="facts"),
        embedder.encode([FACTS + "moon1"]),
    )
    assert abs(with_name - by_hand).max() < 1e-6
    # A second stage on data without prompts keeps what the model offers.
    code, _ = train(world, tmp_path, "second", model_path=str(model), train_steps=1)
    assert code == 0
    assert Embedder.from_pretrained(tmp_path / "second" / "step_1").prompts == expected


def test_a_prompt_that_all_share_is_also_called_query(world, tmp_path):
    world.write_config(
        tmp_path / "config.json", datasets={"*": {"prompt": FACTS, "passage_prompt": "D: "}}
    )
    flags = [
        "--tokenizer",
        str(world.backbone),
        "--input",
        str(world.raw),
        "--output",
        str(tmp_path / "tokens"),
    ]
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
    assert (
        f"datasets.facts.prompt: the config says 'else: ', the data was made with {FACTS!r}"
        in message
    )
    assert (
        "datasets.topics.passage_prompt: the config says 'new: ', the data was made with ''"
        in message
    )
    assert not (tmp_path / "run").exists()


def test_a_config_with_another_share_than_the_data_is_refused(world, prompted, tmp_path, capsys):
    settings, folder = prompted
    changed = {
        "s*": settings["s*"] | {"passage_prompt_share": 0.9},
        "facts": {"passage_prompt_share": 0.2},
    }
    code, _ = train(world, tmp_path, train_data_path=str(folder), datasets=changed)
    assert code == 2
    message = capsys.readouterr().err
    assert (
        "sentiment.passage_prompt_share: the config says 0.9, the data was made with 0.5" in message
    )
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
