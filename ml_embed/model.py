"""The encoder: a Qwen3 backbone, its factorised token table (MEL), and pooling heads at several
depths (MLL).

The nested dims (MRL) are a property of the loss, not of the model: every vector is read whole here
and cut there.

Letters: V vocabulary, H hidden size, r rank, L layers, T tokens of a packed batch, N sequences, E
    exits.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3Model

from ml_embed.data.packing import PackedSequences
from ml_embed.errors import UserError
from ml_embed.kernels.attention import ATTENTION_NAME, Kernel, register_packed_attention
from ml_embed.kernels.compilation import compile_in_place
from ml_embed.kernels.last_layer import read_last_tokens_only
from ml_embed.kernels.rms_norm import fuse_norms

EXIT_LAYERS = (1, 2, 4, 8, 16, 24, 32, 40, 48)
SMALLEST_DIM = 8
SMALLEST_RANK = 64

NormSharing = Literal["shared", "per_layer"]


def factorize_table(
    table: Tensor, rank: int, token_share: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best factors A (V, r), B (r, H) of a token table E (V, H), at r and at every smaller rank
    they are cut to.

    B holds the r leading eigenvectors of sum_x p(x) E_x^T E_x as rows and A = E B^T. With p uniform
    this is the truncated SVD, A = U_r S_r and B = V_r^T (Eckart-Young).

    Args:
        table: (V, H).
        rank: r, at most min(V, H).
        token_share: p, (V,), non-negative; None is uniform.
    Returns:
        A, B in the table's dtype. Each row of B is signed so that its largest component is
        positive.
    """
    assert 1 <= rank <= min(table.shape), (rank, table.shape)
    wide = table.double()
    weighted = wide if token_share is None else wide * token_share.to(wide).unsqueeze(1)
    _, vectors = torch.linalg.eigh(wide.T @ weighted)  # ascending eigenvalues, (H, H) columns
    basis = vectors.flip(1)[:, :rank].T  # (r, H)
    largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
    basis = basis * largest.sign()
    return (wide @ basis.T).to(table.dtype), basis.to(table.dtype)


class FactorizedEmbedding(nn.Module):
    """A token table kept as two factors, E ~ A B: neither E nor its gradient ever exists (MEL)."""

    def __init__(self, A: Tensor, B: Tensor):
        super().__init__()
        assert A.shape[1] == B.shape[0], (A.shape, B.shape)
        self.A = nn.Parameter(A)  # (V, r)
        self.B = nn.Parameter(B)  # (r, H)

    @property
    def rank(self) -> int:
        return self.B.shape[0]

    def forward(self, input_ids: Tensor, rank: int | None = None) -> Tensor:
        """(T,) token ids -> (T, H) vectors A[ids, :rank] B[:rank]; rank None is the whole of it."""
        rows = F.embedding(input_ids, self.A)[:, :rank]
        return rows @ self.B[:rank]


class PlainEmbedding(nn.Embedding):
    """A whole token table (r = 0), called like a factorised one."""

    def forward(self, input_ids: Tensor, rank: int | None = None) -> Tensor:
        assert rank is None
        return super().forward(input_ids)


class MatryoshkaEncoder(nn.Module):
    """Packed token ids -> one vector for each text and exit.

    transformers' own Qwen3 runs, with our attention, on CPUs with our norms, and without the last
    layer's unread rows (`ml_embed.kernels`, `rms_norm`, `last_layer`). Two of its parts are held
    here instead: the token table, which becomes factors, and the final norm, so that it sees N
        pooled rows and not T tokens at each exit.
    """

    _no_split_modules = ("Qwen3DecoderLayer",)  # what sharding engines keep whole

    def __init__(
        self,
        backbone: Qwen3Model,
        exits: Sequence[int],
        factors: tuple[Tensor, Tensor] | None = None,
        norm_sharing: NormSharing = "shared",
        kernel: Kernel = "sdpa",
        gradient_checkpointing: bool = False,
        compile_layers: bool = False,
    ):
        """
        Args:
            backbone: a Qwen3 model; it is taken over, not copied.
            exits: layers after which a vector is read, ascending, the last one included.
            factors: A (V, r), B (r, H) in place of the backbone's token table; None keeps the
                table.
            norm_sharing: one final norm for all exits, or a copy trained apart for each.
            kernel: which attention kernel runs (`ml_embed.kernels`).
            gradient_checkpointing: recompute each layer in the backward pass; one (T, H) tensor a
                layer is kept.
            compile_layers: fuse what stands around attention in all layers but the last, by
                torch.compile.
        """
        super().__init__()
        check_supported(backbone.config)
        assert list(exits) == sorted(set(exits)), exits
        assert exits[-1] == backbone.config.num_hidden_layers, (
            exits,
            backbone.config.num_hidden_layers,
        )
        register_packed_attention()
        backbone.set_attn_implementation(ATTENTION_NAME)
        read_last_tokens_only(backbone.layers[-1])
        if gradient_checkpointing:
            # transformers renamed the method after 5.3 and warns of the old name
            enable = getattr(
                backbone, "activation_checkpointing_enable", backbone.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        not_compiled = backbone.layers
        if compile_layers:
            # Not the last one: cut up by the hooks that narrow it, it is slower compiled (by 5 to
            # 10 % of a step).
            compile_in_place(backbone.layers[:-1])
            not_compiled = backbone.layers[-1:]
        fuse_norms(not_compiled, type(backbone.norm))
        self.config: Qwen3Config = backbone.config
        self.exits = tuple(exits)
        self.norm_sharing = norm_sharing
        self.kernel = kernel
        if factors is None:
            self.embedding = PlainEmbedding.from_pretrained(
                backbone.embed_tokens.weight.data, freeze=False
            )
        else:
            self.embedding = FactorizedEmbedding(*factors)
        final_norm = backbone.norm
        if norm_sharing == "shared":
            self.norms = nn.ModuleList([final_norm])
        else:
            self.norms = nn.ModuleList([_copy_norm(final_norm, self.config) for _ in self.exits])
        backbone.register_module("embed_tokens", None)
        backbone.register_module("norm", nn.Identity())
        self.backbone = backbone

    @property
    def rank(self) -> int:
        """r of the factors; 0 is a whole token table."""
        return self.embedding.rank if isinstance(self.embedding, FactorizedEmbedding) else 0

    def forward(
        self, input_ids: Tensor, packed: PackedSequences, rank: int | None = None
    ) -> Tensor:
        """Vectors of all texts at all exits, not normalised.

        Args:
            input_ids: (T,) int64, the texts one behind another, each ending in EOS.
            packed: their lengths.
            rank: leading components of the token factors to use; None is all.
        Returns:
            (E, N, H) float32: FinalRMSNorm of each exit layer's hidden state at each text's last
            token.
        """
        hidden = self.embedding(input_ids, rank).unsqueeze(0)  # (1, T, H)
        output = self.backbone(
            inputs_embeds=hidden,
            position_ids=packed.position_ids.unsqueeze(0),
            use_cache=False,
            output_hidden_states=len(self.exits) > 1,
            packed=packed,
            kernel=self.kernel,
        )
        layers = (
            output.hidden_states
            if len(self.exits) > 1
            else {self.exits[0]: output.last_hidden_state}
        )
        last_tokens = packed.last_tokens
        # Pool first, normalise after: the norm sees N rows, not T, at each exit.
        pooled = [
            layers[exit_layer].squeeze(0).index_select(0, last_tokens).float()
            for exit_layer in self.exits
        ]
        if self.norm_sharing == "shared":
            return self.norms[0](torch.stack(pooled))
        return torch.stack([norm(rows) for norm, rows in zip(self.norms, pooled, strict=True)])


def _copy_norm(norm: nn.Module, config: Qwen3Config) -> nn.Module:
    copy = type(norm)(config.hidden_size, eps=config.rms_norm_eps)
    copy.load_state_dict(norm.state_dict())
    return copy


def check_supported(config: Any) -> None:
    """Refuse a backbone that this encoder would compute wrongly.

    Raises:
        UserError: not Qwen3, sliding-window attention, or attention dropout.
    """
    if config.model_type != "qwen3":
        raise UserError(
            f"the backbone is of type {config.model_type!r}; only qwen3 backbones can be trained"
        )
    if any(kind != "full_attention" for kind in config.layer_types):
        raise UserError(
            "the backbone has sliding-window attention; set use_sliding_window to false in its "
            "config.json"
        )
    if config.attention_dropout:
        raise UserError(
            "the backbone's attention_dropout is not 0; set it to 0.0 in its config.json"
        )


def default_exits(num_layers: int) -> tuple[int, ...]:
    """Layers after which a vector is read, ascending; always ends with the last one."""
    return tuple(sorted({layer for layer in EXIT_LAYERS if layer <= num_layers} | {num_layers}))


def _doublings(smallest: int, largest: int) -> set[int]:
    """{smallest, 2 smallest, 4 smallest, ... < largest} and largest."""
    sizes = {largest}
    size = smallest
    while size < largest:
        sizes.add(size)
        size *= 2
    return sizes


def default_dims(hidden_size: int) -> tuple[int, ...]:
    """Nested vector lengths, largest first: H, ..., 32, 16, 8."""
    return tuple(sorted(_doublings(SMALLEST_DIM, hidden_size), reverse=True))


def default_ranks(rank: int) -> tuple[int, ...]:
    """Nested ranks of the token table, ascending: 64, 128, 256, ..., r."""
    return tuple(sorted(_doublings(SMALLEST_RANK, rank)))


def dim_weights(dims: Sequence[int]) -> tuple[float, ...]:
    """Loss weight c_n = 1 / (n sqrt(d_1 / d_n)) of the n-th largest dim, n from 1 (arXiv
    2605.15081).

    `dims` are given largest first; d_1 is the whole vector.
    """
    largest = dims[0]
    return tuple(1.0 / (n * math.sqrt(largest / dim)) for n, dim in enumerate(dims, start=1))
