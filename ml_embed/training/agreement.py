"""What all processes of a run must agree on before its first step."""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ml_embed.config import TrainConfig
from ml_embed.distributed.agreement import check_agreement, software
from ml_embed.files.atomic import CHECKSUMS_FILE
from ml_embed.files.digests import file_digest
from ml_embed.files.model_identity import model_identity
from ml_embed.training.inputs import Inputs
from ml_embed.training.resume import run_fingerprint

_LOCAL_KEYS = frozenset(
    {"model_path", "teacher_model_path", "train_data_path", "valid_data_path"}
    | {"teacher_vectors_path", "cache_dir", "tb_dir"}
    | {"num_processes"}  # is ignored
)
"""Keys that may differ between processes: each machine may have its own copies of what is read, the
content of which is compared instead, and its own places for what only it writes."""


def agree_on_settings(
    config: TrainConfig, options: argparse.Namespace, accelerator: Accelerator
) -> None:
    """Stop all processes unless they have the same settings, code and libraries. A collective.

    Args:
        config: this process's.
        options: its command line.
        accelerator: as its launcher set it up.
    Raises:
        UserError: names what differs; on all processes alike.
    """

    def facts() -> dict[str, Any]:
        keys = dataclasses.asdict(config)
        return {
            **{key: value for key, value in keys.items() if key not in _LOCAL_KEYS},
            "--dry-run": options.dry_run,
            "--show-batch": options.show_batch,
            "accelerate's distributed_type": str(accelerator.distributed_type.value),
            "accelerate's mixed_precision": accelerator.mixed_precision,
            **software(),
        }

    check_agreement(facts)


def agree_on_inputs(config: TrainConfig, inputs: Inputs, accelerator: Accelerator) -> None:
    """Stop all processes unless they start from the same model and train on the same data.

    A collective.

    Raises:
        UserError: names what differs; on all processes alike.
    """

    def facts() -> dict[str, Any]:
        resolved, plans = vars(inputs.resolved), ("datasets", "valid_datasets")
        memory = (Path(config.cache_dir),)
        return {
            **{f"resolved {key}": value for key, value in resolved.items() if key not in plans},
            **{f"resolved {key}": {p.name: vars(p) for p in resolved[key]} for key in plans},
            **run_fingerprint(config, inputs, accelerator.mixed_precision),
            "model_path": model_identity(Path(config.model_path), memory),
        }

    check_agreement(facts)


def agree_on_state(state: Path | None) -> None:
    """Stop all processes unless they read the same resume state. A collective.

    Raises:
        UserError: a machine has no such state in its output_dir, or another one.
    """
    if state is not None:
        check_agreement(functools.partial(_sums, state))


def _sums(state: Path) -> dict[str, str | None]:
    sums = state / CHECKSUMS_FILE
    return {f"digest of {sums}": file_digest(sums) if sums.is_file() else None}
