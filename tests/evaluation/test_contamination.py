"""Benchmark texts in training data: compared with all pairs by brute force, and planted."""

import functools
import json
import random

import pytest
from helpers.tiny_models import make_tokenizer
from helpers.tiny_runs import Launch

from ml_embed.commands import check_contamination, tokenize
from ml_embed.evaluation import contamination
from ml_embed.evaluation.benchmark_texts import BenchmarkTexts, Place
from ml_embed.evaluation.contamination import (
    N_GRAM,
    WHOLE_TEXT,
    BenchmarkIndex,
    normalized,
)
from ml_embed.prepare.raw import RawDataset, notes_in_file, read_rows
from ml_embed.prepare.raw_parquet import write_raw
from ml_embed.prepare.rows import RawRow
from ml_embed.prepare.tokenizer import TextTokenizer

LONG = "the river runs past the old mill and the stones of the harbour under a pale winter moon"
ANSWER = "a mill that stands beside the river was built by monks who came across the sea in spring"
OWN = "nothing here was written before, and every word of it is only for this one test to read"
CHINESE = "古老的磨坊矗立在河边是由春天渡海而来的僧侣们建造的它的石头在苍白的冬月下闪闪发光"
THAI = "โรงสีเก่าแก่ตั้งอยู่ริมแม่น้ำสร้างโดยพระภิกษุที่ข้ามทะเลมาในฤดูใบไม้ผลิและก้อนหินส่องแสง"


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(make_tokenizer(), WHOLE_TEXT)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return folder


def naive(text, other, grams):
    """ "exact", "near" or None: every n-gram of one text with every one of the other."""
    if text == other:
        return "exact"
    return "near" if any(a == b for a in grams(text) for b in grams(other)) else None


def test_all_pairs_of_n_grams(tokenizer, monkeypatch):
    """Random pieces of few sources, in scripts with and without spaces."""
    monkeypatch.setattr(contamination, "TOKENIZED_CHARACTERS", 100)
    generator = random.Random(5)

    def piece():
        source = generator.choice([LONG, ANSWER, CHINESE, THAI])
        start, length = generator.randrange(0, len(source), 9), generator.choice([3, 20, 45, 90])
        return source[start : start + length] + generator.choice(["", "", " end"])

    benchmark, training = [piece() for _ in range(60)], [piece() for _ in range(60)]
    index = BenchmarkIndex([BenchmarkTexts(Place("t", "-"), benchmark)], tokenizer)
    texts = [normalized(text) for text in training]

    @functools.cache
    def grams(text):
        ids = tokenizer.tokenize([f" {text}"])[0].ids
        return [ids[i : i + N_GRAM] for i in range(len(ids) - N_GRAM + 1)]

    expected = [
        {n: kind for n, known in enumerate(index.texts) if (kind := naive(text, known, grams))}
        for text in texts
    ]
    assert index.matches(texts) == expected
    kinds = [kind for found in expected for kind in found.values()]
    assert kinds.count("exact") > 5
    assert 50 < kinds.count("near") < 60 * 60 / 2


def test_what_stands_in_many_texts_is_no_sign_of_any(tokenizer, monkeypatch):
    monkeypatch.setattr(contamination, "COMMON", 3)
    texts = [f"{LONG} {LONG} number {n}" for n in range(4)] + [f"{ANSWER} {n}" for n in range(3)]
    index = BenchmarkIndex([BenchmarkTexts(Place("t", "-"), texts)], tokenizer)
    assert index.common > 10
    met = index.matches([f"so {LONG}", f"so {ANSWER}", normalized(texts[1])])
    assert met == [{}, dict.fromkeys((4, 5, 6), "near"), {1: "exact"}]


def write_benchmark(folder):
    folder.mkdir(exist_ok=True)
    rows = [
        {"query": LONG, "passage": ANSWER, "negatives": ["grey dust"], "language": "eng"},
        {"query": CHINESE, "passage": THAI, "language": "zho"},
        {"query": "who?", "passage": "me", "language": "eng"},
    ]
    path = folder / "exam.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LEAKS = [
    (OWN, OWN[:40], []),
    (f"  {LONG.upper()}\n", OWN, []),  # 1: the query, otherwise written
    (OWN, f"{OWN} {ANSWER[7:]} {OWN}", []),  # 2: most of a document, inside another
    ("who?", "who? they asked, and it was me", []),  # 3: a short query
    ("who? they asked", "it was me", []),  # 4: short texts match as a whole only
    (f"{LONG}!", OWN, [OWN[5:], ANSWER]),  # 5: a document as a negative is no pair
    (ANSWER, f"tell me: {LONG}", []),  # 6: a pair, the other way round
    ("ＷＨＯ？", "me", []),  # 7: a short pair, in full width
    (OWN[3:], f"{OWN}{CHINESE[2:]}", []),  # 8: without spaces
]
MATCHING = [1, 2, 3, 5, 6, 7, 8]


def check(capsys, *arguments):
    code = check_contamination.main(list(map(str, arguments)))
    said = capsys.readouterr()
    return code, said.out + said.err


def test_planted_leaks_are_found_and_left_out(tokenizer_folder, tmp_path, capsys):
    raw, clean = tmp_path / "raw", tmp_path / "clean"
    raw.mkdir()
    notes = {"prompt": "ask: ", "left_out": {"faulty": 2}}
    write_raw(raw / "web.parquet", [RawRow(*row) for row in LEAKS], "retrieval", lambda: notes)
    write_raw(raw / "good.parquet", [RawRow(*row) for row in LEAKS[:1] * 3], "retrieval")
    write_raw(raw / "copy.parquet", [RawRow(LONG, ANSWER, [])])
    exam = write_benchmark(tmp_path / "exam")
    flags = ["--files", exam, "--tokenizer", tokenizer_folder]
    more = ["--output", tmp_path / "new" / "found.json", "--write-clean", clean]
    code, said = check(capsys, "--data", raw, *flags, *more)
    assert code == 1
    assert "8 of 13 rows match the benchmark" in said
    report = json.loads((tmp_path / "new" / "found.json").read_text())
    assert report["datasets"] == {
        "copy": {"rows": 1, "matching": 1},
        "good": {"rows": 3, "matching": 0},
        "web": {"rows": 9, "matching": len(MATCHING)},
    }
    counts = {
        (row["language"], row["role"]): (row["exact"], row["near"])
        for row in report["matches"]
        if row["dataset"] == "web"
    }
    assert counts == {
        ("eng", "query"): (3, 2),  # 1 3 7, 5 6
        ("eng", "document"): (3, 1),  # 5 6 7, 2
        ("eng", "pair"): (1, 1),  # 7, 6
        ("zho", "query"): (0, 1),  # 8
    }
    line = ["web", "exam", "eng", "pair", "1", "1", "2/2"]
    assert line in [each.split() for each in said.splitlines()]
    whole = {(r["language"], r["role"]): (r["found"], r["texts"]) for r in report["benchmark"]}
    assert whole["eng", "document"] == (2, 3)
    assert whole["zho", "pair"] == (0, 1)
    (example,) = (e for e in report["examples"] if e["role"] == "pair" and e["row"] == 6)
    assert (example["kind"], example["training"]) == ("near", f"tell me: {LONG}")
    assert example["benchmark"] == LONG

    assert sorted(path.name for path in clean.iterdir()) == ["good.parquet", "web.parquet"]
    kept = [row for n, row in enumerate(LEAKS) if n not in MATCHING]
    web = RawDataset("web", clean / "web.parquet")
    assert [(r.query, r.passage, list(r.negatives)) for r in read_rows(web)] == kept
    assert notes_in_file(web)["prompt"] == "ask: "
    assert notes_in_file(web)["left_out"] == {"faulty": 2, "contaminated": len(MATCHING)}
    assert check(capsys, "--data", clean, *flags)[0] == 0, "what is written is clean"
    code, said = check(capsys, "--data", raw / "web.parquet", *flags, "--roles", "pair")
    assert (code, "2 of 9 rows match" in said) == (1, True)


@pytest.mark.slow
def test_two_processes_find_the_same(tokenizer_folder, tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    for number in range(4):
        rows = [RawRow(*row) for row in LEAKS[number:]]
        write_raw(tmp_path / "raw" / f"web_{number}.parquet", rows)
    exam = write_benchmark(tmp_path / "exam")
    flags = ["--data", tmp_path / "raw", "--files", exam, "--tokenizer", tokenizer_folder]

    def given(name):
        (tmp_path / name).mkdir()
        return [
            *flags,
            "--output",
            tmp_path / name / "x.json",
            "--write-clean",
            tmp_path / name / "x",
        ]

    assert check(capsys, *given("one"))[0] == 1
    arguments = list(map(str, given("two")))
    both = Launch(tmp_path / "printed", arguments, 2, main=check_contamination.main)
    assert both.wait() == [1, 1], both.printed()
    files = [files_of(tmp_path / name) for name in ("one", "two")]
    assert files[0] == files[1]
    assert len(files[0]) == 5
    said = [path.read_text() for path in both.outputs]
    assert ["rows match the benchmark" in text for text in said] == [True, False]


def files_of(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_was_left_out_stands_in_the_manifest(tokenizer_folder, tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    write_raw(tmp_path / "raw" / "web.parquet", [RawRow(*row) for row in LEAKS])
    flags = ["--tokenizer", str(tokenizer_folder)]
    exam = write_benchmark(tmp_path / "exam")
    clean = tmp_path / "clean"
    check(capsys, "--data", tmp_path / "raw", *flags, "--files", exam, "--write-clean", clean)
    given = ["--input", str(clean), "--output", str(tmp_path / "tokens")]
    assert tokenize.main([*flags, *given]) == 0
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert manifest["datasets"]["web"]["left_out"] == {"contaminated": len(MATCHING)}
    assert "left out, contaminated: 7 (web 7)" in capsys.readouterr().err


def test_mistakes(tokenizer_folder, tmp_path, capsys):
    exam = write_benchmark(tmp_path / "exam")
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"query": "a", "passage": "b"}\n{"query": "a"}\n')
    flags = ["--tokenizer", tokenizer_folder]
    for arguments, message in (
        (["--data", exam], "give --tasks, --benchmark or --files"),
        (["--data", tmp_path / "no", "--files", exam], "does not exist"),
        (["--data", exam, "--files", tmp_path / "no"], "does not exist"),
        (["--data", exam, "--files", exam, "--write-clean", tmp_path], "exists; give a new"),
        (["--data", exam, "--files", exam, "--output", tmp_path], "is a folder; give a file"),
        (["--data", raw, "--files", exam, "--output", raw / "found.json"], "raw.jsonl is a file"),
        (["--data", raw, "--files", exam, "--write-clean", raw / "clean"], "raw.jsonl is a file"),
        (["--data", raw, "--files", exam], "line 2"),
    ):
        code, said = check(capsys, *arguments, *flags)
        assert (code, message in said) == (2, True), said
