"""From command line and config to a `Run`: checks first, then folders, then weights."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed

from ml_embed.attention import choose_kernel
from ml_embed.build import build_encoder, build_optimizer, build_teacher
from ml_embed.checkpoint import find_state, load_state, read_progress
from ml_embed.config import TrainConfig
from ml_embed.data.batch import BatchBuilder
from ml_embed.data.store import Store, open_store
from ml_embed.errors import UserError
from ml_embed.files import remove_leftovers, write_json
from ml_embed.metrics import MetricsLog, Window
from ml_embed.model_folder import ModelRecord, load_config
from ml_embed.resolve import Resolved, loss_spec, make_schedule, resolve
from ml_embed.tokenizer import fingerprint as tokenizer_fingerprint
from ml_embed.tokenizer import load_tokenizer
from ml_embed.training import Run

# Keys that may differ between a run and its continuation: they decide where things are and how they are computed or
# reported, not what is computed.
_FREE_KEYS = frozenset(
    {"model_path", "experiment_id", "output_dir", "tb_dir", "cache_dir", "train_data_path", "train_batch_size"}
    | {"log_interval", "validation_steps", "checkpointing_steps", "save_total_limit", "report_to", "num_processes"}
    | {"attention", "gradient_checkpointing", "max_tokens_per_forward"}
)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator as `accelerate launch` set it up; under plain python, bf16 where the device has it.

    Raises:
        UserError: fp16, or a tracker that is not installed.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    trackers = [str(tracker) for tracker in get_available_trackers()]
    missing = [name for name in config.report_to if name not in trackers]
    if missing:
        raise UserError(
            f"report_to: {', '.join(missing)} is not installed or not known; available: {', '.join(trackers)}"
        )
    accelerator = Accelerator(
        mixed_precision=None if launched else ("bf16" if has_bf16 else "no"),
        log_with=list(config.report_to) or None,
        project_dir=config.tb_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"mixed_precision: {accelerator.mixed_precision!r} is not supported; use 'bf16' or 'no'")
    return accelerator


def open_inputs(config: TrainConfig, world_size: int, progress: bool) -> tuple[Any, Any, Store, Resolved]:
    """Backbone config, tokenizer, data and derived numbers; nothing is written but the data's cached form.

    Raises:
        UserError: something is missing, damaged, or does not fit together.
    """
    backbone_config = load_config(config.model_path)
    tokenizer = load_tokenizer(config.model_path)
    store = open_store(config.train_data_path, config.cache_dir, progress)
    _check_tokenizer(config, tokenizer, store)
    if config.teacher_model_path is not None:
        _check_teacher(config, backbone_config, tokenizer)
    return backbone_config, tokenizer, store, resolve(config, backbone_config, store, world_size)


def _check_tokenizer(config: TrainConfig, tokenizer, store: Store) -> None:
    if store.manifest is None:  # the released layout does not say which tokenizer it was made with
        return
    if store.manifest["tokenizer_fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"train_data_path: {config.train_data_path} was tokenized with another tokenizer than the one in "
            f"model_path {config.model_path}; run tokenize_data_qwen.py --tokenizer {config.model_path} --overwrite again"
        )


def _check_teacher(config: TrainConfig, student_config, tokenizer) -> None:
    teacher_config = load_config(config.teacher_model_path)
    if teacher_config.hidden_size < student_config.hidden_size:
        raise UserError(
            f"teacher_model_path: the teacher's vectors have {teacher_config.hidden_size} components, fewer than the "
            f"student's {student_config.hidden_size}; distillation needs at least as many"
        )
    if tokenizer_fingerprint(load_tokenizer(config.teacher_model_path)) != tokenizer_fingerprint(tokenizer):
        raise UserError(
            "teacher_model_path: the teacher has another tokenizer than model_path; it cannot read the data"
        )


def set_up(
    config: TrainConfig, given: dict, accelerator: Accelerator, inputs: tuple, resume: str, allow_changes: bool
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
    backbone_config, tokenizer, store, resolved = inputs
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    choose_kernel(config.attention, accelerator.device, dtype)  # refuses an impossible one before anything is written
    fingerprint = run_fingerprint(config, resolved, store)
    state_path = _resume_from(config.run_dir, resume)
    progress = None
    if state_path is not None:
        progress = read_progress(state_path)
        _check_unchanged(progress["fingerprint"], fingerprint, allow_changes)
    accelerator.wait_for_everyone()  # nobody looks at the run folder any more, so it may be written
    if accelerator.is_main_process:
        _prepare_run_dir(config, given, resolved)
    accelerator.wait_for_everyone()

    set_seed(config.seed)
    encoder = build_encoder(config, resolved, backbone_config, store, accelerator.device, dtype)
    teacher = build_teacher(config, accelerator.device, dtype)
    model, optimizer = accelerator.prepare(encoder, build_optimizer(encoder, config))
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
        store=store,
        schedule=make_schedule(resolved.datasets, store, resolved.global_batch_size, config.seed),
        builder=BatchBuilder(
            seed=config.seed,
            max_length=config.max_seq_length,
            eos_id=tokenizer.eos_token_id,
            mask_false_negatives=config.mask_false_negatives,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
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
        ),
        log=MetricsLog(
            config.run_dir / "metrics.jsonl", accelerator, keep_bytes=progress["metrics_bytes"] if progress else 0
        ),
        window=Window(**progress["window"]) if progress else Window(),
        start_step=progress["step"] if progress else 0,
        fingerprint=fingerprint,
    )


def run_fingerprint(config: TrainConfig, resolved: Resolved, store: Store) -> dict[str, Any]:
    """Everything that decides the weights, under the name of the config key the user would change it by."""
    kept = {key: value for key, value in vars(config).items() if key not in _FREE_KEYS}
    kept["datasets"] = {name: vars(settings) for name, settings in config.datasets.items()}
    kept |= {"train_data_path": store.folder.name, "global_batch_size": resolved.global_batch_size}
    return json.loads(json.dumps(kept))  # as it reads back from disk


def _check_unchanged(before: dict, now: dict, allow_changes: bool) -> None:
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed and not allow_changes:
        listing = "\n".join(f"  - {key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
        raise UserError(
            "--resume: these have changed since the state was saved, so the run would not be the same:\n"
            f"{listing}\nrestore them, or give --allow-changes to continue all the same"
        )


def _resume_from(run_dir: Path, resume: str) -> Path | None:
    if resume == "no":
        if (run_dir / "metrics.jsonl").exists() or (run_dir / "resume").exists():
            raise UserError(
                f"{run_dir} already holds a run; continue it with --resume auto, or choose another experiment_id"
            )
        return None
    if resume == "auto":
        return find_state(run_dir / "resume")
    return Path(resume)


def _prepare_run_dir(config: TrainConfig, given: dict, resolved: Resolved) -> None:
    run_dir = config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for folder in (run_dir, run_dir / "resume"):
            remove_leftovers(folder)
        write_json(run_dir / "config.json", given)
        write_json(run_dir / "resolved.json", resolved.to_json())
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(
            f"output_dir: {run_dir} cannot be written ({error.strerror}); choose another output_dir"
        ) from None
