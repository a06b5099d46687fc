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

from ml_embed.commands import flags
from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.files.paths import check_writable
from ml_embed.notices import bars_wanted, notice, parse_command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = flags.new_parser(__doc__)
    flags.add_model(parser)
    flags.add_tasks(parser)
    flags.add_output(parser, "folder for the results")
    flags.add_cut(parser, many=True, default="the largest")
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
    flags.add_task_prompts(parser)
    flags.add_batch_tokens(parser)
    flags.add_device(parser)
    flags.add_overwrite(parser, "compute again what is there")
    flags.add_verify(parser)
    args = parse_command(parser, arguments)
    if not args.tasks and not args.benchmark:
        raise UserError("give --tasks or --benchmark")
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
