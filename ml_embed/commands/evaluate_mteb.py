"""Run mteb's tasks on a model at any cuts of it, with the prompts that its folder holds.

Writes mteb's own result files to DIR/results and summary.json to DIR, and prints tables: a line per
cut, and for tasks in several languages a line per language. What DIR has already is not computed
again, so an interrupted call is continued by the same one. Needs mteb:
pip install 'ml-embed[mteb]'.

The results of the whole model lie in DIR/results/OWNER__NAME/REVISION, as a leaderboard takes them,
with what the model folder says of its training data in model_meta.json.
"""

import argparse
import re

from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.files.digests import add_verify_flag
from ml_embed.files.paths import check_writable, home_path
from ml_embed.model_folders.cut import add_cut_flags
from ml_embed.notices import bars_wanted, notice, parse_command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_NAME",
        help="a trained model or any Qwen3 backbone: a folder, or a name on the hub",
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="NAME", help="mteb tasks, e.g. SciFact STS22.v2"
    )
    parser.add_argument(
        "--benchmark",
        metavar="NAME",
        help="all tasks of a benchmark, e.g. 'MTEB(Multilingual, v2)'",
    )
    parser.add_argument(
        "--output", type=home_path, required=True, metavar="DIR", help="folder for the results"
    )
    add_cut_flags(parser, many=True, default="the largest")
    parser.add_argument(
        "--languages",
        nargs="+",
        metavar="CODE",
        help="only these, ISO 639-3: eng deu zho-Hans (default all)",
    )
    parser.add_argument(
        "--only-text",
        action="store_true",
        help="leave out tasks that are not of text alone, and name them (default: an error)",
    )
    parser.add_argument(
        "--name",
        metavar="OWNER/NAME",
        help="of the model in mteb's files (default: the last two parts of its folder)",
    )
    parser.add_argument(
        "--config",
        type=home_path,
        metavar="FILE",
        help="its `datasets` say prompt and passage_prompt by the name of a task or a pattern; "
        "they go before the folder's",
    )
    parser.add_argument(
        "--query-prompt", metavar="TEXT", help="in front of queries of all tasks instead of these"
    )
    parser.add_argument(
        "--passage-prompt",
        metavar="TEXT",
        help="in front of documents of all tasks instead of these",
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        help="tokens per forward pass (default 4096 on CPU, 32768 on GPU)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default the first GPU, else the CPU)")
    parser.add_argument("--overwrite", action="store_true", help="compute again what is there")
    add_verify_flag(parser)
    args = parse_command(parser, arguments)
    if not args.tasks and not args.benchmark:
        raise UserError("give --tasks or --benchmark")
    if args.batch_tokens is not None and args.batch_tokens < 1:
        raise UserError(f"--batch-tokens is {args.batch_tokens}; it must be at least 1")
    if args.name and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.name):
        raise UserError(f"--name {args.name} must be OWNER/NAME, as on the hub")
    check_writable(args.output)
    from ml_embed.distributed.launch import launched

    with launched(args.device):
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    """This process's part of the work; the first one prints the results."""
    from ml_embed.config import load_datasets
    from ml_embed.distributed.collectives import compute_on_all_processes, process_index
    from ml_embed.evaluation.mteb import SUMMARY_FILE, evaluate_mteb, find_tasks, text_tasks
    from ml_embed.files.atomic import disk_errors_are_user_errors
    from ml_embed.model_folders.seal import verify_model
    from ml_embed.prepare.prompts import say_without_prompt
    from ml_embed.reports.tables import language_tables, summary_table

    def prepare() -> list:
        if args.verify:
            verify_model(args.model)
        tasks = find_tasks(args.tasks, args.benchmark, args.languages)
        if not args.only_text:
            return tasks
        tasks, others = text_tasks(tasks)
        if others:
            notice(f"left out, since they are not of text alone: {', '.join(others)}")
        if not tasks:
            raise UserError("none of the tasks is of text alone")
        return tasks

    tasks = compute_on_all_processes(prepare)
    datasets = compute_on_all_processes(lambda: load_datasets(args.config) if args.config else {})
    with disk_errors_are_user_errors(args.output, "Then run the same command again: it continues."):
        summary = evaluate_mteb(
            args.model,
            tasks,
            args.output,
            args.rank,
            args.depth,
            args.dim,
            query_prompt=args.query_prompt,
            passage_prompt=args.passage_prompt,
            batch_tokens=args.batch_tokens,
            device=args.device,
            overwrite=args.overwrite,
            name=args.name,
            languages=args.languages,
            progress=bars_wanted(),
            datasets=datasets,
        )
    if process_index() == 0:
        if any(summary["prompts"].values()):
            say_without_prompt(summary["prompts_used"])
        print("\n\n".join(filter(None, (summary_table(summary), language_tables(summary)))))
        print(f"\nall numbers: {args.output / SUMMARY_FILE}")
