"""Joining the processes of a launcher, for long work that is not training."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from importlib import metadata

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ml_embed.distributed.agreement import check_agreement, software
from ml_embed.distributed.collectives import choose_gloo_interface, gather_objects, is_lost_peer
from ml_embed.distributed.heartbeat import heartbeat
from ml_embed.distributed.meeting import meeting
from ml_embed.errors import UserError

# Processes that are done wait for the one that has the largest piece, or writes the result. Dead
# ones are noticed as in training.
_PATIENCE = timedelta(days=30)
AGAIN = "start again in the same way: what is done is kept"


@contextlib.contextmanager
def launched(device: str | None) -> Iterator[None]:
    """Be one of the processes that `accelerate launch` started, while the body runs.

    All of them run the body; where there is no launcher, nothing happens. None leaves before all
    have come to the end. They talk by gloo, also on GPUs: what they exchange is small.

    Args:
        device: what the user asked to compute on; None is a GPU of its own for each process, or the
            CPU where there is none.
    Raises:
        UserError: the processes do not run the same code, one of them has ended, `device` is one
            GPU for all, or the launch asks for DeepSpeed.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device is not None and ":" in device:
        raise UserError(
            f"--device {device} would put all processes of this launch on one device; leave it "
            "out, and each takes a GPU of its own, or give cpu"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            "this launch asks for DeepSpeed, which is for training; take another accelerate "
            "config, e.g. configs/accelerate_config.yaml"
        )
    with lost_peers_are_user_errors(AGAIN), heartbeat(AGAIN) as all_have_met:
        choose_gloo_interface()
        with meeting(_PATIENCE) as timeout:
            PartialState(cpu=not _uses_gpus(device), backend="gloo", timeout=timeout)
        all_have_met()
        check_agreement(lambda: {**software(), **_versions()})
        yield
        gather_objects(None)  # whose machine had left before would be taken for dead
        PartialState().destroy_process_group()


def _versions() -> dict[str, str]:
    """Of further libraries that decide what files hold, where they are installed."""
    found = {}
    for name in ("tokenizers", "pyarrow", "sentence-transformers", "faiss-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _uses_gpus(device: str | None) -> bool:
    on_cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    return torch.cuda.is_available() and not on_cpu


@contextlib.contextmanager
def lost_peers_are_user_errors(remedy: str) -> Iterator[None]:
    """A collective that fails because another process has ended becomes a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise UserError(
            "another process of this run has ended or does not answer; its own output says why. "
            f"Then {remedy}"
        ) from None
