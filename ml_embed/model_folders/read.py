"""Reading a model folder, or any Qwen3 backbone: settings, weights, token factors, exit norms.

Weights are read from safetensors alone; nothing in a folder is ever unpickled, and no code of it
is run. Letters: V vocabulary, r rank, H hidden size.
"""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3Model

from ml_embed.errors import UserError, one_line
from ml_embed.files.atomic import checksum
from ml_embed.kernels.attention import Kernel
from ml_embed.model import MatryoshkaEncoder, check_supported
from ml_embed.model_folders.record import EXIT_NORMS_FILE, FACTORS_FILE, ModelRecord
from ml_embed.prepare.tokenizer import load_tokenizer

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
"""Keys of config.json that say how much there is of something."""
WEIGHT_ERRORS = (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError)
"""What weights raise that are missing, damaged, or do not fit config.json."""


@dataclass(frozen=True)
class ModelFolder:
    """All of a model folder, or of a plain backbone, but its weights."""

    path: Path
    config: Qwen3Config
    tokenizer: PreTrainedTokenizerBase
    record: ModelRecord

    @classmethod
    def open(cls, path: Path) -> "ModelFolder":
        """Read a folder.

        Raises:
            UserError: a file is missing or damaged, or the model is not one that is supported.
        """
        config, tokenizer = load_backbone_config(path), load_tokenizer(path)
        record = ModelRecord.load(path) or ModelRecord.of_backbone(path, config, tokenizer)
        return cls(path, config, tokenizer, record)


def load_backbone_config(folder: Path) -> Qwen3Config:
    """The backbone's config.

    Raises:
        UserError: missing, damaged, or not a Qwen3 that this encoder computes rightly.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a file that was edited by hand fails in a dozen ways
        raise UserError(
            f"{folder} is not a model folder with a valid config.json: {one_line(error)}"
        ) from None
    check_supported(config)
    if problems := _impossible_sizes(config):
        raise UserError(f"config.json of {folder}: {'; '.join(problems)}")
    return config


def _impossible_sizes(config: Qwen3Config) -> list[str]:
    """Sizes that transformers lets pass though no model has them, zeros above all."""
    values = {name: getattr(config, name) for name in SIZES}
    problems = [
        f"{name} {value!r} must be a whole number of at least 1"
        for name, value in values.items()
        if not isinstance(value, int) or value < 1
    ]
    if len(config.layer_types or ()) != config.num_hidden_layers:
        problems.append(
            "layer_types must have as many entries as num_hidden_layers, "
            f"{config.num_hidden_layers}"
        )
    return problems


def load_backbone(
    folder: Path, config: Qwen3Config, dtype: torch.dtype = torch.float32
) -> Qwen3Model:
    """The backbone with its weights and its whole token table, from safetensors alone.

    Raises:
        UserError: weights are missing, damaged, do not fit the config, or are not safetensors.
    """
    try:
        loaded: Any = Qwen3Model.from_pretrained(  # a pair, because of output_loading_info
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except WEIGHT_ERRORS as error:
        raise UserError(
            f"the weights in {folder} cannot be loaded: {one_line(error)}; safetensors files that "
            "fit config.json are needed"
        ) from None
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"the weights in {folder} lack {len(missing)} tensors, e.g. {missing[0]}; copy the "
            "folder again"
        )
    return model


def load_encoder(
    folder: Path,
    *,
    depth: int | None = None,
    rank: int | None = None,
    exits: tuple[int, ...] | None = None,
    kernel: Kernel = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> MatryoshkaEncoder:
    """An encoder from a model folder or a plain backbone, cut to a depth and a rank.

    Args:
        folder: a model folder (its factors are read, not the multiplied-out table) or any Qwen3
            backbone.
        depth: decoder layers to keep; None is all.
        rank: rank of the factors; None or 0 is all. Ignored where the folder has a whole table.
        exits: layers to read vectors at; None is the last one kept.
        kernel, dtype: as in MatryoshkaEncoder; weights are held in `dtype`.
    """
    config, record = load_backbone_config(folder), ModelRecord.load(folder)
    depth = config.num_hidden_layers if depth is None else depth
    assert 1 <= depth <= config.num_hidden_layers, depth
    config.num_hidden_layers = depth
    assert config.layer_types is not None  # Qwen3Config fills it in
    config.layer_types = config.layer_types[:depth]
    if record is not None and record.ranks:
        backbone = _load_layers(folder, config, dtype)
        factors = read_factors(folder, rank or None, dtype)
    else:
        backbone, factors = load_backbone(folder, config, dtype), None
    exits = (depth,) if exits is None else exits
    per_layer = record is not None and record.norm_sharing == "per_layer"
    encoder = MatryoshkaEncoder(
        backbone, exits, factors, "per_layer" if per_layer else "shared", kernel
    )
    if per_layer:
        encoder.norms.to(dtype)
        _fill_exit_norms(encoder, read_exit_norms(folder, dtype))
    return encoder.eval()


def _fill_exit_norms(encoder: MatryoshkaEncoder, norms: dict[int, Tensor]) -> None:
    """An exit that was not trained borrows the norm of the nearest deeper one that was."""
    for layer, norm in zip(encoder.exits, encoder.norms, strict=True):
        nearest = min(trained for trained in norms if trained >= layer)
        norm.get_parameter("weight").data.copy_(norms[nearest])


def _load_layers(folder: Path, config: Qwen3Config, dtype: torch.dtype) -> Qwen3Model:
    """The decoder layers that `config` has, and the final norm, without the token table.

    For folders with factors: the multiplied-out table may be larger than all the rest.
    """
    config.dtype = dtype
    state: dict[str, Tensor] = {}
    try:
        with torch.device("meta"):
            backbone = Qwen3Model(config)
        backbone.register_module("embed_tokens", None)
        # Its buffers are computed, not stored.
        backbone.rotary_emb = type(backbone.rotary_emb)(config)
        for path, names in _files_of(folder, backbone.state_dict().keys()).items():
            with safe_open(path, "pt") as file:
                state |= {name: file.get_tensor(name).to(dtype) for name in names}
        backbone.load_state_dict(state, assign=True)
    except WEIGHT_ERRORS as error:
        raise UserError(
            f"the weights in {folder} cannot be loaded: {one_line(error)}; copy the model folder "
            "again"
        ) from None
    return backbone


def _files_of(folder: Path, names: Iterable[str]) -> dict[Path, list[str]]:
    """Each safetensors file, one or shards with an index, with the tensors that it holds."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {folder / "model.safetensors": list(names)}
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    files: dict[Path, list[str]] = {}
    for name in names:
        files.setdefault(folder / weight_map[name], []).append(name)
    return files


def read_factors(
    folder: Path, rank: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The token factors A (V, rank) and B (rank, H); no more than `rank` components are read."""
    try:
        with safe_open(folder / FACTORS_FILE, "pt") as file:
            return file.get_slice("A")[:, :rank].to(dtype), file.get_slice("B")[:rank].to(dtype)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / FACTORS_FILE} cannot be read ({error}); copy the model folder again"
        ) from None


def read_exit_norms(folder: Path, dtype: torch.dtype = torch.float32) -> dict[int, Tensor]:
    """Exit layer -> (H,) weight of its final norm, of a folder trained with one per exit."""
    try:
        return {
            int(layer): weight.to(dtype)
            for layer, weight in load_file(folder / EXIT_NORMS_FILE).items()
        }
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{folder / EXIT_NORMS_FILE} cannot be read ({error}); copy the model folder again"
        ) from None


def weights_digest(folder: Path) -> str:
    """Tells the weights of a model folder apart by their content, wherever they lie."""
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor() as pool:  # a large backbone has many files
        for path, whole in zip(files, pool.map(checksum, files), strict=True):
            digest.update(f"{path.name}:{whole};".encode())
    return digest.hexdigest()
