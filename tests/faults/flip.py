"""Flip one bit of one file that a command reads, and compare what the command then makes."""

import contextlib
import functools
import io
import itertools
import logging
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from helpers.teachers import LetterModel, teacher_options
from helpers.tiny_world import TinyWorld, make_world

import run as run_script
import tokenize_data_qwen
from ml_embed.data.store import open_converted
from ml_embed.files import digests
from ml_embed.files.model_identity import model_identity
from ml_embed.recipe.mining import Filter, MiningOptions, mine_folder
from ml_embed.recipe.teacher import embed_teacher
from scripts import export_model, report

EDGE = 600
"""bytes at each end of a file, where headers and footers are, that every other flip is in"""
STEPS = 3


@dataclass(frozen=True)
class Trial:
    """What a command made: its exit code or traceback, what it said, and its results."""

    code: int | None
    said: str
    result: Any = None


@dataclass(frozen=True)
class Kind:
    """A kind of files, and the command that reads them."""

    files: Callable[["Bench"], list[Path]]
    command: Callable[["Bench"], Trial]


class Bench:
    """A tiny world with one of everything that lies on disk; what a flip damages is put back."""

    def __init__(self, folder: Path):
        (folder / "world").mkdir(parents=True)
        self.folder = folder
        self.world: TinyWorld = make_world(folder / "world")
        vectors = teacher_options(self.world, folder / "vectors")
        embed_teacher(LetterModel(), vectors, progress=False)
        mined = MiningOptions(self.world.raw, folder / "mined", Filter(count=2))
        mine_folder(LetterModel(), mined, progress=False)
        done = self.run("base")
        assert done.code == 0, done.said
        run_dir = folder / "runs" / "base"
        shutil.copytree(run_dir, folder / "runs" / "finished")
        for last in (run_dir / f"step_{STEPS}", run_dir / "resume" / f"step_{STEPS}"):
            shutil.rmtree(last)
        self.model = run_dir / f"step_{STEPS - 1}"
        self.undamaged: dict[Callable, Trial] = {}
        for command in {kind.command for kind in KINDS.values()}:
            self.undamaged[command] = command(self)
            assert self.undamaged[command].code == 0, self.undamaged[command].said

    def run(self, name: str, *flags: str, **changes: Any) -> Trial:
        """A run of run.py; its result is the weights that it ends with."""
        changes = {
            "output_dir": str(self.folder / "runs"),
            "cache_dir": str(self.folder / "cache"),
            "teacher_vectors_path": str(self.folder / "vectors"),
            "kd_loss": "similarity",
            "train_steps": STEPS,
            "checkpointing_steps": 1,
            "validation_steps": 0,
            "log_interval": 1,
        } | changes
        config = self.world.write_config(self.folder / f"{name}.json", name, **changes)
        trial = in_process(run_script.main, "--config", str(config), "--quiet", *flags)
        last = self.folder / "runs" / name / f"step_{changes['train_steps']}"
        return trial if trial.code != 0 else Trial(0, trial.said, model_identity(last))

    def start(self) -> Trial:
        """A new run with everything verified."""
        shutil.rmtree(self.folder / "runs" / "new", ignore_errors=True)
        return self.run("new", "--verify", model_path=str(self.model), train_steps=1)

    def resume(self) -> Trial:
        """The base run continued for a step; the run itself stays as it is."""
        base, kept = self.folder / "runs" / "base", self.folder / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(base, kept)
        try:
            return self.run("base", "--resume", "auto", "--verify")
        finally:
            shutil.rmtree(base)
            kept.rename(base)

    def export(self) -> Trial:
        """A cut of the base run's model."""
        output = self.folder / "cut"
        shutil.rmtree(output, ignore_errors=True)
        flags = ["--model", str(self.model), "--output", str(output), "--rank", "16", "--verify"]
        trial = in_process(export_model.main, *flags)
        return trial if trial.code != 0 else Trial(0, trial.said, model_identity(output))

    def tokenize(self) -> Trial:
        """The mined data as tokens."""
        output = self.folder / "tokens"
        shutil.rmtree(output, ignore_errors=True)
        flags = ["--tokenizer", str(self.world.backbone), "--input", str(self.folder / "mined")]
        trial = in_process(tokenize_data_qwen.main, *flags, "--output", str(output), "--quiet")
        made = {path.name: path.read_bytes() for path in output.glob("*.parquet")}
        return trial if trial.code != 0 else Trial(0, trial.said, made)

    def report(self) -> Trial:
        """The page of the finished run."""
        run_dir, page = self.folder / "runs" / "finished", self.folder / "report.html"
        trial = in_process(report.main, str(run_dir), "--output", str(page))
        return trial if trial.code != 0 else Trial(0, trial.said, page.read_bytes())

    def states(self) -> list[Path]:
        """The files of the newest resume state."""
        return files_in(self.folder / "runs" / "base" / "resume" / f"step_{STEPS - 1}")

    def arrays(self) -> list[Path]:
        """The converted data that a run maps."""
        return [path for store in self.folder.glob("cache/store-*/") for path in files_in(store)]

    def memories(self) -> list[Path]:
        """Remembered digests."""
        return [path for path in self.folder.rglob(digests.MEMORY) if path.is_file()]


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")


KINDS = {
    "tokenized data": Kind(lambda bench: files_in(bench.world.tokenized), Bench.start),
    "converted data": Kind(Bench.arrays, Bench.start),
    "start model": Kind(lambda bench: files_in(bench.model), Bench.start),
    "model to cut": Kind(lambda bench: files_in(bench.model), Bench.export),
    "model begun with": Kind(lambda bench: files_in(bench.world.backbone), Bench.resume),
    "mined data": Kind(lambda bench: files_in(bench.folder / "mined"), Bench.tokenize),
    "teacher vectors": Kind(lambda bench: files_in(bench.folder / "vectors"), Bench.start),
    "resume state": Kind(Bench.states, Bench.resume),
    "remembered digests": Kind(Bench.memories, Bench.start),
    "metrics": Kind(
        lambda bench: [bench.folder / "runs" / "finished" / "metrics.jsonl"], Bench.report
    ),
}


def in_process(main: Callable[[list[str]], int], *arguments: str) -> Trial:
    """A command's exit code, None for a traceback, and what it printed."""
    open_converted.cache_clear()
    digests._file_digest.cache_clear()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            return Trial(main(list(arguments)), said.getvalue())
        except Exception:
            return Trial(None, said.getvalue() + traceback.format_exc())


@functools.cache
def bench_in(folder: Path) -> Bench:
    """Made once per folder and process."""
    logging.getLogger("ml_embed").setLevel(logging.WARNING)
    names = (folder / f"world-{number}" for number in itertools.count())
    return Bench(next(path for path in names if not path.exists()))


def try_one(seed: int, folder: Path) -> dict:
    """Flip the bit that `seed` names and run the command that reads it.

    Args:
        seed: chooses kind, file and bit.
        folder: of the case; the world that all flips of a process share lies beside it.
    Returns:
        kind "flip", what was flipped, the outcome ("equal", "error", "traceback" or "silent") and
        a detail to look at.
    """
    bench, random = bench_in(folder.parent), np.random.default_rng(seed)
    name = list(KINDS)[random.integers(len(KINDS))]
    kind = KINDS[name]
    files = [path for path in kind.files(bench) if path.stat().st_size]
    path = files[random.integers(len(files))]
    whole = path.read_bytes()
    place = int(random.integers(len(whole)))
    if random.integers(2):
        place = min(place % EDGE, len(whole) - 1)
        place = place if random.integers(2) else len(whole) - 1 - place
    bit = int(random.integers(8))
    damaged = bytearray(whole)
    damaged[place] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        trial = kind.command(bench)
    finally:
        path.write_bytes(whole)
    outcome = "equal" if trial.result == bench.undamaged[kind.command].result else "silent"
    if trial.code is None:
        outcome = "traceback"
    elif trial.code or (outcome == "silent" and path.name in trial.said):
        outcome = "error"  # or a warning that names the file
    what = f"{name}: {path.relative_to(bench.folder)}, bit {bit} of byte {place}"
    return {"kind": "flip", "what": what, "outcome": outcome, "detail": trial.said[-600:]}
