"""The fast and the naive training step on the same batch, with the same weights."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from ml_embed.distributed.engine import AccelerateEngine, Engine
from ml_embed.kernels.attention import choose_kernel
from ml_embed.losses.nested import MatryoshkaSpec
from ml_embed.losses.objective import Objective
from ml_embed.model import (
    MatryoshkaEncoder,
    default_dims,
    default_exits,
    dim_weights,
    factorize_table,
)
from ml_embed.training.gradcache import forward_backward
from ml_embed.training.optimizer import ADAM_BETAS, ADAM_EPSILON

TEMPERATURE = 0.05
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 1e-2, 1.0
Gradients = tuple[float, dict[str, Tensor]]
"""A loss, and the gradient of each parameter by its name."""


@dataclass(frozen=True)
class TrainingShape:
    """Sizes of a batch and of a model; the defaults are those of the CPU benchmark."""

    batch_size: int = 8
    negatives: int = 7
    max_length: int = 256
    rank: int = 128
    layers: int = 8
    hidden: int = 256


@dataclass
class Contender:
    """One version of the training step, with its model and its batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    forward_backward: Callable[[], Tensor]
    """adds the gradients of the batch and returns the loss"""

    def step(self) -> float:
        """One whole training step; returns the loss."""
        self.optimizer.zero_grad()
        loss = self.forward_backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        return loss.item()

    def gradients(self) -> Gradients:
        """The loss and the gradients of the batch at the present weights."""
        self.optimizer.zero_grad()
        loss = self.forward_backward().item()
        named = self.model.named_parameters()
        return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}


def open_sample(tokenized: Path, cache: Path) -> TokenizedDataset:
    """The retrieval dataset of a sample."""
    return open_store(tokenized, cache, progress=False).datasets["udhr_retrieval"]


def pick_batch(
    dataset: TokenizedDataset, shape: TrainingShape, eos_id: int, seed: int = 0
) -> ContrastiveBatch:
    """A batch of `shape.batch_size` random rows, with negatives drawn as in training."""
    plan = DatasetPlan(
        dataset.name, "retrieval", shape.negatives, dataset.num_rows, 0, dataset.num_rows
    )
    rows = np.random.default_rng(seed).permutation(dataset.num_rows)[: shape.batch_size]
    return BatchBuilder(seed, shape.max_length, eos_id, True, 0, 1).build(
        dataset, plan, rows, epoch=0
    )


def as_lists(batch: ContrastiveBatch) -> NaiveBatch:
    """The same batch as the naive step takes it; a text that occurs twice stands there twice."""
    texts = [ids.tolist() for ids in batch.texts.input_ids.split(batch.texts.packed.lengths)]
    return NaiveBatch(
        queries=[texts[i] for i in batch.query.tolist()],
        passages=[texts[i] for i in batch.passage.tolist()],
        negatives=[[texts[i] for i in own] for own in batch.negatives.tolist()],
        documents=batch.passage_documents.tolist(),
        negative_documents=batch.negative_documents.tolist(),
    )


def matryoshka_spec(hidden: int) -> MatryoshkaSpec:
    """All default vector lengths of a hidden size."""
    dims = default_dims(hidden)
    return MatryoshkaSpec(dims, dim_weights(dims), TEMPERATURE)


def accumulate_gradients(
    engine: Engine,
    batch: ContrastiveBatch,
    objective: Objective,
    max_tokens: int = 0,
    rank: int | None = None,
) -> Tensor:
    """Add the gradients of this project's objective on a batch; returns the loss.

    Args:
        engine: holds the model.
        batch: on the model's device.
        objective: the loss.
        max_tokens: tokens of a GradCache chunk; 0 = the whole batch at once.
        rank: of the token factors; None is all.
    """
    loss = partial(objective, batch=batch)
    return forward_backward(engine, batch.texts, rank, loss, max_tokens).total


def fast_contender(
    batch: ContrastiveBatch,
    shape: TrainingShape,
    accelerator: Accelerator,
    model_shape: Mapping[str, int],
    max_tokens: int = 0,
    compiled: bool = False,
    others: Sequence[ContrastiveBatch] = (),
) -> Contender:
    """This project's step.

    Args:
        batch: what it trains on first.
        shape: sizes of the model.
        accelerator: device and precision.
        model_shape: more sizes, as `make_backbone` takes them.
        max_tokens: tokens of a GradCache chunk; 0 = the whole batch at once.
        compiled: with `compile_layers`.
        others: batches that it takes turns with.
    """
    device = accelerator.device
    backbone = make_backbone(
        None, num_hidden_layers=shape.layers, hidden_size=shape.hidden, **model_shape
    )
    factors = factorize_table(backbone.embed_tokens.weight.detach(), shape.rank)
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    kernel = choose_kernel("auto", device, dtype, backbone.config.head_dim)
    encoder = MatryoshkaEncoder(
        backbone, default_exits(shape.layers), factors, kernel=kernel, compile_layers=compiled
    )
    optimizer = torch.optim.AdamW(encoder.parameters(), **_adam(), fused=True)
    engine = AccelerateEngine(accelerator, encoder, optimizer)
    turns = itertools.cycle([each.to(device) for each in (batch, *others)])
    objective = Objective(matryoshka_spec(shape.hidden))

    def run() -> Tensor:
        return accumulate_gradients(engine, next(turns), objective, max_tokens).detach()

    engine.model.train()
    return Contender(engine.model, engine.optimizer, run)


def naive_contender(
    batch: ContrastiveBatch,
    shape: TrainingShape,
    accelerator: Accelerator,
    model_shape: Mapping[str, int],
    others: Sequence[ContrastiveBatch] = (),
) -> Contender:
    """The naive step, with the same weights; `plain_names` maps the fast one's names to its own."""
    backbone = make_backbone(
        None, num_hidden_layers=shape.layers, hidden_size=shape.hidden, **model_shape
    )
    factors = factorize_table(backbone.embed_tokens.weight.detach(), shape.rank)
    encoder = NaiveEncoder(backbone, *factors, default_exits(shape.layers)).to(accelerator.device)
    optimizer = torch.optim.AdamW(encoder.parameters(), **_adam())
    turns = itertools.cycle([as_lists(each) for each in (batch, *others)])
    spec = matryoshka_spec(shape.hidden)

    def run() -> Tensor:
        with accelerator.autocast():
            loss = naive_loss(encoder, next(turns), spec)
        loss.backward()
        return loss.detach()

    encoder.train()
    return Contender(encoder, optimizer, run)


def parameters_without_table(model: nn.Module) -> int:
    """Parameters of a model except those of its token table or factors."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if "embedding" not in name and name not in ("A", "B")
    )


def plain_names(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fast version's gradients under the naive version's names."""
    return {
        name.replace("embedding.", "").replace("norms.0.", "norm."): gradient
        for name, gradient in gradients.items()
    }


def largest_difference(fast: dict[str, Tensor], naive: dict[str, Tensor]) -> float:
    """The largest difference of any gradient, as a share of that gradient's largest entry.

    Raises:
        AssertionError: the two do not have the same parameters, or a gradient is zero throughout.
    """
    renamed = plain_names(fast)
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
