"""Causal attention over packed sequences, registered with transformers under one name.

A batch is one row of T real tokens; sequence i owns tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1.
There is no padding and no mask: of all layers' operations only attention needs to know where
sequences end. It runs here, or in `bucketed_attention` for training on CPUs.

Letters: T tokens, N sequences, A query heads, G key/value heads, D head size.
"""

import importlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ml_embed.data.packing import PackedSequences
from ml_embed.errors import UserError
from ml_embed.kernels.bucketed_attention import LONGEST, bucketed_attention
from ml_embed.kernels.precision import in_full_precision_on_cpu

if TYPE_CHECKING:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

ATTENTION_NAME = "ml_embed_packed"
Kernel = Literal["varlen", "flash", "sdpa"]
HALF_DTYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
"""of the variable-length kernels; their head sizes are multiples of 8"""
OLDEST_CAPABILITY = (8, 0)
"""of a GPU that these kernels run on: Ampere"""


@cache
def takes_grouped_heads(attend: Callable[..., Any]) -> bool:
    """Whether a `varlen_attn` takes fewer key/value heads than query heads: torch 2.12's does."""
    return "enable_gqa" in inspect.signature(attend).parameters


def available_kernels(
    device: torch.device, dtype: torch.dtype, head_size: int | None = None
) -> tuple[Kernel, ...]:
    """Kernels that can run on `device` in `dtype`, best first. "sdpa" always can.

    `head_size` is D; None where it is not known yet.
    """
    if device.type != "cuda" or dtype not in HALF_DTYPES:
        return ("sdpa",)
    fits = head_size is None or (head_size % 8 == 0 and head_size <= LARGEST_HEAD)
    if not fits or torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return ("sdpa",)
    flash: tuple[Kernel, ...] = ("flash",) if flash_attn_imports() else ()
    return ("varlen", *flash, "sdpa")


@cache
def flash_attn_imports() -> bool:
    """Whether flash-attn is there and was built for this torch."""
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError):  # one built for another torch lacks symbols
        return False
    return True


def choose_kernel(
    requested: str, device: torch.device, dtype: torch.dtype, head_size: int | None = None
) -> Kernel:
    """The kernel for the config's `attention` key: "auto" is the best there is.

    Args:
        requested: the key's value.
        device, dtype: of the computation.
        head_size: D; None where it is not known yet.
    Raises:
        UserError: the requested kernel cannot run on this device in this precision and head size.
    """
    kernels = available_kernels(device, dtype, head_size)
    if requested == "auto":
        return kernels[0]
    if requested not in kernels:
        heads = "" if head_size is None else f" with heads of {head_size}"
        raise UserError(
            f"attention: {requested!r} cannot run on {device.type} in {dtype}{heads} here "
            f"(possible: {', '.join(kernels)}); use 'auto'"
        )
    return requested


def _buckets_are_faster(query: Tensor) -> bool:
    """Whether `bucketed_attention` can run here and pays: only before a backward pass does it."""
    return in_full_precision_on_cpu(query) and torch.is_grad_enabled()


def _buckets_and_sdpa(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
) -> Tensor:
    """(1, A, T, D) x (1, G, T, D) -> (1, T, A, D): short ones in buckets, others by `_sdpa`."""
    parts = [
        (short, tuple(run))
        for short, run in itertools.groupby(lengths, key=lambda length: length <= LONGEST)
    ]
    sections = [sum(run) for _, run in parts]
    outputs = []
    queries, keys, values = (x.split(sections, dim=2) for x in (query, key, value))
    for (short, run), q, k, v in zip(parts, queries, keys, values, strict=True):
        attend = bucketed_attention if short else _sdpa
        outputs.append(attend(q, k, v, run, scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
) -> Tensor:
    """(1, A, T, D) x (1, G, T, D) -> (1, T, A, D): one call per run of equally long sequences.

    The batch builder sorts sequences by length, so runs are long. `split` and not slices: the
    gradient of a split is one concatenation, that of a slice is a zero-filled tensor of T tokens
    for every sequence. Measured on 2 CPU cores (72 sequences of 20 to 200 tokens, 16 heads of 128,
    forward and backward): 0.58 s this way, 0.77 s with the key/value heads repeated, 1.2 s in
    padded buckets of 8 or 16.
    """
    runs = _runs(lengths)
    sections = [length * count for length, count in runs]
    # squeeze and not [0], for the same reason
    queries, keys, values = (x.squeeze(0).split(sections, dim=1) for x in (query, key, value))
    outputs = []
    for (length, count), *qkv in zip(runs, queries, keys, values, strict=True):
        # (count, heads, length, D)
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)
        # In float32 on CUDA, grouped heads fall back to torch's slow math path: still exact.
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (count * length, A, D)
    return torch.cat(outputs).unsqueeze(0)


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Length and count of each run of equal lengths."""
    return [(length, len(list(group))) for length, group in itertools.groupby(lengths)]


def _sdpa_of_last_queries(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float
) -> Tensor:
    """`_sdpa` for the query of each sequence's last token alone; 0 for all other tokens.

    The last token sees its whole sequence, so no causal mask is needed.
    """
    runs = _runs(packed.lengths)
    last_tokens = packed.last_tokens
    queries = (
        query.squeeze(0).index_select(1, last_tokens).split([count for _, count in runs], dim=1)
    )
    keys, values = (
        x.squeeze(0).split([length * count for length, count in runs], dim=1) for x in (key, value)
    )
    outputs = []
    for (length, count), q, k, v in zip(runs, queries, keys, values, strict=True):
        q = q.transpose(0, 1).unsqueeze(2)  # (count, A, 1, D)
        # (count, G, length, D)
        k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in (k, v))
        out = scaled_dot_product_attention(
            q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.squeeze(2))  # (count, A, D)
    rows = torch.cat(outputs)  # (N, A, D)
    whole = rows.new_zeros((query.shape[2], *rows.shape[1:]))
    return whole.index_copy_(0, last_tokens, rows).unsqueeze(0)


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float, kernel: Kernel
) -> Tensor:
    """(1, A, T, D) x (1, G, T, D) -> (1, T, A, D) by a fused kernel, in half precision."""
    dtype = value.dtype if value.dtype in HALF_DTYPES else torch.get_autocast_dtype("cuda")
    # squeeze and not [0], whose gradient is zero-filled first
    q, k, v = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))  # (T, heads, D)
    lengths = (packed.cu_seqlens, packed.cu_seqlens, packed.max_length, packed.max_length)
    if kernel == "flash":
        from flash_attn import flash_attn_varlen_func

        fixed_order = torch.are_deterministic_algorithms_enabled()  # torch's kernel looks itself
        out = flash_attn_varlen_func(
            q, k, v, *lengths, softmax_scale=scale, causal=True, deterministic=fixed_order
        )
    else:
        options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}  # causal
        if q.shape[1] != k.shape[1]:
            if takes_grouped_heads(varlen_attn):
                options["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out = varlen_attn(q, k, v, *lengths, **options)
    return out.unsqueeze(0)


# Not compiled: lengths differ in every batch, and each would need a compilation of its own.
@torch.compiler.disable
def packed_attention(
    module: "Qwen3Attention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    packed: PackedSequences,
    kernel: Kernel,
    last_queries_only: bool = False,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention with the signature that transformers calls.

    Args:
        module: the attention layer, for its head size.
        query: (1, A, T, D).
        key, value: (1, G, T, D).
        attention_mask: None; `packed` takes its place.
        scaling: factor of the scores; None is 1 / sqrt(D).
        dropout: 0.
        packed: where sequences end; like the next two, passed down by Qwen3's forward.
        kernel: what computes it.
        last_queries_only: with "sdpa", leave 0 for all but each sequence's last token.
    Returns:
        (1, T, A, D), and None for the attention weights, which no kernel returns.
    """
    assert attention_mask is None
    assert dropout == 0.0, "attention dropout is refused when the model is built"
    scale = module.head_dim**-0.5 if scaling is None else scaling
    if kernel == "sdpa":
        if last_queries_only:
            return _sdpa_of_last_queries(query, key, value, packed, scale), None
        attend = _buckets_and_sdpa if _buckets_are_faster(query) else _sdpa
        return attend(query, key, value, packed.lengths, scale), None
    return _variable_length(query, key, value, packed, scale, kernel), None


def register_packed_attention() -> None:
    """Make `packed_attention` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
