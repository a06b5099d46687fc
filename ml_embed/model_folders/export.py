"""Cutting a trained model: a part of it becomes a model folder of its own."""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3Config

from ml_embed.data.store import open_store
from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_folder
from ml_embed.files.model_source import find_model_folder
from ml_embed.files.paths import check_model_output, home_path
from ml_embed.model_folders.cut import Cut, choose_cut
from ml_embed.model_folders.read import ModelFolder, load_encoder
from ml_embed.model_folders.record import RECORD_FILE, ModelRecord
from ml_embed.model_folders.turning import A, B, turned_state
from ml_embed.model_folders.write import save_model_folder
from ml_embed.prepare.tokenizer import fingerprint


def export_model(
    model: str | Path,
    output: str | Path,
    depth: int | None = None,
    dim: int | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    allow_untrained: bool = False,
    overwrite: bool = False,
    frequencies: str | Path | None = None,
    factors_only: bool = False,
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
        frequencies: folder of tokenized data; the factors are first turned so that smaller ranks
            are the best ones for tokens as frequent as there. None leaves them as they are.
        factors_only: write a folder without the token table, which this project alone reads.

    Returns:
        what was written.

    Raises:
        UserError: `model` is not a trained model folder, a value was not trained, or `output`
            must not or cannot be written.
    """
    output = home_path(output)
    check_model_output(output, overwrite, home_path(model))
    part = open_part(model, depth, dim, rank, allow_untrained)
    if factors_only and not part.folder.record.ranks:
        raise UserError(f"{model} has a whole token table and no factors; leave --factors-only out")
    turned_by = None if frequencies is None else share_to_turn_by(part.folder, Path(frequencies))
    write_cut(part.folder, part.cut, output, dtype, turned_by, with_table=not factors_only)
    return part.cut


@dataclass(frozen=True)
class Part:
    """A trained model folder, and the cut of it that is wanted."""

    folder: ModelFolder
    cut: Cut

    @property
    def record(self) -> ModelRecord:
        """What is left of the folder's record."""
        return cut_record(self.folder.record, self.cut)


def open_part(
    model: str | Path,
    depth: int | None = None,
    dim: int | None = None,
    rank: int | None = None,
    allow_untrained: bool = False,
) -> Part:
    """Open a trained model folder to write a part of it.

    Args: as in `export_model`.
    Raises:
        UserError: `model` is not a trained model folder, or a value was not trained.
    """
    path = find_model_folder(model)
    if not (path / RECORD_FILE).is_file():
        raise UserError(
            f"{model} is not a trained model folder: it has no {RECORD_FILE}; give one from "
            "training"
        )
    folder = ModelFolder.open(path)
    return Part(folder, choose_cut(folder.record, folder.config, depth, dim, rank, allow_untrained))


def write_cut(
    folder: ModelFolder,
    cut: Cut,
    output: Path,
    dtype: torch.dtype | None = None,
    turned_by: Tensor | None = None,
    with_table: bool = True,
) -> None:
    """Write a part of a model, or of a plain backbone, as a model folder of its own.

    `turned_by` is the (V,) share of each token that the factors are turned for; None = not.
    `with_table` is as in `save_model_folder`.
    """
    left = cut_record(folder.record, cut)
    dtype = dtype or stored_dtype(folder.config)
    rank = cut.rank if turned_by is None else None
    encoder = load_encoder(folder, depth=cut.depth, rank=rank, exits=left.exits, dtype=dtype)
    state = encoder.state_dict()
    if turned_by is not None:
        state = turned_state(state, turned_by)
        state |= {A: state[A][:, : cut.rank].contiguous(), B: state[B][: cut.rank].contiguous()}
    with atomic_folder(output) as new:
        save_model_folder(new, state, encoder.config, folder.tokenizer, left, with_table)


def share_to_turn_by(folder: ModelFolder, data: Path) -> Tensor:
    """As `token_share`. Raises UserError if the folder has no factors, too."""
    if not folder.record.ranks:
        raise UserError(f"{folder.path} has a whole token table: there are no factors to turn")
    return token_share(folder, data)


def token_share(folder: ModelFolder, data: Path) -> Tensor:
    """(V,) of each token in tokenized data. Raises UserError if the two do not belong together."""
    with tempfile.TemporaryDirectory() as cache:
        store = open_store(data, cache)
        if store.manifest and store.manifest.tokenizer_fingerprint != fingerprint(folder.tokenizer):
            raise UserError(f"{data} was made with another tokenizer than that of {folder.path}")
        return torch.from_numpy(store.token_share(folder.config.vocab_size))


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
