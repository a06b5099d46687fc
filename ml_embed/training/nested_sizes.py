"""The sizes that a run nests: exits, vector lengths and ranks; their weights in the loss."""

from dataclasses import dataclass
from pathlib import Path

from transformers import Qwen3Config

from ml_embed.config import TrainConfig
from ml_embed.errors import UserError
from ml_embed.model import default_dims, default_exits, default_ranks, dim_weights
from ml_embed.model_folders.cut import Cube
from ml_embed.model_folders.record import ModelRecord
from ml_embed.model_folders.sizes import matrix_shapes


@dataclass(frozen=True)
class NestedSizes:
    """The nested sizes that are trained: exits and ranks ascending, dims descending."""

    exits: tuple[int, ...]
    dims: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, config: TrainConfig, backbone: Qwen3Config) -> "NestedSizes":
        """Those that the config asks for, or the published rule gives.

        Raises:
            UserError: the backbone is too small for them.
        """
        _check_sizes(config, backbone)
        layers, hidden = backbone.num_hidden_layers, backbone.hidden_size
        exits: tuple[int, ...] = (layers,)
        if config.use_mll:
            asked = config.mll_layers
            exits = tuple(sorted({*asked, layers})) if asked else default_exits(layers)
        dims: tuple[int, ...] = (hidden,)
        if config.use_mrl:
            asked = config.mrl_dims
            dims = tuple(sorted({*asked, hidden}, reverse=True)) if asked else default_dims(hidden)
        ranks: tuple[int, ...] = (config.r,) if config.r else ()
        if config.use_mel:
            asked = config.mel_ranks
            ranks = tuple(sorted({*asked, config.r})) if asked else default_ranks(config.r)
        return cls(exits, dims, ranks)

    def dim_weights(self, config: TrainConfig) -> tuple[float, ...]:
        """c_n of each dim, the longest first."""
        if config.mrl_weights == "paper":
            return dim_weights(self.dims)
        if config.mrl_weights == "uniform":
            return (1.0,) * len(self.dims)
        return _as_many("mrl_weights", config.mrl_weights, "vector lengths", self.dims)

    def exit_weights(self, config: TrainConfig) -> tuple[float, ...]:
        """The share of each exit, ascending."""
        if config.mll_weights == "uniform":
            weights: tuple[float, ...] = (1.0,) * len(self.exits)
        elif config.mll_weights == "linear":
            weights = tuple(map(float, self.exits))
        elif config.mll_weights == "last":
            before = len(self.exits) - 1
            weights = (config.mll_prior_weight / max(1, before),) * before + (1.0,)
        else:
            weights = _as_many("mll_weights", config.mll_weights, "exits", self.exits)
        return tuple(weight / sum(weights) for weight in weights)

    def valid_grid(self, config: TrainConfig) -> Cube | None:
        """The cuts that validation measures; an axis whose key is null is not cut."""
        asked = {
            "valid_ranks": config.valid_ranks,
            "valid_layers": config.valid_layers,
            "valid_dims": config.valid_dims,
        }
        trained = {"valid_ranks": self.ranks, "valid_layers": self.exits, "valid_dims": self.dims}
        problems = []
        for key, values in asked.items():
            listed = ", ".join(map(str, sorted(trained[key])))
            listed = listed or "a whole token table, which has no ranks"
            problems += [
                f"  - {key}: {v} is not trained (trained: {listed})"
                for v in values or ()
                if v not in trained[key]
            ]
        if problems:
            raise UserError("validation measures only what is trained:\n" + "\n".join(problems))
        if not any(asked.values()):
            return None
        return Cube(
            *(
                tuple(sorted(values or (max(trained[key], default=0),)))
                for key, values in asked.items()
            )
        )


def _as_many(
    key: str, weights: tuple[float, ...], what: str, sizes: tuple[int, ...]
) -> tuple[float, ...]:
    if len(weights) != len(sizes):
        raise UserError(
            f"{key}: {len(weights)} numbers for {len(sizes)} {what}; give one for each of "
            f"{', '.join(map(str, sizes))}"
        )
    return weights


def _check_sizes(config: TrainConfig, backbone: Qwen3Config) -> None:
    layers, hidden = backbone.num_hidden_layers, backbone.hidden_size
    deepest, longest = max(config.mll_layers or (0,)), max(config.mrl_dims or (0,))
    largest_rank = min(backbone.vocab_size, hidden)
    former = ModelRecord.load(Path(config.model_path))
    former_rank = former.ranks[-1] if former is not None and former.ranks else config.r
    smallest_side = min(map(min, matrix_shapes(backbone).values()))
    positions = backbone.max_position_embeddings
    checks = (
        (
            config.r > largest_rank,
            f"r: {config.r} is more than the token table's {largest_rank} (of {hidden} hidden "
            "dimensions)",
        ),
        (
            config.r > former_rank,
            f"r: {config.r} is more than the {former_rank} that {config.model_path} was trained "
            "with",
        ),
        (
            deepest > layers,
            f"mll_layers: {deepest} is deeper than the backbone's {layers} layers",
        ),
        (
            longest > hidden,
            f"mrl_dims: {longest} is longer than the backbone's hidden size {hidden}",
        ),
        (
            config.lora_r > smallest_side,
            f"lora_r: {config.lora_r} is more than the {smallest_side} of the layers' smallest "
            "matrix",
        ),
        (
            config.max_seq_length > positions,
            f"max_seq_length: {config.max_seq_length} is longer than the backbone's {positions}",
        ),
    )
    problems = [f"  - {problem}" for wrong, problem in checks if wrong]
    if problems:
        raise UserError("the config does not fit the backbone:\n" + "\n".join(problems))
