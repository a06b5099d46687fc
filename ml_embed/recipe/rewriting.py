"""A raw folder written again with something computed for each row, one dataset after another.

All processes of a launch make a dataset together; the first one writes it. What is done stands in a
record (`files/work_record.py`), so an interrupted run is continued by the same command.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ml_embed.config import Task
from ml_embed.distributed.agreement import check_agreement
from ml_embed.distributed.collectives import compute_on_main_process
from ml_embed.distributed.sole_launch import sole_launch_into
from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_file, disk_errors_are_user_errors
from ml_embed.files.digests import file_digest
from ml_embed.files.json_file import parse_json
from ml_embed.files.work_record import Finished, WorkRecord
from ml_embed.prepare.raw import (
    RawDataset,
    check_and_count_rows,
    describe_source,
    files_passed_over,
    list_raw_datasets,
    notes_in_file,
    say_passed_over,
    task_of_raw,
)
from ml_embed.prepare.raw_parquet import write_raw
from ml_embed.prepare.rows import RawRow

REMEDY = "Use another --output, or --overwrite to make that folder anew"


@dataclass(frozen=True)
class Rewriting:
    """What is written again, and where."""

    kind: str
    """"mining" or "scoring"; the summary is KIND.json"""
    source: Path
    """folder of raw data"""
    output: Path
    """folder to write; each file appears whole or not at all"""
    model: str
    """what the model is called, for the summary"""
    settings: dict[str, Any]
    """all that the outcome depends on, beside the data"""
    overwrite: bool
    """make anew what was made otherwise, and remove datasets that the source no longer has"""

    @property
    def summary(self) -> Path:
        return self.output / f"{self.kind}.json"

    def target(self, name: str) -> Path:
        """The file of a dataset."""
        return self.output / f"{name}.parquet"

    def work_folder(self, name: str) -> Path:
        """Where unfinished work on a dataset lies."""
        return self.output / f".{name}.{self.kind}"


@dataclass(frozen=True)
class Todo:
    """A dataset that is to be made."""

    raw: RawDataset
    source: dict[str, Any]
    """what the raw file is (`describe_source`)"""
    task: Task
    """the task that training takes where the config names none"""
    work: Path
    """folder for what has to outlive an interruption"""
    made_of: dict[str, Any]
    """the settings and the source"""


@dataclass(frozen=True)
class Made:
    """A dataset that was made."""

    rows: Iterator[RawRow]
    """read once, by the first process"""
    task: Task | None
    """noted in the file; None = none"""
    entry: Mapping[str, Any]
    """what the summary says of it beside its counts"""


def rewrite_folder(
    rewriting: Rewriting,
    make: Callable[[Todo], Made],
    check: Callable[[RawDataset], None] = lambda dataset: None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the datasets of a raw folder again; continues what was begun. A collective.

    Args:
        rewriting: see there.
        make: a collective; makes a dataset.
        check: of a dataset, before any is made; raises UserError.
        progress: a bar on stderr.
    Returns:
        the summary that is also written: settings, and for each dataset its counts and entry.
    Raises:
        UserError: data that cannot be read, or an output folder that holds something else.
    """
    source, output = rewriting.source, rewriting.output
    if source.resolve() == output.resolve():
        raise UserError(f"input and output are both {source}: write to another --output")
    datasets = compute_on_main_process(lambda: _checked_datasets(source, check))
    check_agreement(lambda: rewriting.settings)
    with (
        disk_errors_are_user_errors(output, "Then run the same command again: it continues."),
        sole_launch_into(output, f".{rewriting.kind}.lock", f"{rewriting.kind} into"),
    ):
        # the first process writes it; the others have a copy
        record = compute_on_main_process(lambda: _open_record(rewriting, datasets))
        for name in tqdm(datasets, unit=" file", desc="files", disable=not progress):
            _rewrite_dataset(datasets[name], record, rewriting, make)
        summary = compute_on_main_process(lambda: _finish(rewriting, record, datasets))
    say_passed_over(files_passed_over(source, datasets.values()))
    return summary


def _checked_datasets(source: Path, check: Callable[[RawDataset], None]) -> dict[str, RawDataset]:
    datasets = {dataset.name: dataset for dataset in list_raw_datasets(source)}
    for dataset in datasets.values():
        check_and_count_rows(dataset)
        check(dataset)
    return datasets


def _open_record(rewriting: Rewriting, datasets: Mapping[str, RawDataset]) -> WorkRecord:
    record = WorkRecord(
        rewriting.summary, rewriting.settings, _read_finished, rewriting.overwrite, REMEDY
    )
    _check_former(record, datasets, rewriting)
    return record


def _finish(
    rewriting: Rewriting, record: WorkRecord, datasets: Mapping[str, RawDataset]
) -> dict[str, Any]:
    _remove_datasets(rewriting, record.gone(datasets))
    settings = {"model": rewriting.model} | record.settings
    summary = {"settings": settings, "datasets": dict(sorted(record.entries.items()))}
    record.finish(summary)
    return summary


def _read_finished(path: Path) -> Finished:
    try:
        summary = parse_json(path.read_bytes())
        return dict(summary["settings"]), dict(summary["datasets"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); use another --output, or remove that file"
        ) from None


def _check_former(
    record: WorkRecord, datasets: Mapping[str, RawDataset], rewriting: Rewriting
) -> None:
    """Raise UserError for datasets that the source does not have and for files of something else.

    With `overwrite`, note what is replaced instead.
    """
    if gone := sorted(record.entries.keys() - datasets):
        listing = ", ".join(map(repr, gone))
        for name in gone:
            record.replace(
                name, f"{rewriting.output} holds what the input does not have: {listing}"
            )
    for name in datasets:
        record.refuse_others(name, [rewriting.target(name)])


def _remove_datasets(rewriting: Rewriting, names: Iterable[str]) -> None:
    for name in names:
        rewriting.target(name).unlink(missing_ok=True)
        shutil.rmtree(rewriting.work_folder(name), ignore_errors=True)


def _rewrite_dataset(
    dataset: RawDataset, record: WorkRecord, rewriting: Rewriting, make: Callable[[Todo], Made]
) -> None:
    """Make a dataset's file, unless it is recorded as made of the same rows and is as it was."""
    work = rewriting.work_folder(dataset.name)
    todo = compute_on_main_process(lambda: _look_at(dataset, record, rewriting))
    if todo is not None:
        check_agreement(lambda: _source_here(dataset.path))
        compute_on_main_process(lambda: work.mkdir(exist_ok=True))
        made = make(todo)
        compute_on_main_process(lambda: _write(todo, record, rewriting.target(dataset.name), made))
    compute_on_main_process(lambda: shutil.rmtree(work, ignore_errors=True))


def _source_here(path: Path) -> dict[str, Any]:
    """What a raw file is on this machine, which may not be the first process's."""
    if not path.is_file():
        raise UserError(f"{path} does not exist there; give a folder that all machines share")
    return {path.name: describe_source(path)}


def _look_at(dataset: RawDataset, record: WorkRecord, rewriting: Rewriting) -> Todo | None:
    """None where nothing is to be done."""
    target, source = rewriting.target(dataset.name), describe_source(dataset.path)
    done = record.entries.get(dataset.name)
    if (
        done is not None
        and done["source"] == source
        and target.is_file()
        and file_digest(target) == done.get("digest")
    ):
        return None
    work, made_of = rewriting.work_folder(dataset.name), record.settings | {"source": source}
    return Todo(dataset, source, task_of_raw(dataset), work, made_of)


def _write(todo: Todo, record: WorkRecord, target: Path, made: Made) -> None:
    # Not before: until here other settings may use what lies in `work`.
    record.begin(todo.raw.name)
    with atomic_file(target) as partial:
        counts = write_raw(partial, made.rows, made.task, lambda: notes_in_file(todo.raw))
    source = {"source": todo.source, "digest": file_digest(target)}
    record.record(todo.raw.name, asdict(counts) | dict(made.entry) | source)
