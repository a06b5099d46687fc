"""Parameter counts and vector sizes, without any weights.

Letters: V vocabulary, H hidden size.
"""

from transformers import Qwen3Config

from ml_embed.model_folders.cut import Cut

BYTES_PER_COMPONENT = 4  # vectors are given as float32


def matrix_shapes(backbone: Qwen3Config) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each matrix of a decoder layer; all of them get an adapter."""
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


def embedding_parameters(backbone: Qwen3Config, rank: int) -> int:
    """Parameters of the token factors A (V, rank) and B (rank, H); rank 0: of the (V, H) table."""
    vocabulary, hidden = backbone.vocab_size, backbone.hidden_size
    return rank * (vocabulary + hidden) if rank else vocabulary * hidden


def cut_parameters(cut: Cut, embedding: int, layer: int, hidden: int) -> int:
    """Parameters of a cut: its token factors or table, the layers run, one final norm.

    Args:
        embedding: parameters of the token factors per rank, or of the whole table at rank 0.
        layer: parameters of one decoder layer.
        hidden: H.
    """
    return (cut.rank or 1) * embedding + cut.depth * layer + hidden


def parameters_of(backbone: Qwen3Config, cut: Cut) -> int:
    """`cut_parameters` of a model with this config."""
    embedding = embedding_parameters(backbone, min(cut.rank, 1))
    return cut_parameters(cut, embedding, layer_parameters(backbone), backbone.hidden_size)
