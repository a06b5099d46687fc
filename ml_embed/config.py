"""Every key of the training config: its meaning, unit, range and default; loading, overriding,
checking.

The config the user gave is never changed: it is saved as given, with the overrides of the command
line in it, and
derived numbers live in `ml_embed.training.resolve`.
"""

import ast
import dataclasses
import difflib
import fnmatch
import inspect
import itertools
import json
import math
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ml_embed.errors import UserError
from ml_embed.files.paths import expand_home, file_in_the_way, home_path

Task = Literal["retrieval", "clustering", "classification"]
TASKS: tuple[Task, ...] = get_args(Task)

DistillationLoss = Literal["vectors", "similarity"]
PATH_SUFFIXES = ("_path", "_dir")
"""Keys that end so are paths, whose `~` is the home folder."""
WRITTEN_FOLDERS = ("output_dir", "tb_dir", "cache_dir")
HIGHEST_WEIGHT = 1000
"""Of a dataset: an epoch holds its rows that many times, and must stay countable."""


def _key(
    default: Any = MISSING,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> Any:
    """A config field with its range: low <= value <= high, value > above."""
    return dataclasses.field(default=default, metadata={"low": low, "above": above, "high": high})


@dataclass(frozen=True)
class DatasetConfig:
    """Settings of one dataset (or of all whose name matches a shell-style pattern)."""

    task: Task | None = None
    """which losses apply and how many negatives; null = the default for the name
    (`ml_embed/data/dataset_tasks.json`)"""
    num_hard_neg: int | None = _key(None, low=0)
    """negatives drawn for each sample; null = the task's default"""
    weight: float = _key(1.0, above=0, high=HIGHEST_WEIGHT)
    """how often the dataset's rows are drawn in an epoch; 1 = once each, 1000 at most"""
    max_samples: int | None = _key(None, low=1)
    """training rows used, a fixed random choice; null = all"""
    prompt: str | None = None
    """text that tokenize_data_qwen.py --config puts before each query; null = none"""
    passage_prompt: str | None = None
    """text that it puts before passages and negatives; null = none"""
    passage_prompt_share: float = _key(1.0, low=0, high=1)
    """share of passages and negatives that get passage_prompt; published for symmetric tasks:
    0.3"""


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Keys without a default are required."""

    model_path: str
    """folder (or hub name) of the Qwen3 backbone with its tokenizer"""
    experiment_id: str
    """name of the run: everything is written to output_dir/experiment_id"""
    output_dir: str
    """folder of all runs"""
    tb_dir: str
    """folder of the TensorBoard logs, one subfolder a run"""
    cache_dir: str
    """folder of the memory-mapped form of the tokenized data, made once and shared by all runs"""
    train_data_path: str
    """folder that tokenize_data_qwen.py wrote (or the originally released layout)"""

    train_batch_size: int = _key(8, low=1)
    """samples (query, passage, negatives) a process and optimizer step"""
    max_seq_length: int = _key(2048, low=2)
    """tokens of a text, EOS included; longer ones are cut"""
    learning_rate: float = _key(1e-4, above=0)
    """peak learning rate, reached at the end of the warm-up"""
    min_lr: float = _key(1e-6, low=0)
    """floor of the learning rate after the warm-up"""
    weight_decay: float = _key(1e-2, low=0)
    """AdamW's decoupled weight decay, on all trained parameters"""
    warmup_steps: int = _key(100, low=0)
    """optimizer steps of linear warm-up"""
    scheduler_type: Literal["cosine", "constant_with_warmup"] = "cosine"
    """learning rate after the warm-up"""
    train_steps: int = _key(-1, low=-1)
    """optimizer steps; -1 = as many as train_epochs take"""
    train_epochs: int = _key(5, low=1)
    """passes over the data; not used when train_steps is given"""
    max_grad_norm: float = _key(1.0, low=0)
    """gradient norm above which gradients are scaled down; 0 = off"""

    use_mrl: bool = False
    """nested vector lengths (Matryoshka representation learning)"""
    use_mll: bool = False
    """nested depths (Matryoshka layer learning)"""
    use_mel: bool = False
    """nested ranks of the token table (Matryoshka embedding learning); needs r > 0"""
    r: int = _key(0, low=0)
    """rank of the factorised token table; 0 = a whole table"""
    mrl_dims: tuple[int, ...] | None = _key(None, low=1)
    """vector lengths to train; null = 8, 16, 32, ...; the hidden size is always one of them"""
    mll_layers: tuple[int, ...] | None = _key(None, low=1)
    """exit layers to train; null = 1, 2, 4, 8, 16, 24, ...; the last layer is always one of them"""
    mel_ranks: tuple[int, ...] | None = _key(None, low=1)
    """ranks to train; null = 64, 128, 256, ...; r is always one of them"""
    mel_init: Literal["svd", "frequency"] = "svd"
    """factors at the start: the best for all tokens alike, or for the tokens that the data really
    holds"""
    mll_norm: Literal["shared", "per_layer"] = "shared"
    """one final norm for all exits, or a copy trained apart for each"""

    num_hard_neg: int = _key(7, low=0)
    """negatives of a retrieval sample"""
    num_hard_neg_clustering: int = _key(9, low=0)
    """negatives of a clustering sample"""
    temperature: float = _key(0.05, above=0)
    """divides the cosines in all contrastive losses"""
    mask_false_negatives: bool = True
    """a document that is a sample's own positive is never that sample's negative, wherever it
    stands"""
    false_negative_margin: float | None = _key(None, low=0, high=2)
    """negatives whose cosine to the query is above the positive's by more than this are left out
    too; null = off"""
    datasets: dict[str, DatasetConfig] = dataclasses.field(default_factory=dict)
    """settings by dataset name or shell-style pattern; the first match in the order given counts"""
    valid_fraction: float = _key(0.01, low=0, high=0.5)
    """share of each dataset's rows held out for validation; 0 = no validation"""

    teacher_model_path: str | None = None
    """folder of a model whose vectors are distilled; null = no distillation"""
    teacher_vectors_path: str | None = None
    """folder that scripts/embed_teacher.py wrote: a teacher's vectors, computed beforehand; null =
    none"""
    kd_loss: DistillationLoss = "vectors"
    """what is distilled: the teacher's vectors themselves, or the cosines between them (a teacher
    of any width)"""
    kd_weight: float = _key(1.0, low=0)
    """weight of the distillation term"""

    lora_r: int = _key(0, low=0)
    """rank of the LoRA adapters that train in place of the layers' matrices (needs peft); 0 = the
    layers train whole"""
    lora_alpha: float | None = _key(None, above=0)
    """the adapters' product is scaled by lora_alpha / lora_r; null = 2 * lora_r"""

    seed: int = _key(0, low=0)
    """all randomness (order, negatives, ranks) is a function of it"""
    attention: Literal["auto", "varlen", "flash", "sdpa"] = "auto"
    """attention kernel; auto = the best there is"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    max_tokens_per_forward: int = _key(0, low=0)
    """tokens encoded at once (GradCache: same gradients, bounded memory, in validation too); 0 =
    the whole batch"""
    compile_layers: bool = False
    """fuse each layer's elementwise work with torch.compile: faster steps, after a minute or so for
    the first ones"""

    log_interval: int = _key(20, low=1)
    """optimizer steps a log line"""
    validation_steps: int = _key(100, low=0)
    """optimizer steps between validations; 0 = only at the end"""
    valid_ranks: tuple[int, ...] | None = _key(None, low=1)
    """ranks at which validation also measures retrieval, with valid_layers and valid_dims; null =
    the largest"""
    valid_layers: tuple[int, ...] | None = _key(None, low=1)
    """exits at which it does; null = the last"""
    valid_dims: tuple[int, ...] | None = _key(None, low=1)
    """vector lengths at which it does; null = the whole"""
    checkpointing_steps: int = _key(100, low=0)
    """optimizer steps between checkpoints; 0 = only at the end of each epoch"""
    save_total_limit: int | None = _key(None, low=1)
    """step_N model folders to keep, the newest; null = all"""
    report_to: tuple[str, ...] = ("tensorboard",)
    """accelerate trackers; [] = metrics.jsonl only"""
    num_processes: int = 0
    """ignored: accelerate decides"""

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.experiment_id


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[TrainConfig, dict]:
    """Read, override and check a config file.

    Args:
        path: a JSON file holding one object.
        overrides: `key=value` strings; the value is JSON, or else a plain string.
    Returns:
        the checked config, and the user's own object as given, with the overrides applied: what a
        run saves.
    Raises:
        UserError: names every problem at once.
    """
    path = home_path(path)
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"config file {path} does not exist; give an existing file with --config"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"config file {path} is not valid JSON: line {error.lineno}: {error.msg}"
        ) from None
    except RecursionError:
        raise UserError(f"config file {path} is nested too deeply to be a config") from None
    if not isinstance(given, dict):
        raise UserError(f"config file {path} must hold one JSON object {{...}}, not {_kind(given)}")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise UserError(
                f"--set {override!r} must have the form key=value, e.g. --set train_batch_size=16"
            )
        try:
            given[key] = json.loads(value)
        except json.JSONDecodeError:
            given[key] = value
    return parse_config(given, source=str(path)), given


def parse_config(given: Mapping[str, Any], source: str = "config") -> TrainConfig:
    """A checked config from a plain object; raises one UserError that lists every problem."""
    problems: list[str] = []
    config = _parse_dataclass(TrainConfig, given, "", problems)
    if not problems:
        problems += _check_together(config)
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(
            f"{source} has {len(problems)} problem{'s' * (len(problems) > 1)}:\n{listing}"
        )
    assert config is not None  # there were no problems
    paths = {
        key: path
        for key, path in vars(config).items()
        if key.endswith(PATH_SUFFIXES) and path is not None
    }
    return dataclasses.replace(config, **{key: expand_home(path) for key, path in paths.items()})


def _check_together(config: TrainConfig) -> list[str]:
    """Problems between keys that are each fine alone."""
    problems = []
    if config.use_mel and config.r == 0:
        problems.append(
            "use_mel: true needs factors to nest; set r to their rank, e.g. 512, or use_mel to "
            "false"
        )
    for flag, key in (("use_mrl", "mrl_dims"), ("use_mll", "mll_layers"), ("use_mel", "mel_ranks")):
        if getattr(config, key) is not None and not getattr(config, flag):
            problems.append(
                f"{key} is given but {flag} is false; set {flag} to true or remove {key}"
            )
    if config.mel_ranks is not None and config.r and max(config.mel_ranks) > config.r:
        problems.append(f"mel_ranks: {max(config.mel_ranks)} is larger than r = {config.r}")
    if config.mel_init == "frequency" and config.r == 0:
        problems.append("mel_init: 'frequency' needs factors; set r > 0 or remove mel_init")
    if config.teacher_model_path is not None and config.teacher_vectors_path is not None:
        problems.append(
            "teacher_model_path and teacher_vectors_path are both given; keep one of them"
        )
    if (
        config.kd_loss != "vectors"
        and config.teacher_model_path is None
        and config.teacher_vectors_path is None
    ):
        problems.append(
            f"kd_loss: {config.kd_loss!r} needs a teacher; set teacher_model_path or "
            "teacher_vectors_path"
        )
    if config.lora_r == 0 and config.lora_alpha is not None:
        problems.append("lora_alpha is given but lora_r is 0; set lora_r, e.g. to 16, or remove it")
    if config.min_lr > config.learning_rate:
        problems.append(
            f"min_lr {config.min_lr} is larger than learning_rate {config.learning_rate}"
        )
    if config.train_steps == 0:
        problems.append(
            "train_steps: 0 trains nothing; give a number of steps, or -1 for train_epochs"
        )
    if Path(config.experiment_id).name != config.experiment_id or config.experiment_id in (
        "",
        ".",
        "..",
    ):
        problems.append(f"experiment_id: {config.experiment_id!r} must be a plain folder name")
    for key in WRITTEN_FOLDERS:
        if (file := file_in_the_way(home_path(getattr(config, key)))) is not None:
            problems.append(f"{key}: {file} is a file; name a folder")
    return problems


def _parse_dataclass(cls: type, given: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in given:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = (
                f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(fields)}"
            )
            problems.append(f"{prefix}{key}: unknown key{hint}")
    values = {}
    for name, field in fields.items():
        if name in given:
            values[name] = _parse_value(
                given[name], hints[name], field, f"{prefix}{name}", problems
            )
        elif field.default is MISSING and field.default_factory is MISSING:
            meaning = field_docs(cls).get(name, "")
            problems.append(f"{prefix}{name}: required key is missing ({meaning})")
    return None if problems else cls(**values)


def _parse_value(
    value: Any, hint: Any, field: dataclasses.Field, key: str, problems: list[str]
) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # X | None
        if value is None:
            return None
        (hint,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if isinstance(value, str) and value in choices:
            return value
        problems.append(f"{key}: {value!r} is not one of {', '.join(map(repr, choices))}")
    elif origin is tuple:
        (item, _) = typing.get_args(hint)
        if isinstance(value, list | tuple):
            if not value and item is not str:
                problems.append(
                    f"{key}: the list is empty; name at least one {_TYPE_NAMES[item]}, or give null"
                )
            items = [
                _parse_scalar(v, item, field, f"{key}[{i}]", problems) for i, v in enumerate(value)
            ]
            if None not in items and len(set(items)) != len(items):
                problems.append(f"{key}: {list(value)} holds a value twice")
            return tuple(items)
        problems.append(f"{key}: {value!r} must be a list of {_TYPE_NAMES[item]}s")
    elif origin is dict:
        if not isinstance(value, Mapping):
            problems.append(f'{key}: must be an object {{"name": {{...}}}}, not {_kind(value)}')
            return None
        parsed = {}
        for name, settings in value.items():
            if isinstance(settings, Mapping):
                own: list[str] = []
                parsed[name] = _parse_dataclass(DatasetConfig, settings, f"{key}.{name}.", own)
                problems += own
            else:
                problems.append(
                    f"{key}.{name}: must be an object of settings, not {_kind(settings)}"
                )
        return parsed
    else:
        return _parse_scalar(value, hint, field, key, problems)
    return None


_TYPE_NAMES = {int: "whole number", float: "number", str: "string", bool: "true/false value"}


def _parse_scalar(
    value: Any, kind: type, field: dataclasses.Field, key: str, problems: list[str]
) -> Any:
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        problems.append(f"{key}: {value!r} must be a {_TYPE_NAMES[kind]}, not {_kind(value)}")
        return None
    if kind is float:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if kind is float and not math.isfinite(value):
        problems.append(f"{key}: must be a finite number")
        return None
    if kind is str and not value:
        problems.append(f"{key}: must not be empty")
    if kind is int and abs(value) >= 2**63:
        problems.append(f"{key}: {value} is too large")
    low, above, high = (field.metadata.get(bound) for bound in ("low", "above", "high"))
    if low is not None and value < low:
        problems.append(f"{key}: {value} must be at least {low}")
    if above is not None and value <= above:
        problems.append(f"{key}: {value} must be greater than {above}")
    if high is not None and value > high:
        problems.append(f"{key}: {value} must be at most {high}")
    return value


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true/false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null" if value is None else type(value).__name__)


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the docstring under it as one line (also the table of keys)."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for pair in itertools.pairwise(definition.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                value=ast.Constant(value=str(text))
            ):
                docs[name] = " ".join(text.split())
    return docs


def match_settings(name: str, datasets: Mapping[str, DatasetConfig]) -> DatasetConfig:
    """Settings under the dataset's own name, or else the first pattern that matches it."""
    if name in datasets:
        return datasets[name]
    return next(
        (s for pattern, s in datasets.items() if fnmatch.fnmatchcase(name, pattern)),
        DatasetConfig(),
    )


def check_dataset_names(names: Sequence[str], datasets: Mapping[str, DatasetConfig]) -> None:
    """Refuse settings that match no dataset: a typing mistake would otherwise train with
    defaults."""
    unused = [p for p in datasets if p not in names and not fnmatch.filter(names, p)]
    if unused:
        raise UserError(
            f"datasets: {', '.join(map(repr, unused))} matches none of the datasets there are "
            f"({', '.join(names)}); correct or remove it"
        )
