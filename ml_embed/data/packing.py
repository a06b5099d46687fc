"""Texts of different lengths as one row of real tokens, without padding.

Letters: N texts, T tokens of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` that is not waited for: to a GPU it goes through pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # torch keeps it until the copy is done
    return tensor.to(device, non_blocking=True)


@dataclass(eq=False)
class PackedSequences:
    """Where the sequences of one packed row lie; not to be changed.

    Neither frozen nor compared: either makes torch.compile look into it, and compile the layers
    again for every number of texts.
    """

    lengths: tuple[int, ...]
    """tokens of each of the N sequences, in host memory: reading them never waits for a device"""
    cu_seqlens: Tensor
    """(N + 1,) int32, running sums of the lengths from 0, on the compute device"""

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int] | np.ndarray, device: torch.device | str | None = None
    ) -> "PackedSequences":
        """From the N lengths; `device` None is the CPU. A copy to a device is not waited for."""
        lengths = np.asarray(lengths, np.int64)
        cumulative = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=cumulative[1:])
        cu_seqlens = torch.from_numpy(cumulative)
        if device is not None:
            cu_seqlens = moved(cu_seqlens, torch.device(device))
        return cls(tuple(lengths.tolist()), cu_seqlens)

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @property
    def position_ids(self) -> Tensor:
        """(T,) int64, each token's position in its sequence, from 0."""
        starts = self.cu_seqlens[:-1].long()
        lengths = self.cu_seqlens.diff().long()
        total = sum(self.lengths)
        offsets = torch.repeat_interleave(starts, lengths, output_size=total)
        return torch.arange(total, device=self.cu_seqlens.device) - offsets

    @property
    def last_tokens(self) -> Tensor:
        """(N,) int64, index of each sequence's last token among the T."""
        return self.cu_seqlens[1:].long() - 1


@dataclass(frozen=True)
class PackedBatch:
    """N texts as one row of T real tokens."""

    input_ids: Tensor
    """(T,) int64"""
    packed: PackedSequences
    """where each text begins and ends"""

    def to(self, device: torch.device) -> "PackedBatch":
        """A copy on `device` that is not waited for."""
        packed = PackedSequences(self.packed.lengths, moved(self.packed.cu_seqlens, device))
        return PackedBatch(moved(self.input_ids, device), packed)
