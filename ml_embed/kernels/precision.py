"""Whether this project's own CPU kernels can compute something."""

import torch
from torch import Tensor


def in_full_precision_on_cpu(x: Tensor) -> bool:
    """Whether `x` is float32 or float64, on the CPU and outside of autocast.

    `bucketed_attention` and `rms_norm` take only such tensors.
    """
    full = x.dtype in (torch.float32, torch.float64)
    return full and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
