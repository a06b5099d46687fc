"""Writing a cut model as one GGUF file, for llama.cpp and what is built on it.

Needs the extra `gguf`, which is imported where it is used. llama.cpp knows no token factors, so the
file holds the whole token table; it pools the last token, normalises, and gives all H components.

Letters: V vocabulary, H hidden size, D vector length.
"""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3Model

from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_folder
from ml_embed.model import FactorizedEmbedding
from ml_embed.model_folders.card import Form, write_card
from ml_embed.model_folders.cut import Cut
from ml_embed.model_folders.export import Part, stored_dtype
from ml_embed.model_folders.read import load_for_transformers
from ml_embed.model_folders.record import TABLE
from ml_embed.model_folders.sizes import parameters_of
from ml_embed.model_folders.write import save_settings
from ml_embed.prepare.tokenizer import end_token, splits_as_qwen

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Of matrices; vectors are float32, as llama.cpp computes with them."""
USE = """For llama.cpp and what is built on it:

```bash
llama-embedding -m FOLDER_OR_NAME/{file} -p "a text"
llama-server -m FOLDER_OR_NAME/{file} --embedding
```

The file says that the last token is pooled and the end token appended. llama.cpp gives {hidden}
components.{cut} It refuses texts of more than {max_seq_length} tokens, leaves Unicode as it is
(give texts as NFC), and puts no prompt in front of them. With `--flash-attn off -ctk f32 -ctv f32`
its vectors are exact; without, it keeps keys and values in 16 bits."""
CUT = """ This model is cut to {dim}: **take the first {dim} and normalise again**."""


def export_gguf(part: Part, output: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Write a folder with the model in one file, the config, the tokenizer and a card.

    Args:
        part: what to write, from `open_part`.
        output: the new folder, checked already; it appears whole or not at all.
        dtype: of the matrices; None is the model's; float64 becomes float32.
    Returns:
        for the command's JSON line.
    Raises:
        UserError: the extra is missing, the tokenizer or the positions are of a kind that this
            file does not say, or the layers have biases.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("gguf is not installed; pip install 'ml-embed[gguf]'")
    source, cut, record = part.folder, part.cut, part.record
    _check(source.path, source.config, source.tokenizer)
    backbone = load_for_transformers(source, cut.depth, cut.rank)
    dtype = dtype or stored_dtype(source.config)
    dtype = dtype if dtype in TYPES else torch.float32
    config = backbone.config
    with atomic_folder(output) as new:
        from gguf import GGUFWriter

        writer = GGUFWriter(new / FILE, "qwen3")
        _add_settings(writer, config, record.max_seq_length)
        _add_tokenizer(writer, source.tokenizer, config.vocab_size)
        _add_weights(writer, backbone, TYPES[dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        save_settings(new, config, source.tokenizer, record, dtype)
        write_card(new, record, _form(part, config))
        size = (new / FILE).stat().st_size
    return {"file": FILE, "bytes_of_weights": size}


def _form(part: Part, config: Qwen3Config) -> Form:
    """The whole vector and the whole table, whatever the cut."""
    hidden, cut = config.hidden_size, part.cut
    shorter = CUT.format(dim=cut.dim) if cut.dim < hidden else ""
    length = part.record.max_seq_length
    use = USE.format(file=FILE, hidden=hidden, cut=shorter, max_seq_length=length)
    parameters = parameters_of(config, Cut(0, cut.depth, cut.dim))
    return Form("gguf", use, parameters, hidden, "the last token's hidden state, normalised")


def _check(folder: Path, config: Qwen3Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what llama.cpp would compute otherwise."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    if description["model"]["type"] != "BPE" or not splits_as_qwen(description):
        raise UserError(
            f"the tokenizer of {folder} does not cut texts into pieces as Qwen's does, which is "
            "what --gguf writes; convert this model with llama.cpp's own convert_hf_to_gguf.py"
        )
    if config.attention_bias:
        raise UserError(
            f"config.json of {folder}: attention_bias is true, and llama.cpp reads no biases of a "
            "Qwen3 model; --onnx writes them"
        )
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind != "default":
        raise UserError(
            f"config.json of {folder}: positions of the kind {kind!r} are not written by --gguf; "
            "convert this model with llama.cpp's own convert_hf_to_gguf.py"
        )


def _add_settings(writer: "GGUFWriter", config: Qwen3Config, max_seq_length: int) -> None:
    from gguf import PoolingType

    assert config.num_key_value_heads is not None
    assert config.rope_parameters is not None
    writer.add_type("model")
    writer.add_context_length(max_seq_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_pooling_type(PoolingType.LAST)


def _add_tokenizer(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """The vocabulary, with fillers up to the V rows of the table."""
    from gguf import TokenType

    description = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {number: name for name, number in tokenizer.get_vocab().items()}
    special = {token["id"]: token["special"] for token in description["added_tokens"]}
    tokens, types = [], []
    for number in range(rows):
        tokens.append(names.get(number, f"[PAD{number}]"))
        if number not in names:
            types.append(TokenType.UNUSED)
        elif number in special:
            types.append(TokenType.CONTROL if special[number] else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    merges = description["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(end_token(tokenizer))
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(True)


def _add_weights(writer: "GGUFWriter", backbone: Qwen3Model, kind: str) -> None:
    from gguf import MODEL_ARCH, GGMLQuantizationType, LlamaFileType, get_tensor_name_map
    from gguf.quants import quantize

    names = get_tensor_name_map(MODEL_ARCH.QWEN3, backbone.config.num_hidden_layers)
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    for name, tensor in _named_weights(backbone).items():
        own = names.get_name(f"model.{name}", try_suffixes=(".weight",))
        chosen = GGMLQuantizationType[kind if tensor.ndim > 1 else "F32"]
        values = np.ascontiguousarray(tensor.detach().float().numpy())
        writer.add_tensor(own, quantize(values, chosen), raw_dtype=chosen)


def _named_weights(backbone: Qwen3Model) -> dict[str, Tensor]:
    """The weights by Qwen3Model's names, the (V, H) table multiplied out."""
    state = backbone.state_dict()
    embedding = backbone.get_input_embeddings()
    if isinstance(embedding, FactorizedEmbedding):
        state = {name: t for name, t in state.items() if not name.startswith("embed_tokens.")}
        state[TABLE] = embedding.A @ embedding.B
    return state
