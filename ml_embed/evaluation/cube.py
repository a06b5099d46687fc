"""Quality over the cube rank x depth x dim: one forward pass per rank gives all depths and dims.

Letters: E exits, N texts, H hidden size, D vector length.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from ml_embed.errors import UserError
from ml_embed.evaluation.data import TestSet, behind_prompts, read_test_sets
from ml_embed.evaluation.metrics import chance_metrics, metrics_of_ranks
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
    progress: bool = True,
) -> dict[str, Any]:
    """Retrieval metrics of a model at every rank, depth and dim, on every test set of `data`.

    Queries and documents get the folder's prompts (`behind_prompts`).

    Memory: the vectors of all exits at one rank, texts x depths x H x 4 bytes.

    Args:
        folder: a model folder, a plain backbone, or the name of one on the hub.
        data: a file or a folder (see `read_test_sets`).
        ranks, depths, dims: None is all that were trained; others are taken too.
        batch_tokens: tokens per forward pass; None is the device's default.
        max_queries: rows taken of a raw dataset; None is all.
        device: None is the first GPU if there is one, else the CPU.
        progress: a bar on stderr, on terminals.

    Returns:
        JSON-able: "model", "data", "device", "dtype", "prompts", "texts", "tokens", and "rows", one
        object for each test set and cut: rank, depth, dim, trained, dataset, split, queries,
        candidates (mean), recall@1, mrr@10, ndcg@10, chance (the same metrics of a random order),
        parameters and bytes_per_vector.

    Raises:
        UserError: the model or the data cannot be read, or a size is not one that the model has.
    """
    model = CubeModel.open(folder, ranks, depths, dims, device)
    return _evaluate(model, Path(data), batch_tokens, max_queries, progress)


def evaluate_baseline(
    folder: str | Path,
    data: str | Path,
    result: dict[str, Any],
    batch_tokens: int | None = None,
    max_queries: int | None = MAX_QUERIES,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a model to compare with, at those depths and dims of an evaluated model it has.

    It is whole in rank. An untrained backbone is read at its layers just like the trained model:
    that shows before and after. Arguments and result are those of `evaluate_cube`.

    Raises:
        UserError: it cannot be read, or has none of the depths or dims.
    """
    model = CubeModel.open(folder, device=device)
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
    return _evaluate(model, Path(data), batch_tokens, max_queries, progress)


def _evaluate(
    model: CubeModel,
    data: Path,
    batch_tokens: int | None,
    max_queries: int | None,
    progress: bool,
) -> dict[str, Any]:
    prompts = model.folder.record.prompts
    texts, test_sets = behind_prompts(*read_test_sets(data, max_queries), prompts)
    token_ids = model.text_tokenizer(texts.texts)
    fixed = [_fixed_columns(test_set) for test_set in test_sets]
    rows = []
    total = len(model.cube.ranks) * len(token_ids)
    with tqdm(
        desc="evaluating", unit=" texts", total=total, disable=None if progress else True
    ) as bar:
        for rank in model.cube.ranks:
            vectors = encode_all_exits(model.encoder, token_ids, batch_tokens, rank, bar)
            for at_exit in vectors:
                check_finite(at_exit.numpy(), texts.texts)
            for cut, unit in _cut_vectors(vectors, model.cube, rank, model.device):
                sizes = model.describe(cut)
                for test_set, columns in zip(test_sets, fixed, strict=True):
                    rows.append(sizes | columns | metrics_of_ranks(test_set.ranks(unit)))
    on_gpu = model.device.type == "cuda"
    return {
        "model": model.name,
        "data": str(data),
        "device": torch.cuda.get_device_name(model.device) if on_gpu else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompts": prompts,
        "texts": len(token_ids),
        "tokens": sum(map(len, token_ids)),
        "rows": rows,
    }


def _fixed_columns(test_set: TestSet) -> dict[str, Any]:
    sizes = test_set.sizes
    names = {"dataset": test_set.dataset, "split": test_set.split}
    return names | {
        "queries": len(sizes),
        "candidates": float(sizes.mean()),
        "chance": chance_metrics(sizes),
    }


def encode_all_exits(
    encoder: MatryoshkaEncoder,
    token_ids: list[np.ndarray],
    batch_tokens: int | None,
    rank: int,
    bar: tqdm,
) -> Tensor:
    """Vectors of N texts, given as ids, at every exit.

    Args:
        batch_tokens: as in `pooled_vectors`.
        rank: leading components of the token factors to use; 0 is a whole token table.
        bar: moved by the texts that are done.
    Returns:
        (E, N, H) float32 on the CPU, in the order of the texts, not normalised.
    """
    order = longest_first(token_ids)
    vectors = torch.empty(len(encoder.exits), len(order), encoder.config.hidden_size)
    start = 0
    for batch in pooled_vectors(encoder, [token_ids[i] for i in order], batch_tokens, rank):
        end = start + batch.shape[1]
        vectors[:, torch.tensor(order[start:end])] = batch.cpu()
        bar.update(end - start)
        start = end
    return vectors


def _cut_vectors(
    vectors: Tensor, cube: Cube, rank: int, device: torch.device
) -> Iterator[tuple[Cut, Tensor]]:
    """Every cut of a rank with its (N, dim) unit vectors on the device."""
    for depth, whole in zip(cube.depths, vectors, strict=True):
        whole = whole.to(device)
        for dim in cube.dims:
            yield Cut(rank, depth, dim), normalize(whole[:, :dim], dim=-1)
