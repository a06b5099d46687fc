"""Anybody's data as raw contrastive data, which everything else reads: one .parquet per dataset.

`query=question,passage=answer` renames columns, `text=review,label=stars` makes rows of labelled
text (`labelled`). Without that, the columns tell whose form a file has (`forms`). Parallel text
(`parallel`), BEIR's folders (`beir`), what `datasets` saves, and datasets on the hub are read too.
"""

import filecmp
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ml_embed.config import Task
from ml_embed.errors import UserError, one_line
from ml_embed.files.atomic import atomic_file, disk_errors_are_user_errors
from ml_embed.files.locks import lock_folder
from ml_embed.files.paths import expand_home, is_hub_name
from ml_embed.files.work_record import Finished, WorkRecord
from ml_embed.notices import notice, warn
from ml_embed.prepare.beir import beir_rows, is_beir
from ml_embed.prepare.forms import form_of
from ml_embed.prepare.labelled import LabelledTexts, texts_by_label
from ml_embed.prepare.parallel import (
    CATALOGUES,
    MEMORIES,
    ParallelText,
    is_tatoeba,
    list_parallel,
    parallel_beside,
    parallel_rows,
)
from ml_embed.prepare.raw import SUFFIXES, is_raw_layout
from ml_embed.prepare.raw_parquet import write_raw
from ml_embed.prepare.records import Reading, Table, open_shards, open_table, stem_and_suffix
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

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")
ROLES = ("query", "passage", "negatives", "text", "label", *OPTIONAL_NAMES)
ORIGINS = ".origins.json"
"""Says where each collected raw file came from."""
LOCK = ".import.lock"
_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<of>\d{5})(-[0-9a-f]+)?")
_SAVED = ("state.json", "dataset_dict.json")
_OF_SAVED = frozenset({"dataset_infos.json", "dataset_info.json", *_SAVED})


@dataclass(frozen=True)
class Source:
    """One dataset, wherever it comes from."""

    path: str
    """a file, a folder, or a dataset's name on the hub"""
    split: str = "train"
    subset: str | None = None
    """which of a hub dataset's configurations"""
    shards: tuple[Path, ...] = ()
    """of a folder that is one dataset in many files"""
    parallel: ParallelText | None = None

    @property
    def name(self) -> str:
        """What the dataset is called."""
        if self.parallel:
            return self.parallel.name
        if self.shards or Path(self.path).is_dir():
            return _folder_name(Path(self.path))
        stem, suffix = stem_and_suffix(Path(self.path))
        if suffix in TABLES:
            return stem
        return "_".join(filter(None, [*self.path.split("/"), self.subset]))

    @property
    def origin(self) -> str:
        """What tells it from other sources of the same name."""
        if self.shards or self.parallel or Path(self.path).exists():
            return str(Path(self.path).resolve())
        return f"{self.path} on the hub, split {self.split}"


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


def list_sources(given: str, split: str, subset: str | None) -> list[Source]:
    """The datasets that `--input` means: a file, those of a folder, or a name on the hub.

    Raises:
        UserError: nothing there, or two of one name.
    """
    path = Path(given)
    if path.is_dir():
        return _sources_of_folder(path, split)
    if path.is_file():
        return _sources_of_file(path)
    if stem_and_suffix(path)[1] in (*TABLES, *CATALOGUES, *MEMORIES) or _is_missing_path(given):
        raise UserError(f"--input {given} does not exist")
    return [Source(given, split, subset)]


def _sources_of_file(path: Path) -> list[Source]:
    suffix = stem_and_suffix(path)[1]
    if suffix in TABLES and not (suffix == ".tsv" and is_tatoeba(path)):
        return [Source(str(path))]
    found = [Source(str(path), parallel=text) for text in parallel_beside(path)]
    if not found:
        kinds = ", ".join((*TABLES, *CATALOGUES, *MEMORIES))
        raise UserError(
            f"{path} is of a kind that is not read; take one of {kinds}, or one of two files of a "
            "Moses pair (name.en beside name.sw)"
        )
    return found


def _sources_of_folder(folder: Path, split: str) -> list[Source]:
    if is_beir(folder):
        return [Source(str(folder), split)]
    if any((folder / name).is_file() for name in _SAVED):
        return [Source(str(folder), split, shards=_saved_shards(folder, split))]
    here = _visible_files(folder)
    tables = [path for path in here if stem_and_suffix(path)[1] in TABLES]
    inner = _visible_files(folder / "data") if (folder / "data").is_dir() else []
    if (shards := _hub_shards(tables or inner, folder, split)) is not None:
        return [Source(str(folder), split, shards=shards)]
    sources = [Source(str(p)) for p in tables if not (p.suffix == ".tsv" and is_tatoeba(p))]
    catalogues = [path for path in _visible_files(folder, True) if path.suffix in CATALOGUES]
    others = [path for path in here if path.suffix not in CATALOGUES]
    texts = list_parallel([*others, *catalogues], _folder_name(folder))
    sources += [Source(str(text.files[0]), parallel=text) for text in texts]
    if not sources:
        raise UserError(
            f"{folder} holds no {', '.join((*TABLES, *CATALOGUES, *MEMORIES))} file, and no Moses "
            "pair (name.en beside name.sw)"
        )
    for name, number in Counter(source.name for source in sources).items():
        if number > 1:
            raise UserError(f"{folder} holds several files of dataset {name!r}: rename them")
    return sources


def _folder_name(folder: Path) -> str:
    return folder.name if folder.name not in ("", "..") else folder.resolve().name


def _visible_files(folder: Path, below: bool = False) -> list[Path]:
    found = folder.rglob("*") if below else folder.iterdir()
    return sorted(path for path in found if path.is_file() and path.name[0] != ".")


def _hub_shards(files: list[Path], folder: Path, split: str) -> tuple[Path, ...] | None:
    """The parts of a split, of files that are called as on the hub; None if they are not."""
    files = [file for file in files if file.name not in _OF_SAVED]
    if not _are_shards(files):
        return None
    parts: dict[str, dict[int, Path]] = {}
    totals = {}
    for file in files:
        match = _SHARD.fullmatch(stem_and_suffix(file)[0])
        assert match is not None
        parts.setdefault(match["split"], {})[int(match["number"])] = file
        totals[match["split"]] = int(match["of"])
    if split not in parts:
        raise UserError(
            f"{folder} has no split {split!r}; choose another with --split: "
            f"{', '.join(sorted(parts))}"
        )
    missing = sorted(set(range(totals[split])) - parts[split].keys())
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of the {totals[split]} parts of split {split!r} are "
            f"missing, the first being number {missing[0]}. Download it again."
        )
    return tuple(parts[split][number] for number in sorted(parts[split]))


def _are_shards(files: list[Path]) -> bool:
    """Whether files are called as on the hub: train-00000-of-00002.parquet."""
    return bool(files) and all(_SHARD.fullmatch(stem_and_suffix(file)[0]) for file in files)


def _saved_shards(folder: Path, split: str) -> tuple[Path, ...]:
    """The Arrow files of what `Dataset.save_to_disk` wrote."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
            if split not in splits:
                raise UserError(
                    f"{folder} has no split {split!r}; choose another with --split: "
                    f"{', '.join(splits)}"
                )
            folder = folder / split
        state = json.loads((folder / "state.json").read_text("utf-8"))
        files = tuple(folder / file["filename"] for file in state["_data_files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no whole saved dataset ({one_line(error)}).") from error
    if not files:
        raise UserError(f"{folder} has no rows. Remove it or fill it.")
    return files


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
    return RawFolder(folder, _passed_over(Path(input), sources))


def _is_raw_folder(path: Path, given: str, options: ImportOptions) -> bool:
    """Whether it is read as it is: its .parquet and .jsonl files are raw data, whatever else."""
    if not path.is_dir():
        return _is_missing_path(given)  # it is refused where raw folders are read
    files = [file for file in _visible_files(path) if file.suffix.lower() in SUFFIXES]
    if options.reading != Reading() or _are_shards(files):
        return False
    return bool(files) and all(map(is_raw_layout, files))


def _passed_over(path: Path, sources: list[Source]) -> tuple[str, ...]:
    if not path.is_dir():
        return ()
    used = {Path(source.path).name for source in sources}
    used |= {file.name for source in sources for file in source.shards}
    used |= {file.name for source in sources if source.parallel for file in source.parallel.files}
    if any(is_beir(Path(source.path)) for source in sources):
        return ()
    return tuple(file.name for file in _visible_files(path) if file.name not in used | _OF_SAVED)


def open_origins(folder: Path, overwrite: bool = False) -> WorkRecord:
    """The record of where the raw files of a folder came from."""
    remedy = "Rename the file, take another --output, or --overwrite to make that folder anew"
    return WorkRecord(folder / ORIGINS, {}, _read_origins, overwrite, remedy)


def _read_origins(path: Path) -> Finished:
    try:
        origins = json.loads(path.read_text(encoding="utf-8"))
        return {}, {name: {"origin": entry["origin"]} for name, entry in origins.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, or --overwrite") from None


def _is_missing_path(given: str) -> bool:
    return not Path(given).exists() and not is_hub_name(given)


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
        units = _with_bar(source.parallel.units(options.reading, made.left_out), source, progress)
        language = source.parallel.pair[1]
        made.rows = parallel_rows(units, language, options.both_directions, made.left_out)
        return made
    if is_beir(Path(source.path)):
        rows = beir_rows(Path(source.path), source.split, made.left_out, made.faults)
        made.rows = _with_bar(rows, source, progress)
        return made
    table = _open(source, options.reading)
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


def _open(source: Source, reading: Reading) -> Table:
    if source.shards:
        return open_shards(source.shards, reading)
    if stem_and_suffix(Path(source.path))[1] in TABLES:
        return open_table(Path(source.path), reading)
    return _open_hub(source)


def _open_hub(source: Source) -> Table:
    import datasets

    try:
        stream = datasets.load_dataset(
            source.path, source.subset, split=source.split, streaming=True
        )
        features = stream.features or {}
        names = list(features) or list(next(iter(stream), {}))
        labels = {
            name: feature.names
            for name, feature in features.items()
            if isinstance(feature, datasets.ClassLabel)
        }
    except Exception as error:
        raise _hub_error(source, error) from error

    def read(_: Iterable[str]) -> Iterator[Record]:
        try:
            for number, values in enumerate(stream):
                yield Record(f"{source.path}, row {number}", values, number)
        except Exception as error:
            raise _hub_error(source, error) from error

    return Table(source.path, names, read, labels)


def _hub_error(source: Source, error: Exception) -> UserError:
    """`datasets` has its own classes of errors, and those of every file format."""
    if isinstance(error, UserError):
        return error
    return UserError(
        f"{source.path} cannot be read ({type(error).__name__}: {one_line(error)}). It is no file "
        "here either: without network access, give a file"
    )
