"""Two processes of one run that differ in one thing: a setting, what they read, code, a version."""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from helpers.tiny_runs import Inputs, Launch, final_bytes
from safetensors.torch import load_file, save_file

import run as run_script
from ml_embed.config import TrainConfig
from ml_embed.distributed import agreement, heartbeat

STEPS, SECONDS = 3, 60
SOME = {"str": "other", "float": 0.25, "int": 1, "bool": True}
"""a value for what has none"""


def main_of_one(arguments: list[str]) -> int:
    """run.py's main; the second process has what OWN says besides."""
    heartbeat.LOST_AFTER_SECONDS, heartbeat.BEAT_SECONDS = 5.0, 0.5
    own = json.loads(os.environ["OWN"]) if os.environ["RANK"] == "1" else {}
    if "version" in own:
        {"torch": torch, "transformers": transformers}[own["version"]].__version__ = "0.1"
    if "code" in own:
        code = agreement._code
        agreement._code = lambda: code() | {own["code"]: "of yesterday"}
    return run_script.main([*arguments, *own.get("arguments", [])])


def try_one(seed: int, folder: Path) -> dict:
    """A case of the harness (`storm.py`), in an empty folder; its parent holds what is shared."""
    random = np.random.default_rng(seed)
    inputs, expected = _unbroken(folder.parent)
    kinds = (_setting, _setting, _setting, _data, _model, _copy, _flag, _program)
    what, own = kinds[random.integers(len(kinds))](random, inputs, folder)
    name = f"disagree-{seed}"
    codes, printed = _launch(inputs, name, own)
    _, _, message = printed.partition("error: ")
    if None in codes:
        outcome = "hang"
    elif "Traceback" in printed or not set(codes) <= {0, 2, heartbeat.LOST_EXIT_CODE}:
        outcome = "traceback"
    elif 0 not in codes:
        outcome = "error"
    else:  # as far as the first process shows it, whose files count
        same = codes == [0, 0] and final_bytes(inputs.run_dir(name), STEPS) == expected
        outcome = "equal" if same else "silent"
    shutil.rmtree(inputs.run_dir(name), ignore_errors=True)
    detail = message[:500] if outcome in ("equal", "error") else printed[-2000:]
    return {"kind": "disagree", "what": what, "outcome": outcome, "detail": detail}


def _launch(inputs: Inputs, name: str, own: dict) -> tuple[list[int | None], str]:
    """Exit codes, None for a process that had to be killed, and what was printed."""
    config = inputs.config(
        name,
        train_batch_size=2,
        train_steps=STEPS,
        valid_fraction=0.2,
        mrl_dims=[32],
        teacher_model_path=str(inputs.folder / "teacher"),
    )
    launch = Launch(
        inputs.folder / "printed" / name,
        ["--config", config],
        2,
        main=main_of_one,
        environment={"OWN": json.dumps(own)},
    )
    for process in launch.processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in launch.processes]
    launch.kill()
    return codes, launch.printed()


@functools.cache
def _unbroken(folder: Path) -> tuple[Inputs, dict[str, bytes]]:
    inputs = Inputs.write(folder / "inputs")
    codes, printed = _launch(inputs, "unbroken", {})
    assert codes == [0, 0], printed
    return inputs, final_bytes(inputs.run_dir("unbroken"), STEPS)


Change = tuple[str, dict]
"""what is changed, in words, and what `main_of_one` is told"""


def _set(**values: Any) -> dict:
    return {"arguments": ["--set", *(f"{key}={json.dumps(v)}" for key, v in values.items())]}


def _setting(random: np.random.Generator, inputs: Inputs, folder: Path) -> Change:
    """Another value of any key that is no path."""
    hints = get_type_hints(TrainConfig)
    keys = [f for f in dataclasses.fields(TrainConfig) if not f.name.endswith(("_path", "_dir"))]
    key = keys[random.integers(len(keys))]
    now = json.loads(inputs.config("drawn").read_text()).get(key.name, key.default)
    value = _other(now, hints[key.name], random)
    return f"{key.name}: {value!r}", _set(**{key.name: value})


def _other(now: Any, hint: Any, random: np.random.Generator) -> Any:
    """A value of the same kind, and not the same."""
    if isinstance(hint, UnionType):
        if now is not None and random.integers(2):
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if isinstance(now, bool) or hint is bool:
        return not now
    if isinstance(now, dict) or get_origin(hint) is dict:
        return {"answers": {"weight": 0.5}}
    if choices := [choice for choice in get_args(hint) if isinstance(choice, str)]:
        return next(choice for choice in choices if choice != now)
    if isinstance(now, (list, tuple)) or get_origin(hint) is tuple:
        return list(now or [])[:-1] or [1]
    if isinstance(now, (int, float)):
        return now + 1 if now == 0 or random.integers(2) else now * 2
    return SOME.get(getattr(hint, "__name__", ""), "other")


def _data(random: np.random.Generator, inputs: Inputs, folder: Path) -> Change:
    """Other tokens, another order of rows, or other passages, in one file."""
    changes: list[tuple[str, str, Callable[[pa.Table], pa.Table]]] = [
        ("order of rows", "query", lambda table: table.take(np.arange(len(table))[::-1])),
        ("order of documents", "corpus", lambda table: table.take(np.arange(len(table))[::-1])),
        ("one row less", "query", lambda table: table.slice(1)),
        ("a row twice", "query", lambda table: pa.concat_tables([table, table.slice(0, 1)])),
    ]
    what, kind, change = changes[random.integers(len(changes))]
    shutil.copytree(inputs.folder / "tokenized", folder / "tokenized")
    names = sorted((folder / "tokenized").glob(f"*_{kind}.parquet"))
    path = names[random.integers(len(names))]
    pq.write_table(change(pq.read_table(path)), path)
    return f"{path.name}: {what}", _set(train_data_path=str(folder / "tokenized"))


def _model(random: np.random.Generator, inputs: Inputs, folder: Path) -> Change:
    """Another weight or setting of the start model or the teacher."""
    name, key = (("backbone", "model_path"), ("teacher", "teacher_model_path"))[random.integers(2)]
    shutil.copytree(inputs.folder / name, folder / name)
    if random.integers(2):
        path = folder / name / "model.safetensors"
        tensors = load_file(path)
        part = sorted(tensors)[random.integers(len(tensors))]
        tensors[part].view(-1)[int(random.integers(tensors[part].numel()))] += 0.5
        save_file(tensors, path, {"format": "pt"})
    else:
        path, part = folder / name / "config.json", "rms_norm_eps"
        path.write_text(json.dumps(json.loads(path.read_text()) | {part: 1e-2}))
    return f"{key}: {path.name}: {part}", _set(**{key: str(folder / name)})


def _copy(random: np.random.Generator, inputs: Inputs, folder: Path) -> Change:
    """The same content at another place, which is no difference."""
    keys = {"model_path": "backbone", "teacher_model_path": "teacher"}
    keys |= {"train_data_path": "tokenized", "cache_dir": "cache"}
    key = sorted(keys)[random.integers(len(keys))]
    if (source := inputs.folder / keys[key]).exists():
        shutil.copytree(source, folder / keys[key])
    return f"{key}: a copy", _set(**{key: str(folder / keys[key])})


def _flag(random: np.random.Generator, inputs: Inputs, folder: Path) -> Change:
    flags = (["--dry-run"], ["--show-batch", "1"], ["--resume", "auto"])
    flag = flags[random.integers(len(flags))]
    return " ".join(flag), {"arguments": flag}


def _program(random: np.random.Generator, inputs: Inputs, folder: Path) -> Change:
    kinds = ({"version": "torch"}, {"version": "transformers"}, {"code": "losses/nested.py"})
    own = kinds[random.integers(len(kinds))]
    return f"another {own}", own
