"""The encoder and a loss of its exits, for tests of values and gradients."""

import torch

from ml_embed.data.packing import PackedSequences


def encode(encoder, sequences, rank=None):
    return encoder(
        torch.cat(sequences), PackedSequences.from_lengths([len(ids) for ids in sequences]), rank
    )


def random_loss(vectors):
    """A scalar that depends on every component in its own way."""
    generator = torch.Generator().manual_seed(2)
    return (vectors * torch.randn(vectors.shape, generator=generator)).sum()
