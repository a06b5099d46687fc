"""Train a nested embedding model, on one process or on those of `accelerate launch`."""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ml_embed.commands import flags
from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.notices import bars_wanted, notice, parse_command

if TYPE_CHECKING:
    from ml_embed.config import TrainConfig


AGAIN = "start again with --resume auto"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config", required=True, help="JSON file of the run; all keys: configs/README.md"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override config keys",
    )
    parser.add_argument(
        "--resume",
        default="no",
        metavar="auto|PATH|no",
        help=(
            "continue from the newest whole state of this run, from a given one, or start anew "
            "(default: no)"
        ),
    )
    parser.add_argument(
        "--allow-changes", action="store_true", help="resume even if keys that matter have changed"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the derived numbers and memory, train nothing"
    )
    parser.add_argument(
        "--show-batch",
        type=int,
        default=0,
        metavar="N",
        help="print the first N batches as text, with what is masked, train nothing",
    )
    parser.add_argument(
        "--is-done",
        action="store_true",
        help="only say how far the run has come: exit code 0 at its end, 75 before it",
    )
    flags.add_verify(parser)
    return parse_command(parser, arguments)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    from ml_embed.config import load_config

    if options.show_batch < 0:
        raise UserError(f"--show-batch is {options.show_batch}; it must be at least 0")
    # before the slow imports: mistakes show at once
    config, given = load_config(options.config, options.set)

    if options.is_done:
        return say_how_far(config)

    from ml_embed.distributed.heartbeat import heartbeat
    from ml_embed.distributed.launch import lost_peers_are_user_errors

    lost = lost_peers_are_user_errors(AGAIN)
    with failures_from_outside(), lost, heartbeat(AGAIN) as all_have_met:
        return run_on_this_process(options, config, given, all_have_met)


def say_how_far(config: "TrainConfig") -> int:
    """The exit code of `--is-done`."""
    from ml_embed.training.loop import PREEMPTED_EXIT_CODE
    from ml_embed.training.resume import what_is_left

    left = what_is_left(config)
    print(left or f"done: {config.run_dir}")
    return PREEMPTED_EXIT_CODE if left else 0


def run_on_this_process(
    options: argparse.Namespace,
    config: "TrainConfig",
    given: dict[str, Any],
    all_have_met: Callable[[], None],
) -> int:
    """This process's part of the run; returns its exit code."""
    from ml_embed.distributed.collectives import compute_on_all_processes
    from ml_embed.distributed.sole_launch import sole_launch
    from ml_embed.kernels.allocator import keep_freed_memory
    from ml_embed.training.accelerator import make_accelerator
    from ml_embed.training.agreement import agree_on_inputs, agree_on_settings
    from ml_embed.training.inputs import open_inputs, with_model_folders
    from ml_embed.training.loop import train
    from ml_embed.training.mixture import mixture_table
    from ml_embed.training.scale import needs_on_gpus
    from ml_embed.training.setup import make_loader, set_up
    from ml_embed.training.show_batch import show_batches

    config = with_model_folders(config)
    accelerator = make_accelerator(config)
    all_have_met()
    agree_on_settings(config, options, accelerator)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    bars = bars_wanted()
    half = accelerator.mixed_precision == "bf16"
    inputs = compute_on_all_processes(
        lambda: open_inputs(config, accelerator.num_processes, bars, options.verify, half)
    )
    agree_on_inputs(config, inputs, accelerator)
    if options.dry_run:
        if accelerator.is_local_main_process:
            needs = needs_on_gpus(config, inputs)
            print(json.dumps(inputs.resolved.to_json() | {"on_h100": needs}, indent=2))
        return 0
    if options.show_batch:
        if accelerator.is_main_process:
            loader = make_loader(config, accelerator, inputs)
            for text in show_batches(loader, inputs.tokenizer, options.show_batch):
                print(text)
        return 0
    mixture, sampling = inputs.resolved.languages, config.language_sampling
    if mixture and sampling and accelerator.is_main_process:
        notice(mixture_table(mixture, sampling))
    with sole_launch(config.run_dir):
        run = set_up(config, given, accelerator, inputs, options.resume, options.allow_changes)
        code = train(run, progress=bars)
    accelerator.end_training()
    if code == 0 and accelerator.is_local_main_process:
        print(f"done: {config.run_dir}")
    return code


@contextlib.contextmanager
def failures_from_outside() -> Iterator[None]:
    """Turn failures of the machine (a full disk, an interruption) into messages to users."""
    try:
        yield
    except KeyboardInterrupt:  # while it trains, a signal is a request to save and stop
        raise UserError("interrupted before the first step; nothing is lost") from None
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"{error.strerror or error}{where}; see to that, then continue with --resume auto"
        ) from None
