"""Reading the embedded corpus, and what of it is fit for training and measuring."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

CORPUS_FILE = Path(__file__).with_name("udhr.parquet")
ARTICLES = range(1, 31)  # article 0 of the corpus is the preamble
# UTF-8 bytes; below are only placeholders and lone headings (Chinese articles have 48 and more)
SHORTEST_ARTICLE = 40
PLACEHOLDER = "&1"  # left by a converter in a few translations


@dataclass(frozen=True)
class Language:
    """One translation that has all 30 articles: no gap, no placeholder, no text twice."""

    code: str
    name: str
    direction: str
    """"ltr" or "rtl"."""
    group: str
    """The same for translations of one language (ISO 639-3), and for those that share the text of
    any article."""
    articles: Mapping[int, str]
    """Article number, 1 to 30, to its text."""


def load_articles() -> pa.Table:
    """The whole corpus, a row an article: code, iso6393, bcp47, name, direction (strings), article
    (int32; 0 is the preamble), text. Ordered by code and article. All 532 translations are in it,
    the incomplete ones too."""
    import pyarrow.parquet as pq

    return pq.read_table(CORPUS_FILE)


def usable_languages() -> dict[str, Language]:
    """The complete translations, by code, in the order of the codes."""
    rows_of: dict[str, list[dict]] = defaultdict(list)
    for row in load_articles().to_pylist():
        if row["article"] in ARTICLES:
            rows_of[row["code"]].append(row)
    complete = {
        code: rows
        for code, rows in sorted(rows_of.items())
        if _is_complete([row["text"] for row in rows])
    }
    groups = _groups(complete)
    return {
        code: Language(
            code=code,
            name=rows[0]["name"],
            direction=rows[0]["direction"],
            group=groups[code],
            articles={row["article"]: row["text"] for row in rows},
        )
        for code, rows in complete.items()
    }


def _is_complete(texts: list[str]) -> bool:
    return len(set(texts)) == len(ARTICLES) and all(
        len(text.encode()) >= SHORTEST_ARTICLE and PLACEHOLDER not in text for text in texts
    )


def _groups(complete: Mapping[str, list[dict]]) -> dict[str, str]:
    """Translation -> group: the smallest code among those tied to it, directly or over others."""
    leader = {code: code for code in complete}

    def find(code: str) -> str:
        while leader[code] != code:
            code = leader[code]
        return code

    first_with: dict[tuple[str, str], str] = {}
    for code, rows in complete.items():
        ties = [("text", row["text"]) for row in rows]
        if rows[0]["iso6393"] != "und":  # "undetermined": these have nothing in common
            ties.append(("iso6393", rows[0]["iso6393"]))
        for tie in ties:
            low, high = sorted((find(first_with.setdefault(tie, code)), find(code)))
            leader[high] = low
    return {code: find(code) for code in complete}
