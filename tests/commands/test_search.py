"""`search`: the nearest texts of a corpus, by the Embedder's own cosines, at any cut."""

import io

import numpy as np
import pytest
from helpers.tiny_models import TEXTS, make_tokenizer, write_model

from ml_embed import Embedder
from ml_embed.commands.search import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("search") / "model", make_tokenizer())


def expected(model, query, top):
    """What is printed, by one dot product after another."""
    distinct = list(dict.fromkeys(TEXTS))
    own = model.encode_query(query)
    scored = [(float(np.dot(own, model.encode_document(text))), text) for text in distinct]
    best = sorted(scored, key=lambda pair: -pair[0])[:top]
    return "".join([f"{query}\n", *(f"  {cosine:6.3f}  {text}\n" for cosine, text in best)])


@pytest.mark.parametrize("given", ["arguments", "stdin"])
def test_it_prints_the_nearest_texts(folder, tmp_path, capsys, monkeypatch, given):
    (tmp_path / "corpus.txt").write_text("".join(f"{text}\n" for text in [*TEXTS, TEXTS[0]]))
    flags = ["--model", folder, "--corpus", tmp_path / "corpus.txt", "--top", 3]
    cut = ["--depth", 1, "--dim", 8]
    queries = [TEXTS[1], "another text"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(queries) + "\n"))
    texts = queries if given == "arguments" else []
    assert main([*map(str, [*flags, *cut]), *texts]) == 0
    model = Embedder.from_pretrained(folder, depth=1, dim=8)
    assert capsys.readouterr().out == "".join(expected(model, query, 3) for query in queries)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "runs/quickstart/raw/names.parquet is no file"),
        (["--corpus", "rows.csv"], "has no column 'passage'; name one of 'text'"),
        (["--corpus", "empty.txt"], "the corpus has no text to find"),
        (["--corpus", "rows.csv", "--column", "text", "--top", "0"], "--top is 0"),
        (["--corpus", "rows.csv", "--column", "text", "--dim", "7"], "dim 7 was not trained"),
    ],
)
def test_mistakes_are_messages(folder, tmp_path, capsys, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("text\na\n")
    (tmp_path / "empty.txt").write_text("")
    assert main(["--model", str(folder), *given, "a"]) == 2
    assert message in capsys.readouterr().err
