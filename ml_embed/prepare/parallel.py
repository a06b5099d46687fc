"""Parallel text as rows: gettext catalogues, translation memories, Moses pairs, Tatoeba's pairs.

Each translation unit becomes a row: the source is the query, the translation the passage.
`language` is the language of the translation, in both directions. A source that is translated
twice gives two rows with one `query_id`. Units without a translation, fuzzy ones, pure placeholders
and repetitions are left out and counted.
"""

import re
import struct
import xml.parsers.expat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ml_embed.errors import UserError, one_line
from ml_embed.prepare.forms import query_id_of_text
from ml_embed.prepare.numbering import text_digest
from ml_embed.prepare.records import PACKED, Reading, open_bytes, stem_and_suffix, text_lines
from ml_embed.prepare.rows import Faults, FaultyRow, RawRow, Record, good_rows

CATALOGUES = (".po", ".mo")
MEMORIES = (".tmx",)
Pair = tuple[str, str]
"""Languages of source and translation."""
Unit = tuple[str, str]
"""Source and translation."""
Counts = Counter[str]
"""Units that were left out, by the reason."""

_LANGUAGE = re.compile(r"[a-z]{2,3}([_-]([A-Z]{2}|[A-Za-z]{4}|\d{3}))?(@[a-z]+)?")
_NO_LANGUAGE = re.compile(
    r"bak|bin|bz2|cfg|csv|dat|db|doc|env|exe|gz|ids|ini|img|jar|jpg|js|key|lck|log|md|mo|p"
    r"df|pkl|png|po|py|rs|sh|so|sql|svg|tar|tmp|tmx|toml|tsv|txt|xml|xz|yml|zip|zst"
)
"""Suffixes of files that look like codes of languages."""
_PLACEHOLDER = re.compile(
    r"%\([^)]*\)[#0 +-]*[\d.]*[a-zA-Z]|%[#0 +'-]*\d*\$?[\d.*]*(?:hh|h|ll|l|z|j|t)?[a-zA-Z]"
    r"|\$?\{[^{}]*\}|\$\w+|<[^<>]*>|&#?\w+;|\\[nrt]|\S+://\S+"
)
_HEADER_LINE = re.compile(rb'(?:^"|\n|\0)(Language|X-Source-Language):([^\n"\\]*)', re.MULTILINE)
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class ParallelText:
    """Files that hold one language pair."""

    name: str
    pair: Pair
    files: tuple[Path, ...]

    def units(self, reading: Reading, left_out: Counts, faults: Faults) -> Iterator[Unit]:
        """Sources and translations, in the order of the files."""
        suffix = stem_and_suffix(self.files[0])[1]
        if suffix in CATALOGUES:
            for path in self.files:
                yield from _catalogue_units(path, left_out)
        elif suffix in MEMORIES:
            yield from _memory_pairs(self.files[0], self.pair)
        elif len(self.files) == 2:
            yield from _moses_units(*self.files, reading)
        else:
            yield from _tatoeba_units(self.files[0], reading, faults)


def parallel_rows(
    units: Iterable[Unit], language: str, both_directions: bool, left_out: Counts
) -> Iterator[RawRow]:
    """A row per unit, or two."""
    seen: set[bytes] = set()
    for source, target in units:
        digest = text_digest(target.encode("utf-8", "replace"), f"{source}\0".encode())
        if not source.strip() or not target.strip():
            left_out["without translation"] += 1
        elif _is_placeholder(source) or _is_placeholder(target):
            left_out["pure placeholders"] += 1
        elif digest in seen:
            left_out["repeated"] += 1
        else:
            seen.add(digest)
            yield RawRow(source, target, [], query_id_of_text(source), language)
            if both_directions:
                yield RawRow(target, source, [], query_id_of_text(target), language)


def _is_placeholder(text: str) -> bool:
    """Whether nothing of a text is in any language."""
    return not any(map(str.isalpha, _PLACEHOLDER.sub(" ", text)))


def list_parallel(files: Collection[Path], folder: str) -> list[ParallelText]:
    """The parallel texts among some files; catalogues are joined by language pair.

    Args:
        files: paths.
        folder: name of the folder that catalogues are in.
    Raises:
        UserError: a catalogue or a memory is broken, or does not say its language.
    """
    files = _each_once(files)
    catalogues: dict[Pair, list[Path]] = {}
    for path in files:
        if stem_and_suffix(path)[1] in CATALOGUES:
            catalogues.setdefault(_catalogue_pair(path), []).append(path)
    found = [
        ParallelText(f"{folder}.{source}-{target}", (source, target), tuple(paths))
        for (source, target), paths in sorted(catalogues.items())
    ]
    for path in files:
        stem, suffix = stem_and_suffix(path)
        if suffix in MEMORIES:
            pairs = _memory_languages(path)
            found += [ParallelText(f"{stem}.{a}-{b}", (a, b), (path,)) for a, b in pairs]
        elif suffix == ".tsv" and is_tatoeba(path):
            found.append(ParallelText(stem, ("", _tatoeba_language(stem)), (path,)))
    return found + _moses_pairs(files)


def _each_once(files: Collection[Path]) -> list[Path]:
    """Sorted, without links to others of them."""
    targets = {path for path in files if not path.is_symlink()}
    links = sorted(path for path in files if path.is_symlink())
    seen = {path.resolve() for path in targets}
    for path in links:
        if path.resolve() not in seen:
            seen.add(path.resolve())
            targets.add(path)
    return sorted(targets)


def parallel_beside(path: Path) -> list[ParallelText]:
    """What a single file means: itself, or of a Moses pair all that stand beside it."""
    beside = [path]
    if _moses_language(path):
        stem = stem_and_suffix(path)[0]
        beside = [other for other in path.parent.iterdir() if stem_and_suffix(other)[0] == stem]
    return list_parallel(beside, stem_and_suffix(path)[0])


# --- gettext catalogues


def _open_catalogue(path: Path) -> Iterable[Any]:
    import polib

    try:
        open_file = polib.mofile if path.suffix.lower() == ".mo" else polib.pofile
        return open_file(str(path))
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise UserError(f"{path} cannot be read as a catalogue ({one_line(error)}).") from error


def _catalogue_pair(path: Path) -> Pair:
    """Languages of a catalogue: what its place or its header says. Messages' own is English."""
    header = _catalogue_header(path)
    place = path.parent.parent.name if path.parent.name == "LC_MESSAGES" else ""
    for name in (place, header.get("Language", ""), path.stem, path.parent.name):
        if _LANGUAGE.fullmatch(name):
            source = header.get("X-Source-Language", "")
            return source if _LANGUAGE.fullmatch(source) else "en", name
    raise UserError(
        f"{path} does not say its language: name it after its code (sw.po), put it into a folder "
        "that is called so, or write the header's line Language."
    )


def _catalogue_header(path: Path) -> dict[str, str]:
    """Its lines, without the rest of the catalogue."""
    with open_bytes(path) as file:
        content = file.read() if path.suffix.lower() == ".mo" else file.read(_CHUNK_BYTES)
    found = _HEADER_LINE.findall(content)
    return {name.decode(): value.decode("utf-8", "replace").strip() for name, value in found}


def _catalogue_units(path: Path, left_out: Counts) -> Iterator[Unit]:
    for entry in _open_catalogue(path):
        if entry.obsolete:
            left_out["obsolete"] += 1
        elif "fuzzy" in entry.flags:
            left_out["fuzzy"] += 1
        elif entry.msgid_plural:
            yield from _plural_units(entry.msgid, entry.msgid_plural, entry.msgstr_plural)
        else:
            yield entry.msgid, entry.msgstr


def _plural_units(one: str, many: str, forms: dict[int, str]) -> Iterator[Unit]:
    """Singular and plural of a message. Of more than two forms, the last one is the general one.

    Which of several forms is the singular's differs between languages, so it is left alone.
    """
    texts = [forms[number] for number in sorted(forms)]
    if len(texts) == 2:
        yield one, texts[0]
    yield many, texts[-1] if texts else ""


# --- translation memories


class _Memory:
    """A .tmx file, unit by unit; a text by its language."""

    def __init__(self, path: Path):
        self.path = path
        self.source = ""
        self._units: list[list[tuple[str, str]]] = []
        self._unit: list[tuple[str, str]] = []
        self._language = ""
        self._text: list[str] | None = None  # of the segment that is being read
        self._codes = 0  # elements of formatting that are open

    def __iter__(self) -> Iterator[list[tuple[str, str]]]:
        parser = xml.parsers.expat.ParserCreate()
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.CharacterDataHandler = self._characters
        parser.EntityDeclHandler = parser.SkippedEntityHandler = self._refuse
        parser.buffer_text = True
        try:
            with open_bytes(self.path) as file:
                while chunk := file.read(_CHUNK_BYTES):
                    parser.Parse(chunk)
                    yield from self._units
                    self._units.clear()
                parser.Parse(b"", True)
        except UserError:
            raise
        except (xml.parsers.expat.ExpatError, OSError, EOFError, LookupError, ValueError) as error:
            raise UserError(f"{self.path} cannot be read ({one_line(error)}).") from error

    def _refuse(self, *_: object) -> None:
        raise UserError(f"{self.path} declares or uses entities, which are not read. Remove them.")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if self._text is not None:
            self._codes += name != "hi"  # what `hi` marks is text
        elif name == "header":
            self.source = attributes.get("srclang", "")
        elif name == "tuv":
            self._language = attributes.get("xml:lang") or attributes.get("lang", "")
        elif name == "seg":
            self._text = []

    def _characters(self, text: str) -> None:
        if self._text is not None and not self._codes:
            self._text.append(text)

    def _end(self, name: str) -> None:
        if name == "seg" and self._text is not None:
            self._unit.append((self._language, "".join(self._text).strip()))
            self._text = None
        elif self._text is not None:
            self._codes -= name != "hi"
        elif name == "tu":
            self._units.append(self._unit)
            self._unit = []


def _memory_languages(path: Path) -> list[Pair]:
    memory = _Memory(path)
    languages = dict.fromkeys(language for unit in memory for language, _ in unit)
    named = [code for code in languages if code.casefold() == memory.source.casefold()]
    source = named[0] if named else _pivot(list(languages)) if languages else ""
    pairs = [(source, language) for language in languages if language != source]
    if not pairs or "" in languages:
        there = ", ".join(map(repr, languages)) or "none"
        raise UserError(f"{path} holds no pair of languages: it has {there}.")
    return pairs


def _memory_pairs(path: Path, pair: Pair) -> Iterator[Unit]:
    for unit in _Memory(path):
        sources = [text for language, text in unit if language == pair[0]]
        for language, text in unit:
            if language == pair[1]:
                yield sources[0] if sources else "", text


def _pivot(languages: list[str]) -> str:
    """The language that the others are paired with: English, or the first."""
    english = [code for code in languages if re.split("[-_]", code.lower())[0] in ("en", "eng")]
    return (english or languages)[0]


# --- Moses pairs and Tatoeba


def _moses_language(path: Path) -> str | None:
    inner = path.with_suffix("") if path.suffix.lower() in PACKED else path
    code = inner.suffix.removeprefix(".")
    return code if _LANGUAGE.fullmatch(code) and not _NO_LANGUAGE.fullmatch(code) else None


def _moses_pairs(files: Iterable[Path]) -> list[ParallelText]:
    by_stem: dict[str, dict[str, Path]] = {}
    for path in files:
        if (language := _moses_language(path)) is not None:
            by_stem.setdefault(stem_and_suffix(path)[0], {})[language] = path
    found = []
    for stem, paths in by_stem.items():
        names = set(stem.rpartition(".")[2].split("-"))
        named = len(names) == 2 and names <= paths.keys()
        if named:  # as OPUS has it: name.en-sw.en and name.en-sw.sw
            paths = {language: paths[language] for language in sorted(names)}
        if len(paths) < 2:
            continue
        source = _pivot(sorted(paths))
        for language in sorted(paths.keys() - {source}):
            name = (
                stem if len(names) == 2 and names <= paths.keys() else f"{stem}.{source}-{language}"
            )
            files_of_pair = (paths[source], paths[language])
            found.append(ParallelText(name, (source, language), files_of_pair))
    return found


def _moses_units(source: Path, target: Path, reading: Reading) -> Iterator[Unit]:
    with (
        text_lines(source, reading, newline="\n") as sources,
        text_lines(target, reading, newline="\n") as targets,
    ):
        for number, (one, other) in enumerate(zip_longest(sources, targets), start=1):
            if one is None or other is None:
                shorter, longer = (source, target) if one is None else (target, source)
                raise UserError(
                    f"{shorter} ends at line {number - 1}, but {longer} goes on: the two are not "
                    "translations line by line."
                )
            yield one.strip(), other.strip()


def is_tatoeba(path: Path) -> bool:
    """Whether a .tsv file holds pairs as Tatoeba exports them: id, text, id, text, no header."""
    try:
        with text_lines(path, Reading(), newline="\n", errors="replace") as lines:
            fields = next(lines, "").rstrip("\r\n").split("\t")
    except UserError:
        return False
    return len(fields) == 4 and fields[0].isdecimal() and fields[2].isdecimal()


def _tatoeba_language(stem: str) -> str:
    match = re.search(r"(?:^| in |[^a-zA-Z])([A-Za-z]+)[-_]([A-Za-z ]+?)(?: - [\d-]+)?$", stem)
    return match.group(2) if match else ""


def _tatoeba_units(path: Path, reading: Reading, faults: Faults) -> Iterator[Unit]:
    with text_lines(path, reading, newline="\n") as lines:
        records = (
            Record(f"{path}, line {number}", {"line": line})
            for number, line in enumerate(lines, start=1)
        )
        for _, unit in good_rows(records, _tatoeba_unit, faults):
            yield unit


def _tatoeba_unit(values: Mapping[str, str], where: str) -> Unit:
    fields = values["line"].rstrip("\r\n").split("\t")
    if len(fields) != 4:
        raise FaultyRow(f"{where}: {len(fields)} fields instead of id, text, id, text.")
    return fields[1].strip(), fields[3].strip()
