"""Whole training runs on tiny inputs, in one or many processes.

Processes come from a fork server that has imported everything once, so a run of four processes
starts in a second. Each runs `run.py`'s own main with the environment that a launcher would give
it.
"""

import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.distributed import TCPStore
from transformers import AutoModel, AutoTokenizer

from helpers import ROOT
from helpers.tiny_models import make_tokenizer, random_backbone
from ml_embed.files.atomic import write_checksums, write_json
from ml_embed.prepare.token_files import (
    CORPUS_SCHEMA,
    QUERY_SCHEMA,
    append_columns,
    list_array,
    text_array,
    token_file,
)
from ml_embed.prepare.tokenizer import fingerprint

STEPS = 9
TIMEOUT = 240  # seconds a tiny run may take: only a hang reaches it, also beside other work
# name -> (task, rows, documents, negatives of each row: lowest and highest)
DATASETS = {
    "answers": ("retrieval", 11, 7, (0, 5)),
    "pairs": ("retrieval", 5, 9, (0, 0)),
    "lonely": ("retrieval", 1, 4, (2, 2)),
    "topics": ("clustering", 6, 8, (0, 4)),
    "polarity": ("classification", 7, 2, (1, 1)),
    "no_negatives": ("classification", 3, 3, (0, 0)),
    "asked_again": ("retrieval", 10, 8, (0, 4)),
    "graded": ("similarity", 7, 7, (0, 0)),
}
SAME_QUERIES = {"asked_again": 3}
"""so many distinct queries a dataset has"""


def write_backbone(folder: Path, seed: int = 0) -> Path:
    """A random three-layer backbone of hidden size 64, with its tokenizer."""
    tokenizer = make_tokenizer()
    backbone = random_backbone(tokenizer)
    torch.manual_seed(seed)
    for parameter in backbone.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_in_bfloat16(folder: Path, backbone: Path) -> Path:
    """A copy of a backbone as published ones are: its weights in bfloat16, rounded."""
    AutoModel.from_pretrained(backbone, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    return folder


def write_tokenized(
    folder: Path,
    tokenizer,
    datasets: Mapping[str, tuple] = DATASETS,
    languages: Mapping[str, Sequence[str | None]] | None = None,
) -> Path:
    """Random token ids as tokenize_data_qwen.py writes them; documents repeat within a dataset.

    `languages`: dataset -> its rows', where it says them.
    """
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def text() -> np.ndarray:
        ids = generator.integers(3, 300, generator.integers(1, 20))
        return np.append(ids, tokenizer.eos_token_id).astype(np.int32)

    described = {}
    for name, (task, rows, documents, (fewest, most)) in datasets.items():
        negatives = [
            generator.integers(0, documents, generator.integers(fewest, most + 1))
            for _ in range(rows)
        ]
        flat = np.concatenate([*negatives, np.empty(0, np.int64)]).astype(np.int64)
        queries = [text() for _ in range(rows)]
        distinct = SAME_QUERIES.get(name, rows)
        columns = [
            text_array([queries[row % distinct] for row in range(rows)]),
            pa.array(generator.integers(0, documents, rows)),
            list_array([len(n) for n in negatives], flat),
        ]
        schema = QUERY_SCHEMA
        if task == "similarity":
            schema = schema.append(pa.field("score", pa.float32()))
            columns.append(pa.array(generator.integers(0, 4, rows) / 3, pa.float32()))
        if name in (languages or {}):
            schema = schema.append(pa.field("language", pa.string()))
            columns.append(pa.array(languages[name], pa.string()))
        with token_file(folder / f"{name}_query.parquet", schema) as file:
            append_columns(file, columns)
        with token_file(folder / f"{name}_corpus.parquet", CORPUS_SCHEMA) as file:
            append_columns(file, [text_array([text() for _ in range(documents)])])
        described[name] = {"rows": rows, "documents": documents}
    manifest = {
        "format_version": 1,
        "eos_id": tokenizer.eos_token_id,
        "vocab_size": 448,
        "datasets": described,
    }
    write_json(
        folder / "manifest.json", manifest | {"tokenizer_fingerprint": fingerprint(tokenizer)}
    )
    return folder


@dataclass(frozen=True)
class Inputs:
    """A folder with `backbone`, `teacher` and `tokenized`, and room for runs."""

    folder: Path

    @classmethod
    def write(cls, folder: Path) -> "Inputs":
        tokenizer = make_tokenizer()
        write_backbone(folder / "backbone")
        write_backbone(folder / "teacher", seed=1)
        write_tokenized(folder / "tokenized", tokenizer)
        return cls(folder)

    def config(self, name: str, **changes: Any) -> Path:
        """Write the config of run `name`: all nestings, every task, one log line per step."""
        config = {
            "model_path": str(self.folder / "backbone"),
            "experiment_id": name,
            "output_dir": str(self.folder / "runs"),
            "tb_dir": str(self.folder / "tb"),
            "cache_dir": str(self.folder / "cache"),
            "train_data_path": str(self.folder / "tokenized"),
            "datasets": {name: {"task": task} for name, (task, *_) in DATASETS.items()},
            "use_mel": True,
            "r": 32,
            "mel_ranks": [8, 16, 32],
            "use_mll": True,
            "use_mrl": True,
            "num_hard_neg": 3,
            "max_seq_length": 16,
            "valid_fraction": 0,
            "warmup_steps": 2,
            "train_epochs": 1,
            "log_interval": 1,
            "report_to": [],
        }
        path = self.folder / f"{name}.json"
        write_json(path, config | changes)
        return path

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def fork_server():
    """A multiprocessing context whose server has imported what a run needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            *("ml_embed.training.setup", "ml_embed.training.loop", __name__, "torch._dynamo"),
            *("peft", "ml_embed.recipe.mining", "ml_embed.recipe.teacher"),
            "ml_embed.evaluation.cube",
        ]
    )
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), before or ""])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def _child(
    main: Callable[..., int] | None,
    arguments: Sequence[str],
    environment: dict[str, str],
    output: Path,
) -> None:
    os.environ.update(environment)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    if main is None:
        from run import main
    sys.exit(main([str(argument) for argument in arguments]))


class Launch:
    """The processes of one run."""

    def __init__(
        self,
        output: Path,
        arguments: Sequence[Any],
        processes: int = 1,
        main: Callable[..., int] | None = None,
        environment: Mapping[str, str] | None = None,
        groups: int = 1,
    ):
        """`main` (a module's function) takes the place of run.py's; `output` is a folder for what
        processes print; `groups` is how many process groups they form one after another."""
        output.mkdir(parents=True, exist_ok=True)
        shared = {
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_MIXED_PRECISION": "no",
        }
        if processes > 1:
            # As a launcher does: it keeps the stores, at ports that the system gave it, so that no
            # other launch can take one in between.
            self._stores = [
                TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
                for _ in range(groups)
            ]
            ports = [str(store.port) for store in self._stores]
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0]}
            shared |= {"NEXT_PORTS": " ".join(ports[1:]), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        self.outputs = [output / f"{number}.txt" for number in range(processes)]
        self.processes = []
        for number, path in enumerate(self.outputs):
            path.unlink(missing_ok=True)  # of an earlier launch
            own = {"RANK": str(number), "LOCAL_RANK": str(number)} if processes > 1 else {}
            own = shared | own | dict(environment or {})
            process = fork_server().Process(target=_child, args=(main, list(arguments), own, path))
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = TIMEOUT) -> list[int]:
        """The exit codes; processes that do not end in time are killed and fail the test."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [number for number, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        assert not hanging, f"processes {hanging} did not end in {timeout} s:\n{self.printed()}"
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """SIGKILL whatever still runs."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def printed(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.outputs if path.exists())


def run_each(configs: list[str], flags: Sequence[str] = ()) -> int:
    """run.py's main for one config after another, in the same processes; see `launch_each`."""
    from run import main

    codes = []
    for config in configs:
        codes.append(main(["--config", config, *flags]))
        AcceleratorState._reset_state(reset_partial_state=True)
        if os.environ.get("NEXT_PORTS"):  # the next run makes a process group of its own
            port, _, rest = os.environ["NEXT_PORTS"].partition(" ")
            os.environ.update(MASTER_PORT=port, NEXT_PORTS=rest)
    return max(codes)


def launch_each(
    output: Path, configs: Sequence[Path], processes: int, main: Callable[..., int] = run_each
) -> Launch:
    """A launch that trains one config after another."""
    return Launch(output, configs, processes, main=main, groups=len(configs))


def run(
    inputs: Inputs,
    config: Path,
    *arguments: Any,
    processes: int = 1,
    expected: int = 0,
    **options: Any,
) -> str:
    """One run to its end, in `expected` on every process; returns what they printed."""
    launch = Launch(
        inputs.folder / "printed" / config.stem,
        ["--config", config, *arguments],
        processes,
        **options,
    )
    codes = launch.wait()
    assert codes == [expected] * processes, (codes, launch.printed())
    return launch.printed()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("time", "seconds", "tokens_per_second")}
        for line in lines
    ]


def final_state(run_dir: Path, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """The tensors of the newest resume state."""
    newest = max(
        (run_dir / "resume").glob("step_*"), key=lambda path: int(path.name.removeprefix("step_"))
    )
    return load_file(newest / file)


def rewrite_state(state: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Let `change` alter the content of a resume state's state.json, as if it had been saved so."""
    path = state / "state.json"
    progress = json.loads(path.read_text())
    change(progress)
    write_json(path, progress)
    (state / "checksums.json").unlink()
    write_checksums(state)


def config_of(inputs, name: str, **changes):
    settings = {
        "train_batch_size": 4,
        "train_steps": STEPS,
        "checkpointing_steps": 3,
        "mrl_dims": [32],
    }
    return inputs.config(name, **settings | changes)


def final_bytes(run_dir, steps: int = STEPS) -> dict[str, bytes]:
    folders = [run_dir / f"step_{steps}", run_dir / "resume" / f"step_{steps}"]
    return {
        str(p.relative_to(run_dir)): p.read_bytes()
        for f in folders
        for p in f.rglob("*.safetensors")
    }


def wait_for_lines(path: Path, count: int, launch: Launch | Path, seconds: float = 60) -> None:
    """Until metrics.jsonl has so many lines; if it never has, `launch`'s output is shown."""
    deadline = time.monotonic() + seconds
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline, printed_by(launch)
        time.sleep(0.01)


def printed_by(launch: Launch | Path) -> str:
    return launch.printed() if isinstance(launch, Launch) else launch.read_text()


def victim(folder: Path) -> dict[str, str]:
    """The environment of a launch whose second process dies in its second piece (`dying`)."""
    return {"VICTIM": "1", "DEAD": str(folder / "dead")}


def dying(work: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does a piece of work; the victim dies in it, for which the others wait."""
    is_victim, dead = os.environ["RANK"] == os.environ["VICTIM"], Path(os.environ["DEAD"])
    calls = iter(range(1000))

    def work_or_die(*piece):
        if is_victim and next(calls) == 1:
            dead.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while not is_victim and not dead.exists():
            time.sleep(0.01)
        work(*piece)

    return work_or_die
