"""In which precision a device computes, and whether our own CPU kernels can take part."""

import torch
from torch import Tensor


def in_full_precision_on_cpu(x: Tensor) -> bool:
    """Whether `x` is float32 or float64, on the CPU and outside of autocast.

    `bucketed_attention` and `rms_norm` take only such tensors.
    """
    full = x.dtype in (torch.float32, torch.float64)
    return full and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device is a GPU that computes in bfloat16 itself; older ones only imitate it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
