"""Cutting a trained model: a smaller model folder, complete in itself, from a part of a larger
one."""

import dataclasses
from pathlib import Path

import torch
from transformers import Qwen3Config

from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_folder
from ml_embed.files.paths import check_model_output, home_path, model_place
from ml_embed.model_folders.cut import Cut, choose_cut
from ml_embed.model_folders.model_folder import (
    RECORD_FILE,
    ModelRecord,
    load_backbone_config,
    load_encoder,
    save_model_folder,
)
from ml_embed.prepare.tokenizer import load_tokenizer


def export_model(
    checkpoint: str | Path,
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
    nested: smaller exits, dims and ranks that were trained are still listed, and values allowed
        though untrained are listed from then on.

    Args:
        checkpoint: a trained model folder.
        output: the new folder; it appears whole or not at all.
        depth, dim, rank: None is the whole of an axis.
        dtype: of the weights written; None is the checkpoint's.
        allow_untrained: take values that were not trained.
        overwrite: replace a model folder at `output`.

    Returns:
        what was written.

    Raises:
        UserError: `checkpoint` is not a trained model folder, a value was not trained, or `output`
            must not or cannot be written.
    """
    output = home_path(output)
    check_model_output(output, overwrite, home_path(checkpoint))
    folder = model_place(checkpoint)
    record = ModelRecord.load(folder)
    if record is None:  # nor is a name on the hub, which need not be asked
        raise UserError(
            f"{checkpoint} is not a trained model folder: it has no {RECORD_FILE}; give one from "
            "training"
        )
    config = load_backbone_config(folder)
    cut = choose_cut(record, config, depth, dim, rank, allow_untrained)
    left = cut_record(record, cut)
    dtype = dtype or stored_dtype(config)
    encoder = load_encoder(
        folder, depth=cut.depth, rank=cut.rank or None, exits=left.exits, dtype=dtype
    )
    with atomic_folder(output) as new:
        tokenizer = load_tokenizer(folder)
        save_model_folder(new, encoder.state_dict(), encoder.config, tokenizer, left, cut.dim)
    return cut


def cut_record(record: ModelRecord, cut: Cut) -> ModelRecord:
    """The record of a cut model: what is left of each axis, and the cut's own sizes."""
    return dataclasses.replace(
        record,
        exits=tuple(sorted({layer for layer in record.exits if layer < cut.depth} | {cut.depth})),
        dims=tuple(sorted({dim for dim in record.dims if dim < cut.dim} | {cut.dim}, reverse=True)),
        ranks=tuple(sorted({rank for rank in record.ranks if rank < cut.rank} | {cut.rank}))
        if record.ranks
        else (),
    )


def stored_dtype(config: Qwen3Config) -> torch.dtype:
    """The dtype that a model folder's config names; float32 where it names none."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
