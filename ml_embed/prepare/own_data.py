"""Anybody's data as raw contrastive data: files and hub datasets with other columns, labelled text.

`query=question,passage=answer` renames columns. `text=review,label=stars` makes rows of labelled
text. With two labels they are classification: a text, its label, the other label. With more they
are clustering: a text, another of its label, texts of other labels. What comes out is one raw
.parquet file per dataset, which everything else reads.
"""

import filecmp
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ml_embed.config import Task
from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_file, disk_errors_are_user_errors
from ml_embed.files.locks import lock_folder
from ml_embed.files.paths import expand_home, is_hub_name
from ml_embed.files.work_record import Finished, WorkRecord
from ml_embed.prepare.raw_parquet import write_raw
from ml_embed.prepare.rows import NEGATIVE_COLUMN, RawRow, row_of, text_of, value_of

BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
PACKED = (".gz", ".bz2", ".xz", ".zst")
ROLES = ("query", "passage", "negatives", "text", "label")
MOST_NEGATIVES = 24  # as in the published data
ORIGINS = ".origins.json"
"""Says where each collected raw file came from."""
LOCK = ".import.lock"


@dataclass(frozen=True)
class Source:
    """Where data comes from."""

    path: str
    """a file, or a dataset's name on the hub"""
    split: str = "train"
    subset: str | None = None
    """which of a hub dataset's configurations"""

    @property
    def name(self) -> str:
        """What the dataset is called."""
        stem, suffix = _stem_and_suffix(Path(self.path))
        return (
            stem
            if suffix in BUILDERS
            else "_".join(filter(None, [*self.path.split("/"), self.subset]))
        )

    @property
    def origin(self) -> str:
        """What tells it from other sources of the same name."""
        if _builder(Path(self.path)) is not None:
            return str(Path(self.path).resolve())
        return f"{self.path} on the hub, split {self.split}"


def _stem_and_suffix(path: Path) -> tuple[str, str]:
    """ "a.en.CSV.gz" -> ("a.en", ".csv"): a packed file's last suffix does not count."""
    inner = Path(path.stem) if path.suffix.lower() in PACKED else path
    return inner.stem, inner.suffix.lower()


def _builder(path: Path) -> str | None:
    """The loader of `datasets` that reads such a file, or None."""
    return BUILDERS.get(_stem_and_suffix(path)[1])


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
                "or text and label, e.g. query=question,passage=answer"
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
    """The datasets that `--input` means: a file, the files of a folder, or a name on the hub.

    Raises:
        UserError: nothing there, or two files of one name.
    """
    path = Path(given)
    if path.is_dir():
        files = sorted(
            p
            for p in path.iterdir()
            if p.is_file() and p.name[0] != "." and _builder(p) is not None
        )
        if not files:
            raise UserError(f"{path} holds no {', '.join(BUILDERS)} file")
        sources = [Source(str(file)) for file in files]
        names = [source.name for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{path} holds several files of dataset {name!r}: rename them")
        return sources
    if path.is_file():
        if _builder(path) is None:
            raise UserError(
                f"{path} is of a kind that is not read; take one of {', '.join(BUILDERS)}"
            )
        return [Source(given)]
    if _builder(path) is not None or _is_missing_path(given):
        raise UserError(f"--input {given} does not exist")
    return [Source(given, split, subset)]


def raw_folder(
    input: str,
    columns: str | None,
    split: str,
    subset: str | None,
    output: Path,
    seed: int,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """The folder of raw data that `--input` means; anything else is first made one, `output/raw`.

    Several calls with the same `output` collect their datasets there. None replaces a dataset that
    came from another source, unless `overwrite` says so.

    Raises:
        UserError: as `list_sources` and `import_source`.
    """
    input = expand_home(input)
    if columns is None and (Path(input).is_dir() or _is_missing_path(input)):
        return Path(input)  # one that does not exist is refused where raw folders are read
    chosen = None if columns is None else parse_columns(columns)
    sources = list_sources(input, split, subset)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: give a folder.")
    folder = output / "raw"
    with disk_errors_are_user_errors(output, "Then run the same command again."):
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder / LOCK, "collecting raw data in"):
            record = open_origins(folder, overwrite)
            for source in sources:
                import_source(source, chosen, record, seed, progress)
            record.finish(record.entries)
    return folder


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


def import_source(
    source: Source,
    columns: Mapping[str, str] | None,
    record: WorkRecord,
    seed: int,
    progress: bool = True,
) -> Path:
    """Write `<name>.parquet` in the raw layout; the same source and seed give the same bytes.

    Pairs stream. Labelled text is held in memory, and its task is noted in the file.

    Args:
        source: a file or a dataset on the hub.
        columns: role -> column (`parse_columns`); None takes columns that have the roles' names.
        record: of the folder to write to (`open_origins`).
        seed: of the choice of positives and negatives of labelled text.
        progress: a bar on stderr.
    Returns:
        the file.
    Raises:
        UserError: the source cannot be read, a column is missing, a text is empty or no text, or
            the file there came from another source, without the record's `overwrite`.
    """
    target = record.path.with_name(f"{source.name}.parquet")
    columns = _columns_by_name(source) if columns is None else columns
    records = tqdm(
        _read(source, columns), unit=" row", desc=f"reading {source.name}", disable=not progress
    )
    rows, task = _make_rows(records, columns, source, seed)
    with atomic_file(target) as partial:
        if not write_raw(partial, rows, task).rows:
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
    records: Iterable[dict], columns: Mapping[str, str], source: Source, seed: int
) -> tuple[Iterator[RawRow], Task | None]:
    """Raw rows, and the task of labelled text."""
    if "label" not in columns:
        return _pair_rows(records, columns, source.path), None
    by_label = _texts_by_label(records, columns, source.path)
    if len(by_label) == 2:
        return _classification_rows(by_label), "classification"
    return _clustering_rows(by_label, source, seed), "clustering"


def _columns_by_name(source: Source) -> dict[str, str]:
    """The columns of the first row that have the name of a role."""
    row = next(_read(source, {}), None)
    if row is None:
        raise UserError(f"{source.path} has no rows")
    named = {name: name for name in row if name in ROLES or NEGATIVE_COLUMN.fullmatch(name)}
    pair = {name: name for name in named if name not in ("text", "label")}
    columns = (
        pair
        if {"query", "passage"} <= pair.keys()
        else {n: n for n in named if n in ("text", "label")}
    )
    if len(columns) < 2:
        raise UserError(
            f"{source.path} has the columns {', '.join(map(repr, row))}; say which are what with "
            "--columns, e.g. --columns query=question,passage=answer or "
            "--columns text=review,label=stars"
        )
    return columns


def _read(source: Source, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of a source; labels that have names by their names."""
    import datasets

    builder = _builder(Path(source.path))
    try:
        if builder is None:
            stream = datasets.load_dataset(
                source.path, source.subset, split=source.split, streaming=True
            )
        else:
            options: dict[str, Any] = {
                "data_files": [source.path],
                "split": "train",
                "streaming": True,
            }
            if builder == "csv":  # a text may look like a number, or read "NA"
                options |= {
                    "converters": dict.fromkeys(columns.values(), str),
                    "keep_default_na": False,
                }
                options |= {"sep": "\t"} if _stem_and_suffix(Path(source.path))[1] == ".tsv" else {}
            stream = datasets.load_dataset(builder, **options)
        features = stream.features or {}
        names = getattr(features.get(columns.get("label", "")), "names", None)
        for row in stream:
            if names:
                number = row[columns["label"]]
                row[columns["label"]] = None if number is None or number < 0 else names[number]
            yield row
    except UserError:
        raise
    except Exception as error:  # datasets has its own classes, and those of every file format
        reason = (
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        )
        remedy = (
            "" if builder else ". It is no file here either: without network access, give a file"
        )
        raise UserError(f"{source.path} cannot be read ({reason}){remedy}") from error


def _pair_rows(records: Iterable[dict], columns: Mapping[str, str], path: str) -> Iterator[RawRow]:
    for number, record in enumerate(records):
        listed = columns.get("negatives", "")
        if isinstance(record.get(listed), str):  # a column of one negative per row
            record = {**record, listed: [record[listed]]}
        yield row_of(record, columns, f"{path}, row {number}")


def _texts_by_label(
    records: Iterable[dict], columns: Mapping[str, str], path: str
) -> dict[str, list[str]]:
    """Label -> its texts, each text once: under the first label it came with."""
    by_label: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for number, record in enumerate(records):
        where = f"{path}, row {number}"
        text = text_of(record, columns["text"], where)
        label = value_of(record, columns["label"], where)
        if label is None or label == "":
            raise UserError(f"{where}: {columns['label']!r} is empty. Fill it or remove the row")
        if text not in seen:
            seen.add(text)
            by_label[str(label)].append(text)
    if len(by_label) < 2:
        raise UserError(
            f"{path}: column {columns['label']!r} has {len(by_label)} different labels; at least 2 "
            "are needed"
        )
    return dict(sorted(by_label.items()))


def _classification_rows(by_label: Mapping[str, list[str]]) -> Iterator[RawRow]:
    """A text, its label, the other label."""
    first, second = by_label
    for label, other in ((first, second), (second, first)):
        for text in by_label[label]:
            yield RawRow(text, label, [other])


def _clustering_rows(
    by_label: Mapping[str, list[str]], source: Source, seed: int
) -> Iterator[RawRow]:
    """A text, another of its label, texts of other labels, drawn again for each text.

    Labels with a single text give no row: it has no positive.
    """
    rng = random.Random(f"{seed}/{source.name}")
    everything = [text for texts in by_label.values() for text in texts]
    start = 0
    for texts in by_label.values():
        # All but this label's texts, which begin at `start`.
        others = range(len(everything) - len(texts))
        for i, text in enumerate(texts if len(texts) > 1 else ()):
            positive = rng.randrange(len(texts) - 1)
            drawn = rng.sample(others, min(MOST_NEGATIVES, len(others)))
            negatives = [everything[place + len(texts) * (place >= start)] for place in drawn]
            yield RawRow(text, texts[positive + (positive >= i)], negatives)
        start += len(texts)
