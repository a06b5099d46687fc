"""Writing a model folder: a plain Qwen3 folder that also holds the nested parts.

`transformers`, `sentence_transformers` and servers read the standard files, in which the token
table is multiplied out; `read.py` reads the factors in `nested/`. Weights are safetensors, never a
pickle.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3Model

from ml_embed.errors import UserError
from ml_embed.files.atomic import MAX_SHARD_SIZE, give_usual_permissions, write_json
from ml_embed.model_folders.card import own_form, write_card
from ml_embed.model_folders.checks import is_finite
from ml_embed.model_folders.modules import Modules, write_modules
from ml_embed.model_folders.record import (
    EXIT_NORMS_FILE,
    FACTORS_FILE,
    NESTED,
    TABLE,
    ModelRecord,
)
from ml_embed.model_folders.seal import seal
from ml_embed.model_folders.turning import WHOLE_TABLE, A, B
from ml_embed.prepare.tokenizer import append_eos_template, end_token


class NotFiniteError(UserError):
    """Names a weight that has NaN or infinity, and so is not written."""


def save_model_folder(
    folder: Path,
    state: Mapping[str, Tensor],
    config: Qwen3Config,
    tokenizer: PreTrainedTokenizerBase,
    record: ModelRecord,
    with_table: bool = True,
) -> None:
    """Write a complete model folder into an empty or new `folder`.

    Args:
        folder: where to write; `atomic_folder` around the call makes it appear whole or not at all.
        state: the encoder's whole state dict, on CPU (`MatryoshkaEncoder.state_dict()`).
        config: the backbone's config; its number of layers is the model's depth.
        tokenizer: the backbone's; a copy that appends the end token by itself is saved.
        record: what was trained; everybody gets vectors of the longest of its dims.
        with_table: False leaves the token table out, where there are factors. Then the layers lie
            in `nested/` too, so that no other program takes them for a whole model.
    Raises:
        NotFiniteError: a weight has NaN or infinity; nothing was written.
    """
    assert with_table or record.ranks
    plain = backbone_state(state, record, with_table)
    check_finite(state)
    if with_table:  # the product of A and B may be infinite where they are not
        check_finite({"the token table": plain[TABLE]})
    place = folder if with_table else folder / NESTED
    place.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(plain, place, max_shard_size=MAX_SHARD_SIZE)
    _save_nested(folder, state, record)
    save_settings(folder, config, tokenizer, record, plain["norm.weight"].dtype)
    length, name = record.max_seq_length, record.default_prompt_name
    modules = Modules(record.dims[0], length, record.prompts, name)
    write_modules(folder, config.hidden_size, modules)
    write_card(folder, record, own_form(config, record, with_table))
    seal(folder, record)
    give_usual_permissions(folder)


def save_settings(
    folder: Path,
    config: Qwen3Config,
    tokenizer: PreTrainedTokenizerBase,
    record: ModelRecord,
    dtype: torch.dtype,
) -> None:
    """Write config.json and the tokenizer of a model whose weights have a dtype."""
    backbone = copy.deepcopy(config)
    # Readers load the weights in this dtype, so it is theirs; the backbone's may have been another.
    backbone.dtype = dtype
    # The name by which embedding servers know this layout of files.
    backbone.architectures = ["Qwen3ForCausalLM"]
    backbone.tie_word_embeddings = True
    backbone.eos_token_id = end_token(tokenizer)
    backbone.pad_token_id = tokenizer.pad_token_id
    backbone.is_matryoshka = len(record.dims) > 1
    backbone.matryoshka_dimensions = sorted(record.dims)
    save_config(folder, backbone)
    tokenizer = copy.deepcopy(tokenizer)
    append_eos_template(tokenizer)
    tokenizer.model_max_length = record.max_seq_length
    save_tokenizer(folder, tokenizer)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise NotFiniteError if one of them has NaN or infinity."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise NotFiniteError(f"{name} has NaN or infinity")


def save_backbone(folder: Path, model: Qwen3Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a plain backbone into an empty `folder`; its tokenizer appends what it did before."""
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    save_config(folder, model.config)
    save_tokenizer(folder, tokenizer)
    give_usual_permissions(folder)


def _save_nested(folder: Path, state: Mapping[str, Tensor], record: ModelRecord) -> None:
    """What only this project reads: token factors and exit norms, where there are any."""
    tensors: dict[str, dict[str, Tensor]] = {}
    if record.ranks:
        tensors[FACTORS_FILE] = {"A": state[A], "B": state[B]}
    if record.norm_sharing == "per_layer":
        norms = {str(layer): state[f"norms.{i}.weight"] for i, layer in enumerate(record.exits)}
        tensors[EXIT_NORMS_FILE] = norms
    for file, named in tensors.items():
        (folder / NESTED).mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, folder / file)


def save_config(folder: Path, config: Qwen3Config) -> None:
    """Write config.json so that transformers 4 and servers read the same positions from it.

    They look for `rope_theta` and `rope_scaling` at the top level and silently take other values
    where these are missing.
    """
    config.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    rope = dict(values["rope_parameters"])
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    write_json(path, values)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer so that transformers 4, transformers.js and servers read it as it is."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None  # an embedding model does not chat
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        values.pop(name, None)
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    values["padding_side"] = "left"  # so that the last position, which some read, is the last token
    values["truncation_side"] = "right"  # as in training
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    write_json(path, values)


def backbone_state(
    state: Mapping[str, Tensor], record: ModelRecord, with_table: bool = True
) -> dict[str, Tensor]:
    """The encoder's state under Qwen3Model's names, its token table multiplied out or left out."""
    plain = {
        name.removeprefix("backbone."): tensor.contiguous()
        for name, tensor in state.items()
        if name.startswith("backbone.")
    }
    if not record.ranks:
        plain[TABLE] = state[WHOLE_TABLE]
    elif with_table:
        plain[TABLE] = (state[A].float() @ state[B].float()).to(state[A].dtype)
    deepest = 0 if record.norm_sharing == "shared" else len(record.exits) - 1
    plain["norm.weight"] = state[f"norms.{deepest}.weight"]
    return plain
