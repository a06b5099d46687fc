"""Own data in one line: files of every kind, renamed columns, labelled text; then tokenized and
trained on."""

import csv
import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.in_process import train

import tokenize_data_qwen
from ml_embed.errors import UserError
from ml_embed.prepare.inputs import Source, list_sources
from ml_embed.prepare.own_data import (
    import_source,
    open_origins,
    parse_columns,
    raw_folder,
)
from ml_embed.prepare.raw import RawDataset, task_in_file

PAIRS = [
    {"question": f"what is {i}?", "answer": f"it is {i}, NA", "wrong": f"it is {i + 1}"}
    for i in range(6)
]
COLUMNS = "query=question,passage=answer"


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_packed(path, rows):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def imported(path, columns, folder, seed=0):
    folder.mkdir(exist_ok=True)
    columns = columns and parse_columns(columns)
    file = import_source(Source(str(path)), columns, open_origins(folder), seed, progress=False)
    return pq.read_table(file).to_pylist(), file


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("faq.csv", write_csv),
        ("faq.tsv", lambda path, rows: write_csv(path, rows, "\t")),
        ("faq.jsonl", write_json_lines),
        ("faq.json", lambda path, rows: path.write_text(json.dumps(rows)) and path),
        ("faq.jsonl.gz", write_packed),
        ("faq.parquet", write_parquet),
    ],
)
def test_pairs_of_every_kind_of_file(tmp_path, name, write):
    rows, file = imported(write(tmp_path / name, PAIRS), COLUMNS, tmp_path / "raw")
    assert file.name == "faq.parquet"
    assert rows == [
        {"query": row["question"], "passage": row["answer"], "negatives": []} for row in PAIRS
    ]


def test_negatives_in_columns_and_lists(tmp_path):
    rows = [{**row, "more": [row["wrong"] + "!", "", None]} for row in PAIRS]
    path = write_json_lines(tmp_path / "faq.jsonl", rows)
    got, _ = imported(path, f"{COLUMNS},negative_1=wrong,negatives=more", tmp_path / "raw")
    assert [row["negatives"] for row in got] == [
        [row["wrong"], row["wrong"] + "!"] for row in PAIRS
    ]


def test_texts_of_csv_files_stay_as_written(tmp_path):
    path = write_csv(
        tmp_path / "n.csv",
        [{"query": "007", "passage": "NA"}, {"query": "1.50", "passage": "null"}],
    )
    rows, _ = imported(path, None, tmp_path / "raw")
    assert [(row["query"], row["passage"]) for row in rows] == [("007", "NA"), ("1.50", "null")]


def test_two_labels_are_classification(tmp_path):
    reviews = [{"review": f"text {i}", "stars": "good" if i % 3 else "bad"} for i in range(7)]
    path = write_csv(tmp_path / "reviews.csv", reviews)
    rows, file = imported(path, "text=review,label=stars", tmp_path / "raw")
    assert task_in_file(RawDataset("reviews", file)) == "classification"
    other = {"good": "bad", "bad": "good"}
    expected = {row["review"]: (row["stars"], [other[row["stars"]]]) for row in reviews}
    assert {row["query"]: (row["passage"], row["negatives"]) for row in rows} == expected


def test_more_labels_are_clustering(tmp_path):
    texts = [{"text": f"text {i}", "label": i % 4} for i in range(80)]
    texts += [{"text": "text 1", "label": 2}, {"text": "alone", "label": 9}]
    path = write_parquet(tmp_path / "topics.parquet", texts)
    rows, file = imported(path, None, tmp_path / "raw")
    assert task_in_file(RawDataset("topics", file)) == "clustering"
    label = {row["text"]: row["label"] for row in reversed(texts)}
    assert {row["query"] for row in rows} == label.keys() - {"alone"}, (
        "a text without company has no positive"
    )
    for row in rows:
        assert label[row["passage"]] == label[row["query"]]
        assert row["passage"] != row["query"]
        assert len(set(row["negatives"])) == len(row["negatives"]) == 24
        assert label[row["query"]] not in {label[text] for text in row["negatives"]}
    assert {text for row in rows for text in row["negatives"]} == label.keys(), (
        "negatives come from everywhere"
    )
    before = file.read_bytes()
    assert imported(path, None, tmp_path / "again")[1].read_bytes() == before
    assert imported(path, None, tmp_path / "other", seed=1)[1].read_bytes() != before


def test_few_strangers_are_all_negatives(tmp_path):
    texts = [{"text": f"t{i}", "label": min(i // 4, 2)} for i in range(9)]
    rows, _ = imported(
        write_json_lines(tmp_path / "t.jsonl", texts), "text,label", tmp_path / "raw"
    )
    assert {len(row["negatives"]) for row in rows} == {5}
    assert all(len(set(row["negatives"])) == 5 for row in rows)


def test_names_of_labels_that_the_data_has_are_used(tmp_path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    data.to_parquet(tmp_path / "named.parquet")
    rows, _ = imported(tmp_path / "named.parquet", None, tmp_path / "raw")
    assert {row["query"]: row["passage"] for row in rows} == {"a": "yes", "b": "no"}


def test_one_line_tokenizes_and_the_result_trains(world, tmp_path, capsys):
    """Pairs without negatives, then labelled text into the same folder; the task follows from the
    labels."""
    faq = write_csv(tmp_path / "faq.csv", PAIRS)
    topics = write_json_lines(
        tmp_path / "topic.jsonl", [{"text": f"t {i}", "label": i % 3} for i in range(12)]
    )
    flags = ["--tokenizer", str(world.backbone), "--output", str(tmp_path / "tokens")]
    assert tokenize_data_qwen.main([*flags, "--input", str(faq), "--columns", COLUMNS]) == 0
    before = (tmp_path / "tokens" / "faq_query.parquet").read_bytes()
    assert tokenize_data_qwen.main([*flags, "--input", str(topics)]) == 0
    assert (tmp_path / "tokens" / "faq_query.parquet").read_bytes() == before
    assert "2 datasets, 18 rows" in capsys.readouterr().out
    data = {"train_data_path": str(tmp_path / "tokens"), "datasets": {}, "valid_fraction": 0}
    code, lines = train(world, tmp_path, train_steps=6, **data)
    assert code == 0
    in_batch = {key.split("/")[0] for line in lines for key in line if key.endswith("in_batch")}
    hard = {
        key.split("/")[0]
        for line in lines
        for key in line
        if key.endswith("hard") and line[key] > 0
    }
    assert (in_batch, hard) == ({"faq", "Avg"}, {"topic", "Avg"})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("query=question", "must name query and passage"),
        ("question=query,passage=answer", "'question' is no role"),
        ("query=a,query=b,passage=c", "'query' is given twice"),
        ("text=a,label=b,query=c", "text and label stand together"),
        (
            "query=nothing,passage=answer",
            "faq.jsonl: no column 'nothing'; its columns are 'question', 'answer', 'wrong'",
        ),
        (None, "faq.jsonl has the columns 'question', 'answer', 'wrong'; say which"),
        ("text=question,label=same", "'same' has 1 different labels"),
    ],
)
def test_columns_that_do_not_fit(tmp_path, columns, message):
    same = [{**row, "same": 1} if columns and "same" in columns else row for row in PAIRS]
    path = write_json_lines(tmp_path / "faq.jsonl", same)
    with pytest.raises(UserError, match=re.escape(message)):
        imported(path, columns, tmp_path / "raw")
    assert not list((tmp_path / "raw").glob("*")), "nothing is left lying"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "", "answer": "a"}, "faq.jsonl, line 7: 'question' is empty"),
        ({"question": "q", "answer": None}, "faq.jsonl, line 7: 'answer' is null"),
    ],
)
def test_rows_that_cannot_be_learned_from(tmp_path, row, message):
    path = write_json_lines(
        tmp_path / "faq.jsonl", [{k: r[k] for k in ("question", "answer")} for r in PAIRS] + [row]
    )
    with pytest.raises(UserError, match=re.escape(message)):
        imported(path, COLUMNS, tmp_path / "raw")


def test_sources(tmp_path, monkeypatch):
    assert [source.name for source in list_sources("owner/data", "train", "en")] == [
        "owner_data_en"
    ]
    for name in ("a.csv", "b.jsonl.gz", "notes.md", ".hidden.csv"):
        (tmp_path / name).touch()
    assert [source.name for source in list_sources(str(tmp_path), "train", None)] == ["a", "b"]
    with pytest.raises(UserError, match="is of a kind that is not read"):
        list_sources(str(tmp_path / "notes.md"), "train", None)
    for missing in ("/nowhere/data", "nowhere.csv", "./here"):
        with pytest.raises(UserError, match="does not exist"):
            list_sources(missing, "train", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = raw_folder("~/data", None, "train", None, tmp_path / "out", 0)
    assert found.path == tmp_path / "data"
    (tmp_path / "a.tsv").touch()
    with pytest.raises(UserError, match="several files of dataset 'a'"):
        list_sources(str(tmp_path), "train", None)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my.data.jsonl", "my.data"),
        ("data.en.csv", "data.en"),
        ("data.en.csv.gz", "data.en"),
        ("FAQ.CSV", "FAQ"),
        ("v1.2.parquet", "v1.2"),
    ],
)
def test_a_dataset_is_called_by_its_files_stem(tmp_path, file, name):
    (tmp_path / file).touch()
    assert [source.name for source in list_sources(str(tmp_path), "train", None)] == [name]


def test_suffixes_in_capitals_are_read_alike(tmp_path):
    write_csv(tmp_path / "FAQ.TSV", PAIRS, "\t")
    rows, file = imported(tmp_path / "FAQ.TSV", COLUMNS, tmp_path / "raw")
    assert file.name == "FAQ.parquet"
    assert [row["query"] for row in rows] == [row["question"] for row in PAIRS]


def test_a_second_file_of_the_same_name_is_refused_before_it_replaces_the_first(
    world, tmp_path, capsys
):
    for folder, rows in (("a", PAIRS), ("b", PAIRS[:3])):
        (tmp_path / folder).mkdir()
        write_csv(tmp_path / folder / "train.csv", rows)
    flags = [
        "--tokenizer",
        str(world.backbone),
        "--output",
        str(tmp_path / "tokens"),
        "--columns",
        COLUMNS,
        "--input",
    ]
    assert tokenize_data_qwen.main([*flags, str(tmp_path / "a/train.csv")]) == 0
    before = (tmp_path / "tokens/raw/train.parquet").read_bytes()
    assert tokenize_data_qwen.main([*flags, str(tmp_path / "b/train.csv")]) == 2
    message = capsys.readouterr().err
    assert f"came from {tmp_path / 'a/train.csv'}, and {tmp_path / 'b/train.csv'} gives" in message
    assert "Rename the file" in message
    assert (tmp_path / "tokens/raw/train.parquet").read_bytes() == before
    (tmp_path / "moved").mkdir()
    (tmp_path / "a/train.csv").rename(tmp_path / "moved/train.csv")
    assert tokenize_data_qwen.main([*flags, str(tmp_path / "moved/train.csv")]) == 0, (
        "the same rows from elsewhere"
    )
    capsys.readouterr()
    assert tokenize_data_qwen.main([*flags, str(tmp_path / "b/train.csv"), "--overwrite"]) == 0
    assert "1 datasets, 3 rows" in capsys.readouterr().out


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"broken\.parquet is not a readable parquet file"):
        imported(path, COLUMNS, tmp_path / "raw")
