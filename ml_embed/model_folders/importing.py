"""Models from elsewhere become model folders with token factors: released ones, and plain ones.

A released model is a plain Qwen3 beside U.pth (V, r) and V.pth (r, H), whose product is its token
table. Letters: V vocabulary, r rank, H hidden size.
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from ml_embed.errors import UserError, one_line
from ml_embed.files.arrays import blocks
from ml_embed.files.atomic import atomic_folder
from ml_embed.files.model_source import RELEASED_FACTORS, find_released_folder, is_released
from ml_embed.files.paths import check_model_output, home_path
from ml_embed.model import (
    ROWS_AT_ONCE,
    default_dims,
    default_exits,
    default_ranks,
    factorize_table,
)
from ml_embed.model_folders.card import origin_of
from ml_embed.model_folders.export import stored_dtype, token_share
from ml_embed.model_folders.headers import DAMAGED
from ml_embed.model_folders.read import ModelFolder, load_encoder
from ml_embed.model_folders.record import RECORD_FILE, ModelRecord
from ml_embed.model_folders.turning import WHOLE_TABLE, A, B, turned_state
from ml_embed.model_folders.write import save_model_folder

TEMPERATURE = 0.05
"""Of the published training."""


@dataclasses.dataclass(frozen=True)
class Imported:
    """What was written, and how far its factors are from the token table that was there."""

    record: ModelRecord
    error: dict[int, float]
    """rank -> share of the table's squared norm that is lost, each token weighted by how often it
    occurs where frequencies were given"""
    largest: float
    """the largest difference of a component at the whole rank"""


def import_model(
    model: str | Path,
    output: str | Path,
    factorize: int | None = None,
    frequencies: str | Path | None = None,
    overwrite: bool = False,
) -> Imported:
    """Write a model from elsewhere as a model folder with token factors.

    A released model keeps its factors, turned if there are `frequencies`; its exits, dims and ranks
    are those of the published rule.
    With `factorize`, the token table of any other Qwen3 embedding model is replaced by its best
    approximation; its exits and dims stay.

    Args:
        model: a folder, or a name on the hub.
        output: the new folder; it appears whole or not at all.
        factorize: rank of the factors; None for a released model, which has its own.
        frequencies: folder of tokenized data; the factors are the best ones for tokens as frequent
            as there. None counts all tokens alike, and leaves a released model's as they are.
        overwrite: replace a model folder at `output`.
    Raises:
        UserError: the model is not of the kind that the arguments are for, or cannot be read, or
            `output` must not or cannot be written.
    """
    output = home_path(output)
    check_model_output(output, overwrite, home_path(model))
    path = find_released_folder(model)
    _check_kind(path, factorize)
    folder = ModelFolder.open(path)
    share = None if frequencies is None else token_share(folder, Path(frequencies))
    record = _released_record(folder) if factorize is None else folder.record
    record = dataclasses.replace(record, origin=origin_of(path, record, (), ()))
    dtype = stored_dtype(folder.config)
    encoder = load_encoder(folder, exits=record.exits, dtype=dtype)
    state = encoder.state_dict()
    table = state.pop(WHOLE_TABLE)
    if factorize is not None:
        _check_rank(factorize, table)
        factors = factorize_table(table, factorize, share)
    else:
        factors = read_released_factors(path, table)
        if share is not None:
            turned = turned_state(dict(zip((A, B), factors, strict=True)), share)
            factors = turned[A], turned[B]
    factors = factors[0].to(dtype), factors[1].to(dtype)  # as they are written
    record = dataclasses.replace(record, ranks=default_ranks(factors[1].shape[0]))
    error, largest = errors_of(table, *factors, record.ranks, share)
    state |= {A: factors[0], B: factors[1]}
    with atomic_folder(output) as new:
        save_model_folder(new, state, encoder.config, folder.tokenizer, record)
    return Imported(record, error, largest)


def _check_kind(path: Path, factorize: int | None) -> None:
    """Raise UserError for a model that the arguments are not for."""
    if is_released(path):
        if factorize is not None:
            raise UserError(
                f"{path} has token factors of its own; leave --factorize out (--refactor turns "
                "them for your data)"
            )
    elif factorize is None:
        named = " and ".join(RELEASED_FACTORS)
        raise UserError(
            f"{path} has no {named} as released models do; say with --factorize at which rank its "
            "token table is to be approximated"
        )
    elif (record := ModelRecord.load(path)) is not None and record.ranks:
        raise UserError(
            f"{path} has token factors already; scripts/export_model.py cuts them, and turns them "
            "for your data with --refactor"
        )


def _released_record(folder: ModelFolder) -> ModelRecord:
    """What is trained by the published rule; nothing in a released folder says it."""
    if (folder.path / RECORD_FILE).is_file():
        raise UserError(
            f"{folder.path} has {RECORD_FILE}, so it is a model folder already; remove "
            f"{' and '.join(RELEASED_FACTORS)} from it"
        )
    return dataclasses.replace(
        folder.record,
        exits=default_exits(folder.config.num_hidden_layers),
        dims=default_dims(folder.record.dims[0]),
        temperature=TEMPERATURE,
    )


def _check_rank(rank: int, table: Tensor) -> None:
    if not 1 <= rank <= min(table.shape):
        raise UserError(
            f"--factorize {rank} must be from 1 to {min(table.shape)}, the smaller side of the "
            "token table"
        )


def read_released_factors(folder: Path, table: Tensor) -> tuple[Tensor, Tensor]:
    """U (V, r) and V (r, H) of a released model; nothing that a file asks for is run.

    Raises:
        UserError: a file holds anything but one tensor of numbers, or they do not fit the table.
    """
    U, V = (_read_tensor(folder / name) for name in RELEASED_FACTORS)
    if (len(U), V.shape[1]) != table.shape or U.shape[1] != len(V):
        shapes = " and ".join(" x ".join(map(str, factor.shape)) for factor in (U, V))
        raise UserError(
            f"{' and '.join(RELEASED_FACTORS)} of {folder} are {shapes}; their product must be the "
            f"token table, {' x '.join(map(str, table.shape))}; {DAMAGED}"
        )
    return U, V


def _read_tensor(path: Path) -> Tensor:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle that is damaged fails in a dozen ways
        raise UserError(
            f"{path} is no tensor as torch saves it ({one_line(error)}); {DAMAGED}"
        ) from None
    if isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()
    if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
        what = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value)
        raise UserError(f"{path} must hold one matrix of numbers, not {what}; {DAMAGED}")
    return value.detach()


def errors_of(
    table: Tensor, A: Tensor, B: Tensor, ranks: tuple[int, ...], share: Tensor | None = None
) -> tuple[dict[int, float], float]:
    """How far the factors are from a token table, at each rank.

    Args:
        table: (V, H).
        A, B: (V, r) and (r, H).
        ranks: at most r.
        share: (V,) weight of each token; None is all alike.
    Returns:
        rank -> sum_x p(x) |E_x - A_x B|^2 / sum_x p(x) |E_x|^2, with the leading components of that
        rank; and the largest difference of a component at the last rank.
    """
    lost, whole, largest = dict.fromkeys(ranks, 0.0), 0.0, 0.0
    for block in blocks(len(table), ROWS_AT_ONCE):
        rows, left = table[block].float(), A[block].float()
        weight = 1.0 if share is None else share[block].unsqueeze(1)
        whole += float((weight * rows.double().square()).sum())
        for rank in ranks:
            difference = rows - left[:, :rank] @ B[:rank].float()
            lost[rank] += float((weight * difference.double().square()).sum())
        largest = max(largest, float(difference.abs().max()))
    return {rank: value / (whole or 1) for rank, value in lost.items()}, largest
