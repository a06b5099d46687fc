"""Texts as token ids to pooled vectors, one packed batch after another, without gradients.

Letters: N texts, T tokens of a packed batch, E exits, H hidden size.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from ml_embed.data.packing import PackedSequences
from ml_embed.errors import UserError
from ml_embed.kernels.precision import has_bfloat16
from ml_embed.model import MatryoshkaEncoder

BATCH_TOKENS = {"cuda": 32768, "cpu": 4096}
"""Kind of device -> most tokens in a batch, where nothing else is asked for."""
SHOWN_CHARACTERS = 80  # of a text in an error


def choose_device(device: str | torch.device | None) -> torch.device:
    """`device`, or the first GPU if there is one, else the CPU.

    Under a launcher the first GPU is this process's own; ACCELERATE_USE_CPU=true means the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if device is None:
        on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
        return torch.device("cuda" if on_gpu else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(
            f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from None
    return chosen


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it, else float32."""
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def check_finite(
    vectors: np.ndarray, texts: Sequence[str], problem: str = "the model gives NaN or infinity"
) -> None:
    """Check that no vector has NaN or infinity.

    Args:
        vectors: (n, D).
        texts: n, that the vectors are of.
        problem: what to tell the user.
    Raises:
        UserError: for the first one that has, with the beginning of its text.
    """
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        text = texts[int(finite.argmin())]
        raise UserError(f"{problem} for the text {text[:SHOWN_CHARACTERS]!r}")


def longest_first(token_ids: Sequence[np.ndarray]) -> list[int]:
    """The order to encode texts in: equal lengths together, and lack of memory shows at once."""
    return sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))


@torch.inference_mode()
def pooled_vectors(
    encoder: MatryoshkaEncoder,
    token_ids: Sequence[np.ndarray],
    batch_tokens: int | None = None,
    rank: int | None = None,
    batch_texts: int | None = None,
) -> Iterator[Tensor]:
    """Vectors of consecutive texts at all exits, one packed batch after another, not normalised.

    Args:
        encoder: on the device to compute on.
        token_ids: N arrays of ids, best sorted by `longest_first`.
        batch_tokens: most tokens in a batch, save for a single longer text; None is the device's
            default.
        rank: leading components of the token factors to use; None or 0 is all.
        batch_texts: most texts in a batch; None is as many as `batch_tokens` allows.
    Yields:
        (E, n, H) float32 on the encoder's device, for the next n texts.
    """
    device = next(encoder.parameters()).device
    limit = batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    most = batch_texts or len(token_ids)
    start = 0
    while start < len(token_ids):
        end, total = start + 1, len(token_ids[start])
        last = min(len(token_ids), start + most)
        while end < last and total + len(token_ids[end]) <= limit:
            total += len(token_ids[end])
            end += 1
        batch = token_ids[start:end]
        input_ids = torch.from_numpy(np.concatenate(batch))  # (T,) int32
        if device.type == "cuda":
            # So that the copy does not wait for the batch before it.
            input_ids = input_ids.pin_memory()
        packed = PackedSequences.from_lengths([len(ids) for ids in batch], device)
        yield encoder(input_ids.to(device, non_blocking=True).long(), packed, rank or None)
        start = end
