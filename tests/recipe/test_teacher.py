"""Computing a teacher's vectors: the right vector at the right place, whatever is interrupted,
refused or added."""

import json
import multiprocessing
import os
import shutil
import signal
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.in_process import dataset_rows
from helpers.teachers import LetterModel, teacher_options
from helpers.tiny_models import make_tokenizer, write_model
from transformers import AutoModel, AutoTokenizer

from ml_embed.config import DatasetConfig
from ml_embed.data.store import open_store
from ml_embed.data.teacher_vectors import TeacherVectors, map_vectors
from ml_embed.errors import UserError
from ml_embed.inference.embedder import Embedder
from ml_embed.inference.text_models import load_text_model
from ml_embed.prepare.tokenization import TokenizeOptions, tokenize_folder
from ml_embed.prepare.tokenizer import TextTokenizer
from ml_embed.prepare.tokenizer_training import train_tokenizer
from ml_embed.recipe import teacher as teacher_module
from ml_embed.recipe.teacher import TeacherOptions, TextDecoder, embed_teacher
from scripts.embed_teacher import main

PROMPTS = {
    "prompt": "Instruct: find it\nQuery: ",
    "passage_prompt": "Text: ",
    "passage_prompt_share": 0.5,
}


def stored(folder, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of a dataset's queries and documents."""
    teacher = TeacherVectors.read(folder)
    entry = teacher.datasets[name]
    files = (entry.query_vectors, entry.document_vectors)
    return tuple(map_vectors(folder / file.file, teacher.dtype, teacher.width) for file in files)


def raw(world, name: str) -> tuple[list[str], dict[int, str]]:
    """The queries of a dataset's rows, and its documents by their number in the tokenized data,
    from the raw file."""
    rows = pq.read_table(world.raw / f"{name}.parquet").to_pylist()
    samples, _ = dataset_rows(world, name)
    documents = {}
    for row, (_, passage, negatives) in zip(rows, samples, strict=True):
        documents |= dict(
            zip([passage, *negatives], [row["passage"], *row["negatives"]], strict=True)
        )
    return [row["query"] for row in rows], documents


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_row_i_is_the_vector_of_text_i(world, tmp_path, monkeypatch, dtype):
    """In blocks smaller than a dataset; the teacher reads the raw texts behind its own prompts."""
    monkeypatch.setattr(teacher_module, "BLOCK", 4)
    prompts = {"query_prompt": "find: ", "passage_prompt": "text: "}
    record = embed_teacher(
        LetterModel(), teacher_options(world, tmp_path, dtype=dtype, **prompts), progress=False
    )
    assert (record["width"], record["dtype"], record["normalized"]) == (6, dtype, False)
    for name in ("facts", "topics", "sentiment"):
        queries, documents = raw(world, name)
        query_vectors, document_vectors = stored(tmp_path, name)
        assert query_vectors.dtype == dtype
        expected = LetterModel().encode(["find: " + text for text in queries], normalize=False)
        np.testing.assert_allclose(query_vectors, expected, rtol=1e-3 if dtype == "float16" else 0)
        assert len(document_vectors) == len(documents)
        expected = LetterModel().encode(
            ["text: " + documents[j] for j in range(len(documents))], normalize=False
        )
        np.testing.assert_allclose(
            document_vectors, expected, rtol=1e-3 if dtype == "float16" else 0
        )
        entry = record["datasets"][name]
        assert (entry["rows"], entry["documents"]) == (len(queries), len(documents))
    assert {path.suffix for path in tmp_path.iterdir()} <= {".vectors", ".json", ".lock", ""}


def test_prompts_of_the_data_are_taken_away_or_kept(world, tmp_path):
    settings = {"*": DatasetConfig(**PROMPTS)}
    tokenize_folder(
        TokenizeOptions(str(world.backbone), world.raw, tmp_path / "data", datasets=settings), False
    )
    data = tmp_path / "data"
    stripping, keeping = LetterModel(), LetterModel()
    embed_teacher(stripping, teacher_options(world, tmp_path / "stripped", data), progress=False)
    embed_teacher(
        keeping,
        teacher_options(world, tmp_path / "kept", data, strip_prompts=False),
        progress=False,
    )
    queries, documents = raw(world, "facts")
    assert set(queries) | set(documents.values()) <= set(stripping.seen)
    assert not any(text.startswith(("Instruct: ", "Text: ")) for text in stripping.seen)
    assert {PROMPTS["prompt"] + text for text in queries} <= set(keeping.seen)
    prompted = [text for text in keeping.seen if text.startswith("Text: ")]
    assert 0 < len(prompted) < len(documents) * 3


def test_texts_come_back_to_the_character():
    tokenizer = make_tokenizer()
    texts = [
        "Größe — 数 🎉\n\ttabs  and  spaces ",
        " leading",
        "<|im_end|> in the middle",
        tokenizer.eos_token,
        "x",
    ]
    ids = [
        np.array([*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id])
        for text in texts
    ]
    assert TextDecoder(tokenizer)(ids) == texts


def kill_in_the_middle(arguments) -> None:
    class Killed(LetterModel):
        def encode(self, texts, normalize=True):
            if len(self.seen) > 30:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().encode(texts, normalize)

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked process has none of the threads
    teacher_module.BLOCK = 5
    embed_teacher(Killed(), arguments, progress=False)


def test_a_killed_embedding_goes_on(world, tmp_path, monkeypatch):
    """Also behind half a row. What was done is not done again, and the files are those of an
    unbroken run."""
    monkeypatch.setattr(teacher_module, "BLOCK", 5)
    whole = LetterModel()
    embed_teacher(whole, teacher_options(world, tmp_path / "whole"), progress=False)
    parts = tmp_path / "parts"
    process = multiprocessing.get_context("fork").Process(
        target=kill_in_the_middle, args=(teacher_options(world, parts),)
    )
    process.start()
    process.join(timeout=30)
    assert process.exitcode == -signal.SIGKILL, "by its own hand"
    done = [path for path in parts.glob("*.vectors") if path.stat().st_size]
    assert done, "it was the kill in the middle that ended it"
    assert not (parts / "teacher.json").exists()
    with pytest.raises(UserError, match="not finished"):
        TeacherVectors.read(parts)
    newest = max(done, key=lambda path: path.stat().st_mtime_ns)
    with newest.open("ab") as file:
        file.write(b"half a row"[:9])
    again = LetterModel()
    embed_teacher(again, teacher_options(world, parts), progress=False)
    assert 0 < len(again.seen) < len(whole.seen) - 20
    assert (parts / "teacher.json").read_bytes() == (
        tmp_path / "whole" / "teacher.json"
    ).read_bytes()
    for path in (tmp_path / "whole").glob("*.vectors"):
        assert (parts / path.name).read_bytes() == path.read_bytes()
    finished = LetterModel()
    embed_teacher(finished, teacher_options(world, parts), progress=False)
    assert finished.seen == list(teacher_module.PROBES), "nothing is left to do"


def test_other_data_is_added_and_changed_data_replaced(world, tmp_path):
    """A folder may hold the vectors of several folders of data; what no entry refers to is
    removed."""
    first = tmp_path / "first"
    tokenize_folder(TokenizeOptions(str(world.backbone), world.raw, first, max_samples=9), False)
    output = tmp_path / "teacher"
    embed_teacher(LetterModel(), teacher_options(world, output, first), progress=False)
    renamed = tmp_path / "raw"
    renamed.mkdir()
    shutil.copy(world.raw / "topics.parquet", renamed / "groups.parquet")
    tokenize_folder(TokenizeOptions(str(world.backbone), renamed, tmp_path / "second"), False)
    record = embed_teacher(
        LetterModel(), teacher_options(world, output, tmp_path / "second"), progress=False
    )
    assert list(record["datasets"]) == ["facts", "sentiment", "topics", "groups"]
    record = embed_teacher(LetterModel(), teacher_options(world, output), progress=False)
    assert record["datasets"]["facts"]["rows"] == 21
    used = {
        entry[kind]["file"]
        for entry in record["datasets"].values()
        for kind in ("query_vectors", "document_vectors")
    }
    assert {path.name for path in output.glob("*.vectors")} == used


def test_texts_that_counts_do_not_tell_apart_have_their_own_vectors(world, tmp_path):
    """Two datasets of a folder, and data that changed: rows in the middle are swapped, so that all
    counts are equal."""
    order = list(range(100, 140))
    orders = [
        order,
        [*order[:20], order[21], order[20], *order[22:]],
        [*order[:22], order[23], order[22], *order[24:]],
    ]

    def tokenized(folder, **datasets):
        (tmp_path / f"raw_{folder}").mkdir()
        for name, numbers in datasets.items():
            rows = [
                {"query": f"query {i}", "passage": f"passage {i}", "negatives": []} for i in numbers
            ]
            (tmp_path / f"raw_{folder}" / f"{name}.jsonl").write_text(
                "\n".join(map(json.dumps, rows))
            )
        raw, data = tmp_path / f"raw_{folder}", tmp_path / folder
        tokenize_folder(TokenizeOptions(str(world.backbone), raw, data), progress=False)
        return data

    def assert_vectors(name, numbers):
        for kind, found in zip(("query", "passage"), stored(tmp_path / "out", name), strict=True):
            texts = [f"{kind} {i}" for i in numbers]
            np.testing.assert_array_equal(found, LetterModel().encode(texts, normalize=False))

    before = tokenized("before", one=orders[0], two=orders[1])
    embed_teacher(LetterModel(), teacher_options(world, tmp_path / "out", before), progress=False)
    assert_vectors("one", orders[0])
    assert_vectors("two", orders[1])
    after = tokenized("after", one=orders[2])
    embed_teacher(LetterModel(), teacher_options(world, tmp_path / "out", after), progress=False)
    assert_vectors("one", orders[2])


@pytest.fixture(scope="module")
def released(world, tmp_path_factory):
    """Two datasets in the released layout that share one corpus."""
    folder = tmp_path_factory.mktemp("released")
    samples, documents = dataset_rows(world, "facts")
    for name, part in (("one", samples[:9]), ("two", samples[9:])):
        columns = {
            "query_input_ids": pa.array([query for query, _, _ in part], pa.list_(pa.int64())),
            "passage_input_ids": [f"d{passage}" for _, passage, _ in part],
            "negative_1_input_ids": pa.array(
                [f"d{own[0]}" if own else None for _, _, own in part], pa.string()
            ),
        }
        pq.write_table(pa.table(columns), folder / f"{name}_query.parquet")
    ids = pa.array(documents, pa.list_(pa.int64()))
    pq.write_table(
        pa.table({"doc_id": [f"d{i}" for i in range(len(documents))], "input_ids": ids}),
        folder / "corpus.parquet",
    )
    return folder


def test_the_released_layout_has_its_texts_back(world, tmp_path, released):
    model = LetterModel()
    embed_teacher(model, teacher_options(world, tmp_path, released), progress=False)
    queries, documents = raw(world, "facts")
    assert len(model.seen) == len(teacher_module.PROBES) + len(queries) + len(documents), (
        "a shared corpus is embedded once"
    )
    assert set(queries) | set(documents.values()) <= set(model.seen)
    one, two = stored(tmp_path, "one")[1], stored(tmp_path, "two")[1]
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one[3], LetterModel().encode([documents[3]], normalize=False)[0])


def test_another_tokenizer_is_noticed_even_where_the_data_does_not_say(world, tmp_path, released):
    """By the manifest; without one by ids it does not have, or by texts that it writes
    otherwise."""
    small = train_tokenizer(["no words of ours"], 270)
    small.save_pretrained(tmp_path / "small")
    ids = pa.array([TextTokenizer(small, 99)(["river stone light moon"])[0]], pa.list_(pa.int64()))
    spelled = tmp_path / "spelled"
    spelled.mkdir()
    pq.write_table(pa.table({"doc_id": ["a"], "input_ids": ids}), spelled / "corpus.parquet")
    pq.write_table(
        pa.table({"query_input_ids": ids, "passage_input_ids": ["a"]}),
        spelled / "set_query.parquet",
    )
    for data, tokenizer, message in (
        (world.tokenized, tmp_path / "small", "is not the tokenizer that"),
        (released, tmp_path / "small", "does not read the data"),
        (spelled, world.backbone, "does not read the data"),
    ):
        wrong = TeacherOptions(
            data, str(tokenizer), tmp_path / "wrong", cache_dir=world.folder / "cache"
        )
        with pytest.raises(UserError, match=f"--tokenizer: .* {message}"):
            embed_teacher(LetterModel(), wrong, progress=False)
        assert not list((tmp_path / "wrong").glob("*.vectors"))
    right = TeacherOptions(
        spelled, str(tmp_path / "small"), tmp_path / "out", cache_dir=world.folder / "cache"
    )
    embed_teacher(LetterModel(), right, progress=False)


def test_folders_that_hold_something_else_are_not_mixed_with(world, tmp_path):
    output = tmp_path / "out"
    embed_teacher(LetterModel(), teacher_options(world, output), progress=False)
    with pytest.raises(UserError, match=r"query_prompt was '', now 'q: '.*--overwrite"):
        embed_teacher(
            LetterModel(), teacher_options(world, output, query_prompt="q: "), progress=False
        )
    record = embed_teacher(
        LetterModel(),
        teacher_options(world, output, query_prompt="q: ", overwrite=True),
        progress=False,
    )
    assert record["settings"]["query_prompt"] == "q: "
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.vectors").write_bytes(b"years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds something else"):
            embed_teacher(
                LetterModel(), teacher_options(world, precious, overwrite=overwrite), progress=False
            )
    assert (precious / "thesis.vectors").read_bytes() == b"years of work"


def test_an_interrupted_overwrite_goes_on_and_keeps_no_old_vector(world, tmp_path, monkeypatch):
    """The files' names do not tell one prompt from another, so the old ones have to go."""
    monkeypatch.setattr(teacher_module, "BLOCK", 5)
    output, changed = tmp_path / "out", {"query_prompt": "q: ", "overwrite": True}
    embed_teacher(LetterModel(), teacher_options(world, output), progress=False)

    class Stops(LetterModel):
        def encode(self, texts, normalize=True):
            if len(self.seen) > 30:
                raise KeyboardInterrupt
            return super().encode(texts, normalize)

    with pytest.raises(KeyboardInterrupt):
        embed_teacher(Stops(), teacher_options(world, output, **changed), progress=False)
    with pytest.raises(UserError, match="not finished"):
        TeacherVectors.read(output)
    with pytest.raises(UserError, match="query_prompt was 'q: ', now ''"):
        embed_teacher(LetterModel(), teacher_options(world, output), progress=False)
    whole, again = LetterModel(), LetterModel()
    embed_teacher(again, teacher_options(world, output, **changed), progress=False)
    changed["overwrite"] = False
    embed_teacher(whole, teacher_options(world, tmp_path / "whole", **changed), progress=False)
    assert len(again.seen) < len(whole.seen) - 20
    for path in (tmp_path / "whole").glob("*.[jv]*"):
        assert (output / path.name).read_bytes() == path.read_bytes()


def test_another_teacher_of_the_same_name_and_damaged_vectors_are_refused(world, tmp_path):
    embed_teacher(LetterModel(), teacher_options(world, tmp_path), progress=False)

    class Retrained(LetterModel):
        identity: ClassVar[dict[str, str]] = {"letters": "2"}

    with pytest.raises(UserError, match=r"files was \{'letters': '1'\}, now \{'letters': '2'\}"):
        embed_teacher(Retrained(), teacher_options(world, tmp_path), progress=False)
    path = next(tmp_path.glob("queries-*.vectors"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{path.name} is not as it was written.*--overwrite"):
        embed_teacher(LetterModel(), teacher_options(world, tmp_path), progress=False)
    assert path.read_bytes() != whole, "nothing is touched"
    embed_teacher(LetterModel(), teacher_options(world, tmp_path, overwrite=True), progress=False)
    assert path.read_bytes() == whole


def test_a_finished_folder_stays_usable_while_data_is_added(world, tmp_path):
    first, output = tmp_path / "first", tmp_path / "out"
    tokenize_folder(TokenizeOptions(str(world.backbone), world.raw, first, max_samples=9), False)
    record = embed_teacher(LetterModel(), teacher_options(world, output, first), progress=False)

    class Stops(LetterModel):
        def encode(self, texts, normalize=True):
            if self.seen:
                raise KeyboardInterrupt
            return super().encode(texts, normalize)

    with pytest.raises(KeyboardInterrupt):
        embed_teacher(Stops(), teacher_options(world, output), progress=False)
    assert TeacherVectors.read(output).to_json() == record


@pytest.mark.parametrize(
    ("scale", "message"),
    [(1e4, "use --dtype float32: float16 is too small for the text"), (np.nan, "NaN")],
)
def test_vectors_that_cannot_be_stored_are_refused(world, tmp_path, scale, message):
    with pytest.raises(UserError, match=message):
        embed_teacher(
            LetterModel(scale), teacher_options(world, tmp_path, dtype="float16"), progress=False
        )
    assert not (tmp_path / "teacher.json").exists()


def test_models_give_vectors_as_they_are_before_normalisation(tmp_path):
    """A model of ours by itself, and the same folder as sentence-transformers reads it: its last
    module normalises."""
    pytest.importorskip("sentence_transformers")
    folder = write_model(tmp_path / "model", make_tokenizer())
    texts = ["a text", "another one", "a third that is longer than those"]
    expected = Embedder.from_pretrained(folder, device="cpu").encode(texts, normalize=False)
    own = load_text_model(folder, "cpu")
    (folder / "ml_embed.json").unlink()
    theirs = load_text_model(folder, "cpu", batch_size=2)
    assert np.abs(np.linalg.norm(expected, axis=1) - 1).min() > 0.5
    for model in (own, theirs):
        np.testing.assert_allclose(model.encode(texts, normalize=False), expected, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(model.encode(texts), axis=1), 1, atol=1e-5)


def test_a_plain_backbone_is_read_as_a_live_teacher_would_be(world):
    """At its last token, through the final norm."""
    model, tokenizer = (
        AutoModel.from_pretrained(world.backbone),
        AutoTokenizer.from_pretrained(world.backbone),
    )
    ids = torch.tensor(
        [[*tokenizer("river stone", add_special_tokens=False).input_ids, tokenizer.eos_token_id]]
    )
    with torch.no_grad():
        expected = model(ids).last_hidden_state[0, -1].numpy()
    found = load_text_model(world.backbone, "cpu").encode(["river stone"], normalize=False)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_script(world, tmp_path, capsys):
    folder = write_model(tmp_path / "model", make_tokenizer())
    flags = [
        "--data",
        str(world.tokenized),
        "--tokenizer",
        str(world.backbone),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(["--model", str(folder), *flags, "--query-prompt", "q: ", "--device", "cpu"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["dtype"], record["width"], record["normalized"]) == ("float16", 64, False)
    assert not (tmp_path / "out" / "cache").exists()
    queries, _ = raw(world, "topics")
    expected = load_text_model(folder, "cpu").encode(
        ["q: " + text for text in queries], normalize=False
    )
    np.testing.assert_allclose(
        stored(tmp_path / "out", "topics")[0], expected, rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "model folder /nowhere does not exist"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--data", "/nowhere/data"], "/nowhere/data does not exist"),
        (["--tokenizer", "/nowhere/tokenizer"], "/nowhere/tokenizer does not exist"),
    ],
)
def test_mistakes(world, tmp_path, capsys, flags, message):
    usual = [
        "--data",
        str(world.tokenized),
        "--tokenizer",
        str(world.backbone),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(["--model", "/nowhere", *usual, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_at_once_are_refused(world, tmp_path):
    class Second(LetterModel):
        def encode(self, texts, normalize=True):
            if list(texts) != list(teacher_module.PROBES):
                with pytest.raises(UserError, match="another process is embedding into"):
                    embed_teacher(LetterModel(), teacher_options(world, tmp_path), progress=False)
            return super().encode(texts, normalize)

    embed_teacher(Second(), teacher_options(world, tmp_path), progress=False)


def test_a_text_that_was_cut_is_what_is_left_of_it(world, tmp_path):
    """The teacher reads what the data holds; training pairs it with the same text."""
    tokenize_folder(
        TokenizeOptions(str(world.backbone), world.raw, tmp_path / "data", max_seq_length=6), False
    )
    model = LetterModel()
    embed_teacher(
        model, teacher_options(world, tmp_path / "out", tmp_path / "data"), progress=False
    )
    tokenizer = AutoTokenizer.from_pretrained(world.backbone)
    dataset = open_store(tmp_path / "data", world.folder / "cache", False).datasets["facts"]
    text = TextDecoder(tokenizer)([dataset.query(4)])[0]
    assert raw(world, "facts")[0][4].startswith(text)
    np.testing.assert_array_equal(
        stored(tmp_path / "out", "facts")[0][4], LetterModel().encode([text], False)[0]
    )
