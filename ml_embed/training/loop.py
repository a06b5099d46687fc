"""The training loop: fetch, forward, loss, backward, clip, step, log.

Letters: E exits, N texts of a batch, H hidden size, W processes.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from ml_embed.config import TrainConfig
from ml_embed.data.batch import ContrastiveBatch, PartVectors
from ml_embed.data.loader import Loader
from ml_embed.data.schedule import draw_rank
from ml_embed.distributed import zero2
from ml_embed.distributed.collectives import all_reduce_max, all_reduce_sum
from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_folder, remove_folder
from ml_embed.files.paths import numbered_folders
from ml_embed.losses.nested import MatryoshkaSpec
from ml_embed.losses.objective import LossTerms, batch_objective
from ml_embed.model_folders.record import ModelRecord
from ml_embed.model_folders.write import save_model_folder
from ml_embed.notices import notice
from ml_embed.training import lora
from ml_embed.training.checkpoint import model_state, optimizer_state, save_state
from ml_embed.training.gradcache import encode_in_chunks, forward_backward, split_texts
from ml_embed.training.metrics_log import MetricsLog, StepValues, Window
from ml_embed.training.resolve import Resolved, learning_rate
from ml_embed.training.validation import validate

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: "try again later"


@dataclass
class Run:
    """All parts of a run, built by `ml_embed.training.setup`."""

    config: TrainConfig
    resolved: Resolved
    accelerator: Accelerator
    model: nn.Module
    """the encoder, prepared by accelerate"""
    optimizer: torch.optim.Optimizer
    teacher: nn.Module | None
    """a teacher that runs beside the student"""
    loader: Loader
    spec: MatryoshkaSpec
    tokenizer: Any
    backbone_config: Any
    record: ModelRecord
    log: MetricsLog
    window: Window
    start_step: int
    """optimizer steps already done"""
    fingerprint: dict[str, Any]
    """what a resumed run must share with this one"""

    def epoch_of(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step / self.resolved.steps_per_epoch

    def encode(self, batch: ContrastiveBatch, rank: int) -> Tensor:
        """(E, N, H) vectors of a batch's texts at a rank, without gradients; 0 is a whole token
        table."""
        budget = self.config.max_tokens_per_forward
        return encode_in_chunks(self.model, self.accelerator, batch.texts, rank or None, budget)

    def objective_of(self, batch: ContrastiveBatch) -> Callable[[Tensor], LossTerms]:
        """The loss terms of a batch as a function of its texts' vectors."""
        config = self.config
        teacher = batch.teacher if self.teacher is None else self._taught(batch)

        def objective(vectors: Tensor) -> LossTerms:
            distillation = (teacher, config.kd_loss, config.kd_weight)
            return batch_objective(
                vectors, batch, self.spec, *distillation, config.false_negative_margin
            )

        return objective

    @torch.no_grad()
    def _taught(self, batch: ContrastiveBatch) -> PartVectors:
        """The live teacher's vectors of a batch."""
        assert self.teacher is not None
        teacher = self.teacher
        pieces = split_texts(batch.texts, self.config.max_tokens_per_forward)
        with self.accelerator.autocast():
            vectors = torch.cat(
                [teacher(piece.input_ids, piece.packed).float() for piece in pieces], dim=1
            )
        return PartVectors.of_texts(vectors, batch)


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag that is looked at between steps."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        def request(number: int, frame: FrameType | None) -> None:
            self.requested = True

        previous = {
            number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def train(run: Run) -> int:
    """Train from `run.start_step` to the end, with logs, validation and checkpoints on the way.

    Returns:
        0, or PREEMPTED_EXIT_CODE if a signal ended it early; everything needed to continue is saved
        then.
    Raises:
        UserError: the loss is not finite, or the disk is full.
    """
    config, resolved = run.config, run.resolved
    last = resolved.total_steps
    run.model.train()
    steps = range(run.start_step, last)
    bar = tqdm(
        total=last,
        initial=run.start_step,
        desc="training",
        disable=not run.accelerator.is_main_process,
    )
    with (
        StopRequest().listening() as stop,
        bar,
        contextlib.closing(run.loader.training_batches(steps)) as batches,
    ):
        counted = time.perf_counter()
        for done, batch in enumerate(batches, start=run.start_step + 1):
            lr = learning_rate(done, config, last)
            values = training_step(run, batch, done, lr, stop.requested)
            now = time.perf_counter()
            run.window.add(batch.dataset, batch.task, values, now - counted)
            counted = now
            bar.update()
            if done % config.log_interval == 0 or done == last:
                optional = {
                    "distilled": run.teacher is not None or run.loader.teacher_vectors is not None,
                    "margin_used": config.false_negative_margin is not None,
                }
                line = run.log.train(done, run.epoch_of(done), lr, run.window, **optional)
                run.window = Window()
                bar.set_postfix(
                    loss=f"{line['loss']:.3f}",
                    lr=f"{lr:.1e}",
                    tok_s=f"{line['tokens_per_second']:,.0f}",
                )
            if _is_due(done, config.validation_steps) or done == last:
                validate_and_log(run, done)
                counted = time.perf_counter()  # that was not training
            epoch_ends = done % resolved.steps_per_epoch == 0
            if (
                _is_due(done, config.checkpointing_steps)
                or epoch_ends
                or done == last
                or values.stop_requested
            ):
                save_checkpoint(run, done, epoch_ends)
            if values.stop_requested and done < last:
                notice(f"stopped by a signal after step {done}; continue with --resume auto")
                return PREEMPTED_EXIT_CODE
    return 0


def training_step(
    run: Run, batch: ContrastiveBatch, step: int, lr: float, stop_requested: bool
) -> StepValues:
    """One optimizer step; `step` counts from 1.

    Raises:
        UserError: loss or gradient is not finite on some process; on all of them alike, before the
            weights move.
    """
    config, resolved = run.config, run.resolved
    batch = batch.to(run.accelerator.device)
    rank = draw_rank(resolved.ranks, config.seed, step) if config.use_mel else None
    run.optimizer.zero_grad()
    terms = forward_backward(
        run.model,
        run.accelerator,
        batch.texts,
        rank,
        run.objective_of(batch),
        config.max_tokens_per_forward,
    )
    grad_norm = gradient_norm(run, config.max_grad_norm)
    # One small sum over processes and one wait for the device in each step: so that every process
    # sees the same numbers, and all stop together, before the update, when one is not finite or one
    # was told to stop.
    values = _sum_over_processes(terms, batch, grad_norm, stop_requested, run.accelerator)
    if not values.finite:
        raise UserError(_not_finite_message(run, values, step, batch.dataset))
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    # DeepSpeed's engine clips, moves the weights and drops the gradients
    (run.model if zero2.is_engine(run.model) else run.optimizer).step()
    return values


def gradient_norm(run: Run, max_norm: float) -> Tensor:
    """The total norm before clipping, scalar; gradients are scaled down to `max_norm` if that is
    not 0.

    DeepSpeed scales them in its step, by the same factor.
    """
    if zero2.is_engine(run.model):
        return zero2.gradient_norm(run.model)
    norm = run.accelerator.clip_grad_norm_(run.model.parameters(), max_norm or float("inf"))
    return (
        norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    )  # sharded gradients have a sharded norm


def _sum_over_processes(
    terms: LossTerms,
    batch: ContrastiveBatch,
    grad_norm: Tensor,
    stop_requested: bool,
    accelerator: Accelerator,
) -> StepValues:
    losses = (
        torch.stack([terms.total, terms.hard, terms.in_batch, terms.distillation]).detach().double()
    )
    losses = (
        losses / accelerator.num_processes
    )  # shares average to the global value, see ContrastiveBatch
    masked = torch.stack([terms.left_out.by_document, terms.left_out.by_margin]).double()
    counts = losses.new_tensor([batch.num_tokens, batch.num_encoded_tokens, stop_requested])
    total, hard, in_batch, distillation, *summed = all_reduce_sum(
        torch.cat([losses, counts, masked])
    ).tolist()
    tokens, encoded, stop, by_document, by_margin = map(int, summed)
    norm = float(grad_norm)
    return StepValues(
        total, hard, in_batch, distillation, tokens, encoded, by_document, by_margin, norm, stop > 0
    )


def _not_finite_message(run: Run, values: StepValues, step: int, dataset: str) -> str:
    return (
        f"step {step}, dataset {dataset!r}: the loss is {values.total} and the gradient norm "
        f"{values.grad_norm}; "
        f"stopped before the update, and {_last_good(run)}. Lower learning_rate, or look at the "
        f"data of {dataset!r}"
    )


def _last_good(run: Run) -> str:
    states = numbered_folders(run.config.run_dir / "resume")
    return (
        f"the last good checkpoint is {states[-1][1]}" if states else "there is no checkpoint yet"
    )


def validate_and_log(run: Run, step: int) -> None:
    """Validation, if any rows are held out; the model is back in training mode afterwards.

    Raises:
        UserError: a loss is not finite.
    """
    run.model.eval()
    values = validate(run.encode, run.loader, run.spec, run.resolved, run.accelerator.device)
    run.model.train()
    if not all(map(math.isfinite, values.values())):  # alike on all processes
        raise UserError(
            f"validation after step {step}: a loss is not finite; {_last_good(run)}. Lower "
            "learning_rate"
        )
    if values:
        run.log.valid(step, run.epoch_of(step), values)


def save_checkpoint(run: Run, step: int, epoch_ends: bool) -> None:
    """Write the model folder and the resume state of a step. A collective; the first process
    writes.

    Raises:
        UserError: the disk is full; on all processes alike.
    """
    state, moments = model_state(run.model), optimizer_state(run.model, run.optimizer)
    failure: Exception | None = None
    if run.accelerator.is_main_process:
        try:
            _write_checkpoint(run, step, epoch_ends, state, moments)
        except Exception as error:  # held back until the other processes know
            failure = error
    if all_reduce_max(int(failure is not None), run.accelerator.device):
        raise failure or UserError("the first process could not write its checkpoint")


def _write_checkpoint(run: Run, step: int, epoch_ends: bool, state: dict, moments: dict) -> None:
    run_dir = run.config.run_dir
    epoch = step // run.resolved.steps_per_epoch
    weights = lora.merged(state, lora.scale(run.config)) if run.config.lora_r else state
    # Model folders first: a state is only resumed from when all that should stand before it does.
    for name in [f"step_{step}", *([f"epoch_{epoch}"] if epoch_ends else [])]:
        with atomic_folder(run_dir / name) as folder:
            save_model_folder(folder, weights, run.backbone_config, run.tokenizer, run.record)
    progress = {
        "window": run.window.to_json(),
        "metrics_bytes": run.log.force_to_disk(),
        "fingerprint": run.fingerprint,
        "processes": run.accelerator.num_processes,
    }
    save_state(run_dir / "resume", state, moments, progress, step)
    if run.config.save_total_limit is not None:
        # Folders of later steps, from before the run went back to an earlier state, do not push
        # this one out.
        done = [path for number, path in numbered_folders(run_dir) if number <= step]
        for old in done[: -run.config.save_total_limit]:
            remove_folder(old)


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
