"""In which precision something is computed."""

import torch
from torch import Tensor


def in_full_precision_on_cpu(x: Tensor) -> bool:
    """Whether `x` is of the kind that this project's own CPU kernels take (`bucketed_attention`,
    `rms_norm`)."""
    full = x.dtype in (torch.float32, torch.float64)
    return full and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
