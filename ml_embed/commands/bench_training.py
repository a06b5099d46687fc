"""Measure the training step on the CPU, against a naive one with the same weights and batch.

The naive step pads, multiplies the token table out and normalises whole sequences. Ours runs as it
does by default, and with compile_layers. First the losses and all gradients are compared; speeds
are given as ratios, and as shares of the speed of square matrix products. The model has 8 layers of
width 256 and a table of 151,936 rows at rank 128; the batch has 8 rows of 9 texts of at most 256
tokens. With --gradcache it measures memory as the batch grows.
"""

import argparse
import tempfile
from pathlib import Path

from ml_embed.commands import flags
from ml_embed.errors import exit_on_user_error
from ml_embed.notices import parse_command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = flags.new_parser(__doc__)
    parser.add_argument(
        "--repeats", type=int, default=5, help="turns of two steps of each version (default 5)"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure the step with compile_layers (a minute more to warm up)",
    )
    parser.add_argument("--threads", type=int, help="threads of torch (default: all cores)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="a tokenizer to use; trained if not given"
    )
    parser.add_argument(
        "--gradcache",
        type=int,
        nargs="*",
        metavar="B",
        help="instead: peak memory at these batch sizes (8 to 4096)",
    )
    args = parse_command(parser, arguments)

    import torch

    from ml_embed.benchmarks.gradcache import report_gradcache
    from ml_embed.benchmarks.training import report_training

    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if args.gradcache is not None:
            report_gradcache(Path(folder), args.gradcache or [8, 64, 512, 4096])
        else:
            report_training(Path(folder), args.repeats, args.compile, args.tokenizer)
