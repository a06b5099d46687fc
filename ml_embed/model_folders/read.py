"""Reading a model folder, or any Qwen3 backbone: settings, weights, token factors, exit norms.

Weights are read from safetensors alone; nothing in a folder is ever unpickled, and no code of it
is run. Letters: V vocabulary, r rank, H hidden size.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3Model

from ml_embed.errors import UserError, one_line
from ml_embed.files.arrays import blocks
from ml_embed.kernels.attention import Kernel
from ml_embed.model import ROWS_AT_ONCE, FactorizedEmbedding, MatryoshkaEncoder, check_supported
from ml_embed.model_folders.checks import check_config, check_tokenizer, is_finite
from ml_embed.model_folders.foreign import MODULES_FILE, check_weight_map
from ml_embed.model_folders.headers import check_backbone, check_exit_norms, check_factors
from ml_embed.model_folders.modules import foreign_modules
from ml_embed.model_folders.record import (
    EXIT_NORMS_FILE,
    FACTORS_FILE,
    INDEX,
    RECORD_FILE,
    TABLE,
    WHOLE,
    ModelRecord,
    nested_file,
    weights_folder,
)
from ml_embed.model_folders.seal import check_seal, stale
from ml_embed.prepare.tokenizer import appends_end_token, load_tokenizer

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
CHECKED_ROWS = 256
"""First rows of a table that are compared with its factors."""
UNREAD_TENSORS = ("lm_head.", "score.", "qa_outputs.", "rotary_emb.inv_freq")
"""Parts of names: heads above the decoder, and constants that are computed."""


@dataclass(frozen=True)
class ModelFolder:
    """All of a model folder, or of a plain backbone, but its weights."""

    path: Path
    config: Qwen3Config
    tokenizer: PreTrainedTokenizerBase
    record: ModelRecord

    @classmethod
    def open(cls, path: Path) -> "ModelFolder":
        """Read a folder; what it says is obeyed by whoever reads it so, or refused here.

        Raises:
            UserError: a file is missing or damaged, its parts do not fit together, or the model is
                not one that is supported.
        """
        config, tokenizer = load_backbone_config(path), load_tokenizer(path)
        check_tokenizer(path, config, tokenizer)
        if (path / MODULES_FILE).is_file() and not appends_end_token(tokenizer):
            what = "a tokenizer that does not append one end token and nothing else"
            raise foreign_modules(path, what)
        record = ModelRecord.load(path) or ModelRecord.of_backbone(path, config, tokenizer)
        check_backbone(path, config)
        _check_sizes(path, record, config)
        if record.ranks:
            check_factors(nested_file(path, FACTORS_FILE), config, record.ranks[-1])
        if record.norm_sharing == "per_layer":
            norms = nested_file(path, EXIT_NORMS_FILE)
            check_exit_norms(norms, record.exits, config.hidden_size)
        check_seal(path, record)
        if record.ranks and not record.digests:
            _check_beginning(path)
        return cls(path, config, tokenizer, record)


def _check_sizes(folder: Path, record: ModelRecord, config: Qwen3Config) -> None:
    """Raise UserError for a record of a larger model than config.json describes."""
    dim, layer = max(record.dims), max(record.exits)
    if dim > config.hidden_size or layer > config.num_hidden_layers:
        raise UserError(
            f"{folder / RECORD_FILE} names {dim} components and {layer} layers, config.json "
            f"{config.hidden_size} and {config.num_hidden_layers}; copy the model folder again"
        )


def load_backbone_config(folder: Path) -> Qwen3Config:
    """The backbone's config.

    Raises:
        UserError: missing, damaged, or not a Qwen3 that this encoder computes rightly.
    """
    check_config(folder)
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
    folder: Path,
    config: Qwen3Config,
    dtype: torch.dtype = torch.float32,
    stored_layers: int | None = None,
    with_table: bool = True,
) -> Qwen3Model:
    """The backbone with its weights, from safetensors alone.

    Args:
        folder: of the backbone.
        config: as deep as the layers that are wanted.
        dtype: of the weights in memory.
        stored_layers: layers in the folder; None is as many as in `config`.
        with_table: with the token table; else `map_table` reads that.
    Raises:
        UserError: weights are missing, damaged, not finite, do not fit the config, or are not
            safetensors.
    """
    _check_has_table(folder)
    try:
        kind = Qwen3Model if with_table else _WithoutTable
        loaded: Any = kind.from_pretrained(  # a pair, because of output_loading_info
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
    missing = sorted(report["missing_keys"])
    left_out = range(config.num_hidden_layers, stored_layers or 0)
    unread = (*(f"layers.{layer}." for layer in left_out), *UNREAD_TENSORS)
    unknown = sorted(n for n in report["unexpected_keys"] if not any(u in n for u in unread))
    if missing and unknown:
        raise UserError(
            f"the weights in {folder} have other names than a Qwen3 model's: {unknown[0]} is "
            f"there, {missing[0]} is not; rename the tensors, or save the model with transformers' "
            "save_pretrained"
        )
    if missing:
        raise UserError(
            f"the weights in {folder} lack {len(missing)} tensors, e.g. {missing[0]}; copy the "
            "folder again"
        )
    if unknown:
        raise UserError(
            f"the weights in {folder} hold {len(unknown)} tensors that are no part of the Qwen3 "
            f"model in config.json, e.g. {unknown[0]}; merge adapters, or correct config.json"
        )
    for name, tensor in model.state_dict().items():
        if not is_finite(tensor):
            raise _not_finite(_stored(folder, name)[0], name)
    return model


class _WithoutTable(Qwen3Model):
    """A Qwen3 model that has no token table, and so takes no memory for it."""

    _keys_to_ignore_on_load_unexpected = [r"embed_tokens\.weight$"]  # noqa: RUF012

    def __init__(self, config: Qwen3Config):
        super().__init__(config)
        self.register_module("embed_tokens", None)


def map_table(folder: Path, config: Qwen3Config) -> Tensor:
    """The (V, H) token table of a backbone, mapped from its file: read where it is looked at.

    Raises:
        UserError: it is not there, damaged, not finite, or not of the size that `config` says.
    """
    _check_has_table(folder)
    path, name = _stored(folder, TABLE)
    try:
        with safe_open(path, "pt") as file:
            table = file.get_tensor(name)
    except WEIGHT_ERRORS as error:
        raise UserError(
            f"{folder} has no token table that can be read ({one_line(error)}); copy the folder "
            "again"
        ) from None
    if table.shape != (config.vocab_size, config.hidden_size):
        raise UserError(
            f"{path}: the token table is {' x '.join(map(str, table.shape))}, config.json says "
            f"{config.vocab_size} x {config.hidden_size}; correct config.json"
        )
    return _finite(path, name, table)


def _check_has_table(folder: Path) -> None:
    if weights_folder(folder) != folder:
        raise UserError(
            f"{folder} holds its token factors only; write it with its token table first: "
            f"scripts/export_model.py --model {folder} --output NEW_FOLDER"
        )


def _finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a file. Raises UserError if it has NaN or infinity."""
    if not is_finite(tensor):
        raise _not_finite(path, name)
    return tensor


def _not_finite(path: Path, name: str) -> UserError:
    return UserError(
        f"{path}: the tensor {name} has NaN or infinity; copy the model folder again, or take an "
        "earlier one if the model was trained so"
    )


def _stored(folder: Path, name: str) -> tuple[Path, str]:
    """The file of a tensor, and its name there, which may have a prefix."""
    for path in _weights_files(folder):
        with safe_open(path, "pt") as file:
            for own in file.keys():  # noqa: SIM118
                if f".{own}".endswith(f".{name}"):
                    return path, own
    return folder, name


def load_encoder(
    folder: ModelFolder,
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
    record = folder.record
    backbone, factors = load_cut(folder, depth, rank, dtype)
    exits = (backbone.config.num_hidden_layers,) if exits is None else exits
    encoder = MatryoshkaEncoder(backbone, exits, factors, record.norm_sharing, kernel)
    if record.norm_sharing == "per_layer":
        encoder.norms.to(dtype)
        norms = read_exit_norms(folder.path, dtype)
        for layer, norm in zip(encoder.exits, encoder.norms, strict=True):
            norm.get_parameter("weight").data.copy_(nearest_norm(norms, layer))
    return encoder.eval()


def load_cut(
    folder: ModelFolder,
    depth: int | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Qwen3Model, tuple[Tensor, Tensor] | None]:
    """The first layers of a model, and the leading components of its token factors.

    Args: as in `load_encoder`.
    Returns:
        the backbone, with the final norm of the whole model; and A (V, rank), B (rank, H), or None
        where the backbone has its whole table instead.
    """
    config = copy.deepcopy(folder.config)
    depth = config.num_hidden_layers if depth is None else depth
    assert 1 <= depth <= config.num_hidden_layers, depth
    config.num_hidden_layers = depth
    assert config.layer_types is not None  # Qwen3Config fills it in
    config.layer_types = config.layer_types[:depth]
    if folder.record.ranks:
        backbone = _load_layers(folder.path, config, dtype)
        return backbone, read_factors(folder.path, rank or None, dtype)
    return load_backbone(folder.path, config, dtype, folder.config.num_hidden_layers), None


def load_for_transformers(
    folder: ModelFolder, depth: int, rank: int, dtype: torch.dtype = torch.float32
) -> Qwen3Model:
    """A cut as transformers' own model: its exit's norm is the final one, its table the factors.

    Args: as in `load_encoder`.
    """
    backbone, factors = load_cut(folder, depth, rank, dtype)
    if factors is not None:
        backbone.register_module("embed_tokens", FactorizedEmbedding(*factors))
    if folder.record.norm_sharing == "per_layer":
        norm = nearest_norm(read_exit_norms(folder.path, dtype), depth)
        backbone.norm.get_parameter("weight").data.copy_(norm)
    return backbone.eval()


def nearest_norm(norms: dict[int, Tensor], layer: int) -> Tensor:
    """An exit's norm; one that was not trained borrows that of the nearest deeper one that was."""
    return norms[min(trained for trained in norms if trained >= layer)]


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
        wanted = backbone.state_dict().keys()
        for path in _weights_files(folder):
            with safe_open(path, "pt") as file:
                for name in wanted & set(file.keys()):
                    state[name] = _finite(path, name, file.get_tensor(name)).to(dtype)
        backbone.load_state_dict(state, assign=True)
    except UserError:
        raise
    except WEIGHT_ERRORS as error:
        raise UserError(
            f"the weights in {folder} cannot be loaded: {one_line(error)}; copy the model folder "
            "again"
        ) from None
    return backbone


def _weights_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder that are read, as transformers chooses them."""
    folder = weights_folder(folder)
    whole, index = folder / WHOLE, folder / INDEX
    if whole.is_file() or not index.is_file():
        return [whole]
    return [folder / place for place in sorted(set(check_weight_map(index).values()))]


def read_factors(
    folder: Path, rank: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The token factors A (V, rank) and B (rank, H); of smaller ranks than the file's in memory.

    Those are copied a block of rows at a time, the file mapped anew for each: else the pages of all
    ranks, which lie between those of one, stay in memory with the mapping.
    """
    path = nested_file(folder, FACTORS_FILE)
    try:
        with safe_open(path, "pt") as file:
            B = _finite(path, "B", file.get_slice("B")[:rank].to(dtype).clone())
            rows, columns = file.get_slice("A").get_shape()
            if len(B) == columns:
                return _finite(path, "A", file.get_tensor("A")).to(dtype), B
        A = torch.empty(rows, len(B), dtype=dtype)
        for block in blocks(rows, ROWS_AT_ONCE):
            with safe_open(path, "pt") as file:
                A[block] = _finite(path, "A", file.get_slice("A")[block, :rank])
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy the model folder again") from None
    return A, B


def _check_beginning(folder: Path) -> None:
    """Refuse factors of another table than the one beside them, as far as its first rows show.

    For folders of format 1, which have no digests.
    """
    try:
        path, name = _stored(folder, TABLE)
        with safe_open(path, "pt") as file:
            table = file.get_slice(name)[:CHECKED_ROWS]
        with safe_open(nested_file(folder, FACTORS_FILE), "pt") as file:
            A, B = file.get_slice("A")[:CHECKED_ROWS], file.get_tensor("B")
    except WEIGHT_ERRORS:
        return  # whoever reads the weights says what is wrong
    rows = (A.float() @ B.float()).to(table.dtype)
    rounding = max(1e-4, 4 * torch.finfo(table.dtype).eps)  # sums of r products in another order
    near = rounding * float(rows.abs().max())
    if rows.shape != table.shape or not torch.allclose(rows, table, rtol=0, atol=near):
        raise stale(folder, f"{path.name} (or {Path(FACTORS_FILE).name})")


def read_exit_norms(folder: Path, dtype: torch.dtype = torch.float32) -> dict[int, Tensor]:
    """Exit layer -> (H,) weight of its final norm, of a folder trained with one per exit."""
    path = nested_file(folder, EXIT_NORMS_FILE)
    try:
        norms = {int(layer): weight for layer, weight in load_file(path).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy the model folder again") from None
    return {n: _finite(path, str(n), weight).to(dtype) for n, weight in norms.items()}
