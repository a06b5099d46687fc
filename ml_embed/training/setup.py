"""From command line and config to a `Run`: checks first, then folders, then weights."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen3Config

from ml_embed.config import TrainConfig
from ml_embed.data.batch_builder import BatchBuilder
from ml_embed.data.loader import Loader
from ml_embed.data.store import Store, open_store
from ml_embed.data.teacher_vectors import KD_REMEDY, TeacherVectors, open_teacher_vectors
from ml_embed.distributed import zero2
from ml_embed.distributed.collectives import compute_on_main_process
from ml_embed.errors import UserError
from ml_embed.files.atomic import remove_leftovers, write_json
from ml_embed.files.model_source import find_model_folder
from ml_embed.model_folders.read import load_backbone_config
from ml_embed.model_folders.record import ModelRecord
from ml_embed.notices import notice
from ml_embed.prepare.prompts import check_prompts, prompts_to_record
from ml_embed.prepare.tokenizer import fingerprint as tokenizer_fingerprint
from ml_embed.prepare.tokenizer import load_tokenizer
from ml_embed.training import lora
from ml_embed.training.accelerator import _compute_dtype
from ml_embed.training.build import build_encoder, build_optimizer, build_teacher
from ml_embed.training.checkpoint import drop_newer, load_state, read_progress
from ml_embed.training.loop import Run
from ml_embed.training.metrics_log import MetricsLog, Window
from ml_embed.training.resolve import Resolved, loss_spec, make_schedule, resolve
from ml_embed.training.resume import (
    check_unchanged,
    continuation_notice,
    run_fingerprint,
    state_to_resume,
)


def with_model_folders(config: TrainConfig) -> TrainConfig:
    """The config with its models as folders, fetched from the hub where they are named by it.

    A run saves the user's own object, in which the names stay.

    Raises:
        UserError: a model is not there.
    """
    folders: dict[str, Any] = {
        key: str(find_model_folder(name))
        for key in ("model_path", "teacher_model_path")
        if (name := getattr(config, key)) is not None
    }
    return dataclasses.replace(config, **folders)


def open_inputs(
    config: TrainConfig, world_size: int, progress: bool
) -> tuple[Any, Any, Store, TeacherVectors | None, Resolved]:
    """Backbone config, tokenizer, data, a teacher's vectors if there are any, and derived numbers;
    nothing is written but the data's cached form.

    Raises:
        UserError: something is missing, damaged, or does not fit together.
    """
    if config.lora_r:
        lora.check_installed()
    backbone_config = load_backbone_config(Path(config.model_path))
    tokenizer = load_tokenizer(Path(config.model_path))
    store = open_store(config.train_data_path, config.cache_dir, progress)
    _check_tokenizer(config, tokenizer, store)
    check_prompts(config, store)
    if config.teacher_model_path is not None:
        _check_teacher(config, backbone_config, tokenizer)
    teacher_vectors = None
    if config.teacher_vectors_path is not None:
        folder = Path(config.teacher_vectors_path)
        teacher_vectors = open_teacher_vectors(
            folder, store, backbone_config.hidden_size, config.kd_loss
        )
    return (
        backbone_config,
        tokenizer,
        store,
        teacher_vectors,
        resolve(config, backbone_config, store, world_size),
    )


def _check_tokenizer(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, store: Store) -> None:
    if store.manifest is None:  # the released layout does not say which tokenizer it was made with
        return
    if store.manifest.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"train_data_path: {config.train_data_path} was tokenized with another tokenizer than "
            "the one in "
            f"model_path {config.model_path}; run tokenize_data_qwen.py again with --overwrite"
        )


def _check_teacher(
    config: TrainConfig, student_config: Qwen3Config, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert config.teacher_model_path is not None
    folder = Path(config.teacher_model_path)
    teacher_config = load_backbone_config(folder)
    if config.kd_loss == "vectors" and teacher_config.hidden_size < student_config.hidden_size:
        raise UserError(
            f"teacher_model_path: the teacher's vectors have {teacher_config.hidden_size} "
            "components, fewer than the "
            f"student's {student_config.hidden_size}; {KD_REMEDY}"
        )
    if tokenizer_fingerprint(load_tokenizer(folder)) != tokenizer_fingerprint(tokenizer):
        raise UserError(
            "teacher_model_path: the teacher has another tokenizer than model_path; it cannot read "
            "the data. "
            "Compute its vectors with scripts/embed_teacher.py, and give them as "
            "teacher_vectors_path"
        )


def set_up(
    config: TrainConfig,
    given: dict,
    accelerator: Accelerator,
    inputs: tuple,
    resume: str,
    allow_changes: bool,
) -> Run:
    """Build a run that is ready to train, new or continued.

    Args:
        config: checked; given: the user's own object.
        inputs: what `open_inputs` returned.
        resume: "no", "auto" or the path of a resume state.
        allow_changes: continue even if keys that matter have changed.
    Raises:
        UserError: the run folder holds a run and resume is "no", or what is resumed does not fit.
    """
    backbone_config, tokenizer, store, teacher_vectors, resolved = inputs
    former = ModelRecord.load(Path(config.model_path))
    dtype = _compute_dtype(accelerator)
    fingerprint = compute_on_main_process(
        lambda: run_fingerprint(
            config, resolved, store, teacher_vectors, accelerator.mixed_precision
        )
    )

    def prepare() -> tuple[Path | None, dict | None]:
        state_path = state_to_resume(config.run_dir, resume)
        progress = None
        if state_path is not None:
            progress = read_progress(state_path)
            changes = check_unchanged(progress["fingerprint"], fingerprint, allow_changes)
            notice(continuation_notice(state_path, progress, resolved, changes))
        _prepare_run_dir(config, given, resolved, None if progress is None else progress["step"])
        return state_path, progress

    state_path, progress = compute_on_main_process(prepare)
    set_seed(
        config.seed % 2**32
    )  # NumPy takes no larger one; nothing here draws from it, but libraries may
    encoder = build_encoder(config, resolved, backbone_config, store, accelerator.device, dtype)
    teacher = build_teacher(config, accelerator.device, dtype)
    model, optimizer = _prepare(accelerator, encoder, build_optimizer(encoder, config), config)
    if state_path is not None:
        load_state(state_path, model, optimizer.optimizer)
    accelerator.init_trackers(config.experiment_id)
    return Run(
        config=config,
        resolved=resolved,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        teacher=teacher,
        loader=Loader(
            schedule=make_schedule(
                resolved.datasets, store, resolved.global_batch_size, config.seed
            ),
            store=store,
            builder=BatchBuilder(
                seed=config.seed,
                max_length=config.max_seq_length,
                eos_id=tokenizer.eos_token_id,
                mask_false_negatives=config.mask_false_negatives,
                process=accelerator.process_index,
                processes=accelerator.num_processes,
            ),
            teacher_vectors=teacher_vectors,
        ),
        spec=loss_spec(resolved, config.temperature),
        tokenizer=tokenizer,
        backbone_config=backbone_config,
        record=ModelRecord(
            exits=resolved.exits,
            dims=resolved.dims,
            ranks=resolved.ranks,
            temperature=config.temperature,
            max_seq_length=config.max_seq_length,
            norm_sharing=config.mll_norm,
            prompts=prompts_to_record(config, store, former.prompts if former is not None else {}),
        ),
        log=MetricsLog(
            config.run_dir / "metrics.jsonl",
            accelerator,
            keep_bytes=progress["metrics_bytes"] if progress else 0,
        ),
        window=Window(**progress["window"]) if progress else Window(),
        start_step=progress["step"] if progress else 0,
        fingerprint=fingerprint,
    )


def _prepare(
    accelerator: Accelerator,
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> tuple:
    if zero2.uses_zero2(accelerator):
        return zero2.prepare(
            accelerator, encoder, optimizer, config.train_batch_size, config.max_grad_norm
        )
    with warnings.catch_warnings():
        # accelerate has no other name yet for the option that torch renames
        warnings.filterwarnings(
            "ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning
        )
        return accelerator.prepare(encoder, optimizer)


def _prepare_run_dir(
    config: TrainConfig, given: dict, resolved: Resolved, continued_step: int | None
) -> None:
    """Make the run folder and clear it of what interrupted writes left, and of states that are gone
    back behind."""
    run_dir = config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for folder in (run_dir, run_dir / "resume"):
            remove_leftovers(folder)
        if continued_step is not None:
            drop_newer(run_dir / "resume", continued_step)
        write_json(run_dir / "config.json", given)
        write_json(run_dir / "resolved.json", resolved.to_json())
    except OSError as error:
        raise UserError(
            f"output_dir: {run_dir} cannot be written ({error.strerror}); see to that or choose "
            "another output_dir"
        ) from None
