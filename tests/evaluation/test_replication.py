"""Replication by language on tiny models and tasks, against mteb's own evaluation and by hand."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import ROOT
from helpers.hub_cache import environment, put_dataset, put_model
from helpers.tiny_models import make_tokenizer, write_model
from helpers.tiny_runs import Launch

from ml_embed.commands import replicate as command
from ml_embed.evaluation import query_scores, verification
from ml_embed.evaluation.comparing import ScoredLanguage, macro_rows, rows_of_language
from ml_embed.evaluation.query_scores import (
    METRICS,
    Bm25System,
    ModelSystem,
    ModelVectors,
    QueryScores,
)
from ml_embed.evaluation.replication import Asked, Systems
from ml_embed.files.digests import sealed
from ml_embed.model_folders.cut import Cut
from ml_embed.model_folders.record import Origin, TrainedOn
from ml_embed.prepare.beir import read_collection
from ml_embed.sample_data.search_tasks import write_search_tasks

pytest.importorskip("mteb")
pytest.importorskip("bm25s")
import mteb
from datasets import Dataset

from ml_embed.evaluation.mteb import model as mteb_model
from ml_embed.evaluation.suites import (
    SUITES,
    Part,
    find_parts,
    resource_class,
    training_rows,
)

LANGUAGES = ("swa-Latn", "yor-Latn")
CUTS = ["--rank", "16", "--depth", "1", "--dim", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two models, and tasks in two languages."""
    place = tmp_path_factory.mktemp("replication")
    write_model(place / "model", make_tokenizer())
    write_model(place / "other", make_tokenizer(), factorized=False)
    write_search_tasks(place / "all")
    for language in LANGUAGES:
        shutil.copytree(place / "all" / language, place / "tasks" / language)
    return place


def run(*arguments: object) -> int:
    return command.main([*map(str, arguments), "--quiet"])


def flags(place: Path, output: Path, *more: object) -> list[object]:
    given = ["--model", place / "model", "--suite", "own", "--data", place / "tasks"]
    return [*given, "--output", output, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def result(place) -> dict:
    """Three axes cut, beside BM25 and another model."""
    output = place / "results"
    assert run(*flags(place, output, *CUTS, "--baselines", "bm25", place / "other")) == 0
    return json.loads((output / "replication.json").read_text())


@pytest.fixture(scope="module")
def small(place) -> Path:
    """The file of one language and one axis, so that --verify takes every row."""
    output = place / "small"
    more = ["--languages", "yor", "--rank", "16", "--baselines", "bm25"]
    assert run(*flags(place, output, *more)) == 0
    return output / "replication.json"


def row_of(result: dict, language: str, *cut: int, baseline: str | None = None) -> dict:
    (row,) = (
        row
        for row in result["rows"]
        if row["language"] == language
        and (
            row.get("baseline") == baseline
            if baseline
            else [row.get(axis) for axis in ("rank", "depth", "dim")] == list(cut)
        )
    )
    return row


def test_scores_are_mtebs_own(result, place):
    """Of a cut and of the uncut model by mteb's own loop, on a model that encodes by itself."""
    (part,) = find_parts("own", ["yor"], place / "tasks")
    for cut in ((16, 1, 8), (32, 3, 64)):
        sizes = dict(zip(("rank", "depth", "dim"), cut, strict=True))
        encoder = mteb_model(place / "model", **sizes, device="cpu")
        found = mteb.evaluate(
            encoder, part.task, cache=None, co2_tracker=False, show_progress_bar=False
        )
        (scores,) = found.task_results[0].scores["test"]
        row = row_of(result, "yor-Latn", *cut)
        assert row["ndcg_at_10"] == pytest.approx(scores["ndcg_at_10"], abs=2e-5)
        assert row["recall_at_100"] == pytest.approx(scores["recall_at_100"], abs=2e-5)
        assert 0 < row["ndcg_at_10"] < 1


def test_a_row_per_language_and_system(result, place):
    cuts = [(r, d, n) for r in (16, 32) for d in (1, 3) for n in (8, 64)]
    names = ["bm25", str(place / "other")]
    assert len(result["rows"]) == len(LANGUAGES) * (len(cuts) + len(names))
    for language in LANGUAGES:
        uncut = row_of(result, language, 32, 3, 64)
        assert (uncut["ratio"], uncut["queries"], uncut["bytes_per_vector"]) == (1, 30, 256)
        assert set(uncut["against"]) == set(names)
        for cut in cuts:
            row = row_of(result, language, *cut)
            assert row["ratio"] == pytest.approx(row["ndcg_at_10"] / uncut["ndcg_at_10"])
            assert row["texts_per_second"] > 0
            for name, comparison in row["against"].items():
                other = uncut if name == "uncut" else row_of(result, language, baseline=name)
                value, low, high = comparison["difference"]
                assert value == pytest.approx(row["ndcg_at_10"] - other["ndcg_at_10"], abs=1e-9)
                assert low <= value <= high
                apart = comparison["p_holm"] < 0.05
                words = ("worse", "better")[value > 0] if apart else "cannot be told apart"
                assert comparison["verdict"] == words
        kept = {cut: row_of(result, language, *cut)["ratio"] for cut in cuts}
        by_hand = kept[16, 1, 8] - kept[16, 3, 64] * kept[32, 1, 64] * kept[32, 3, 8]
        value, low, high = row_of(result, language, 16, 1, 8)["interaction"]
        assert value == pytest.approx(by_hand)
        assert low <= value <= high
        assert "interaction" not in row_of(result, language, 16, 3, 64)
    said = {c["verdict"] for row in result["rows"] for c in row.get("against", {}).values()}
    assert len(said) > 1


def test_the_macro_mean_is_that_of_languages_and_groups(result):
    for macro in result["macro"]:
        cut = [macro.get(axis) for axis in ("rank", "depth", "dim")]
        rows = [row_of(result, of, *cut, baseline=macro.get("baseline")) for of in LANGUAGES]
        assert macro["languages"] == list(LANGUAGES)
        for metric in ("ndcg_at_10", "recall_at_100"):
            assert macro[metric] == pytest.approx(np.mean([row[metric] for row in rows]))
    assert {macro["group"] for macro in result["macro"]} == {"all languages", "class 2"}
    assert [resource_class(of) for of in ("tel-Telu", "zho-Hans", "acm-Arab")] == [1, 5, None]


def test_the_same_questions_are_drawn_together_in_all_languages():
    """Two languages that find the same are as uncertain together as each is alone."""
    rng, whole = np.random.default_rng(0), Cut(0, 3, 64)
    values = [dict.fromkeys(METRICS, rng.random(40)) for _ in range(2)]
    columns = [{"rank": 0, "depth": 3, "dim": dim} for dim in (8, 64)]

    def language(name: str, queries: str) -> ScoredLanguage:
        asked = tuple(f"{queries}{number}" for number in range(40))
        scores = {"task": [QueryScores(asked, own) for own in values]}
        return ScoredLanguage(name, None, columns, whole, scores)

    def interval(rows: list[dict]) -> list[float]:
        return rows[0]["against"]["uncut"]["difference"]

    _, low, high = interval(rows_of_language(language("swa-Latn", "q"), 0))
    same = [language("swa-Latn", "q"), language("yor-Latn", "q")]
    assert interval(macro_rows(same, 0))[1:] == pytest.approx([low, high])
    _, narrow_low, narrow_high = interval(macro_rows([same[0], language("yor-Latn", "p")], 0))
    assert narrow_high - narrow_low < 0.85 * (high - low)


def test_the_file_names_what_it_is_about(result, place):
    read = read_collection(place / "tasks" / "yor-Latn", "test")
    (task,) = (task for task in result["tasks"] if task["language"] == "yor-Latn")
    assert (task["queries"], task["documents"]) == (len(read.queries), len(read.documents))
    assert task["training_rows"] == "unknown"
    assert result["versions"]["mteb"] == mteb.__version__
    assert result["model"]["device_type"] == "cpu"
    page = (place / "results" / "replication.html").read_text()
    assert page.count('role="img"') == 1 + 7, "one of the groups, one per cut"
    for picture in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(picture)
    assert "cannot be told apart" in page
    assert str(place / "other") in page


def test_what_is_there_is_not_computed_again(small, place, monkeypatch, capsys):
    """A call that is interrupted is continued, by (task, language, system)."""
    output, more = place / "resumed", ["--rank", "16", "--baselines", "bm25"]
    calls, score = [], query_scores.score_queries

    def interrupted(part, searcher):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(part.language)
        return score(part, searcher)

    monkeypatch.setattr(query_scores, "score_queries", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*flags(place, output, *more))
    assert calls == [LANGUAGES[0]] * 3 + [LANGUAGES[1]]
    damaged = output / "scores" / "tasks" / LANGUAGES[0] / "bm25.json"
    damaged.write_text(damaged.read_text().replace("0.0", "1.0", 1))
    calls.clear()
    assert run(*flags(place, output, *more)) == 0
    assert calls == [LANGUAGES[0]] + [LANGUAGES[1]] * 2
    assert "bm25.json is damaged; it is made anew" in capsys.readouterr().err
    rows = json.loads((output / "replication.json").read_text())["rows"]
    unbroken = json.loads(small.read_text())["rows"]
    resumed = [row for row in rows if row["language"] == LANGUAGES[1]]
    assert list(verification.differing(unbroken, resumed)) == []
    shutil.rmtree(output / "scores" / "tasks" / LANGUAGES[0])
    calls.clear()
    assert run(*flags(place, output, "--languages", "yor", *more)) == 0
    assert calls == []


def changed(file: Path, tmp_path: Path, change) -> Path:
    """A copy with a change, sealed as if it had been written so."""
    result = json.loads(file.read_text())
    change(result)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(sealed(result)))
    return path


def uncut_row(result: dict) -> dict:
    return row_of(result, "yor-Latn", 32, 3, 64)


CHANGES = {
    "rank 16: recall_at_100 was": lambda r: r["rows"][0].update(recall_at_100=0.5),
    "yor-Latn, bm25: recall_at_100 was": lambda r: r["rows"][-1].update(recall_at_100=0.5),
    "against.uncut.difference[2] was": lambda r: r["rows"][0]["against"]["uncut"].update(
        difference=[*r["rows"][0]["against"]["uncut"]["difference"][:2], 0.0]
    ),
    "yor-Latn: digest was 0, is": lambda r: r["tasks"][0].update(digest="0"),
    "against.bm25.p_holm was 2": lambda r: uncut_row(r)["against"]["bm25"].update(p_holm=2.0),
    "macro, all languages, depth 3, dim 64, rank 16: ndcg_at_10 was": lambda r: r["macro"][
        0
    ].update(ndcg_at_10=0.5),
    "macro, all languages, depth 3, dim 64, rank 16: recall_at_100 was": lambda r: r["macro"][
        0
    ].update(recall_at_100=0.25),
}


def test_a_replication_that_holds_is_verified(small, capsys):
    assert run("--verify", small) == 0
    assert "holds" in capsys.readouterr().out
    assert not list(small.parent.glob(".ver*"))


def test_a_file_where_nothing_can_be_written_is_verified(small, capsys):
    with small.open() as file:
        assert run("--verify", f"/dev/fd/{file.fileno()}") == 0, capsys.readouterr().err


def test_a_baseline_may_lie_elsewhere_here(small, place, tmp_path, capsys):
    there, here = tmp_path / "there", tmp_path / "here"
    shutil.copytree(place / "other", there)
    more = ["--languages", "yor", "--baselines", "bm25", there]
    assert run(*flags(place, tmp_path / "out", *more)) == 0
    there.rename(here)
    file = tmp_path / "out" / "replication.json"
    capsys.readouterr()
    assert run("--verify", file) == 2
    assert f"{there}" in capsys.readouterr().err
    assert run("--verify", file, "--baselines", "bm25", here) == 0, capsys.readouterr().err
    assert run("--verify", file, "--baselines", here) == 2
    assert "the file has 2" in capsys.readouterr().err
    assert run("--verify", file, "--baselines", "bm25", place / "model") == 2
    assert f"{there}: the file is about" in capsys.readouterr().err


def test_a_baseline_is_the_same_on_every_device(tmp_path, monkeypatch):
    """Its content is, as is BM25 of another version; scores are kept apart."""

    def systems(device: str) -> Systems:
        model = SimpleNamespace(
            identity={"w": "1"}, prompts={}, device=SimpleNamespace(type=device)
        )
        other = ModelSystem("m", ModelVectors(lambda: model, tmp_path, False), np.array)
        return Systems({}, [other, Bm25System()], lambda: None)

    asked, found = Asked("m", "own", baselines=("m", "bm25")), []
    for number, device in enumerate(("cpu", "cuda")):
        monkeypatch.setattr("importlib.metadata.version", lambda _, number=number: f"{number}")
        made = systems(device)
        found.append((made.revisions(asked), [of.made_of for of in made.baselines]))
    (revisions, scores), (others, other_scores) = found
    assert revisions == others
    assert [a == b for a, b in zip(scores, other_scores, strict=True)] == [False, False]


def test_one_score_that_is_not_so_fails(small, tmp_path, capsys):
    """A difference of 2e-4."""

    def change(result: dict) -> None:
        result["rows"][0]["ndcg_at_10"] += 2e-4

    assert run("--verify", changed(small, tmp_path, change)) == 2
    lines = capsys.readouterr().err.strip().splitlines()[1:]
    assert len(lines) == 3, "the score, and the means of its groups"
    assert "yor-Latn, depth 3, dim 64, rank 16: ndcg_at_10 was" in lines[0]


def test_a_score_that_is_not_drawn_breaks_its_means(small, tmp_path, capsys):
    """Too small to be seen in the row itself, as is one of many languages in the mean."""

    def change(result: dict) -> None:
        result["rows"][0]["ndcg_at_10"] += 5e-5

    assert run("--verify", changed(small, tmp_path, change)) == 2
    lines = capsys.readouterr().err.strip().splitlines()[1:]
    assert ["macro" in line for line in lines] == [True, True], lines


def test_whatever_is_not_so_is_said(small, tmp_path, capsys):
    def change(result: dict) -> None:
        for each in CHANGES.values():
            each(result)

    assert run("--verify", changed(small, tmp_path, change)) == 2
    found = capsys.readouterr().err
    assert [said for said in CHANGES if said not in found] == []

    def others(result: dict) -> None:
        result["model"]["revision"] = result["baselines"]["bm25"] = "0"

    assert run("--verify", changed(small, tmp_path, others)) == 2
    found = capsys.readouterr().err
    assert "the model or its prompts: the file is about 0" in found
    assert "bm25: the file is about 0" in found


def test_verify_takes_a_twentieth_of_this_very_file(result, small, place, tmp_path, capsys):
    (tmp_path / "edited.json").write_text(small.read_text().replace('"seed": 0', '"seed": 1'))
    assert run("--verify", tmp_path / "edited.json") == 2
    assert "has changed since it was written" in capsys.readouterr().err
    assert run("--verify", small, "--model", place / "other") == 2
    odd = changed(small, tmp_path, lambda result: result["asked"].update(model_name="x"))
    assert run("--verify", odd) == 2
    assert "is not so" in capsys.readouterr().err
    assert run("--verify", tmp_path / "none.json") == 2
    assert "does not exist" in capsys.readouterr().err
    checked = []

    def check(row, *_):
        checked.append(row)
        return iter(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "_check_row", check)
        assert run("--verify", place / "results" / "replication.json") == 0
        assert len(checked) == 3
        patch.setattr(verification, "SHARE", 4)
        assert run("--verify", place / "results" / "replication.json", "--seed", 3) == 0
    assert len(checked) == 3 + 4, "a fourth of 16"
    drawn = {(row["language"], row["rank"], row["depth"], row["dim"]) for row in checked[3:]}
    assert len(drawn) == 4


def test_a_dry_run_loads_nothing(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(query_scores, "load_task", None)
    given = ["--model", place / "model", "--suite", "miracl-hn", "--languages", "yor"]
    assert run(*given, *CUTS, "--output", tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "MIRACLRetrievalHardNegatives.v2, yor-Latn      119     49,043" in printed
    assert f"{(119 + 49_043) * 2 * 64 * 4 / 1e9:.3g} GB" in printed
    assert "0 of 8" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--suite", "miracl-hn", "--languages", "yor", "xyz"], "--languages xyz: the suite"),
        (["--suite", "miracl-hn", "--depth", "9"], "depth 9 is not possible"),
        (["--suite", "own"], "--suite own needs --data"),
        (["--suite", "own", "--data", "PLACE"], "holds no folder in BEIR's form"),
        (["--suite", "own", "--data", "PLACE/misnamed"], "must be named by its language"),
        (["--suite", "nano", "--data", "PLACE"], "--data is of --suite own"),
        (["--suite", "miracl-hn", "--baselines", "uncut"], "called uncut"),
        (["--suite", "nano", "--verify", "x.json"], "leave --suite"),
        (["--suite", "nano", "--seed", "1"], "--seed is of --verify"),
        ([], "give --suite, or --mock or --verify FILE"),
    ],
)
def test_mistakes_are_messages(place, tmp_path, capsys, given, said):
    (place / "misnamed").mkdir(exist_ok=True)
    if not (place / "misnamed" / "Swahili").exists():
        (place / "misnamed" / "Swahili").symlink_to(place / "tasks" / "swa-Latn")
    words = [word.replace("PLACE", str(place)) for word in given]
    output = [] if "--verify" in given else ["--output", tmp_path / "out"]
    assert run("--model", place / "model", *words, *output) == 2
    assert said in capsys.readouterr().err


def test_data_that_is_wrong_or_cannot_be_reached_is_a_message(place, tmp_path, capsys, monkeypatch):
    shutil.copytree(place / "tasks", tmp_path / "tasks")
    with (tmp_path / "tasks" / "swa-Latn" / "qrels" / "test.tsv").open("a") as file:
        file.write("q1\td1.0\t0.5\nq1\tnone\t1\nq1\td1.0\tnan\n")
    given = ["--model", place / "model", "--suite", "own", "--data", tmp_path / "tasks"]
    assert run(*given, "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "line 122: relevance 0.5 must be a whole number" in said
    assert "line 123: nothing has the corpus-id 'none'" in said
    assert "line 124: not a query, a document and a number" in said

    def unreachable(*_):
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr("mteb.abstasks.retrieval.RetrievalDatasetLoader", unreachable)
    given = ["--model", place / "model", "--suite", "miracl-hn", "--languages", "yor"]
    assert run(*given, "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "'mteb/MIRACLRetrievalHardNegatives' could not be loaded" in said[0]
    assert "set HF_HOME" in said[0]


@pytest.mark.slow
def test_a_public_suite_and_a_model_come_from_the_hub(place, tmp_path):
    """Both by name out of a cache, mteb's own MIRACL task through its own loader."""
    name, home = "mteb/MIRACLRetrievalHardNegatives", tmp_path / "hub"
    read = read_collection(place / "tasks" / "yor-Latn", "test")
    pairs = [(q, d, score) for q, of in read.relevant.items() for d, score in of.items()]
    texts = {"queries": read.queries, "corpus": read.documents}
    for kind, of in texts.items():
        put_dataset(home, name, f"yo-{kind}", kind, {"_id": list(of), "text": list(of.values())})
    columns = dict(zip(("query-id", "corpus-id", "score"), zip(*pairs, strict=True), strict=True))
    put_dataset(home, name, "yo-qrels", "dev", columns)
    put_model(home, "ada/nested", place / "model")

    given = ["--model", "ada/nested", "--suite", "miracl-hn", "--languages", "yor", "--quiet"]
    command = [sys.executable, ROOT / "scripts" / "replicate.py", *given, "--device", "cpu"]
    subprocess.run(
        [*map(str, command), "--output", str(tmp_path / "out")],
        env=os.environ | environment(home),
        check=True,
    )
    result = json.loads((tmp_path / "out" / "replication.json").read_text())
    (row,) = result["rows"]
    (task,) = result["tasks"]
    assert row["queries"] == len(read.queries)
    assert task["source"] == {"path": name, "revision": "d7d94fa4b946cec4a27c84653aa0cf6b33f74a3c"}
    own = [*flags(place, tmp_path / "own"), "--languages", "yor"]
    assert run(*own) == 0
    (expected,) = json.loads((tmp_path / "own" / "replication.json").read_text())["rows"]
    for metric in ("ndcg_at_10", "recall_at_100"):
        assert row[metric] == pytest.approx(expected[metric], abs=1e-9)


def test_suites_are_there_in_mteb():
    parts = {suite: find_parts(suite) for suite in SUITES}
    languages = {suite: {part.language for part in of} for suite, of in parts.items()}
    assert {suite: len(of) for suite, of in languages.items()} == {
        "nano": 11,
        "miracl-hn": 18,
        "miracl": 18,
        "belebele": 122,
    }
    assert len(parts["nano"]) == 13 * 11
    for suite in ("nano", "miracl"):
        assert all(resource_class(language) is not None for language in languages[suite])
    assert all(part.task.hf_subsets == [part.subset] for of in parts.values() for part in of)


def test_a_config_gives_the_prompts_of_tasks(result, place, tmp_path):
    name = result["tasks"][0]["task"]
    config = tmp_path / "prompts.json"
    config.write_text(json.dumps({"datasets": {name: {"prompt": "tafuta: "}}}))
    assert run(*flags(place, tmp_path / "by_task", "--config", config)) == 0
    assert run(*flags(place, tmp_path / "given", "--query-prompt", "tafuta: ")) == 0
    by_task, given = (
        [
            row["ndcg_at_10"]
            for row in json.loads((tmp_path / folder / "replication.json").read_text())["rows"]
            if row["language"] == result["tasks"][0]["language"]
        ]
        for folder in ("by_task", "given")
    )
    assert by_task == given
    assert run("--verify", tmp_path / "by_task" / "replication.json", "--device", "cpu") == 0
    config.write_text(json.dumps({"datasets": {name: {"prompt": "uliza: "}}}))
    assert run("--verify", tmp_path / "by_task" / "replication.json", "--device", "cpu") == 2


def test_tasks_without_any_prompt_are_named(place, tmp_path, capsys):
    given = ["--languages", "yor", "--query-prompt", "", "--passage-prompt", ""]
    assert command.main([*map(str, flags(place, tmp_path / "out", *given))]) == 0
    assert "no prompt stood in front of the texts of tasks\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "datasets", "answer"),
    [
        ("MIRACLRetrievalHardNegatives.v2", ["msmarco", "miracl_sw_train"], "yes"),
        ("MIRACLRetrievalHardNegatives.v2", ["msmarco", "mr-tydi_swahili"], "same source"),
        ("MIRACLRetrieval", ["msmarco", "admiral"], "no"),
        ("MIRACLRetrieval", [], "unknown"),
        ("MultilingualNanoFiQA2018Retrieval", ["fiqa"], "yes"),
        ("MultilingualNanoNQRetrieval", ["unq", "nqx"], "no"),
        ("BelebeleRetrieval", ["FLORES-200"], "same source"),
    ],
)
def test_training_rows_go_by_names(task, datasets, answer):
    part = Part(SimpleNamespace(metadata=SimpleNamespace(name=task)), "swa-Latn", "sw", {})
    all_known = Origin(trained_on=tuple(map(TrainedOn, datasets)), all_data_known=True)
    assert training_rows(part, all_known) == answer
    some_known = dataclasses.replace(all_known, all_data_known=False)
    assert training_rows(part, some_known) == ("unknown" if answer == "no" else answer)
    by_source = [TrainedOn(f"set_{i}", f"owner/{name}") for i, name in enumerate(datasets)]
    assert training_rows(part, dataclasses.replace(all_known, trained_on=by_source)) == answer


def test_bm25_finds_nothing_by_nothing():
    """A query that shares nothing with a document has no answer, and counts 0."""
    searcher = query_scores.Bm25Searcher("swa-Latn")
    searcher.index(Dataset.from_dict({"id": ["a", "b"], "text": ["moja mbili", "tatu"]}))
    queries = Dataset.from_dict({"id": ["1", "2"], "text": ["mbili", "nne"]})
    found = searcher.search(queries, top_k=5)
    assert found["1"].keys() == {"a"}
    assert found["2"] == {}


@pytest.mark.slow
def test_the_processes_of_a_launch_encode_together(result, place, tmp_path):
    more = [*CUTS, "--baselines", "bm25", place / "other"]
    launch = Launch(tmp_path / "2", flags(place, tmp_path / "out", *more), 2, main=command.main)
    assert launch.wait() == [0, 0], launch.printed()
    together = json.loads((tmp_path / "out" / "replication.json").read_text())
    for mine, theirs in zip(result["rows"], together["rows"], strict=True):
        assert theirs["ndcg_at_10"] == pytest.approx(mine["ndcg_at_10"], abs=1e-9)
    verified = ["--verify", tmp_path / "out" / "replication.json", "--device", "cpu"]
    launch = Launch(tmp_path / "verify", verified, 2, main=command.main)
    assert launch.wait() == [0, 0], launch.printed()


@pytest.mark.slow
def test_the_whole_road_offline(tmp_path, capsys):
    """Without a model: a random one is made. About half a minute."""
    assert run("--mock", "--output", tmp_path) == 0
    result = json.loads((tmp_path / "replication.json").read_text())
    assert len({row["language"] for row in result["rows"]}) == 4
    assert all(math.isfinite(row["ndcg_at_10"]) for row in result["rows"])
    assert "than bm25" in capsys.readouterr().out
    assert run("--verify", tmp_path / "replication.json") == 0
