"""Both versions of the training step on one batch of real text: same weights, same rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ml_embed.benchmarks.naive_training import NaiveBatch, NaiveEncoder, naive_loss
from ml_embed.benchmarks.samples import make_backbone
from ml_embed.data.batch import ContrastiveBatch
from ml_embed.data.batch_builder import BatchBuilder
from ml_embed.data.schedule import DatasetPlan
from ml_embed.data.store import TokenizedDataset, open_store
from ml_embed.kernels.attention import choose_kernel
from ml_embed.losses.nested import MatryoshkaSpec
from ml_embed.losses.objective import batch_objective
from ml_embed.model import (
    MatryoshkaEncoder,
    default_dims,
    default_exits,
    dim_weights,
    factorize_table,
)
from ml_embed.training.build import ADAM_BETAS, ADAM_EPSILON
from ml_embed.training.gradcache import forward_backward

TEMPERATURE = 0.05
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 1e-2, 1.0
Gradients = tuple[float, dict[str, Tensor]]
"""A loss, and the gradient of every parameter by its name."""


@dataclass(frozen=True)
class TrainingShape:
    """What is trained on; the defaults are the usual CPU set-up."""

    batch_size: int = 8
    negatives: int = 7
    max_length: int = 256
    rank: int = 128
    layers: int = 8
    hidden: int = 256


@dataclass
class Contender:
    """One version: its model, and a function that adds the gradients of the batch and returns the
    loss."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    forward_backward: Callable[[], Tensor]

    def step(self) -> float:
        """A whole training step."""
        self.optimizer.zero_grad()
        loss = self.forward_backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        return loss.item()

    def gradients(self) -> Gradients:
        """Of the batch, at the present weights."""
        self.optimizer.zero_grad()
        loss = self.forward_backward().item()
        return loss, {
            name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None
        }


def open_sample(tokenized: Path, cache: Path) -> TokenizedDataset:
    """The retrieval dataset of a sample."""
    return open_store(tokenized, cache, progress=False).datasets["udhr_retrieval"]


def pick_batch(
    dataset: TokenizedDataset, shape: TrainingShape, eos_id: int, seed: int = 0
) -> ContrastiveBatch:
    """A batch of random rows that have all their negatives."""
    plan = DatasetPlan(
        dataset.name, "retrieval", shape.negatives, dataset.num_rows, 0, dataset.num_rows
    )
    rows = np.random.default_rng(seed).permutation(dataset.num_rows)[: shape.batch_size]
    return BatchBuilder(seed, shape.max_length, eos_id, True, 0, 1).build(
        dataset, plan, rows, epoch=0
    )


def as_lists(batch: ContrastiveBatch) -> NaiveBatch:
    """The same batch as the naive version takes it, repeated texts repeated."""
    texts = [ids.tolist() for ids in batch.texts.input_ids.split(batch.texts.packed.lengths)]
    return NaiveBatch(
        queries=[texts[i] for i in batch.query.tolist()],
        passages=[texts[i] for i in batch.passage.tolist()],
        negatives=[[texts[i] for i in own] for own in batch.negatives.tolist()],
        documents=batch.passage_documents.tolist(),
        negative_documents=batch.negative_documents.tolist(),
    )


def matryoshka_spec(hidden: int) -> MatryoshkaSpec:
    dims = default_dims(hidden)
    return MatryoshkaSpec(dims, dim_weights(dims), TEMPERATURE)


def fast_contender(
    batch: ContrastiveBatch,
    shape: TrainingShape,
    accelerator: Accelerator,
    model_shape: Mapping[str, int],
    max_tokens: int = 0,
    compiled: bool = False,
) -> Contender:
    """This project's step; `model_shape` is what `make_backbone` takes."""
    device = accelerator.device
    backbone = make_backbone(
        None, num_hidden_layers=shape.layers, hidden_size=shape.hidden, **model_shape
    )
    factors = factorize_table(backbone.embed_tokens.weight.detach(), shape.rank)
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    kernel = choose_kernel("auto", device, dtype)
    encoder = MatryoshkaEncoder(
        backbone, default_exits(shape.layers), factors, kernel=kernel, compile_layers=compiled
    )
    optimizer = torch.optim.AdamW(encoder.parameters(), **_adam(), fused=True)
    model, optimizer = accelerator.prepare(encoder, optimizer)
    batch, spec = batch.to(device), matryoshka_spec(shape.hidden)

    def run() -> Tensor:
        return forward_backward(
            model,
            accelerator,
            batch.texts,
            None,
            lambda vectors: batch_objective(vectors, batch, spec),
            max_tokens,
        ).total.detach()

    model.train()
    return Contender(model, optimizer, run)


def naive_contender(
    batch: ContrastiveBatch,
    shape: TrainingShape,
    accelerator: Accelerator,
    model_shape: Mapping[str, int],
) -> Contender:
    """The straightforward step; parameters have the names of the fast one's."""
    backbone = make_backbone(
        None, num_hidden_layers=shape.layers, hidden_size=shape.hidden, **model_shape
    )
    factors = factorize_table(backbone.embed_tokens.weight.detach(), shape.rank)
    encoder = NaiveEncoder(backbone, *factors, default_exits(shape.layers)).to(accelerator.device)
    optimizer = torch.optim.AdamW(encoder.parameters(), **_adam())
    lists, spec = as_lists(batch), matryoshka_spec(shape.hidden)

    def run() -> Tensor:
        with accelerator.autocast():
            loss = naive_loss(encoder, lists, spec)
        loss.backward()
        return loss.detach()

    encoder.train()
    return Contender(encoder, optimizer, run)


def layer_parameters(model: nn.Module) -> int:
    """Parameters but the token table's."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if "embedding" not in name and name not in ("A", "B")
    )


def largest_difference(fast: dict[str, Tensor], naive: dict[str, Tensor]) -> float:
    """Over all parameters, the largest difference of gradients in units of the largest entry of
    that gradient.

    Raises:
        AssertionError: the two do not have the same parameters, or a gradient is zero throughout.
    """
    renamed = {
        name.replace("embedding.", "").replace("norms.0.", "norm."): grad
        for name, grad in fast.items()
    }
    assert renamed.keys() == naive.keys(), renamed.keys() ^ naive.keys()
    worst = 0.0
    for name, grad in naive.items():
        scale = grad.abs().max().item()
        assert scale > 0, name
        worst = max(worst, (grad - renamed[name]).abs().max().item() / scale)
    return worst


def _adam() -> dict:
    return {
        "lr": LEARNING_RATE,
        "betas": ADAM_BETAS,
        "eps": ADAM_EPSILON,
        "weight_decay": WEIGHT_DECAY,
    }
