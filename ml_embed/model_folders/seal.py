"""The digests that a model folder is written with, and whether what stands there is still that.

The factors and exit norms in `nested/` belong to the weights beside them. A program that knows
nothing of them may save others over those; then the folder would be half old and half new.
"""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ml_embed.errors import UserError
from ml_embed.files.digests import file_digest, value_digest
from ml_embed.model_folders.record import (
    EXIT_NORMS_FILE,
    FACTORS_FILE,
    NESTED,
    RECORD_FILE,
    ModelRecord,
)
from ml_embed.notices import warn

SETTINGS_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
WITHOUT_EFFECT = {
    "architectures",
    "backend",
    "is_local",
    "local_files_only",
    "padding",
    "transformers_version",
    "truncation",
    "use_cache",
}
"""Keys of these that say nothing about the vectors."""


def seal(folder: Path, record: ModelRecord) -> None:
    """Write the record of a folder that is whole otherwise, with the digests of its content."""
    dataclasses.replace(record, digests=_weights(folder) | _settings(folder)).save(folder)


def check_seal(folder: Path, record: ModelRecord) -> None:
    """Warn of changed settings; folders of format 1 have no digests and pass.

    Raises:
        UserError: the weights are not those that the folder was written with.
    """
    expected = record.digests
    if not expected:
        return
    found = _weights(folder)
    weights = {name: digest for name, digest in expected.items() if name.endswith(".safetensors")}
    if missing := sorted(weights.keys() - found.keys()):
        raise UserError(f"{folder} lacks {', '.join(missing)}; copy the model folder again")
    if changed := sorted(name for name in found if weights.get(name) != found[name]):
        raise stale(folder, ", ".join(changed))
    settings = _settings(folder)
    if edited := sorted(name for name in settings if expected.get(name) != settings[name]):
        warn(
            f"{folder}: {', '.join(edited)} changed after the folder was written; its vectors may "
            "be others than those that were trained"
        )


def stale(folder: Path, changed: str) -> UserError:
    """The error for weights, `changed`, that are not those that the nested parts belong to."""
    parts = [f"{NESTED}/"] if (folder / NESTED).is_dir() else _nested_in_format_1(folder)
    return UserError(
        f"{folder}: {changed} changed after the folder was written, so {RECORD_FILE} and the "
        "nested parts no longer belong to the weights. Copy the model folder again; if another "
        f"program saved new weights into it, remove {', '.join(parts)} and {RECORD_FILE} to use it "
        "as a plain folder without cuts"
    )


def _nested_in_format_1(folder: Path) -> list[str]:
    names = (Path(path).name for path in (FACTORS_FILE, EXIT_NORMS_FILE))
    return [name for name in names if (folder / name).is_file()]


def _weights(folder: Path) -> dict[str, str]:
    """Weights file of a model folder, by its path in it -> digest of its content."""
    files = sorted((*folder.glob("*.safetensors"), *folder.glob(f"{NESTED}/*.safetensors")))
    with ThreadPoolExecutor() as pool:  # a large backbone has many files
        digests = pool.map(file_digest, files)
        return {str(p.relative_to(folder)): d for p, d in zip(files, digests, strict=True)}


def _settings(folder: Path) -> dict[str, str]:
    """Digests of parsed values: another layout of the same JSON is no change."""
    return {
        name: value_digest(_parsed(folder / name))
        for name in SETTINGS_FILES
        if (folder / name).is_file()
    }


def _parsed(path: Path) -> Any:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); copy the model folder again") from None
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if key not in WITHOUT_EFFECT}
