"""LoRA (arXiv 2106.09685) through peft: adapters train in place of the decoder layers' matrices.

y = W x + s C D x, with W frozen and s = lora_alpha / lora_r. Saving multiplies adapters out. The
token factors (or the table) and the exits' norms, which are no part of a layer, train whole; the
small norms within layers stay as they are, as is usual with LoRA. What is frozen needs no float32
weights where computation is in bfloat16.

Letters: O, I outputs and inputs of a matrix, k the adapters' rank, D (k, I) and C (O, k) an
adapter's two parts (LoRA's own A and B, which here are the token factors').
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ml_embed.config import TrainConfig
from ml_embed.errors import check_installed
from ml_embed.model import MatryoshkaEncoder
from ml_embed.model_folders.sizes import matrix_shapes

OLDEST_PEFT = "0.18"  # those before import names that transformers 5 no longer has
# What peft calls the parts of a matrix "….q_proj.weight" that has an adapter.
_FROZEN, _DOWN, _UP = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"


def check_peft() -> None:
    """Raises UserError where peft is not installed, or too old."""
    check_installed("lora_r", "peft", OLDEST_PEFT, "set lora_r to 0")


def scale(config: TrainConfig) -> float:
    """s, what an adapter's product is multiplied by."""
    return 2.0 if config.lora_alpha is None else config.lora_alpha / config.lora_r


def add_adapters(encoder: MatryoshkaEncoder, config: TrainConfig) -> None:
    """Freeze an encoder's decoder layers, on the CPU, and give each of their matrices an adapter.

    They change nothing at first, because C starts as 0; D is random, a function of the seed alone.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    adapters = LoraConfig(
        r=config.lora_r,
        lora_alpha=scale(config) * config.lora_r,
        target_modules=list(matrix_shapes(encoder.config)),
    )
    with torch.random.fork_rng(devices=[]):  # peft draws from the CPU's global generator
        torch.default_generator.manual_seed(config.seed % 2**63)
        inject_adapter_in_model(adapters, encoder.backbone)
    for module in encoder.modules():
        if isinstance(module, LoraLayer):
            # under bf16 it would make a float32 copy of every input
            module.cast_input_dtype_enabled = False


def narrow_frozen(encoder: MatryoshkaEncoder) -> None:
    """Hold frozen matrices in bfloat16 where that loses nothing.

    For runs that compute in bfloat16: they round these matrices in every product, so nothing
    changes but the memory. Models that are published in bfloat16 have no others.
    """
    for name, parameter in encoder.named_parameters():
        if name.endswith(_FROZEN):
            narrow = parameter.data.bfloat16()
            if torch.equal(narrow.float(), parameter.data):
                parameter.data = narrow


def merged(state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """An encoder's state with its adapters multiplied out: W + s C D under the name of W.

    Args:
        state: of the encoder, whole; it is left as it is.
        factor: s.
    """
    plain = {
        name: tensor for name, tensor in state.items() if not name.endswith((_FROZEN, _DOWN, _UP))
    }
    for name, frozen in state.items():
        if name.endswith(_FROZEN):
            matrix = name.removesuffix(_FROZEN)
            plain[f"{matrix}.weight"] = torch.addmm(
                frozen.float(), state[matrix + _UP], state[matrix + _DOWN], alpha=factor
            )
    return plain
