"""Make raw training data and evaluation sets of an embedded corpus, or of translation catalogues.

See ml_embed/sample_data/README.md. Prints one JSON object: what chance and trivial cues achieve on
each evaluation split.
"""

import argparse
import json
from pathlib import Path

from ml_embed.commands import flags
from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.files.paths import check_writable, home_path
from ml_embed.notices import parse_command
from ml_embed.sample_data.cues import cue_accuracy
from ml_embed.sample_data.datasets import TASKS, build_datasets
from ml_embed.sample_data.messages import ROWS_PER_MESSAGE, MessagesPlan, build_messages
from ml_embed.sample_data.names import DATASET, NamesPlan, build_names
from ml_embed.sample_data.names_source import KINDS
from ml_embed.sample_data.plan import Plan

SIZES = {"udhr": (50, 6000), "names": (None, 60_000), "messages": (None, 1200 * ROWS_PER_MESSAGE)}
"""Corpus -> languages (None is all) and rows, where none are given."""
OWN_FLAGS = {
    **{"languages": ("udhr", "names"), "eval_rows": ("udhr", "names")},
    **{"kind": ("names",), "catalogues": ("messages",)},
}
"""Flag -> the corpora that it is for."""


def language_count(value: str) -> int | None:
    return None if value == "all" else int(value)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = flags.new_parser(__doc__)
    parser.add_argument(
        "--corpus",
        choices=list(SIZES),
        default="udhr",
        help="the Declaration of Human Rights, names of territories and languages, or messages of "
        "--catalogues (default %(default)s)",
    )
    parser.add_argument(
        "--catalogues",
        type=home_path,
        metavar="DIR",
        help="of messages: folder with translation catalogues, <language>/LC_MESSAGES/*.mo at any "
        "depth",
    )
    parser.add_argument(
        "--kind",
        choices=list(KINDS.values()),
        help="of names: only those of this kind (default all)",
    )
    flags.add_output(parser, "folder for the raw training data")
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
        default=argparse.SUPPRESS,
        metavar="N|all",
        help="training languages (default 50; of names all 40)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=argparse.SUPPRESS,
        help="for retrieval; of udhr half for clustering, a third for direction (default 6000; of "
        "names 60000, of messages 28800)",
    )
    parser.add_argument(
        "--eval-rows",
        type=int,
        default=argparse.SUPPRESS,
        help="rows of an evaluation split, but of messages (default 400)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of hold-outs and rows (default %(default)s)"
    )
    flags.add_overwrite(parser, "replace the files of an earlier run")
    args = parse_command(parser, arguments)
    check_writable(args.output)
    check_writable(args.eval_output, "--eval-output")
    _check_flags(args)
    languages, rows = SIZES[args.corpus]
    common = {"seed": args.seed, "rows": getattr(args, "rows", rows), "overwrite": args.overwrite}
    if args.corpus == "messages":
        of_messages = build_messages(args.catalogues, args.output, args.eval_output, **common)
        print(json.dumps(messages_summary(of_messages)))
        return
    sizes = common | {
        "languages": getattr(args, "languages", languages),
        "eval_rows": getattr(args, "eval_rows", 400),
    }
    if args.corpus == "udhr":
        plan = build_datasets(args.output, args.eval_output, **sizes)
        print(json.dumps(summary(plan, args.eval_output)))
    else:
        of_names = build_names(args.output, args.eval_output, **sizes, kind=args.kind)
        print(json.dumps(names_summary(of_names, args.eval_output)))


def _check_flags(args: argparse.Namespace) -> None:
    for flag, corpora in OWN_FLAGS.items():
        if vars(args).get(flag) is not None and args.corpus not in corpora:
            name = flag.replace("_", "-")
            raise UserError(
                f"--{name} is of {' and '.join(corpora)}; add --corpus {corpora[0]}, or leave it"
                " out"
            )
    if args.corpus == "messages" and args.catalogues is None:
        raise UserError("--corpus messages needs --catalogues: a folder with translations")


def summary(plan: Plan, eval_dir: Path) -> dict[str, object]:
    """What was made, and what trivial cues achieve on each evaluation split."""
    lengths = plan.declaration_lengths()
    return {
        "training_languages": len(plan.training_languages),
        "unseen_languages": len(plan.unseen_languages),
        "unseen_articles": plan.unseen_articles,
        "cues": {
            name: cue_accuracy(_rows(eval_dir, name), lengths if task == "retrieval" else None)
            for name, task in TASKS.items()
        },
    }


def names_summary(plan: NamesPlan, eval_dir: Path) -> dict[str, object]:
    """What was made, how many names are alike, and what trivial cues achieve on each split."""
    equal, total = plan.count_equal()
    return {
        "training_languages": len(plan.names),
        "training_meanings": len(plan.training_meanings),
        "unseen_meanings": len(plan.unseen_meanings),
        "left_out_as_equal": equal,
        "names_in_two_languages": total,
        "cues": {DATASET: cue_accuracy(_rows(eval_dir, DATASET))},
    }


def messages_summary(plan: MessagesPlan) -> dict[str, object]:
    """How many rows were made."""
    return {
        "training_rows": len(plan.training),
        "unseen_pairs": len(plan.unseen_pairs),
        "unseen_messages": len(plan.unseen_messages),
        "tuning_pairs": len(plan.tuning_pairs),
        "tuning_messages": len(plan.tuning_messages),
    }


def _rows(eval_dir: Path, name: str) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(eval_dir / f"{name}.parquet").to_pylist()
