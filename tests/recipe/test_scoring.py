"""Scores of candidates against transformers' own model, one pair at a time; and a run on them."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.in_process import train
from helpers.teachers import write_cross_encoder
from helpers.tiny_models import make_tokenizer, write_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ml_embed.distributed.shares import Rows
from ml_embed.inference.text_models import load_text_model
from ml_embed.prepare.tokenization import TokenizeOptions, tokenize_folder
from ml_embed.recipe import scoring
from scripts.score_candidates import main

pytest.importorskip("sentence_transformers")
PROMPTS = ["--query-prompt", "find: ", "--passage-prompt", "text: "]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_cross_encoder(tmp_path_factory.mktemp("teacher") / "cross", make_tokenizer())


@pytest.fixture
def raw(tmp_path):
    """Two datasets: other numbers of negatives in each row, and none; one with its task inside."""
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = [
        {"query": f"which is {i}?", "passage": f"it is {i}" * (1 + i % 3), "query_id": str(i)}
        | {"negatives": [f"it is not {i}, {n}" for n in range(i % 4)]}
        for i in range(15)
    ]
    (folder / "ragged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"query": f"a {i}", "passage": f"b {i}", "score": i / 9} for i in range(4)]
    (folder / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


def arguments(teacher, raw, output, *flags):
    return ["--model", str(teacher), "--data", str(raw), "--output", str(output), *flags]


def read(path) -> list[dict]:
    return pq.read_table(path).to_pylist()


@torch.no_grad()
def naive_score(folder, query: str, document: str) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encoded = AutoTokenizer.from_pretrained(folder)(query, document, return_tensors="pt")
    return float(model(**encoded).logits[0, 0])


def test_scores_are_those_of_one_pair_at_a_time(teacher, raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scoring, "SCORED_BLOCK", 4)
    assert main(arguments(teacher, raw, tmp_path / "out", *PROMPTS)) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    given = [json.loads(line) for line in (raw / "ragged.jsonl").read_text().splitlines()]
    written = read(tmp_path / "out" / "ragged.parquet")
    highest = []
    for row, made in zip(given, written, strict=True):
        assert {name: made[name] for name in row} == row
        query, documents = f"find: {row['query']}", [row["passage"], *row["negatives"]]
        expected = [naive_score(teacher, query, f"text: {document}") for document in documents]
        found = [made["pos_score"], *made["neg_scores"]]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        if row["negatives"]:
            highest.append(expected[0] > max(expected[1:]))
    assert np.ptp([row["pos_score"] for row in written]) > 0.1
    entry = summary["datasets"]["ragged"]
    assert entry["pairs"] == sum(1 + len(row["negatives"]) for row in given)
    assert entry["passage_highest"] == round(sum(highest) / len(highest), 4)
    graded = read(tmp_path / "out" / "graded.parquet")
    assert "pos_score" not in graded[0], "pairs with graded scores are not scored"
    assert [row["score"] for row in graded] == pytest.approx([i / 9 for i in range(4)])
    assert not list((tmp_path / "out").glob(".*.scoring"))


def test_a_model_of_ours_scores_by_cosine_and_temperature(raw, tmp_path):
    model = write_model(tmp_path / "model", make_tokenizer())
    assert main(arguments(model, raw, tmp_path / "out")) == 0
    encode = load_text_model(model, "cpu").encode
    for row in read(tmp_path / "out" / "ragged.parquet"):
        texts = [row["query"], row["passage"], *row["negatives"]]
        query, *documents = encode(texts)
        expected = [query @ document / 0.05 for document in documents]
        np.testing.assert_allclose([row["pos_score"], *row["neg_scores"]], expected, atol=1e-3)


def test_an_interrupted_scoring_goes_on(teacher, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "SCORED_BLOCK", 4)
    assert main(arguments(teacher, raw, tmp_path / "whole")) == 0
    original, written = Rows._write, []

    def stops_at_the_third(self, rows, made):
        written.append(rows.start)
        if len(written) == 3:
            raise KeyboardInterrupt
        return original(self, rows, made)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "_write", stops_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            main(arguments(teacher, raw, tmp_path / "out"))
        assert not (tmp_path / "out" / "ragged.parquet").exists()
        assert main(arguments(teacher, raw, tmp_path / "out")) == 0
    assert written[:4] == [0, 4, 8, 8], "the first two blocks are not made again"
    for path in (tmp_path / "whole").glob("*.*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_scores_that_rows_have_are_replaced_only_if_asked(teacher, raw, tmp_path, capsys):
    assert main(arguments(teacher, raw, tmp_path / "once")) == 0
    assert main(arguments(teacher, tmp_path / "once", tmp_path / "twice")) == 2
    error = capsys.readouterr().err
    assert "ragged.parquet has pos_score and neg_scores already" in error
    assert "--replace-scores" in error
    assert not (tmp_path / "twice").exists()
    flags = ["--replace-scores", *PROMPTS]
    assert main(arguments(teacher, tmp_path / "once", tmp_path / "twice", *flags)) == 0
    assert main(arguments(teacher, raw, tmp_path / "other", *PROMPTS)) == 0
    assert read(tmp_path / "twice" / "ragged.parquet") == read(tmp_path / "other/ragged.parquet")


def broken_weights(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.classifier.weight.data.fill_(torch.nan)
    model.save_pretrained(folder)


def three_labels(folder):
    write_cross_encoder(folder, make_tokenizer(), labels=3)


def without_head(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (broken_weights, "gives NaN or infinity as a score for the text 'which is 0? / it is 0'"),
        (three_labels, "gives 3 numbers for a pair; take a cross-encoder that gives one score"),
        (without_head, r"is no cross-encoder (its architecture is BertModel)"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_mistakes(teacher, raw, tmp_path, capsys, change, said):
    folder = shutil.copytree(teacher, tmp_path / "model")
    change(folder)
    (raw / "graded.jsonl").unlink()
    assert main(arguments(folder, raw, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not list((tmp_path).glob("out/*.parquet"))


def test_an_activation_that_a_folder_names_is_not_called(teacher, raw, tmp_path, monkeypatch):
    """sentence-transformers calls what it finds below torch."""
    called = []
    monkeypatch.setattr(
        torch, "trap", lambda: called.append(1) or torch.nn.Sigmoid(), raising=False
    )
    folder = shutil.copytree(teacher, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    named = {"sentence_transformers": {"activation_fn": "torch.trap"}}
    named |= {"sbert_ce_default_activation_function": "torch.trap"}
    (folder / "config.json").write_text(json.dumps(config | named))
    listing = {"activation_fn": "torch.trap", "model_type": "CrossEncoder"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(listing))
    assert main(arguments(folder, raw, tmp_path / "out")) == 0
    assert not called
    assert main(arguments(teacher, raw, tmp_path / "plain")) == 0
    assert read(tmp_path / "out/ragged.parquet") == read(tmp_path / "plain/ragged.parquet")


def test_the_road_from_raw_data_to_a_run_that_learns_from_scores(teacher, world, tmp_path):
    """All three tasks; then both losses take the scores, none of which is missing."""
    assert main(arguments(teacher, world.raw, tmp_path / "scored")) == 0
    sources = {path.stem: path for path in world.raw.glob("*.parquet")}
    for name, path in sources.items():
        before, after = read(path), read(tmp_path / "scored" / f"{name}.parquet")
        assert [[row[key] for key in before[0]] for row in after] == [
            list(row.values()) for row in before
        ]
    options = TokenizeOptions(str(world.backbone), tmp_path / "scored", tmp_path / "tokenized")
    tokenize_folder(options, progress=False)
    settings = {"train_data_path": str(tmp_path / "tokenized"), "kd_weight": 5.0}
    for kind in ("kl", "margin_mse"):
        code, lines = train(world, tmp_path, kind, kd_loss=kind, **settings)
        assert code == 0
        losses = [line["distillation_loss"] for line in lines if line["split"] == "train"]
        assert all(loss > 0 for loss in losses)
