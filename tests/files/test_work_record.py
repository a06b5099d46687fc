"""The record of long work: continued after an interruption at any moment, never mixed."""

import json
import os
from pathlib import Path

import pytest

from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_file
from ml_embed.files.work_record import WorkRecord, journal_of, note_done

NAMES = ("a", "b", "c")


def read(path):
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged") from error
    return record["settings"], record["items"]


def opened(folder, settings, overwrite=False) -> WorkRecord:
    return WorkRecord(folder / "record.json", settings, read, overwrite, "Use another folder")


def work(folder, settings, names=NAMES, overwrite=False) -> list[str]:
    """A file per item with the settings in it; which were made."""
    folder.mkdir(exist_ok=True)
    record = opened(folder, settings, overwrite)
    if overwrite and record.replaced is None:
        record.replace_all()
    made = []
    for name in names:
        record.refuse_others(name, [folder / name])
        if name in record.entries:
            continue
        record.begin(name)
        made.append(name)
        with atomic_file(folder / name) as partial:
            partial.write_text(f"{name} {settings}")
        record.record(name, {"of": name})
    for name in record.gone(names):
        (folder / name).unlink(missing_ok=True)
    record.finish({"settings": settings, "items": record.entries})
    return made


def contents(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


class Killed(BaseException):
    pass


def killed_at(moment: int, monkeypatch, *arguments, **options) -> bool:
    """Work that stops for good before its n-th step on the disk; whether it came that far."""
    left = [moment]

    def counted(step):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:  # nothing that follows reaches the disk either, no tidying up
                raise Killed
            return step(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        try:
            work(*arguments, **options)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("case", ["new", "added to", "overwritten", "made again twice"])
def test_a_kill_at_any_moment_is_continued(tmp_path, monkeypatch, case):
    """The result is that of work that was never interrupted, and what was made before it is kept:
    readers find either no finished record or one that is true."""
    settings, overwrite = {"size": 2}, case.startswith(("over", "made"))
    work(tmp_path / "whole", settings)
    moment = 0
    while True:
        folder = tmp_path / str(moment)
        if case == "added to":
            work(folder, settings, NAMES[:1])
        if overwrite:
            work(folder, {"size": 1}, (*NAMES, "gone"))
        if not killed_at(moment, monkeypatch, folder, settings, overwrite=overwrite):
            break
        if (folder / "record.json").exists():
            said, items = read(folder / "record.json")
            assert all((folder / name).read_text() == f"{name} {said}" for name in items), moment
        if case == "made again twice":
            killed_at(moment // 2, monkeypatch, folder, settings, overwrite=True)
        before = {name: (folder / name).stat().st_ino for name in NAMES if (folder / name).exists()}
        made = work(folder, settings, overwrite=overwrite)
        assert contents(folder) == contents(tmp_path / "whole"), moment
        kept = [name for name in NAMES if name not in made]
        assert all((folder / name).stat().st_ino == before[name] for name in kept)
        moment += 1
    assert moment > 15, "or few moments were tried"


def test_an_interruption_costs_one_item_at_most(tmp_path, monkeypatch):
    moments = iter(range(1000))
    most = []
    while killed_at(moment := next(moments), monkeypatch, tmp_path / str(moment), {}):
        done = sum((tmp_path / str(moment) / name).exists() for name in NAMES)
        most.append(len(work(tmp_path / str(moment), {})) - (len(NAMES) - done))
    assert max(most) == 1


def test_one_more_item_costs_a_line_and_leaves_the_finished_record_in_place(tmp_path):
    work(tmp_path, {}, [f"item {number}" for number in range(100)])
    before = (tmp_path / "record.json").stat().st_ino
    record = opened(tmp_path, {})
    record.begin("one more")
    record.record("one more", {})
    assert (tmp_path / "record.json").stat().st_ino == before
    assert len(journal_of(tmp_path / "record.json").read_bytes()) < 100


def test_what_other_processes_made_is_taken_over(tmp_path):
    """At the end, or where nobody came to that, by the next work; a torn line does not count."""
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        folder.mkdir()
        record = opened(folder, {})
        for name in NAMES:
            record.begin(name)
        for process, name in enumerate(NAMES):
            (folder / name).write_text(f"{name} {{}}")
            note_done(record.path, process, name, {"of": name})
        if interrupted:
            torn = folder / "record.partial-2.jsonl"
            torn.write_bytes(torn.read_bytes()[:-3])
            assert work(folder, {}) == ["c"]
        else:
            record.take_over()
            record.finish({"settings": {}, "items": record.entries})
        assert read(folder / "record.json") == ({}, {name: {"of": name} for name in NAMES})
        assert {path.name for path in folder.iterdir()} == {*NAMES, "record.json"}


def test_what_another_process_made_long_ago_does_not_hide_that_it_is_made_again(tmp_path):
    record = opened(tmp_path, {})
    record.begin("a")
    note_done(record.path, 1, "a", {"of": "a"})
    again = opened(tmp_path, {})
    assert again.entries == {"a": {"of": "a"}}
    again.begin("a")
    assert opened(tmp_path, {}).unfinished == {"a"}


def test_notes_that_come_after_others_were_taken_over_are_kept(tmp_path):
    record = opened(tmp_path, {})
    note_done(record.path, 1, "a", {"of": "a"})
    record.take_over()
    record.begin("c")
    note_done(record.path, 1, "b", {"of": "b"})
    record.record("c", {"of": "c"})
    record.take_over()
    assert record.entries == {name: {"of": name} for name in NAMES}


@pytest.mark.parametrize("damaged", ["record.partial.jsonl", "record.partial-0.jsonl"])
def test_notes_beside_a_damaged_record_are_not_taken_for_what_is_made_again(tmp_path, damaged):
    note_done(tmp_path / "record.json", 1, "a", {"of": "long ago"})
    (tmp_path / damaged).write_text("{\n")
    record = opened(tmp_path, {}, overwrite=True)
    record.begin("a")
    record.record("a", {"of": "a"})
    record.take_over()
    assert record.entries == {"a": {"of": "a"}}
    assert [path.name for path in tmp_path.iterdir()] == ["record.partial.jsonl"]


def test_a_torn_line_is_as_if_it_had_not_been_written(tmp_path):
    record = opened(tmp_path, {})
    record.begin("a")
    journal = journal_of(tmp_path / "record.json")
    whole = journal.read_bytes()
    record.record("a", {"of": "a"})
    journal.write_bytes(journal.read_bytes()[:-3])
    record = opened(tmp_path, {})
    assert (record.unfinished, record.entries) == ({"a"}, {})
    record.record("a", {"of": "a"})
    assert journal.read_bytes().startswith(whole)
    assert opened(tmp_path, {}).entries == {"a": {"of": "a"}}


@pytest.mark.parametrize("damaged", ["record.json", "record.partial.jsonl"])
def test_what_cannot_be_continued_is_refused_or_overwritten(tmp_path, damaged):
    work(tmp_path, {"size": 1})
    with pytest.raises(UserError, match="made otherwise: size was 1, now 2"):
        work(tmp_path, {"size": 2})
    (tmp_path / "d").write_text("precious")
    with pytest.raises(UserError, match=r"d exists, but is not recorded in record\.json"):
        work(tmp_path, {"size": 1}, "abcd")
    (tmp_path / damaged).write_text("{\n")
    with pytest.raises(UserError, match="damaged"):
        work(tmp_path, {"size": 1})
    assert work(tmp_path, {"size": 2}, overwrite=True) == list(NAMES)
    assert read(tmp_path / "record.json")[0] == {"size": 2}
