"""Every key of the training config: its meaning, unit, range, default and off value.

The docstring under a key is its row in configs/README.md and its help in error messages. The
user's config is never changed: it is saved as given, with the command line's overrides in it.
Derived numbers live in `ml_embed.training.resolve`.
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
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ml_embed.errors import UserError
from ml_embed.files.json_file import parse_json
from ml_embed.files.paths import expand_home, file_in_the_way, home_path

Task = Literal["retrieval", "clustering", "classification", "similarity"]
"""Retrieval compares a query with its own negatives and with all passages of the global batch;
clustering and classification (of two labels) with its own negatives only. Similarity orders the
pairs of the global batch by their scores."""
TASKS: tuple[Task, ...] = get_args(Task)

DistillationLoss = Literal["vectors", "similarity", "kl", "margin_mse"]
SCORE_LOSSES: Collection[DistillationLoss] = ("kl", "margin_mse")
"""What is distilled of scores that stand in the data, without a teacher's vectors."""
PATH_SUFFIXES = ("_path", "_dir")
"""Keys with these endings are paths; a `~` in them is the home folder."""
WRITTEN_FOLDERS = ("output_dir", "tb_dir", "cache_dir")
"""Keys that name folders which a run writes to."""
HIGHEST_WEIGHT = 1000
"""Highest `weight` of a dataset, so that the number of rows in an epoch stays countable."""


def _key(
    default: Any = MISSING,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    may_be_empty: bool = False,
) -> Any:
    """A config field with the range of its value: low <= value <= high, above < value < below.

    `may_be_empty`: "" is a value.
    """
    limits = {"low": low, "above": above, "high": high, "below": below}
    return dataclasses.field(default=default, metadata=limits | {"may_be_empty": may_be_empty})


TABLE_LEARNING_RATE = 0.015
"""Highest learning rate of a token table, or of its factor A, with `embedding_lr_scale` "auto".
Measured in `ml_embed/benchmarks/README.md`: the best one hardly depends on that of the layers."""

LEFT_OUT = 0
"""train_batch_size of a config that names global_batch_size alone; nobody can write it."""


@dataclass(frozen=True)
class DatasetConfig:
    """Settings of one dataset, or of all datasets whose names match a shell-style pattern."""

    task: Task | None = None
    """which losses apply and how many negatives are drawn; null = similarity where all rows have a
    score, else what the tokenized data says, else what the dataset's name says
    (`ml_embed/data/dataset_tasks.json`), else retrieval"""
    num_hard_neg: int | None = _key(None, low=0)
    """hard negatives drawn per sample; 0 = none; null = the default of the task (num_hard_neg,
    num_hard_neg_clustering, 1 for classification, 0 for similarity, whose loss takes none)"""
    weight: float = _key(1.0, above=0, high=HIGHEST_WEIGHT)
    """how many times per epoch the dataset's rows are drawn; 1 = once; 0.1 = only a tenth of
    them"""
    max_samples: int | None = _key(None, low=1)
    """largest number of rows used for training, a random choice fixed by the seed; null = all"""
    prompt: str | None = _key(None, may_be_empty=True)
    """text that `tokenize_data_qwen.py --config` puts before each query, and evaluations with
    --config do; null = none, in evaluations that of the model folder; "" = none"""
    passage_prompt: str | None = _key(None, may_be_empty=True)
    """the same before passages and negatives, in evaluations before documents"""
    passage_prompt_share: float = _key(1.0, low=0, high=1)
    """share of passages and negatives that get passage_prompt; 1 = all; F2LLM-v2 uses 0.3 for
    symmetric tasks"""
    source: str | None = None
    """where the data comes from, a name on the hub or an address, for manifest, model record and
    card; null = what the data says"""
    revision: str | None = None
    """which version of the source; null = what the data says"""
    license: str | None = None
    """of the data, as the hub writes it; null = what the data says"""

    def provenance(self, data: Mapping[str, str] | None) -> dict[str, str]:
        """Source, revision and license as far as they are known: said here, or else by the data."""
        names = ("source", "revision", "license")
        said = {name: getattr(self, name) or (data or {}).get(name) for name in names}
        return {name: text for name, text in said.items() if text}


@dataclass(frozen=True)
class LanguageSampling:
    """How often an epoch draws each language."""

    alpha: float = _key(low=0, high=1)
    """a language is drawn in proportion to this power of its number of rows, in which the weights
    of datasets count; 1 = as often as rows and weights say; 0 = all languages equally often"""
    cap: float | None = _key(None, low=1)
    """how many times the number of its rows a language is drawn per epoch at most; what that
    leaves goes to the other languages; null = no limit"""


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Keys without a default are required."""

    model_path: str
    """backbone to start from: a Qwen3 folder with its tokenizer, or its name on the Hugging Face
    hub"""
    experiment_id: str
    """name of the run; everything is written to output_dir/experiment_id"""
    output_dir: str
    """folder of all runs"""
    tb_dir: str
    """folder of the TensorBoard logs, one subfolder per run"""
    cache_dir: str
    """folder for the copy of the tokenized data that training maps into memory; it is made once and
    shared by all runs"""
    train_data_path: str
    """folder of tokenized data, written by tokenize_data_qwen.py or laid out as the F2LLM-v2
    release"""

    train_batch_size: int = _key(8, low=1)
    """samples (a query, its passage and its negatives) per process and optimizer step; may be left
    out with global_batch_size"""
    global_batch_size: int = _key(0, low=0)
    """samples per optimizer step over all processes, which share them equally; 0 =
    train_batch_size times the number of processes"""
    max_seq_length: int = _key(2048, low=2)
    """largest number of tokens per text, the end token included; longer texts are cut"""
    learning_rate: float = _key(1e-4, above=0)
    """highest learning rate, reached at the end of the warm-up"""
    min_lr: float = _key(1e-6, low=0)
    """lowest learning rate after the warm-up; 0 = no lower limit"""
    embedding_lr_scale: float | Literal["auto"] = _key(1.0, above=0)
    """factor on the learning rate of the token table, or with r > 0 of its factor A (B moves with
    the layers); 1 = as published; "auto" = the factor that makes it 0.015, but no less than 1, for
    random or small tables"""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """"adamw_8bit" keeps AdamW's two moments in 8 bits each: a quarter of their memory, nearly the
    same training (needs torchao; on one process or with DDP)"""
    weight_decay: float = _key(1e-2, low=0)
    """decoupled weight decay of AdamW, on all trained parameters; 0 = off"""
    ema_decay: float = _key(0.0, low=0, below=1)
    """running average of the weights, which is validated and saved in their place: how much the
    average of the steps before counts against a new step, 0.999 for an average over about the last
    1,000 steps; 0 = off, the weights themselves"""
    warmup_steps: int = _key(100, low=0)
    """optimizer steps in which the learning rate rises linearly from 0 to learning_rate; 0 = no
    warm-up"""
    scheduler_type: Literal["cosine", "constant_with_warmup"] = "cosine"
    """learning rate after the warm-up: "cosine" falls along a cosine to 0, but not below min_lr;
    "constant_with_warmup" stays at learning_rate"""
    train_steps: int = _key(-1, low=-1)
    """optimizer steps of the run; -1 = as many as train_epochs passes over the data take"""
    train_epochs: int = _key(5, low=1)
    """passes over the data; not used when train_steps is given"""
    max_grad_norm: float = _key(1.0, low=0)
    """gradients are scaled down to this norm where they exceed it; 0 = off"""

    use_mrl: bool = False
    """train several vector lengths at once (Matryoshka Representation Learning, MRL); false = only
    the whole vector"""
    use_mll: bool = False
    """train exits after several layers at once (Matryoshka Layer Learning, MLL); false = only after
    the last layer"""
    use_mel: bool = False
    """train several ranks of the token table at once (Matryoshka Embedding Learning, MEL; needs r >
    0); false = only rank r"""
    r: int = _key(0, low=0)
    """rank of the two factors that replace the token table; 0 = keep the whole table"""
    mrl_dims: tuple[int, ...] | None = _key(None, low=1)
    """vector lengths trained with use_mrl; the hidden size is always added; null = 8, 16, 32, ...
    up to the hidden size"""
    mll_layers: tuple[int, ...] | None = _key(None, low=1)
    """layers after which use_mll trains an exit; the last layer is always added; null = 1, 2, 4, 8,
    16, 24, ... up to 48"""
    mrl_weights: Literal["paper", "uniform"] | tuple[float, ...] = _key("paper", low=0)
    """how much the loss of each vector length counts with use_mrl: "paper" less for shorter ones
    (c_n in `ml_embed/README.md`), "uniform" 1 for each, or a list of numbers, the longest length's
    first; 0 = not at all"""
    mll_weights: Literal["uniform", "last", "linear"] | tuple[float, ...] = _key("uniform", low=0)
    """share of each exit in the loss with use_mll: "uniform" all alike, "last" 1 for the last layer
    and mll_prior_weight for the others together, "linear" in proportion to the layer, or a list of
    numbers, the first exit's first; they are divided by their sum; 0 = not at all"""
    mll_prior_weight: float = _key(1.0, low=0)
    """what all exits before the last layer count together with mll_weights "last", whose last layer
    counts 1"""
    mel_ranks: tuple[int, ...] | None = _key(None, low=1)
    """ranks trained with use_mel; r is always added; null = 64, 128, 256, ... up to r"""
    mel_sampling: Literal["proportional", "full"] = "proportional"
    """which rank a step of use_mel trains: "proportional" draws one of them, a larger one more
    often, "full" is always r, and the smaller ones come from mel_refactor"""
    mel_refactor: Literal["never", "save"] | int = _key("never", low=1)
    """"save" turns the factors of each model folder so that every smaller rank holds the best part
    of the token table, for tokens as frequent as in the training data; rank r stays what it was; a
    number turns those that are trained too, every so many optimizer steps, with their moments;
    "never" = factors as trained"""
    mel_init: Literal["svd", "frequency"] = "svd"
    """best approximation of the token table that the factors start from: "svd" counts all tokens
    alike, "frequency" counts each as often as it occurs in the training data"""
    mll_norm: Literal["shared", "per_layer"] = "shared"
    """final norm of the exits: "shared" is one norm for all, with "per_layer" each exit trains its
    own copy"""

    num_hard_neg: int = _key(7, low=0)
    """hard negatives drawn per retrieval sample, other ones in each epoch; 0 = none"""
    num_hard_neg_clustering: int = _key(9, low=0)
    """hard negatives drawn per clustering sample, other ones in each epoch; 0 = none"""
    temperature: float = _key(0.05, above=0)
    """all contrastive losses divide their cosines by this"""
    mask_false_negatives: bool = True
    """documents that the data pairs with a sample's query (the same query_id, or else the same
    query text) are never counted as its negatives, wherever they stand in the batch; false = off"""
    false_negative_margin: float | None = _key(None, low=0, high=2)
    """negatives whose cosine to the query exceeds the positive's by more than this are masked as
    well, in part over the next quarter of it (at least 0.005); null = off"""
    in_batch_negatives: Literal["positives", "all"] = "positives"
    """documents that the in-batch loss of retrieval compares a query with: "positives" are the
    passages of the global batch, "all" also its hard negatives, the sample's own among them, each
    document once (so is everything else that compares in the batch)"""
    in_batch_pairs: Literal["query_passage", "all"] = "query_passage"
    """what the in-batch loss of retrieval compares: "query_passage" is a query with documents,
    "all" also, in the same softmax, a query with other rows' queries, and a passage with other
    rows' queries and passages"""
    datasets: dict[str, DatasetConfig] = dataclasses.field(default_factory=dict)
    """settings per dataset, under its name or a shell-style pattern such as "sts_*"; an exact name
    goes before patterns, an earlier pattern before a later one"""
    language_sampling: LanguageSampling | None = None
    """how often each language of the data's column `language` is drawn, an object of alpha and cap;
    null = an epoch has each row as often as its dataset's weight says, whatever its language"""
    valid_fraction: float = _key(0.01, low=0, high=0.5)
    """share of each dataset's rows held out for validation, in retrieval data whole documents with
    all their rows; 0 = none; not used with valid_data_path"""
    valid_data_path: str | None = None
    """folder of tokenized data for validation; then no training row is held out; null = hold out
    valid_fraction"""

    teacher_model_path: str | None = None
    """Qwen3 model whose vectors are distilled, run beside the student (a folder or a hub name);
    null = none"""
    teacher_vectors_path: str | None = None
    """folder of a teacher's vectors, computed beforehand by `scripts/embed_teacher.py`; null =
    none"""
    kd_loss: DistillationLoss = "vectors"
    """what is distilled: "vectors" are the teacher's own, "similarity" the cosines between them
    (then the teacher may have any width); the scores of a sample's candidates that
    stand in the data (pos_score, neg_scores) need no teacher here: "kl" teaches their softmax,
    "margin_mse" their margins, to cosines divided by temperature"""
    kd_weight: float = _key(1.0, low=0)
    """weight of the distillation loss in the total loss; 0 = it does not count, and scores need not
    be there"""
    self_distillation: float = _key(0.0, low=0)
    """weight of a loss by which every exit and vector length learns which documents the last
    layer's whole vectors prefer, among a sample's own and, in retrieval, the batch's passages; 0 =
    off"""

    lora_r: int = _key(0, low=0)
    """rank of LoRA adapters, which train in place of the layers' matrices (needs peft); 0 = the
    layers train whole"""
    lora_alpha: float | None = _key(None, above=0)
    """the output of the LoRA adapters is multiplied by lora_alpha / lora_r; null = 2 * lora_r"""

    seed: int = _key(0, low=0)
    """all randomness (order of the rows, negatives, ranks) follows from this number"""
    attention: Literal["auto", "varlen", "flash", "sdpa"] = "auto"
    """attention kernel: "varlen" is torch's for packed sequences and "flash" is flash-attn (both on
    CUDA from Ampere on, in bf16, with heads of at most 256 that are a multiple of 8), "sdpa" is
    torch's scaled dot-product attention and runs everywhere; "auto" is the first of "varlen" and
    "sdpa" that can run"""
    gradient_checkpointing: bool = False
    """compute activations a second time in the backward pass instead of keeping them: less memory,
    about a third more time"""
    max_tokens_per_forward: int = _key(0, low=0)
    """tokens encoded at once; a larger batch is encoded in chunks, with the same gradients
    (GradCache) and bounded memory, in validation too; 0 = no limit"""
    compile_layers: bool = False
    """compile the layers with torch.compile: faster steps, after a minute or so for the first
    ones"""
    deterministic: bool = False
    """use only operations that add in a fixed order, so that a run on GPUs repeats and resumes to
    the bit, more slowly; false = off (runs on CPUs repeat either way)"""

    log_interval: int = _key(20, low=1)
    """optimizer steps per log line"""
    log_exit_gradients: int = _key(0, low=0)
    """optimizer steps between looks at exits, for the next log line: the gradient that each asks of
    shared weights and its cosine with the deepest exit's, mean cosine and effective rank of the
    queries' vectors by exit and length; 0 = off"""
    validation_steps: int = _key(100, low=0)
    """optimizer steps between validations; 0 = only at the end of the run"""
    valid_ranks: tuple[int, ...] | None = _key(None, low=1)
    """ranks of the cuts whose retrieval quality validation also measures (all combinations with
    valid_layers and valid_dims); null = only the largest rank"""
    valid_layers: tuple[int, ...] | None = _key(None, low=1)
    """depths, in layers, of the cuts whose retrieval quality validation also measures (all
    combinations with valid_ranks and valid_dims); null = only the full depth"""
    valid_dims: tuple[int, ...] | None = _key(None, low=1)
    """vector lengths of the cuts whose retrieval quality validation also measures (all combinations
    with valid_ranks and valid_layers); null = only the whole vector"""
    keep_best: str | None = None
    """name of a validation number in metrics.jsonl, such as "Avg/retrieval/ndcg@10": the model with
    its best value (the lowest of a loss, else the highest) is kept in best/; null = off"""
    patience: int = _key(0, low=0)
    """validations in a row without a better value of keep_best after which the run ends; 0 = off"""
    checkpointing_steps: int = _key(100, low=0)
    """optimizer steps between checkpoints; 0 = only at the end of each epoch"""
    save_total_limit: int | None = _key(None, low=1)
    """how many step_N model folders are kept, the newest; null = all"""
    report_to: tuple[str, ...] = ("tensorboard",)
    """names of accelerate's trackers, which get the metrics too; [] = only metrics.jsonl"""
    num_processes: int = 0
    """ignored: accelerate decides how many processes there are"""

    def samples_per_process(self, processes: int) -> int:
        """Samples of each process's share of an optimizer step.

        Raises:
            UserError: the processes cannot share global_batch_size equally, or train_batch_size
                says something else.
        """
        wanted, own = self.global_batch_size, self.train_batch_size
        if not wanted:
            return own
        share, left = divmod(wanted, processes)
        if left:
            raise UserError(
                f"global_batch_size: {wanted} samples cannot be shared equally by {processes} "
                f"processes; launch a number of processes that divides {wanted}, or change it"
            )
        if own not in (LEFT_OUT, share):
            raise UserError(
                f"train_batch_size: {own} samples x {processes} processes are {own * processes}, "
                f"but global_batch_size is {wanted}; leave one of the two out"
            )
        return share

    @property
    def is_taught(self) -> bool:
        """Whether there is a distillation loss."""
        given = self.teacher_model_path or self.teacher_vectors_path
        return given is not None or self.learns_scores

    @property
    def learns_scores(self) -> bool:
        """Whether a teacher's scores in the data are learned from; otherwise they are not read."""
        return self.kd_loss in SCORE_LOSSES and self.kd_weight > 0

    @property
    def run_dir(self) -> Path:
        """The folder of this run, without links: two names of one folder have one lock."""
        return (Path(self.output_dir) / self.experiment_id).resolve()

    @property
    def embedding_lr_factor(self) -> float:
        """The number that `embedding_lr_scale` stands for."""
        if self.embedding_lr_scale == "auto":
            return max(1.0, TABLE_LEARNING_RATE / self.learning_rate)
        return self.embedding_lr_scale

    @property
    def held_out_fraction(self) -> float:
        """Share of the training data's rows that validation takes."""
        return self.valid_fraction if self.valid_data_path is None else 0.0


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[TrainConfig, dict]:
    """Read, override and check a config file.

    Args:
        path: a JSON file holding one object.
        overrides: `key=value` strings; the value is JSON, or else a plain string.
    Returns:
        the checked config, and the user's own object with the overrides applied, which a run saves.
    Raises:
        UserError: names every problem at once.
    """
    given = _read_object(home_path(path))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise UserError(
                f"--set {override!r} must have the form key=value, e.g. --set train_batch_size=16"
            )
        try:
            given[key] = parse_json(value)
        except ValueError:
            given[key] = value
    return parse_config(given, source=str(home_path(path))), given


def load_datasets(path: str | Path) -> dict[str, DatasetConfig]:
    """The `datasets` of a config file, which may hold nothing else.

    Raises:
        UserError: there is no such key, or it is wrong.
    """
    given = _read_object(home_path(path))
    problems: list[str] = []
    if "datasets" not in given:
        raise UserError(
            f'{path} has no key datasets; write {{"datasets": {{"SciFact": {{"prompt": "…"}}}}}}, '
            "with names or patterns"
        )
    (field,) = (field for field in dataclasses.fields(TrainConfig) if field.name == "datasets")
    hint = typing.get_type_hints(TrainConfig)["datasets"]
    datasets = _parse_value(given["datasets"], hint, field, "datasets", problems)
    if problems:
        raise _with_problems(str(path), problems)
    return datasets


def _read_object(path: Path) -> dict[str, Any]:
    """What a config file holds; raises UserError."""
    try:
        given = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"config file {path} does not exist; give an existing file with --config"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"config file {path} is not valid JSON: line {error.lineno}: {error.msg}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    if not isinstance(given, dict):
        raise UserError(f"config file {path} must hold one JSON object {{...}}, not {_kind(given)}")
    return given


def _with_problems(source: str, problems: Sequence[str]) -> UserError:
    listing = "\n".join(f"  - {problem}" for problem in problems)
    many = "s" * (len(problems) > 1)
    return UserError(f"{source} has {len(problems)} problem{many}:\n{listing}")


@contextmanager
def errors_name_key(key: str) -> Iterator[None]:
    """A UserError about what a key names begins with the key."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def parse_config(given: Mapping[str, Any], source: str = "config") -> TrainConfig:
    """A checked config from a plain object.

    Raises:
        UserError: lists every problem at once.
    """
    problems: list[str] = []
    config = _parse_dataclass(TrainConfig, given, "", problems)
    if not problems:
        problems += _check_together(config)
    if problems:
        raise _with_problems(source, problems)
    assert config is not None  # there were no problems
    paths = {
        key: path
        for key, path in vars(config).items()
        if key.endswith(PATH_SUFFIXES) and path is not None
    }
    config = dataclasses.replace(config, **{key: expand_home(path) for key, path in paths.items()})
    if config.global_batch_size and "train_batch_size" not in given:
        config = dataclasses.replace(config, train_batch_size=LEFT_OUT)
    return config


def _check_together(config: TrainConfig) -> list[str]:
    """Problems of keys that are each fine alone but do not fit together."""
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
    if config.mel_sampling == "full" and not config.use_mel:
        problems.append("mel_sampling: 'full' needs use_mel: true; without it r is the only rank")
    if config.mel_refactor != "never" and config.r == 0:
        problems.append(
            f"mel_refactor: {config.mel_refactor!r} needs factors; set r > 0 or remove mel_refactor"
        )
    if isinstance(config.mel_refactor, int) and config.optimizer == "adamw_8bit":
        problems.append(
            "mel_refactor: moments in 8 bits cannot be turned; set it to 'save', or optimizer to "
            "'adamw'"
        )
    for flag, key, off in (
        ("use_mrl", "mrl_weights", "paper"),
        ("use_mll", "mll_weights", "uniform"),
    ):
        weights = getattr(config, key)
        if weights != off and not getattr(config, flag):
            problems.append(
                f"{key} is given but {flag} is false; set {flag} to true or remove {key}"
            )
        if isinstance(weights, tuple) and not 0 < sum(weights) < math.inf:
            problems.append(f"{key}: the sum of {list(weights)} must be more than 0, and finite")
    if config.mll_prior_weight != 1 and config.mll_weights != "last":
        problems.append("mll_prior_weight needs mll_weights 'last'; set that or remove it")
    teacher = config.teacher_model_path or config.teacher_vectors_path
    if teacher and isinstance(config.mll_weights, tuple) and config.mll_weights[-1] == 0:
        problems.append(
            "mll_weights: the last layer's exit learns from the teacher; it must count more than 0"
        )
    if config.mel_init == "frequency" and config.r == 0:
        problems.append("mel_init: 'frequency' needs factors; set r > 0 or remove mel_init")
    if config.teacher_model_path is not None and config.teacher_vectors_path is not None:
        problems.append(
            "teacher_model_path and teacher_vectors_path are both given; keep one of them"
        )
    if config.kd_loss in SCORE_LOSSES and teacher:
        problems.append(
            f"kd_loss: {config.kd_loss!r} learns from scores in the data, but a teacher is given; "
            "remove teacher_model_path and teacher_vectors_path, or choose another kd_loss"
        )
    if config.kd_loss == "similarity" and not teacher:
        problems.append(
            f"kd_loss: {config.kd_loss!r} needs a teacher; set teacher_model_path or "
            "teacher_vectors_path"
        )
    if config.lora_r == 0 and config.lora_alpha is not None:
        problems.append("lora_alpha is given but lora_r is 0; set lora_r, e.g. to 16, or remove it")
    if config.patience and config.keep_best is None:
        problems.append("patience needs keep_best; name the validation number that has to improve")
    if config.keep_best and not (config.valid_fraction or config.valid_data_path):
        problems.append("keep_best needs validation; set valid_fraction or valid_data_path")
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
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None and types.NoneType in typing.get_args(hint):
            return None
        hint, others = _option_for(value, typing.get_args(hint))
    else:
        others = ""
    origin = typing.get_origin(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _parse_settings(hint, value, key, problems)
    if origin is Literal:
        if isinstance(value, str) and value in typing.get_args(hint):
            return value
        problems.append(f"{key}: {value!r} is not {_what(hint)}{others}")
    elif origin is tuple:
        (item, _) = typing.get_args(hint)
        if isinstance(value, list | tuple):
            if not value and item is not str:
                problems.append(f"{key}: the list is empty; name at least one {_TYPE_NAMES[item]}")
            items = [
                _parse_scalar(v, item, field, f"{key}[{i}]", problems) for i, v in enumerate(value)
            ]
            if item is not float and None not in items and len(set(items)) != len(items):
                problems.append(f"{key}: {list(value)} holds a value twice")
            return tuple(items)
        problems.append(f"{key}: {value!r} must be a list of {_TYPE_NAMES[item]}s")
    elif origin is dict:
        if not isinstance(value, Mapping):
            problems.append(f'{key}: must be an object {{"name": {{...}}}}, not {_kind(value)}')
            return None
        return {
            name: _parse_settings(DatasetConfig, settings, f"{key}.{name}", problems)
            for name, settings in value.items()
        }
    else:
        return _parse_scalar(value, hint, field, key, problems)
    return None


def _parse_settings(cls: type, value: Any, key: str, problems: list[str]) -> Any:
    """An object of settings that stands under a key."""
    if not isinstance(value, Mapping):
        problems.append(f"{key}: must be an object of settings, not {_kind(value)}")
        return None
    own: list[str] = []
    parsed = _parse_dataclass(cls, value, f"{key}.", own)
    problems += own
    return parsed


def _option_for(value: Any, options: Sequence[Any]) -> tuple[Any, str]:
    """The type of a union that a value is read as, and what else it may be: " or a number"."""
    options = [option for option in options if option is not types.NoneType]
    kinds: dict[type, Any] = {str: Literal, list: tuple, tuple: tuple}
    kind = kinds.get(type(value))
    chosen = next((o for o in options if typing.get_origin(o) is kind), options[0])
    others = [option for option in options if option is not chosen]
    return chosen, "".join(f" or {_what(option)}" for option in others)


def _what(hint: Any) -> str:
    """What a value of this type is, in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    return f"a list of {_TYPE_NAMES[inner[0]]}s" if origin is tuple else f"a {_TYPE_NAMES[hint]}"


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
    if kind is str and not value and not field.metadata.get("may_be_empty"):
        problems.append(f"{key}: must not be empty")
    if kind is int and abs(value) >= 2**63:
        problems.append(f"{key}: {value} is too large")
    low, above, high, below = map(field.metadata.get, ("low", "above", "high", "below"))
    if low is not None and value < low:
        problems.append(f"{key}: {value} must be at least {low}")
    if above is not None and value <= above:
        problems.append(f"{key}: {value} must be greater than {above}")
    if high is not None and value > high:
        problems.append(f"{key}: {value} must be at most {high}")
    if below is not None and value >= below:
        problems.append(f"{key}: {value} must be less than {below}")
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
    """Field name -> the docstring under the field, as one line."""
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
    """Settings under the dataset's own name, or else under the first pattern that matches it."""
    if name in datasets:
        return datasets[name]
    return next(
        (s for pattern, s in datasets.items() if fnmatch.fnmatchcase(name, pattern)),
        DatasetConfig(),
    )


def check_dataset_names(names: Sequence[str], datasets: Mapping[str, DatasetConfig]) -> None:
    """Refuse settings that match no dataset: they would silently not apply.

    Raises:
        UserError: names the settings and the datasets.
    """
    unused = [p for p in datasets if p not in names and not fnmatch.filter(names, p)]
    if unused:
        raise UserError(
            f"datasets: {', '.join(map(repr, unused))} matches none of the datasets there are "
            f"({', '.join(names)}); correct or remove it"
        )
