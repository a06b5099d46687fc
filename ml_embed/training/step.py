"""One training step: forward, loss, backward, clip, check, update.

Letters: E exits, N texts of a batch, H hidden size.
"""

import functools

import torch
from torch import Tensor, nn

from ml_embed.data.batch import ContrastiveBatch, PartVectors
from ml_embed.data.schedule import draw_rank
from ml_embed.distributed.collectives import all_reduce_sum
from ml_embed.errors import UserError
from ml_embed.losses.objective import LossTerms
from ml_embed.training.by_language import language_values, own_sums
from ml_embed.training.exit_statistics import exit_statistics
from ml_embed.training.gradcache import forward_backward, split_texts
from ml_embed.training.metrics_log import StepValues
from ml_embed.training.run import Run


def training_step(run: Run, batch: ContrastiveBatch, step: int, stop_requested: bool) -> StepValues:
    """One optimizer step; `step` counts from 1. A collective.

    Raises:
        UserError: loss or gradient is not finite on some process; on all of them alike, before the
            weights move.
    """
    config, engine = run.config, run.engine
    batch = batch.to(run.accelerator.device)
    draws = config.use_mel and config.mel_sampling == "proportional"
    rank = draw_rank(run.resolved.ranks, config.seed, step) if draws else None
    teacher = batch.teacher if run.teacher is None else _vectors_of(run.teacher, run, batch)
    objective = functools.partial(run.objective, batch=batch, teacher=teacher)
    engine.optimizer.zero_grad()
    every = config.log_exit_gradients
    watch = functools.partial(_watch_exits, run, batch) if every and step % every == 0 else None
    budget = config.max_tokens_per_forward
    terms = forward_backward(engine, batch.texts, rank, objective, budget, watch)
    grad_norm = engine.clip_gradients()
    # One small sum over processes and one wait for the device in each step: so that every process
    # sees the same numbers, and all stop together, before the update, when one is not finite or one
    # was told to stop.
    values = _over_all_processes(run, terms, batch, grad_norm, stop_requested)
    if not values.finite:
        raise UserError(
            f"step {step}, dataset {batch.dataset!r}: the loss is {values.total} and the gradient "
            f"norm {values.grad_norm}; stopped before the update, and "
            f"{run.last_good_checkpoint()}. Lower learning_rate, or look at the data of "
            f"{batch.dataset!r}"
        )
    engine.step(run.learning_rate(step))
    if run.average is not None:
        run.average.add(step)
    return values


def _watch_exits(run: Run, batch: ContrastiveBatch, vectors: Tensor, gradients: Tensor) -> None:
    """Keep `exit_statistics` of a step for the next log line. A collective."""
    sizes = run.resolved.exits, run.resolved.dims
    run.window.exits = exit_statistics(vectors, gradients, batch, *sizes)


@torch.no_grad()
def _vectors_of(teacher: nn.Module, run: Run, batch: ContrastiveBatch) -> PartVectors:
    """A live teacher's vectors of a batch, in chunks of the same token budget as the student's."""
    chunks = split_texts(batch.texts, run.config.max_tokens_per_forward)
    with run.accelerator.autocast():
        vectors = [teacher(chunk.input_ids, chunk.packed).float() for chunk in chunks]
    return PartVectors.of_texts(torch.cat(vectors, dim=1), batch)  # from (E, N, H)


def _over_all_processes(
    run: Run, terms: LossTerms, batch: ContrastiveBatch, grad_norm: Tensor, stop_requested: bool
) -> StepValues:
    """Means of the losses and sums of the counts, with one all-reduce."""
    names = ("total", "hard", "in_batch", "similarity", "distillation", "self_distillation")
    losses = torch.stack([getattr(terms, name) for name in names])
    losses = losses.detach().double() / run.accelerator.num_processes
    masked = torch.stack([terms.masked.by_document, terms.masked.by_margin]).double()
    counts = losses.new_tensor([batch.num_tokens, batch.num_encoded_tokens, stop_requested])
    of_languages = own_sums(terms, batch)
    own = torch.cat([losses, masked, counts, of_languages.flatten()])
    summed = all_reduce_sum(own).tolist()
    by_document, by_margin, *counted = summed[len(names) : len(names) + 5]
    tokens, encoded_tokens, stops = map(int, counted)
    return StepValues(
        **dict(zip(names, summed, strict=False)),
        tokens=tokens,
        encoded_tokens=encoded_tokens,
        masked_by_document=int(by_document),
        masked_by_margin=by_margin,
        grad_norm=float(grad_norm),
        stop_requested=stops > 0,
        languages=language_values(
            batch.languages, batch.language_samples, summed[len(names) + 5 :]
        ),
    )
