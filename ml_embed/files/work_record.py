"""What of long work on a folder is done, so that it can be interrupted at any moment and continued.

Work makes items (datasets, files) one after another. What is done stands in `NAME.json` when all
of them are made. Until then a journal beside it, `NAME.partial.jsonl`, gets a line for each thing
that happens, so that an item costs the same however many there are; `finish` writes the journal's
outcome to `NAME.json` and removes it.

Processes that work on the same folder `note_done` what they made, each in a file of its own; the
one that holds the record takes it over.

While items are only added, an older `NAME.json` stays: what it says remains true. It is set aside
as `NAME.partial.json` before one of its items is made again.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from ml_embed.errors import UserError
from ml_embed.files.atomic import sync_folder, write_json
from ml_embed.files.digests import only_differing
from ml_embed.files.json_file import parse_json

Entry = dict[str, Any]
Finished = tuple[dict[str, Any], dict[str, Entry]]
"""The settings that hold for all items, and the entry of each item by its name."""


def journal_of(path: Path) -> Path:
    """The journal of unfinished work whose outcome will be the JSON file `path`."""
    return path.with_name(f"{path.stem}.partial.jsonl")


def note_done(path: Path, process: int, name: str, entry: Entry) -> None:
    """Note that an item is made, on a process that does not hold the record `path` itself."""
    with path.with_name(f"{path.stem}.partial-{process}.jsonl").open("a") as file:
        file.write(json.dumps({"done": name, "entry": entry}) + "\n")
        file.flush()
        os.fsync(file.fileno())


class WorkRecord:
    """The record of the work on one folder; whoever uses it holds the folder's lock."""

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        read: Callable[[Path], Finished],
        overwrite: bool,
        remedy: str,
    ):
        """Read what a former run left; nothing is written before the first `begin` or `write`.

        Args:
            path: the JSON file of finished work.
            settings: what all items depend on.
            read: gives the content of such a file; raises UserError if it is damaged.
            overwrite: replace what cannot be continued instead of refusing.
            remedy: what to do about a refusal, as a sentence.
        Raises:
            UserError: the former record is damaged or has other settings, without `overwrite`.
        """
        self.path = path
        self.settings = settings
        self.entries: dict[str, Entry] = {}
        """of the items that are made"""
        self.unfinished: set[str] = set()
        """items of which a part may be there, also of those that are not asked for any more"""
        self.replaced: set[str] | None = None
        """items whose old files may be there, to be written over; None if nothing was replaced"""
        self._overwrite = overwrite
        self._remedy = remedy
        self._journal = journal_of(path)
        self._set_aside = path.with_name(f"{path.stem}.partial.json")
        self._finished: set[str] = set()  # items that `path` names
        self._journal_bytes = 0  # of its whole lines
        self._unwritten: list[dict[str, Any]] = []  # lines that the next `begin` writes
        self._taken_over: list[Path] = []  # notes of other processes that it removes
        try:
            former = self._read_former(read)
        except UserError:
            if not overwrite:
                raise
            self._journal_bytes = 0
            self._unwritten = []
            self._taken_over = self._notes()  # unread: to be removed
            self.replace_all()
            return
        if self._journal_bytes == 0:
            self._note({"settings": settings})
        if former is not None:
            self._compare(former)

    def _compare(self, former: dict[str, Any]) -> None:
        now = self.settings
        changed = [key for key, value in now.items() if former.get(key) != value]
        if changed and not self._overwrite:
            pairs = {key: only_differing(former.get(key), now[key]) for key in changed}
            said = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in pairs.items())
            raise UserError(f"{self.path.parent} was made otherwise: {said}. {self._remedy}")
        if changed:
            self.replace_all()

    def replace_all(self) -> None:
        """Make every item anew."""
        self._note({"settings": self.settings, "replaced": sorted(self._known())})

    def replace(self, name: str, problem: str) -> None:
        """Make an item anew. Raises UserError with the problem where that needs `overwrite`."""
        if not self._overwrite:
            raise UserError(f"{problem}. {self._remedy}")
        self._note({"replaced": [name]})

    def refuse_others(self, name: str, paths: Iterable[Path]) -> None:
        """Raise UserError if a file of an item is there that this work did not make.

        With `overwrite` the item is replaced instead.
        """
        for path in () if name in self._known() else paths:
            if path.exists():
                self.replace(name, f"{path} exists, but is not recorded in {self.path.name}")

    def begin(self, name: str) -> None:
        """Note that an item is being made: its files are ours from now on, and not whole."""
        self._note({"begun": name})
        self.write()

    def record(self, name: str, entry: Entry) -> None:
        """Note that an item is made, after its files have their final names."""
        self._note({"done": name, "entry": entry})
        self.write()

    def take_over(self) -> None:
        """Add what other processes `note_done`."""
        for path in self._notes():
            self._taken_over.append(path)
            for line in self._read_lines(path)[0]:
                self._note(line)

    def write(self) -> None:
        """Bring the journal up to date, also to claim a folder before the first `begin`."""
        text = "".join(json.dumps(line) + "\n" for line in self._unwritten).encode()
        with self._journal.open("ab") as file:
            file.truncate(self._journal_bytes)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if self._journal_bytes == 0:
            sync_folder(self._journal.parent)
        self._journal_bytes += len(text)
        self._unwritten = []
        for path in self._taken_over:
            path.unlink(missing_ok=True)
        self._taken_over = []  # others may write files of the same names again
        if self.path.exists() and (self.replaced is not None or self.unfinished & self._finished):
            self.path.replace(self._set_aside)
            sync_folder(self.path.parent)

    def gone(self, names: Collection[str]) -> set[str]:
        """Items that may have left files, but are not among `names` and not made."""
        return (self.unfinished | (self.replaced or set())) - set(names)

    def finish(self, content: dict[str, Any], sort_keys: bool = False) -> None:
        """Write the finished record, unless nothing happened since the last one."""
        if self._journal_bytes or self.replaced is not None or not self.path.exists():
            write_json(self.path, content, sort_keys)
        for path in (self._journal, self._set_aside, *self._taken_over):
            path.unlink(missing_ok=True)

    def _notes(self) -> list[Path]:
        """Files that other processes made by `note_done`."""
        return sorted(self.path.parent.glob(f"{self.path.stem}.partial-*.jsonl"))

    def _known(self) -> set[str]:
        return {*self.entries, *self.unfinished, *(self.replaced or ())}

    def _note(self, line: dict[str, Any]) -> None:
        self._apply(line)
        self._unwritten.append(line)

    def _apply(self, line: dict[str, Any]) -> None:
        """Let one line of the journal happen."""
        if "replaced" in line:
            if "settings" in line:  # all that was there
                self.entries, self.unfinished = {}, set()
            self.replaced = {*(self.replaced or ()), *line["replaced"]}
            self.unfinished -= self.replaced
            for name in line["replaced"]:
                self.entries.pop(name, None)
        if "begun" in line:
            self.entries.pop(line["begun"], None)
            self.unfinished.add(line["begun"])
        if "done" in line:
            self.entries[line["done"]] = line["entry"]
            self.unfinished.discard(line["done"])

    def _read_former(self, read: Callable[[Path], Finished]) -> dict[str, Any] | None:
        """Take over what was done; the settings that it was done with, None if there is nothing."""
        lines, self._journal_bytes = self._read_lines(self._journal)
        settings = None
        if not any("settings" in line and "replaced" in line for line in lines):
            for path in (self.path, self._set_aside):
                if path.exists():
                    settings, self.entries = read(path)
                    self._finished = set(self.entries)
                    break
        for line in lines:
            settings = line.get("settings", settings)
            self._apply(line)
        self.take_over()
        return settings

    def _read_lines(self, path: Path) -> tuple[list[dict[str, Any]], int]:
        """Its whole lines, and their bytes: after a power cut the last one may be torn."""
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            lines = [parse_json(line) for line in whole.splitlines()]
            if not all(isinstance(line, dict) for line in lines):
                raise ValueError("a line is no object")
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}). {self._remedy}") from error
        return lines, len(whole)
