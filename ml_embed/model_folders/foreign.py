"""What a model folder may ask of sentence-transformers and transformers: no code, nothing outside.

Some versions of sentence-transformers run whatever class a local folder names. So all that a folder
names is compared with what is known, before the library sees it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from ml_embed.errors import UserError
from ml_embed.files.json_file import read_json

MODULES_FILE = "modules.json"
ADAPTER_FILE = "adapter_config.json"
DAMAGED = "copy the model folder again"
KNOWN_MODULES = {
    "BoW",
    "CLIPModel",
    "CNN",
    "Dense",
    "Dropout",
    "LSTM",
    "LayerNorm",
    "LogitScore",
    "Normalize",
    "Pooling",
    "StaticEmbedding",
    "Transformer",
    "WeightedLayerPooling",
    "WordWeights",
}
"""Modules whose files name no class, as those of Router and WordEmbeddings do."""
KNOWN_ARGUMENTS = {
    "add_eos_token",
    "add_pooling_layer",
    "attn_implementation",
    "dtype",
    "is_causal",
    "model_max_length",
    "padding_side",
    "torch_dtype",
    "truncation_side",
    "trust_remote_code",
    "use_bidirectional_attention",
}
"""What a Transformer module may give to transformers; trust_remote_code only as false."""
_MODULE_CLASS = re.compile(r"sentence_transformers\.(\w+\.)*(\w+)")
_ACTIVATION = re.compile(r"torch\.nn\.(modules\.\w+\.)?(\w+)")


@dataclass(frozen=True)
class Listed:
    """A module of modules.json."""

    kind: str
    """the name of its class, where that is sentence-transformers' own; else the whole path of it"""
    path: str
    """of its folder in the model folder"""

    @property
    def is_known(self) -> bool:
        return self.kind in KNOWN_MODULES


def read_listing(folder: Path) -> list[Listed]:
    """The modules of a folder in order, which may be other programs'; [] if it lists none.

    Raises:
        UserError: the list is damaged, or names a place outside the folder.
    """
    path = folder / MODULES_FILE
    if not path.is_file():
        return []
    listed = []
    for entry in read_json(path, DAMAGED, list):
        match entry:
            case {"type": str(kind), "path": str(place)}:
                check_inside(path, place)
                own = _MODULE_CLASS.fullmatch(kind)
                listed.append(Listed(own[2] if own else kind, place))
            case _:
                raise UserError(f"{path} is damaged (a module lacks its type or path); {DAMAGED}")
    return listed


def check_inside(path: Path, place: Any) -> None:
    """Refuse a place that the file at `path` names and that is not below its folder.

    Links are the user's own and are followed: a snapshot of the hub is made of them.

    Raises:
        UserError: the place is absolute, goes up, or is no text.
    """
    named = PurePosixPath(place) if isinstance(place, str) and "\0" not in place else None
    if named is None or named.is_absolute() or ".." in named.parts:
        raise UserError(
            f"{path} names {place!r}, a place outside the folder, which is not followed; {DAMAGED}"
        )


def check_adapter(folder: Path) -> None:
    """Refuse a LoRA adapter, which is no model without its base."""
    path = folder / ADAPTER_FILE
    if path.is_file():
        base = read_json(path, DAMAGED).get("base_model_name_or_path")
        raise UserError(
            f"{folder} holds a LoRA adapter ({ADAPTER_FILE}) of {base}, not a whole model; merge "
            "it first: peft's AutoPeftModel.from_pretrained(FOLDER).merge_and_unload()"
            ".save_pretrained(NEW), and the tokenizer's save_pretrained(NEW)"
        )


def check_kernels(path: Path, settings: Any) -> None:
    """Refuse settings, of the file at `path`, that name a kernel on the hub, which is code."""
    for key, value in _entries(settings):
        if key.endswith("attn_implementation") and "/" in str(value):
            raise UserError(
                f"{path}: {key} {value!r} asks for code from the hub, which is never run; remove it"
            )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a JSON value, at any depth, with what it holds."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def check_foreign(folder: Path) -> None:
    """Check a folder before sentence-transformers reads it.

    Raises:
        UserError: it would run code that is not sentence-transformers' own or torch's, or read
            something outside the folder.
    """
    listed = read_listing(folder)
    for module in listed:
        if not module.is_known:
            raise UserError(
                f"{folder / MODULES_FILE} asks for the module {module.kind}, which may be code of "
                "the folder's own and is never run; known are those of sentence-transformers: "
                f"{', '.join(sorted(KNOWN_MODULES))}"
            )
    for place in {folder, *(folder / module.path for module in listed)}:
        check_adapter(place)
        for path in sorted(place.glob("*.json")):
            _check_settings(path)
    for module in listed:
        if module.kind == "Dense":
            _check_activation(folder / module.path / "config.json")


def _check_settings(path: Path) -> None:
    """Of a module: arguments for transformers, and places of weights."""
    if path.name == "config.json":
        check_kernels(path, read_json(path, DAMAGED))
    elif path.name.endswith(".index.json"):
        check_weight_map(path)
    elif path.name.startswith("sentence_"):
        settings = read_json(path, DAMAGED)
        check_kernels(path, settings)
        for key, arguments in settings.items():
            if isinstance(arguments, dict) and key.endswith(("_args", "_kwargs")):
                unknown = sorted(arguments.keys() - KNOWN_ARGUMENTS)
                unknown += ["trust_remote_code"] * bool(arguments.get("trust_remote_code"))
                if unknown:
                    raise UserError(
                        f"{path}: {key} asks transformers for {unknown[0]}, which may be code and "
                        "is never run; remove it"
                    )


def check_weight_map(path: Path) -> dict[str, str]:
    """The shard of each tensor, as an index of weights says.

    Raises:
        UserError: the index is damaged, or names a file that does not lie beside it.
    """
    places = read_json(path, DAMAGED).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{path} is damaged (it has no weight_map); {DAMAGED}")
    for place in places.values():
        check_inside(path, place)
    return places


def _check_activation(path: Path) -> None:
    """Some versions call whatever stands there."""
    name = read_json(path, DAMAGED).get("activation_function")
    known = _ACTIVATION.fullmatch(name) if isinstance(name, str) else None
    found = getattr(nn, known[2], None) if known else None
    if name is not None and not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(
            f"{path}: the activation {name!r} is none of torch.nn and is never run; {DAMAGED}"
        )
