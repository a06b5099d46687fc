"""Resumption is exact: to the bit after any fault, to rounding on another number of processes,
refused when changed."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from faults.broken_runs import BrokenRuns
from helpers.comparing import assert_same_metrics, assert_same_tensors
from helpers.tiny_runs import (
    STEPS,
    Inputs,
    Launch,
    config_of,
    final_bytes,
    final_state,
    metrics,
    rewrite_state,
    run,
    wait_for_lines,
)

import run as run_script
from ml_embed.errors import UserError
from ml_embed.files.paths import numbered_folders
from ml_embed.training.resume import state_to_resume


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return Inputs.write(tmp_path_factory.mktemp("resume") / "inputs")


@pytest.fixture(scope="module")
def unbroken(inputs):
    run(inputs, config_of(inputs, "unbroken"))
    return inputs.run_dir("unbroken")


@pytest.fixture
def broken(inputs, unbroken):
    """A copy of the unbroken run as if it had been killed after its checkpoint of step 6."""
    folder = inputs.run_dir("broken")
    shutil.copytree(unbroken, folder)
    for number, path in [*numbered_folders(folder / "resume"), *numbered_folders(folder)]:
        if number > 6:
            shutil.rmtree(path)
    yield folder
    shutil.rmtree(folder)


def test_runs_that_meet_every_fault_end_bit_equal(tmp_path):
    """The short form of `tests/faults/storm.py --kinds kill,fault`.

    How many faults a run meets depends on when they come; there are runs until four were met."""
    runs = BrokenRuns(tmp_path / "inputs")
    faults = BrokenRuns.KILLS + BrokenRuns.DAMAGES
    met: list[str] = []
    for seed in (1, 5, 6, 7, 8, 9):
        case = runs.try_one("kill", seed, faults)
        assert case["outcome"] == "equal", case
        met += filter(None, case["what"].split(", "))
        if len(met) >= 4:
            break
    assert len(met) >= 4


def test_another_number_of_processes_continues_the_same_order(inputs, unbroken, broken):
    printed = run(
        inputs, config_of(inputs, "broken", train_batch_size=2), "--resume", "auto", processes=2
    )
    assert "saved by 1 processes, continued by 2: the same global batches" in printed
    assert_same_metrics(metrics(unbroken), metrics(broken))
    assert_same_tensors(final_state(unbroken), final_state(broken))
    assert [line["step"] for line in metrics(broken)] == list(range(1, STEPS + 1))


def test_a_state_of_another_order_of_the_data_is_refused(inputs, broken):
    """States from before schedules had a version were trained on other rows."""
    rewrite_state(
        broken / "resume" / "step_6", lambda state: state["fingerprint"].pop("schedule_version")
    )
    printed = run(inputs, config_of(inputs, "broken"), "--resume", "auto", expected=2)
    assert "schedule_version: None -> 2 (which rows a step takes;" in printed


def test_what_changed_is_named_and_refused(inputs, broken):
    before = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    changed = config_of(
        inputs, "broken", learning_rate=2e-3, temperature=0.1, train_batch_size=2, log_interval=2
    )
    printed = run(inputs, changed, "--resume", "auto", expected=2)
    assert "learning_rate: 0.0001 -> 0.002" in printed
    assert "temperature: 0.05 -> 0.1" in printed
    assert "global_batch_size: 4 -> 2" in printed
    assert "log_interval" not in printed
    assert "Traceback" not in printed
    assert before == {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    printed = run(inputs, changed, "--resume", "auto", "--allow-changes")
    assert "learning_rate: 0.0001 -> 0.002" in printed
    assert "another order of the data" in printed
    assert metrics(broken)[-1]["step"] == STEPS


def test_other_data_is_refused_but_a_copy_of_it_is_not(inputs, broken, tmp_path):
    copy = shutil.copytree(inputs.folder / "tokenized", tmp_path / "copy")
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    run(
        inputs,
        config_of(inputs, "broken", train_data_path=str(copy), train_steps=6),
        "--resume",
        "auto",
        expected=2,
    )
    run(inputs, config_of(inputs, "broken", train_data_path=str(copy)), "--resume", "auto")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"max_seq_length": 7}))
    printed = run(
        inputs,
        config_of(inputs, "broken", train_data_path=str(copy)),
        "--resume",
        "auto",
        expected=2,
    )
    assert "train_data_path" in printed


def test_a_key_that_came_after_a_state_counts_as_its_default(inputs, unbroken, broken):
    """And a number that the open log window did not have then counts as nothing so far."""

    def as_before(progress):
        del progress["fingerprint"]["false_negative_margin"]
        del progress["window"]["masked_by_margin"]

    rewrite_state(broken / "resume" / "step_6", as_before)
    changed = config_of(inputs, "broken", false_negative_margin=0.1)
    printed = run(inputs, changed, "--resume", "auto", expected=2)
    assert "false_negative_margin: None -> 0.1" in printed
    run(inputs, config_of(inputs, "broken"), "--resume", "auto")
    assert final_bytes(broken) == final_bytes(unbroken)


@pytest.fixture
def taught(inputs, tmp_path):
    """Config keys of a run with its own teacher that ends at step 3, and the run's state."""
    teacher = shutil.copytree(inputs.folder / "teacher", tmp_path / "teacher")
    changes = {"teacher_model_path": str(teacher), "train_steps": 3}
    run(inputs, config_of(inputs, "taught", **changes))
    yield changes, inputs.run_dir("taught") / "resume" / "step_3"
    shutil.rmtree(inputs.run_dir("taught"))


def test_the_same_teacher_elsewhere_is_accepted_and_another_at_its_path_is_not(
    inputs, taught, tmp_path
):
    changes, _ = taught
    moved = Path(changes["teacher_model_path"]).rename(tmp_path / "moved")
    run(
        inputs,
        config_of(inputs, "taught", **changes | {"teacher_model_path": str(moved)}),
        "--resume",
        "auto",
    )
    shutil.copytree(inputs.folder / "backbone", changes["teacher_model_path"])
    printed = run(inputs, config_of(inputs, "taught", **changes), "--resume", "auto", expected=2)
    assert re.search(
        r"teacher_model_path: {'model\.safetensors': '\w+'} -> {'model\.safetensors': '\w+'} "
        r"\(digests of its files\)",
        printed,
    )
    assert printed.count("  - ") == 1


def test_the_order_of_patterns_counts_where_it_changes_a_dataset(inputs, tmp_path):
    """The first pattern that matches a name decides: "p*" and "*s" meet in "pairs"."""
    named = {
        name: {"task": "retrieval"}
        for name in ("answers", "lonely", "topics", "polarity", "no_negatives")
    }
    patterns = {"p*": {"task": "clustering"}, "*s": {"task": "retrieval"}}
    settings = {"train_steps": 3, "datasets": named | patterns}
    run(inputs, config_of(inputs, "ordered", **settings))

    def resumed(datasets: dict, expected: int = 0) -> str:
        config = config_of(inputs, "ordered", **settings | {"datasets": datasets})
        return run(inputs, config, "--resume", "auto", expected=expected)

    resumed(dict(reversed(named.items())) | patterns)
    swapped = named | {"*s": patterns["*s"], "p*": patterns["p*"]}
    printed = resumed(swapped, expected=2)
    assert "dataset_plans: {'pairs': {'name': 'pairs', 'task': 'clustering'" in printed
    assert printed.count("  - ") == 1
    assert "answers" not in printed


def test_a_damaged_state_is_passed_over_with_a_message(inputs, unbroken, broken):
    newest = shutil.copytree(unbroken / "resume" / "step_9", broken / "resume" / "step_9")
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    printed = run(inputs, config_of(inputs, "broken"), "--resume", "auto")
    assert re.search(
        r"step_9 is damaged \(model\.safetensors does not match its checksum\); trying the one",
        printed,
    )
    assert "continuing after step 6" in printed
    assert final_bytes(broken) == final_bytes(unbroken)
    assert metrics(broken) == metrics(unbroken)


def test_when_all_states_are_damaged_nothing_is_touched(inputs, broken):
    for _, path in numbered_folders(broken / "resume"):
        (path / "state.json").unlink()
    printed = run(inputs, config_of(inputs, "broken"), "--resume", "auto", expected=2)
    assert "all resume states" in printed
    assert [number for number, _ in numbered_folders(broken / "resume")] == [6]


def test_a_given_state_goes_back_to_it(inputs, unbroken, broken):
    shutil.copytree(unbroken / "resume" / "step_9", broken / "resume" / "step_9")
    printed = run(inputs, config_of(inputs, "broken"), "--resume", broken / "resume" / "step_6")
    assert "continuing after step 6" in printed
    assert final_bytes(broken) == final_bytes(unbroken)
    assert metrics(broken) == metrics(unbroken)


def test_states_of_other_runs_and_no_states_are_refused(inputs, unbroken, broken, tmp_path):
    config = config_of(inputs, "broken")
    assert "is not of this run" in run(
        inputs, config, "--resume", unbroken / "resume" / "step_9", expected=2
    )
    assert "already holds a run" in run(inputs, config, expected=2)
    elsewhere = config_of(inputs, "elsewhere")
    assert "is not a resume state" in run(inputs, elsewhere, "--resume", tmp_path, expected=2)
    run(
        inputs, elsewhere, "--resume", unbroken / "resume" / "step_9"
    )  # a branch, here with nothing left to do


def test_what_is_no_state_is_told_from_one(inputs, broken, monkeypatch):
    """The model folder of a step, the run's own folder, a step that is not there, and a word that
    means nothing."""
    state = broken / "resume" / "step_6"
    for given, message in (
        (broken / "step_6", f"step_6 is a model folder; the state of its step is {state}"),
        (broken, f"{broken} is not a resume state; give auto"),
        (broken / "resume" / "step_5", f"there is no {broken / 'resume' / 'step_5'}; give auto"),
        (
            "yes",
            "there is no yes; give auto (the newest state of this run), a state (a folder like "
            "RUN/resume/",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            state_to_resume(broken, str(given))
    monkeypatch.setenv("HOME", str(broken))
    assert (
        state_to_resume(broken, str(state)) == state_to_resume(broken, "~/resume/step_6") == state
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_after_the_same_step(inputs, number):
    name = f"stopped-{number}"
    config = config_of(inputs, name, train_batch_size=2, train_steps=500, checkpointing_steps=0)
    launch = Launch(inputs.folder / "printed" / name, ["--config", config], 2)
    log = inputs.run_dir(name) / "metrics.jsonl"
    wait_for_lines(log, 2, launch)
    os.kill(launch.processes[1].pid, number)
    assert launch.wait() == [75, 75], launch.printed()
    assert "stopped by a signal after step" in launch.printed()
    ((step, _),) = numbered_folders(inputs.run_dir(name) / "resume")[-1:]
    assert metrics(inputs.run_dir(name))[-1]["step"] == step
    assert (inputs.run_dir(name) / f"step_{step}" / "model.safetensors").exists()


def test_not_finite_on_one_process_stops_all_before_the_update(inputs):
    config = config_of(inputs, "poisoned", train_batch_size=2)
    launch = Launch(
        inputs.folder / "printed" / "poisoned",
        ["--config", config],
        2,
        main=main_with_nan_at_step_5,
    )
    assert launch.wait() == [2, 2], launch.printed()
    for path in launch.outputs:
        assert "step 5, dataset" in path.read_text()
        assert "the last good checkpoint is" in path.read_text()
        assert "Traceback" not in path.read_text()
    assert [line["step"] for line in metrics(inputs.run_dir("poisoned"))] == [1, 2, 3, 4]
    assert [number for number, _ in numbered_folders(inputs.run_dir("poisoned") / "resume")] == [3]


def main_with_nan_at_step_5(arguments: list[str]) -> int:
    """run.py's main where the vectors of the second process are not numbers in the fifth step."""
    from ml_embed.model import MatryoshkaEncoder

    forward, calls = MatryoshkaEncoder.forward, iter(range(1, 1000))

    def poisoned(self, *args):
        vectors = forward(self, *args)
        return vectors * torch.nan if next(calls) == 5 and os.environ["RANK"] == "1" else vectors

    MatryoshkaEncoder.forward = poisoned
    return run_script.main(arguments)


def test_a_mistake_on_one_process_alone_does_not_hang_the_others(inputs):
    config = config_of(inputs, "alone", train_batch_size=2)
    launch = Launch(
        inputs.folder / "printed" / "alone",
        ["--config", config],
        2,
        main=main_without_data_on_second,
    )
    started = time.monotonic()
    assert launch.wait() == [2, 2], launch.printed()
    assert time.monotonic() - started < 20
    first, second = (path.read_text() for path in launch.outputs)
    said = "process 1 of this run cannot go on: train_data_path: folder of tokenized data /nowhere"
    assert f"error: {said} does not exist" in first
    assert first.count("error:") == second.count("error:") == 1
    assert "does not exist" in second
    assert "Traceback" not in first + second


def main_without_data_on_second(arguments: list[str]) -> int:
    if os.environ["RANK"] == "1":
        arguments = [*arguments, "--set", "train_data_path=/nowhere"]
    return run_script.main(arguments)
