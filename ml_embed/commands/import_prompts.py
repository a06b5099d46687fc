"""Write the prompts that mteb's entry of a model holds as the `datasets` of a config.

For each task what mteb itself puts in front of its texts when it runs that model. The file is for
--config of evaluate_mteb.py; its entries can be copied into a training config. Nothing is fetched.
Needs mteb: pip install 'ml-embed[mteb]'.
"""

from ml_embed.commands import flags
from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.notices import parse_command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = flags.new_parser(__doc__)
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="of a model in mteb's register, e.g. codefuse-ai/F2LLM-v2-0.6B",
    )
    flags.add_tasks(parser)
    flags.add_output(parser, "the JSON file to write", metavar="FILE")
    args = parse_command(parser, arguments)
    if not args.tasks and not args.benchmark:
        raise UserError("give --tasks or --benchmark")

    from ml_embed.evaluation.mteb import find_tasks
    from ml_embed.evaluation.mteb_prompts import prompts_in_mteb
    from ml_embed.files.atomic import disk_errors_are_user_errors, write_json
    from ml_embed.prepare.prompts import say_without_prompt

    datasets = prompts_in_mteb(args.model, find_tasks(args.tasks, args.benchmark))
    with disk_errors_are_user_errors(args.output, "Then run the same command again."):
        write_json(args.output, {"datasets": datasets})
    say_without_prompt(datasets)
    print(f"{args.output}: prompts of {len(datasets)} tasks, as mteb has them for {args.model}")
