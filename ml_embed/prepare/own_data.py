"""Anybody's data as raw contrastive data, which everything else reads: one .parquet per dataset.

`query=question,passage=answer` renames columns, `text=review,label=stars` makes rows of labelled
text (`labelled`). Without that, the columns tell whose form a file has (`forms`). Parallel text
(`parallel`), BEIR's folders (`beir`), what `datasets` saves, and datasets on the hub are read too.
"""

import filecmp
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ml_embed.config import Task
from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_file, disk_errors_are_user_errors
from ml_embed.files.json_file import parse_json
from ml_embed.files.locks import lock_folder
from ml_embed.files.paths import expand_home
from ml_embed.files.work_record import Finished, WorkRecord
from ml_embed.notices import notice, warn
from ml_embed.prepare.beir import beir_rows, is_beir
from ml_embed.prepare.forms import form_of
from ml_embed.prepare.inputs import (
    Source,
    are_shards,
    files_unused,
    is_missing_path,
    list_sources,
    open_source,
    visible_files,
)
from ml_embed.prepare.labelled import LabelledTexts, texts_by_label
from ml_embed.prepare.parallel import parallel_rows
from ml_embed.prepare.raw import SUFFIXES, is_raw_layout
from ml_embed.prepare.raw_parquet import write_raw
from ml_embed.prepare.records import Reading, Table
from ml_embed.prepare.rows import (
    NEGATIVE_COLUMN,
    OPTIONAL_NAMES,
    Faults,
    FaultyRow,
    RawRow,
    Record,
    good_rows,
    row_of,
)

ROLES = ("query", "passage", "negatives", "text", "label", *OPTIONAL_NAMES)
ORIGINS = ".origins.json"
"""Says where each collected raw file came from."""
LOCK = ".import.lock"


@dataclass(frozen=True)
class ImportOptions:
    """How sources are read."""

    reading: Reading = field(default_factory=Reading)
    both_directions: bool = False
    """of parallel text, each unit the other way round too"""
    skip_bad_rows: bool = False


def parse_columns(text: str) -> dict[str, str]:
    """ "query=question,passage=answer" -> {"query": "question", "passage": "answer"}.

    Raises:
        UserError: not of that form, unknown or missing roles, or a role twice.
    """
    columns: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, _, column = (piece.strip() for piece in part.partition("="))
        column = column or role
        if role not in ROLES and not NEGATIVE_COLUMN.fullmatch(role):
            raise UserError(
                f"--columns: {role!r} is no role; take query, passage, negatives, negative_1, ..., "
                f"{', '.join(OPTIONAL_NAMES)}, or text and label, e.g. "
                "query=question,passage=answer"
            )
        if role in columns:
            raise UserError(f"--columns: {role!r} is given twice")
        columns[role] = column
    labelled = {"text", "label"} & columns.keys()
    if labelled and columns.keys() != {"text", "label"}:
        raise UserError("--columns: text and label stand together, without any other role")
    if not labelled and not {"query", "passage"} <= columns.keys():
        raise UserError("--columns must name query and passage, or text and label")
    return columns


@dataclass(frozen=True)
class RawFolder:
    """A folder of raw data, and what did not come into it."""

    path: Path
    passed_over: tuple[str, ...] = ()
    """files of the input that are no data of a known kind"""


def raw_folder(
    input: str,
    columns: str | None,
    split: str,
    subset: str | None,
    output: Path,
    seed: int,
    overwrite: bool = False,
    progress: bool = True,
    options: ImportOptions | None = None,
) -> RawFolder:
    """The folder of raw data that `--input` means; anything else is first made one, `output/raw`.

    Several calls with the same `output` collect their datasets there. None replaces a dataset that
    came from another source, unless `overwrite` says so.

    Raises:
        UserError: as `list_sources` and `import_source`.
    """
    options = options or ImportOptions()
    options.reading.check()
    input = expand_home(input)
    if columns is None and _is_raw_folder(Path(input), input, options):
        return RawFolder(Path(input))
    chosen = None if columns is None else parse_columns(columns)
    sources = list_sources(input, split, subset)
    if options.both_directions and not any(source.parallel for source in sources):
        raise UserError(f"--both-directions is for parallel text, which {input} is not")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: give a folder.")
    folder = output / "raw"
    with disk_errors_are_user_errors(output, "Then run the same command again."):
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder / LOCK, "collecting raw data in"):
            record = open_origins(folder, overwrite)
            empty = [
                source.name
                for source in sources
                if import_source(source, chosen, record, seed, progress, options) is None
            ]
            record.finish(record.entries)
            if len(empty) == len(sources):
                raise UserError(f"{input} gives no rows: none of its units is translated")
            if empty:
                notice(f"{len(empty)} language pairs without a translation: {', '.join(empty)}")
    return RawFolder(folder, files_unused(Path(input), sources))


def _is_raw_folder(path: Path, given: str, options: ImportOptions) -> bool:
    """Whether it is read as it is: its .parquet and .jsonl files are raw data, whatever else."""
    if not path.is_dir():
        return is_missing_path(given)  # it is refused where raw folders are read
    files = [file for file in visible_files(path) if file.suffix.lower() in SUFFIXES]
    if options.reading != Reading() or are_shards(files):
        return False
    return bool(files) and all(map(is_raw_layout, files))


def open_origins(folder: Path, overwrite: bool = False) -> WorkRecord:
    """The record of where the raw files of a folder came from."""
    remedy = "Rename the file, take another --output, or --overwrite to make that folder anew"
    return WorkRecord(folder / ORIGINS, {}, _read_origins, overwrite, remedy)


def _read_origins(path: Path) -> Finished:
    try:
        origins = parse_json(path.read_bytes())
        return {}, {name: {"origin": entry["origin"]} for name, entry in origins.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, or --overwrite") from None


@dataclass
class Made:
    """Raw rows of a source, and what is known of them when the last one was read."""

    rows: Iterable[RawRow]
    faults: Faults
    task: Task | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    """rows or units, by the reason"""
    further: dict[str, Any] = field(default_factory=dict)

    def notes(self) -> dict[str, Any]:
        """For the raw file."""
        self.left_out["faulty"] += self.faults.count
        left_out = {name: number for name, number in sorted(self.left_out.items()) if number}
        return {**({"left_out": left_out} if left_out else {}), **self.further}


def import_source(
    source: Source,
    columns: Mapping[str, str] | None,
    record: WorkRecord,
    seed: int,
    progress: bool = True,
    options: ImportOptions | None = None,
) -> Path | None:
    """Write `<name>.parquet` in the raw layout; the same source and seed give the same bytes.

    Pairs stream. Labelled text is held in memory, and its task is noted in the file.

    Args:
        source: a file, a folder, or a dataset on the hub.
        columns: role -> column (`parse_columns`); None: the columns' names tell the form.
        record: of the folder to write to (`open_origins`).
        seed: of the choice of positives and negatives of labelled text.
        progress: a bar on stderr.
        options: see there.
    Returns:
        the file; None for parallel text without a translation.
    Raises:
        UserError: the source cannot be read, a column is missing, rows are faulty, or the file
            there came from another source, without the record's `overwrite`.
    """
    target = record.path.with_name(f"{source.name}.parquet")
    made = _make_rows(source, columns, options or ImportOptions(), seed, progress)
    if source.parallel is not None:
        rows = iter(made.rows)
        first = list(islice(rows, 1))
        if not first:
            former = record.entries.get(source.name, {}).get("origin")
            if former == source.origin and target.exists():
                problem = f"{source.path} has no translation any more, but {target} was made of it"
                record.replace(source.name, problem)
                record.write()
                target.unlink()
            return None
        made.rows = chain(first, rows)
    with atomic_file(target) as partial:
        if not write_raw(partial, made.rows, made.task, made.notes).rows:
            raise UserError(f"{source.path} gives no rows: it is empty, or no label has two texts")
        former = record.entries.get(source.name, {}).get("origin", source.origin)
        differs = target.exists() and not filecmp.cmp(target, partial, shallow=False)
        if differs and former != source.origin:
            said = f"{source.origin} gives a dataset of the same name, {source.name!r}"
            record.replace(source.name, f"{target} came from {former}, and {said}")
        record.begin(source.name)
    record.record(source.name, {"origin": source.origin})
    return target


def _make_rows(
    source: Source,
    columns: Mapping[str, str] | None,
    options: ImportOptions,
    seed: int,
    progress: bool,
) -> Made:
    made = Made((), Faults(source.path, options.skip_bad_rows))
    if source.parallel is not None:
        found = source.parallel.units(options.reading, made.left_out, made.faults)
        units = _with_bar(found, source, progress)
        language = source.parallel.pair[1]
        made.rows = parallel_rows(units, language, options.both_directions, made.left_out)
        return made
    if is_beir(Path(source.path)):
        rows = beir_rows(Path(source.path), source.split, made.left_out, made.faults)
        made.rows = _with_bar(rows, source, progress)
        return made
    table = open_source(source, options.reading)
    if table.provenance:
        made.further["provenance"] = table.provenance
    columns = _roles(table, columns)
    if "label" in (columns or ()):
        assert columns is not None
        _add_labelled(made, table, columns, source.name, seed, progress)
    else:
        records = _with_bar(table.read(_columns_to_read(table, columns)), source, progress)
        made.rows = _pair_rows(made, table, columns, records)
    return made


def _with_bar(items: Iterable[Any], source: Source, progress: bool) -> Iterable[Any]:
    return tqdm(items, unit=" row", desc=f"reading {source.name}", disable=not progress)


def _roles(table: Table, columns: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """The columns of each role; None where the table has a form of its own.

    Raises UserError where neither is so.
    """
    if columns is not None:
        for column in columns.values():
            if column not in table.names and table.names:
                raise UserError(
                    f"{table.path}: no column {column!r}; its columns are "
                    f"{', '.join(map(repr, table.names))}"
                )
        return columns
    if form_of(table.names) is None:
        if {"text", "label"} <= set(table.names):
            return {"text": "text", "label": "label"}
        if table.names:
            raise UserError(
                f"{table.path} has the columns {', '.join(map(repr, table.names))}; say which are "
                "what with --columns, e.g. --columns query=question,passage=answer or "
                "--columns text=review,label=stars"
            )
    return None


def _columns_to_read(table: Table, columns: Mapping[str, str] | None) -> set[str]:
    if columns is not None:
        return set(columns.values())
    form = form_of(table.names)
    own = {name for name in table.names if name in ROLES or NEGATIVE_COLUMN.fullmatch(name)}
    return own if form is None else own | form.needs | form.reads


def _pair_rows(
    made: Made, table: Table, columns: Mapping[str, str] | None, records: Iterable[Record]
) -> Iterator[RawRow]:
    form, prompts = form_of(table.names), set[str]()

    def rows_of(values: Mapping[str, Any], where: str) -> list[RawRow]:
        if columns is not None:
            return [row_of(values, columns, where, text_is_list=True)]
        if form is None:  # the first row cannot be read
            raise FaultyRow(f"{where}: the file's columns are not known")
        if form.name == "FlagEmbedding":
            prompts.add(values.get("prompt") or "")
            if len(prompts) > 1:
                raise UserError(
                    f"{where}: its 'prompt' differs from that of the rows before. A dataset has "
                    "one prompt: make a file for each."
                )
        return form.rows(values, where)

    for _, rows in good_rows(records, rows_of, made.faults):
        yield from rows
    if any(prompts):
        made.further["prompt"] = prompts.pop()


def _add_labelled(
    made: Made, table: Table, columns: Mapping[str, str], name: str, seed: int, progress: bool
) -> None:
    """Read labelled text, and say what is odd about it."""
    records = tqdm(
        table.read(set(columns.values())),
        unit=" row",
        desc=f"reading {name}",
        disable=not progress,
    )
    names = table.labels.get(columns["label"])
    texts = texts_by_label(records, columns, names, made.faults)
    made.rows, made.task = texts.rows(name, seed), texts.task
    made.left_out["repeated"] = texts.repeated
    made.left_out["alone with their label"] = texts.alone
    made.further["labels"] = len(texts.by_label)
    _say_labels(texts, name)


def _say_labels(texts: LabelledTexts, name: str) -> None:
    counts = sorted(texts.by_label.items(), key=lambda item: -len(item[1]))
    shown = ", ".join(f"{label!r} {len(found):,}" for label, found in counts[:5])
    more = f" and {len(counts) - 5:,} more" if len(counts) > 5 else ""
    notice(f"{name}: {texts.task}, {len(counts):,} labels ({shown}{more})")
    if texts.contradicted:
        warn(
            f"{name}: {texts.contradicted:,} texts came again with another label; the first counts"
        )
    for labels in texts.alike[:5]:
        warn(f"{name}: the labels {', '.join(map(repr, labels))} look alike, but are taken as many")
