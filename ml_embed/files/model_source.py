"""The door for models: what a user names becomes a folder here, once; all else takes that folder.

A model is named by its folder or by its name on the hub. Of the hub's files only those are fetched
that are read: safetensors, JSON and the tokenizer's. No pickle (.bin, .pt, .pth) ever is, but the
token factors of a released model by the one command that imports it.
"""

import re
from pathlib import Path

from ml_embed.errors import UserError, one_line
from ml_embed.files.paths import home_path, is_hub_name, model_type, numbered_folders

TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors", "README.md")
RELEASED_FACTORS = ("U.pth", "V.pth")
"""The token factors (V, r) and (r, H) of models as ML-Embed's authors released them."""


def find_model_folder(name: str | Path) -> Path:
    """The folder of a model: one that stands here, or the hub's files of that name.

    Args:
        name: as the user wrote it, with `~` for the home folder; a Path is never a name on the hub.
    Raises:
        UserError: nothing is there, or a file, or a run, whose model folders are one level below;
            or the hub does not give the files; or it is a released model, to be imported.
    """
    folder = _find(name, "model folder", MODEL_FILES)
    if is_released(folder):
        raise UserError(
            f"{name} has its token factors in {' and '.join(RELEASED_FACTORS)}, which only "
            f"scripts/import_model.py reads: run it with --model {name} --output NEW, then give NEW"
        )
    return folder


def find_released_folder(name: str | Path) -> Path:
    """`find_model_folder` for a model to be imported, whose token factors may be in .pth files."""
    return _find(name, "model folder", (*MODEL_FILES, *RELEASED_FACTORS))


def is_released(folder: Path) -> bool:
    """Whether a folder holds a model as ML-Embed's authors released theirs."""
    return all((folder / name).is_file() for name in RELEASED_FACTORS)


def find_tokenizer_folder(name: str | Path) -> Path:
    """`find_model_folder` for a model of which the tokenizer is all that is read."""
    return _find(name, "tokenizer folder", TOKENIZER_FILES)


def hub_name(folder: Path) -> str | None:
    """The name on the hub of a folder that was fetched from there; None for any other."""
    match = re.search(r"/models--([^/]+)/snapshots/[^/]+/?$", folder.absolute().as_posix())
    return match.group(1).replace("--", "/", 1) if match else None


def _find(name: str | Path, kind: str, files: tuple[str, ...]) -> Path:
    folder = home_path(name)
    if not folder.is_dir():
        if not isinstance(name, Path) and is_hub_name(name):
            return _fetch(name, files)
        problem = "is a file; give a folder" if folder.exists() else "does not exist"
        raise UserError(f"{kind} {name} {problem}")
    steps = numbered_folders(folder)
    if steps and model_type(folder) is None:  # the config.json of a run is the training's
        raise UserError(
            f"{name} is a run folder; give a model folder in it, the newest is {steps[-1][1]}"
        )
    return folder


def _fetch(name: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download  # takes a while that local folders need not wait

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub's client has a dozen classes
        raise UserError(
            f"{name} is not a folder here, and the hub does not give it: "
            f"{one_line(error).rstrip('.')}. Without network access, download the model and give "
            "its folder"
        ) from error
