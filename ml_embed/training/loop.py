"""The training loop: step, log, validate, save."""

import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

from torch import Tensor
from tqdm import tqdm

from ml_embed.data.batch import ContrastiveBatch
from ml_embed.distributed.collectives import all_reduce_max
from ml_embed.distributed.engine import AVERAGE, Moments
from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_folder
from ml_embed.model_folders.write import NotFiniteError, save_model_folder
from ml_embed.notices import notice
from ml_embed.training import lora
from ml_embed.training.checkpoint import keep_newest, save_state
from ml_embed.training.gradcache import encode_in_chunks
from ml_embed.training.metrics_log import Window
from ml_embed.training.run import Run
from ml_embed.training.step import training_step
from ml_embed.training.turning import smaller_ranks_as_saved, turn_trained, turned
from ml_embed.training.validation import validate

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: "try again later"


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


def train(run: Run, progress: bool = False) -> int:
    """Train from `run.start_step` to the end, with logs, validation and checkpoints on the way.

    Args:
        progress: show a bar.
    Returns:
        0, or PREEMPTED_EXIT_CODE if a signal ended it early; everything needed to continue is saved
        then.
    Raises:
        UserError: the loss is not finite, or the disk is full.
    """
    config, last = run.config, run.resolved.total_steps
    if run.best.is_over(config.patience):  # a run that had ended is continued
        notice(run.best.reason_to_end(run.start_step))
        return 0
    steps = range(run.start_step, last)
    bar = tqdm(total=last, initial=run.start_step, desc="training", disable=not progress)
    run.engine.model.train()
    with (
        StopRequest().listening() as stop,
        bar,
        contextlib.closing(run.loader.training_batches(steps)) as batches,
    ):
        counted = time.perf_counter()
        for done, batch in enumerate(batches, start=run.start_step + 1):
            values = training_step(run, batch, done, stop.requested)
            turn_trained(run, done)
            now = time.perf_counter()
            run.window.add(batch.dataset, batch.task, values, now - counted)
            counted = now
            bar.update()
            if _is_due(done, config.log_interval, last):
                log_window(run, done, bar)
            if _is_due(done, config.validation_steps, last):
                validate_and_log(run, done)
                counted = time.perf_counter()  # that was not training
            epoch_ends = done % run.resolved.steps_per_epoch == 0
            due = _is_due(done, config.checkpointing_steps, last)
            ends_early = run.best.is_over(config.patience) and done < last
            if due or epoch_ends or values.stop_requested or ends_early:
                save_checkpoint(run, done, epoch_ends)
            if ends_early:
                notice(run.best.reason_to_end(done))
                return 0
            if values.stop_requested and done < last:
                notice(f"stopped by a signal after step {done}; continue with --resume auto")
                return PREEMPTED_EXIT_CODE
    return 0


def _is_due(step: int, interval: int, last: int) -> bool:
    """At each multiple of the interval (0 = none) and at the last step."""
    return step == last or (interval > 0 and step % interval == 0)


def log_window(run: Run, step: int, bar: tqdm) -> None:
    """Write the line of the open window, show it beside the bar, and open the next window."""
    line = run.log.train(step, run.epoch_of(step), run.learning_rate(step), run.window)
    run.window = Window()
    bar.set_postfix(
        loss=f"{line['loss']:.3f}",
        lr=f"{line['learning_rate']:.1e}",
        tok_s=f"{line['tokens_per_second']:,.0f}",
    )


def validate_and_log(run: Run, step: int) -> None:
    """Validation, if any rows are held out; the model is back in training mode afterwards.

    With keep_best, a better model than before is written to best/. A collective.

    Raises:
        UserError: a loss is not finite, or the disk is full.
    """
    run.engine.model.eval()
    encode = functools.partial(_encode, run)
    spec = run.objective.spec
    with run.weights_to_save(), smaller_ranks_as_saved(run):
        values = validate(encode, run.loader, spec, run.resolved, run.accelerator.device)
    run.engine.model.train()
    if not all(map(math.isfinite, values.values())):  # alike on all processes
        raise UserError(
            f"validation after step {step}: a loss is not finite; {run.last_good_checkpoint()}. "
            "Lower learning_rate"
        )
    if values:
        run.log.valid(step, run.epoch_of(step), values)
        if run.best.add(values, step):
            save_best(run, step)


def _encode(run: Run, batch: ContrastiveBatch, rank: int) -> Tensor:
    """Validation's way to vectors: (E, N, H), without gradients; rank 0 is a whole token table."""
    budget = run.config.max_tokens_per_forward
    return encode_in_chunks(run.engine, batch.texts, rank or None, budget)


def save_checkpoint(run: Run, step: int, epoch_ends: bool) -> None:
    """Write the model folder and the resume state of a step.

    A collective; the first process writes.

    Raises:
        UserError: a weight is not finite, or the disk is full; on all processes alike.
    """
    state, moments = run.engine.model_state(), run.engine.optimizer_state()

    def write() -> None:
        # Model folders first: a state is only resumed from when all that should stand before it
        # does.
        epoch = step // run.resolved.steps_per_epoch
        names = [f"step_{step}", *([f"epoch_{epoch}"] if epoch_ends else [])]
        _write_model_folders(run, step, names, averaged(state, moments))
        _write_resume_state(run, step, state, moments)
        keep_newest(run.config.run_dir, run.config.save_total_limit, step)

    _on_main_process(run, write)


def averaged(state: dict[str, Tensor], moments: Moments) -> dict[str, Tensor]:
    """A model's state with the averages of weights, where the optimizer keeps them."""
    averages = {name: own[AVERAGE] for name, own in moments.items() if AVERAGE in own}
    return state | averages


def save_best(run: Run, step: int) -> None:
    """Write the model folder best/, in place of a former one. A collective.

    Raises:
        UserError: a weight is not finite, or the disk is full; on all processes alike.
    """
    with run.weights_to_save():  # to its end: on a CPU a state is the weights themselves
        state = run.engine.model_state()
        _on_main_process(run, lambda: _write_model_folders(run, step, ["best"], state))


def _on_main_process(run: Run, write: Callable[[], None]) -> None:
    """Let the first process write; if it fails, all do."""
    failure: Exception | None = None
    if run.accelerator.is_main_process:
        try:
            write()
        except Exception as error:  # held back until the other processes know
            failure = error
    if all_reduce_max(int(failure is not None), run.accelerator.device):
        raise failure or UserError("the first process could not write its checkpoint")


def _write_model_folders(run: Run, step: int, names: list[str], state: dict[str, Tensor]) -> None:
    try:
        weights = turned(run, state)
        if run.config.lora_r:
            weights = lora.merged(weights, lora.scale(run.config))
        for name in names:
            with atomic_folder(run.config.run_dir / name) as folder:
                save_model_folder(folder, weights, run.backbone_config, run.tokenizer, run.record)
    except NotFiniteError as error:
        raise UserError(
            f"after step {step} {error}; nothing of it is saved, and "
            f"{run.last_good_checkpoint()}. Lower learning_rate"
        ) from None


def _write_resume_state(run: Run, step: int, state: dict[str, Tensor], moments: Moments) -> None:
    progress = {
        "window": run.window.to_json(),
        "best": run.best.to_json(),
        **run.log.force_to_disk(),
        "fingerprint": run.fingerprint,
        "processes": run.accelerator.num_processes,
    }
    save_state(run.config.run_dir / "resume", state, moments, progress, step)
