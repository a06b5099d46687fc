"""The corpus of names and the data made of it: nothing held out may be found in training."""

import json

import pyarrow.parquet as pq
import pytest

from ml_embed.commands.make_sample_datasets import main
from ml_embed.errors import UserError
from ml_embed.sample_data.names import NAMES_FILE, build_names, load_names, plan_names
from ml_embed.sample_data.names_source import LANGUAGES, read_names
from ml_embed.sample_data.package import write_corpus


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(plan, training rows, evaluation rows)."""
    folder = tmp_path_factory.mktemp("names")
    plan = build_names(folder / "raw", folder / "eval", rows=6000, eval_rows=100)
    parts = (folder / part / "names.parquet" for part in ("raw", "eval"))
    return plan, *(pq.read_table(part).to_pylist() for part in parts)


def test_every_meaning_has_a_name_in_every_language():
    rows = load_names().to_pylist()
    assert len({row["language"] for row in rows}) == 40
    assert len({(row["kind"], row["code"]) for row in rows}) == 728
    places = {(row["language"], row["kind"], row["code"]): row["name"] for row in rows}
    assert len(places) == len(rows) == 40 * 728
    assert all(name and name == " ".join(name.split()) for name in places.values())
    assert places["es", "territory", "DE"] == "Alemania"
    assert places["ja", "territory", "DE"] == "ドイツ"
    assert places["fi", "language", "de"] == "saksa"
    assert NAMES_FILE.stat().st_size < 500_000


def test_the_corpus_builds_the_same_bytes_and_takes_what_all_languages_have(tmp_path):
    for language in LANGUAGES.split():
        folder = tmp_path / "package" / "main" / language
        folder.mkdir(parents=True)
        names = {"DE": f"{language}  de", "DE-alt-short": "D", "FR": "FR", "IT": f"{language} it"}
        if language == "fi":
            del names["IT"]
        for file, of_file in (("territories", names), ("languages", {"zu": f"{language} zu"})):
            content = {"main": {language: {"localeDisplayNames": {file: of_file}}}}
            (folder / f"{file}.json").write_text(json.dumps(content))
    table = read_names(tmp_path / "package")
    assert table.schema == load_names().schema
    assert len(table) == 2 * 40
    row = {"language": "en", "kind": "territory", "code": "DE", "name": "en de"}
    assert table.to_pylist()[0] == row
    for name in ("one", "two"):
        write_corpus(table, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    (tmp_path / "other.tgz").write_bytes(b"other")
    with pytest.raises(UserError, match="SHA-256"):
        read_names(tmp_path / "other.tgz")
    with pytest.raises(UserError, match="holds none of its files"):
        read_names(tmp_path / "package" / "main" / "de")


def places_of(plan):
    """Name -> (language, meaning) of all that bear it."""
    found = {}
    for language, of_language in plan.names.items():
        for meaning, name in of_language.items():
            found.setdefault(name, set()).add((language, meaning))
    return found


def test_training_rows_are_names_of_one_meaning(built):
    plan, training, _ = built
    places = places_of(plan)
    assert 5000 < len(training) < 6000  # names that are alike in both languages are left out
    for row in training:
        kind, _, code = row["query_id"].partition(":")
        right = {
            language for language, meaning in places[row["passage"]] if meaning == (kind, code)
        }
        assert (kind, code) in {meaning for _, meaning in places[row["query"]]}
        assert right
        assert row["query"].casefold() != row["passage"].casefold()
        assert len(set(row["negatives"])) == 7
        assert not {row["query"], row["passage"]} & set(row["negatives"])
        assert any(
            all((language, kind) in {(at, m.kind) for at, m in places[n]} for n in row["negatives"])
            for language in right
        )


def test_nothing_held_out_is_in_training(built):
    plan, training, evaluation = built
    used = {text for row in training for text in (row["query"], row["passage"], *row["negatives"])}
    unseen = {names[meaning] for names in plan.names.values() for meaning in plan.unseen_meanings}
    assert len(plan.unseen_meanings) == 73
    assert not {text.casefold() for text in used} & {text.casefold() for text in unseen}
    rows = {split: [row for row in evaluation if row["split"] == split] for split in SPLITS}
    assert all((row["kind"], row["code"]) in plan.unseen_meanings for row in rows[SPLITS[1]])
    asked = {frozenset((row["query_language"], row["passage_language"])) for row in rows[SPLITS[0]]}
    assert asked <= {frozenset(pair) for pair in plan.unseen_pairs}
    assert len(plan.unseen_pairs) == 156
    # Training pairs a meaning's names only over other pairs of languages. A name that several
    # languages share may be any one's.
    places = places_of(plan)
    for row in training:
        meaning = tuple(row["query_id"].split(":"))
        sources, targets = (
            {language for language, of in places[row[text]] if of == meaning}
            for text in ("query", "passage")
        )
        assert any(
            source != target and tuple(sorted((source, target))) not in plan.unseen_pairs
            for source in sources
            for target in targets
        )


SPLITS = ("unseen_pairs", "unseen_meanings")


def test_evaluation_asks_among_all_names_of_a_language(built):
    plan, _, evaluation = built
    for row in evaluation:
        meaning = (row["kind"], row["code"])
        source, target = (plan.names[row[f"{side}_language"]] for side in ("query", "passage"))
        assert (row["query"], row["passage"]) == (source[meaning], target[meaning])
        assert row["query"].casefold() != row["passage"].casefold()
        assert set(row["candidates"]) == set(target.values())
        assert len(row["candidates"]) == len(set(row["candidates"])) > 600
        assert row["candidates"][row["position"]] == row["passage"]


def test_counts_seeds_and_the_command(tmp_path, capsys):
    def files(name, seed):
        flags = f"--corpus names --languages 5 --rows 60 --eval-rows 5 --seed {seed}"
        folders = [
            "--output",
            str(tmp_path / name),
            "--eval-output",
            str(tmp_path / f"{name} eval"),
        ]
        assert main([*flags.split(), *folders]) == 0
        return [(tmp_path / at / "names.parquet").read_bytes() for at in (name, f"{name} eval")]

    one, two, other = files("one", 0), files("two", 0), files("other", 1)
    assert one == two
    assert one != other
    said = json.loads(capsys.readouterr().out.splitlines()[0])
    assert said["training_languages"] == 5
    assert said["names_in_two_languages"] == 10 * 728
    assert all(cue["length"] < 0.1 for cue in said["cues"]["names"].values())
    assert {meaning.kind for meaning in plan_names(5, kind="territory").meanings} == {"territory"}
    folders = ["--output", str(tmp_path / "of"), "--eval-output", str(tmp_path / "of eval")]
    assert main([*folders, "--kind", "territory"]) == 2
    assert "--kind is of names; add --corpus names" in capsys.readouterr().err
    for wrong in (4, 41):
        with pytest.raises(UserError, match="5 to 40"):
            plan_names(wrong)
    with pytest.raises(UserError, match="holds something"):
        build_names(tmp_path / "one", tmp_path / "new")
