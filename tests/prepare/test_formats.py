"""What people bring is read as it was written, or refused with its line: a small file per kind."""

import csv
import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tokenize_data_qwen
from ml_embed.errors import UserError
from ml_embed.prepare.inputs import list_sources
from ml_embed.prepare.own_data import import_source, open_origins
from ml_embed.prepare.records import Reading, open_table
from ml_embed.prepare.rows import FaultyRow

TEXTS = st.text(st.sampled_from("a\"',\t\n\r ;é\0猫"), min_size=1, max_size=8)
CASES = ROOT / "tests" / "cases" / "rows"
NONE = {"query_id": None, "language": None, "score": None, "pos_score": None, "neg_scores": None}


@pytest.fixture
def bring(world, tmp_path, capsys):
    """Tokenize an input; the exit code, what was said, and the raw rows of each dataset."""

    def command(given, *flags):
        output = tmp_path / "tokens"
        arguments = ["--tokenizer", str(world.backbone), "--output", str(output), *flags]
        code = tokenize_data_qwen.main([*arguments, "--input", str(given)])
        rows = {
            file.stem: [
                {key: value for key, value in row.items() if value is not None}
                for row in pq.read_table(file).to_pylist()
            ]
            for file in sorted((output / "raw").glob("*.parquet"))
        }
        said = capsys.readouterr()
        return code, said.err + said.out, rows

    return command


def pairs(rows):
    return [(row["query"], row["passage"], row["negatives"]) for row in rows]


def row(query, passage, negatives=(), **others):
    return {"query": query, "passage": passage, "negatives": list(negatives), **others}


@pytest.mark.parametrize(
    ("name", "flags", "rows"),
    [
        (
            "embedded.csv",
            [],
            [('a "b", c', "line one\nline two, and more", []), ("007", "NA", [])],
        ),
        ("semicolons.csv", ["--delimiter", ";"], [("how are you?", "fine, thanks", [])]),
        ("windows.csv", ["--encoding", "cp1252"], [("café", "naïve", [])]),
        ("utf16.tsv", ["--encoding", "utf-16"], [("хто?", "я", [])]),
        (
            "lists.csv",
            [],
            [
                ("q1", "p1", ["a", "b, c"]),
                ("q2", "p2", ["a", "[b]"]),
                ("q3", "['p3']", []),
                ("q4", "p4", ["plain text"]),
            ],
        ),
        ("types_change.jsonl", [], [(f"q{i}", f"p{i}", []) for i in range(5)]),
        ("triplets.csv", [], [("a", "b", ["c", "d"])]),
        ("triplet.csv", [], [("a", "b", ["c"])]),
        ("scored.csv", [], [("a", "b", [])]),
        ("ms_swift.jsonl", [], [("q", "p", ["n", "m"])]),
        ("tevatron.jsonl", [], [("q", "T p", ["U n"]), ("q", "r", ["U n"])]),
    ],
)
def test_the_row_that_was_written_is_read(bring, name, flags, rows):
    code, said, found = bring(CASES / name, *flags)
    assert code == 0, said
    assert pairs(found[Path(name).stem]) == rows


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        (
            "shifted.csv",
            ["3 faulty rows", "shifted.csv, line 3: 3 fields, but the header has 2", "line 5: 1"],
        ),
        ("shifted.tsv", ["shifted.tsv, line 3: a field that begins with a quote"]),
        ("swallowed.tsv", ["swallowed.tsv, line 2: a field that begins with a quote"]),
        ("semicolons.csv", ["line 1: one column, 'query;passage'", "--delimiter ';'"]),
        ("windows.csv", ["windows.csv, line 2: text that is not UTF-8", "cp1252"]),
        ("utf16.tsv", ["--encoding utf-16"]),
        ("numpy_lists.csv", ["line 2: 'negatives' looks like a list written as text"]),
        ("comma.jsonl", ["comma.jsonl, line 2: not valid JSON", "comma"]),
        ("comma.json", ["comma.json, line 4: not valid JSON", "after a comma"]),
        ("doubles.csv", ["several columns 'passage'"]),
        ("doubles.jsonl", ["doubles.jsonl, line 1: 'passage' stands twice"]),
        ("struct_label.jsonl", ["line 1: 'label' is dict; a label is one text or number"]),
        ("two_prompts.jsonl", ["line 2: its 'prompt' differs"]),
        ("ms_swift_two_turns.jsonl", ["line 1: each text of 'messages' must be one message"]),
        ("entities.tmx", ["entities.tmx declares or uses entities"]),
        ("moses", ["talk.en ends at line 3", "goes on"]),
    ],
)
def test_what_cannot_be_read_rightly_is_refused_with_its_line(bring, tmp_path, name, messages):
    place = CASES / name
    if name == "moses":
        place = tmp_path / "moses"
        shutil.copytree(CASES / name, place)
        with (place / "talk.sw").open("a") as file:
            file.write("one more\n")
    code, said, rows = bring(place)
    assert code == 2
    for message in messages:
        assert message in said
    assert "Traceback" not in said
    assert not rows, "nothing is written"


def test_a_column_may_change_its_type_anywhere(bring, tmp_path):
    """Loaders that guess types from a first block of 10 MB fail where a later row differs."""
    path = tmp_path / "long.jsonl"
    rows = [row(f"q{i}", "p" * 10_000, extra=i if i < 1500 else [str(i)]) for i in range(1600)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    code, said, found = bring(path)
    assert code == 0, said
    assert [each["query"] for each in found["long"]] == [f"q{i}" for i in range(1600)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_text_is_read_as_it_was_written(tmp_path, suffix, rows):
    """Quotes, tabs, commas, line ends and NUL, as Python's own writers write them."""
    path = tmp_path / f"x{suffix}"
    records = [{"query": query, "passage": passage} for query, passage in rows]
    if suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            delimiter = "," if suffix == ".csv" else "\t"
            writer = csv.DictWriter(file, ["query", "passage"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(records)
    else:
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        text = f"[{','.join(lines)}]" if suffix == ".json" else "\n".join(lines)
        path.write_text(text, encoding="utf-8", newline="")
    read = [record.values for record in open_table(path, Reading()).read(["query", "passage"])]
    if suffix == ".tsv" and any(isinstance(values, FaultyRow) for values in read):
        # Lines of which each could be a row: refused, because which was meant cannot be known.
        assert any("\t" in text and {"\n", "\r"} & set(text) for row in rows for text in row)
    else:
        assert read == records


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A file of each kind by its suffix."""
    import polib

    folder = tmp_path_factory.mktemp("originals")
    table = pa.table({"query": ["a", "b"], "passage": ["c", "d"], "negatives": [["x"], None]})
    pq.write_table(table, folder / "x.parquet")
    with pa.ipc.new_stream(folder / "x.arrow", table.schema) as file:
        file.write_table(table)
    (folder / "x.csv.gz").write_bytes(gzip.compress((CASES / "lists.csv").read_bytes()))
    polib.pofile(str(CASES / "catalogues/sw.po")).save_as_mofile(str(folder / "sw.mo"))
    cases = [
        *("embedded.csv", "swallowed.tsv", "comma.json", "flag_embedding.jsonl"),
        *("memory.tmx", "catalogues/sw.po", "tatoeba/eng-swh.tsv", "ms_swift.jsonl"),
    ]
    return [*(CASES / name for name in cases), *sorted(folder.iterdir())]


@given(data=st.data())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_file_gives_rows_or_a_message(originals, tmp_path, data):
    original = data.draw(st.sampled_from(originals))
    content = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=6))
    path = tmp_path / original.name
    path.write_bytes(content)
    folder = tmp_path / "raw"
    folder.mkdir(exist_ok=True)
    said = str(path)
    try:
        for source in list_sources(str(path), "train", None):
            import_source(source, None, open_origins(folder, True), 0, progress=False)
    except UserError as error:
        said = str(error)
    assert str(path) in said, "a message names the file"


def test_bad_rows_are_skipped_and_counted_where_that_is_asked_for(bring, tmp_path):
    code, said, rows = bring(CASES / "shifted.csv", "--skip-bad-rows")
    assert code == 0
    assert pairs(rows["shifted"]) == [("what is it?", "a cat", [])]
    assert "faulty rows left out by --skip-bad-rows: 3 (shifted 3)" in said
    manifest = json.loads((tmp_path / "tokens/manifest.json").read_text())
    assert manifest["datasets"]["shifted"]["left_out"] == {"faulty": 3}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_bad_rows_of_raw_data(world, bring, tmp_path, suffix):
    (tmp_path / "raw").mkdir()
    texts = [("a", "b"), ("", "c"), ("d", "e"), ("f", ""), ("g", "h"), ("i", "j")]
    rows = [{"query": query, "passage": passage} for query, passage in texts]
    path = tmp_path / f"raw/x{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    limit = ["--max-samples", "3"]
    code, said, _ = bring(tmp_path / "raw", *limit)
    places = ("row 1", "row 3") if suffix == ".parquet" else ("line 2", "line 4")
    assert code == 2
    assert "has 2 faulty rows" in said
    assert f"{places[0]}: 'query' is empty" in said
    assert f"{places[1]}: 'passage' is empty" in said
    code, said, _ = bring(tmp_path / "raw", "--skip-bad-rows", *limit)
    assert code == 0, said
    assert len(pq.read_table(tmp_path / "tokens/x_query.parquet")) == 3
    entry = json.loads((tmp_path / "tokens/manifest.json").read_text())["datasets"]["x"]
    assert entry["left_out"] == {"faulty": 2, "max_samples": 1}
    assert "rows left out by --max-samples (0 keeps all): 1 (x 1)" in said


def test_a_name_is_no_pattern(bring, tmp_path):
    """Neither brackets, stars and question marks nor `::` mean other files."""
    for number, name in enumerate(("a[12]*?.csv", "a1.csv", "a2.csv", "zip::b.csv")):
        (tmp_path / name).write_text(f"query,passage\nq,{number}\n")
    for number, name in ((0, "a[12]*?"), (3, "zip::b")):
        code, said, rows = bring(tmp_path / f"{name}.csv")
        assert code == 0, said
        assert pairs(rows[name]) == [("q", str(number), [])]


def test_optional_columns_reach_the_tokenized_data(bring, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(CASES / "optional.jsonl", tmp_path / "in")
    code, said, rows = bring(tmp_path / "in")
    assert code == 0, said
    assert not rows, "raw data is read as it is"
    table = pq.read_table(tmp_path / "tokens/optional_query.parquet")
    types = {"query_id": pa.string(), "language": pa.string(), "score": pa.float32()}
    types |= {"pos_score": pa.float32(), "neg_scores": pa.list_(pa.float32())}
    assert {field.name: field.type for field in table.schema}.items() >= types.items()
    first, second = table.select(list(types)).to_pylist()
    assert first == {
        "query_id": "7", "language": "sw", "score": 0.5, "pos_score": 3, "neg_scores": [1, -1.5],
    }  # fmt: skip
    assert second == NONE
    assert len(table["negative_doc_ids"][0]) == 2
    entry = json.loads((tmp_path / "tokens/manifest.json").read_text())["datasets"]["optional"]
    assert entry["columns"] == list(types)
    assert entry["queries"] == 1
    assert entry["languages"] == {"sw": 1}


@pytest.mark.parametrize("scores", [False, True])
def test_optional_columns_of_raw_parquet(bring, tmp_path, scores):
    (tmp_path / "in").mkdir()
    columns = {
        "query": pa.array(["a", "b"], pa.string_view()),
        "passage": ["c", "d"],
        "negatives": pa.array([["x", ""], ["y", "z"]], pa.list_(pa.string_view(), 2)),
        "query_id": [1, None],
        "language": ["sw", ""],
        "score": [0.5, float("nan")],
    }
    if scores:
        columns["neg_scores"] = [[0.5, 0.25], None]
    pq.write_table(pa.table(columns), tmp_path / "in/x.parquet")
    code, said, _ = bring(tmp_path / "in")
    assert code == 0, said
    table = pq.read_table(tmp_path / "tokens/x_query.parquet")
    rows = [row | NONE | row for row in table.to_pylist()]
    kept = {"query_id": "1", "language": "sw", "score": 0.5, "pos_score": None}
    assert {key: rows[0][key] for key in NONE} == kept | {"neg_scores": [0.5] if scores else None}
    assert {key: rows[1][key] for key in NONE} == NONE
    assert [len(row["negative_doc_ids"]) for row in rows] == [1, 2]
    assert "pos_score" not in table.column_names


def test_flag_embedding(bring, tmp_path):
    code, said, rows = bring(CASES / "flag_embedding.jsonl")
    assert code == 0, said
    [one, two, three] = rows["flag_embedding"]
    assert one["query_id"] == two["query_id"] != three["query_id"]
    assert pairs([one, two, three]) == [
        ("q1", "p1", ["n1", "n2"]),
        ("q1", "p2", ["n1", "n2"]),
        ("q2", "p3", []),
    ]
    assert [round(row["pos_score"], 3) for row in (one, two)] == [0.9, 0.8]
    assert one["neg_scores"] == two["neg_scores"] == [0.25, 0.5]
    entry = json.loads((tmp_path / "tokens/manifest.json").read_text())["datasets"]
    assert entry["flag_embedding"]["prompts"]["query"] == "Find it: "
    assert "3 rows of 2 named queries" in said


def test_a_score_of_sentence_transformers_and_ids_of_tevatron(bring):
    _, _, rows = bring(CASES / "scored.csv")
    assert rows["scored"] == [row("a", "b", score=0.75)]
    _, _, rows = bring(CASES / "tevatron.jsonl")
    assert {each["query_id"] for each in rows["tevatron"]} == {"7"}


def test_beir(bring):
    code, said, rows = bring(CASES / "beir")
    assert code == 0, said
    assert rows["beir"] == [
        row("first", "T one", query_id="1"),
        row("first", "two", query_id="1"),
    ]
    assert "left out, judged not relevant: 1" in said
    code, said, _ = bring(CASES / "beir", "--split", "dev")
    assert code == 2
    assert "dev.tsv does not exist; choose another with --split: test, train" in said


def test_another_split_of_beir_is_another_dataset(bring):
    _, said, rows = bring(CASES / "beir", "--split", "test")
    assert pairs(rows["beir"]) == [("second", "two", [])], said


@pytest.mark.parametrize("kind", [".po", ".mo"])
def test_catalogues(bring, tmp_path, kind):
    place = CASES / "catalogues"
    if kind == ".mo":
        import polib

        place = tmp_path / "catalogues"
        (place / "sw" / "LC_MESSAGES").mkdir(parents=True)
        polib.pofile(str(CASES / "catalogues/sw.po")).save_as_mofile(
            str(place / "sw/LC_MESSAGES/app.mo")
        )
    code, said, rows = bring(place, "--both-directions")
    assert code == 0, said
    found = rows["catalogues.en-sw"]
    units = [
        ("Open", "Fungua"),
        ("Open", "Wazi"),
        ("%d file", "faili %d"),
        ("%d files", "faili %d nyingi"),
    ]
    there = {(each["query"], each["passage"]) for each in found}
    assert there == {*units, *((target, source) for source, target in units)}
    assert len(found) == 8
    assert {each["language"] for each in found} == {"sw"}
    opened = {each["query_id"] for each in found if each["query"] == "Open"}
    assert len(opened) == 1
    assert "left out, pure placeholders: 1" in said
    if kind == ".po":
        for reason in ("without translation: 1", "fuzzy: 1", "obsolete: 1"):
            assert f"left out, {reason}" in said


def test_catalogues_of_many_languages(bring, tmp_path):
    """A link is no second catalogue, "C" is English, and an empty catalogue stops nobody."""
    folder = tmp_path / "all"
    shutil.copytree(CASES / "catalogues", folder)
    (folder / "again_sw.po").symlink_to(folder / "sw.po")
    header = 'msgid ""\nmsgstr "X-Source-Language: C\\n"\n\nmsgid "Open"\nmsgstr '
    (folder / "da.po").write_text(header + '"Åbn"\n')
    (folder / "fo.po").write_text(header + '""\n')
    code, said, rows = bring(folder)
    assert code == 0, said
    assert rows.keys() == {"all.en-sw", "all.en-da"}
    assert pairs(rows["all.en-da"]) == [("Open", "Åbn", [])]
    assert "left out, repeated" not in said
    assert "1 language pairs without a translation: all.en-fo" in said
    (folder / "da.po").write_text(header + '""\n')
    code, said, _ = bring(folder)
    assert code == 2, "what was made of it before would be trained on"
    assert "all.en-da.parquet was made of it" in said
    code, said, rows = bring(folder, "--overwrite")
    assert code == 0, said
    assert rows.keys() == {"all.en-sw"}
    shutil.rmtree(tmp_path / "tokens")
    code, said, _ = bring(folder / "fo.po")
    assert code == 2
    assert "none of its units is translated" in said


def test_translation_memory(bring):
    code, said, rows = bring(CASES / "memory.tmx")
    assert code == 0, said
    assert pairs(rows["memory.en-am"]) == [
        ("Good morning", "እንደምን አደሩ", []),
        ("Thanks & bye", "አመሰግናለሁ", []),
    ]
    assert pairs(rows["memory.en-sw"]) == [("Thanks & bye", "Asante", [])]
    assert {each["language"] for each in rows["memory.en-am"]} == {"am"}


@pytest.mark.parametrize("given", ["moses", "moses/talk.sw"])
def test_moses_pair(bring, given):
    code, said, rows = bring(CASES / given)
    assert code == 0, said
    assert pairs(rows["talk.en-sw"]) == [("hello", "habari", []), ("good bye", "kwaheri", [])]
    assert "left out, without translation: 1 (talk.en-sw 1)" in said


def test_tatoeba(bring):
    code, said, rows = bring(CASES / "tatoeba")
    assert code == 0, said
    one, two = rows["eng-swh"]
    assert (one["query"], one["passage"]) == ('Let\'s try "it".', "Tujaribu.")
    assert two["passage"] == "Hebu tujaribu."
    assert one["query_id"] == two["query_id"]
    assert one["language"] == "swh"


def test_faulty_lines_of_tatoeba_are_counted(bring, tmp_path):
    path = tmp_path / "tatoeba" / "eng-swh.tsv"
    shutil.copytree(CASES / "tatoeba", path.parent)
    with path.open("a") as file:
        file.write("7\tHello.\n8\tTwo\ttabs.\t9\tMbili.\n")
    code, said, rows = bring(path)
    assert code == 2
    assert not rows
    assert "2 faulty rows" in said
    assert "line 3: 2 fields instead of id, text, id, text" in said
    code, said, rows = bring(path, "--skip-bad-rows")
    assert code == 0, said
    assert len(rows["eng-swh"]) == 2
    assert "faulty rows left out by --skip-bad-rows: 2 (eng-swh 2)" in said


def test_both_directions_are_for_parallel_text(bring):
    code, said, _ = bring(CASES / "triplet.csv", "--both-directions")
    assert code == 2
    assert "--both-directions is for parallel text" in said


def test_labels_that_look_alike_and_repeated_texts_are_said(bring, tmp_path):
    code, said, _ = bring(CASES / "alike_labels.csv")
    assert code == 2, "four labels with a text each give no row"
    assert "the labels 'Spam', 'spam ' look alike" in said
    assert "the labels '1', '1.0' look alike" in said
    assert "1 texts came again with another label" in said
    path = tmp_path / "topics.csv"
    path.write_text("text,label\na,x\nb,x\nc,y\nd,y\na,x\ne,z\n")
    code, said, _ = bring(path)
    assert code == 0
    assert "topics: clustering, 3 labels ('x' 2, 'y' 2, 'z' 1)" in said
    entry = json.loads((tmp_path / "tokens/manifest.json").read_text())["datasets"]["topics"]
    assert entry["left_out"] == {"repeated": 1, "alone with their label": 1}
    assert entry["labels"] == 3


def write_shards(folder, number=2, split="train"):
    folder.mkdir(parents=True)
    for part in range(number):
        table = pa.table({"query": [f"q{part}"], "passage": [f"p{part}"]})
        pq.write_table(table, folder / f"{split}-{part:05d}-of-{number:05d}.parquet")


@pytest.mark.parametrize("inner", ["data", "."])
def test_a_folder_as_on_the_hub_is_one_dataset(bring, tmp_path, inner):
    write_shards(tmp_path / "facts" / inner)
    (tmp_path / "facts/README.md").write_text("hello")
    pq.write_table(
        pa.table({"query": ["t"], "passage": ["t"]}),
        tmp_path / "facts" / inner / "test-00000-of-00001.parquet",
    )
    code, said, rows = bring(tmp_path / "facts")
    assert code == 0, said
    assert {name: pairs(found) for name, found in rows.items()} == {
        "facts": [("q0", "p0", []), ("q1", "p1", [])]
    }
    assert "files passed over" in said
    (tmp_path / "facts" / inner / "train-00000-of-00002.parquet").unlink()
    code, said, _ = bring(tmp_path / "facts")
    assert code == 2
    assert "1 of the 2 parts of split 'train' are missing" in said


@pytest.mark.parametrize("splits", [False, True])
def test_what_datasets_saves_to_disk(bring, tmp_path, splits):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    saved = datasets.DatasetDict({"train": data}) if splits else data
    saved.save_to_disk(tmp_path / "saved")
    code, said, rows = bring(tmp_path / "saved")
    assert code == 0, said
    assert pairs(rows["saved"]) == [("b", "no", ["yes"]), ("a", "yes", ["no"])]
    if splits:
        code, said, _ = bring(tmp_path / "saved", "--split", "test")
        assert code == 2
        assert "no split 'test'; choose another with --split: train" in said


def test_a_dataset_of_the_hub(bring, tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    features = datasets.Features(
        {"review": datasets.Value("string"), "stars": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"review": ["a", "b"], "stars": [1, 0]}, features=features)

    def load(name, subset, split, streaming, revision):
        assert (name, subset, split, streaming) == ("owner/data", "en", "test", True)
        assert revision == "abc123", "what is read is what the manifest says"
        return data.to_iterable_dataset()

    card = huggingface_hub.DatasetCardData(license=["mit", "odbl"])
    info = SimpleNamespace(sha="abc123", card_data=card)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "dataset_info", {"owner/data": info}.__getitem__)
    flags = ["--subset", "en", "--split", "test", "--columns", "text=review,label=stars"]
    code, said, rows = bring("owner/data", *flags)
    assert code == 0, said
    assert pairs(rows["owner_data_en"]) == [("b", "no", ["yes"]), ("a", "yes", ["no"])]
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    provenance = manifest["datasets"]["owner_data_en"]["provenance"]
    assert provenance == {"source": "owner/data", "revision": "abc123", "license": "mit, odbl"}
    code, said, _ = bring("owner/data", *flags, "--columns", "query=no,passage=stars")
    assert code == 2
    assert "no column 'no'; its columns are 'review', 'stars'" in said


def test_duplicate_columns_of_parquet(bring, tmp_path):
    table = pa.table([["q"], ["p"], ["r"]], names=["query", "passage", "passage"])
    pq.write_table(table, tmp_path / "x.parquet")
    for place in (tmp_path, tmp_path / "x.parquet"):
        code, said, _ = bring(place)
        assert code == 2
        assert "several columns 'passage'" in said
        assert "Traceback" not in said


def test_a_prompt_that_leaves_no_room_is_refused(world, bring, tmp_path):
    prompts = {"triplet": {"prompt": "many words " * 9}}
    config = world.write_config(tmp_path / "config.json", datasets=prompts)
    flags = ["--config", str(config), "--max-seq-length", "12"]
    code, said, _ = bring(CASES / "triplet.csv", *flags)
    assert code == 2
    assert "datasets.triplet.prompt has" in said
    assert "leaves no room" in said


def test_texts_that_are_cut_are_said(bring, tmp_path):
    path = tmp_path / "long.csv"
    path.write_text(f"query,passage\n{'word ' * 50},short\nshort,{'word ' * 50}\nshort,tiny\n")
    code, said, _ = bring(path, "--max-seq-length", "16")
    assert code == 0
    assert "queries cut at 16 tokens: 1 (long 1)" in said
    assert "documents cut at 16 tokens: 1 (long 1)" in said


def test_files_that_are_passed_over_are_said(world, bring, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(world.raw / "facts.parquet", tmp_path / "in")
    (tmp_path / "in/notes.csv").write_text("x")
    code, said, _ = bring(tmp_path / "in")
    assert code == 0
    assert "files passed over, being no data: 1 (notes.csv)" in said
    manifest = json.loads((tmp_path / "tokens/manifest.json").read_text())
    assert manifest["passed_over"] == ["notes.csv"]


def test_a_folder_of_format_1_is_not_continued_with_other_columns(world, bring, tmp_path):
    bring(CASES / "triplet.csv")
    path = tmp_path / "tokens/manifest.json"
    manifest = json.loads(path.read_text()) | {"format_version": 1}
    del manifest["digest"]  # which those of format 1 have not
    path.write_text(json.dumps(manifest))
    code, said, _ = bring(CASES / "triplets.csv")
    assert code == 2
    assert "format_version was 1, now 2" in said
