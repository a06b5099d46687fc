"""A trained model on disk: a plain Qwen3 folder that also holds the nested parts.

`transformers`, `sentence_transformers` and servers read the standard files (the token table
multiplied out);
`load_encoder` reads the factors. Safetensors and JSON only: nothing in a model folder is ever
unpickled.

Letters: V vocabulary, r rank, H hidden size, L layers.
"""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3Model

from ml_embed.errors import UserError, one_line
from ml_embed.files.atomic import MAX_SHARD_SIZE, checksum, give_usual_permissions, write_json
from ml_embed.files.paths import model_place
from ml_embed.kernels.attention import Kernel
from ml_embed.model import MatryoshkaEncoder, NormSharing, check_supported
from ml_embed.prepare.tokenizer import append_eos_template

FORMAT_VERSION = 1
RECORD_FILE = "ml_embed.json"
FACTORS_FILE = "embedding_factors.safetensors"
EXIT_NORMS_FILE = "exit_norms.safetensors"
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


@dataclass(frozen=True)
class ModelRecord:
    """What was trained (`ml_embed.json`)."""

    exits: tuple[int, ...]
    """layers after which vectors were trained, ascending"""
    dims: tuple[int, ...]
    """vector lengths trained, largest first"""
    ranks: tuple[int, ...]
    """ranks of the token factors trained, ascending; empty for a whole table"""
    temperature: float
    max_seq_length: int
    """tokens, EOS included"""
    norm_sharing: NormSharing = "shared"
    pooling: str = "last_token"
    prompts: dict[str, str] = field(default_factory=dict)
    """prompt name -> text put before the input"""
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, folder: Path) -> "ModelRecord | None":
        """The record of a model folder; None for a plain backbone.

        Raises:
            UserError: the record is damaged or of a newer format.
        """
        path = folder / RECORD_FILE
        if not path.exists():
            return None
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version = values.pop("format_version")
            known = {f.name for f in dataclasses.fields(cls)}
            own: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known
            }
            record = cls(**own)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); copy the model folder again") from None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version}, this version reads {FORMAT_VERSION}; update "
                "ml-embed"
            )
        return record

    def save(self, folder: Path) -> None:
        write_json(folder / RECORD_FILE, dataclasses.asdict(self))


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
        folder: where to; writing aside and renaming is the caller's business.
        state: the encoder's whole state dict, on CPU (`MatryoshkaEncoder.state_dict()`).
        config: the backbone's config; its number of layers is the model's depth.
        tokenizer: the backbone's; a copy that appends EOS by itself is saved.
        record: what was trained.
        dim: cut the vectors that sentence-transformers gives to this length; None is all of H.
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
    plain["norm.weight"] = state[
        f"norms.{0 if record.norm_sharing == 'shared' else len(record.exits) - 1}.weight"
    ]
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
    # of the weights beside it, which readers load them in; the backbone's may have been another
    config.dtype = dtype
    config.architectures = [
        "Qwen3ForCausalLM"
    ]  # the name that embedding servers know this layout of files by
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
    """Last-token pooling, an optional cut to `dim`, normalisation, in the files that all its
    versions read."""
    module = "sentence_transformers.models."
    modules = [("", f"{module}Transformer"), ("1_Pooling", f"{module}Pooling")]
    write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": record.max_seq_length, "do_lower_case": False},
    )
    pooling = {"word_embedding_dimension": hidden_size, "include_prompt": True}
    pooling |= {
        f"pooling_mode_{mode}": False for mode in ("cls_token", "mean_tokens", "max_tokens")
    }
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", pooling | {"pooling_mode_lasttoken": True})
    if dim is not None and dim < hidden_size:
        # A projection onto the leading components: unlike `truncate_dim` it stands before the
        # normalisation.
        cut: dict[str, Any] = {"in_features": hidden_size, "out_features": dim, "bias": False}
        cut["activation_function"] = "torch.nn.modules.linear.Identity"
        (folder / "2_Dense").mkdir(exist_ok=True)
        write_json(folder / "2_Dense" / "config.json", cut)
        save_file(
            {"linear.weight": torch.eye(dim, hidden_size)}, folder / "2_Dense" / "model.safetensors"
        )
        modules.append(("2_Dense", f"{module}Dense"))
    modules.append((f"{len(modules)}_Normalize", f"{module}Normalize"))
    (folder / modules[-1][0]).mkdir(exist_ok=True)
    listing = [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (path, kind) in enumerate(modules)
    ]
    write_json(folder / "modules.json", listing)
    settings = {
        "prompts": record.prompts,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    write_json(folder / "config_sentence_transformers.json", settings)


def load_backbone_config(folder: str | Path) -> Qwen3Config:
    """The backbone's config; a folder, or else, as a str, a hub name.

    Raises:
        UserError: missing, damaged, or not a Qwen3 that this encoder computes rightly.
    """
    path = model_place(folder)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (
        Exception
    ) as error:  # one that was edited by hand fails in a dozen ways, and the hub's client in others
        raise UserError(
            f"{folder} is not a model folder with a valid config.json: {one_line(error)}"
        ) from None
    check_supported(config)
    problems = _impossible_sizes(config)
    if problems:
        raise UserError(f"config.json of {folder}: {'; '.join(problems)}")
    return config


def _impossible_sizes(config: Qwen3Config) -> list[str]:
    """What transformers lets pass: all zeros, and before it checked types also what is no
    number."""
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
    folder: str | Path, config: Qwen3Config, dtype: torch.dtype = torch.float32
) -> Qwen3Model:
    """Qwen3 weights, safetensors only.

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
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the weights in {folder} cannot be loaded: {one_line(error)}; safetensors files that "
            "fit config.json are "
            "needed"
        ) from None
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"the weights in {folder} lack {len(missing)} tensors, e.g. {missing[0]}; copy the "
            "folder again"
        )
    return model


def weights_digest(folder: str | Path) -> str:
    """Tells the weights of a backbone (a folder, or else a hub name) apart by content, wherever
    they lie."""
    if not Path(folder).is_dir():
        folder = snapshot_download(str(folder), allow_patterns="*.safetensors")
    files = sorted(Path(folder).glob("*.safetensors"))
    digest = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor() as pool:  # a large backbone has many files
        for path, whole in zip(files, pool.map(checksum, files), strict=True):
            digest.update(f"{path.name}:{whole};".encode())
    return digest.hexdigest()


def _load_layers(folder: Path, config: Qwen3Config, dtype: torch.dtype) -> Qwen3Model:
    """The decoder layers that `config` has, and the final norm, of a model folder with factors.

    The multiplied-out token table is not read: it may be larger than all the rest.
    """
    config.dtype = dtype
    state: dict[str, Tensor] = {}
    try:
        with torch.device("meta"):
            backbone = Qwen3Model(config)
        backbone.register_module("embed_tokens", None)
        backbone.rotary_emb = type(backbone.rotary_emb)(
            config
        )  # its buffers are computed, not stored
        for path, names in _files_of(folder, backbone.state_dict().keys()).items():
            with safe_open(path, "pt") as file:
                state |= {name: file.get_tensor(name).to(dtype) for name in names}
        backbone.load_state_dict(state, assign=True)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        reason = one_line(error)
        raise UserError(
            f"the weights in {folder} cannot be loaded: {reason}; copy the model folder again"
        ) from None
    return backbone


def _files_of(folder: Path, names: Iterable[str]) -> dict[Path, list[str]]:
    """The safetensors file that holds each tensor, whether the folder has one file or shards with
    an index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {folder / "model.safetensors": list(names)}
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    files: dict[Path, list[str]] = {}
    for name in names:
        files.setdefault(folder / weight_map[name], []).append(name)
    return files


def load_encoder(
    folder: str | Path,
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
        rank: rank of the factors; None is all of them. Ignored where the folder has a whole table.
        exits: layers to read vectors at; None is the last one kept.
        kernel, dtype: as in MatryoshkaEncoder; weights are held in `dtype`.
    """
    config = load_backbone_config(
        str(folder)
    )  # a caller may have made a Path of a hub name, after its own load_backbone_config
    folder = Path(folder)
    record = ModelRecord.load(folder)
    depth = config.num_hidden_layers if depth is None else depth
    assert 1 <= depth <= config.num_hidden_layers, depth
    config.num_hidden_layers = depth
    assert config.layer_types is not None  # Qwen3Config fills it in
    config.layer_types = config.layer_types[:depth]
    if record is not None and record.ranks:
        backbone, factors = _load_layers(folder, config, dtype), read_factors(folder, rank, dtype)
    else:
        backbone, factors = load_backbone(folder, config, dtype), None
    exits = (depth,) if exits is None else exits
    per_layer = record is not None and record.norm_sharing == "per_layer"
    encoder = MatryoshkaEncoder(
        backbone, exits, factors, "per_layer" if per_layer else "shared", kernel
    )
    if per_layer:
        norms = read_exit_norms(folder, dtype)
        encoder.norms.to(dtype)
        for layer, norm in zip(exits, encoder.norms, strict=True):
            # An exit that was not trained borrows the norm of the nearest deeper one that was.
            nearest = min(trained for trained in norms if trained >= layer)
            norm.get_parameter("weight").data.copy_(norms[nearest])
    return encoder.eval()


def read_factors(
    folder: Path, rank: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A (V, rank) and B (rank, H) of a model folder, only the leading `rank` components read from
    disk."""
    try:
        with safe_open(folder / FACTORS_FILE, "pt") as file:
            return file.get_slice("A")[:, :rank].to(dtype), file.get_slice("B")[:rank].to(dtype)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / FACTORS_FILE} cannot be read ({error}); copy the model folder again"
        ) from None


def read_exit_norms(folder: Path, dtype: torch.dtype = torch.float32) -> dict[int, Tensor]:
    """Exit layer -> (H,) weight of its final norm, for a folder trained with `mll_norm:
    per_layer`."""
    try:
        return {
            int(layer): weight.to(dtype)
            for layer, weight in load_file(folder / EXIT_NORMS_FILE).items()
        }
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{folder / EXIT_NORMS_FILE} cannot be read ({error}); copy the model folder again"
        ) from None
