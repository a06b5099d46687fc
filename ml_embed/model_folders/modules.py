"""What sentence-transformers reads in a model folder: modules, pooling, prompts, maximum length.

This project's model is a Transformer, the last token's vector, at most a cut of it, normalisation.
A folder that says anything else is refused here by name, never half obeyed.

Letters: H hidden size, D vector length.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ml_embed.errors import UserError
from ml_embed.files.atomic import write_json
from ml_embed.files.json_file import read_json
from ml_embed.model_folders.foreign import DAMAGED, MODULES_FILE, read_listing

PROMPTS_FILE = "config_sentence_transformers.json"
TRANSFORMER_FILE = "sentence_bert_config.json"
POOLING_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""sentence-transformers' older keys of 1_Pooling/config.json -> its newer names of the modes."""
HARMLESS_ARGUMENTS = {"trust_remote_code", "dtype", "torch_dtype", "attn_implementation"}
"""Of those that a Transformer module may give to transformers: they leave the model what it is."""
IDENTITIES = ("torch.nn.modules.linear.Identity", "torch.nn.Identity")


@dataclass(frozen=True)
class Modules:
    """What a folder says for sentence-transformers; None where it does not say."""

    dim: int | None = None
    """D that its Dense cuts vectors to"""
    max_seq_length: int | None = None
    """tokens, end token included"""
    prompts: dict[str, str] | None = None
    """prompt name -> text put before the input"""
    default_prompt_name: str | None = None
    """of the prompt that texts get for which none is asked"""


class ForeignModules(UserError):
    """The folder's model is one that sentence-transformers computes, and this project does not."""


def read_modules(folder: Path) -> Modules:
    """What a folder says for sentence-transformers; nothing of it is passed over.

    Raises:
        ForeignModules: its vectors are not those of the last token, cut or normalised at most.
        UserError: a file is missing or damaged.
    """
    prompts, default = _prompts(folder / PROMPTS_FILE)
    length = _max_seq_length(folder)
    dim = _check_modules(folder) if (folder / MODULES_FILE).is_file() else None
    _check_similarity(folder)
    return Modules(dim, length, prompts, default)


def _check_similarity(folder: Path) -> None:
    """Refuse another similarity than the cosine: of vectors of unit length, dot products too."""
    path, listing = folder / PROMPTS_FILE, read_listing(folder)
    name = read_json(path, DAMAGED).get("similarity_fn_name") if path.is_file() else None
    unit_length = bool(listing) and listing[-1].kind == "Normalize"
    if name not in (None, "cosine") and not (name == "dot" and unit_length):
        raise foreign_modules(folder, f"the similarity {name!r} in {path.name}")


def _prompts(path: Path) -> tuple[dict[str, str] | None, str | None]:
    """The saved prompts, and the name of the default one."""
    settings = read_json(path, DAMAGED) if path.is_file() else {}
    prompts, default = settings.get("prompts"), settings.get("default_prompt_name")
    if not isinstance(prompts, dict | None):
        raise _damaged(path, "prompts must be names and texts")
    prompts = None if prompts is None else {name: text or "" for name, text in prompts.items()}
    if not all(isinstance(text, str) for text in (prompts or {}).values()):
        raise _damaged(path, "prompts must be texts")
    if default is not None and default not in (prompts or {}):
        raise UserError(
            f"{path}: default_prompt_name {default!r} is none of its prompts; correct one of them"
        )
    return prompts, default


def _max_seq_length(folder: Path) -> int | None:
    """The length that texts are cut to; refuses what else the Transformer module may do."""
    path = folder / TRANSFORMER_FILE
    settings = read_json(path, DAMAGED) if path.is_file() else {}
    if settings.get("do_lower_case"):
        raise foreign_modules(folder, "do_lower_case, which changes the texts")
    for key, arguments in settings.items():
        others = set(arguments) - HARMLESS_ARGUMENTS if isinstance(arguments, dict) else set()
        if others and key.endswith(("_args", "_kwargs")):
            raise foreign_modules(folder, f"{key} ({', '.join(sorted(others))}) in {path.name}")
    length = settings.get("max_seq_length")
    if length is not None and not (isinstance(length, int) and length >= 2):
        raise _damaged(path, "max_seq_length must be a number of at least 2")
    return length


def _check_modules(folder: Path) -> int | None:
    """Refuse all modules but ours; D where a Dense cuts."""
    listing = read_listing(folder)
    kinds, paths = [module.kind for module in listing], [module.path for module in listing]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in (
        [],
        ["Normalize"],
        ["Dense"],
        ["Dense", "Normalize"],
    ):
        raise foreign_modules(folder, f"the modules {', '.join(kinds)}")
    if paths[0]:
        raise foreign_modules(folder, f"its weights in the folder {paths[0]}")
    if (pooling := _pooling(folder / paths[1])) != "lasttoken":
        raise foreign_modules(folder, f"{pooling} pooling")
    return _cut_of_dense(folder, paths[2]) if "Dense" in kinds else None


def _pooling(folder: Path) -> str:
    """The pooling mode; several are joined by "+"."""
    settings = read_json(folder / "config.json", DAMAGED)
    mode = settings.get("pooling_mode")
    if mode is None:
        mode = [name for key, name in POOLING_MODES.items() if settings.get(key)] or "mean"
    return mode if isinstance(mode, str) else "+".join(mode)


def _cut_of_dense(folder: Path, path: str) -> int:
    """D of a Dense that gives the leading D of H components, and does nothing else."""
    settings = read_json(folder / path / "config.json", DAMAGED)
    name = settings.get("module_input_name") or "sentence_embedding"
    plain = (
        not settings.get("use_residual")
        and settings.get("activation_function") in IDENTITIES
        and name == (settings.get("module_output_name") or name) == "sentence_embedding"
    )
    try:
        weights = load_file(folder / path / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise _damaged(folder / path / "model.safetensors", error) from None
    weight = weights.pop("linear.weight", torch.empty(0, 0)).float()
    if not plain or any(w.any() for w in weights.values()) or not _is_cut(weight):
        raise foreign_modules(folder, f"a Dense layer ({path}) that does more than cut vectors")
    return len(weight)


def _is_cut(weight: torch.Tensor) -> bool:
    return 0 < weight.shape[0] <= weight.shape[1] and torch.equal(weight, torch.eye(*weight.shape))


def foreign_modules(folder: Path, what: str) -> ForeignModules:
    """The error for a folder that has something which this project does not compute."""
    return ForeignModules(
        f"{folder} has {what}; ml-embed computes the last token's vector, cut and normalised at "
        f"most. Use sentence-transformers for this model, or remove {MODULES_FILE} and "
        f"{TRANSFORMER_FILE} from a copy of the folder to have its last token's vectors"
    )


def _damaged(path: Path, error: object) -> UserError:
    return UserError(f"{path} is damaged ({error}); {DAMAGED}")


@dataclass(frozen=True)
class _Listing:
    """modules.json while it is written: its modules, in order."""

    folder: Path
    entries: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, settings: dict[str, Any] | None = None) -> Path:
        """Add a module; its folder, which is empty but for its settings."""
        number = len(self.entries)
        path = f"{number}_{kind}" if number else ""
        module = f"sentence_transformers.models.{kind}"
        self.entries.append({"idx": number, "name": str(number), "path": path, "type": module})
        folder = self.folder / path
        folder.mkdir(exist_ok=True)
        if settings is not None:
            write_json(folder / "config.json", settings)
        return folder


def write_modules(folder: Path, hidden_size: int, modules: Modules) -> None:
    """Last-token pooling, a cut to `modules.dim` if it is less than H, normalisation."""
    length = {"max_seq_length": modules.max_seq_length, "do_lower_case": False}
    write_json(folder / TRANSFORMER_FILE, length)
    listing = _Listing(folder)
    listing.add("Transformer")
    # All modes by their older names: mistral.rs requires each, sentence-transformers 5 and 6 both
    # read them.
    pooling: dict[str, Any] = {key: mode == "lasttoken" for key, mode in POOLING_MODES.items()}
    pooling |= {"word_embedding_dimension": hidden_size, "include_prompt": True}
    listing.add("Pooling", pooling)
    if modules.dim is not None and modules.dim < hidden_size:
        # Unlike `truncate_dim` it stands before the normalisation.
        dense: dict[str, Any] = {"in_features": hidden_size, "out_features": modules.dim}
        dense |= {"bias": False, "activation_function": IDENTITIES[0]}
        projection = {"linear.weight": torch.eye(modules.dim, hidden_size)}
        save_file(projection, listing.add("Dense", dense) / "model.safetensors")
    listing.add("Normalize")
    write_json(folder / MODULES_FILE, listing.entries)
    settings = {
        "prompts": modules.prompts or {},
        "default_prompt_name": modules.default_prompt_name,
        "similarity_fn_name": "cosine",
    }
    write_json(folder / PROMPTS_FILE, settings)
