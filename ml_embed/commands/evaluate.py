"""Evaluate a model at every rank, depth and vector length, beside chance and a baseline.

Writes evaluation.json (every number) and evaluation.png (a heat map; needs matplotlib) and prints
tables.

PATH is a file or a folder of files. A parquet file with the columns query, passage and candidates
(a list of strings that holds the passage), and split if there are several, asks which candidate is
the passage. Raw training data (query, passage, negatives) is searched whole: all passages and
negatives of the file are the corpus.
"""

import argparse
import json
import shutil
from typing import Any

from ml_embed.commands import flags
from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.files.paths import check_writable, home_path
from ml_embed.notices import bars_wanted, parse_command
from ml_embed.reports.tables import MEANING

JSON_FILE, PICTURE_FILE = "evaluation.json", "evaluation.png"
Numbers = dict[str, Any]
"""What `evaluate_cube` returns."""
BM25 = "bm25"
"""The baseline that is no model; a folder of this name is ./bm25."""
WORK = ".vectors"
"""Folder in --output for the vectors, while it runs."""


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = flags.new_parser(__doc__)
    flags.add_model(parser)
    parser.add_argument(
        "--data", type=home_path, required=True, metavar="PATH", help="a file or a folder of files"
    )
    flags.add_output(parser, "folder for the results")
    parser.add_argument(
        "--baseline",
        nargs="+",
        default=[],
        metavar="DIR_OR_NAME|bm25",
        help="what to compare with, any of: a model of this kind, e.g. the backbone before "
        "training; other models, e.g. a static one or any that sentence-transformers reads; bm25, "
        "which compares words and, on its own, pieces of 3 to 5 characters",
    )
    flags.add_cut(parser, many=True, default="all trained")
    parser.add_argument(
        "--metric",
        choices=list(MEANING),
        default="recall@1",
        help="for tables and picture (%(default)s)",
    )
    parser.add_argument(
        "--config",
        type=home_path,
        metavar="FILE",
        help="its `datasets` say prompt and passage_prompt by name or pattern; they go before the "
        "folder's (of --model)",
    )
    parser.add_argument(
        "--by-language",
        action="store_true",
        help="also search all raw data as one corpus, and tell what queries of each language find "
        "there (needs a column language)",
    )
    flags.add_max_queries(parser)
    flags.add_batch_tokens(parser)
    flags.add_device(parser)
    flags.add_verify(parser)
    args = parse_command(parser, arguments)
    check_writable(args.output)
    from ml_embed.distributed.launch import launched

    with launched(args.device):
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    """This process's part of the work; the first one writes and prints the results."""
    from ml_embed.config import load_datasets
    from ml_embed.distributed.collectives import (
        compute_on_all_processes,
        compute_on_main_process,
        process_index,
    )
    from ml_embed.evaluation.cube import evaluate_baseline, evaluate_cube
    from ml_embed.evaluation.lexical import evaluate_bm25
    from ml_embed.evaluation.other_models import evaluate_model
    from ml_embed.files.atomic import disk_errors_are_user_errors
    from ml_embed.inference.text_models import load_text_model
    from ml_embed.prepare.prompts import say_without_prompt

    before, other_models = compute_on_all_processes(lambda: check_models(args))
    datasets = compute_on_all_processes(lambda: load_datasets(args.config) if args.config else {})
    # First: they take a moment, and a mistake in them is told before the long work.
    others = compute_on_main_process(
        lambda: {
            name: evaluate_model(load_text_model(name, args.device), args.data, args.max_queries)
            for name in other_models
        }
    )
    work = args.output / WORK
    options = {
        "batch_tokens": args.batch_tokens,
        "max_queries": args.max_queries,
        "device": args.device,
        "work": work,
        "progress": bars_wanted(),
        "by_language": args.by_language,
    }
    baseline = None
    with disk_errors_are_user_errors(args.output, "Then run the same command again: it continues."):
        result = evaluate_cube(
            args.model, args.data, args.rank, args.depth, args.dim, **options, datasets=datasets
        )
        if before is not None:
            baseline = evaluate_baseline(before, args.data, result, **options)
        compute_on_main_process(lambda: shutil.rmtree(work, ignore_errors=True))
    if process_index() == 0:
        if datasets or result["prompts"]:
            say_without_prompt(result["prompts_used"])
        bm25 = evaluate_bm25(args.data, args.max_queries) if BM25 in args.baseline else None
        write(args, {"model": result, "baseline": baseline, "bm25": bm25, "others": others})


def check_models(args: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The baseline with the cuts of the model, and those of other kinds, each once.

    Raises:
        UserError: there are several with cuts; one is not there; or --verify finds a change.
    """
    from ml_embed.evaluation.lexical import require_bm25s
    from ml_embed.files.model_source import find_model_folder
    from ml_embed.inference.text_models import is_own
    from ml_embed.model_folders.seal import verify_model

    if BM25 in args.baseline:
        require_bm25s()
    names = [name for name in dict.fromkeys(args.baseline) if name != BM25]
    own = [name for name in names if is_own(find_model_folder(name))]
    if len(own) > 1:
        raise UserError(
            f"--baseline names {len(own)} models of the trained kind, {' and '.join(own)}; name "
            "one at most"
        )
    for model in (args.model, *names) if args.verify else ():
        verify_model(model)
    return next(iter(own), None), [name for name in names if name not in own]


def write(args: argparse.Namespace, numbers: Numbers) -> None:
    """Write and print the results."""
    from ml_embed.files.atomic import write_json
    from ml_embed.reports.plots import plot_cube
    from ml_embed.reports.tables import (
        cube_tables,
        mixed_table,
        precision_table,
        test_set_table,
    )

    result, baseline = numbers["model"], numbers["baseline"]
    without_cuts = (numbers["bm25"] or {}) | numbers["others"]
    print(test_set_table(result, baseline, args.metric, without_cuts))
    print(f"\n{cube_tables(result, args.metric)}\n\n{precision_table(result, args.metric)}")
    if result["languages"]:
        print(f"\n{mixed_table(result, baseline, args.metric)}")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(args.output / JSON_FILE, numbers)
    except OSError as error:  # a disk that became full meanwhile
        print(f"\n{json.dumps(numbers)}")
        reason = f"{args.output / JSON_FILE} cannot be written ({error.strerror})"
        raise UserError(
            f"{reason}; all its numbers are printed above, as one line of JSON"
        ) from None
    print(f"\nall numbers: {args.output / JSON_FILE}")
    try:
        plot_cube(result, args.output / PICTURE_FILE, args.metric, baseline)
        print(f"picture:     {args.output / PICTURE_FILE}")
    except (OSError, UserError) as error:
        print(f"no picture:  {error}")
