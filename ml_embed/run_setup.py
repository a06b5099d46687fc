"""From command line and config to a `Run`: checks first, then folders, then weights."""

import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, set_seed
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedTokenizerBase, Qwen3Config

from ml_embed import lora, zero2
from ml_embed.attention import choose_kernel
from ml_embed.build import build_encoder, build_optimizer, build_teacher
from ml_embed.checkpoint import drop_newer, load_state, read_progress
from ml_embed.config import TrainConfig
from ml_embed.data.batch_builder import BatchBuilder
from ml_embed.data.store import Store, open_store
from ml_embed.distributed import asked_of_first, choose_gloo_interface
from ml_embed.distributed import world_size as processes_of_group
from ml_embed.errors import UserError
from ml_embed.files import remove_leftovers, write_json
from ml_embed.loader import Loader
from ml_embed.metrics import MetricsLog, Window
from ml_embed.model_folder import ModelRecord, load_config
from ml_embed.prompts import check_prompts, prompts_to_record
from ml_embed.resolve import Resolved, loss_spec, make_schedule, resolve
from ml_embed.resume import check_unchanged, continuation_notice, run_fingerprint, state_to_resume
from ml_embed.teacher_vectors import KD_REMEDY, TeacherVectors, open_teacher_vectors
from ml_embed.tokenizer import fingerprint as tokenizer_fingerprint
from ml_embed.tokenizer import load_tokenizer
from ml_embed.training import Run

# Processes wait for one that converts the data or writes a checkpoint. Dead ones are noticed much sooner: by closed
# connections, and over several machines by `ml_embed.heartbeat`.
_COLLECTIVE_TIMEOUT = timedelta(hours=2)
_ENGINES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator as `accelerate launch` set it up; under plain python, bf16 where the device has it.

    Raises:
        UserError: fp16, gradient accumulation, an attention kernel that cannot run here, or a tracker that is not
            installed.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    trackers = [str(tracker) for tracker in get_available_trackers()]
    missing = [name for name in config.report_to if name not in trackers]
    if missing:
        raise UserError(
            f"report_to: {', '.join(missing)} is not installed or not known; available: {', '.join(trackers)}"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        zero2.check_installed()
    choose_gloo_interface()
    accelerator = Accelerator(
        cpu=not _has_gpu(),  # said aloud, or accelerate takes launched processes for single ones
        mixed_precision=None if launched else ("bf16" if has_bf16 else "no"),
        log_with=list(config.report_to) or None,
        project_dir=config.tb_dir,
        kwargs_handlers=[
            # The only buffers are constants, and GradCache makes forwards that other processes do not.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT),
        ],
    )
    _check_engine(accelerator)
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        # accelerate's own choice would also sum gradients and return vectors in bf16
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"mixed_precision: {accelerator.mixed_precision!r} is not supported; use 'bf16' or 'no'")
    choose_kernel(config.attention, accelerator.device, _compute_dtype(accelerator))  # refuses an impossible one
    return accelerator


def _has_gpu() -> bool:
    """Whether there is an accelerator to train on. Apple's (mps) is none: it has no float64, which losses are summed
    in, so that a Mac trains on its CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type != "mps"


def _compute_dtype(accelerator: Accelerator) -> torch.dtype:
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def _check_engine(accelerator: Accelerator) -> None:
    """Refuse what accelerate would do otherwise than asked, or this project's steps cannot work with."""
    if accelerator.gradient_accumulation_steps != 1:  # accelerate would divide the gradients of every step by it
        raise UserError(
            f"accelerate's gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}; it must be 1, "
            "also in the environment variable ACCELERATE_GRADIENT_ACCUMULATION_STEPS. For larger batches in the same "
            "memory set max_tokens_per_forward in the training config"
        )
    if accelerator.distributed_type is DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UserError("FSDP version 1 is not supported; set fsdp_version: 2, as in configs/accelerate_fsdp2.yaml")
        return
    if zero2.uses_zero2(accelerator):
        zero2.check_settings(accelerator)
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            "accelerate uses DeepSpeed only on GPUs and would silently copy the optimizer to every process here; "
            "on CPUs use configs/accelerate_cpu.yaml"
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.num_processes > 1:
        raise UserError(
            "accelerate shards parameters (FSDP) only on GPUs and would silently copy them to every process here; "
            "on CPUs use configs/accelerate_cpu.yaml"
        )
    if processes_of_group() != accelerator.num_processes:
        raise UserError(
            f"the launcher started {processes_of_group()} processes, but accelerate sees {accelerator.num_processes}; "
            "to train on the CPUs of a machine with GPUs, set the environment variable ACCELERATE_USE_CPU=true"
        )
    if accelerator.distributed_type not in _ENGINES:
        raise UserError(
            f"the engine {accelerator.distributed_type.value} is not supported; use one of those in configs/"
        )


def open_inputs(
    config: TrainConfig, world_size: int, progress: bool
) -> tuple[Any, Any, Store, TeacherVectors | None, Resolved]:
    """Backbone config, tokenizer, data, a teacher's vectors if there are any, and derived numbers; nothing is written
    but the data's cached form.

    Raises:
        UserError: something is missing, damaged, or does not fit together.
    """
    if config.lora_r:
        lora.check_installed()
    backbone_config = load_config(config.model_path)
    tokenizer = load_tokenizer(config.model_path)
    store = open_store(config.train_data_path, config.cache_dir, progress)
    _check_tokenizer(config, tokenizer, store)
    check_prompts(config, store)
    if config.teacher_model_path is not None:
        _check_teacher(config, backbone_config, tokenizer)
    teacher_vectors = None
    if config.teacher_vectors_path is not None:
        folder = Path(config.teacher_vectors_path)
        teacher_vectors = open_teacher_vectors(folder, store, backbone_config.hidden_size, config.kd_loss)
    return backbone_config, tokenizer, store, teacher_vectors, resolve(config, backbone_config, store, world_size)


def _check_tokenizer(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, store: Store) -> None:
    if store.manifest is None:  # the released layout does not say which tokenizer it was made with
        return
    if store.manifest["tokenizer_fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"train_data_path: {config.train_data_path} was tokenized with another tokenizer than the one in "
            f"model_path {config.model_path}; run tokenize_data_qwen.py again with --overwrite"
        )


def _check_teacher(config: TrainConfig, student_config: Qwen3Config, tokenizer: PreTrainedTokenizerBase) -> None:
    assert config.teacher_model_path is not None
    teacher_config = load_config(config.teacher_model_path)
    if config.kd_loss == "vectors" and teacher_config.hidden_size < student_config.hidden_size:
        raise UserError(
            f"teacher_model_path: the teacher's vectors have {teacher_config.hidden_size} components, fewer than the "
            f"student's {student_config.hidden_size}; {KD_REMEDY}"
        )
    if tokenizer_fingerprint(load_tokenizer(config.teacher_model_path)) != tokenizer_fingerprint(tokenizer):
        raise UserError(
            "teacher_model_path: the teacher has another tokenizer than model_path; it cannot read the data. "
            "Compute its vectors with scripts/embed_teacher.py, and give them as teacher_vectors_path"
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
    backbone_config, tokenizer, store, teacher_vectors, resolved = inputs
    former = ModelRecord.load(Path(config.model_path))
    dtype = _compute_dtype(accelerator)
    fingerprint = asked_of_first(
        lambda: run_fingerprint(config, resolved, store, teacher_vectors, accelerator.mixed_precision)
    )

    def prepare() -> tuple[Path | None, dict | None]:
        state_path = state_to_resume(config.run_dir, resume)
        progress = None
        if state_path is not None:
            progress = read_progress(state_path)
            changes = check_unchanged(progress["fingerprint"], fingerprint, allow_changes)
            accelerator.print(continuation_notice(state_path, progress, resolved, changes))
        _prepare_run_dir(config, given, resolved, None if progress is None else progress["step"])
        return state_path, progress

    state_path, progress = asked_of_first(prepare)
    set_seed(config.seed % 2**32)  # NumPy takes no larger one; nothing here draws from it, but libraries may
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
            schedule=make_schedule(resolved.datasets, store, resolved.global_batch_size, config.seed),
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
            config.run_dir / "metrics.jsonl", accelerator, keep_bytes=progress["metrics_bytes"] if progress else 0
        ),
        window=Window(**progress["window"]) if progress else Window(),
        start_step=progress["step"] if progress else 0,
        fingerprint=fingerprint,
    )


def _prepare(
    accelerator: Accelerator, encoder: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> tuple:
    if zero2.uses_zero2(accelerator):
        return zero2.prepare(accelerator, encoder, optimizer, config.train_batch_size, config.max_grad_norm)
    with warnings.catch_warnings():
        # accelerate has no other name yet for the option that torch renames
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return accelerator.prepare(encoder, optimizer)


def _prepare_run_dir(config: TrainConfig, given: dict, resolved: Resolved, continued_step: int | None) -> None:
    """Make the run folder and clear it of what interrupted writes left, and of states that are gone back behind."""
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
            f"output_dir: {run_dir} cannot be written ({error.strerror}); see to that or choose another output_dir"
        ) from None
