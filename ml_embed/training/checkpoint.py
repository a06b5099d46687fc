"""Resume states: the whole state of a run, written atomically and checked when read.

`resume/step_N/` holds model.safetensors, optimizer.safetensors, state.json and checksums.json. All
of a run's randomness is a function of (seed, step), so weights, moments, the step and the open log
window are its whole state.

Frozen weights (LoRA's) are not in it: they come from model_path again, of which the fingerprint
then holds the digests.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ml_embed.distributed.engine import Engine, Moments
from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_folder, checksum_problem, remove_folder, write_checksums
from ml_embed.files.json_file import parse_json
from ml_embed.files.paths import numbered_folders
from ml_embed.notices import warn

FORMAT_VERSION = 2
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
KEPT_STATES = 2  # the newest, and the one before it in case the newest is found damaged
_PROGRESS_KEYS = {"step", "window", "metrics_bytes", "metrics_digest", "fingerprint", "processes"}
_SEPARATOR = "|"  # stands in no parameter's name


def save_state(
    folder: Path,
    weights: Mapping[str, Tensor],
    moments: Moments,
    progress: Mapping[str, Any],
    step: int,
) -> Path:
    """Write `folder/step_N` and drop all but the newest `KEPT_STATES`. First process only.

    Args:
        folder: `resume/` of the run.
        weights: the engine's `model_state`; weights without moments are frozen, and left out.
        moments: the engine's `optimizer_state`; written as tensors named "parameter|moment".
        progress: anything else that a continued run needs, as JSON.
        step: N, optimizer steps done.
    Raises:
        UserError: the disk is full; the states that were there before are untouched.
    """
    target = folder / f"step_{step}"
    trained = {name: tensor for name, tensor in weights.items() if name in moments}
    flat = {
        f"{parameter}{_SEPARATOR}{moment}": tensor.contiguous()
        for parameter, own in moments.items()
        for moment, tensor in own.items()
    }
    state = {"format_version": FORMAT_VERSION, "step": step, **progress}
    with atomic_folder(target) as partial:
        save_file(trained, partial / MODEL_FILE)
        save_file(flat, partial / OPTIMIZER_FILE)
        (partial / STATE_FILE).write_text(
            json.dumps(state, indent=2, ensure_ascii=False), encoding="utf-8"
        )
        write_checksums(partial)
    keep_newest(folder, KEPT_STATES, step)
    return target


def keep_newest(folder: Path, count: int | None, step: int) -> None:
    """Remove all but so many of the `step_N` folders up to a step; None is all.

    Folders of later steps, from before the run went back to an earlier state, push none out.
    """
    done = [path for number, path in numbered_folders(folder) if number <= step]
    for old in done[: -count if count else 0]:
        remove_folder(old)


def find_state(folder: Path) -> Path | None:
    """The newest whole state under `resume/`; warns of damaged ones that it passes over.

    Raises:
        UserError: there are states, and all are damaged.
    """
    states = numbered_folders(folder)
    for _, path in reversed(states):
        problem = checksum_problem(path)
        if problem is None:
            return path
        warn(f"{path} {problem}; trying the one before")
    if states:
        raise UserError(
            f"all resume states in {folder} are damaged, or of another version of ml-embed; start "
            "a new run under another experiment_id"
        )
    return None


def drop_newer(folder: Path, step: int) -> None:
    """Remove the states of later steps than `step`, which a run continues from.

    They are damaged, or the run goes back to before them.
    """
    for number, path in numbered_folders(folder):
        if number > step:
            remove_folder(path)


def read_progress(path: Path) -> dict[str, Any]:
    """state.json of a resume state, after checking the whole folder.

    Raises:
        UserError: missing, damaged, or of another format.
    """
    if not (path / STATE_FILE).is_file():
        raise UserError(
            f"--resume: {path} is not a resume state (a folder like RUN/resume/step_100)"
        )
    problem = checksum_problem(path)
    if problem is not None:
        raise UserError(
            f"--resume: {path} {problem}; use --resume auto to take the newest whole one"
        )
    try:
        state = parse_json((path / STATE_FILE).read_bytes())
        version, missing = state["format_version"], _PROGRESS_KEYS - state.keys()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--resume: {path / STATE_FILE} is no record of a run ({error!r})"
        ) from None
    if version != FORMAT_VERSION or missing:
        raise UserError(f"--resume: {path} was written by another version of ml-embed")
    return state


def load_state(path: Path, engine: Engine) -> None:
    """Put a saved state into a prepared engine, whatever number of processes wrote it.

    Raises:
        UserError: the state is not readable, or of another model.
    """
    try:
        weights, flat = load_file(path / MODEL_FILE), load_file(path / OPTIMIZER_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--resume: the tensors in {path} cannot be read ({error}); every machine must see the "
            "same output_dir"
        ) from None
    own = engine.trained_parameters()
    if own != set(weights):
        odd = sorted(own ^ set(weights))[0]
        raise UserError(f"--resume: {path} is the state of another model (they differ in {odd})")
    moments: Moments = {}
    for name, tensor in flat.items():
        parameter, _, moment = name.rpartition(_SEPARATOR)
        moments.setdefault(parameter, {})[moment] = tensor
    if own != set(moments):
        raise UserError(
            f"--resume: {path / OPTIMIZER_FILE} does not belong to the weights beside it"
        )
    engine.load_state(weights, moments)
