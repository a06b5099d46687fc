"""The digests that a model folder is written with, and whether what stands there is still that.

The factors and exit norms in `nested/` belong to the weights beside them. A program that knows
nothing of them may save others over those; then the folder would be half old and half new.
"""

import dataclasses
from collections.abc import Set
from pathlib import Path

from ml_embed.errors import UserError
from ml_embed.files.model_identity import SETTINGS_FILES, model_identity
from ml_embed.files.model_source import find_released_folder
from ml_embed.model_folders.record import (
    EXIT_NORMS_FILE,
    FACTORS_FILE,
    NESTED,
    RECORD_FILE,
    ModelRecord,
)
from ml_embed.notices import warn


def seal(folder: Path, record: ModelRecord) -> None:
    """Write the record of a folder that is whole otherwise, with the digests of its content."""
    dataclasses.replace(record, digests=_content(folder)).save(folder)


def check_seal(folder: Path, record: ModelRecord) -> None:
    """Warn of changed settings; folders of format 1 have no digests and pass.

    Prompts and maximum length, which sentence-transformers' files say, are edited on purpose.

    Raises:
        UserError: the weights are not those that the folder was written with.
    """
    if not record.digests:
        return
    found = _content(folder)
    weights = _changed(record, found, found.keys() | record.digests.keys(), ".safetensors")
    if missing := [name for name in weights if name not in found]:
        raise UserError(f"{folder} lacks {', '.join(missing)}; copy the model folder again")
    if weights:
        raise stale(folder, ", ".join(weights))
    if edited := _changed(record, found, found.keys() & SETTINGS_FILES):
        warn(
            f"{folder}: {', '.join(edited)} changed after the folder was written; its vectors may "
            "be others than those that were trained"
        )


def verify_model(name: str | Path) -> None:
    """Compare every file of a model folder with its digest: what `--verify` does.

    Raises:
        UserError: a file is missing or has changed, or there is no such folder.
    """
    folder = find_released_folder(name)  # import_model.py verifies those too
    record = ModelRecord.load(folder)
    if record is None or not record.digests:
        warn(f"--verify: {name} has no digests to compare with; only what it loads is checked")
        return
    found = _content(folder)
    if changed := _changed(record, found, record.digests.keys()):
        listing = "; ".join(
            f"{n} was {record.digests[n]}, now {found.get(n, 'it is missing')}" for n in changed
        )
        raise UserError(
            f"--verify: {folder} has changed since it was written: {listing}. Copy the model "
            "folder again, or leave --verify out if you have edited it on purpose"
        )


def stale(folder: Path, changed: str) -> UserError:
    """The error for weights, `changed`, that are not those that the nested parts belong to."""
    nested = [f"{NESTED}/"] if (folder / NESTED).is_dir() else _nested_in_format_1(folder)
    parts = " and ".join(filter(None, [", ".join(nested), RECORD_FILE]))
    return UserError(
        f"{folder}: {changed} changed after the folder was written, so {parts} and the "
        "weights no longer belong together. Copy the model folder again; if another program saved "
        f"new weights into it, remove {parts} to use it as a plain folder without "
        "cuts"
    )


def _nested_in_format_1(folder: Path) -> list[str]:
    names = (Path(path).name for path in (FACTORS_FILE, EXIT_NORMS_FILE))
    return [name for name in names if (folder / name).is_file()]


def _content(folder: Path) -> dict[str, str]:
    """File -> digest, of all but the record, which has a seal of its own."""
    return {name: digest for name, digest in model_identity(folder).items() if name != RECORD_FILE}


def _changed(record: ModelRecord, found: dict[str, str], names: Set[str], end: str = "") -> list:
    """Those of the names, with an end, whose file is not the one that the record says."""
    return sorted(n for n in names if n.endswith(end) and record.digests.get(n) != found.get(n))
