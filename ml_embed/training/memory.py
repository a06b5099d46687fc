"""What a process of a run needs of memory, estimated before any weight is loaded.

Letters: H hidden size.
"""

from dataclasses import dataclass

from transformers import Qwen3Config

from ml_embed.config import TrainConfig
from ml_embed.model_folders.sizes import matrix_shapes

GIB = 1024**3


@dataclass(frozen=True)
class Parameters:
    """How many parameters there are."""

    saved: int
    """in the model that is saved: adapters are merged in it"""
    trained: int
    """those that have a gradient and moments"""
    held: int
    """in memory while it trains"""
    embedding: int


@dataclass(frozen=True)
class TokensPerStep:
    """Real tokens that one process encodes in a step."""

    average: float
    most: int


def estimate_memory(
    config: TrainConfig,
    backbone: Qwen3Config,
    parameters: Parameters,
    tokens: TokensPerStep,
    half_precision: bool,
) -> dict[str, float]:
    """Rough need of one process, in GiB: what is always there, and the activations of a step.

    float32 weights, gradients and two AdamW moments; activations and, beside the weights, a copy of
    them in bfloat16 where it computes in that. "total" is with the average batch, "total_most" with
    the largest that there can be. Losses are not counted.
    """
    gradients = 4 * parameters.trained / GIB
    per_token = _activations_per_token(config, backbone) * (2 if half_precision else 4) / GIB
    fixed = {
        "weights": (6 if half_precision else 4) * parameters.held / GIB,
        "gradients": gradients,
        "optimizer": 2 * gradients,
    }
    activations = {
        "activations": per_token * _at_once(tokens.average, config),
        "activations_most": per_token * _at_once(tokens.most, config),
    }
    always = sum(fixed.values())
    totals = {name.replace("activations", "total"): always + x for name, x in activations.items()}
    return {name: round(value, 3) for name, value in (fixed | activations | totals).items()}


def _at_once(tokens: float, config: TrainConfig) -> float:
    """Tokens whose activations are in memory together; a longer text is a chunk of its own."""
    if not config.max_tokens_per_forward:
        return tokens
    return min(tokens, max(config.max_tokens_per_forward, config.max_seq_length))


def _activations_per_token(config: TrainConfig, backbone: Qwen3Config) -> int:
    """Values kept for the backward pass of one token.

    In each layer about 8 H for the norms and residuals, 4 for each query and 6 for each key and
    value component, 4 for each MLP component, and what stands between an adapter's two parts.
    """
    assert backbone.num_key_value_heads is not None  # Qwen3Config fills it in
    heads = 4 * backbone.num_attention_heads + 6 * backbone.num_key_value_heads
    per_layer = (
        8 * backbone.hidden_size
        + heads * backbone.head_dim
        + 4 * backbone.intermediate_size
        + config.lora_r * len(matrix_shapes(backbone))
    )
    layers = backbone.num_hidden_layers
    if config.gradient_checkpointing:
        return per_layer + backbone.hidden_size * layers
    return per_layer * layers
