"""The last layer without the work that nobody reads.

Of the last layer's output only each text's last token is read, and after attention every token goes its own way. So the
norm and the MLP behind attention, most of a layer's arithmetic, need N rows and not T. (Keys and values need them all.)

transformers' layer runs unchanged; torch's module hooks narrow what its two parts see.

Letters: T tokens of a packed batch, N sequences, H hidden size.
"""

import threading

from torch import Tensor, nn


def read_last_tokens_only(layer: nn.Module) -> None:
    """Let a Qwen3 decoder layer, the model's last one, compute norm and MLP after attention for last tokens only.

    The layer must be called with `packed=` (`ml_embed.attention.PackedSequences`). Its output is right at each
    sequence's last token; the other rows lack the MLP's part and must not be read.
    """
    call = threading.local()  # what the layer is working on: one model may encode in several threads

    def remember(_: nn.Module, arguments: tuple, keywords: dict) -> None:
        # At attention and not at the layer: what recomputes a layer in the backward pass (gradient checkpointing) may
        # leave out the layer's own hooks, but runs this again, before the parts below.
        call.rows = keywords["packed"].last_tokens

    def select(_: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        """(1, T, H) -> (1, N, H)"""
        call.tokens = arguments[0].shape[1]
        return arguments[0].index_select(1, call.rows)

    def put_back(_: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        """(1, N, H) -> (1, T, H), 0 for the other tokens"""
        whole = output.new_zeros((1, call.tokens, output.shape[2]))
        return whole.index_copy(1, call.rows, output)

    layer.get_submodule("self_attn").register_forward_pre_hook(remember, with_kwargs=True)
    layer.get_submodule("post_attention_layernorm").register_forward_pre_hook(select)
    layer.get_submodule("mlp").register_forward_hook(put_back)
