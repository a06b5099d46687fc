"""Sections of the GPU check that run single kernels: products, attention, losses.

Letters: T tokens, N sequences, A query heads, G key/value heads, D head size.
"""

import itertools
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from ml_embed.benchmarks.gpu_common import Setting, free_memory, random_batch, relative_error
from ml_embed.benchmarks.training_setup import matryoshka_spec
from ml_embed.data.packing import PackedSequences
from ml_embed.kernels.attention import available_kernels, packed_attention, takes_grouped_heads
from ml_embed.losses import nested
from ml_embed.losses.objective import Objective

# (inputs, outputs) of the products of a Qwen3-0.6B layer, and of two that could be joined.
LAYER_PRODUCTS = {
    "qkv_as_one": (1024, 4096),
    "q": (1024, 2048),
    "kv": (1024, 1024),
    "o": (2048, 1024),
    "gate": (1024, 3072),
    "gate_up_as_one": (1024, 6144),
    "down": (3072, 1024),
}
STEP_TOKENS = 11450
"""of a batch of 4 rows"""
HEADS = 16
EXITS = 7
"""of 28 layers"""
LENGTHS = {
    "ragged": [1, 2, 17, 63, 64, 65, 128, 129, 300, 777, 1024, 1500],
    "equal": [256] * 8,
    "single": [1, 1, 1],
    "reversed": [700, 5, 300, 1],
}
SMALL_LENGTHS = {"ragged": [1, 3, 17, 33], "single": [1, 1]}
KERNEL_TOLERANCE = 0.01
"""relative error of bfloat16 attention, which has 8 bits"""


def peaks(setting: Setting) -> dict[str, Any]:
    """The fastest this GPU multiplies and copies: what other sections' speeds are compared with.

    Per product of a layer: TFLOP/s of forward, gradient of the input, gradient of the weight. A
    good answer has most of them near `square_tflops`.
    """
    device, dtype = setting.device, setting.dtype
    size = 256 if setting.small else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**20 if setting.small else 2**30, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    result: dict[str, Any] = {
        "square_tflops": 2 * size**3 / setting.seconds(lambda: left @ right) / 1e12,
        "copy_TBs": 2 * len(source) / setting.seconds(lambda: target.copy_(source)) / 1e12,
    }
    for name, (inputs, outputs) in LAYER_PRODUCTS.items():
        result[name] = _product_tflops(setting, inputs, outputs)
    return result


def _product_tflops(setting: Setting, inputs: int, outputs: int) -> list[int]:
    """TFLOP/s of a linear layer: forward, gradient of its input, gradient of its weight."""
    tokens = 64 if setting.small else STEP_TOKENS
    kind: dict[str, Any] = {"device": setting.device, "dtype": setting.dtype}
    weight = torch.randn(outputs, inputs, **kind)
    x, grad = torch.randn(tokens, inputs, **kind), torch.randn(tokens, outputs, **kind)
    runs = (lambda: x @ weight.T, lambda: grad @ weight, lambda: grad.T @ x)
    flops = 2 * tokens * inputs * outputs
    return [round(flops / setting.seconds(run) / 1e12) for run in runs]


def kernels(setting: Setting) -> dict[str, Any]:
    """Outputs and gradients of each attention kernel, in bfloat16, against float64.

    A good answer is "ok": no relative error reaches `KERNEL_TOLERANCE`.
    """
    cases = (SMALL_LENGTHS if setting.small else LENGTHS).items()
    errors: dict[str, list[float]] = {}
    for size, groups, (name, lengths) in itertools.product((128, 64), (8, 16, 1), cases):
        for kernel, found in _kernel_errors(setting, lengths, groups, size).items():
            errors[f"{kernel}/D{size}/G{groups}/{name}"] = found
    over = {
        key: found
        for key, found in errors.items()
        if not all(error < KERNEL_TOLERANCE for error in found)  # NaN is over
    }
    worst: dict[str, float] = {}
    for key, found in errors.items():
        kernel = key.split("/")[0]
        worst[kernel] = max(worst.get(kernel, 0.0), *found)
    return {"ok": not over, "worst": worst, "over_1e-2": over, "cases": len(errors)}


def _kernel_errors(
    setting: Setting, lengths: list[int], groups: int, size: int
) -> dict[str, list[float]]:
    """Relative errors of each kernel: output, gradients of queries, keys, values."""
    device = setting.device
    inputs = _attention_inputs(lengths, groups, size, device)
    expected = _attention_formula(inputs, lengths)
    weights = torch.randn(expected.shape, device=device, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    # Queries and keys of one-token texts have no gradient: measured by that of the values then.
    least = float(wanted[2].double().norm()) * 1e-3
    packed = PackedSequences.from_lengths(lengths, device)
    layer: Any = SimpleNamespace(head_dim=size)
    errors: dict[str, list[float]] = {}
    for kernel in available_kernels(device, torch.bfloat16):
        found = packed_attention(layer, *inputs, None, packed=packed, kernel=kernel)[0]
        grads = torch.autograd.grad((found.double() * weights).sum(), inputs)
        pairs = zip(grads, wanted, strict=True)
        each = [relative_error(found, expected), *(relative_error(a, b, least) for a, b in pairs)]
        errors[kernel] = [float(f"{error:.2e}") for error in each]
    return errors


def _attention_inputs(
    lengths: list[int], groups: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Random bfloat16 queries (1, A, T, D), keys and values (1, G, T, D) that want gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def make(heads: int) -> Tensor:
        values = torch.randn(
            1, sum(lengths), heads, size, device=device, generator=generator, dtype=torch.float32
        )
        return values.to(torch.bfloat16).transpose(1, 2).detach().requires_grad_()

    return make(HEADS), make(groups), make(groups)


def _attention_formula(inputs: tuple[Tensor, Tensor, Tensor], lengths: list[int]) -> Tensor:
    """Causal attention in float64, one text at a time -> (1, T, A, D)"""
    scale = inputs[0].shape[-1] ** -0.5
    query, key, value = (x[0].double() for x in inputs)
    key, value = (x.repeat_interleave(len(query) // len(x), dim=0) for x in (key, value))
    outputs = []
    for q, k, v in zip(*(x.split(lengths, dim=1) for x in (query, key, value)), strict=True):
        future = torch.ones(q.shape[1], q.shape[1], device=q.device, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(future, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)[None]


def grouped_heads(setting: Setting) -> dict[str, Any]:
    """torch's `varlen_attn` with fewer key/value heads than query heads, against copies of them.

    A good answer: errors near 0, and "direct" faster than "copied".
    """
    if not setting.on_gpu:
        return {"skipped": "varlen_attn runs on CUDA only"}
    lengths = np.random.default_rng(0).lognormal(np.log(250), 0.8, 32).clip(4, 1024).astype(int)
    packed = PackedSequences.from_lengths(np.sort(lengths), setting.device)
    query, key, value = (
        x.detach()[0].transpose(0, 1).contiguous().requires_grad_()
        for x in _attention_inputs(list(packed.lengths), 8, 128, setting.device)
    )
    bounds = (packed.cu_seqlens, packed.cu_seqlens, packed.max_length, packed.max_length)
    causal: dict[str, Any] = {"window_size": (-1, 0)}
    grouped: dict[str, Any] = {"enable_gqa": True} if takes_grouped_heads(varlen_attn) else {}

    def direct() -> Any:
        return varlen_attn(query, key, value, *bounds, **causal | grouped)

    def copied() -> Any:
        keys, values = (x.repeat_interleave(HEADS // 8, dim=1) for x in (key, value))
        return varlen_attn(query, keys, values, *bounds, **causal)

    def gradients(run: Callable[[], Any]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run().float().square().sum(), (query, key, value))

    pairs = zip(gradients(direct), gradients(copied), strict=True)
    result: dict[str, Any] = {
        "forward": relative_error(direct(), copied()),
        "gradients": [relative_error(a, b) for a, b in pairs],
    }
    flops = 4 * HEADS * 128 * sum(n * n for n in packed.lengths) / 2
    for run in (direct, copied):
        forward = setting.seconds(run)
        result[run.__name__] = {
            "forward_ms": forward * 1e3,
            "both_ms": setting.seconds(partial(gradients, run)) * 1e3,
            "forward_tflops": flops / forward / 1e12,
        }
    return result


def losses(setting: Setting) -> dict[str, Any]:
    """Time of the objective alone, and of the in-batch loss with a large gathered batch.

    A good answer: the objective takes a small share of a step, and the usual `LOGITS_AT_ONCE`,
    which is the first of those tried, is about the fastest.
    """
    shape, model = setting.shape(8)
    batch, spec = random_batch(shape, model).to(setting.device), matryoshka_spec(shape.hidden)
    whole = Objective(spec)
    vectors = torch.randn(
        EXITS,
        len(batch.texts.packed.lengths),
        shape.hidden,
        device=setting.device,
        requires_grad=True,
    )

    def objective() -> tuple[Tensor, ...]:
        return torch.autograd.grad(whole(vectors, batch).total, vectors)

    result: dict[str, Any] = {"objective_8_rows_ms": setting.seconds(objective) * 1e3}
    limits, kind = nested.LOGITS_AT_ONCE, setting.device.type
    usual = limits[kind]
    try:
        for limit in (usual, usual // 8, usual * 4):
            limits[kind] = limit
            rows, passages = (16, 64) if setting.small else (512, 4096)
            key = f"in_batch_{rows}x{passages}_limit_2^{limit.bit_length() - 1}"
            result[key] = _in_batch(setting, rows, passages, shape.hidden)
    finally:
        limits[kind] = usual
    return result


def _in_batch(setting: Setting, rows: int, passages: int, hidden: int) -> dict[str, float]:
    """Time and memory of the in-batch loss of some rows against all passages, at all exits."""
    device, spec = setting.device, matryoshka_spec(hidden)
    query, passage = (
        torch.randn(EXITS, count, hidden, device=device, requires_grad=True)
        for count in (rows, passages)
    )
    target, weights = torch.arange(rows, device=device), torch.full((rows,), 1 / rows).to(device)

    def loss() -> tuple[Tensor, ...]:
        value = nested.in_batch_loss(query, passage, target, None, weights, spec).total
        return torch.autograd.grad(value, (query, passage))

    free_memory(device)
    return {"ms": setting.seconds(loss, 3, 1) * 1e3, "GiB": setting.peak_gib()}
