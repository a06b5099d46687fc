"""Ways to spoil a file so that it is still nearly what it was, chosen by a `random.Random`."""

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

WHOLE_NUMBERS = (0, -1, 1, 3, 7, 10**6, 2**31, 2**63, -(2**70), 10**30)
NUMBERS = (*WHOLE_NUMBERS, 0.5, -1.5, 1e308, 1e-300, float("nan"), float("inf"))
TEXTS = (
    "",
    " ",
    "..",
    "../x",
    "/",
    "a/b",
    "\0",
    "é\u202e",
    "猫" * 300,
    "auto",
    "1",
    "{}",
    "x" * 255,
)
SPLICED = (b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b'"', b"\n", b"\r", b"\t", b"{", b"[1,", b"e999")


def spoil(random: Random, path: Path) -> str:
    """Change one file in place; says how."""
    ways = [_torn, _bytes, _other_kind]
    own = {".json": _json_value, ".jsonl": _json_line, ".parquet": _table}.get(path.suffix, _line)
    way = random.choice([own] * 5 + ways)
    return f"{path.name}: {way(random, path)}"


def _torn(random: Random, path: Path) -> str:
    length = random.choice((0, random.randint(0, path.stat().st_size)))
    os.truncate(path, length)
    return f"torn at {length}"


def _bytes(random: Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    places = [random.randrange(len(content)) for _ in range(random.randint(1, 4) if content else 0)]
    for place in places:
        content[place] = random.randrange(256)
    path.write_bytes(content)
    return f"other bytes at {places}"


def _other_kind(random: Random, path: Path) -> str:
    kind = random.choice(("gone", "folder", "dangling link", "empty"))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "empty":
        path.touch()
    return kind


def _value(random: Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kinds = [None, True, False, random.choice(NUMBERS), random.choice(TEXTS)]
    if depth < 2:
        kinds += [
            [_value(random, depth + 1) for _ in range(random.randint(0, 3))],
            {random.choice(TEXTS): _value(random, depth + 1) for _ in range(random.randint(0, 2))},
        ]
    return random.choice(kinds)


def _json_value(random: Random, path: Path) -> str:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return _bytes(random, path)
    text, said = _changed_json(random, value)
    path.write_bytes(text)
    return said


def _json_line(random: Random, path: Path) -> str:
    lines = path.read_bytes().splitlines()
    number = random.randrange(len(lines)) if lines else 0
    try:
        text, said = _changed_json(random, json.loads(lines[number]))
    except (ValueError, IndexError, RecursionError):
        return _line(random, path)
    path.write_bytes(b"\n".join([*lines[:number], text, *lines[number + 1 :], b""]))
    return f"line {number}, {said}"


def _changed_json(random: Random, value: Any) -> tuple[bytes, str]:
    """The text of a value in which one place is another, and which."""
    holders = _holders(value)
    raw = random.choice((None,) * 7 + ("9" * 5000, "[" * 100_000, "1e999", '"\\ud800"', "tru"))
    if not holders:
        return (raw or json.dumps(_value(random))).encode(), "all of it"
    holder = random.choice(holders)
    key = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    shown = f"{key!r}"
    way = random.choice(("set", "set", "set", "remove", "repeat"))
    if raw is not None:
        holder[key] = "@raw@"
        return json.dumps(value).replace('"@raw@"', raw, 1).encode(), f"{shown} is {raw[:12]}"
    if way == "set":
        holder[key] = _value(random)
        return json.dumps(value).encode(), f"{shown} = {holder[key]!r}"[:200]
    if way == "remove":
        del holder[key]
    elif isinstance(holder, dict):
        holder[random.choice(TEXTS)] = holder[key]
    else:
        holder.append(holder[key])
    return json.dumps(value).encode(), f"{way} {shown}"


def _holders(value: Any) -> list[Any]:
    """All objects and lists of a value that hold something."""
    found, waiting = [], [value]
    while waiting:
        value = waiting.pop()
        if value and isinstance(value, dict | list):
            found.append(value)
            waiting += value.values() if isinstance(value, dict) else value
    return found


def _line(random: Random, path: Path) -> str:
    """Of any other file: something is put in, or a line is doubled, dropped or joined."""
    content = path.read_bytes()
    way = random.choice(("put in", "double", "drop", "join"))
    if way == "put in" or content.count(b"\n") < 2:
        place, new = random.randint(0, len(content)), random.choice(SPLICED)
        path.write_bytes(content[:place] + new + content[place:])
        return f"{new!r} at {place}"
    lines = content.splitlines(keepends=True)
    number = random.randrange(len(lines))
    lines[number : number + 1] = {
        "double": [lines[number]] * 2,
        "drop": [],
        "join": [lines[number].rstrip(b"\r\n")],
    }[way]
    path.write_bytes(b"".join(lines))
    return f"{way} line {number}"


KINDS = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.int8(),
    pa.int64(),
    pa.uint64(),
    pa.float16(),
    pa.float64(),
    pa.bool_(),
    pa.null(),
    pa.decimal128(20, 3),
    pa.timestamp("s"),
    pa.list_(pa.int32()),
    pa.list_(pa.string()),
    pa.large_list(pa.string()),
    pa.list_(pa.int32(), 2),
    pa.list_view(pa.int32()),
    pa.struct([("a", pa.int32())]),
    pa.map_(pa.string(), pa.int32()),
    pa.dictionary(pa.int32(), pa.string()),
)


def _table(random: Random, path: Path) -> str:
    """Of a parquet file: a column of another type, with other values, twice, or not at all."""
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError):
        return _bytes(random, path)
    number = random.randrange(table.num_columns) if table.num_columns else 0
    way = random.choice(("type", "type", "values", "twice", "drop", "no rows", "null", "rename"))
    try:
        changed, said = _changed_table(random, table, number, way)
        pq.write_table(changed, path)
    except (pa.ArrowException, ValueError, TypeError, IndexError, OverflowError):
        return _bytes(random, path)
    return said


def _changed_table(random: Random, table: pa.Table, at: int, way: str) -> tuple[pa.Table, str]:
    name, column = table.schema.names[at], table.column(at)
    said = f"{way} of column {name}"
    if way == "drop":
        return table.remove_column(at), said
    if way == "twice":
        return table.append_column(name, column), said
    if way == "no rows":
        return table.slice(0, 0), said
    if way == "rename":
        names = [*table.schema.names]
        names[at] = random.choice(TEXTS)
        return table.rename_columns(names), said
    values = column.to_pylist()
    kind = column.type
    if way == "type":
        kind = random.choice(KINDS)
        try:
            return table.set_column(at, name, column.cast(kind)), f"{said} to {kind}"
        except (pa.ArrowException, TypeError):
            values = [None] * len(values)
    elif way == "null":
        values[random.randrange(len(values))] = None
    else:
        place = random.randrange(len(values))
        values[place] = _like(random, values[place])
    return table.set_column(at, name, pa.array(values, kind)), f"{said} to {kind}"


def _like(random: Random, value: Any) -> Any:
    """Another value of the same kind, at the edge of what may be."""
    if isinstance(value, list):
        other = [_like(random, item) for item in value]
        return random.choice(([], [None, *value], other, value * 3))
    if isinstance(value, str):
        return random.choice(TEXTS)
    return random.choice(WHOLE_NUMBERS[:7]) if isinstance(value, int) else random.choice(NUMBERS)


def copy_of(source: Path, target: Path) -> Path:
    """A folder or file that may be spoiled."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))
