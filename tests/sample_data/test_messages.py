"""Data made of translation catalogues: nothing held out may be found in training."""

import json

import pyarrow.parquet as pq
import pytest
from helpers.catalogues import spelled, write_catalogues

from ml_embed.commands.make_sample_datasets import main
from ml_embed.errors import UserError
from ml_embed.sample_data.messages import read_messages

FILES = (
    *("raw/messages", "eval/unseen_pairs", "eval/unseen_messages"),
    *("eval/tuning/unseen_pairs", "eval/tuning/unseen_messages"),
)


@pytest.fixture(scope="module")
def catalogues(tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalogues")
    write_catalogues(folder / "share", messages=1650)
    return folder


def make(folder, catalogues, *flags: str) -> int | None:
    return main(
        [
            *("--corpus", "messages", "--catalogues", str(catalogues)),
            *("--output", str(folder / "raw"), "--eval-output", str(folder / "eval"), *flags),
        ]
    )


def rows_of(folder, file: str) -> list[dict]:
    return pq.read_table(folder / f"{file}.parquet").to_pylist()


def test_messages_are_phrases_that_every_language_has(catalogues):
    messages = read_messages(catalogues)
    assert {message["en"] for message in messages} == {spelled(i) for i in range(1650)}
    assert all(len(message) == 9 for message in messages)
    assert messages[0]["de"].startswith("de ")


def test_training_shows_nothing_of_what_is_held_out(catalogues, tmp_path, capsys):
    assert make(tmp_path, catalogues, "--rows", "1200") == 0
    assert json.loads(capsys.readouterr().out) == {
        **{"training_rows": 1200, "unseen_pairs": 50, "unseen_messages": 1000},
        **{"tuning_pairs": 0, "tuning_messages": 400},
    }
    number_of = {
        text: number
        for number, message in enumerate(read_messages(catalogues))
        for text in message.values()
    }
    rows = {file: rows_of(tmp_path, file) for file in FILES if file != FILES[3]}
    shown = {frozenset((row["query"], row["passage"])) for row in rows[FILES[0]]}
    trained = {number_of[text] for pair in shown for text in pair}
    assert trained == set(range(50))
    for row in rows["eval/unseen_pairs"]:
        assert number_of[row["query"]] == number_of[row["passage"]] in trained
        assert frozenset((row["query"], row["passage"])) not in shown
    for file in ("eval/unseen_messages", "eval/tuning/unseen_messages"):
        assert not {number_of[row["query"]] for row in rows[file]} & trained
    tests = [row["query"] for file in (FILES[2], FILES[4]) for row in rows[file]]
    assert len(set(tests)) == len(tests)


def test_the_same_arguments_give_the_same_bytes(catalogues, tmp_path):
    for name, seed in (("one", "0"), ("two", "0"), ("other", "1")):
        assert make(tmp_path / name, catalogues, "--rows", "1200", "--seed", seed) == 0
    one, two, other = (
        [(tmp_path / name / f"{file}.parquet").read_bytes() for file in FILES]
        for name in ("one", "two", "other")
    )
    assert one == two
    assert one[0] != other[0]


def test_what_cannot_be_made_is_said(catalogues, tmp_path, capsys):
    def said() -> str:
        return capsys.readouterr().err

    assert make(tmp_path, catalogues, "--rows", "24000") == 2
    assert "hold 1650 messages in all languages; 1000 for training and 1600" in said()
    assert make(tmp_path, tmp_path, "--rows", "24") == 2
    assert "has no catalogue de/LC_MESSAGES/*.mo" in said()
    assert make(tmp_path, catalogues, "--rows", "23") == 2
    assert "rows 23 must be at least 24" in said()
    assert make(tmp_path, catalogues, "--eval-rows", "50") == 2
    assert "--eval-rows is of udhr and names" in said()
    assert make(tmp_path, catalogues, "--kind", "language") == 2
    assert "--kind is of names" in said()
    folders = ["--output", str(tmp_path / "raw"), "--eval-output", str(tmp_path / "eval")]
    assert main([*folders, "--corpus", "messages"]) == 2
    assert "--corpus messages needs --catalogues" in said()
    assert main([*folders, "--catalogues", str(catalogues)]) == 2
    assert "--catalogues is of messages; add --corpus messages" in said()
    place = tmp_path / "broken" / "de" / "LC_MESSAGES"
    place.mkdir(parents=True)
    (place / "x.mo").write_bytes(b"no catalogue")
    with pytest.raises(UserError, match=r"x\.mo cannot be read"):
        read_messages(tmp_path / "broken")
