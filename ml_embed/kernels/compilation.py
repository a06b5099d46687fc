"""torch.compile of decoder layers (`compile_layers`): what is compiled, and whether it works
here."""

from collections.abc import Iterable

import torch
import transformers
from packaging.version import Version
from torch import nn

from ml_embed.errors import UserError

COMPILES_SINCE = "5.23.0"


def compile_in_place(layers: Iterable[nn.Module]) -> None:
    """Fuse what stands around attention in each layer; parameters keep their names.

    Nothing is compiled before a layer is first called; other lengths of a batch need no other
    compilation.

    Raises:
        UserError: this transformers cannot be compiled layer by layer.
    """
    check_transformers()
    for layer in layers:
        layer.compile(dynamic=True)


def check_transformers() -> None:
    """
    Raises:
        UserError: this transformers loses sight of the hidden states of compiled layers (5.3 does,
            5.23 does not; those between were not tried).
    """
    if Version(transformers.__version__) < Version(COMPILES_SINCE):
        raise UserError(
            f"compile_layers: needs transformers {COMPILES_SINCE} or newer (here: "
            f"{transformers.__version__}); "
            "update it, or set compile_layers to false"
        )


def check_compiler(device: torch.device) -> None:
    """Compile something small for `device`: a few seconds, once a machine (torch caches what it
    compiled).

    Raises:
        UserError: torch.compile does not work here, for want of a C++ compiler, say.
    """
    numbers = torch.ones(8, device=device)
    try:
        torch.compile(lambda x: x.sigmoid() * x + 1)(numbers)
    except (
        Exception
    ) as error:  # of any kind: compilers, their headers, caches and drivers are all asked for
        reason = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise UserError(
            f"compile_layers: torch.compile does not work on this machine's {device.type} "
            f"({reason}); "
            "it needs a C++ compiler (g++, or the one that CXX names) and, on GPUs, Triton; "
            "install them, "
            "or set compile_layers to false"
        ) from error
