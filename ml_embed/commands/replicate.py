"""Measure what cuts of a model keep, language by language, on public retrieval tasks.

Scores the uncut model, every combination of --rank, --depth and --dim, and the baselines on mteb's
tasks, with mteb's own measures per query. Differences have paired bootstrap intervals over queries,
and Holm's rule over languages. Writes replication.json, a table and an HTML page. What DIR has
already is not computed again, and `accelerate launch` encodes on all its processes.

--verify FILE takes a random twentieth of the rows of a replication.json, at least three, and
computes them again; --mock runs the whole road offline, on a small task of the embedded corpus.
Needs mteb: pip install 'ml-embed[mteb]', and for the baseline bm25 'ml-embed[bm25]'.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ml_embed.commands import flags
from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.files.paths import check_writable, home_path
from ml_embed.notices import bars_wanted, notice, parse_command

if TYPE_CHECKING:
    from ml_embed.evaluation.replication import Asked, Replication

SUITES = ("nano", "miracl-hn", "miracl", "belebele", "own")
MOCK_CUTS = {"rank": (8, 16), "depth": (2,), "dim": (32,)}
"""What is cut in a rehearsal, where the user asks for nothing else."""
OF_FILE = (
    *("suite", "languages", "rank", "depth", "dim", "query_prompt", "passage_prompt"),
    *("output", "dry_run", "mock"),
)
"""Flags that --verify leaves to its file."""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = flags.new_parser(__doc__)
    parser.add_argument(
        "--model", metavar="DIR_OR_NAME", help="a model folder, or a name on the hub"
    )
    parser.add_argument(
        "--suite",
        choices=SUITES,
        help="tasks: small ones of 11 languages, MIRACL with hard negatives or whole, Belebele, or "
        "your own",
    )
    parser.add_argument(
        "--data",
        type=home_path,
        metavar="DIR",
        help="of --suite own: a folder in BEIR's form for each language, named swa-Latn and so on",
    )
    parser.add_argument(
        "--languages",
        nargs="+",
        metavar="CODE",
        help="only these, ISO 639-3: swa yor (default all of the suite)",
    )
    flags.add_cut(parser, many=True, default="uncut; the uncut model is always there")
    parser.add_argument(
        "--baselines",
        nargs="+",
        default=[],
        metavar="NAME",
        help="bm25, or other models: folders, or names on the hub",
    )
    flags.add_task_prompts(parser)
    parser.add_argument("--output", type=home_path, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be loaded and computed, and end"
    )
    parser.add_argument(
        "--verify",
        type=home_path,
        metavar="FILE",
        help="a replication.json: compute a random twentieth of its rows again, at least three; "
        "--model, --data, --config and --baselines (all, in their order) say where these lie here",
    )
    parser.add_argument(
        "--seed", type=int, help="of the choice of rows of --verify (default another each time)"
    )
    parser.add_argument(
        "--mock",
        action="store_true",
        help="rehearse offline: a task of the embedded corpus, and a random model if none is given",
    )
    flags.add_batch_tokens(parser)
    flags.add_device(parser)
    return parse_command(parser, arguments)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    check(args)
    from ml_embed.distributed.launch import launched

    with launched(args.device):
        return replicate(args)


def check(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together."""
    if args.verify is not None:
        for name in OF_FILE:
            if getattr(args, name):
                flag = name.replace("_", "-")
                raise UserError(f"--verify takes what was asked for from its file; leave --{flag}")
        return
    if args.seed is not None:
        raise UserError("--seed is of --verify; give both or neither")
    if args.mock and (args.suite or args.data):
        raise UserError("--mock has a task of its own; leave --suite and --data out")
    needed = ("output",) if args.mock else ("model", "suite", "output")
    if missing := [f"--{name}" for name in needed if getattr(args, name) is None]:
        raise UserError(f"give {' and '.join(missing)}, or --mock or --verify FILE")
    if args.data is not None and args.suite != "own":
        raise UserError("--data is of --suite own")
    check_writable(args.output)


def replicate(args: argparse.Namespace) -> int:
    """This process's part of the work; the first one prints the results."""
    from ml_embed.distributed.collectives import compute_on_all_processes
    from ml_embed.evaluation.mteb import require_mteb
    from ml_embed.evaluation.replication import Replication
    from ml_embed.evaluation.verification import asked_in, read_replication
    from ml_embed.files.atomic import disk_errors_are_user_errors

    require_mteb()
    from datasets import disable_progress_bars

    disable_progress_bars()  # mteb starts one for each step of each language
    result, places_of_baselines = None, ()
    if args.verify is not None:
        places_of_baselines = args.baselines
        result = compute_on_all_processes(lambda: read_replication(args.verify))
        places = {name: getattr(args, name) for name in ("model", "data", "config")}
        asked = asked_in(result, {name: at and str(at) for name, at in places.items()})
    else:
        asked = rehearsal(args) if args.mock else asked_for(args)
    replication = compute_on_all_processes(
        lambda: Replication.open(
            asked, args.device, args.batch_tokens, bars_wanted(), places_of_baselines
        )
    )
    if result is not None:
        return verify(args, result, replication)
    if args.dry_run:
        return show_plan(replication, args.output)
    with disk_errors_are_user_errors(args.output, "Then run the same command again: it continues."):
        return measure(replication, args.output)


def asked_for(args: argparse.Namespace) -> "Asked":
    from ml_embed.evaluation.replication import Asked

    return Asked(
        model=args.model,
        suite=args.suite,
        languages=None if args.languages is None else tuple(args.languages),
        data=args.data and str(args.data),
        config=args.config and str(args.config),
        rank=tuple(args.rank or ()),
        depth=tuple(args.depth or ()),
        dim=tuple(args.dim or ()),
        baselines=tuple(dict.fromkeys(args.baselines)),
        query_prompt=args.query_prompt,
        passage_prompt=args.passage_prompt,
    )


def rehearsal(args: argparse.Namespace) -> "Asked":
    """The suite own on a task of the embedded corpus; without --model, a random one is made."""
    from ml_embed.distributed.collectives import compute_on_main_process
    from ml_embed.evaluation.mock import make_mock_model
    from ml_embed.sample_data.search_tasks import write_search_tasks

    args.suite, args.data = "own", args.output / "mock_tasks"
    own_model = args.model is None
    if own_model:
        args.model = str(args.output / "mock_model")
        if not (args.rank or args.depth or args.dim):
            args.rank, args.depth, args.dim = MOCK_CUTS.values()
        args.baselines = args.baselines or ["bm25"]

    def make() -> None:
        args.output.mkdir(parents=True, exist_ok=True)
        write_search_tasks(args.data)
        if own_model:
            make_mock_model(Path(args.model), args.data)

    compute_on_main_process(make)
    return asked_for(args)


def show_plan(replication: "Replication", output: Path) -> int:
    from ml_embed.distributed.collectives import process_index
    from ml_embed.evaluation.replication import plan
    from ml_embed.reports.replication import plan_table

    if process_index() == 0:
        print(plan_table(plan(replication, output)))
    return 0


def measure(replication: "Replication", output: Path) -> int:
    from ml_embed.distributed.collectives import process_index
    from ml_embed.evaluation import replication as work
    from ml_embed.prepare.prompts import say_without_prompt
    from ml_embed.reports.replication import replication_tables, write_page

    result = work.replicate(replication, output)
    if process_index() == 0:
        if any(replication.prompts.to_json().values()):
            tasks = {part.name: part.task for part in replication.parts}
            say_without_prompt(
                {name: replication.prompts.of_task(task) for name, task in tasks.items()}
            )
        print(replication_tables(result))
        write_page(result, output / "replication.html")
        print(f"\nall numbers: {output / work.RESULT_FILE}; page: {output / 'replication.html'}")
    return 0


def verify(args: argparse.Namespace, result: dict, replication: "Replication") -> int:
    from ml_embed.distributed.collectives import compute_on_main_process, process_index
    from ml_embed.evaluation import verification

    seed = compute_on_main_process(
        lambda: int.from_bytes(os.urandom(4), "big") if args.seed is None else args.seed
    )
    notice(f"rows are chosen with --seed {seed}")
    differences = verification.verify(result, replication, seed)
    if differences:
        raise UserError(
            f"{args.verify} is not what is found here:\n" + "\n".join(f"  {d}" for d in differences)
        )
    if process_index() == 0:
        print(f"{args.verify} holds: the rows computed again are the same")
    return 0
