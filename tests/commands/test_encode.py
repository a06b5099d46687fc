"""`encode`: row i of the file is the Embedder's vector of text i, at any cut."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml_embed import Embedder
from ml_embed.commands.encode import main

TEXTS = ["a text", "", "ein längerer Text,\u2028 mit allem", " b "]


def encode(capsys, *flags):
    code = main([*map(str, flags)])
    return code, capsys.readouterr()


@pytest.mark.parametrize("name", ["texts.txt", "texts.csv", "texts.parquet"])
def test_rows_are_the_texts_in_order(world, tmp_path, capsys, name):
    path, column = tmp_path / name, "text"
    if name == "texts.txt":
        path.write_bytes("".join(f"{text}\r\n" for text in TEXTS).encode())
    elif name == "texts.csv":
        column = "what is said"
        path.write_text("n,what is said\n" + "".join(f'{n},"{t}"\n' for n, t in enumerate(TEXTS)))
    else:
        pq.write_table(pa.table({"other": [0] * 4, "text": TEXTS}), path)
    output = tmp_path / "new" / "vectors.npy"
    flags = ["--model", world.backbone, "--input", path, "--output", output, "--column", column]
    code, said = encode(capsys, *flags, "--prompt", "query: ")
    assert code == 0, said.err
    sizes = {"rank": 0, "depth": 2, "dim": 64}
    assert json.loads(said.out) == {"output": str(output), "texts": 4, **sizes}
    expected = Embedder.from_pretrained(world.backbone).encode(TEXTS, prompt="query: ")
    assert np.abs(np.load(output) - expected).max() < 1e-6
    code, said = encode(capsys, *flags)
    assert code == 2
    assert "exists already; give another path, or --overwrite" in said.err


def test_no_text_is_a_mistake(world, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    flags = ["--model", world.backbone, "--output", tmp_path / "v.npy"]
    code, said = encode(capsys, *flags, "--input", tmp_path / "empty.txt")
    assert code == 2
    assert "there is no text to encode" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--input", "texts.jsonl", "--column", "txt"], "has no column 'txt'; name one of 'text'"),
        (["--input", "texts.jsonl"], "texts.jsonl, line 2: text is 7, which is no text"),
        (["--input", "nowhere.txt"], "nowhere.txt is no file"),
        (["--input", "texts.jsonl", "--prompt-name", "no"], "prompt_name 'no' is not one of"),
        (["--input", "texts.jsonl", "--depth", "1"], "depth 1 was not trained"),
        (["--input", "texts.jsonl", "--output", "x.txt"], "x.txt must end in .npy"),
    ],
)
def test_mistakes_leave_nothing(world, tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n{"text": 7}\n')
    code, said = encode(capsys, "--model", world.backbone, "--output", "v.npy", *given)
    assert code == 2
    assert message in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]
