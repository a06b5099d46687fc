"""From config and inputs to a `Run`: checks first, then folders, then weights."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from ml_embed.config import TrainConfig, match_settings
from ml_embed.data.batch_builder import BatchBuilder
from ml_embed.data.loader import Loader
from ml_embed.distributed.collectives import compute_on_main_process
from ml_embed.errors import UserError
from ml_embed.files.atomic import remove_leftovers, write_json
from ml_embed.losses.objective import Objective
from ml_embed.model_folders.card import origin_of
from ml_embed.model_folders.record import ModelRecord, TrainedOn
from ml_embed.notices import notice
from ml_embed.prepare.prompts import prompts_to_record
from ml_embed.prepare.tokenizer import end_token
from ml_embed.training.accelerator import compute_dtype, make_engine
from ml_embed.training.agreement import agree_on_state
from ml_embed.training.best import Best
from ml_embed.training.build import build_encoder, build_teacher
from ml_embed.training.checkpoint import (
    KEPT_STATES,
    drop_newer,
    keep_newest,
    load_state,
    read_progress,
)
from ml_embed.training.inputs import Inputs
from ml_embed.training.metrics_log import MetricsLog, Window
from ml_embed.training.optimizer import build_optimizer
from ml_embed.training.resolve import Resolved, loss_spec
from ml_embed.training.resume import (
    check_unchanged,
    continuation_notice,
    run_fingerprint,
    state_to_resume,
)
from ml_embed.training.run import Run
from ml_embed.training.weight_average import WeightAverage


@dataclass(frozen=True)
class _Start:
    """Where a run begins: at its first step, or after the step of a saved state."""

    fingerprint: dict[str, Any]
    state: Path | None = None
    """the resume state; None for a new run"""
    step: int = 0
    window: dict[str, Any] = field(default_factory=dict)
    metrics_bytes: int = 0
    metrics_digest: str | None = None
    best: dict[str, Any] | None = None


def set_up(
    config: TrainConfig,
    given: dict,
    accelerator: Accelerator,
    inputs: Inputs,
    resume: str,
    allow_changes: bool,
) -> Run:
    """Build a run that is ready to train, new or continued. A collective.

    Args:
        config: checked.
        given: the user's own object.
        resume: "no", "auto" or the path of a resume state.
        allow_changes: continue even if keys that matter have changed.
    Raises:
        UserError: the run folder holds a run and resume is "no", or what is resumed does not fit.
    """

    def prepare() -> _Start:
        fingerprint = run_fingerprint(config, inputs, accelerator.mixed_precision)
        state = state_to_resume(config.run_dir, resume)
        start = _Start(fingerprint)
        if state is not None:
            start = _continued(state, fingerprint, inputs.resolved, allow_changes)
        _prepare_run_dir(config, given, inputs.resolved, start.step)
        return start

    start = compute_on_main_process(prepare)
    agree_on_state(start.state)
    # NumPy takes no larger seed; nothing here draws from it, but libraries may
    set_seed(config.seed % 2**32)
    return _build(config, accelerator, inputs, start)


def _continued(
    state: Path, fingerprint: dict[str, Any], resolved: Resolved, allow_changes: bool
) -> _Start:
    progress = read_progress(state)
    changes = check_unchanged(progress["fingerprint"], fingerprint, allow_changes)
    notice(continuation_notice(state, progress, resolved, changes))
    return _Start(
        fingerprint,
        state,
        progress["step"],
        progress["window"],
        progress["metrics_bytes"],
        progress["metrics_digest"],
        progress.get("best"),
    )


def _prepare_run_dir(config: TrainConfig, given: dict, resolved: Resolved, step: int) -> None:
    """Make the run folder; remove what interrupted writes and removals left, and later states."""
    run_dir = config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for folder in (run_dir, run_dir / "resume"):
            remove_leftovers(folder)
        drop_newer(run_dir / "resume", step)
        keep_newest(run_dir / "resume", KEPT_STATES, step)
        keep_newest(run_dir, config.save_total_limit, step)
        write_json(run_dir / "config.json", given)
        write_json(run_dir / "resolved.json", resolved.to_json())
    except OSError as error:
        raise UserError(
            f"output_dir: {run_dir} cannot be written ({error.strerror}); see to that or choose "
            "another output_dir"
        ) from None


def _build(config: TrainConfig, accelerator: Accelerator, inputs: Inputs, start: _Start) -> Run:
    device, dtype = accelerator.device, compute_dtype(accelerator)
    encoder = build_encoder(config, inputs, device, dtype)
    teacher = build_teacher(config, inputs.teacher, device, dtype) if inputs.teacher else None
    optimizer = build_optimizer(encoder, config)
    average = WeightAverage(optimizer, config.ema_decay) if config.ema_decay else None
    engine = make_engine(accelerator, encoder, optimizer, config)
    if start.state is not None:
        load_state(start.state, engine)
    accelerator.init_trackers(config.experiment_id)
    return Run(
        config=config,
        resolved=inputs.resolved,
        accelerator=accelerator,
        engine=engine,
        average=average,
        objective=_objective(config, inputs.resolved),
        teacher=teacher,
        loader=make_loader(config, accelerator, inputs),
        tokenizer=inputs.tokenizer,
        backbone_config=inputs.backbone_config,
        token_share=_token_share(config, inputs),
        record=_model_record(config, inputs),
        log=_metrics_log(config, accelerator, start),
        window=Window(**start.window),
        best=Best.continued(config.keep_best, start.best),
        start_step=start.step,
        fingerprint=start.fingerprint,
    )


def _token_share(config: TrainConfig, inputs: Inputs) -> Tensor | None:
    if config.mel_refactor == "never":
        return None
    return torch.from_numpy(inputs.store.token_share(inputs.backbone_config.vocab_size))


def _objective(config: TrainConfig, resolved: Resolved) -> Objective:
    return Objective(
        spec=loss_spec(resolved, config.temperature),
        kd_loss=config.kd_loss,
        kd_weight=config.kd_weight,
        self_distillation=config.self_distillation,
        false_negative_margin=config.false_negative_margin,
    )


def make_loader(config: TrainConfig, accelerator: Accelerator, inputs: Inputs) -> Loader:
    """The loader of this process."""
    builder = BatchBuilder(
        seed=config.seed,
        max_length=config.max_seq_length,
        eos_id=end_token(inputs.tokenizer),
        mask_false_negatives=config.mask_false_negatives,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        all_negatives=config.in_batch_negatives == "all",
        all_pairs=config.in_batch_pairs == "all",
        scored=config.learns_scores,
    )
    return Loader(inputs.schedule, inputs.store, builder, inputs.teacher_vectors, inputs.validation)


def _trained_on(config: TrainConfig, inputs: Inputs) -> list[TrainedOn]:
    """The datasets, with what the config says of where they come from, or else the data."""
    manifest = inputs.store.manifest
    listed = []
    for plan in inputs.resolved.datasets:
        data = manifest.datasets[plan.name].provenance if manifest else None
        known = match_settings(plan.name, config.datasets).provenance(data)
        listed.append(TrainedOn(plan.name, rows=plan.train_rows, **known))
    return listed


def _model_record(config: TrainConfig, inputs: Inputs) -> ModelRecord:
    former, manifest = inputs.start.record, inputs.store.manifest
    entries = manifest.datasets.values() if manifest else ()
    languages = (code for entry in entries for code in entry.languages or ())
    return ModelRecord(
        exits=inputs.resolved.exits,
        dims=inputs.resolved.dims,
        ranks=inputs.resolved.ranks,
        temperature=config.temperature,
        max_seq_length=config.max_seq_length,
        norm_sharing=config.mll_norm,
        ema_decay=config.ema_decay,
        prompts=prompts_to_record(config, inputs.store, former.prompts),
        default_prompt_name=former.default_prompt_name,
        origin=origin_of(inputs.start.path, former, _trained_on(config, inputs), languages),
    )


def _metrics_log(config: TrainConfig, accelerator: Accelerator, start: _Start) -> MetricsLog:
    return MetricsLog(
        config.run_dir / "metrics.jsonl",
        accelerator,
        optional={
            "distillation_loss": config.is_taught,
            "self_distillation_loss": config.self_distillation > 0,
            "masked_by_margin": config.false_negative_margin is not None,
        },
        keep_bytes=start.metrics_bytes,
        keep_digest=start.metrics_digest,
    )
