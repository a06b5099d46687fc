"""Search tasks in BEIR's form made of the embedded corpus: what does this beginning go on with?"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ml_embed.files.atomic import atomic_file
from ml_embed.sample_data.corpus import usable_languages

LANGUAGES = {"eng-Latn": "eng", "hin-Deva": "hin", "swa-Latn": "swh", "yor-Latn": "yor"}
"""language, as mteb writes it -> translation; all put spaces between words"""
PIECES = 5
"""of an article: the first one is a query, the others are right for it"""


def write_search_tasks(folder: Path) -> None:
    """Write a folder for each language: 30 queries, 120 documents; the same bytes each time."""
    known = usable_languages()
    for language, code in LANGUAGES.items():
        queries, documents, pairs = [], [], []
        for number, text in known[code].articles.items():
            first, *others = _pieces(text)
            queries.append({"_id": f"q{number}", "text": first})
            for place, piece in enumerate(others):
                name = f"d{number}.{place}"
                documents.append({"_id": name, "title": "", "text": piece})
                pairs.append(f"q{number}\t{name}\t1")
        own = folder / language
        (own / "qrels").mkdir(parents=True, exist_ok=True)
        _write(own / "queries.jsonl", map(json.dumps, queries))
        _write(own / "corpus.jsonl", map(json.dumps, documents))
        _write(own / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", *pairs])


def _pieces(text: str) -> list[str]:
    """PIECES runs of words, as long as each other."""
    words = text.split()
    ends = [len(words) * (place + 1) // PIECES for place in range(PIECES)]
    starts = [0, *ends]
    return [" ".join(words[start:end]) for start, end in zip(starts, ends, strict=False)]


def _write(path: Path, lines: Iterable[str]) -> None:
    with atomic_file(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
