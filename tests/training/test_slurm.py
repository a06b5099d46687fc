"""`scripts/train.slurm` under stand-ins of Slurm's commands; its machines are on loopback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.tiny_runs import Inputs, config_of, final_bytes, metrics, run, wait_for_lines

import run as run_script

# As Slurm's: a task per machine, which knows its number; signals go on to the tasks alone.
SRUN = """#!/bin/bash
tasks=()
forward() { kill -USR1 "${tasks[@]}"; }
trap forward USR1
for ((machine = 0; machine < SLURM_JOB_NUM_NODES; machine++)); do
    SLURM_NODEID=$machine "$@" & tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2> /dev/null; do wait "$task"; done
    wait "$task" || code=$?
done
exit "$code"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$SAID"; fi
"""
# A launcher whose process ends with $CODE, or after SIGTERM; python says $DONE of the run.
ACCELERATE = """#!/bin/bash
trap 'echo the launcher was told >> "$SAID"' TERM USR1
bash -c 'trap "echo a process saves >> $SAID; exit 75" TERM; touch "$SAID.started"
for i in {1..100}; do [ "$CODE" ] && exit "$CODE"; sleep 0.1; done' || exit 1
"""
PYTHON = """#!/bin/bash
[[ "$*" == "run.py --config x.json --is-done" ]] && exit "$DONE"
exit 99
"""


class Slurm:
    """A queue of one job."""

    def __init__(self, folder: Path, machines: int, **environment: str):
        commands = folder / "commands"
        commands.mkdir()
        self.said, self.printed = folder / "said", folder / "printed"
        self._path = commands
        self.add("srun", SRUN)
        self.add("scontrol", SCONTROL)
        own = {
            "PATH": os.pathsep.join(
                [str(commands), str(Path(sys.executable).parent), "/usr/bin:/bin"]
            ),
            "SLURM_JOB_NUM_NODES": str(machines),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_GPUS_ON_NODE": "1",
            "ACCELERATE_CONFIG": "configs/accelerate_cpu.yaml",
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "SAID": str(self.said),
        }
        self._environment = os.environ | own | environment

    def add(self, command: str, text: str) -> None:
        (self._path / command).write_text(text)
        (self._path / command).chmod(0o755)

    def start(self, *arguments: str) -> subprocess.Popen:
        command = ["bash", str(ROOT / "scripts" / "train.slurm"), *arguments]
        with self.printed.open("ab") as file:
            return subprocess.Popen(
                command, env=self._environment, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT
            )

    def notes(self) -> list[str]:
        return self.said.read_text().splitlines() if self.said.exists() else []


@pytest.mark.slow
def test_a_run_of_two_machines_is_stopped_and_queued_again(tmp_path):
    inputs = Inputs.write(tmp_path / "inputs")
    settings = {"train_batch_size": 2, "train_steps": 60, "checkpointing_steps": 0}
    run(inputs, config_of(inputs, "unbroken", **settings), processes=2)
    config = config_of(inputs, "queued", **settings)
    slurm, folder = Slurm(tmp_path, machines=2), inputs.run_dir("queued")
    is_done = ["--config", str(config), "--is-done"]
    assert run_script.main(is_done) == 75
    job = slurm.start("--config", str(config))
    wait_for_lines(folder / "metrics.jsonl", 3, slurm.printed)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 0, slurm.printed.read_text()
    assert slurm.notes() == [f"requeue {os.getpid()}"]
    assert "stopped by a signal after step" in slurm.printed.read_text()
    assert not (folder / "step_60").exists()
    assert run_script.main(is_done) == 75
    assert "continuing" in run(inputs, config, "--resume", "auto", processes=2)
    assert metrics(folder) == metrics(inputs.run_dir("unbroken"))
    assert final_bytes(folder, 60) == final_bytes(inputs.run_dir("unbroken"), 60)
    assert run_script.main(is_done) == 0


@pytest.mark.parametrize(
    ("told", "code", "done", "ends_with", "notes"),
    [
        (signal.SIGUSR1, "", 75, 0, ["a process saves", "requeue 7"]),
        (signal.SIGUSR1, "", 0, 1, ["a process saves"]),  # it was at its end
        (signal.SIGUSR1, "", 2, 1, ["a process saves"]),  # the config cannot be read
        (signal.SIGTERM, "", 75, 1, ["a process saves"]),  # it was cancelled
        (None, "3", 75, 1, []),  # it failed by itself
    ],
)
def test_only_a_run_whose_time_is_over_is_queued_again(
    tmp_path, told, code, done, ends_with, notes
):
    """And the signal reaches the launcher's processes, not the launcher."""
    slurm = Slurm(tmp_path, machines=1, CODE=code, DONE=str(done), SLURM_JOB_ID="7")
    slurm.add("accelerate", ACCELERATE)
    slurm.add("python", PYTHON)
    job = slurm.start("--config", "x.json")
    if told:
        started = slurm.said.with_name("said.started")
        while not started.exists():
            assert job.poll() is None, slurm.printed.read_text()
        job.send_signal(told)
    assert job.wait(20) == ends_with, slurm.printed.read_text()
    assert slurm.notes() == notes
