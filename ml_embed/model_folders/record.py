"""What a model folder says of itself: the sizes it was trained at (`ml_embed.json`)."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase, Qwen3Config

from ml_embed.errors import UserError
from ml_embed.files.atomic import write_json
from ml_embed.files.digests import SEAL, seal_is_broken, sealed
from ml_embed.files.json_file import read_json
from ml_embed.model import NormSharing
from ml_embed.model_folders.foreign import DAMAGED
from ml_embed.model_folders.modules import Modules, read_modules

FORMAT_VERSION = 2
RECORD_FILE = "ml_embed.json"
NESTED = "nested"
"""The folder of what only this project reads; servers load every safetensors file above it."""
FACTORS_FILE = f"{NESTED}/embedding_factors.safetensors"
EXIT_NORMS_FILE = f"{NESTED}/exit_norms.safetensors"
ORIGIN_FILE = f"{NESTED}/origin.json"
"""Of a backbone that was made from a model; a model folder's origin stands in its record."""

TABLE = "embed_tokens.weight"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Where a backbone's weights are: in one file, or else in those that an index names."""


@dataclass(frozen=True)
class TrainedOn:
    """A dataset that a model was trained on."""

    dataset: str
    """its name where it was trained on"""
    source: str | None = None
    """where it comes from: a name on the hub, or an address"""
    revision: str | None = None
    license: str | None = None
    """as the hub writes it"""
    rows: int | None = None
    """that training drew from"""


@dataclass(frozen=True)
class Origin:
    """What a model was made from, as far as it is known, also for the model card."""

    base_model: str | None = None
    """name on the hub of the model that training started from"""
    license: str | None = None
    """of the base model, as the hub writes it; "other" has a name and an address of its own"""
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    """codes, as the hub writes them"""
    trained_on: tuple[TrainedOn, ...] = ()
    """datasets, those of the models that training started from first"""
    all_data_known: bool = False
    """whether `trained_on` is all: no model that training started from had other datasets"""

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the datasets trained on."""
        return tuple(dict.fromkeys(item.dataset for item in self.trained_on))

    @classmethod
    def of_backbone(cls, folder: Path) -> "Origin | None":
        """What `save` wrote into a backbone; None without. Raises UserError if it is damaged."""
        path = folder / ORIGIN_FILE
        if not path.is_file():
            return None
        try:
            origin = _origin(read_json(path, DAMAGED))
            problem = _problem_of_origin(origin)
        except (TypeError, AttributeError) as error:
            problem = str(error)
        if problem:
            raise UserError(f"{path} is damaged ({problem}); {DAMAGED}")
        return origin

    def save(self, folder: Path) -> None:
        """Write it into a backbone."""
        (folder / NESTED).mkdir(exist_ok=True)
        write_json(folder / ORIGIN_FILE, dataclasses.asdict(self))


@dataclass(frozen=True)
class AveragedModel:
    """One of the models that a model is the mean of."""

    model: str
    """as it was given: a folder, or a name on the hub"""
    weight: float
    """its share of the mean"""
    digest: str
    """of its content"""


@dataclass(frozen=True)
class ModelRecord:
    """What was trained."""

    exits: tuple[int, ...]
    """layers after which vectors were trained, ascending"""
    dims: tuple[int, ...]
    """vector lengths trained, largest first"""
    ranks: tuple[int, ...]
    """ranks of the token factors trained, ascending; empty for a whole table"""
    temperature: float
    max_seq_length: int
    """tokens, end token included"""
    norm_sharing: NormSharing = "shared"
    pooling: str = "last_token"
    prompts: dict[str, str] = field(default_factory=dict)
    """prompt name -> text put before the input"""
    default_prompt_name: str | None = None
    """of the prompt that texts get for which none is asked; None is no prompt"""
    origin: Origin = Origin()
    averaged: tuple[AveragedModel, ...] = ()
    """the models that this one is the mean of; empty for one that was trained"""
    ema_decay: float = 0.0
    """decay of the average over training steps that the weights are; 0 = they are those of one"""
    format_version: int = FORMAT_VERSION
    digests: dict[str, str] = field(default_factory=dict, compare=False)
    """file or setting -> digest of its content when the folder was written (`seal.py`)"""

    @classmethod
    def load(cls, folder: Path) -> "ModelRecord | None":
        """The record of a model folder; None for a plain backbone.

        Prompts and maximum length are those that sentence-transformers reads too, where its files
        say any: that is where people change them.

        Raises:
            UserError: the record is damaged, of a newer format, or at odds with what the folder
                says for sentence-transformers.
        """
        path = folder / RECORD_FILE
        if not path.exists():
            return None
        record = _read(path)
        modules = read_modules(folder)
        if modules.dim is not None and modules.dim != record.dims[0]:
            raise UserError(
                f"{folder}: its Dense layer gives {modules.dim} components, {RECORD_FILE} "
                f"says {record.dims[0]}; copy the model folder again"
            )
        return dataclasses.replace(record, **_said(modules))

    @classmethod
    def of_backbone(
        cls, folder: Path, config: Qwen3Config, tokenizer: PreTrainedTokenizerBase
    ) -> "ModelRecord":
        """A plain backbone counts as trained at its whole depth and length.

        Its prompts, length of vectors and maximum length are those that sentence-transformers
        would use.

        Raises:
            UserError: the folder's modules are not ours, or a file is damaged.
        """
        modules = read_modules(folder)
        record = cls(
            exits=(config.num_hidden_layers,),
            dims=(modules.dim or config.hidden_size,),
            ranks=(),
            temperature=1.0,  # not known; nothing reads it
            max_seq_length=int(min(tokenizer.model_max_length, config.max_position_embeddings)),
        )
        return dataclasses.replace(record, **_said(modules))

    def save(self, folder: Path) -> None:
        """Write it into a model folder."""
        write_json(folder / RECORD_FILE, sealed(dataclasses.asdict(self)))


def nested_file(folder: Path, file: str) -> Path:
    """A file of `nested/`; in folders of format 1 it stands at the top level."""
    former = folder / Path(file).name
    return former if former.is_file() else folder / file


def weights_folder(folder: Path) -> Path:
    """Where the layers' weights are: in `nested/` if the folder has no token table beside them."""
    for place in (folder, folder / NESTED):
        if (place / WHOLE).is_file() or (place / INDEX).is_file():
            return place
    return folder


def _read(path: Path) -> ModelRecord:
    values = read_json(path, DAMAGED)
    if seal_is_broken(values):
        raise UserError(
            f"{path} has changed since it was written. Copy the model folder again; if you "
            f"have edited it on purpose, remove its key {SEAL!r}"
        )
    version = values.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise UserError(
            f"{path} has format version {version}, this version reads {FORMAT_VERSION}; update "
            "ml-embed"
        )
    try:
        values = _known(ModelRecord, values) | {
            "origin": _origin(values.get("origin", {})),
            "averaged": _averaged(values.get("averaged", [])),
        }
        record = ModelRecord(**values | {"format_version": FORMAT_VERSION})
        problem = _problem(record)
    except (TypeError, AttributeError) as error:
        problem = str(error)
    if problem:
        raise UserError(f"{path} is damaged ({problem}); {DAMAGED}")
    return record


def _problem(record: ModelRecord) -> str | None:
    """What stands in a record that no training writes."""
    for name in ("exits", "dims", "ranks"):
        sizes = getattr(record, name)
        whole = isinstance(sizes, tuple) and all(type(size) is int and size > 0 for size in sizes)
        if not whole or sorted(sizes, reverse=name == "dims") != list(sizes):
            return f"{name} must be whole numbers in order, not {sizes!r}"
    if not (record.exits and record.dims):
        return "exits and dims must not be empty"
    if type(record.max_seq_length) is not int or record.max_seq_length < 2:
        return "max_seq_length must be a whole number of at least 2"
    if type(record.ema_decay) not in (int, float) or not 0 <= record.ema_decay < 1:
        return f"ema_decay must be a number from 0 to below 1, not {record.ema_decay!r}"
    if record.norm_sharing not in get_args(NormSharing) or record.pooling != "last_token":
        return f"it says norm_sharing {record.norm_sharing!r} and pooling {record.pooling!r}"
    if not all(isinstance(t, str) for t in (*record.prompts.values(), *record.digests.values())):
        return "prompts and digests must be texts"
    default = record.default_prompt_name
    if default is not None and default not in record.prompts:
        return f"default_prompt_name {default!r} is none of its prompts"
    return _problem_of_origin(record.origin)


def _problem_of_origin(origin: Origin) -> str | None:
    said = [vars(item) for item in origin.trained_on]
    texts = [*origin.languages]
    texts += [v for item in said for key, v in item.items() if key != "rows" and v is not None]
    own = (origin.base_model, origin.license, origin.license_name, origin.license_link)
    texts += [text for text in own if text is not None]
    if not all(isinstance(text, str) for text in texts):
        return "what origin says must be texts"
    if not all(item["rows"] is None or type(item["rows"]) is int for item in said):
        return "rows that were trained on must be whole numbers"
    if type(origin.all_data_known) is not bool:
        return f"all_data_known must be true or false, not {origin.all_data_known!r}"
    return None


def _origin(values: dict[str, Any]) -> Origin:
    """What a record says; earlier ones have no more than the names of the datasets."""
    names = [{"dataset": name} for name in values.get("datasets", [])]
    listed = [TrainedOn(**_known(TrainedOn, item)) for item in values.get("trained_on", names)]
    return Origin(**_known(Origin, values) | {"trained_on": tuple(listed)})


def _averaged(parts: list[dict[str, Any]]) -> tuple[AveragedModel, ...]:
    return tuple(AveragedModel(**_known(AveragedModel, part)) for part in parts)


def _known(record: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values that a record has a field for, lists as tuples."""
    names = {f.name for f in dataclasses.fields(record)}
    own = {name: value for name, value in values.items() if name in names}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in own.items()}


def _said(modules: Modules) -> dict[str, Any]:
    """Fields of a record that a folder's files for sentence-transformers say."""
    said: dict[str, Any] = {}
    if modules.prompts is not None:
        said |= {
            "prompts": modules.prompts,
            "default_prompt_name": modules.default_prompt_name,
        }
    if modules.max_seq_length is not None:
        said["max_seq_length"] = modules.max_seq_length
    return said
