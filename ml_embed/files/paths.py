"""What users give as paths: the home folder, names on the hub, and places to be written."""

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from ml_embed.errors import UserError
from ml_embed.files.atomic import restore_replaced
from ml_embed.files.json_file import parse_json

_STEP_FOLDER = re.compile(r"step_(\d+)")


def expand_home(path: str) -> str:
    """`~` or `~name` at the start as the home folder; all else as it is written."""
    # Not pathlib's, which drops a "./" that tells a path from a hub name.
    return os.path.expanduser(path)  # noqa: PTH111


def home_path(path: str | Path) -> Path:
    """A path whose `~` is the home folder; also argparse's `type`: shells leave `--flag=~/x` alone.

    Not for what may be a name on the hub (`find_model_folder`): "./x" becomes "x", which is one.
    """
    return Path(expand_home(str(path)))


def is_hub_name(given: str | Path) -> bool:
    """Whether it is written like a name on the hub ("name", "owner/name") and nothing is there."""
    written = str(given)
    as_path = written.startswith(("/", ".", "~")) or written.endswith("/") or written.count("/") > 1
    return not as_path and not os.path.lexists(written)


def model_type(folder: Path) -> str | None:
    """What the config.json of a model folder names; None for any other folder."""
    try:
        return parse_json((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def numbered_folders(folder: Path) -> list[tuple[int, Path]]:
    """(N, path) of the `step_N` folders in `folder`, ascending."""
    found = (
        (_STEP_FOLDER.fullmatch(path.name), path) for path in folder.glob("step_*") if path.is_dir()
    )
    return sorted((int(match.group(1)), path) for match, path in found if match)


def file_in_the_way(path: Path) -> Path | None:
    """The file where a folder, or a folder above it, would have to be; None if there is none."""
    try:
        return next((place for place in (path, *path.parents) if place.is_file()), None)
    except OSError:  # one may not look there
        return None


def check_writable(path: Path, flag: str = "--output") -> None:
    """Check before long work that a folder can be made or filled; nothing stays behind.

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
    """Check before long work that a model folder may and can be written.

    Args:
        output: the new folder, or a link to it; an empty folder counts as none. An old folder that
            a killed command was replacing is put back.
        overwrite: replace a model folder that is there, and nothing else.
        source: the model that is read, which must not be replaced.
    Raises:
        UserError: it must not or cannot be written.
    """
    place = output.resolve()
    if source is not None and source.resolve().is_relative_to(place):
        raise UserError(f"{output} is, or holds, the model that is read; give another --output")
    check_writable(place.parent if place.exists() else place)
    restore_replaced(place)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not overwrite:
            raise UserError(
                f"{output} exists already; give another --output, or --overwrite to replace it"
            )
        if model_type(output) is None:
            raise UserError(
                f"{output} is not a model folder (no config.json that names a model_type), so it "
                "is not replaced; give another --output"
            )
