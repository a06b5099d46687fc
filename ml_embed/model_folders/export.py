"""Cutting a trained model: a part of it becomes a model folder of its own."""

import dataclasses
from pathlib import Path

import torch
from transformers import Qwen3Config

from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_folder
from ml_embed.files.model_source import find_model_folder
from ml_embed.files.paths import check_model_output, home_path
from ml_embed.model_folders.cut import Cut, choose_cut
from ml_embed.model_folders.read import ModelFolder, load_encoder
from ml_embed.model_folders.record import RECORD_FILE, ModelRecord
from ml_embed.model_folders.write import save_model_folder


def export_model(
    model: str | Path,
    output: str | Path,
    depth: int | None = None,
    dim: int | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    allow_untrained: bool = False,
    overwrite: bool = False,
) -> Cut:
    """Write the part of a model that is wanted as a model folder of its own.

    It has the first `depth` layers with the norm trained for that exit, the leading `rank`
    components of the token factors, and gives vectors of the leading `dim` components. It stays
    nested: smaller exits, dims and ranks that were trained are still listed, and its own sizes
    count as trained from then on.

    Args:
        model: a trained model folder, or the name of one on the hub.
        output: the new folder; it appears whole or not at all.
        depth, dim, rank: None is the whole of an axis.
        dtype: of the weights written; None is the model's.
        allow_untrained: take values that were not trained.
        overwrite: replace a model folder at `output`.

    Returns:
        what was written.

    Raises:
        UserError: `model` is not a trained model folder, a value was not trained, or `output`
            must not or cannot be written.
    """
    output = home_path(output)
    check_model_output(output, overwrite, home_path(model))
    path = find_model_folder(model)
    if not (path / RECORD_FILE).is_file():
        raise UserError(
            f"{model} is not a trained model folder: it has no {RECORD_FILE}; give one from "
            "training"
        )
    folder = ModelFolder.open(path)
    cut = choose_cut(folder.record, folder.config, depth, dim, rank, allow_untrained)
    write_cut(folder, cut, output, dtype)
    return cut


def write_cut(
    folder: ModelFolder, cut: Cut, output: Path, dtype: torch.dtype | None = None
) -> None:
    """Write a part of a model, or of a plain backbone, as a model folder of its own."""
    left = cut_record(folder.record, cut)
    dtype = dtype or stored_dtype(folder.config)
    encoder = load_encoder(folder, depth=cut.depth, rank=cut.rank, exits=left.exits, dtype=dtype)
    with atomic_folder(output) as new:
        save_model_folder(new, encoder.state_dict(), encoder.config, folder.tokenizer, left)


def cut_record(record: ModelRecord, cut: Cut) -> ModelRecord:
    """The record of a cut model: what is left of each axis, and the cut's own sizes."""
    exits, dims, ranks = (
        {size for size in sizes if size < own} | {own}
        for sizes, own in (
            (record.exits, cut.depth),
            (record.dims, cut.dim),
            (record.ranks, cut.rank),
        )
    )
    return dataclasses.replace(
        record,
        exits=tuple(sorted(exits)),
        dims=tuple(sorted(dims, reverse=True)),
        ranks=tuple(sorted(ranks)) if record.ranks else (),
    )


def stored_dtype(config: Qwen3Config) -> torch.dtype:
    """The dtype that a model folder's config names; float32 where it names none."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
