"""The last layer without the work that nobody reads.

Of the last layer's output only each text's last token is read. Every text's keys and values are needed for that, but
queries, the output projection, the norm and the MLP only for N rows and not T: most of a layer's arithmetic.

Letters: T tokens of a packed batch, N sequences, H hidden size, A query heads, G key/value heads, D head size.
"""

from types import MethodType
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import rotate_half

from ml_embed.attention import Kernel, PackedSequences, attend_to_own_sequence

if TYPE_CHECKING:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


def read_last_tokens_only(layer: nn.Module) -> None:
    """Let a Qwen3 decoder layer, the model's last one, give (1, N, H) in place of (1, T, H): its last tokens.

    It keeps its class, its parameters and their names: whatever wraps or shards layers sees an ordinary one.
    """
    vars(layer)["forward"] = MethodType(_forward_of_last_tokens, layer)


def _forward_of_last_tokens(
    layer: "Qwen3DecoderLayer",
    hidden_states: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    packed: PackedSequences,
    kernel: Kernel,
    **_: object,
) -> Tensor:
    """(1, T, H) -> (1, N, H). The layer's own parts as `Qwen3DecoderLayer.forward` and `Qwen3Attention.forward` use
    them, queries for last tokens only."""
    attention, rows = layer.self_attn, packed.last_tokens
    cosine, sine = position_embeddings  # (1, T, D)
    inputs = layer.input_layernorm(hidden_states)
    queries = attention.q_norm(_heads(attention.q_proj(inputs.index_select(1, rows)), attention.head_dim))
    keys = attention.k_norm(_heads(attention.k_proj(inputs), attention.head_dim))
    values = _heads(attention.v_proj(inputs), attention.head_dim)
    attended = attend_to_own_sequence(
        _rotate(queries, cosine.index_select(1, rows), sine.index_select(1, rows)).transpose(1, 2),
        _rotate(keys, cosine, sine).transpose(1, 2),
        values.transpose(1, 2),
        packed,
        attention.scaling,
        kernel,
    )
    residual = hidden_states.index_select(1, rows) + attention.o_proj(attended.flatten(2))
    return residual + layer.mlp(layer.post_attention_layernorm(residual))


def _heads(projected: Tensor, head_dim: int) -> Tensor:
    """(1, rows, heads * D) -> (1, rows, heads, D)"""
    return projected.unflatten(2, (-1, head_dim))


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of (1, rows, heads, D) by (1, rows, D)."""
    return x * cosine.unsqueeze(2) + rotate_half(x) * sine.unsqueeze(2)
