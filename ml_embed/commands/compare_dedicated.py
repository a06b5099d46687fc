"""Compare cuts of one nested run with models that are trained alone for what each cut gives.

Trains the nested run of a config, and for each cut a model alone: the first layers of the same
start, its rank in every step, the loss on its leading dimensions alone, on the same data in the
same order. Evaluates all on the same queries and writes comparison.json, .html and .png. Runs that
are there are not trained again, and `accelerate launch` trains and evaluates on all its processes.
"""

import argparse

from ml_embed.commands import flags
from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.files.paths import check_writable, home_path
from ml_embed.notices import bars_wanted, parse_command
from ml_embed.reports.tables import MEANING


@exit_on_user_error
def main(arguments: list[str] | None = None) -> int:
    parser = flags.new_parser(__doc__)
    parser.add_argument("--config", required=True, help="JSON file of the nested run")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override config keys, of all runs",
    )
    parser.add_argument(
        "--cuts",
        nargs="+",
        required=True,
        metavar="RANK:DEPTH:DIM",
        help="cuts to compare, such as 64:4:32; rank 0 is a whole token table",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="a run of each model for each (default 0)"
    )
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        metavar="RATE",
        help="tried for each model at the first seed; it takes its best (default the config's)",
    )
    parser.add_argument(
        "--data", type=home_path, required=True, metavar="PATH", help="as for scripts/evaluate.py"
    )
    parser.add_argument(
        "--tuning-data",
        type=home_path,
        metavar="PATH",
        help="by which learning rates are chosen; other queries than those of --data",
    )
    parser.add_argument(
        "--taught",
        action="store_true",
        help="the nested run learns from the whole model alone, trained before it with its seed; "
        "the results are then comparison_taught.json, .html and .png",
    )
    flags.add_output(parser, "for all")
    parser.add_argument(
        "--metric", choices=list(MEANING), default="recall@1", help="(default %(default)s)"
    )
    flags.add_max_queries(parser)
    args = parse_command(parser, arguments)
    if len(set(args.learning_rates or ())) > 1 and args.tuning_data is None:
        raise UserError(
            "--learning-rates names several; choose by --tuning-data, which holds other queries "
            "than --data"
        )
    check_writable(args.output)
    return compare_and_write(args)


def compare_and_write(args: argparse.Namespace) -> int:
    from ml_embed.benchmarks import dedicated
    from ml_embed.commands import train
    from ml_embed.config import load_config
    from ml_embed.distributed.collectives import process_index
    from ml_embed.files.atomic import write_json
    from ml_embed.reports.comparison import comparison_table, plot_comparison, write_page

    config, given = load_config(args.config, args.set)
    comparison = dedicated.Comparison(
        given=given,
        cuts=tuple(dict.fromkeys(map(dedicated.parse_cut, args.cuts))),
        seeds=tuple(dict.fromkeys(args.seeds)),
        learning_rates=tuple(dict.fromkeys(args.learning_rates or [config.learning_rate])),
        data=args.data,
        tuning=args.tuning_data or args.data,
        output=args.output,
        metric=args.metric,
        max_queries=args.max_queries,
        taught=args.taught,
    )
    dedicated.check(comparison)
    code, rates = dedicated.train_all(
        comparison,
        lambda path: train.main(["--config", str(path), "--resume", "auto"]),
        bars_wanted(),
    )
    if code:
        return code
    result = dedicated.compare(comparison, rates, bars_wanted())
    if process_index() == 0:
        print(f"{comparison_table(result)}\n")
        name = "comparison_taught" if args.taught else "comparison"
        files = {suffix: args.output / f"{name}.{suffix}" for suffix in ("json", "html", "png")}
        write_json(files["json"], result)
        write_page(result, files["html"])
        try:
            plot_comparison(result, files["png"])
        except UserError as error:
            print(f"no picture: {error}")
        print(f"all numbers: {files['json']}")
    return 0
