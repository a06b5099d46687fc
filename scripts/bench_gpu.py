"""Check and measure the training step on one CUDA GPU, against a naive step in the same run.

Checks the variable-length attention kernels and the packed step; then measures steps of
Qwen3-0.6B's shape: random weights, rank 512, at most 1,024 tokens, bfloat16. Needs no data. Without
a GPU it says so and ends with 0.
"""

import argparse
import json
import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.errors import exit_on_user_error
from ml_embed.notices import parse_command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=10, help="steps of each version (default 10)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=4,
        help="rows of 9 texts (default 4: the naive step must fit)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="also with compile_layers (minutes to warm up)"
    )
    args = parse_command(parser, arguments)

    import torch

    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was run")
        print(json.dumps({"benchmark": "gpu", "skipped": "no CUDA GPU"}))
        return

    from ml_embed.benchmarks.gpu import report_gpu

    report_gpu(args.batch_size, args.repeats, args.compile)


if __name__ == "__main__":
    sys.exit(main())
