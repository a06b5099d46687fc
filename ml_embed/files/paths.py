"""What users give as paths: the home folder, names on the hub, and places that are to be
written."""

import json
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from ml_embed.errors import UserError
from ml_embed.files.atomic import settle_replacing

_STEP_FOLDER = re.compile(r"step_(\d+)")


def expand_home(path: str) -> str:
    """`~` or `~name` at the start as the home folder; all else as it is written."""
    return os.path.expanduser(path)  # noqa: PTH111 - pathlib's drops a "./", which tells a path from a hub name


def home_path(path: str | Path) -> Path:
    """A path whose `~` is the home folder; as argparse's `type`, too: a shell leaves `--flag=~/x`
    alone.

    Not for what may be a name on the hub (`model_place`): "./x" becomes "x", which may be one.
    """
    return Path(expand_home(str(path)))


def is_hub_name(given: str | Path) -> bool:
    """Whether it can only be meant as a name on the hub: nothing is there, and it is written "name"
    or "owner/name"."""
    written = str(given)
    as_path = written.startswith(("/", ".", "~")) or written.endswith("/") or written.count("/") > 1
    return not as_path and not os.path.lexists(written)


def model_type(folder: Path) -> str | None:
    """What the config.json of a model folder names; None for any other folder."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def numbered_folders(folder: Path) -> list[tuple[int, Path]]:
    """(N, path) of the `step_N` folders in `folder`, ascending."""
    found = (
        (_STEP_FOLDER.fullmatch(path.name), path) for path in folder.glob("step_*") if path.is_dir()
    )
    return sorted((int(match.group(1)), path) for match, path in found if match)


def model_place(given: str | Path) -> Path:
    """Where a model is read from: a folder, its `~` expanded, or a name on the hub as it is.

    Args:
        given: as the user wrote it; a Path is a folder and never a name on the hub.
    Raises:
        UserError: nothing is there, or a file, or a run, whose model folders are one level below.
    """
    path = home_path(given)
    if not path.is_dir() and (isinstance(given, Path) or not is_hub_name(given)):
        raise UserError(
            f"model folder {given} "
            f"{'is a file; give a folder' if path.exists() else 'does not exist'}"
        )
    if model_type(path) is None and (
        steps := numbered_folders(path)
    ):  # its config.json is the training's
        raise UserError(
            f"{given} is a run folder; give a model folder in it, the newest is {steps[-1][1]}"
        )
    return path


def file_in_the_way(path: Path) -> Path | None:
    """The file that stands where a folder or one above it is or has to be made; None if there is
    none."""
    try:
        return next((place for place in (path, *path.parents) if place.is_file()), None)
    except OSError:  # one may not look there
        return None


def check_writable(path: Path, flag: str = "--output") -> None:
    """Look, before long work, whether a folder can be made or filled; nothing stays behind.

    Args:
        path: a folder, which may exist, and so may none of those above it.
        flag: what gave it, for the message.
    Raises:
        UserError: it is a file, or lies in one, or nothing can be written there.
    """
    if (file := file_in_the_way(path)) is not None:
        raise UserError(f"{flag} {path}: {file} is a file; give a folder")
    try:
        place = path.absolute()
        while not place.exists():
            place = place.parent
        with TemporaryDirectory(dir=place, prefix=".writable-"):
            pass
    except OSError as error:
        raise UserError(
            f"{flag} {path} cannot be written ({error.strerror}); give another place"
        ) from None


def check_model_output(output: Path, overwrite: bool, source: Path | None = None) -> None:
    """Look, before long work, whether a model folder may and can be written; an empty folder counts
    as none.

    Args:
        output: the new folder, or a link to it. An old one that a killed run was replacing is put
            back.
        overwrite: replace a model folder that is there, and nothing else.
        source: the model that it is made of, which is not replaced.
    Raises:
        UserError: it must not or cannot be written.
    """
    place = output.resolve()
    if source is not None and source.resolve().is_relative_to(place):
        raise UserError(f"{output} is, or holds, the model that is read; give another --output")
    check_writable(place.parent if place.exists() else place)
    settle_replacing(place)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not overwrite:
            raise UserError(
                f"{output} exists already; give another --output, or --overwrite to replace it"
            )
        if model_type(output) is None:
            raise UserError(
                f"{output} is not a model folder (no config.json that names a model_type), so it "
                "is not replaced; "
                "give another --output"
            )
