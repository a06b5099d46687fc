"""The last layer without the work that nobody reads.

Of the last layer's output only each text's last token is read, so its queries, its output
projection, and the norm and the MLP behind attention need N rows and not T. (Keys and values need
them all.)

transformers' layer runs unchanged; torch's module hooks narrow what its parts see.

Letters: T tokens of a packed batch, N sequences, H hidden size.
"""

import threading

from torch import Tensor, nn

NARROWED = (
    ("self_attn.q_proj", "self_attn.q_proj"),
    ("self_attn.o_proj", "self_attn.o_proj"),
    ("post_attention_layernorm", "mlp"),
)
"""Parts of a Qwen3 decoder layer that take every token by itself: from one module's input to
another's output."""


def read_last_tokens_only(layer: nn.Module) -> None:
    """Let a Qwen3 decoder layer, the model's last one, compute for last tokens only what nothing
    else reads.

    The layer must be called with `packed=` (`ml_embed.data.packing.PackedSequences`). Its output is
    right at each sequence's last token; the other rows are unfinished and must not be read.
    """
    call = (
        threading.local()
    )  # what the layer is working on: one model may encode in several threads

    def remember(_: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        # At attention and not at the layer: what recomputes a layer in the backward pass (gradient
        # checkpointing) may leave out the layer's own hooks, but runs this again, before the parts
        # below.
        call.rows = keywords["packed"].last_tokens
        return arguments, keywords | {"last_queries_only": True}

    def select(_: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        """(1, T, width) -> (1, N, width)"""
        call.tokens = arguments[0].shape[1]
        return arguments[0].index_select(1, call.rows)

    def put_back(_: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        """(1, N, width) -> (1, T, width), 0 for the other tokens"""
        whole = output.new_zeros((1, call.tokens, output.shape[2]))
        return whole.index_copy_(1, call.rows, output)

    layer.get_submodule("self_attn").register_forward_pre_hook(remember, with_kwargs=True)
    for first, last in NARROWED:
        layer.get_submodule(first).register_forward_pre_hook(select)
        layer.get_submodule(last).register_forward_hook(put_back)
