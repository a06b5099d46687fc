"""Write a run's report: one HTML page of loss curves, throughput and the cuts to choose from."""

import argparse

from ml_embed.errors import exit_on_user_error
from ml_embed.files.paths import home_path
from ml_embed.notices import parse_command
from ml_embed.reports.tables import MEANING


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run",
        type=home_path,
        metavar="RUN",
        help="run folder, output_dir/experiment_id; may be running",
    )
    parser.add_argument("--output", type=home_path, metavar="FILE", help="default RUN/report.html")
    parser.add_argument(
        "--evaluation",
        type=home_path,
        metavar="PATH",
        help=(
            "evaluation.json of scripts/evaluate.py, or its folder (default RUN or RUN/evaluation, "
            "if it is there)"
        ),
    )
    parser.add_argument(
        "--metric",
        choices=list(MEANING),
        default="ndcg@10",
        help="of the cuts (default %(default)s)",
    )
    args = parse_command(parser, arguments)

    from ml_embed.reports.run_page import write_report

    output = args.output or args.run / "report.html"
    write_report(args.run, output, args.evaluation, args.metric)
    print(f"wrote {output}")
