"""Processes that were started with different things stop before the first step and say which."""

import gc
import json
import os
import shutil
import weakref
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from faults.disagree import try_one
from helpers.tiny_runs import DATASETS, Inputs, Launch, config_of, final_bytes, run, write_backbone
from safetensors.torch import load_file, save_file

import run as run_script
from ml_embed.distributed import agreement
from ml_embed.distributed.agreement import SHOWN, differences

REMEDY = "start all of them with the same config, code, data, models and libraries"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return Inputs.write(tmp_path_factory.mktemp("agreement") / "inputs")


def changed_file(folder, name: str, change) -> str:
    """A copy of a folder in which one file was passed through `change`."""
    copy = folder.with_name(f"{folder.name}-{name}-changed")
    shutil.copytree(folder, copy)
    change(copy / name)
    return str(copy)


def other_token(path) -> None:
    table = pq.read_table(path)
    texts = table["query_input_ids"].to_pylist()
    texts[0][0] += 1
    column = table.schema.field("query_input_ids")
    pq.write_table(table.set_column(0, column, pa.array(texts, column.type)), path)


def doubled_weights(path) -> None:
    tensors = load_file(path)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, path, {"format": "pt"})


def larger_epsilon(path) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def other_version(monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", "1.0.0")


def other_code(monkeypatch) -> None:
    code = agreement._code
    monkeypatch.setattr(agreement, "_code", lambda: code() | {"losses/nested.py": "of yesterday"})


def cases(inputs: Inputs) -> dict[str, tuple[list[str], list[str]]]:
    """name -> what the second process is given besides, and the differences that are named."""
    data, backbone = inputs.folder / "tokenized", inputs.folder / "backbone"
    start = Path(changed_file(backbone, "model.safetensors", doubled_weights))
    plans = {name: {"task": task} for name, (task, *_) in DATASETS.items()}
    plans["answers"] = {"task": "clustering"}
    settings = {
        "seed": ("1", "0 on process 0, 1 on process 1"),
        "checkpointing_steps": ("4", "3 on process 0, 4 on process 1"),
        "train_batch_size": ("1", "2 on process 0, 1 on process 1"),
        "datasets": (json.dumps(plans), 'answers: task: "retrieval" on process 0, "clustering" on'),
        "valid_fraction": ("0.3", "0.0 on process 0, 0.3 on process 1"),
        "validation_steps": ("2", "100 on process 0, 2 on process 1"),
        "output_dir": (str(inputs.folder / "other"), f'"{inputs.folder}/runs" on process 0'),
    }
    read = {
        "train_data_path": changed_file(data, "answers_query.parquet", other_token),
        "model_path": changed_file(start, "config.json", larger_epsilon),
        "teacher_model_path": write_backbone(inputs.folder / "third", seed=3),
    }
    return {
        "settings": (
            ["--dry-run", "--set", *(f"{key}={value}" for key, (value, _) in settings.items())],
            [f"{key}: {message}" for key, (_, message) in settings.items()]
            + ["--dry-run: false on process 0, true on process 1"],
        ),
        "code": (["other_code"], ['digest of ml_embed: losses/nested.py: "']),
        "libraries": (
            ["other_version"],
            [f'torch: "{torch.__version__}" on process 0, "1.0.0" on'],
        ),
        "inputs": (
            ["--set", *(f"{key}={path}" for key, path in read.items())],
            ["train_data_path: ", "teacher_model_path: null on process 0"]
            + [f'model_path: {part}: "' for part in ("model.safetensors", "config.json")],
        ),
    }


def main_of_each(arguments: list[str]) -> int:
    """run.py's main for each case, in one process group; the second process has its own arguments.

    Prints "CASE name code" after each.
    """
    config, given = arguments
    for name, own in json.loads(given).items():
        more = own if os.environ["RANK"] == "1" else []
        with pytest.MonkeyPatch.context() as monkeypatch:
            if more and (change := globals().get(more[0])):
                change(monkeypatch)
                more = []
            code = run_script.main(["--config", config, *more])
        print(f"CASE {name} {code}", flush=True)
        AcceleratorState._reset_state(reset_partial_state=True)
    return 0


def test_processes_that_differ_stop_before_the_first_step(inputs):
    """The exit code is 2 on both, and the message names key, processes and values."""
    config = config_of(inputs, "differing", train_batch_size=2)
    given = cases(inputs)
    launch = Launch(
        inputs.folder / "printed" / "differing",
        [config, json.dumps({name: more for name, (more, _) in given.items()})],
        2,
        main=main_of_each,
    )
    assert launch.wait() == [0, 0], launch.printed()
    assert "Traceback" not in launch.printed()
    for path in launch.outputs:
        said = path.read_text()
        for name, (_, messages) in given.items():
            before, mark, said = said.partition(f"CASE {name} 2\n")
            assert mark, (name, before)
            for message in messages:
                assert message in before, (name, message)
            assert before.endswith(f"\n{REMEDY}\n"), before
    assert not inputs.run_dir("differing").exists()


def test_places_of_the_same_content_may_differ(inputs):
    """Each machine may have copies of its own of all that is read."""
    copy = inputs.folder / "copies"
    for name in ("backbone", "tokenized", "teacher"):
        shutil.copytree(inputs.folder / name, copy / name)
    taught = {"teacher_model_path": str(inputs.folder / "teacher"), "train_batch_size": 2}
    run(inputs, config_of(inputs, "one_place", **taught), processes=2)
    config = config_of(inputs, "two_places", **taught)
    own = {
        "model_path": copy / "backbone",
        "train_data_path": copy / "tokenized",
        "teacher_model_path": copy / "teacher",
        "cache_dir": copy / "cache",
        "tb_dir": copy / "tb",
    }
    changes = [f"{key}={path}" for key, path in own.items()]
    run(inputs, config, *changes, processes=2, main=main_with_own_places)
    assert final_bytes(inputs.run_dir("one_place")) == final_bytes(inputs.run_dir("two_places"))


def main_with_own_places(arguments: list[str]) -> int:
    common, changes = arguments[:2], arguments[2:]
    own = ["--set", *changes] if os.environ["RANK"] == "1" else []
    groups, destroy = [], dist.destroy_process_group

    def noted(*given) -> None:
        groups.append(weakref.ref(dist.group.WORLD))
        destroy(*given)

    dist.destroy_process_group = noted
    code = run_script.main([*common, *own])
    gc.collect()
    assert groups[0]() is not None, "it waits for gloo's threads, which may wait for it"
    return code


def main_with_another_state(arguments: list[str]) -> int:
    """The second process finds another machine's old state at the same path."""
    if os.environ["RANK"] == "1":
        from ml_embed.training import agreement

        sums = agreement._sums
        agreement._sums = lambda state: dict.fromkeys(sums(state), None)
    return run_script.main(arguments)


def test_all_processes_continue_the_same_state(inputs):
    config = config_of(inputs, "states", train_batch_size=2)
    run(inputs, config, processes=2)
    more = ["--resume", "auto"]
    options = {"processes": 2, "expected": 2, "main": main_with_another_state}
    printed = run(inputs, config, *more, **options)
    assert printed.count("checksums.json: ") == 2
    assert "null on process 1" in printed


def test_what_differs_is_told_by_process():
    """Process numbers as ranges, values cut where they are long, and only so many lines."""
    alike, other, long = {"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": None}}, {"a": "x" * 500}
    told = differences([alike, alike, other, alike, long, long])
    assert told == [
        f'a: 1 on processes 0-3, "{"x" * 99}… on processes 4-5',
        "b: c: [1] on processes 0-1 and 3, null on process 2, nothing on processes 4-5",
    ]
    assert differences([alike, dict(alike)]) == []
    many = [{str(n): n + process for n in range(SHOWN + 5)} for process in range(2)]
    assert differences(many)[-1] == "and 5 more"
    assert len(differences(many)) == SHOWN + 1


@pytest.mark.slow
def test_whatever_differs_is_said_or_makes_no_difference(tmp_path):
    """Short form of the search for such differences."""
    outcomes = Counter()
    for seed in range(20):
        folder = tmp_path / "disagree" / str(seed)
        folder.mkdir(parents=True)
        case = try_one(seed, folder)
        assert case["outcome"] in ("equal", "error"), (seed, case)
        outcomes[case["outcome"]] += 1
    assert 0 < outcomes["equal"] < outcomes["error"]
