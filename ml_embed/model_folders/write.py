"""Writing a model folder: a plain Qwen3 folder that also holds the nested parts.

`transformers`, `sentence_transformers` and servers read the standard files, in which the token
table is multiplied out; `read.py` reads the factors. Weights are safetensors, never a pickle.

Letters: H hidden size.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3Config

from ml_embed.files.atomic import MAX_SHARD_SIZE, give_usual_permissions, write_json
from ml_embed.model_folders.record import EXIT_NORMS_FILE, FACTORS_FILE, ModelRecord
from ml_embed.prepare.tokenizer import append_eos_template


def save_model_folder(
    folder: Path,
    state: Mapping[str, Tensor],
    config: Qwen3Config,
    tokenizer: PreTrainedTokenizerBase,
    record: ModelRecord,
    dim: int | None = None,
) -> None:
    """Write a complete model folder into an empty or new `folder`.

    Args:
        folder: where to write; `atomic_folder` around the call makes it appear whole or not at all.
        state: the encoder's whole state dict, on CPU (`MatryoshkaEncoder.state_dict()`).
        config: the backbone's config; its number of layers is the model's depth.
        tokenizer: the backbone's; a copy that appends EOS by itself is saved.
        record: what was trained.
        dim: length of the vectors that sentence-transformers gives; None is all of H.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = backbone_state(state, record)
    save_torch_state_dict(plain, folder, max_shard_size=MAX_SHARD_SIZE)
    if record.ranks:
        factors = {name: state[f"embedding.{name}"].contiguous() for name in ("A", "B")}
        save_file(factors, folder / FACTORS_FILE)
    if record.norm_sharing == "per_layer":
        norms = {
            str(layer): state[f"norms.{i}.weight"].contiguous()
            for i, layer in enumerate(record.exits)
        }
        save_file(norms, folder / EXIT_NORMS_FILE)
    _save_config(folder, config, plain["norm.weight"].dtype, tokenizer, record, dim)
    _save_tokenizer(folder, tokenizer, record)
    _save_sentence_transformers_files(folder, config.hidden_size, record, dim)
    record.save(folder)
    give_usual_permissions(folder)


def backbone_state(state: Mapping[str, Tensor], record: ModelRecord) -> dict[str, Tensor]:
    """The encoder's state under Qwen3Model's names, its token table multiplied out."""
    plain = {
        name.removeprefix("backbone."): tensor.contiguous()
        for name, tensor in state.items()
        if name.startswith("backbone.")
    }
    if record.ranks:
        plain["embed_tokens.weight"] = (
            state["embedding.A"].float() @ state["embedding.B"].float()
        ).to(state["embedding.A"].dtype)
    else:
        plain["embed_tokens.weight"] = state["embedding.weight"]
    deepest = 0 if record.norm_sharing == "shared" else len(record.exits) - 1
    plain["norm.weight"] = state[f"norms.{deepest}.weight"]
    return plain


def _save_config(
    folder: Path,
    config: Qwen3Config,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    record: ModelRecord,
    dim: int | None,
) -> None:
    config = copy.deepcopy(config)
    # Readers load the weights in this dtype, so it is theirs; the backbone's may have been another.
    config.dtype = dtype
    # The name by which embedding servers know this layout of files.
    config.architectures = ["Qwen3ForCausalLM"]
    config.tie_word_embeddings = True
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.is_matryoshka = len(record.dims) > 1
    config.matryoshka_dimensions = sorted(d for d in record.dims if dim is None or d <= dim)
    config.save_pretrained(folder)


def _save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, record: ModelRecord) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    append_eos_template(tokenizer)
    tokenizer.model_max_length = record.max_seq_length
    tokenizer.save_pretrained(folder)


def _save_sentence_transformers_files(
    folder: Path, hidden_size: int, record: ModelRecord, dim: int | None
) -> None:
    """Last-token pooling, a cut to `dim` if there is one, normalisation."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": record.max_seq_length, "do_lower_case": False},
    )
    _save_pooling(folder / "1_Pooling", hidden_size)
    if dim is not None and dim < hidden_size:
        _save_projection(folder / "2_Dense", hidden_size, dim)
        modules.append(("2_Dense", "Dense"))
    modules.append((f"{len(modules)}_Normalize", "Normalize"))
    (folder / modules[-1][0]).mkdir(exist_ok=True)
    listing = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    write_json(folder / "modules.json", listing)
    settings = {
        "prompts": record.prompts,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    write_json(folder / "config_sentence_transformers.json", settings)


def _save_pooling(folder: Path, hidden_size: int) -> None:
    modes = ("cls_token", "mean_tokens", "max_tokens")
    pooling = {"word_embedding_dimension": hidden_size, "include_prompt": True}
    pooling |= {f"pooling_mode_{mode}": False for mode in modes}
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", pooling | {"pooling_mode_lasttoken": True})


def _save_projection(folder: Path, hidden_size: int, dim: int) -> None:
    """Onto the leading components: unlike `truncate_dim` it stands before the normalisation."""
    settings: dict[str, Any] = {"in_features": hidden_size, "out_features": dim, "bias": False}
    settings["activation_function"] = "torch.nn.modules.linear.Identity"
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", settings)
    save_file({"linear.weight": torch.eye(dim, hidden_size)}, folder / "model.safetensors")
