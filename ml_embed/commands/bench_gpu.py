"""Check and measure the training step on one CUDA GPU, against a naive step in the same run.

Checks the attention kernels and the gradients; then measures steps of Qwen3-0.6B's shape: random
weights, rank 512, at most 1,024 tokens, bfloat16; ours, ours compiled, and the naive one. Prints a
JSON object after each. Needs no data. Without a GPU it says so and ends with 0.
"""

import argparse
import json
from pathlib import Path

from ml_embed.errors import exit_on_user_error
from ml_embed.files.paths import check_writable, home_path
from ml_embed.notices import parse_command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out",
        type=home_path,
        default=Path("runs/bench_gpu"),
        metavar="DIR",
        help="profiles and results (default runs/bench_gpu)",
    )
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a rehearsal")
    args = parse_command(parser, arguments)
    check_writable(args.out, "--out")

    import torch

    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was run")
        print(json.dumps({"benchmark": "gpu", "skipped": "no CUDA GPU"}))
        return

    from ml_embed.benchmarks.gpu_check import report_benchmark
    from ml_embed.benchmarks.gpu_common import Setting

    args.out.mkdir(parents=True, exist_ok=True)
    report_benchmark(Setting(device, args.small, args.out))
