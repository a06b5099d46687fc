"""What the headers of weights say: shapes and types, compared before memory is taken for them.

Letters: V vocabulary, r rank, H hidden size.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import Qwen3Config

from ml_embed.errors import UserError
from ml_embed.model_folders.foreign import DAMAGED
from ml_embed.model_folders.record import weights_folder
from ml_embed.model_folders.sizes import matrix_shapes

NUMBERS = ("F64", "F32", "F16", "BF16")
"""Types of safetensors that weights can have."""
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)\.weight")


@dataclass(frozen=True)
class Header:
    """A tensor of a safetensors file, of which nothing but this was read."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def check(self, *shape: int) -> None:
        """Refuse another shape than this, and what are no numbers.

        Raises:
            UserError: says both shapes, or the type.
        """
        if self.shape != shape:
            raise UserError(
                f"the weights in {self.path} cannot be loaded: the tensor {self.name} is "
                f"{_times(self.shape)}, by the folder's JSON files it must be {_times(shape)}; "
                f"{DAMAGED}"
            )
        if self.dtype not in NUMBERS:
            raise UserError(
                f"{self.path}: the tensor {self.name} has the type {self.dtype}, it must be one of "
                f"{', '.join(NUMBERS)}; {DAMAGED}"
            )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in shape) or "a single number"


def headers(path: Path) -> dict[str, Header]:
    """Those of a safetensors file, whose size the library compares with what it says.

    Raises:
        UserError: the file is missing or damaged.
    """
    return {header.name: header for header in _headers(path)}


def _headers(path: Path) -> Iterator[Header]:
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                yield Header(path, name, tuple(part.get_shape()), part.get_dtype())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be loaded ({error}); {DAMAGED}") from None


def check_backbone(folder: Path, config: Qwen3Config) -> None:
    """Compare the backbone's weights with its config.

    Tensors that are missing are left to whoever loads them, as are folders without weights.

    Raises:
        UserError: config.json says other sizes or more layers, or a tensor holds no numbers.
    """
    deepest, shapes = 0, matrix_shapes(config)
    for path in sorted(weights_folder(folder).glob("*.safetensors")):
        for name, header in headers(path).items():
            if found := _LAYER.fullmatch(name):
                deepest = max(deepest, int(found[1]) + 1)
                if found[2] in shapes:
                    header.check(*shapes[found[2]])
            elif f".{name}".endswith(".embed_tokens.weight"):
                header.check(config.vocab_size, config.hidden_size)
    if 0 < deepest < config.num_hidden_layers:
        raise UserError(
            f"config.json of {folder} says {config.num_hidden_layers:,} layers, the weights lack "
            f"all after {deepest}; {DAMAGED}"
        )


def check_factors(path: Path, config: Qwen3Config, rank: int) -> None:
    """Compare the token factors A (V, r) and B (r, H) with the config and the record.

    Raises:
        UserError: one is missing, of another shape, or holds no numbers.
    """
    found = headers(path)
    for name, shape in (("A", (config.vocab_size, rank)), ("B", (rank, config.hidden_size))):
        if name not in found:
            raise UserError(f"{path} has no tensor {name}; {DAMAGED}")
        found[name].check(*shape)


def check_exit_norms(path: Path, exits: tuple[int, ...], hidden: int) -> None:
    """Refuse exit norms that are not of shape (H,), or not there for an exit.

    Raises:
        UserError: one is missing, of another shape, holds no numbers, or belongs to no layer.
    """
    found = headers(path)
    lacking = [str(layer) for layer in exits if str(layer) not in found]
    unknown = [name for name in found if not name.isdecimal()]
    if lacking or unknown:
        problem = f"no norm of exit {lacking[0]}" if lacking else f"a tensor {unknown[0]!r}"
        raise UserError(f"{path} has {problem}; {DAMAGED}")
    for header in found.values():
        header.check(hidden)
