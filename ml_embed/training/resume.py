"""Which state a run continues from, whether it may, and what is no longer as it was."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ml_embed.config import TrainConfig
from ml_embed.data.schedule import SCHEDULE_VERSION
from ml_embed.errors import UserError
from ml_embed.files.digests import only_differing
from ml_embed.files.json_file import parse_json
from ml_embed.files.model_identity import model_identity
from ml_embed.files.paths import home_path
from ml_embed.training.best import Best
from ml_embed.training.checkpoint import STATE_FILE, find_state
from ml_embed.training.inputs import Inputs
from ml_embed.training.resolve import Resolved

# Keys that may differ between a run and its continuation: they decide where things are and how they
# are computed or reported, not what is computed.
_FREE_KEYS = frozenset(
    {"model_path", "experiment_id", "output_dir", "tb_dir", "cache_dir", "train_data_path"}
    | {"attention", "gradient_checkpointing", "max_tokens_per_forward", "compile_layers"}
    | {"deterministic"}
    | {
        "log_interval",
        "log_exit_gradients",
        "validation_steps",
        "checkpointing_steps",
        "save_total_limit",
        "report_to",
    }
    | {"valid_ranks", "valid_layers", "valid_dims", "valid_data_path", "keep_best", "patience"}
    | {"train_batch_size", "global_batch_size", "num_processes"}  # their product is compared
    | {"teacher_model_path", "datasets"}  # what they lead to is compared instead
)

# The fingerprint's own keys, explained to the user.
_MEANINGS = {
    "global_batch_size": "or train_batch_size times the number of processes",
    "train_data_path": "digests of its files",
    "valid_data_path": "digests of its files",
    "model_path": "digests of its files; weights only with lora_r, since states hold the others",
    "teacher_model_path": "digests of its files",
    "teacher_vectors_path": "digests of its files",
    "schedule_version": "which rows a step takes; the state is of another version of ml-embed",
    "dataset_plans": "what `datasets`, its order included, makes of each dataset",
}

# What a state means that was saved before the config had the key.
_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(TrainConfig)
    if field.name not in _FREE_KEYS and field.default is not dataclasses.MISSING
}


def run_fingerprint(config: TrainConfig, inputs: Inputs, mixed_precision: str) -> dict[str, Any]:
    """Everything that decides which weights a run ends with, as JSON.

    Each value stands under the config key that the user would change it by: the key's own value,
    or a digest of what it leads to.
    """
    resolved, vectors = inputs.resolved, inputs.teacher_vectors
    keys = dataclasses.asdict(config).items()
    kept = {key: value for key, value in keys if key not in _FREE_KEYS}
    kept["dataset_plans"] = {plan.name: vars(plan) for plan in resolved.datasets}
    memory = [Path(config.cache_dir)]
    # With LoRA the layers are frozen, and in no resume state.
    kept["model_path"] = model_identity(Path(config.model_path), memory, weights=config.lora_r > 0)
    teacher = config.teacher_model_path
    kept["teacher_model_path"] = model_identity(Path(teacher), memory) if teacher else None
    kept["train_data_path"] = inputs.store.identity
    valid = inputs.valid_store
    kept["valid_data_path"] = None if valid is None else valid.identity
    kept["global_batch_size"] = resolved.global_batch_size
    if vectors is not None:
        kept["teacher_vectors_path"] = vectors.identity(inputs.store.datasets)
    kept["mixed_precision"] = mixed_precision
    kept["schedule_version"] = SCHEDULE_VERSION
    return json.loads(json.dumps(kept))  # as it reads back from disk


def check_unchanged(before: dict, now: dict, allow_changes: bool) -> list[str]:
    """A line for each part of the fingerprint that has changed.

    Raises:
        UserError: there are such, and not `allow_changes`.
    """
    before = _DEFAULTS | before
    changes = [
        _change(key, before.get(key), now[key])
        for key in sorted(now)
        if before.get(key) != now[key]
    ]
    if changes and not allow_changes:
        raise UserError(
            "--resume: these have changed since the state was saved, so the run would not be the "
            "same:\n"
            + "\n".join(changes)
            + "\nrestore them, give --allow-changes to continue all the same, or start another run "
            "under another experiment_id"
        )
    return changes


def _change(key: str, before: Any, now: Any) -> str:
    before, now = only_differing(before, now)
    meaning = f" ({_MEANINGS[key]})" if key in _MEANINGS else ""
    return f"  - {key}: {before!r} -> {now!r}{meaning}"


def continuation_notice(
    state_path: Path, progress: dict, resolved: Resolved, changes: list[str]
) -> str:
    """What a continued run takes over, and what is no longer as it was."""
    step, before = progress["step"], progress["processes"]
    lines = [f"continuing after step {step} from {state_path}"]
    if changes:
        lines += ["with changes, from here on:", *changes]
    if progress["fingerprint"]["global_batch_size"] != resolved.global_batch_size:
        epoch = step / resolved.steps_per_epoch
        lines.append(
            f"an epoch is {resolved.steps_per_epoch} steps now, so step {step} stands at epoch "
            f"{epoch:.2f}: what is left of the epoch is another order of the data, and rows may be "
            "repeated or left out"
        )
    elif before != resolved.world_size:
        lines.append(
            f"saved by {before} processes, continued by {resolved.world_size}: the same global "
            "batches in the same order; sums are formed in another order, so the weights will "
            "agree to rounding, not to the bit"
        )
    return "\n".join(lines)


def what_is_left(config: TrainConfig) -> str | None:
    """How far a run has come that is to be continued; None if it has reached its end.

    By its newest whole state, which is saved last of all: at the last step, where `patience` ends
    the run, and after a signal.

    Raises:
        UserError: there are states, and all are damaged.
    """
    newest = find_state(config.run_dir / "resume")
    if newest is None:
        return f"{config.run_dir} has done no step that is saved"
    state = parse_json((newest / STATE_FILE).read_bytes())
    step, last = state["step"], _last_step(config.run_dir)
    best = Best.continued(config.keep_best, state.get("best"))
    if best.is_over(config.patience) or (last is not None and step >= last):
        return None
    done = f"{step} steps" if last is None else f"{step} of {last} steps"
    return f"{config.run_dir} has done {done}; continue with --resume auto"


def _last_step(run_dir: Path) -> int | None:
    """The last step of a run; None where a crash left no whole record of it, which is made anew."""
    try:
        return parse_json((run_dir / "resolved.json").read_bytes())["total_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def state_to_resume(run_dir: Path, resume: str) -> Path | None:
    """The state that `--resume` means; None for a new run.

    Args:
        run_dir: the run's folder.
        resume: "no", "auto" or a path.
    Raises:
        UserError: the folder already holds a run, no state of it is whole, or the path is no state
            or another run's.
    """
    if resume == "no":
        if (run_dir / "metrics.jsonl").exists() or (run_dir / "resume").exists():
            raise UserError(
                f"{run_dir} already holds a run; continue it with --resume auto, or choose another "
                "experiment_id"
            )
        return None
    if resume == "auto":
        return find_state(run_dir / "resume")
    path = home_path(resume)
    if not (path / STATE_FILE).is_file():
        raise UserError(f"--resume: {_not_a_state(path)}")
    if (run_dir / "resume").exists() and path.resolve().parent != (run_dir / "resume").resolve():
        raise UserError(
            f"--resume: {resume} is not of this run, {run_dir}; choose another experiment_id to "
            "branch off"
        )
    return path


def _not_a_state(path: Path) -> str:
    state = path.parent / "resume" / path.name
    if (state / STATE_FILE).is_file():
        return f"{path} is a model folder; the state of its step is {state}"
    what = f"{path} is not a resume state" if path.exists() else f"there is no {path}"
    return (
        f"{what}; give auto (the newest state of this run), a state (a folder like "
        "RUN/resume/step_100) or no"
    )
