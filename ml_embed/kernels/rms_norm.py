"""RMSNorm (arXiv 1910.07467) in few passes over memory.

transformers' norm takes six operations, and torch's backward pass of it about twenty; each of them
reads and writes all rows, and of bfloat16 rows it makes float32 ones, which everything up to the
next matrix product then works on. Where torch has a kernel of its own (GPUs), it is torch's, and
rows keep their dtype. Here, for CPUs, it is five operations and nine, and sums over a dimension are
matrix products.

    y = w x / s,  s = sqrt(mean(x^2) + eps)
    dx = (w dy - x mean(x w dy) / s^2) / s,  dw = sum of dy x / s over rows

Letters: H size of a row, s its root mean square.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from ml_embed.kernels.precision import in_full_precision_on_cpu


def fuse_norms(module: nn.Module) -> None:
    """Run all norms in `module` in few passes, in the dtype of their rows.

    They keep their parameters and their names.
    """
    for norm in module.modules():
        if isinstance(norm, Qwen3RMSNorm):
            # One class for all of them and no forward of each one's own: the compiler would compile
            # every layer anew.
            norm.__class__ = FusedRMSNorm


class FusedRMSNorm(Qwen3RMSNorm):
    """transformers' norm, by `rms_norm` where that can run and is not compiled, else by torch's."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, weight = hidden_states, self.weight
        own = in_full_precision_on_cpu(x) and weight.dtype == x.dtype
        if own and not torch.compiler.is_compiling():  # the compiler fuses torch's better
            return rms_norm(x, weight, self.variance_epsilon)
        # Autocast would compute in float32. torch's kernel wants the weight in the rows' dtype; it
        # computes in float32 inside, and rounds once.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.variance_epsilon)


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
