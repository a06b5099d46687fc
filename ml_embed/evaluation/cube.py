"""Quality over the cube rank x depth x dim: one forward pass per rank gives all depths and dims.

Letters: E exits, N texts, H hidden size, D vector length.
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from ml_embed.config import DatasetConfig
from ml_embed.distributed.agreement import check_agreement
from ml_embed.distributed.collectives import compute_on_all_processes, world_size
from ml_embed.distributed.shares import Rows, compute_shared
from ml_embed.distributed.sole_launch import sole_launch_into
from ml_embed.errors import UserError
from ml_embed.evaluation.data import (
    TestSet,
    Texts,
    behind_prompts,
    prompts_of,
    read_test_sets,
)
from ml_embed.evaluation.languages import MixedCorpus
from ml_embed.evaluation.metrics import chance_metrics, metrics_of_ranks
from ml_embed.evaluation.precisions import precision_rows
from ml_embed.files.digests import texts_digest, value_digest
from ml_embed.files.model_identity import model_identity
from ml_embed.files.model_source import find_model_folder
from ml_embed.inference.encoding import (
    check_finite,
    choose_device,
    default_dtype,
    longest_first,
    pooled_vectors,
)
from ml_embed.kernels.attention import choose_kernel
from ml_embed.model import MatryoshkaEncoder
from ml_embed.model_folders.cut import Cube, Cut, choose_cube
from ml_embed.model_folders.read import ModelFolder, load_encoder
from ml_embed.model_folders.sizes import BYTES_PER_COMPONENT, parameters_of
from ml_embed.prepare.tokenizer import TextTokenizer

MAX_QUERIES = 1000
RANKS = "ranks"
"""column of a row, on request: the rank of each query's right passage"""
BLOCK = 2048  # texts between two writes to disk (see `Rows.block`)


@dataclass(frozen=True)
class CubeModel:
    """A model folder, or a plain backbone, and the part of its cube that is looked at."""

    name: str
    """as the user wrote it"""
    folder: ModelFolder
    cube: Cube
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def open(
        cls,
        name: str | Path,
        ranks: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        dims: Sequence[int] | None = None,
        device: str | None = None,
    ) -> "CubeModel":
        """Read all but the weights.

        Args:
            name: a folder, or a name on the hub.
            ranks, depths, dims: None is all that were trained; others are taken too.
            device: None is the first GPU if there is one, else the CPU.
        Raises:
            UserError: the model cannot be read, or a size is not one that it has.
        """
        chosen = choose_device(device)
        folder = ModelFolder.open(find_model_folder(name))
        cube = choose_cube(folder.record, folder.config, ranks, depths, dims)
        return cls(str(name), folder, cube, chosen, default_dtype(chosen))

    @functools.cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """Texts to token ids, cut as in training."""
        return TextTokenizer(self.folder.tokenizer, self.folder.record.max_seq_length)

    @functools.cached_property
    def encoder(self) -> MatryoshkaEncoder:
        """The weights, read at first use, as deep and of as high a rank as the cube."""
        encoder = load_encoder(
            self.folder,
            depth=self.cube.depths[-1],
            rank=self.cube.ranks[-1],
            exits=self.cube.depths,
            kernel=choose_kernel("auto", self.device, self.dtype, self.folder.config.head_dim),
            dtype=self.dtype,
        )
        return encoder.to(self.device)

    def describe(self, cut: Cut) -> dict[str, Any]:
        """A cut's sizes and costs, JSON-able."""
        record = self.folder.record
        ranks = record.ranks or (0,)
        return {
            "rank": cut.rank,
            "depth": cut.depth,
            "dim": cut.dim,
            "trained": cut.rank in ranks and cut.depth in record.exits and cut.dim in record.dims,
            "parameters": parameters_of(self.folder.config, cut),
            "bytes_per_vector": BYTES_PER_COMPONENT * cut.dim,
        }


def evaluate_cube(
    folder: str | Path,
    data: str | Path,
    ranks: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    batch_tokens: int | None = None,
    max_queries: int | None = MAX_QUERIES,
    device: str | None = None,
    work: Path | None = None,
    progress: bool = True,
    per_query: bool = False,
    by_language: bool = False,
    datasets: Mapping[str, DatasetConfig] | None = None,
) -> dict[str, Any]:
    """Retrieval metrics of a model at every rank, depth and dim, on every test set of `data`.

    Queries and documents get the prompts of `datasets`, or else the folder's (`prompts_of`).
    Processes of a launch encode and measure together.

    Disk: the vectors of all exits and ranks, texts x depths x ranks x longest dim x 4 bytes.

    Args:
        folder: a model folder, a plain backbone, or the name of one on the hub.
        data: a file or a folder (see `read_test_sets`).
        ranks, depths, dims: None is all that were trained; others are taken too.
        batch_tokens: tokens per forward pass; None is the device's default.
        max_queries: rows taken of a raw dataset; None is all.
        device: None is the first GPU if there is one, else the CPU.
        work: folder for the vectors, which the caller removes: with it an interrupted call is
            continued. None is a temporary one, of one process.
        progress: bars on stderr, on terminals.
        per_query: rows also have "ranks", that of each query's right passage.
        by_language: also search one corpus of all languages (`MixedCorpus`).
        datasets: of a config, whose prompts count.

    Returns:
        JSON-able: "model", "data", "device", "dtype", "prompts" (the folder's), "prompts_used"
        (dataset -> its `prompts_of`), "texts", "tokens", and "rows", one
        object for each test set and cut: rank, depth, dim, trained, dataset, split, queries,
        candidates (mean), recall@1, mrr@10, ndcg@10, chance (the same metrics of a random order),
        parameters and bytes_per_vector; "precisions", the same of vectors in fewer bits at the
        largest rank and depth (`precision_rows`); and "languages", by language and cut
        (`MixedCorpus.rows`; empty without `by_language`).

    Raises:
        UserError: the model or the data cannot be read, or a size is not one that the model has.
    """
    model = compute_on_all_processes(lambda: CubeModel.open(folder, ranks, depths, dims, device))
    return _evaluate(
        model,
        Path(data),
        batch_tokens,
        max_queries,
        work,
        progress,
        per_query,
        by_language,
        datasets or {},
    )


def evaluate_baseline(
    folder: str | Path,
    data: str | Path,
    result: dict[str, Any],
    batch_tokens: int | None = None,
    max_queries: int | None = MAX_QUERIES,
    device: str | None = None,
    work: Path | None = None,
    progress: bool = True,
    by_language: bool = False,
) -> dict[str, Any]:
    """Evaluate a model to compare with, at those depths and dims of an evaluated model it has.

    It is whole in rank. An untrained backbone is read at its layers just like the trained model:
    that shows before and after. Arguments and result are those of `evaluate_cube`.

    Raises:
        UserError: it cannot be read, or has none of the depths or dims.
    """
    model = compute_on_all_processes(lambda: CubeModel.open(folder, device=device))
    record, config = model.folder.record, model.folder.config
    wanted = {name: sorted({row[name] for row in result["rows"]}) for name in ("depth", "dim")}
    depths = [depth for depth in wanted["depth"] if depth <= config.num_hidden_layers]
    dims = [dim for dim in wanted["dim"] if dim <= config.hidden_size]
    if not depths or not dims:
        raise UserError(
            f"baseline {folder} has none of the depths {wanted['depth']} or dims {wanted['dim']}"
        )
    cube = choose_cube(record, config, record.ranks[-1:], depths, dims)
    model = dataclasses.replace(model, cube=cube)
    return _evaluate(
        model, Path(data), batch_tokens, max_queries, work, progress, by_language=by_language
    )


def _evaluate(
    model: CubeModel,
    data: Path,
    batch_tokens: int | None,
    max_queries: int | None,
    work: Path | None,
    progress: bool,
    per_query: bool = False,
    by_language: bool = False,
    datasets: Mapping[str, DatasetConfig] | None = None,
) -> dict[str, Any]:
    prompts = model.folder.record.prompts

    def read() -> tuple[Texts, list[TestSet], MixedCorpus | None]:
        plain, as_written = read_test_sets(data, max_queries)
        texts, test_sets = behind_prompts(plain, as_written, prompts, datasets)
        return texts, test_sets, MixedCorpus.of(as_written, test_sets) if by_language else None

    texts, test_sets, mixed = compute_on_all_processes(read)
    token_ids = model.text_tokenizer(texts.texts)
    fixed = [_fixed_columns(test_set) for test_set in test_sets]
    made_of = {"files": model_identity(model.folder.path), "texts": texts_digest(texts.texts)}
    check_agreement(lambda: made_of)

    def measure(piece: tuple[int, int, np.ndarray]) -> list[dict[str, Any]]:
        rank, depth, vectors = piece
        check_finite(vectors, texts.texts)
        whole = torch.from_numpy(np.array(vectors)).to(model.device)
        rows = []
        for dim in model.cube.dims:
            sizes, unit = model.describe(Cut(rank, depth, dim)), normalize(whole[:, :dim], dim=-1)
            for test_set, columns in zip(test_sets, fixed, strict=True):
                ranks = test_set.ranks(unit)
                found = {RANKS: ranks.tolist()} if per_query else {}
                rows.append(sizes | columns | metrics_of_ranks(ranks) | found)
            rows += mixed.rows(unit, sizes) if mixed else []
            if (rank, depth) == (model.cube.ranks[-1], model.cube.depths[-1]):
                rows += precision_rows(unit, sizes, test_sets)
        return rows

    rows: list[dict[str, Any]] = []
    with _folder_for(work) as folder:
        for rank in model.cube.ranks:
            vectors = encode_all_exits(
                model,
                token_ids.__getitem__,
                len(token_ids),
                rank,
                folder,
                made_of,
                batch_tokens,
                progress,
            )
            pieces = [
                (rank, depth, at) for depth, at in zip(model.cube.depths, vectors, strict=True)
            ]
            rows += itertools.chain(*compute_shared(pieces, measure))
    on_gpu = model.device.type == "cuda"
    return {
        "model": model.name,
        "data": str(data),
        "device": torch.cuda.get_device_name(model.device) if on_gpu else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompts": prompts,
        "prompts_used": {
            test_set.dataset: prompts_of(test_set.dataset, prompts, datasets or {})
            for test_set in test_sets
        },
        "texts": len(token_ids),
        "tokens": sum(map(len, token_ids)),
        "rows": [row for row in rows if not {"precision", "language"} & row.keys()],
        "precisions": [row for row in rows if "precision" in row],
        "languages": [row for row in rows if "language" in row],
    }


def _fixed_columns(test_set: TestSet) -> dict[str, Any]:
    sizes = test_set.sizes
    names = {"dataset": test_set.dataset, "split": test_set.split}
    return names | {
        "queries": len(sizes),
        "candidates": float(sizes.mean()),
        "chance": chance_metrics(sizes),
    }


@contextlib.contextmanager
def _folder_for(work: Path | None) -> Iterator[Path]:
    """A folder that is there: `work`, or a temporary one."""
    if work is None:
        assert world_size() == 1, "processes need a folder that they share"
        with TemporaryDirectory(prefix="ml_embed-") as folder:
            yield Path(folder)
    else:
        with sole_launch_into(work, ".lock", "evaluating in"):
            yield work


def encode_all_exits(
    model: CubeModel,
    token_ids: Callable[[slice], list[np.ndarray]],
    count: int,
    rank: int,
    folder: Path,
    made_of: Any,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Vectors of N texts at every exit, in a file. A collective.

    Args:
        token_ids: a range of the texts -> their ids.
        count: N.
        rank: leading components of the token factors to use; 0 is a whole token table.
        folder: for the file, in which what is done already is found.
        made_of: JSON that tells the model and the texts from others.
        batch_tokens: as in `pooled_vectors`.
        progress: a bar on stderr, on terminals.
    Returns:
        (E, N, longest dim) float32, memory-mapped, in the order of the texts, not normalised.
    """
    cube = model.cube
    shape = len(cube.depths), count, cube.dims[-1]
    made_of = [made_of, rank, list(cube.depths), model.device.type, str(model.dtype)]
    path = folder / f"{value_digest(made_of)}.vectors"

    def encode(start: int, stop: int) -> np.ndarray:
        ids = token_ids(slice(start, stop))
        order, vectors = longest_first(ids), np.empty((shape[0], len(ids), shape[2]), np.float32)
        place = 0
        in_order = [ids[i] for i in order]
        for batch in pooled_vectors(model.encoder, in_order, batch_tokens, rank):
            done = order[place : place + batch.shape[1]]
            vectors[:, done] = batch[:, :, : shape[2]].cpu().numpy()
            place += len(done)
        return vectors

    rows = Rows(path, np.float32, shape, BLOCK, made_of)
    return rows.fill(encode, "encoding", progress and sys.stderr.isatty())
