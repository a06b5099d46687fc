"""RMSNorm (arXiv 1910.07467) on the CPU in few passes over memory.

transformers' norm takes six operations, and torch's backward pass of it about twenty; each of them
reads and writes all rows. Here it is five and nine, and sums over a dimension are matrix products.

    y = w x / s,  s = sqrt(mean(x^2) + eps)
    dx = (w dy - x mean(x w dy) / s^2) / s,  dw = sum of dy x / s over rows

Letters: H size of a row, s its root mean square.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ml_embed.kernels.precision import in_full_precision_on_cpu

if TYPE_CHECKING:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


def fuse_norms(module: nn.Module, kind: "type[Qwen3RMSNorm]") -> None:
    """Run all norms of class `kind` in `module` by `rms_norm`, on CPUs in full precision.

    Elsewhere they run as before. They keep their class, their parameters and their names.
    """
    for norm in module.modules():
        if isinstance(norm, kind):
            # set on this norm alone, not on its class
            norm.forward = partial(_forward, norm)  # type: ignore[method-assign]


def _forward(norm: "Qwen3RMSNorm", hidden_states: Tensor) -> Tensor:
    """A norm's forward: by `rms_norm` where that can run, else the class's own."""
    if in_full_precision_on_cpu(hidden_states) and norm.weight.dtype == hidden_states.dtype:
        return rms_norm(hidden_states, norm.weight, norm.variance_epsilon)
    return type(norm).forward(norm, hidden_states)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(..., H) rows and (H,) weight -> (..., H)"""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """The formulas at the top of this file; the inverse of s is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()  # 1 / s
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        # Contiguous, whatever the strides of `grad`.
        buffer = torch.mul(grad, x, out=torch.empty(x.shape, dtype=x.dtype))
        products = buffer.view(-1, x.shape[-1])
        grad_weight = (
            (inverse.reshape(1, -1) @ products).squeeze(0) if ctx.needs_input_grad[1] else None
        )
        mean = (products @ weight.unsqueeze(1)).view(inverse.shape).div_(x.shape[-1])  # of x w dy
        torch.mul(grad, weight, out=buffer).mul_(inverse)
        return buffer.addcmul_(x, mean.mul_(inverse**3), value=-1), grad_weight, None
