"""Mined negatives against a naive version: one query, one document at a time, plain Python
lists."""

import itertools
import json
import random
import shutil
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.tiny_models import make_tokenizer, write_model

from ml_embed.distributed.shares import Rows
from ml_embed.errors import UserError
from ml_embed.inference.text_models import load_text_model
from ml_embed.prepare.inputs import Source
from ml_embed.prepare.own_data import import_source, open_origins
from ml_embed.prepare.raw import RawDataset, notes_in_file, task_in_file
from ml_embed.prepare.raw_parquet import TASK_METADATA, write_raw
from ml_embed.prepare.rows import RawRow
from ml_embed.recipe import ann, mining, rewriting
from ml_embed.recipe.ann import Approximation
from ml_embed.recipe.mining import Filter, MiningOptions, filter_neighbours
from scripts.mine_hard_negatives import main

DOCUMENTS = 60


def mine_folder(model, source, output, rule, progress=True, **options):
    return mining.mine_folder(model, MiningOptions(source, output, rule, **options), progress)


class WordModel:
    """Texts to vectors by their pairs of letters: related texts are near, and it costs nothing."""

    name, dim, device = "letters", 16, torch.device("cpu")
    identity: ClassVar[dict[str, str]] = {"letters": "1"}
    calls = 0
    of_pair = np.random.default_rng(0).normal(size=(997, dim)).astype(np.float32)

    def encode(self, texts):
        WordModel.calls += 1
        rows = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for first, second in itertools.pairwise(text):
                row += self.of_pair[(ord(first) * 31 + ord(second)) % 997]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Repeated queries with several right passages, a query that is a document, negatives that are
    passages."""
    folder = tmp_path_factory.mktemp("raw")
    rng = random.Random(0)
    documents = [
        "".join(rng.choice("abcdefgh ") for _ in range(30)) + str(i) for i in range(DOCUMENTS)
    ]
    rows = [
        {
            "query": f"{documents[i % 20][:12]} {i % 25}",
            "passage": documents[i],
            "negatives": rng.sample(documents, 2),
        }
        for i in range(40)
    ]
    rows.append({"query": documents[3], "passage": documents[4], "negatives": []})
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "letters.jsonl").write_text(lines)
    (folder / "few.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:3]))
    return folder


def naive_ranking(rows, model, query_prompt="", passage_prompt=""):
    """For each row, the positive's cosine and (cosine, text) of all documents that are no right
    answers, best first."""

    def vector(text):
        return model.encode([text])[0].astype(np.float64)

    documents = list(
        dict.fromkeys(text for row in rows for text in (row["passage"], *row["negatives"]))
    )
    vectors = {text: vector(passage_prompt + text) for text in documents}
    for row in rows:
        query = vector(query_prompt + row["query"])
        right = {other["passage"] for other in rows if other["query"] == row["query"]} | {
            row["query"]
        }
        ranked = sorted(
            ((query @ vectors[text], text) for text in documents if text not in right), reverse=True
        )
        yield query @ vectors[row["passage"]], ranked


def naive(rows, model, rule, **prompts):
    """The published filter, from its words."""
    mined = []
    for positive, ranked in naive_ranking(rows, model, **prompts):
        limit = min(rule.max_score, rule.max_ratio * positive)
        kept = [text for score, text in ranked[: rule.top][rule.skip :] if score < limit]
        mined.append(kept[: rule.count])
    return mined


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "rule",
    [
        Filter(),
        Filter(top=20, skip=2, max_score=0.7, max_ratio=0.9, count=4),
        Filter(top=5, skip=0, max_score=2),
    ],
)
def test_mined_negatives_are_the_naive_ones(raw, tmp_path, monkeypatch, rule):
    monkeypatch.setattr(mining, "QUERY_BLOCK", 7)
    prompts = {"query_prompt": "find: ", "passage_prompt": "text: "}
    summary = mine_folder(WordModel(), raw, tmp_path, rule, **prompts, progress=False)
    for name in ("letters", "few"):
        rows = read(raw / f"{name}.jsonl")
        mined = pq.read_table(tmp_path / f"{name}.parquet").to_pylist()
        assert [(row["query"], row["passage"]) for row in mined] == [
            (row["query"], row["passage"]) for row in rows
        ]
        expected = naive(rows, WordModel(), rule, **prompts)
        assert [row["negatives"] for row in mined] == expected
        counts = list(map(len, expected))
        entry = summary["datasets"][name]
        assert (entry["rows"], entry["negatives"]) == (len(rows), sum(counts))
        assert entry["rows_without_negatives"] == counts.count(0)
    assert sum(map(len, naive(read(raw / "letters.jsonl"), WordModel(), rule, **prompts))) > 20
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [
        "few.parquet",
        "letters.parquet",
        "mining.json",
    ]
    assert not list(tmp_path.glob(".*.mining")), "working files are gone"


def test_the_filter_by_hand():
    scores = torch.tensor([[0.99, 0.9, 0.79, 0.7, 0.5, -torch.inf]])
    documents = torch.arange(10, 16).unsqueeze(0)
    kept = filter_neighbours(scores, documents, torch.tensor([0.8]), Filter(top=5, skip=1, count=3))
    assert kept.tolist() == [[13, 14, -1]], "0.79 is not below 95 % of 0.8"
    kept = filter_neighbours(
        scores, documents, torch.tensor([0.99]), Filter(top=4, skip=1, count=3)
    )
    assert kept.tolist() == [[12, 13, -1]], "0.9 is not below 0.8, and only four were looked at"


@pytest.mark.parametrize("labelled", [True, False])
def test_no_negative_has_the_label_of_its_query(tmp_path, labelled):
    """By the label, where the data was made of labels; else by the texts that its rows pair."""
    labels = ("red", "green", "blue")
    texts = {label: [f"{label[:2]} {word} text" for word in "abcdefghij"] for label in labels}
    label_of = {text: label for label in labels for text in texts[label]}
    (tmp_path / "raw").mkdir()
    if labelled:
        rows = [{"text": text, "label": label} for text, label in label_of.items()]
        (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = Source(str(tmp_path / "colours.jsonl"))
        import_source(source, None, open_origins(tmp_path / "raw"), 0, progress=False)
    else:  # pairs of neighbours make one chain of each label
        rows = [
            {"query": first, "passage": second, "negatives": texts[other][:4]}
            for label, other in zip(labels, labels[1:] + labels[:1], strict=True)
            for first, second in itertools.pairwise(texts[label])
        ]
        table = pa.Table.from_pylist(rows).replace_schema_metadata({TASK_METADATA: "clustering"})
        pq.write_table(table, tmp_path / "raw/colours.parquet")
    rule = Filter(top=100, skip=0, max_score=2, max_ratio=2, count=100)
    mine_folder(WordModel(), tmp_path / "raw", tmp_path / "mined", rule, progress=False)
    mined = pq.read_table(tmp_path / "mined/colours.parquet").to_pylist()
    assert len(mined) == (30 if labelled else 27)
    for row in mined:
        assert label_of[row["query"]] == label_of[row["passage"]]
        assert row["negatives"], "there is something to find"
        assert label_of[row["query"]] not in {label_of[text] for text in row["negatives"]}


def test_pairs_whose_positive_is_not_found_can_be_dropped(raw, tmp_path, monkeypatch):
    """`keep_if_in_top`: fewer than so many other documents are nearer than the positive."""
    monkeypatch.setattr(mining, "QUERY_BLOCK", 7)
    rows = read(raw / "letters.jsonl")
    places = [
        sum(score > positive for score, _ in ranked)
        for positive, ranked in naive_ranking(rows, WordModel())
    ]
    for most in (1, 4):
        rule = Filter(top=3, skip=0, keep_if_in_top=most)
        summary = mine_folder(WordModel(), raw, tmp_path / str(most), rule, progress=False)
        mined = pq.read_table(tmp_path / str(most) / "letters.parquet").to_pylist()
        kept = [row for row, place in zip(rows, places, strict=True) if place < most]
        expected = [
            texts
            for texts, place in zip(naive(rows, WordModel(), rule), places, strict=True)
            if place < most
        ]
        assert 0 < len(kept) < len(rows)
        assert [(row["query"], row["passage"]) for row in mined] == [
            (row["query"], row["passage"]) for row in kept
        ]
        assert [row["negatives"] for row in mined] == expected
        entry = summary["datasets"]["letters"]
        assert (entry["rows"], entry["rows_not_in_top"]) == (len(kept), len(rows) - len(kept))


def test_an_interrupted_mining_goes_on(raw, tmp_path, monkeypatch):
    """It stops in the middle of encoding, then in the middle of searching; what was done is not
    done again."""
    monkeypatch.setattr(mining, "ENCODED_BLOCK", 10)
    monkeypatch.setattr(mining, "QUERY_BLOCK", 5)
    whole = tmp_path / "whole"
    WordModel.calls = 0
    mine_folder(WordModel(), raw, whole, Filter(), progress=False)
    calls_of_whole = WordModel.calls

    class Stops(WordModel):
        left = 4

        def encode(self, texts):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().encode(texts)

    WordModel.calls = 0
    with pytest.raises(KeyboardInterrupt):
        mine_folder(Stops(), raw, tmp_path / "parts", Filter(), progress=False)
    searching, original = iter(range(3)), mining.nearest

    def stops(*args):
        if next(searching, None) is None:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(mining, "nearest", stops)
        with pytest.raises(KeyboardInterrupt):
            mine_folder(WordModel(), raw, tmp_path / "parts", Filter(), progress=False)
    mine_folder(WordModel(), raw, tmp_path / "parts", Filter(), progress=False)
    assert WordModel.calls == calls_of_whole
    for name in ("letters", "few"):
        assert (tmp_path / "parts" / f"{name}.parquet").read_bytes() == (
            whole / f"{name}.parquet"
        ).read_bytes()
    WordModel.calls = 0
    mine_folder(WordModel(), raw, whole, Filter(), progress=False)
    assert WordModel.calls == 0, "nothing is left to do"


@pytest.fixture
def sixty_are_many(monkeypatch):
    """The approximate search also for small data: of the dataset `letters`, but not of `few`."""
    pytest.importorskip("faiss")
    monkeypatch.setattr(ann, "FEWEST_DOCUMENTS", 30)
    monkeypatch.setattr(ann, "BLOCK", 16)
    monkeypatch.setattr(mining, "QUERY_BLOCK", 7)


@pytest.fixture
def letters(raw, tmp_path):
    """A folder with this one dataset."""
    (tmp_path / "raw").mkdir()
    shutil.copy(raw / "letters.jsonl", tmp_path / "raw")
    return tmp_path / "raw"


WIDE = Filter(top=20, skip=2, max_score=2, max_ratio=2)


@pytest.mark.usefixtures("sixty_are_many")
def test_an_approximate_search_of_all_cells_mines_the_exact_negatives(raw, tmp_path, monkeypatch):
    notices: list[str] = []
    monkeypatch.setattr(mining, "notice", notices.append)
    mine_folder(WordModel(), raw, tmp_path / "exact", WIDE, progress=False)
    summary = mine_folder(
        WordModel(), raw, tmp_path / "ann", WIDE, approximation=Approximation(nprobe=1000)
    )
    for name in ("letters", "few"):
        exact, approximate = (
            pq.read_table(tmp_path / folder / f"{name}.parquet") for folder in ("exact", "ann")
        )
        assert exact.equals(approximate)
    entry = summary["datasets"]["letters"]
    queries = len({row["query"] for row in read(raw / "letters.jsonl")})
    assert (entry["search"], entry["recall"], entry["recall_queries"]) == ("ann", 1.0, queries)
    assert entry["cells"] > 10
    few = summary["datasets"]["few"]
    assert few["search"] == "exact"
    assert few["why_exact"].endswith("documents are fewer than 30")
    assert summary == json.loads((tmp_path / "ann" / "mining.json").read_text())
    assert summary["settings"].items() >= {"search": "ann", "nprobe": 1000, "code_bits": 4}.items()
    said = "\n".join(notices)
    assert "letters: finds 100.0% of the exact 20 nearest" in said
    assert "few: searched exactly" in said
    assert not list((tmp_path / "ann").glob(".*.mining")), "working files are gone"


@pytest.mark.usefixtures("sixty_are_many")
def test_the_recall_told_is_that_of_the_neighbours_found(letters, tmp_path, monkeypatch):
    """Without a filter the file holds the neighbours; the exact ones come from the naive
    ranking."""

    def unfiltered(scores, documents, positive, rule):
        return documents.masked_fill(scores == -torch.inf, -1)

    monkeypatch.setattr(mining, "filter_neighbours", unfiltered)
    settings = {"rule": Filter(top=10, skip=0, count=10), "approximation": Approximation(nprobe=2)}
    summary = mine_folder(WordModel(), letters, tmp_path, **settings, progress=False)
    rows = read(letters / "letters.jsonl")
    found = pq.read_table(tmp_path / "letters.parquet").column("negatives").to_pylist()
    hits, exact = {}, {}
    for row, texts, (_, ranked) in zip(rows, found, naive_ranking(rows, WordModel()), strict=True):
        exact[row["query"]] = {text for _, text in ranked[:10]}
        hits[row["query"]] = len(exact[row["query"]].intersection(texts))
    share = sum(hits.values()) / sum(map(len, exact.values()))
    assert summary["datasets"]["letters"]["recall"] == pytest.approx(share, abs=1e-4)
    assert 0.1 < share < 0.95, "or the number would show nothing"


@pytest.mark.usefixtures("sixty_are_many")
def test_the_script_hands_the_search_on(letters, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "ml_embed.inference.text_models.load_text_model", lambda name, device: WordModel()
    )
    flags = ["--model", "letters", "--input", str(letters), "--output", str(tmp_path / "mined")]
    assert main([*flags, "--search", "ann", "--nprobe", "7", "--code-bits", "8"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["settings"].items() >= {"search": "ann", "nprobe": 7, "code_bits": 8}.items()
    assert 0 < summary["datasets"]["letters"]["recall"] <= 1


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.usefixtures("sixty_are_many")
def test_an_interrupted_approximate_search_goes_on(letters, tmp_path, monkeypatch):
    """It stops while codes are made, and before the search; then --nprobe is raised. Nothing is
    made again."""
    trained, write, train = [], Rows._write, ann._trained
    monkeypatch.setattr(ann, "_trained", lambda *args: trained.append(1) or train(*args))

    def stops_at_the_second_block_of_codes(file, rows, made):
        if file.path.name == "codes.bin" and rows.start:
            raise KeyboardInterrupt
        return write(file, rows, made)

    def mine(folder, nprobe):
        return mine_folder(
            WordModel(),
            letters,
            tmp_path / folder,
            WIDE,
            approximation=Approximation(nprobe),
            progress=False,
        )

    def is_interrupted(place, name, replacement=interrupt, nprobe=2):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, replacement)
            with pytest.raises(KeyboardInterrupt):
                mine("parts", nprobe)

    codes = tmp_path / "parts" / ".letters.mining" / "codes.bin"
    (tmp_path / "parts").mkdir()
    WordModel.calls = 0
    is_interrupted(Rows, "_write", stops_at_the_second_block_of_codes)
    half = codes.read_bytes().rstrip(b"\0")
    assert half, "one block is there"
    is_interrupted(ann, "recall")
    full = codes.read_bytes().rstrip(b"\0")
    assert full.startswith(half)
    assert len(full) > len(half)

    def writes_no_codes(file, rows, made):
        assert file.path.name != "codes.bin", "the index serves other settings of the search, too"
        return write(file, rows, made)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "_write", writes_no_codes)
        is_interrupted(mining, "filter_neighbours", nprobe=5)
        mine("parts", 5)
    assert trained == [1]
    calls, WordModel.calls = WordModel.calls, 0
    mine("whole", 5)
    assert calls == WordModel.calls, "no text was encoded twice"
    for name in ("letters.parquet", "mining.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(UserError, match="nprobe was 5, now 2"):
        mine("whole", 2)
    with pytest.raises(UserError, match="search was 'ann', now 'exact'"):
        mine_folder(WordModel(), letters, tmp_path / "whole", WIDE, progress=False)


@pytest.mark.usefixtures("sixty_are_many")
def test_an_index_of_other_vectors_is_not_used(letters, tmp_path, monkeypatch):
    """Neither with codes of another length, nor with another prompt."""
    other, approximation = {"passage_prompt": "text: "}, Approximation(nprobe=1000, code_bits=8)
    exact = mine_folder(WordModel(), letters, tmp_path / "exact", WIDE, **other, progress=False)
    for interrupted in (
        {"approximation": Approximation(nprobe=1000)},
        {"approximation": approximation},
    ):
        with monkeypatch.context() as patch:
            patch.setattr(mining, "filter_neighbours", interrupt)
            with pytest.raises(KeyboardInterrupt):
                mine_folder(
                    WordModel(), letters, tmp_path / "ann", WIDE, **interrupted, progress=False
                )
    summary = mine_folder(
        WordModel(),
        letters,
        tmp_path / "ann",
        WIDE,
        approximation=approximation,
        **other,
        progress=False,
    )
    assert (
        summary["datasets"]["letters"]["negatives"]
        == exact["datasets"]["letters"]["negatives"]
        > 100
    )
    assert pq.read_table(tmp_path / "ann/letters.parquet").equals(
        pq.read_table(tmp_path / "exact/letters.parquet")
    )


def test_labels_are_not_mined(tmp_path):
    """By the name's task, and by what a file says of itself; clustering is mined and goes on saying
    so."""
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = [
        {"query": f"text number {i}", "passage": "good", "negatives": ["bad"]} for i in range(3)
    ]
    (folder / "imdb.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, task in (("own", "classification"), ("groups", "clustering")):
        table = pa.Table.from_pylist(rows).replace_schema_metadata({TASK_METADATA: task})
        pq.write_table(table, folder / f"{name}.parquet")
    mine_folder(WordModel(), folder, tmp_path / "mined", Filter(top=5, skip=0), progress=False)
    for name, task in (
        ("imdb", "classification"),
        ("own", "classification"),
        ("groups", "clustering"),
    ):
        file = tmp_path / "mined" / f"{name}.parquet"
        assert task_in_file(RawDataset(name, file)) == task
        assert (pq.read_table(file).to_pylist() == rows) == (task == "classification")


def test_pairs_with_scores_are_not_mined(tmp_path):
    """Training takes them as similarity, which has no negatives."""
    (tmp_path / "in").mkdir()
    rows = [
        {"query": f"text {i}", "passage": f"text {i + 1}", "negatives": [], "score": i / 4}
        for i in range(5)
    ]
    (tmp_path / "in/graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rule = Filter(top=9, skip=0, keep_if_in_top=1)
    mine_folder(WordModel(), tmp_path / "in", tmp_path / "out", rule, progress=False)
    mined = pq.read_table(tmp_path / "out/graded.parquet").to_pylist()
    assert [{name: row[name] for name in rows[0]} for row in mined] == rows


def test_what_else_a_row_holds_is_kept(tmp_path):
    """All but the scores of the old negatives; no passage of the same query is a negative."""
    rows = [
        {"query": "ab", "passage": "abc", "query_id": "1", "language": "sw", "score": 0.5,
         "negatives": ["xyz", "xy"], "neg_scores": [0.5, 0.25]},
        {"query": "ba", "passage": "abcd", "query_id": "1", "pos_score": 2.0, "negatives": []},
        {"query": "xx", "passage": "yx", "negatives": []},
    ]  # fmt: skip
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rule = Filter(top=9, skip=0, count=9, max_score=2, max_ratio=2)
    mine_folder(WordModel(), tmp_path / "in", tmp_path / "out", rule, progress=False)
    mined = pq.read_table(tmp_path / "out/x.parquet").to_pylist()
    for name in ("query_id", "language", "score", "pos_score"):
        assert [row[name] for row in mined] == [row.get(name) for row in rows]
    assert "neg_scores" not in mined[0]
    for row in mined[:2]:
        assert row["negatives"]
        assert not {"abc", "abcd"} & set(row["negatives"]), "not the other's passage"


def test_folders_that_hold_something_else_are_not_mixed_with(raw, tmp_path):
    mine_folder(WordModel(), raw, tmp_path, Filter(), progress=False)
    with pytest.raises(UserError, match="count was 24, now 3"):
        mine_folder(WordModel(), raw, tmp_path, Filter(count=3), progress=False)
    mine_folder(WordModel(), raw, tmp_path, Filter(count=3), overwrite=True, progress=False)
    mined = pq.read_table(tmp_path / "letters.parquet").column("negatives").to_pylist()
    assert max(map(len, mined)) == 3
    other = tmp_path / "other"
    other.mkdir()
    (other / "few.parquet").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"exists, but is not recorded in mining\.json"):
        mine_folder(WordModel(), raw, other, Filter(), progress=False)
    assert (other / "few.parquet").read_bytes() == b"precious"
    with pytest.raises(UserError, match=r"are both .*: write to another --output"):
        mine_folder(WordModel(), raw, raw, Filter(), progress=False)


def test_a_raw_file_that_a_machine_does_not_have_is_named_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl .*; give a folder that all machines share"):
        rewriting._source_here(tmp_path / "a.jsonl")


def test_another_model_of_the_same_name_is_refused_and_a_damaged_file_made_again(raw, tmp_path):
    rule = Filter(count=2)
    mine_folder(WordModel(), raw, tmp_path, rule, progress=False)
    whole = {path: path.read_bytes() for path in tmp_path.glob("*.parquet")}

    class Retrained(WordModel):
        identity: ClassVar[dict[str, str]] = {"letters": "2"}

    with pytest.raises(UserError, match=r"files was \{'letters': '1'\}, now \{'letters': '2'\}"):
        mine_folder(Retrained(), raw, tmp_path, rule, progress=False)
    damaged = bytearray(whole[tmp_path / "few.parquet"])
    damaged[40] ^= 1
    (tmp_path / "few.parquet").write_bytes(damaged)
    mine_folder(WordModel(), raw, tmp_path, rule, progress=False)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.parquet")} == whole


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_overwrite_goes_on(raw, tmp_path, monkeypatch, overwrite):
    changed, output = Filter(count=3), tmp_path / "mined"
    mine_folder(WordModel(), raw, output, Filter(), progress=False)
    original, made = rewriting._rewrite_dataset, []

    def stops_at_the_second(dataset, *args):
        made.append(dataset.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        original(dataset, *args)

    with monkeypatch.context() as patch:
        patch.setattr(rewriting, "_rewrite_dataset", stops_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            mine_folder(WordModel(), raw, output, changed, overwrite=True, progress=False)
    with pytest.raises(UserError, match="count was 3, now 24"):
        mine_folder(WordModel(), raw, output, Filter(), progress=False)
    first = (output / f"{made[0]}.parquet").stat().st_mtime_ns
    mine_folder(WordModel(), raw, output, changed, overwrite=overwrite, progress=False)
    assert (output / f"{made[0]}.parquet").stat().st_mtime_ns == first
    mine_folder(WordModel(), raw, tmp_path / "whole", changed, progress=False)
    for path in (tmp_path / "whole").glob("*.*"):
        assert (output / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("rule", [Filter(), Filter(count=3)])
def test_datasets_that_the_input_no_longer_has_are_refused_or_removed(raw, tmp_path, rule):
    """Removed with `overwrite`, whether the others are made anew for it or are kept."""
    source, output = shutil.copytree(raw, tmp_path / "raw"), tmp_path / "mined"
    mine_folder(WordModel(), source, output, Filter(), progress=False)
    (output / ".few.mining").mkdir()
    (output / "mine.parquet").write_bytes(b"precious")
    (source / "few.jsonl").unlink()
    with pytest.raises(UserError, match=r"holds what the input does not have: 'few'.*--overwrite"):
        mine_folder(WordModel(), source, output, Filter(), progress=False)
    assert (output / "few.parquet").is_file()
    summary = mine_folder(WordModel(), source, output, rule, overwrite=True, progress=False)
    assert list(summary["datasets"]) == ["letters"]
    assert json.loads((output / "mining.json").read_text()) == summary
    assert sorted(
        path.name for path in output.iterdir() if path.suffix in {".parquet", ".mining"}
    ) == [
        "letters.parquet",
        "mine.parquet",
    ]


@pytest.mark.parametrize("kind", ["queries", "documents"])
def test_vectors_that_are_not_finite_are_refused(raw, tmp_path, kind):
    row = read(raw / "few.jsonl")[0]

    class Damaged(WordModel):
        def encode(self, texts):
            rows = super().encode(texts)
            rows[
                [text == row[{"queries": "query", "documents": "passage"}[kind]] for text in texts]
            ] = np.nan
            return rows

    text = row[{"queries": "query", "documents": "passage"}[kind]]
    said = rf"the model gives NaN or infinity for the text '{text[:20]}"
    with pytest.raises(UserError, match=said):
        mine_folder(Damaged(), raw, tmp_path, Filter(), progress=False)
    assert not list(tmp_path.glob("*.parquet"))


def test_the_script_with_a_model_of_ours(raw, tmp_path, capsys):
    folder = write_model(tmp_path / "model", make_tokenizer())
    flags = [
        "--input",
        str(raw),
        "--output",
        str(tmp_path / "mined"),
        "--max-score",
        "2",
        "--max-ratio",
        "2",
    ]
    assert main(["--model", str(folder), *flags]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["datasets"]["letters"]["negatives"] > 100
    rows = read(raw / "letters.jsonl")
    mined = pq.read_table(tmp_path / "mined" / "letters.parquet").column("negatives").to_pylist()
    expected = naive(rows, load_text_model(folder), Filter(max_score=2, max_ratio=2))
    agreeing = [a == b for a, b in zip(mined, expected, strict=True)]
    assert sum(agreeing) > 0.9 * len(rows), "but for scores that are equal to the last bits"


def test_sentence_transformers_models_give_the_same_vectors(tmp_path):
    """Our folders load there too, so both ways to read one can be compared."""
    pytest.importorskip("sentence_transformers")
    folder = write_model(tmp_path / "model", make_tokenizer())
    own = load_text_model(folder)
    (folder / "ml_embed.json").unlink()
    theirs = load_text_model(folder)
    assert type(own) is not type(theirs)
    texts = ["a text", "another one"]
    np.testing.assert_allclose(own.encode(texts), theirs.encode(texts), atol=2e-5)
    assert own.dim == theirs.dim


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--skip", "100"], "--skip 100 must be from 0 to less than --top 100"),
        (["--count", "0"], "--count is 0"),
        (["--max-score", "-1"], "--max-score is -1.0"),
        (["--nprobe", "3"], "--nprobe is for --search ann"),
        (["--search", "ann", "--nprobe", "0"], "--nprobe is 0; it must be at least 1"),
        (["--search", "ann", "--code-bits", "3"], "--code-bits is 3; it must be one of 8, 4, 2"),
        ([], "/nowhere does not exist"),
    ],
)
def test_mistakes(raw, tmp_path, capsys, flags, message):
    assert (
        main(
            ["--model", "/nowhere", "--input", str(raw), "--output", str(tmp_path / "out"), *flags]
        )
        == 2
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_faiss_the_message_says_how_to_install_it(raw, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ann.importlib.util, "find_spec", lambda name: None)
    flags = [
        "--model",
        "/nowhere",
        "--input",
        str(raw),
        "--output",
        str(tmp_path / "out"),
        "--search",
        "ann",
    ]
    assert main(flags) == 2
    assert "pip install 'ml-embed[ann]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_noted_of_the_data_stays(tmp_path):
    notes = {"prompt": "ask: ", "provenance": {"source": "ada/words"}, "left_out": {"faulty": 2}}
    rows = [RawRow(f"word {n}", f"word {n} {n + 1}", []) for n in range(8)]
    (tmp_path / "raw").mkdir()
    write_raw(tmp_path / "raw" / "words.parquet", rows, notes=lambda: notes)
    rule = Filter(top=3, skip=0, max_score=2)
    mine_folder(WordModel(), tmp_path / "raw", tmp_path / "mined", rule, progress=False)
    mined = notes_in_file(RawDataset("words", tmp_path / "mined" / "words.parquet"))
    assert mined == notes
