"""What a model folder may not be: each refusal names what was found and what to do."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3Config

from ml_embed.errors import UserError
from ml_embed.files.json_file import read_json
from ml_embed.model_folders.foreign import DAMAGED, check_adapter, check_kernels, check_weight_map

ARCHITECTURES = (
    "Qwen3Model",
    "Qwen3ForCausalLM",
    "Qwen3ForQuestionAnswering",
    "Qwen3ForSequenceClassification",
    "Qwen3ForTokenClassification",
)
"""All of them hold the same decoder."""
MOST_LAYERS = 10_000
"""Far more than any model has."""


def check_config(folder: Path) -> None:
    """Refuse what a folder's JSON files ask for and this project does not compute.

    A config.json that is missing is left to whoever reads it next.

    Raises:
        UserError: adapters, code of its own or the hub's, weights outside the folder, quantized
            weights, attention to later tokens, or another architecture.
    """
    check_adapter(folder)
    for index in folder.glob("*.safetensors.index.json"):
        check_weight_map(index)
    config = _settings(folder / "config.json")
    check_kernels(folder / "config.json", config)
    if problem := _problem(config):
        raise UserError(f"config.json of {folder}: {problem}")


def _settings(path: Path) -> dict[str, Any]:
    return read_json(path, DAMAGED) if path.is_file() else {}


def _problem(config: dict[str, Any]) -> str | None:
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "of an unknown kind")
        return f"the weights are quantized ({method}); give the model's folder before that"
    if config.get("auto_map"):
        return (
            f"auto_map asks for code of the folder's own ({_first(config['auto_map'])}), which is "
            "never run; if the model is a plain Qwen3, remove auto_map"
        )
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:  # transformers makes a list of them
        return f"num_hidden_layers {layers} is more than {MOST_LAYERS:,}"
    both_ways = [name for name in ("is_causal", "causal") if config.get(name) is False]
    both_ways += [name for name, value in config.items() if "bidirection" in name and value is True]
    if both_ways:
        name = both_ways[0]
        return (
            f"{name} {json.dumps(config[name])} lets attention see later tokens; ml-embed computes "
            "causal Qwen3 models only, so use sentence-transformers for this one"
        )
    if config.get("model_type") == "qwen3":
        for architecture in config.get("architectures") or ():
            if architecture not in ARCHITECTURES:
                return (
                    f"the architecture {architecture} is none of {', '.join(ARCHITECTURES)}"
                    "; use sentence-transformers for this model, or correct the name if the model "
                    "is a plain Qwen3"
                )
    return None


def _first(value: Any) -> str:
    """A class that auto_map names."""
    while isinstance(value, dict | list) and value:
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return str(value)


def check_tokenizer(folder: Path, config: Qwen3Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cuts texts at their beginning, or gives ids without a row.

    Raises:
        UserError: says what it found, and the remedy.
    """
    if (side := tokenizer.truncation_side) != "right":
        raise UserError(
            f"the tokenizer of {folder}: truncation_side {side!r} keeps the end of a long text; "
            "ml-embed keeps its beginning, so use sentence-transformers for this model, or set it "
            'to "right"'
        )
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {needed} tokens, the model's token table "
            f"{config.vocab_size} rows; resize it with transformers: "
            "model.resize_token_embeddings(len(tokenizer)), then save_pretrained"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity."""
    # NaN passes through; measured: 20 times as fast as isfinite().all(), at memory's speed.
    return tensor.numel() == 0 or all(map(math.isfinite, map(float, torch.aminmax(tensor))))
