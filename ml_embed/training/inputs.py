"""What a run starts from: backbone, tokenizer, data, a teacher's vectors; checked."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Qwen3Config

from ml_embed.config import TrainConfig, errors_name_key
from ml_embed.data.loader import Validation
from ml_embed.data.schedule import Schedule
from ml_embed.data.store import Store, open_store
from ml_embed.data.teacher_vectors import KD_REMEDY, TeacherVectors, open_teacher_vectors
from ml_embed.errors import UserError
from ml_embed.files.model_source import find_model_folder
from ml_embed.model import default_exits
from ml_embed.model_folders.read import ModelFolder
from ml_embed.model_folders.record import RECORD_FILE
from ml_embed.model_folders.seal import verify_model
from ml_embed.notices import warn
from ml_embed.prepare.prompts import check_prompts
from ml_embed.prepare.tokenizer import end_token, fingerprint
from ml_embed.training import lora
from ml_embed.training.best import check_metric
from ml_embed.training.cost import Teacher
from ml_embed.training.optimizer import check_optimizer
from ml_embed.training.resolve import Resolved, make_validation, resolve


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, opened and checked; no weight is loaded yet."""

    start: ModelFolder
    """the model that training starts from"""
    store: Store
    teacher_vectors: TeacherVectors | None
    """a teacher's vectors that were computed beforehand"""
    valid_store: Store | None
    """data of its own for validation"""
    teacher: ModelFolder | None
    """the teacher that runs beside the student"""
    teacher_cost: Teacher | None
    resolved: Resolved
    schedule: Schedule
    """which rows each step of training takes"""
    validation: Validation | None
    """the rows of `valid_store`"""

    @property
    def backbone_config(self) -> Qwen3Config:
        return self.start.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.start.tokenizer


def with_model_folders(config: TrainConfig) -> TrainConfig:
    """The config with its models as folders, fetched from the hub where they are named by it.

    A run saves the user's own object, in which the names stay.

    Raises:
        UserError: a model is not there.
    """
    folders: dict[str, Any] = {}
    for key in ("model_path", "teacher_model_path"):
        if (name := getattr(config, key)) is not None:
            with errors_name_key(key):
                folders[key] = str(find_model_folder(name))
    return dataclasses.replace(config, **folders)


def open_inputs(
    config: TrainConfig,
    world_size: int,
    progress: bool,
    verify: bool = False,
    half_precision: bool = False,
) -> Inputs:
    """Open and check all inputs; nothing is written but the data's cached form and known digests.

    Args:
        config: with models as folders.
        world_size: processes.
        progress: bars on stderr.
        verify: compare all of them with the digests that they were written with; otherwise what
            has not changed since it was last read whole is taken for whole.
        half_precision: forward passes compute in bfloat16; decides the estimate of memory.
    Raises:
        UserError: something is missing, damaged, or does not fit together.
    """
    if config.lora_r:
        lora.check_peft()
    check_optimizer(config)
    for model in filter(None, (config.model_path, config.teacher_model_path)) if verify else ():
        verify_model(Path(model))
    with errors_name_key("model_path"):
        start = ModelFolder.open(Path(config.model_path))
    store = _open_data(config, "train_data_path", start.tokenizer, progress, verify)
    valid_store = None
    if config.valid_data_path is not None:
        valid_store = _open_data(config, "valid_data_path", start.tokenizer, progress, verify)
    teacher = None
    if config.teacher_model_path is not None:
        with errors_name_key("teacher_model_path"):
            teacher = ModelFolder.open(Path(config.teacher_model_path))
        _check_teacher(teacher, config, start)
    teacher_vectors = None
    if config.teacher_vectors_path is not None:
        folder, cache_dir = Path(config.teacher_vectors_path), Path(config.cache_dir)
        with errors_name_key("teacher_vectors_path"):
            teacher_vectors = open_teacher_vectors(
                folder, store, start.config.hidden_size, config.kd_loss, cache_dir, verify
            )
    cost = None if teacher is None else _cost_of(teacher, config)
    resolved, schedule = resolve(
        config, start.config, store, world_size, valid_store, half_precision, cost
    )
    validation = None
    if valid_store is not None:
        validation = make_validation(resolved, valid_store, config.seed)
    held_out = validation or Validation(schedule, store)
    check_metric(config.keep_best, held_out, resolved.valid_grid)
    return Inputs(
        start, store, teacher_vectors, valid_store, teacher, cost, resolved, schedule, validation
    )


def _cost_of(teacher: ModelFolder, config: TrainConfig) -> Teacher:
    record = teacher.record
    per_exit = record.norm_sharing == "per_layer"
    return Teacher(
        teacher.config,
        rank=record.ranks[-1] if record.ranks else 0,
        norms=len(teacher_exits(config, teacher)) if per_exit else 1,
    )


def teacher_exits(config: TrainConfig, teacher: ModelFolder) -> tuple[int, ...]:
    """The layers of a teacher whose vectors are learned from."""
    layers = teacher.config.num_hidden_layers
    if not config.use_mll or config.kd_loss != "vectors":  # similarities: of the deepest exit only
        return (layers,)
    trained = (teacher.path / RECORD_FILE).is_file()
    return teacher.record.exits if trained else default_exits(layers)


def _open_data(
    config: TrainConfig,
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    progress: bool,
    verify: bool,
) -> Store:
    with errors_name_key(key):
        store = open_store(getattr(config, key), config.cache_dir, progress, verify)
    _check_tokenizer(config, key, tokenizer, store)
    check_prompts(config, store)
    return store


def _check_tokenizer(
    config: TrainConfig, key: str, tokenizer: PreTrainedTokenizerBase, store: Store
) -> None:
    if store.manifest is None:  # the released layout does not say which tokenizer it was made with
        _look_at_end(getattr(config, key), tokenizer, store)
        return
    if store.manifest.tokenizer_fingerprint != fingerprint(tokenizer):
        raise UserError(
            f"{key}: {getattr(config, key)} was tokenized with another tokenizer than "
            f"the one in model_path {config.model_path}; run tokenize_data_qwen.py again with "
            "--overwrite"
        )
    if store.manifest.eos_id != (end := end_token(tokenizer)):
        raise UserError(
            f"{key}: the texts of {getattr(config, key)} end in token "
            f"{store.manifest.eos_id}, those of model_path {config.model_path} in {end} "
            f"({tokenizer.convert_ids_to_tokens(end)}); run tokenize_data_qwen.py again with "
            "--overwrite"
        )


def _look_at_end(folder: str, tokenizer: PreTrainedTokenizerBase, store: Store) -> None:
    """Warn where data that does not say its end token seems to have another than the model."""
    dataset, end = next(iter(store.datasets.values())), end_token(tokenizer)
    found = int(dataset.query(0)[-1])
    if found != end:
        warn(
            f"the first text of {folder} ends in token {found}, those of model_path end in {end} "
            f"({tokenizer.convert_ids_to_tokens(end)}), where their vectors are read; tokenize the "
            "raw data with the model's tokenizer"
        )


def _check_teacher(teacher: ModelFolder, config: TrainConfig, student: ModelFolder) -> None:
    width, wanted = teacher.config.hidden_size, student.config.hidden_size
    if config.kd_loss == "vectors" and width < wanted:
        raise UserError(
            f"teacher_model_path: the teacher's vectors have {width} components, fewer than the "
            f"student's {wanted}; {KD_REMEDY}"
        )
    if fingerprint(teacher.tokenizer) != fingerprint(student.tokenizer):
        raise UserError(
            "teacher_model_path: the teacher has another tokenizer than model_path; it cannot read "
            "the data. Compute its vectors with scripts/embed_teacher.py, and give them as "
            "teacher_vectors_path"
        )
