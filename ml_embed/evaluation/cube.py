"""Quality over the cube rank x depth x dim: one forward pass a rank gives all depths and all dims.

Letters: E exits, N texts, H hidden size, D vector length.
"""

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
from transformers import Qwen3Config

from ml_embed.errors import UserError
from ml_embed.evaluation.cells import BYTES_PER_COMPONENT, Cube
from ml_embed.evaluation.data import TestSet, read_test_sets
from ml_embed.evaluation.metrics import chance_metrics, metrics_of_ranks
from ml_embed.files.paths import home_path
from ml_embed.inference.encoding import choose_device, default_dtype, longest_first, pooled_vectors
from ml_embed.kernels.attention import choose_kernel
from ml_embed.model import MatryoshkaEncoder
from ml_embed.model_folders.cut import choose_cut, read_record
from ml_embed.model_folders.model_folder import ModelRecord, load_backbone_config, load_encoder
from ml_embed.model_folders.sizes import layer_parameters
from ml_embed.prepare.tokenizer import TextTokenizer, load_tokenizer

MAX_QUERIES = 1000


@dataclass(frozen=True)
class CubeModel:
    """A model folder, or a plain backbone, and the part of its cube that is looked at."""

    folder: str | Path
    config: Qwen3Config
    record: ModelRecord
    text_tokenizer: TextTokenizer
    cube: Cube
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def open(
        cls,
        folder: str | Path,
        ranks: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        dims: Sequence[int] | None = None,
        device: str | None = None,
    ) -> "CubeModel":
        """Read all but the weights; None is all sizes that were trained, and the best device.

        Raises:
            UserError: the model cannot be read, or a size is not one that it has.
        """
        chosen = choose_device(device)
        config = load_backbone_config(folder)
        folder = home_path(folder)
        tokenizer = load_tokenizer(folder)
        record = read_record(folder, config, tokenizer)
        cube = choose_cube(record, config, ranks, depths, dims)
        texts = TextTokenizer(tokenizer, record.max_seq_length)
        return cls(folder, config, record, texts, cube, chosen, default_dtype(chosen))

    @functools.cached_property
    def encoder(self) -> MatryoshkaEncoder:
        """The weights, read at first use: as deep, and of as high a rank, as the cube; its depths
        are the exits."""
        kernel = choose_kernel("auto", self.device, self.dtype)
        depth, rank = self.cube.depths[-1], self.cube.ranks[-1] or None
        encoder = load_encoder(
            self.folder,
            depth=depth,
            rank=rank,
            exits=self.cube.depths,
            kernel=kernel,
            dtype=self.dtype,
        )
        return encoder.to(self.device)

    def describe(self, rank: int, depth: int, dim: int) -> dict[str, Any]:
        """A cell's sizes and costs. Parameters: token factors (rank 0: the whole table), layers
        run, one norm."""
        vocabulary, hidden = self.config.vocab_size, self.config.hidden_size
        table = rank * (vocabulary + hidden) if rank else vocabulary * hidden
        ranks = self.record.ranks or (0,)
        trained = rank in ranks and depth in self.record.exits and dim in self.record.dims
        parameters = table + depth * layer_parameters(self.config) + hidden
        sizes = {
            "rank": rank,
            "depth": depth,
            "dim": dim,
            "trained": trained,
            "parameters": parameters,
        }
        return sizes | {"bytes_per_vector": BYTES_PER_COMPONENT * dim}


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

    All vectors of all exits are held: texts x depths x H x 4 bytes.

    Args:
        folder: a model folder, or a plain backbone.
        data: a file or a folder (see `read_test_sets`).
        ranks, depths, dims: None is all that were trained; others are taken too.
        batch_tokens: tokens in a forward pass; None is the device's default.
        max_queries: rows taken of a raw dataset; None is all.
        device: None is the first GPU if there is one, else the CPU.
        progress: a bar on stderr, on terminals.

    Returns:
        JSON-able: "rows" has one object for each test set and cell, with rank, depth, dim, trained,
            dataset, split,
        queries, candidates (mean), recall@1, mrr@10, ndcg@10, chance (the same metrics of a random
        order), parameters and bytes_per_vector; beside it "model", "data", "device", "dtype",
        "texts", "tokens".

    Raises:
        UserError: the model or the data cannot be read, or a size is not one that the model has.
    """
    model = CubeModel.open(folder, ranks, depths, dims, device)
    cube = model.cube
    texts, test_sets = read_test_sets(Path(data), max_queries)
    encoder = model.encoder
    token_ids = model.text_tokenizer(texts.texts)
    fixed = [_fixed_columns(test_set) for test_set in test_sets]
    rows = []
    total = len(cube.ranks) * len(token_ids)
    with tqdm(
        desc="evaluating", unit=" texts", total=total, disable=None if progress else True
    ) as bar:
        for rank in cube.ranks:
            vectors = encode_all_exits(encoder, token_ids, batch_tokens, rank or None, bar)
            for depth, dim, unit in _cut_vectors(vectors, cube, model.device):
                cell = model.describe(rank, depth, dim)
                for test_set, columns in zip(test_sets, fixed, strict=True):
                    rows.append(cell | columns | metrics_of_ranks(test_set.ranks(unit)))
    return {
        "model": str(folder),
        "data": str(data),
        "device": torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "texts": len(token_ids),
        "tokens": sum(map(len, token_ids)),
        "rows": rows,
    }


def choose_cube(
    record: ModelRecord,
    config: Qwen3Config,
    ranks: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
) -> Cube:
    """The sizes to look at; None is all that were trained.

    Raises:
        UserError: a size that the model does not have.
    """
    trained = {"rank": record.ranks or (0,), "depth": record.exits, "dim": record.dims}
    chosen = {
        axis: {
            getattr(choose_cut(record, config, **{axis: value}, allow_untrained=True), axis)
            for value in values
        }
        for axis, values in {"rank": ranks, "depth": depths, "dim": dims}.items()
        if values
    }
    return Cube(*(tuple(sorted(chosen.get(axis) or sizes)) for axis, sizes in trained.items()))


def evaluate_baseline(
    folder: str | Path, data: str | Path, result: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """A model to compare with, whole in rank, at those depths and dims of an evaluated model that
    it has.

    An untrained backbone is read at its layers just like the trained model: before and after.

    Raises:
        UserError: it cannot be read, or has none of the depths or dims.
    """
    config = load_backbone_config(folder)
    record = read_record(home_path(folder), config, load_tokenizer(folder))
    wanted = {name: sorted({row[name] for row in result["rows"]}) for name in ("depth", "dim")}
    depths = [depth for depth in wanted["depth"] if depth <= config.num_hidden_layers]
    dims = [dim for dim in wanted["dim"] if dim <= config.hidden_size]
    if not depths or not dims:
        raise UserError(
            f"baseline {folder} has none of the depths {wanted['depth']} or dims {wanted['dim']}"
        )
    return evaluate_cube(folder, data, record.ranks[-1:] or None, depths, dims, **options)


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
    rank: int | None,
    bar: tqdm,
) -> Tensor:
    """(E, N, H) float32 vectors of N texts given as ids, on the CPU, in the order of the texts; not
    normalised."""
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
    vectors: Tensor, cube: Cube, device: torch.device
) -> Iterator[tuple[int, int, Tensor]]:
    """(depth, dim, (N, dim) unit vectors on the device) for every cell of a rank."""
    for depth, whole in zip(cube.depths, vectors, strict=True):
        whole = whole.to(device)
        for dim in cube.dims:
            yield depth, dim, normalize(whole[:, :dim], dim=-1)
