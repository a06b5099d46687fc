"""What a model folder is: the content of the files that decide its vectors, wherever it lies."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_embed.errors import UserError
from ml_embed.files.digests import digests_of, value_digest
from ml_embed.files.json_file import parse_json

SETTINGS_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
"""What every model folder has."""
TOKENIZER_FILES = ("vocab.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
"""What older ones have beside them."""
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
"""Keys of JSON files that say nothing about the vectors."""
_PARTS = re.compile(r"nested|\d+_\w+")  # folders of ours, and of sentence-transformers' modules
_WEIGHTS = (".safetensors", ".bin")
_TEXTS = (".json", ".txt", ".model")


def model_identity(
    folder: Path, memory: Sequence[Path] = (), weights: bool = True
) -> dict[str, str]:
    """File of a model folder -> digest of its content.

    JSON files are compared as values: another layout, or another version of transformers that
    wrote them, is no change.

    Args:
        folder: of any model that transformers or sentence-transformers read.
        memory: folders in which digests of weights are remembered, see `digests_of`.
        weights: all files; else config and tokenizer alone, which costs no reading of weights.
    Raises:
        UserError: a JSON file is damaged.
    """
    if not weights:
        names = (*SETTINGS_FILES, *TOKENIZER_FILES)
        files = [folder / name for name in names if (folder / name).is_file()]
    else:
        parts = [p for p in folder.iterdir() if p.is_dir() and _PARTS.fullmatch(p.name)]
        files = [
            path
            for part in (folder, *parts)
            for path in part.iterdir()
            if path.suffix in (*_WEIGHTS, *_TEXTS) and path.name[0] != "." and path.is_file()
        ]
    values = {path: value_digest(_value(path)) for path in files if path.suffix == ".json"}
    contents = digests_of((path for path in files if path not in values), memory)
    return {
        path.relative_to(folder).as_posix(): digest
        for path, digest in sorted((values | contents).items())
    }


def _value(path: Path) -> Any:
    """What a JSON file says that has an effect."""
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); copy the model folder again") from None
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if key not in WITHOUT_EFFECT}
