"""A folder in BEIR's form: corpus.jsonl, queries.jsonl and qrels/<split>.tsv."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ml_embed.errors import UserError
from ml_embed.prepare.forms import titled
from ml_embed.prepare.records import PACKED, Reading, json_lines, text_lines
from ml_embed.prepare.rows import Faults, FaultyRow, RawRow, Record, good_rows, query_id_of, text_of


def is_beir(folder: Path) -> bool:
    """Whether a folder has the three parts."""
    there = [_part(folder, name) is not None for name in ("corpus", "queries")]
    return all(there) and (folder / "qrels").is_dir()


def beir_rows(folder: Path, split: str, left_out: Counter[str], faults: Faults) -> Iterator[RawRow]:
    """A row per judged pair that is relevant, in the order of the judgements.

    Only texts that are judged are held in memory.

    Raises:
        UserError: there is no such split, or rows are faulty.
    """
    judged = list(_judgements(folder, split))
    pairs = [record.values for record in judged if not isinstance(record.values, FaultyRow)]
    queries = _texts(folder, "queries", {pair["query-id"] for pair in pairs})
    documents = _texts(folder, "corpus", {pair["corpus-id"] for pair in pairs})

    def row(pair: Any, where: str) -> RawRow | None:
        if pair["score"] <= 0:
            left_out["judged not relevant"] += 1
            return None
        for kind, known in (("query-id", queries), ("corpus-id", documents)):
            if pair[kind] not in known:
                raise FaultyRow(f"{where}: nothing has the {kind} {pair[kind]!r}.")
        name = pair["query-id"]
        return RawRow(queries[name], documents[pair["corpus-id"]], [], name)

    for _, made in good_rows(judged, row, faults):
        if made is not None:
            yield made


@dataclass(frozen=True)
class Collection:
    """What is searched, and what is right."""

    queries: dict[str, str]
    """name -> text, of those for which something is right"""
    documents: dict[str, str]
    """name -> title and text, of all"""
    relevant: dict[str, dict[str, int]]
    """query -> document -> how relevant it is, above 0"""


def read_collection(folder: Path, split: str) -> Collection:
    """A folder as a search task, all in memory.

    Raises:
        UserError: a part or the split is not there, rows are faulty, or nothing is relevant.
    """
    if not is_beir(folder):
        raise UserError(
            f"{folder} is no search task in BEIR's form: it must hold corpus.jsonl, queries.jsonl "
            "and qrels/"
        )
    documents, queries = _texts(folder, "corpus", None), _texts(folder, "queries", None)
    relevant: dict[str, dict[str, int]] = {}

    def add(pair: Any, where: str) -> None:
        for kind, known in (("query-id", queries), ("corpus-id", documents)):
            if pair[kind] not in known:
                raise FaultyRow(f"{where}: nothing has the {kind} {pair[kind]!r}.")
        if pair["score"] != int(pair["score"]):
            raise FaultyRow(f"{where}: relevance {pair['score']} must be a whole number.")
        if pair["score"] > 0:
            relevant.setdefault(pair["query-id"], {})[pair["corpus-id"]] = int(pair["score"])

    qrels = folder / "qrels" / f"{split}.tsv"
    for _ in good_rows(_judgements(folder, split), add, Faults(str(qrels))):
        pass
    if not relevant:
        raise UserError(f"{qrels} calls no document relevant; at least one query needs one")
    return Collection({name: queries[name] for name in relevant}, documents, relevant)


def _part(folder: Path, name: str) -> Path | None:
    files = [folder / f"{name}.jsonl{suffix}" for suffix in ("", *PACKED)]
    return next((file for file in files if file.is_file()), None)


def _judgements(folder: Path, split: str) -> Iterator[Record]:
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.tsv"))) or "none"
        raise UserError(f"{path} does not exist; choose another with --split: {there}")
    with text_lines(path, Reading(), newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.rstrip("\r\n").split("\t")
            where = f"{path}, line {number}"
            if fields == [""] or (number == 1 and not _is_number(fields[-1])):
                continue
            if len(fields) == 4:  # TREC's: query, iteration, document, relevance
                fields = [fields[0], *fields[2:]]
            if len(fields) != 3 or not (_is_number(fields[2]) and isfinite(float(fields[2]))):
                yield Record(where, FaultyRow(f"{where}: not a query, a document and a number."))
                continue
            values = {"query-id": fields[0], "corpus-id": fields[1], "score": float(fields[2])}
            yield Record(where, values)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _texts(folder: Path, name: str, wanted: set[str] | None) -> dict[str, str]:
    """The texts with these ids; None is all."""
    path = _part(folder, name)
    assert path is not None

    def text(values: Any, where: str) -> tuple[str, str] | None:
        given = query_id_of(values.get("_id"), "_id", where)
        if given is None or (wanted is not None and given not in wanted):
            return None
        return given, titled(values, where) if name == "corpus" else text_of(values, "text", where)

    made = good_rows(json_lines(path), text, Faults(str(path)))
    return dict(pair for _, pair in made if pair is not None)
