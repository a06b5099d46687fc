"""Make raw training data and evaluation sets of the embedded corpus.

See ml_embed/sample_data/README.md. Prints one JSON object: what chance and trivial cues achieve on
each evaluation split.
"""

import argparse
import json
from pathlib import Path

from ml_embed.errors import exit_on_user_error
from ml_embed.files.paths import check_writable, home_path
from ml_embed.notices import parse_command
from ml_embed.sample_data.cues import cue_accuracy
from ml_embed.sample_data.datasets import TASKS, build_datasets
from ml_embed.sample_data.plan import Plan


def language_count(value: str) -> int | None:
    return None if value == "all" else int(value)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=home_path,
        required=True,
        metavar="DIR",
        help="folder for the raw training data",
    )
    parser.add_argument(
        "--eval-output",
        type=home_path,
        required=True,
        metavar="DIR",
        help="folder for the evaluation sets",
    )
    parser.add_argument(
        "--languages",
        type=language_count,
        default=50,
        metavar="N|all",
        help="training languages (default %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=6000,
        help="for retrieval; half for clustering, a third for direction (default 6000)",
    )
    parser.add_argument(
        "--eval-rows",
        type=int,
        default=400,
        help="rows of an evaluation split (default %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of hold-outs and rows (default %(default)s)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the files of an earlier run"
    )
    args = parse_command(parser, arguments)
    check_writable(args.output)
    check_writable(args.eval_output, "--eval-output")
    plan = build_datasets(
        args.output,
        args.eval_output,
        args.languages,
        args.seed,
        args.rows,
        args.eval_rows,
        args.overwrite,
    )
    print(json.dumps(summary(plan, args.eval_output)))


def summary(plan: Plan, eval_dir: Path) -> dict[str, object]:
    """What was made, and what trivial cues achieve on each evaluation split."""
    import pyarrow.parquet as pq

    return {
        "training_languages": len(plan.training_languages),
        "unseen_languages": len(plan.unseen_languages),
        "unseen_articles": plan.unseen_articles,
        "cues": {
            name: cue_accuracy(
                pq.read_table(eval_dir / f"{name}.parquet").to_pylist(),
                plan.declaration_lengths() if task == "retrieval" else None,
            )
            for name, task in TASKS.items()
        },
    }
