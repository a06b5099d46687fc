"""Reading the npm package `cldr-localenames-full`, from which the names corpus is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ml_embed.sample_data.package import Package

if TYPE_CHECKING:
    import pyarrow as pa

# Every meaning has a name in each of these; the first N have many speakers. 20 scripts.
LANGUAGES = """
en zh hi es ar fr bn pt ru ur de ja tr vi ko fa sw it pl uk
nl th id ta te el he hu sv ro fi ka hy kk my km am si gu lt
"""
KINDS = {"territories": "territory", "languages": "language"}
"""File of the package -> kind of what it names. Names of scripts are left out: most are also names
of languages."""
PACKAGE = Package(
    "cldr-localenames-full@48.2.0",
    "7f2ac7fd3b5d90f56ad127f9ed5ae67b58b3e556818f55530b9f47bb81bcde57",
    rf"main/({'|'.join(LANGUAGES.split())})/({'|'.join(KINDS)})\.json",
)


def read_names(place: Path | None) -> pa.Table:
    """The names corpus (see `load_names`) of the package, unpacked, as .tgz, or from npm.

    Only meanings that have a name in every language are taken. A language without a name of its
    own for something has the code in its place; other forms of a name ("-alt-short") are left out.
    """
    import pyarrow as pa

    files = PACKAGE.files(place)
    rows = []
    for file, kind in KINDS.items():
        of_language = {code: _names(files, code, file) for code in LANGUAGES.split()}
        shared = sorted(set.intersection(*map(set, of_language.values())))
        rows += [
            {"language": language, "kind": kind, "code": code, "name": names[code]}
            for language, names in of_language.items()
            for code in shared
        ]
    columns = ("language", "kind", "code", "name")
    return pa.Table.from_pylist(rows, schema=pa.schema([(name, pa.string()) for name in columns]))


def _names(files: dict[str, str], language: str, file: str) -> dict[str, str]:
    """Code -> name with single spaces."""
    content = json.loads(files[f"main/{language}/{file}.json"])
    names = content["main"][language]["localeDisplayNames"][file]
    return {
        code: " ".join(name.split())
        for code, name in names.items()
        if "-alt-" not in code and name != code
    }
