"""Break training runs in every way at hand, continue them, and compare what comes out with an
unbroken run, to the bit.

    python tests/faults/storm.py --runs 50 --seed 0 [--processes 2] [--folder DIR]

Each run meets a few faults, chosen and timed by the seed: killed at any moment, killed while a
checkpoint is being
written, told to stop, its disk full, its newest checkpoint torn or with a bit flipped. The last
line is a JSON object.
"""

import argparse
import collections
import contextlib
import errno
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path[:0] = [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[2]),
]  # when run as a script

from helpers.tiny_runs import TIMEOUT, Inputs, Launch, metrics  # noqa: E402

import run as run_script  # noqa: E402
from ml_embed.files.atomic import checksum_problem  # noqa: E402
from ml_embed.files.paths import numbered_folders  # noqa: E402

STEPS = 14  # more than an epoch, so that checkpoints of epochs are broken too
STATE_FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "checksums.json")
STOPPED, REFUSED, KILLED = 75, 2, -signal.SIGKILL
FILL_VARIABLE = "FAULT_DISK_FULL_AFTER"


def main_on_full_disk(arguments: list[str]) -> int:
    """run.py's main on a disk that is full from the n-th time on that something is forced to it."""
    remaining = int(os.environ[FILL_VARIABLE])
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    os.fsync = failing
    return run_script.main(arguments)


def has_met(launch: Launch) -> bool:
    """Whether the processes of a run have found each other and begun to load the model."""
    return "Loading weights" in launch.printed()


class Storm:
    """Runs of one config, each with faults of its own."""

    def __init__(self, inputs: Inputs, seed: int, processes: int = 1):
        self.inputs, self.processes, self.seed = inputs, processes, seed
        self.random = np.random.default_rng(seed)
        self.faults: collections.Counter[str] = collections.Counter()
        self.runs = self.bit_equal = 0
        self._kinds: list[Callable[[str], str | None]] = [
            self.killed,
            self.killed_while_writing,
            self.told_to_stop,
            self.disk_full,
            self.torn,
            self.flipped,
        ]
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
        last = [run_dir / "resume" / f"step_{STEPS}", run_dir / f"step_{STEPS}"]
        files = {
            f"{path.parent.name}/{path.name}": path.read_bytes()
            for f in last
            for path in f.rglob("*.safetensors")
        }
        # A run that was told to stop also keeps the step it stopped after, in the place of an older
        # one.
        names = [
            re.sub(r"step_\d+", "step", str(path.relative_to(run_dir)))
            for path in run_dir.rglob("*")
        ]
        return files, metrics(run_dir), sorted(names)

    def run(self, faults: int) -> None:
        """One run with that many faults; raises AssertionError where anything but a clean refusal
        or end is seen."""
        name = f"broken-{self.seed}-{self.runs}"
        met = 0
        for _ in range(
            3 * faults
        ):  # a fault that comes before the first step or after the last one is none
            kind = self._kinds[self.random.integers(len(self._kinds))]
            if met < faults and (injected := kind(name)):
                self.faults[injected] += 1
                met += 1
        self.finish(name)
        left = [str(path) for path in self.inputs.run_dir(name).rglob(".*")]
        assert not left, f"half files are left: {left}"
        self.runs += 1
        if self.outcome(name) == self.expected:
            self.bit_equal += 1
            shutil.rmtree(self.inputs.run_dir(name))
        else:
            print(
                f"{name} is not as the unbroken run; it is kept if --folder is given",
                file=sys.stderr,
                flush=True,
            )

    def killed(self, name: str) -> str | None:
        """SIGKILL to one process at any moment; the others must then end by themselves."""
        launch = self.start(name)
        self._wait_a_while()
        victim = launch.processes[self.random.integers(self.processes)]
        victim.kill()
        codes = self._codes_of_survivors(launch)
        assert "Traceback" not in launch.printed(), launch.printed()
        return "killed" if KILLED in codes else None

    def killed_while_writing(self, name: str) -> str | None:
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
        return "killed while writing" if KILLED in codes else None

    def told_to_stop(self, name: str) -> str | None:
        """SIGTERM to one process at any moment: all stop after the same step, with a code of their
        own."""
        launch = self.start(name)
        self._wait_a_while()
        launch.processes[self.random.integers(self.processes)].terminate()
        codes = launch.wait()
        # Before the first step the signal ends the process as it ends any other.
        assert set(codes) in ({0}, {STOPPED}) or -signal.SIGTERM in codes, (codes, launch.printed())
        return "told to stop" if codes[0] == STOPPED else None

    def disk_full(self, name: str) -> str | None:
        launch = self.start(
            name, main_on_full_disk, **{FILL_VARIABLE: str(self.random.integers(0, 120))}
        )
        codes = launch.wait()
        printed = launch.printed()
        assert set(codes) <= {0, REFUSED}, (codes, printed)
        assert "Traceback" not in printed, printed
        if codes[0] == 0:
            return None
        assert "o space left" in printed, printed
        return "disk full"

    def torn(self, name: str) -> str | None:
        """A file of the newest checkpoint is cut off somewhere."""
        if (path := self._file_of_newest(name)) is None:
            return None
        os.truncate(path, self.random.integers(0, path.stat().st_size))
        return "torn"

    def flipped(self, name: str) -> str | None:
        """One bit of the newest checkpoint is wrong."""
        if (path := self._file_of_newest(name)) is None:
            return None
        data = bytearray(path.read_bytes())
        data[self.random.integers(len(data))] ^= 1 << self.random.integers(8)
        path.write_bytes(data)
        return "flipped"

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

    def summary(self) -> dict:
        faults = dict(sorted(self.faults.items()))
        return {
            "runs": self.runs,
            "faults": sum(faults.values()),
            "by_kind": faults,
            "bit_equal": self.bit_equal,
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20, help="runs to break (default: 20)")
    parser.add_argument(
        "--faults", type=int, default=4, help="faults a run meets at most (default: 4)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="chooses faults and moments (default: 0)"
    )
    parser.add_argument(
        "--processes", type=int, choices=(1, 2, 4), default=1, help="of each run (default: 1)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where to work; default: a temporary folder, removed at the end"
    )
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        storm = Storm(Inputs.write(folder / "inputs"), options.seed, options.processes)
        for _ in range(options.runs):
            storm.run(int(storm.random.integers(1, options.faults + 1)))
            print(json.dumps(storm.summary()), flush=True)
    return 0 if storm.bit_equal == storm.runs else 1


if __name__ == "__main__":
    sys.exit(main())
