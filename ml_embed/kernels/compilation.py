"""torch.compile of decoder layers (`compile_layers`), and checks that it works here."""

from collections.abc import Iterable

import torch
import transformers
from packaging.version import Version
from torch import nn

from ml_embed.errors import UserError

COMPILES_SINCE = "5.6.2"
"""The oldest transformers that was seen to work, with torch 2.11. 5.3 does not; those between were
not tried."""


def compile_in_place(layers: Iterable[nn.Module]) -> None:
    """Fuse each layer's operations before and after attention; parameters keep their names.

    A layer is compiled when it is first called, once for batches of any size.

    Raises:
        UserError: this version of transformers cannot be compiled layer by layer.
    """
    check_transformers()
    for layer in layers:
        setattr(layer, "forward", torch.compile(layer.forward, dynamic=True))  # noqa: B010


def check_transformers() -> None:
    """Refuse a transformers that does not return the hidden states of compiled layers.

    Raises:
        UserError: it is older than `COMPILES_SINCE`.
    """
    if Version(transformers.__version__) < Version(COMPILES_SINCE):
        raise UserError(
            f"compile_layers: needs transformers {COMPILES_SINCE} or newer (here: "
            f"{transformers.__version__}); update it, or set compile_layers to false"
        )


def check_compiler(device: torch.device, key: str, off: str) -> None:
    """Compile something small for `device`, to find out whether torch.compile works at all.

    Takes a few seconds the first time; after that torch finds it in its cache.

    Args:
        key: of the config, which needs it.
        off: its value that does not.
    Raises:
        UserError: torch.compile does not work here, for example because no C++ compiler is there.
    """
    numbers = torch.ones(8, device=device)
    try:
        torch.compile(lambda x: x.sigmoid() * x + 1)(numbers)
    # Any error counts: it may come from the compiler, its headers, a cache or a driver.
    except Exception as error:
        lines = (line for line in str(error).splitlines() if line.strip())
        raise UserError(
            f"{key}: torch.compile does not work on this machine's {device.type} "
            f"({next(lines, type(error).__name__)}); it needs a C++ compiler (g++, or the one that "
            f"CXX names) and, on GPUs, Triton; install them, or set {key} to {off}"
        ) from error
