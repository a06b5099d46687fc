"""Check everything about the GPU path that a CPU cannot tell, within a deadline.

    python scripts/check_gpu.py --out DIR [--deadline 420] [--only NAME ...]
    python scripts/check_gpu.py --out DIR --device cpu --small    (a rehearsal)

Prints one JSON object per section, the most important first, and appends it to DIR/check_gpu.jsonl.
What a good answer is stands at each section, in ml_embed/benchmarks/gpu_*.py.
"""

import json
from pathlib import Path

from ml_embed.commands import flags
from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.files.paths import check_writable, home_path
from ml_embed.notices import parse_command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = flags.new_parser(__doc__)
    parser.add_argument(
        "--out", type=home_path, default=Path(), metavar="DIR", help="results (default: here)"
    )
    parser.add_argument(
        "--deadline",
        type=float,
        default=420,
        help="seconds after which no further section begins (default 420)",
    )
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="only these sections")
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a rehearsal")
    args = parse_command(parser, arguments)
    check_writable(args.out, "--out")

    import torch

    from ml_embed.benchmarks.gpu_check import SECTIONS, run_sections
    from ml_embed.benchmarks.gpu_common import Setting

    if unknown := [name for name in args.only if name not in SECTIONS]:
        raise UserError(f"--only: no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(json.dumps({"skipped": "no CUDA GPU"}))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    run_sections(Setting(device, args.small, args.out), args.only, args.deadline)
