"""Two machines, and commands that `accelerate launch` starts on both."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import ROOT
from helpers.tiny_runs import free_port


@dataclass(frozen=True)
class Machine:
    prefix: list[str]
    """put before a command, it runs on this machine"""
    address: str


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def two_machines() -> Iterator[list[Machine]]:
    """Network namespaces that a veth pair joins, where a test may make them (as root); else both
    machines are on loopback."""
    tag = f"mle{os.getpid() % 10000}"
    names, addresses = (f"{tag}a", f"{tag}b"), ("10.213.77.1", "10.213.77.2")
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            f"{tag}0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            f"{tag}1",
            "netns",
            names[1],
        )
        for number, (name, address) in enumerate(zip(names, addresses, strict=True)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"{tag}{number}")
            for device in ("lo", f"{tag}{number}"):
                ip("-n", name, "link", "set", device, "up")
        yield [
            Machine(["ip", "netns", "exec", n], a) for n, a in zip(names, addresses, strict=True)
        ]
    except (OSError, subprocess.CalledProcessError):
        yield [Machine([], "127.0.0.1")] * 2
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextlib.contextmanager
def launch_on(
    machines: Sequence[Machine], script: str, arguments: Sequence[Any], outputs: Sequence[Path]
) -> Iterator[list[subprocess.Popen]]:
    """`accelerate launch` of one process on each machine; what still runs at the end is killed.

    Args:
        script: of the repository.
        outputs: of each machine, a file for what its processes print.
    """
    port, launchers = free_port(), []
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    try:
        for rank, (machine, output) in enumerate(zip(machines, outputs, strict=True)):
            command = [*machine.prefix, sys.executable, "-m", "accelerate.commands.launch"]
            command += ["--config_file", str(ROOT / "configs" / "accelerate_cpu.yaml")]
            command += ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
            command += ["--main_process_ip", machines[0].address, "--main_process_port", str(port)]
            command += [str(ROOT / script), *map(str, arguments)]
            with output.open("wb") as file:
                launchers.append(
                    subprocess.Popen(
                        command, env=environment, stdout=file, stderr=subprocess.STDOUT
                    )
                )
        yield launchers
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                kill_machine(launcher)


def kill_machine(launcher: subprocess.Popen) -> None:
    """SIGKILL a launcher and all that it started."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True
    )
    for pid in [launcher.pid, *map(int, children.stdout.split())]:
        os.kill(pid, signal.SIGKILL)
    launcher.wait()
