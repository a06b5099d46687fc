"""The mean of several models' weights, as a model folder of its own.

Letters: N models, V vocabulary, r rank, H hidden size.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_folder
from ml_embed.files.digests import value_digest
from ml_embed.files.model_identity import model_identity
from ml_embed.files.model_source import find_model_folder
from ml_embed.files.paths import check_model_output
from ml_embed.model import row_products, rows_times, turn_factors
from ml_embed.model_folders.export import share_to_turn_by, stored_dtype
from ml_embed.model_folders.read import SIZES, ModelFolder, load_encoder
from ml_embed.model_folders.record import AveragedModel, ModelRecord, Origin
from ml_embed.model_folders.turning import A, B
from ml_embed.model_folders.write import save_model_folder
from ml_embed.prepare.tokenizer import end_token, fingerprint

COMPUTED_WITH = ("hidden_act", "rms_norm_eps", "rope_parameters", "attention_bias")
"""Keys of config.json that say how something is computed."""
SAME_BASIS = 0.1
"""Factors are of one basis if the product of their means is nearer to the mean of the tables than
this share of the squared distance of the tables from their mean. Measured: 0.5 for two independent
tables, 4e-5 for three checkpoints of a tiny run. The limit between them is a guess."""
ROUNDING = 1e-9
"""Share of a table's squared norm that may be rounding."""
T = TypeVar("T")
Factors = tuple[Tensor, Tensor]
"""A (V, r) and B (r, H)"""


@dataclass(frozen=True)
class MeanFactors:
    """The factors of a mean of factorised tables."""

    factors: Factors
    as_they_are: bool
    """the means of A and of B; else the best factors of the tables' mean"""
    lost: float
    """share of the squared norm of the tables' mean that they lack"""


@dataclass(frozen=True)
class Average:
    """Models of one kind, and how much each counts."""

    names: tuple[str, ...]
    """as they were given"""
    folders: tuple[ModelFolder, ...]
    shares: tuple[float, ...]
    """their sum is 1"""

    @classmethod
    def of(cls, models: Sequence[str], weights: Sequence[float] | None = None) -> "Average":
        """Read all but the weights.

        Args:
            models: two or more, folders or names on the hub.
            weights: of each, above 0; None counts all alike.
        Raises:
            UserError: a model cannot be read, or they are not of one kind; all that differs is
                named; or one is named twice.
        """
        shares = _shares(len(models), weights)
        folders = tuple(ModelFolder.open(find_model_folder(name)) for name in models)
        if len({folder.path.resolve() for folder in folders}) < len(folders):
            raise UserError(
                "one checkpoint is named twice; name it once, with a larger one of the weights"
            )
        _check_alike(folders)
        return cls(tuple(models), folders, shares)

    def write(
        self, output: Path, overwrite: bool = False, frequencies: Path | None = None
    ) -> MeanFactors | None:
        """Write the mean as a model folder; the factors' mean, None with whole token tables.

        Factors of one basis (of one run, or of runs that began with the same factors) are averaged
        as they are, so that their smaller ranks stay those that were trained. Else the mean of the
        tables is factorised anew, to the same rank.

        Args:
            output: the new folder; it appears whole or not at all.
            overwrite: replace a model folder at `output`.
            frequencies: folder of tokenized data; the factors are the best ones, at every rank, for
                tokens as frequent as there.
        Raises:
            UserError: weights cannot be read, or `output` must not or cannot be written.
        """
        self.check_output(output, overwrite)
        first = self.folders[0]
        share = None if frequencies is None else share_to_turn_by(first, frequencies)
        state, factors = self._mean_state()
        dtype = reduce(torch.promote_types, [stored_dtype(f.config) for f in self.folders])
        mean = None
        if factors:
            mean = mean_factors(factors, self.shares, share)
            state |= dict(zip((A, B), mean.factors, strict=True))
        state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
        with atomic_folder(output) as new:
            save_model_folder(new, state, first.config, first.tokenizer, self.record())
        return mean

    def check_output(self, output: Path, overwrite: bool) -> None:
        """Raise UserError if the mean must not or cannot be written there."""
        for folder in self.folders:
            check_model_output(output, overwrite, folder.path)

    def record(self) -> ModelRecord:
        """What the models were trained at, and what the mean is made of."""
        records = [folder.record for folder in self.folders]
        origins = [record.origin for record in records]
        origin = Origin(
            base_model=_common([origin.base_model for origin in origins]),
            license=_common([origin.license for origin in origins]),
            license_name=_common([origin.license_name for origin in origins]),
            license_link=_common([origin.license_link for origin in origins]),
            languages=tuple(dict.fromkeys(name for o in origins for name in o.languages)),
            trained_on=tuple(dict.fromkeys(item for o in origins for item in o.trained_on)),
            all_data_known=all(origin.all_data_known for origin in origins),
        )
        averaged = tuple(
            AveragedModel(name, share, value_digest(model_identity(folder.path)))
            for name, share, folder in zip(self.names, self.shares, self.folders, strict=True)
        )
        decay = _common([record.ema_decay for record in records]) or 0.0
        return dataclasses.replace(records[0], origin=origin, averaged=averaged, ema_decay=decay)

    def _mean_state(self) -> tuple[dict[str, Tensor], list[Factors]]:
        """The mean of all weights but the factors, in float32, and the factors of each model."""
        state: dict[str, Tensor] = {}
        factors: list[Factors] = []
        for folder, share in zip(self.folders, self.shares, strict=True):
            own = load_encoder(folder, exits=folder.record.exits).state_dict()
            if folder.record.ranks:
                factors.append((own.pop(A), own.pop(B)))
            for name, tensor in own.items():
                state[name] = state.get(name, 0) + share * tensor
        return state, factors


def mean_factors(
    factors: Sequence[Factors], shares: Sequence[float], token_share: Tensor | None = None
) -> MeanFactors:
    """The factors, of the same rank, of the weighted mean of the tables A B.

    Args:
        factors: of each model.
        shares: of each model, their sum is 1.
        token_share: (V,) of each token in the data that the factors are to be best for; None leaves
            factors of one basis as they are, and counts all tokens alike for others.
    """
    rank = len(factors[0][1])
    own = sum_of([share * left for (left, _), share in zip(factors, shares, strict=True)])
    basis = sum_of([share * right for (_, right), share in zip(factors, shares, strict=True)])
    error, spread, whole = _distances(factors, shares, (own, basis))
    as_they_are = error <= SAME_BASIS * spread + ROUNDING * whole
    if not as_they_are:
        # Their product is the tables' mean, of a rank of up to N r.
        scaled = [share * left for (left, _), share in zip(factors, shares, strict=True)]
        own, basis = torch.cat(scaled, dim=1), torch.cat([right for _, right in factors])
    if not as_they_are or token_share is not None:
        turn, turned = turn_factors(own, basis, token_share)
        own, basis = rows_times(own, turn[:, :rank], own.dtype), turned[:rank]
        as_they_are = False
        error, _, _ = _distances(factors, shares, (own, basis))
    return MeanFactors((own, basis), as_they_are, max(0.0, error) / (whole or 1))


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return reduce(torch.add, tensors)


def _distances(
    factors: Sequence[Factors], shares: Sequence[float], candidate: Factors
) -> tuple[float, float, float]:
    """Of the tables T_i = A_i B_i with the mean T, without ever holding one of them.

    Returns:
        |candidate - T|^2, sum_i share_i |T_i - T|^2, and |T|^2.
    """
    pairs = [*factors, candidate]
    own = torch.cat([left for left, _ in pairs], dim=1)
    basis = torch.cat([right for _, right in pairs]).double()
    # tr(T_i^T T_j) is the sum over a block of (A^T A) * (B B^T).
    products = row_products(own) * (basis @ basis.T)
    inner = products.unflatten(0, (len(pairs), -1)).unflatten(2, (len(pairs), -1)).sum((1, 3))
    weight = inner.new_tensor([*shares, 0.0])
    with_mean = inner @ weight
    whole = weight @ with_mean
    error = inner[-1, -1] - 2 * with_mean[-1] + whole
    return float(error), float(weight @ inner.diagonal() - whole), float(whole)


def _shares(count: int, weights: Sequence[float] | None) -> tuple[float, ...]:
    if count < 2:
        raise UserError("a mean takes at least two models; name two or more")
    weights = (1.0,) * count if weights is None else tuple(weights)
    if len(weights) != count:
        raise UserError(f"--weights has {len(weights)} numbers for {count} models; give one each")
    if not all(0 < weight < float("inf") for weight in weights):
        given = " ".join(f"{weight:g}" for weight in weights)
        raise UserError(f"--weights {given}: each must be a number above 0")
    return tuple(weight / sum(weights) for weight in weights)


RECORDED = (
    "exits",
    "dims",
    "ranks",
    "norm_sharing",
    "max_seq_length",
    "prompts",
    "default_prompt_name",
)
"""What records say that a mean has from its models."""


def _kind(folder: ModelFolder) -> dict[str, Any]:
    """What must be the same in models of which a mean is taken."""
    return {
        **{name: getattr(folder.config, name) for name in (*SIZES, *COMPUTED_WITH)},
        "tokenizer": f"with the digest {fingerprint(folder.tokenizer)[:12]}",
        "end token": end_token(folder.tokenizer),
        "rank of the token factors": max(folder.record.ranks, default="whole table"),
        **{name: getattr(folder.record, name) for name in RECORDED},
    }


def _check_alike(folders: Sequence[ModelFolder]) -> None:
    """Raise UserError for models that differ in anything but their weights."""
    first, problems = folders[0], []
    wanted = _kind(first)
    for other in folders[1:]:
        problems += [
            f"{name} of {first.path} is {wanted[name]}, of {other.path} {value}"
            for name, value in _kind(other).items()
            if value != wanted[name]
        ]
    if problems:
        listing = "".join(f"\n- {problem}" for problem in problems)
        raise UserError(
            "only models that differ in nothing but their weights have a mean; take checkpoints of "
            f"one run, or of runs with the same start and settings:{listing}"
        )


def _common(values: Sequence[T]) -> T | None:
    """The value that all have."""
    return values[0] if len(set(values)) == 1 else None
