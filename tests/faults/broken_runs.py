"""Training runs that are broken, continued, and compared with an unbroken run, to the bit.

Each run meets a few faults, chosen and timed by a seed: killed at any moment, killed while a
checkpoint is being written, told to stop, its disk full or broken, its newest checkpoint torn or
with a bit flipped.
"""

import errno
import functools
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from helpers.tiny_runs import TIMEOUT, Inputs, Launch, final_bytes, metrics
from safetensors import SafetensorError
from tensorboard.summary.writer.record_writer import RecordWriter

import run as run_script
from ml_embed.files.atomic import checksum_problem
from ml_embed.files.paths import numbered_folders

STEPS = 14  # more than an epoch, so that checkpoints of epochs are broken too
STATE_FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "checksums.json")
STOPPED, REFUSED, KILLED = 75, 2, -signal.SIGKILL
FAULT_VARIABLE = "FAULT_DISK_FAILS"
"""ERRNO:N: the error, and how often all is well before."""


def main_on_failing_disk(arguments: list[str]) -> int:
    """run.py's main on a disk that fails from the n-th time on that something is done with it.

    Python's own calls fail, and those of safetensors and of TensorBoard's thread, each as it
    reports that.
    """
    number, remaining = map(int, os.environ[FAULT_VARIABLE].split(":"))

    def failing(module: Any, name: str, error: Exception) -> None:
        call = getattr(module, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal remaining
            remaining -= 1
            if remaining < 0:
                raise error
            return call(*args, **kwargs)

        setattr(module, name, called)

    said = os.strerror(number)
    for name in ("fsync", "rename", "replace", "mkdir"):
        failing(os, name, OSError(number, said))
    in_rust = SafetensorError(f"Error while serializing: I/O error: {said} (os error {number})")
    failing(safetensors.torch, "serialize_file", in_rust)
    failing(RecordWriter, "write", OSError(number, said))
    return run_script.main(arguments)


def has_met(launch: Launch) -> bool:
    """Whether the processes of a run have found each other and begun to load the model."""
    return "Loading weights" in launch.printed()


class BrokenRuns:
    """Runs of one config, each with faults of its own; all are to end as the unbroken one does."""

    KILLS = ("killed", "killed_while_writing", "told_to_stop")
    DAMAGES = ("disk_full", "disk_broken", "torn", "flipped")

    def __init__(self, folder: Path, processes: int = 1):
        self.inputs, self.processes = Inputs.write(folder), processes
        self.random = np.random.default_rng(0)
        self.finish("unbroken")
        self.expected = self.outcome("unbroken")
        started = time.monotonic()
        self.finish("unbroken-again")
        self.seconds = time.monotonic() - started
        assert self.outcome("unbroken-again") == self.expected

    def start(
        self, name: str, main: Callable[[list[str]], int] | None = None, **environment: str
    ) -> Launch:
        config = self.inputs.config(
            name,
            train_steps=STEPS,
            train_batch_size=4 // self.processes,
            checkpointing_steps=2,
            log_interval=3,
            validation_steps=5,
            valid_fraction=0.2,
            save_total_limit=2,
            mrl_dims=[32],
            report_to=["tensorboard"],
        )
        arguments = ["--config", config, "--resume", "auto"]
        printed = self.inputs.folder / "printed" / name
        return Launch(printed, arguments, self.processes, main=main, environment=environment)

    def finish(self, name: str) -> str:
        launch = self.start(name)
        codes = launch.wait()
        assert codes == [0] * self.processes, (codes, launch.printed())
        return launch.printed()

    def outcome(self, name: str) -> tuple[dict[str, bytes], list[dict], list[str]]:
        """The bytes of the last state and the last model's weights, the metrics but for the clock,
        and all files."""
        run_dir = self.inputs.run_dir(name)
        files = final_bytes(run_dir, STEPS)
        # A run that was told to stop also keeps the step it stopped after, in the place of an older
        # one.
        names = [
            re.sub(r"step_\d+", "step", str(path.relative_to(run_dir)))
            for path in run_dir.rglob("*")
        ]
        return files, metrics(run_dir), sorted(names)

    def try_one(self, kind: str, seed: int, faults: tuple[str, ...]) -> dict:
        """One run that meets up to four of these faults: a case of `storm.py`."""
        name, met = f"broken-{seed}", []
        self.random = np.random.default_rng(seed)
        wanted = self.random.integers(1, 5)
        outcome, detail = "equal", ""
        try:
            for _ in range(3 * wanted):  # before the first step or after the last, a fault is none
                fault = faults[self.random.integers(len(faults))]
                if len(met) < wanted and getattr(self, fault)(name):
                    met.append(fault)
            self.finish(name)
            if left := [str(path) for path in self.inputs.run_dir(name).rglob(".*")]:
                outcome, detail = "lost", f"half files are left: {left}"
            elif self.outcome(name) != self.expected:
                outcome, detail = "silent", "it ended otherwise than the unbroken run"
        except AssertionError as error:
            detail = str(error)
            hangs = "did not end" in detail
            outcome = "hang" if hangs else "traceback" if "Traceback" in detail else "lost"
        shutil.rmtree(self.inputs.run_dir(name), ignore_errors=True)
        return {"kind": kind, "what": ", ".join(met), "outcome": outcome, "detail": detail}

    def killed(self, name: str) -> bool:
        """SIGKILL to one process at any moment; the others must then end by themselves."""
        launch = self.start(name)
        self._wait_a_while()
        victim = launch.processes[self.random.integers(self.processes)]
        victim.kill()
        codes = self._codes_of_survivors(launch)
        assert "Traceback" not in launch.printed(), launch.printed()
        return KILLED in codes

    def killed_while_writing(self, name: str) -> bool:
        """SIGKILL to the writer a moment after a checkpoint was begun."""
        launch = self.start(name)
        wait_for = self.random.integers(1, 4)  # the how-manieth folder that is begun
        run_dir, begun = self.inputs.run_dir(name), set()
        deadline = time.monotonic() + TIMEOUT
        while (
            launch.processes[0].is_alive() and len(begun) < wait_for and time.monotonic() < deadline
        ):
            if has_met(launch):  # what an earlier fault has left is cleared away by then
                begun |= {
                    path
                    for folder in (run_dir, run_dir / "resume")
                    for path in folder.glob(".step_*.partial")
                }
            time.sleep(0.0005)
        time.sleep(self.random.uniform(0, 0.03))
        launch.processes[0].kill()
        codes = self._codes_of_survivors(launch)
        return KILLED in codes

    def told_to_stop(self, name: str) -> bool:
        """SIGTERM to one process at any moment: all stop after the same step, with a code of their
        own."""
        launch = self.start(name)
        self._wait_a_while()
        launch.processes[self.random.integers(self.processes)].terminate()
        codes = launch.wait()
        # Before the first step the signal ends the process as it ends any other.
        assert set(codes) in ({0}, {STOPPED}) or -signal.SIGTERM in codes, (codes, launch.printed())
        return codes[0] == STOPPED

    def disk_full(self, name: str) -> bool:
        return self._disk_fails(name, errno.ENOSPC, "o space left")

    def disk_broken(self, name: str) -> bool:
        return self._disk_fails(name, errno.EIO, "nput/output error")

    def _disk_fails(self, name: str, number: int, said: str) -> bool:
        fault = f"{number}:{self.random.integers(0, 300)}"
        launch = self.start(name, main_on_failing_disk, **{FAULT_VARIABLE: fault})
        codes = launch.wait()
        printed = launch.printed()
        assert set(codes) <= {0, REFUSED}, (codes, printed)
        assert "Traceback" not in printed, printed
        if codes[0] == 0:
            return False
        assert said in printed, printed
        return True

    def torn(self, name: str) -> bool:
        """A file of the newest checkpoint is cut off somewhere."""
        if (path := self._file_of_newest(name)) is None:
            return False
        os.truncate(path, self.random.integers(0, path.stat().st_size))
        return True

    def flipped(self, name: str) -> bool:
        """One bit of the newest checkpoint is wrong."""
        if (path := self._file_of_newest(name)) is None:
            return False
        data = bytearray(path.read_bytes())
        data[self.random.integers(len(data))] ^= 1 << self.random.integers(8)
        path.write_bytes(data)
        return True

    @staticmethod
    def _codes_of_survivors(launch: Launch) -> list[int]:
        """Exit codes after one process was killed: the others end by themselves."""
        if not has_met(launch):
            launch.kill()  # they still wait for one that will not come: a launcher ends those
        codes = launch.wait()
        assert set(codes) <= {0, KILLED, REFUSED}, (codes, launch.printed())
        return codes

    def _wait_a_while(self) -> None:
        """As long as a run may take, with most of the weight on the part in which it trains."""
        time.sleep(self.seconds * self.random.uniform(0, 1) ** 0.5)

    def _file_of_newest(self, name: str) -> Path | None:
        """A file to damage, if a whole state remains beside it."""
        states = numbered_folders(self.inputs.run_dir(name) / "resume")
        if len(states) < 2 or any(checksum_problem(path) for _, path in states):
            return None
        return states[-1][1] / STATE_FILES[self.random.integers(len(STATE_FILES))]


@functools.cache
def broken_runs(folder: Path, processes: int) -> BrokenRuns:
    """Those that the cases of one process share, with their unbroken run."""
    return BrokenRuns(folder / f"{processes}-processes", processes)
