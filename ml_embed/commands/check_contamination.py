"""Look for a benchmark's texts in training data: the same texts, and 13 same tokens in a row.

Prints a table by dataset, task, language and role, and writes all numbers and examples to --output.
A role is a query, a document, or a pair of a query and a document that answers it. Exit code 0:
nothing was found; 1: something was.
"""

import argparse
from pathlib import Path
from typing import Any

from ml_embed.commands import flags
from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.files.paths import check_writable, home_path
from ml_embed.notices import notice, parse_command

ROLES = ("query", "document", "pair")


@exit_on_user_error
def main(arguments: list[str] | None = None) -> int:
    parser = flags.new_parser(__doc__)
    parser.add_argument(
        "--data",
        type=home_path,
        required=True,
        metavar="RAW",
        help="training data: a folder of raw .parquet and .jsonl files, or one of them",
    )
    flags.add_tasks(parser)
    parser.add_argument(
        "--languages", nargs="+", metavar="CODE", help="of the tasks, ISO 639-3 (default all)"
    )
    parser.add_argument(
        "--files",
        nargs="+",
        type=home_path,
        default=[],
        metavar="FILE",
        help="evaluation files, or folders of them, as scripts/evaluate.py reads them",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR_OR_NAME",
        help="of the model that is trained: a folder, or a name on the hub",
    )
    parser.add_argument(
        "--roles",
        nargs="+",
        choices=ROLES,
        default=ROLES,
        help="what is looked for (default all); without document, of documents only the right ones",
    )
    parser.add_argument(
        "--output",
        type=home_path,
        metavar="FILE",
        help="JSON file for numbers and examples (default none)",
    )
    parser.add_argument(
        "--write-clean",
        type=home_path,
        metavar="DIR",
        help="write the data without the rows that match to a new folder",
    )
    args = parse_command(parser, arguments)
    if not (args.tasks or args.benchmark or args.files):
        raise UserError("give --tasks, --benchmark or --files")
    if args.output is not None:
        if args.output.is_dir():
            raise UserError(f"--output {args.output} is a folder; give a file")
        check_writable(args.output.parent)
    if args.write_clean is not None:
        _check_new(args.write_clean)
        check_writable(args.write_clean, "--write-clean")
    from ml_embed.distributed.launch import launched

    with launched("cpu"):
        return check(args)


def _check_new(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--write-clean {folder} exists; give a new folder")


def check(args: argparse.Namespace) -> int:
    """This process's part of the work; the first one prints the result."""
    from ml_embed.distributed.collectives import (
        compute_on_all_processes,
        compute_on_main_process,
        process_index,
    )
    from ml_embed.distributed.shares import compute_shared
    from ml_embed.evaluation.benchmark_texts import texts_of_files, texts_of_tasks
    from ml_embed.evaluation.contamination import (
        COMMON,
        WHOLE_TEXT,
        BenchmarkIndex,
        search_dataset,
    )
    from ml_embed.evaluation.mteb import find_tasks
    from ml_embed.files.model_source import find_tokenizer_folder
    from ml_embed.prepare.raw import RawDataset, check_and_count_rows, list_raw_datasets
    from ml_embed.prepare.tokenizer import TextTokenizer, load_tokenizer

    def prepare() -> tuple[list[RawDataset], BenchmarkIndex]:
        one = [RawDataset(args.data.stem, args.data)]
        data = one if args.data.is_file() else list_raw_datasets(args.data)
        for dataset in data:
            check_and_count_rows(dataset)
        texts = list(texts_of_files(args.files))
        if args.tasks or args.benchmark:
            texts += texts_of_tasks(find_tasks(args.tasks, args.benchmark, args.languages))
        tokenizer = load_tokenizer(find_tokenizer_folder(args.tokenizer))
        index = BenchmarkIndex(texts, TextTokenizer(tokenizer, WHOLE_TEXT), args.roles)
        if not index.sizes:
            raise UserError("the benchmark has no texts in these roles and languages")
        return data, index

    data, index = compute_on_all_processes(prepare)
    if index.common and process_index() == 0:
        notice(f"{index.common:,} n-grams are not looked for: over {COMMON} texts have them")
    found = compute_shared(data, lambda dataset: search_dataset(dataset, index))
    return compute_on_main_process(lambda: _tell(args, data, found, index))


def _tell(args: argparse.Namespace, data: list, found: list, index: Any) -> int:
    from ml_embed.evaluation.contamination import contamination_report, write_clean
    from ml_embed.files.atomic import disk_errors_are_user_errors, write_json
    from ml_embed.reports.tables import contamination_table

    report = {"data": str(args.data), "tokenizer": args.tokenizer}
    report |= contamination_report(found, index)
    matching = sum(len(item.matching) for item in found)
    rows = sum(item.rows for item in found)
    if matching:
        print(contamination_table(report), end="\n\n")
    print(f"{matching:,} of {rows:,} rows match the benchmark")
    with disk_errors_are_user_errors(
        args.write_clean or args.output or args.data, "Then run it again."
    ):
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.output, report)
        if args.write_clean is not None:
            write_clean(data, found, args.write_clean)
            for item in found:
                notice(f"{item.dataset}: {len(item.matching):,} of {item.rows:,} rows left out")
    return int(matching > 0)
