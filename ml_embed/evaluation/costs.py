"""What cuts of a model cost here: the time of one text and the memory, each in a new process.

Neither depends on a vector's length, so a (rank, depth) is measured once for all dims.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

from ml_embed.errors import UserError
from ml_embed.files.digests import value_digest
from ml_embed.files.json_file import read_json
from ml_embed.files.model_identity import model_identity
from ml_embed.files.model_source import find_model_folder
from ml_embed.inference.embedder import Embedder
from ml_embed.inference.encoding import choose_device
from ml_embed.model_folders.cut import Cut, table_name
from ml_embed.notices import notice

COSTS_FILE = "costs.json"
MOST_TEXTS = 64
"""Texts that are timed, evenly spaced among those given."""
ROUNDS = 5
"""Times that each of them is timed, after a first time that is not."""


@dataclass(frozen=True)
class Cost:
    """What a rank and depth needed."""

    rank: int
    """0 is a whole token table"""
    depth: int
    parameters: int
    latency: float
    """seconds to encode one text, the median over texts and rounds"""
    slowest: float
    """seconds that 95 of 100 texts stay below"""
    memory: int
    """bytes at the most, weights and work, beyond those of a process that has only imported this
    package; on a GPU the GPU's"""


@dataclass(frozen=True)
class Costs:
    """What the cuts of a model cost on one machine."""

    model: str
    """as the user wrote it"""
    device: str
    threads: int
    """of the CPU"""
    texts: int
    """that were timed, one at a time"""
    made_of: str
    """digest of the model, the texts, device and threads"""
    cuts: tuple[Cost, ...]

    def of(self, cut: Cut, parameters: int) -> Cost | None:
        """What a cut with so many parameters costs; None where that was not measured."""
        wanted = (cut.rank, cut.depth, parameters)
        found = (c for c in self.cuts if (c.rank, c.depth, c.parameters) == wanted)
        return next(found, None)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, path: Path) -> "Costs":
        """Raises UserError for what `to_json` did not give."""
        remedy = "measure again with scripts/choose_cut.py --overwrite"
        values = read_json(path, remedy)
        try:
            return cls(**values | {"cuts": tuple(Cost(**cost) for cost in values["cuts"])})
        except (TypeError, KeyError) as error:
            raise UserError(f"{path} is not what it should be ({error}); {remedy}") from None


def measure_costs(
    folder: str | Path,
    cuts: Iterable[Cut],
    texts: Sequence[str],
    device: str | None = None,
    known: Costs | None = None,
    progress: bool = True,
    again: bool = False,
) -> Costs:
    """Time and memory of the ranks and depths of cuts, one after another, each in a new process.

    Args:
        folder: a model folder, a plain backbone, or the name of one on the hub.
        cuts: trained or not.
        texts: what is encoded, one text at a time, without a prompt.
        device: None is the first GPU if there is one, else the CPU.
        known: what was measured before; if it was of the same model and texts and on such a device,
            its cuts are not measured again.
        progress: a bar on stderr, on terminals.
        again: measure these cuts though they are known; others that are known stay.
    Raises:
        UserError: there is no text, or the model cannot be read.
    """
    if not texts:
        raise UserError("there is no text to measure with")
    path, chosen = find_model_folder(folder), str(choose_device(device))
    step = max(1, len(texts) / MOST_TEXTS)
    timed = [texts[int(i * step)] for i in range(min(len(texts), MOST_TEXTS))]
    threads = torch.get_num_threads()
    made_of = value_digest([model_identity(path), chosen, threads, timed])
    wanted = {(c.rank, c.depth) for c in cuts}
    kept: tuple[Cost, ...] = ()
    if known is not None and known.made_of == made_of:
        kept = tuple(c for c in known.cuts if not again or (c.rank, c.depth) not in wanted)
    elif known is not None and known.cuts:
        notice(_why_dropped(known, chosen, threads))
    if kept and not again:
        notice(f"{len(kept)} cuts were measured before; --overwrite measures them again")
    pairs = sorted(wanted - {(cost.rank, cost.depth) for cost in kept})
    bar = tqdm(pairs, desc="measuring", unit=" cuts", disable=None if progress and pairs else True)
    # A process that has imported the libraries and does nothing forks those that measure: they
    # start at once, and what they hold beyond it is the model's.
    with ProcessPoolExecutor(1, get_context("spawn")) as host:
        found = [
            host.submit(_in_new_process, path, rank, depth, chosen, timed, threads).result()
            for rank, depth in bar
        ]
    measured = sorted((*kept, *found), key=lambda cost: (cost.rank, cost.depth))
    return Costs(str(folder), chosen, threads, len(timed), made_of, tuple(measured))


def _why_dropped(known: Costs, device: str, threads: int) -> str:
    """What makes the earlier measurements no match for those of now."""
    if known.device != device:
        why = f"on {known.device}, these are on {device}"
    elif known.threads != threads:
        why = f"with {known.threads} threads, these are with {threads}"
    else:
        why = "with other texts, or when the model was another one"
    return (
        f"the {len(known.cuts)} cuts in {COSTS_FILE} were measured {why}; they do not compare, and "
        "are replaced"
    )


def _in_new_process(
    folder: Path, rank: int, depth: int, device: str, texts: Sequence[str], threads: int
) -> Cost:
    try:
        with ProcessPoolExecutor(1, get_context("fork")) as pool:
            return pool.submit(_measure, folder, rank, depth, device, texts, threads).result()
    except BrokenProcessPool:
        raise UserError(
            f"the process that measured depth {depth}, {table_name(rank)} was killed; where memory "
            "is short, measure smaller ones: --rank and --depth name them"
        ) from None


def _measure(
    folder: Path, rank: int, depth: int, device: str, texts: Sequence[str], threads: int
) -> Cost:
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()  # layers that are left out are meant to be
    transformers.logging.disable_progress_bar()
    before = peak_memory(device)
    model = Embedder.from_pretrained(folder, depth, None, rank or None, device, True)
    list(_seconds(model, texts))
    seconds = [second for _ in range(ROUNDS) for second in _seconds(model, texts)]
    return Cost(
        rank,
        depth,
        model.num_parameters,
        latency=float(np.median(seconds)),
        slowest=float(np.quantile(seconds, 0.95)),
        memory=peak_memory(device) - before,
    )


def _seconds(model: Embedder, texts: Sequence[str]) -> Iterator[float]:
    for text in texts:
        start = time.perf_counter()
        model.encode(text, prompt="", show_progress=False)
        yield time.perf_counter() - start


def peak_memory(device: str = "cpu") -> int:
    """Bytes that this process has held at the most: resident ones, or those of its GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    import resource  # macOS gives bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
