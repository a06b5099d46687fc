"""The encoder: a Qwen3 backbone with a factorised token table (MEL) and several exits (MLL).

Nested vector lengths (MRL) need nothing of the model: its vectors have all H components, and the
loss or the user cuts them.

Letters: V vocabulary, H hidden size, r rank, T tokens of a packed batch, N sequences, E exits.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3Model

from ml_embed.data.packing import PackedSequences
from ml_embed.errors import UserError
from ml_embed.files.arrays import blocks
from ml_embed.kernels.attention import ATTENTION_NAME, Kernel, register_packed_attention
from ml_embed.kernels.checkpointing import checkpoint_in_place
from ml_embed.kernels.compilation import compile_in_place
from ml_embed.kernels.last_layer import read_last_tokens_only
from ml_embed.kernels.rms_norm import fuse_norms

NormSharing = Literal["shared", "per_layer"]
ROWS_AT_ONCE = 8192
"""Rows of a token table that are factorised at a time: 64 MiB in float64 where H is 1,024."""


def factorize_table(
    table: Tensor, rank: int, token_share: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The factors A (V, r), B (r, H) whose product is closest to a token table E (V, H).

    They minimise sum_x p(x) |E_x - A_x B|^2, at r and, cut to their leading components, at every
    smaller rank. The rows of B are the r leading eigenvectors of sum_x p(x) E_x^T E_x, and
    A = E B^T. With p uniform this is the truncated SVD, A = U_r S_r and B = V_r^T (Eckart-Young).

    The table is gone through in blocks of rows, so that one which is mapped from a file takes
    hardly any memory.

    Args:
        table: (V, H).
        rank: r, at most min(V, H).
        token_share: p, (V,), non-negative: the share of each token in the data; None is uniform.
    Returns:
        A, B in float32, or in float64 if the table is. Each row of B has the sign that makes its
        largest component positive.
    """
    assert 1 <= rank <= min(table.shape), (rank, table.shape)
    _, vectors = torch.linalg.eigh(row_products(table, token_share))  # ascending; (H, H) columns
    basis = vectors.flip(1)[:, :rank].T  # (r, H)
    basis = basis * _signs(basis)
    dtype = torch.promote_types(table.dtype, torch.float32)
    return rows_times(table, basis.T, dtype), basis.to(dtype)


def turn_factors(A: Tensor, B: Tensor, token_share: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factors of the table A B whose leading components are its best ones at every rank.

    They are those of `factorize_table(A B, r, token_share)`, found in r x r: with B^T = Q R, rows
    A R^T and basis Q^T give the same table, and are turned by the eigenvectors W of
    R (sum_x p(x) A_x^T A_x) R^T.

    Args:
        A, B: (V, r) and (r, H).
        token_share: p, as in `factorize_table`.
    Returns:
        G (r, r) and C (r, H), so that A G and C are the turned factors: A G C = A B; with r > H,
        (r, H) and (H, H). The signs are those of `factorize_table`.
    """
    Q, R = torch.linalg.qr(B.double().T)  # (H, r), (r, r)
    _, vectors = torch.linalg.eigh(R @ row_products(A, token_share) @ R.T)  # ascending eigenvalues
    W = vectors.flip(1)
    C = W.T @ Q.T
    sign = _signs(C)
    return (R.T @ W * sign.T).to(A.dtype), (sign * C).to(B.dtype)


def rows_times(table: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """(V, X) x (X, Y) -> (V, Y) in a dtype, computed in float64, a block of rows at a time."""
    product = torch.empty(len(table), matrix.shape[1], dtype=dtype, device=table.device)
    for block in blocks(len(table), ROWS_AT_ONCE):
        product[block] = table[block].double() @ matrix.double()
    return product


def row_products(table: Tensor, token_share: Tensor | None = None) -> Tensor:
    """sum_x p(x) E_x^T E_x of a table (V, X): (X, X) float64; p as in `factorize_table`."""
    size = table.shape[1]
    products = torch.zeros(size, size, dtype=torch.float64, device=table.device)
    for block in blocks(len(table), ROWS_AT_ONCE):
        wide = table[block].double()
        share = None if token_share is None else token_share[block].to(wide).unsqueeze(1)
        products += wide.T @ (wide if share is None else wide * share)
    return products


def _signs(basis: Tensor) -> Tensor:
    """(r, 1): the sign of each row's largest component."""
    return basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()


class FactorizedEmbedding(nn.Module):
    """A token table as two factors, E ~ A B; neither E nor its gradient is ever computed (MEL)."""

    turned: tuple[Tensor, Tensor] | None = None
    """G and C of `turn_factors`, by which ranks smaller than r are computed; None = as trained"""

    def __init__(self, A: Tensor, B: Tensor):
        super().__init__()
        assert A.shape[1] == B.shape[0], (A.shape, B.shape)
        self.A = nn.Parameter(A)  # (V, r)
        self.B = nn.Parameter(B)  # (r, H)

    @property
    def rank(self) -> int:
        return self.B.shape[0]

    def forward(self, input_ids: Tensor, rank: int | None = None) -> Tensor:
        """(T,) token ids -> (T, H) vectors A[ids, :rank] B[:rank]; rank None is r."""
        if self.turned is not None and rank is not None and rank < self.rank:
            rows = F.embedding(input_ids, self.A)
            turn, basis = (factor.to(rows.dtype) for factor in self.turned)  # FSDP2: bfloat16
            return rows @ turn[:, :rank] @ basis[:rank]
        rows = F.embedding(input_ids, self.A)[:, :rank]
        return rows @ self.B[:rank]


class PlainEmbedding(nn.Embedding):
    """A token table that is not factorised (r = 0), called like one that is."""

    def forward(self, input_ids: Tensor, rank: int | None = None) -> Tensor:
        assert rank is None
        return super().forward(input_ids)


class MatryoshkaEncoder(nn.Module):
    """Packed token ids -> one vector per exit and text.

    The layers are transformers' own; `ml_embed.kernels` makes them faster. The token table and the
    final norm are taken out of the backbone and held here: the table becomes factors, and the norm
    is applied after pooling, to N rows instead of T at each exit.
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
            backbone: a Qwen3 model; it is changed and used, not copied.
            exits: layers after which a vector is read, ascending, the last layer included.
            factors: A (V, r), B (r, H) in place of the backbone's token table; None keeps it.
            norm_sharing: one final norm for all exits, or a copy per exit, each trained apart.
            kernel: what computes attention (`ml_embed.kernels.attention`).
            gradient_checkpointing: keep one (T, H) tensor per layer and compute each layer again in
                the backward pass.
            compile_layers: fuse the operations around attention, by torch.compile, in all layers
                but the last.
        """
        super().__init__()
        check_supported(backbone.config)
        assert list(exits) == sorted(set(exits)), exits
        assert exits[-1] == backbone.config.num_hidden_layers, (
            exits,
            backbone.config.num_hidden_layers,
        )
        _prepare_layers(backbone, gradient_checkpointing, compile_layers)
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
        shared = norm_sharing == "shared"
        norms = [backbone.norm] if shared else [copy.deepcopy(backbone.norm) for _ in self.exits]
        self.norms = nn.ModuleList(norms)
        backbone.register_module("embed_tokens", None)
        backbone.register_module("norm", nn.Identity())
        self.backbone = backbone

    @property
    def rank(self) -> int:
        """r of the factors; 0 without factors."""
        return self.embedding.rank if isinstance(self.embedding, FactorizedEmbedding) else 0

    def forward(
        self, input_ids: Tensor, packed: PackedSequences, rank: int | None = None
    ) -> Tensor:
        """Vectors of all texts at all exits, not normalised.

        Args:
            input_ids: (T,) int64, one text after another, each ending in EOS.
            packed: where the texts end.
            rank: how many leading components of the token factors to use; None is all.
        Returns:
            (E, N, H) float32: FinalRMSNorm of each exit layer's hidden state at each text's last
            token.
        """
        hidden = _in_compute_dtype(self.embedding(input_ids, rank)).unsqueeze(0)  # (1, T, H)
        output = self.backbone(
            inputs_embeds=hidden,
            position_ids=packed.position_ids.unsqueeze(0),
            use_cache=False,
            output_hidden_states=len(self.exits) > 1,
            packed=packed,
            kernel=self.kernel,
        )
        layers = [output.last_hidden_state]
        if len(self.exits) > 1:
            layers = [output.hidden_states[layer] for layer in self.exits]
        # Pool first, normalise after: the norm sees N rows, not T, at each exit.
        last_tokens = packed.last_tokens
        pooled = [hidden.squeeze(0).index_select(0, last_tokens).float() for hidden in layers]
        if self.norm_sharing == "shared":
            return self.norms[0](torch.stack(pooled))
        return torch.stack([norm(rows) for norm, rows in zip(self.norms, pooled, strict=True)])


def _in_compute_dtype(hidden: Tensor) -> Tensor:
    """What the layers add to, in autocast's dtype: half the memory traffic, table or factors."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden
    return hidden.to(torch.get_autocast_dtype(device))


def _prepare_layers(
    backbone: Qwen3Model, gradient_checkpointing: bool, compile_layers: bool
) -> None:
    """Let the layers run with this project's kernels (`ml_embed.kernels`)."""
    register_packed_attention()
    backbone.set_attn_implementation(ATTENTION_NAME)
    read_last_tokens_only(backbone.layers[-1])
    fuse_norms(backbone.layers)
    if compile_layers:
        # Not the last one: the hooks that narrow it split it into pieces, and compiled it is slower
        # (by 5 to 10 % of a step).
        compile_in_place(backbone.layers[:-1])
    if gradient_checkpointing:
        checkpoint_in_place(backbone.layers)


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


# The nested sizes that are trained where the config names none (arXiv 2605.15081).
EXIT_LAYERS = (1, 2, 4, 8, 16, 24, 32, 40, 48)
SMALLEST_DIM = 8
SMALLEST_RANK = 64


def default_exits(num_layers: int) -> tuple[int, ...]:
    """Layers after which a vector is read, ascending: those of `EXIT_LAYERS` and the last one."""
    return tuple(sorted({layer for layer in EXIT_LAYERS if layer <= num_layers} | {num_layers}))


def _doublings(smallest: int, largest: int) -> set[int]:
    """{smallest, 2 smallest, 4 smallest, ...} below `largest`, and `largest`."""
    sizes = {largest}
    size = smallest
    while size < largest:
        sizes.add(size)
        size *= 2
    return sizes


def default_dims(hidden_size: int) -> tuple[int, ...]:
    """Nested vector lengths, largest first: H, then the powers of two below it, down to 8."""
    return tuple(sorted(_doublings(SMALLEST_DIM, hidden_size), reverse=True))


def default_ranks(rank: int) -> tuple[int, ...]:
    """Nested ranks of the token table, ascending: powers of two from 64 to below r, and r."""
    return tuple(sorted(_doublings(SMALLEST_RANK, rank)))


def dim_weights(dims: Sequence[int]) -> tuple[float, ...]:
    """The loss weight c_n = 1 / (n sqrt(d_1 / d_n)) of each nested vector length d_n, n from 1.

    `dims` are given largest first; d_1 is the whole vector (arXiv 2605.15081).
    """
    largest = dims[0]
    return tuple(1.0 / (n * math.sqrt(largest / dim)) for n, dim in enumerate(dims, start=1))
