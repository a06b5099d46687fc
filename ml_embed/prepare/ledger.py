"""What of a tokenized folder is done: kept while it is made, and its manifest when it is whole.

While datasets are missing the record is `manifest.partial.json`; `manifest.json` exists only when
every dataset is complete. An entry is added after its dataset's files have their final names.

While a folder is made anew the record also says what is "replaced": those files are ours to write
over, and the work can be continued like any other.
"""

import json
from pathlib import Path
from typing import Any

from ml_embed.data.sources import (
    CORPUS_SUFFIX,
    MANIFEST,
    MANIFEST_FORMAT_VERSION,
    QUERY_SUFFIX,
    read_manifest,
)
from ml_embed.errors import UserError
from ml_embed.files.atomic import partial_path, write_text_atomically

PARTIAL_MANIFEST = "manifest.partial.json"
REDO = "Use another --output, or --overwrite to make that folder anew."


class Ledger:
    """The record of one output folder. `settings` are the manifest's entries that hold for all
    datasets."""

    def __init__(self, folder: Path, settings: dict[str, Any], overwrite: bool):
        """Read what a former run left. Raises UserError if it cannot be continued and `overwrite`
        is false.

        With `overwrite` everything is made anew, unless that is just what the former run left
        unfinished.
        """
        self.folder = folder
        self._settings = {"format_version": MANIFEST_FORMAT_VERSION} | settings
        self._overwrite = overwrite
        self._unfinished: set[str] = set()
        """datasets of which a part may be there; of an input that has changed since, too"""
        self.datasets: dict[str, dict[str, Any]] = {}
        self._replaced: set[str] | None = set() if overwrite else None
        """datasets whose old files are written over or removed; None while nothing is made anew"""
        former = self._read_former()
        if former is None:
            return
        differing = [key for key, value in self._settings.items() if former.get(key) != value]
        if overwrite and (differing or "replaced" not in former):
            self._replaced = {
                *former["datasets"],
                *former.get("unfinished", ()),
                *former.get("replaced", ()),
            }
            return
        if differing:
            said = "; ".join(
                f"{key} is {former.get(key)!r} there, now {self._settings[key]!r}"
                for key in differing
            )
            raise UserError(f"{folder} holds data tokenized otherwise: {said}. {REDO}")
        self.datasets = former["datasets"]
        self._unfinished = set(former.get("unfinished", ()))
        self._replaced = set(former["replaced"]) if "replaced" in former else None

    def files_of(self, name: str) -> dict[str, Path]:
        """The query and corpus file of a dataset."""
        return {
            "query": self.folder / f"{name}{QUERY_SUFFIX}",
            "corpus": self.folder / f"{name}{CORPUS_SUFFIX}",
        }

    def check(
        self,
        names: list[str],
        sources: dict[str, dict[str, Any]],
        prompts: dict[str, dict[str, Any]],
    ) -> None:
        """Raise UserError if making the datasets `names` would lose or mix anything in the folder.

        With `overwrite`, note what is replaced instead. `sources` describes the present raw file of
        every dataset that is recorded, `prompts` every dataset's prompts.
        """
        for name, entry in list(self.datasets.items()):
            if name not in names:
                self._replace(
                    name, f"{self.folder} holds dataset {name!r}, which the input does not have"
                )
            elif entry["source"] != sources[name]:
                self._replace(
                    name,
                    f"{self.folder} holds dataset {name!r} made from another file than the input's",
                )
            elif entry.get("prompts", {}) != prompts[name]:
                self._replace(
                    name, f"{self.folder} holds dataset {name!r} made with other prompts than now"
                )
        known = {*self.datasets, *self._unfinished, *(self._replaced or ())}
        for name in names:
            for path in self.files_of(name).values():
                if path.exists() and name not in known:
                    self._replace(
                        name, f"{path} exists, but is not recorded in a manifest beside it"
                    )

    def _replace(self, name: str, problem: str) -> None:
        """Count a dataset's files as replaced, which takes `overwrite`."""
        if not self._overwrite:
            raise UserError(f"{problem}. {REDO}")
        self.datasets.pop(name, None)
        self._replaced = {*(self._replaced or ()), name}

    def is_complete(self, name: str) -> bool:
        """Whether a dataset is recorded and its files have the recorded sizes."""
        entry = self.datasets.get(name)
        return entry is not None and all(
            path.is_file() and path.stat().st_size == entry["bytes"][kind]
            for kind, path in self.files_of(name).items()
        )

    def begin(self, name: str) -> None:
        """Note that a dataset is being made: the folder is not whole, and files of that name are
        ours."""
        whole = self.folder / MANIFEST
        if whole.exists():
            whole.replace(self.folder / PARTIAL_MANIFEST)
        self.datasets.pop(name, None)
        self._unfinished.add(name)
        self._write()

    def record(self, name: str, entry: dict[str, Any]) -> None:
        """Note that a dataset's files are whole."""
        sizes = {kind: path.stat().st_size for kind, path in self.files_of(name).items()}
        self.datasets[name] = entry | {"bytes": sizes}
        self._unfinished.discard(name)
        self._write()

    def remove_replaced(self, names: list[str]) -> None:
        """Delete the files of replaced and of unfinished datasets that the input no longer has."""
        for name in (self._unfinished | (self._replaced or set())) - set(names):
            for path in self.files_of(name).values():
                path.unlink(missing_ok=True)
                partial_path(path).unlink(missing_ok=True)
        self._unfinished, self._replaced = set(), None

    def finish(self) -> dict[str, Any]:
        """The manifest, written as manifest.json unless that exists already."""
        whole = self.folder / MANIFEST
        if not whole.exists():
            self._write()
            (self.folder / PARTIAL_MANIFEST).replace(whole)
        return self._content()

    def _content(self) -> dict[str, Any]:
        return self._settings | {"datasets": self.datasets}

    def _write(self) -> None:
        content = self._content()
        if self._unfinished:
            content["unfinished"] = sorted(self._unfinished)
        if self._replaced is not None:
            content["replaced"] = sorted(self._replaced)
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_text_atomically(self.folder / PARTIAL_MANIFEST, text)

    def _read_former(self) -> dict[str, Any] | None:
        for path in (self.folder / MANIFEST, self.folder / PARTIAL_MANIFEST):
            if path.exists():
                try:
                    former = read_manifest(path)
                except UserError:
                    if not self._overwrite:
                        raise
                    continue
                if isinstance(
                    former.get("unfinished"), str
                ):  # earlier versions knew of one at a time
                    former["unfinished"] = [former["unfinished"]]
                return former
        return None
