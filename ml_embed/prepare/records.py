"""Files of rows as records: .csv, .tsv, .json, .jsonl, .parquet and .arrow, also packed ones.

A row is read as it was written, or refused with its line (text files, counted from 1) or its row
(others, counted from 0). A path is a path: nothing in a file's name is a pattern.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from ml_embed.errors import UserError, one_line
from ml_embed.files.json_file import parse_json
from ml_embed.files.parquet import broken_file_is_user_error, open_parquet, refuse_doubles
from ml_embed.prepare.rows import FaultyRow, Record

PACKED = (".gz", ".bz2", ".xz", ".zst")
BATCH_ROWS = 1024
_OTHER_DELIMITERS = (";", "\t", ",", "|")


@dataclass(frozen=True)
class Reading:
    """How text files are read."""

    encoding: str = "utf-8"
    delimiter: str | None = None
    """between the fields of .csv and .tsv files; None = a comma, or a tab"""

    def check(self) -> None:
        """Raise UserError for an encoding that Python does not know, or no single delimiter."""
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise UserError(
                f"--encoding {self.encoding!r} is unknown; take e.g. utf-8, utf-16 or cp1252"
            ) from None
        if self.delimiter is not None and (
            len(self.delimiter) != 1 or self.delimiter in ('"', "\n", "\r", "\0")
        ):
            raise UserError(f"--delimiter is {self.delimiter!r}: it must be one character")


@dataclass(frozen=True)
class Table:
    """A file of rows."""

    path: str
    names: list[str]
    """its columns; of JSON, those of the first row"""
    read: Callable[[Collection[str]], Iterable[Record]]
    """gives the rows, with these columns at least"""
    labels: dict[str, list[str]]
    """column -> the names of its numbers, where the file says them (`datasets.ClassLabel`)"""
    provenance: dict[str, str] = field(default_factory=dict)
    """`source`, `revision` and `license`, as far as the place it comes from says them"""


def stem_and_suffix(path: Path) -> tuple[str, str]:
    """ "a.en.CSV.gz" -> ("a.en", ".csv"): a packed file's last suffix does not count."""
    inner = Path(path.stem) if path.suffix.lower() in PACKED else path
    return inner.stem, inner.suffix.lower()


def open_table(path: Path, reading: Reading) -> Table:
    """A file of rows, opened by its suffix.

    Raises:
        UserError: the file is broken or has no rows, or two columns have one name.
    """
    suffix = stem_and_suffix(path)[1]
    if suffix in (".csv", ".tsv"):
        return _open_delimited(path, reading, suffix)
    if suffix in (".json", ".jsonl"):
        return _open_json(path, reading, suffix)
    return _open_arrow(path)


def open_shards(paths: Sequence[Path], reading: Reading) -> Table:
    """Several files of one dataset as one, in order. Raises UserError as `open_table`."""
    tables = [open_table(path, reading) for path in paths]
    for table in tables:
        if set(table.names) != set(tables[0].names):
            raise UserError(
                f"{table.path} and {tables[0].path} are parts of one dataset, but have other "
                f"columns: {', '.join(map(repr, table.names))}"
            )

    def read(columns: Collection[str]) -> Iterator[Record]:
        for table in tables:
            yield from table.read(columns)

    return Table(str(paths[0].parent), tables[0].names, read, tables[0].labels)


def column_texts(path: Path, column: str, reading: Reading | None = None) -> Iterator[str]:
    """The texts of one column of a file of rows, or the lines of a .txt file, in order.

    Raises:
        UserError: the file is missing or broken, has no such column, or a row holds no text there.
    """
    reading = reading or Reading()
    if not path.is_file():
        raise UserError(f"{path} is no file; give one of texts")
    if stem_and_suffix(path)[1] == ".txt":
        with text_lines(path, reading, newline="\n") as lines:
            yield from (line.rstrip("\r\n") for line in lines)
        return
    table = open_table(path, reading)
    if table.names and column not in table.names:
        raise UserError(
            f"{path} has no column {column!r}; name one of {', '.join(map(repr, table.names))} "
            "with --column"
        )
    for record in table.read([column]):
        if isinstance(record.values, FaultyRow):
            raise record.values
        text = record.values.get(column)
        if not isinstance(text, str):
            raise UserError(f"{record.where}: {column} is {text!r}, which is no text")
        yield text


# --- CSV and TSV


def _open_delimited(path: Path, reading: Reading, suffix: str) -> Table:
    delimiter = reading.delimiter or ("\t" if suffix == ".tsv" else ",")
    header = next(_fields(path, reading, delimiter), (1, []))[1]
    if isinstance(header, FaultyRow):
        raise UserError(str(header))
    if not header:
        raise UserError(f"{path} has no rows. Remove the file or fill it.")
    if len(header) == 1:
        for other in _OTHER_DELIMITERS:
            if other in header[0]:
                raise UserError(
                    f"{path}, line 1: one column, {header[0]!r}. If its fields are separated by "
                    f"{other!r}, say so with --delimiter {other!r}"
                )
    refuse_doubles(header, path)

    def read(columns: Collection[str]) -> Iterator[Record]:
        rows = _fields(path, reading, delimiter)
        next(rows)
        for line, fields in rows:
            where = f"{path}, line {line}"
            if isinstance(fields, FaultyRow):
                yield Record(where, fields)
            elif len(fields) != len(header):
                yield Record(
                    where,
                    FaultyRow(
                        f"{where}: {len(fields)} fields, but the header has {len(header)}. Put "
                        f'fields that hold {delimiter!r} or line ends in quotes ("), and double '
                        "quotes inside them."
                    ),
                )
            else:
                yield Record(where, dict(zip(header, fields, strict=True)))

    return Table(str(path), header, read, {})


def _fields(
    path: Path, reading: Reading, delimiter: str
) -> Iterator[tuple[int, list[str] | FaultyRow]]:
    """(line on which it begins, fields) of each row that is not blank, the header first."""
    csv.field_size_limit(sys.maxsize)
    width = 0  # fields of the header
    with text_lines(path, reading, newline="") as lines:
        of_row: list[str] = []  # the lines that were read for the row
        rows = csv.reader(_kept(lines, of_row), delimiter=delimiter, strict=True)
        while True:
            line = rows.line_num + 1
            of_row.clear()
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, FaultyRow(f"{path}, line {line}: {_quote_problem(error)}")
                continue
            tabs = {text.count("\t") for text in of_row}
            if delimiter == "\t" and len(of_row) > 1 and tabs == {width - 1}:
                # Each of the lines is a row by itself: the quotes were part of texts.
                yield line, FaultyRow(f"{path}, line {line}: {_quote_problem(None)}")
            elif fields:
                width = width or len(fields)
                yield line, fields


def _kept(lines: Iterable[str], into: list[str]) -> Iterator[str]:
    for line in lines:
        into.append(line)
        yield line


def _quote_problem(error: csv.Error | None) -> str:
    said = f" ({error})" if error else ", or it swallows whole lines"
    return (
        f'a field that begins with a quote (") has no right end{said}. Quotes that are part of a '
        "text must be doubled, and the field put in quotes."
    )


# --- JSON


def _open_json(path: Path, reading: Reading, suffix: str) -> Table:
    listed = suffix == ".json" and _begins_with_bracket(path, reading)

    def read(columns: Collection[str]) -> Iterator[Record]:
        yield from _json_array(path, reading) if listed else json_lines(path, reading)

    first = next(iter(read([])), None)
    if first is None:
        raise UserError(f"{path} has no rows. Remove the file or fill it.")
    if isinstance(first.values, FaultyRow):
        return Table(str(path), [], read, {})
    return Table(str(path), list(first.values), read, {})


def json_lines(path: Path, reading: Reading | None = None) -> Iterator[Record]:
    """The lines that are not blank, each an object."""
    row = 0
    with text_lines(path, reading or Reading(), newline="\n", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield Record(where, _json_object(line, where), row)
                row += 1


def count_json_lines(path: Path) -> int:
    """Lines that are not blank, without a look into them."""
    with text_lines(path, Reading(), newline="\n", errors="surrogateescape") as lines:
        return sum(1 for line in lines if line.strip())


def _json_object(line: str, where: str) -> dict[str, Any] | FaultyRow:
    try:
        line.encode()
        value = _DECODER.decode(line)
    except UnicodeEncodeError as error:  # bytes that are not of the encoding
        value = f"it holds bytes that are not UTF-8, at character {error.start}"
    except _Double as error:
        return FaultyRow(f"{where}: {error}")
    except (ValueError, RecursionError) as error:
        value = str(error)
        if line.rstrip().endswith(("},", "}]")):
            value += "; a comma or bracket stands after the object"
    else:
        if isinstance(value, dict):
            return value
        kind = type(value).__name__
        return FaultyRow(f"{where}: {kind} instead of an object with 'query' and 'passage'.")
    return FaultyRow(f"{where}: not valid JSON ({value}). Every line must be one object.")


class _Double(ValueError):
    """A name that stands twice in one object."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise _Double(f"{name!r} stands twice in one object. Keep one.")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_without_doubles)


def _begins_with_bracket(path: Path, reading: Reading) -> bool:
    with text_lines(path, reading, newline="\n", errors="replace") as lines:
        return next((line.strip() for line in lines if line.strip()), "").startswith("[")


def _json_array(path: Path, reading: Reading) -> Iterator[Record]:
    with text_lines(path, reading, newline="\n") as lines:
        text = lines.read()
    try:
        rows = json.loads(text, object_pairs_hook=_without_doubles)
    except _Double as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        hint = ""
        if isinstance(error, json.JSONDecodeError) and text[: error.pos].rstrip().endswith(","):
            hint = " after a comma: the last item must have none"
        raise UserError(
            f"{path}{place}: not valid JSON ({one_line(error)}{hint}). Write one array of objects, "
            "or one object per line."
        ) from None
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        kind = type(row).__name__
        yield Record(
            where, row if isinstance(row, dict) else FaultyRow(f"{where}: {kind}, not an object.")
        )


# --- parquet and Arrow


def _open_arrow(path: Path) -> Table:
    with _arrow_file(path) as file, broken_file_is_user_error(path):
        schema = file.schema_arrow if isinstance(file, pq.ParquetFile) else file.schema
        names = schema.names
    refuse_doubles(names, path)

    def read(columns: Collection[str]) -> Iterator[Record]:
        names = [name for name in schema.names if name in columns]
        row = 0
        with _arrow_file(path) as file, broken_file_is_user_error(path):
            for batch in _arrow_batches(file, names):
                for values in batch.to_pylist():
                    yield Record(f"{path}, row {row}", values, row)
                    row += 1

    return Table(str(path), schema.names, read, _label_names(schema))


@contextmanager
def _arrow_file(path: Path) -> Iterator[Any]:
    """A parquet file, or an Arrow file or stream, as `datasets` saves."""
    packed, is_parquet = path.suffix.lower() in PACKED, stem_and_suffix(path)[1] == ".parquet"
    if is_parquet and not packed:
        with open_parquet(path) as file:
            yield file
        return
    with broken_file_is_user_error(path):
        source = pa.BufferReader(open_bytes(path).read()) if packed else pa.memory_map(str(path))
        with source:
            if is_parquet:
                yield pq.ParquetFile(source)
                return
            try:
                yield pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                source.seek(0)
                yield pa.ipc.open_file(source)


def _arrow_batches(file: Any, names: list[str]) -> Iterator[pa.RecordBatch]:
    if isinstance(file, pq.ParquetFile):
        yield from file.iter_batches(batch_size=BATCH_ROWS, columns=names)
        return
    stream = isinstance(file, pa.ipc.RecordBatchStreamReader)
    batches = file if stream else map(file.get_batch, range(file.num_record_batches))
    for batch in batches:
        batch.validate(full=True)  # Arrow reads damaged offsets as they are, beyond its memory too
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.select(names).slice(start, BATCH_ROWS)


def _label_names(schema: pa.Schema) -> dict[str, list[str]]:
    """What `datasets` writes of a ClassLabel's names."""
    try:
        info = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info.get("info", {}).get("features", {})
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, AttributeError):
        return {}


# --- bytes and text


def open_bytes(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if suffix == ".bz2":
        return bz2.open(path)
    if suffix == ".xz":
        return lzma.open(path)
    if suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


@contextmanager
def text_lines(
    path: Path, reading: Reading, newline: str, errors: str = "strict"
) -> Iterator[io.TextIOWrapper]:
    """A text file without its byte order mark; what cannot be read becomes a UserError."""
    is_utf8 = codecs.lookup(reading.encoding).name == "utf-8"
    encoding = "utf-8-sig" if is_utf8 else reading.encoding
    try:
        with (
            open_bytes(path) as file,
            io.TextIOWrapper(file, encoding, errors, newline=newline) as lines,
        ):
            if is_utf8:
                _refuse_utf16(path)
            yield lines
    except (UnicodeDecodeError, UnicodeError) as error:
        raise UserError(_encoding_problem(path, reading, error)) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}).") from error


def _refuse_utf16(path: Path) -> None:
    with open_bytes(path) as file:
        start = file.read(64)
    zeros = start[1::2].count(0), start[::2].count(0)
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{path} is UTF-16: say so with --encoding utf-16")
    if len(start) >= 8 and max(zeros) > len(start) // 4:
        name = "utf-16-le" if zeros[0] > zeros[1] else "utf-16-be"
        raise UserError(f"{path} looks like UTF-16: if it is, say so with --encoding {name}")


def _encoding_problem(path: Path, reading: Reading, error: UnicodeError) -> str:
    if codecs.lookup(reading.encoding).name != "utf-8":
        return f"{path} is not {reading.encoding} ({one_line(error)}); give its --encoding"
    with open_bytes(path) as file:
        line = next((n for n, content in enumerate(file, start=1) if not _is_utf8(content)), 0)
    return (
        f"{path}, line {line}: text that is not UTF-8. Give its --encoding, e.g. cp1252 for a file "
        "from Windows, or save it as UTF-8"
    )


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
