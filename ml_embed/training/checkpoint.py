"""Exact resumption: the whole state of a run in safetensors and JSON, written atomically and
checked when read.

`resume/step_N/` holds model.safetensors, optimizer.safetensors, state.json and checksums.json. All
of a run's randomness is a function of (seed, step), so weights, moments, the step and the open log
window are its whole state.
Frozen weights (LoRA's) are not in it: they come from model_path again, which the fingerprint then
holds a sum of.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ml_embed.distributed import zero2
from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_folder, checksum_problem, remove_folder, write_checksums
from ml_embed.files.paths import numbered_folders
from ml_embed.notices import warn

FORMAT_VERSION = 1
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
KEPT_STATES = 2  # the newest, and the one before it in case the newest is found damaged
_PROGRESS_KEYS = {"step", "window", "metrics_bytes", "fingerprint", "processes"}

# The same calls serve one process, DDP and FSDP2: tensors come whole, on the CPU, on the first
# process.
_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SCATTER = StateDictOptions(full_state_dict=True, strict=False)  # frozen weights stay as they are
_SEPARATOR = "|"  # stands in no parameter's name


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole model's weights by name, on the CPU (empty on all processes but the first if they
    are sharded).

    A collective: every process must call it.
    """
    if zero2.is_engine(model):
        return zero2.model_state(model)
    return cast(
        "dict[str, Tensor]", get_model_state_dict(model, options=_GATHER)
    )  # torch names it more broadly


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as "parameter|moment", on the CPU; a collective like
    `model_state`."""
    if zero2.is_engine(model):
        state = zero2.optimizer_state(model)
    else:
        gathered = get_optimizer_state_dict(model, optimizer, options=_GATHER)
        state = cast("dict[str, dict[str, Tensor]]", gathered.get("state", {}))
    return {
        f"{parameter}{_SEPARATOR}{moment}": tensor.contiguous()
        for parameter, moments in state.items()
        for moment, tensor in moments.items()
    }


def _parameters_of(moments: Iterable[str]) -> set[str]:
    """The parameters that "parameter|moment" names speak of."""
    return {name.rpartition(_SEPARATOR)[0] for name in moments}


def save_state(
    folder: Path,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    progress: Mapping[str, Any],
    step: int,
) -> Path:
    """Write `folder/step_N` and drop all but the newest `KEPT_STATES`. Called by the first process
    alone.

    Args:
        folder: `resume/` of the run.
        model, optimizer: what `model_state` and `optimizer_state` gave; weights without moments,
            which are frozen, are left out.
        progress: anything else that a continued run needs, as JSON.
        step: N, optimizer steps done.
    Raises:
        UserError: the disk is full; the states that were there before are untouched.
    """
    target = folder / f"step_{step}"
    trained = _parameters_of(optimizer)
    with atomic_folder(target) as partial:
        save_file(
            {name: tensor for name, tensor in model.items() if name in trained},
            partial / MODEL_FILE,
        )
        save_file(dict(optimizer), partial / OPTIMIZER_FILE)
        state = {"format_version": FORMAT_VERSION, "step": step, **progress}
        (partial / STATE_FILE).write_text(
            json.dumps(state, indent=2, ensure_ascii=False), encoding="utf-8"
        )
        write_checksums(partial)
    for _, old in numbered_folders(folder)[:-KEPT_STATES]:
        remove_folder(old)
    return target


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
        warn(f"{path} is damaged ({problem}); trying the one before")
    if states:
        raise UserError(
            f"all resume states in {folder} are damaged; start a new run under another "
            "experiment_id"
        )
    return None


def drop_newer(folder: Path, step: int) -> None:
    """Remove the states of later steps than the one a run goes back to: damaged ones, or a future
    that is given up."""
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
            f"--resume: {path} is damaged ({problem}); use --resume auto to take the newest whole "
            "one"
        )
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        version, missing = state["format_version"], _PROGRESS_KEYS - state.keys()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--resume: {path / STATE_FILE} is no record of a run ({error!r})"
        ) from None
    if version != FORMAT_VERSION or missing:
        raise UserError(f"--resume: {path} was written by another version of ml-embed")
    return state


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a saved state into a prepared model and optimizer, whatever number of processes wrote it.

    Raises:
        UserError: the state is not readable, or of another model.
    """
    try:
        tensors, moments = load_file(path / MODEL_FILE), load_file(path / OPTIMIZER_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--resume: the tensors in {path} cannot be read ({error}); every machine must see the "
            "same output_dir"
        ) from None
    holder = model.module if zero2.is_engine(model) else model
    own = set(get_model_state_dict(holder, options=StateDictOptions(ignore_frozen_params=True)))
    if own != set(tensors):
        odd = sorted(own ^ set(tensors))[0]
        raise UserError(f"--resume: {path} is the state of another model (they differ in {odd})")
    if _parameters_of(moments) != own:
        raise UserError(
            f"--resume: {path / OPTIMIZER_FILE} does not belong to the weights beside it"
        )
    state: dict[str, Any] = {}  # parameter -> moment -> tensor
    for name, tensor in moments.items():
        parameter, _, moment = name.rpartition(_SEPARATOR)
        state.setdefault(parameter, {})[moment] = tensor
    if zero2.is_engine(model):
        zero2.load_state(model, tensors, state)
        return
    set_model_state_dict(model, {**tensors}, options=_SCATTER)
    groups = get_optimizer_state_dict(model, optimizer)[
        "param_groups"
    ]  # learning rate and betas are the config's
    set_optimizer_state_dict(
        model, optimizer, {"state": state, "param_groups": groups}, options=_SCATTER
    )
