"""The last decoder layer, computed only for the tokens whose output is read.

Of the last layer's output only each text's last token is read. So its queries, its output
projection, and the norm and the MLP after attention are computed for N rows instead of T. Keys and
values are needed of all T tokens.

transformers' layer runs unchanged; torch's module hooks choose the rows that its parts get.

Letters: T tokens of a packed batch, N sequences, H hidden size.
"""

import threading

from torch import Tensor, nn

NARROWED = (
    ("self_attn.q_proj", "self_attn.q_proj"),
    ("self_attn.o_proj", "self_attn.o_proj"),
    ("post_attention_layernorm", "mlp"),
)
"""Parts of a Qwen3 decoder layer that work on each token by itself, (first module, last module)."""


def read_last_tokens_only(layer: nn.Module) -> None:
    """Make a Qwen3 decoder layer, the model's last one, compute its output for last tokens only.

    The layer must be called with `packed=` (`ml_embed.data.packing.PackedSequences`). Its output is
    right at each sequence's last token; the other rows are unfinished and must not be read.
    """
    # The batch that the layer is working on, per thread: one model may encode in several.
    call = threading.local()

    def remember(_: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        # Hooked to attention and not to the layer: gradient checkpointing, which runs a layer again
        # in the backward pass, may skip the layer's own hooks, but never those of its parts.
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
