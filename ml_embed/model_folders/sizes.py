"""Parameter counts, from a backbone's config alone."""

from transformers import Qwen3Config


def matrix_shapes(backbone: Qwen3Config) -> dict[str, tuple[int, int]]:
    """(O, I) of each matrix of a decoder layer; all of them get an adapter."""
    hidden, inner, head = backbone.hidden_size, backbone.intermediate_size, backbone.head_dim
    assert backbone.num_key_value_heads is not None  # Qwen3Config fills it in
    queries, keys = backbone.num_attention_heads * head, backbone.num_key_value_heads * head
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def adapter_parameters(backbone: Qwen3Config, rank: int) -> int:
    """Parameters of all layers' adapters."""
    return backbone.num_hidden_layers * rank * sum(map(sum, matrix_shapes(backbone).values()))


def layer_parameters(backbone: Qwen3Config) -> int:
    """Parameters of one decoder layer."""
    matrices = sum(outputs * inputs for outputs, inputs in matrix_shapes(backbone).values())
    return matrices + 2 * backbone.hidden_size + 2 * backbone.head_dim
