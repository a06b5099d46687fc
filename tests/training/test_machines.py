"""Two machines: launched by `accelerate launch` with their own ranks and addresses, and what
happens when one dies."""

import os
import signal
import time

import pytest
from helpers.machines import kill_machine, launch_on, two_machines
from helpers.tiny_runs import (
    Inputs,
    Launch,
    config_of,
    final_bytes,
    free_port,
    metrics,
    run,
    wait_for_lines,
)

import run as run_script
from ml_embed.distributed import heartbeat

LOST = (2, heartbeat.LOST_EXIT_CODE)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return Inputs.write(tmp_path_factory.mktemp("machines") / "inputs")


@pytest.fixture
def machines():
    with two_machines() as machines:
        yield machines


@pytest.mark.alone
def test_two_launches_are_one_run_and_neither_outlives_the_other(inputs, machines, tmp_path):
    """The second machine is killed in mid-run; the first ends with a message; continued, the run
    ends bit-equal."""
    run(inputs, config_of(inputs, "unbroken", train_batch_size=2, train_steps=40), processes=2)
    config = config_of(inputs, "two_machines", train_batch_size=2, train_steps=40)
    outputs = [tmp_path / "first", tmp_path / "second"]
    with launch_on(machines, "run.py", ["--config", config], outputs) as launchers:
        wait_for_lines(inputs.run_dir("two_machines") / "metrics.jsonl", 5, outputs[0])
        kill_machine(launchers[1])
        killed = time.monotonic()
        assert launchers[0].wait(60) == 1, "what accelerate makes of any failure"
        assert time.monotonic() - killed < 60
    assert (
        "error: another process of this run has ended or does not answer" in outputs[0].read_text()
    )
    assert not (inputs.run_dir("two_machines") / "step_40").exists()
    run(inputs, config, "--resume", "auto", processes=2)
    assert metrics(inputs.run_dir("two_machines")) == metrics(inputs.run_dir("unbroken"))
    assert final_bytes(inputs.run_dir("two_machines"), 40) == final_bytes(
        inputs.run_dir("unbroken"), 40
    )


UNEQUAL = {"WORLD_SIZE": 12, "GROUP_WORLD_SIZE": 2}  # 8 processes and 4, as torchrun tells of them
ALIKE = {"WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4}  # a launcher that says no more


@pytest.mark.parametrize(
    ("told", "machine"),
    [
        (UNEQUAL | {"LOCAL_WORLD_SIZE": 8, "RANK": 0, "GROUP_RANK": 0}, 0),
        (UNEQUAL | {"LOCAL_WORLD_SIZE": 4, "RANK": 8, "GROUP_RANK": 1}, 1),
        (ALIKE | {"RANK": 3}, 0),
        (ALIKE | {"RANK": 4}, 1),
    ],
)
def test_machines_are_counted(monkeypatch, told, machine):
    """To the end of the run; processes of the same machine until all have met."""
    watched = []

    class Recorder:
        def __init__(self, own, others, *rest):
            self._said = own, others
            watched.append(self._said)

        def stop(self):
            watched.remove(self._said)

    for name, value in (told | {"LOCAL_RANK": 0}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(heartbeat, "Heartbeat", Recorder)
    names = [f"machine {number} (counted from 0)" for number in range(2)]
    own, local = told["RANK"], told["LOCAL_WORLD_SIZE"]
    neighbours = [f"process {number}" for number in range(own, own + local) if number > own]
    with heartbeat.heartbeat("start again") as all_have_met:
        machines = (names[machine], [names[1 - machine]])
        assert watched == [machines, (f"process {own}", neighbours)]
        all_have_met()
        assert watched == [machines]
    assert watched == []


def main_with_quick_heartbeat(arguments: list[str]) -> int:
    heartbeat.BEAT_SECONDS, heartbeat.LOST_AFTER_SECONDS = 0.2, 2.0
    return run_script.main(arguments)


def main_that_dies(arguments: list[str]) -> int:
    """run.py's main; process VICTIM dies at MOMENT."""
    from ml_embed.training import accelerator, inputs

    moments = {
        "before it has met others": (inputs, "with_model_folders"),
        "while they meet": (accelerator, "Accelerator"),
        "when they have met": (inputs, "open_inputs"),
    }
    if os.environ["RANK"] == os.environ["VICTIM"]:
        if (moment := os.environ["MOMENT"]) == "before it says a word":
            os.kill(os.getpid(), signal.SIGKILL)
        module, name = moments[moment]
        setattr(module, name, lambda *given, **more: os.kill(os.getpid(), signal.SIGKILL))
    return main_with_quick_heartbeat(arguments)


WITHOUT_LAUNCHER = {"TORCHELASTIC_USE_AGENT_STORE": "False"}


@pytest.mark.alone
@pytest.mark.parametrize(
    ("moment", "victim", "more"),
    [
        ("before it says a word", 0, WITHOUT_LAUNCHER),
        ("before it says a word", 1, {}),
        ("before it has met others", 0, WITHOUT_LAUNCHER),
        ("while they meet", 0, {}),
        ("when they have met", 1, {}),
    ],
)
def test_nobody_waits_for_one_that_died_before_the_first_step(inputs, moment, victim, more):
    """No longer than for one that dies later; here after two seconds instead of thirty."""
    config = config_of(inputs, "alone", train_batch_size=2)
    environment = {"MOMENT": moment, "VICTIM": str(victim)} | more
    if more:  # the store's port is free then, as where processes are started one by one
        environment["MASTER_PORT"] = str(free_port())
    launch = Launch(
        inputs.folder / "printed" / "alone",
        ["--config", config],
        2,
        main=main_that_dies,
        environment=environment,
    )
    launch.processes[victim].join(60)
    other = launch.processes[1 - victim]
    other.join(20)
    codes = launch.wait(0)
    assert codes[1 - victim] in LOST, (codes, launch.printed())
    assert codes[victim] == -signal.SIGKILL
    said = "has not answered for 2 seconds" if codes[1 - victim] == LOST[1] else "has ended or does"
    assert said in launch.printed()
    assert "Traceback" not in launch.printed()


@pytest.mark.alone
@pytest.mark.parametrize("silent", [0, 1])
def test_a_machine_that_falls_silent_ends_the_other(inputs, silent):
    """A stopped process closes no connection, as a machine without power closes none."""
    name = f"silent-{silent}"
    config = config_of(inputs, name, train_batch_size=2, train_steps=5000, checkpointing_steps=0)
    environment = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    output = inputs.folder / "printed" / name
    launch = Launch(
        output, ["--config", config], 2, main=main_with_quick_heartbeat, environment=environment
    )
    wait_for_lines(inputs.run_dir(name) / "metrics.jsonl", 5, launch)
    os.kill(launch.processes[silent].pid, signal.SIGSTOP)
    other = launch.processes[1 - silent]
    other.join(15)
    os.kill(launch.processes[silent].pid, signal.SIGCONT)
    codes = launch.wait()
    assert other.exitcode == heartbeat.LOST_EXIT_CODE, (codes, launch.printed())
    assert f"machine {silent} (counted from 0) has not answered for 2 seconds" in launch.printed()
    assert codes[silent] in LOST
    assert "Traceback" not in launch.printed()
