"""What several commands share: the look of `--help`, and flags with their meanings and defaults."""

import argparse
from collections.abc import Sequence
from typing import Any

from ml_embed.errors import UserError
from ml_embed.files.paths import home_path


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the description with its own line breaks."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


class AtLeastOne(argparse.Action):
    """Takes a whole number; a smaller one than 1 raises UserError."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, type=int, **options)

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, value: Any, option_string: Any = None
    ) -> None:
        if value < 1:
            raise UserError(f"{self.option_strings[0]} is {value}; it must be at least 1")
        setattr(namespace, self.dest, value)


def add_model(
    parser: argparse.ArgumentParser,
    what: str = "a trained model or any Qwen3 backbone: a folder, or a name on the hub",
) -> None:
    parser.add_argument("--model", required=True, metavar="DIR_OR_NAME", help=what)


def add_output(parser: argparse.ArgumentParser, what: str, metavar: str = "DIR") -> None:
    parser.add_argument("--output", type=home_path, required=True, metavar=metavar, help=what)


def add_overwrite(
    parser: argparse.ArgumentParser, what: str = "replace a model folder at --output"
) -> None:
    parser.add_argument("--overwrite", action="store_true", help=what)


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all that is used whole and compare it with the digests that it was written with "
        "(default: only what has changed since it was last read whole)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default the first GPU, else the CPU)")


def add_batch_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-tokens",
        action=AtLeastOne,
        help="tokens per forward pass (default 4096 on CPU, 32768 on GPU)",
    )


def add_batch_size(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        help=f"{what} (default %(default)s); a model of this project takes as many texts as fit "
        "into a number of tokens",
    )


def add_max_queries(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-queries",
        action=AtLeastOne,
        default=1000,
        help="rows taken of a raw dataset, evenly spaced (default %(default)s)",
    )


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add `--tasks` and `--benchmark`, as `ml_embed.evaluation.mteb.find_tasks` takes them."""
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="NAME", help="mteb tasks, e.g. SciFact STS22.v2"
    )
    parser.add_argument(
        "--benchmark",
        metavar="NAME",
        help="all tasks of a benchmark, e.g. 'MTEB(Multilingual, v2)'",
    )


def add_prompts(parser: argparse.ArgumentParser, whose: str) -> None:
    """Add the prompts of a model without saved ones."""
    for flag, texts in (("--query-prompt", "queries"), ("--passage-prompt", "documents")):
        parser.add_argument(
            flag, default="", metavar="TEXT", help=f"put before {texts} for the {whose}"
        )


def add_task_prompts(parser: argparse.ArgumentParser) -> None:
    """Add what goes before the saved prompts of a model, in mteb's tasks."""
    parser.add_argument(
        "--config",
        type=home_path,
        metavar="FILE",
        help="its `datasets` say prompt and passage_prompt by the name of a task or a pattern; "
        "they go before the folder's",
    )
    for flag, texts in (("--query-prompt", "queries"), ("--passage-prompt", "documents")):
        parser.add_argument(
            flag, metavar="TEXT", help=f"in front of {texts} of all tasks instead of these"
        )


def add_cut(parser: argparse.ArgumentParser, many: bool, default: str) -> None:
    """Add `--rank --depth --dim`, each with one value or, with `many`, with several.

    Args:
        default: what stands for a flag that is left out, for the help.
    """
    for axis, meaning in (
        ("rank", "rank of the token factors"),
        ("depth", "decoder layers"),
        ("dim", "vector length"),
    ):
        help_text = f"{meaning}{', one or several' * many} (default {default})"
        several: dict[str, Any] = {"nargs": "+"} if many else {}
        former = (f"--{axis}s",) * many
        add_renamed(parser, f"--{axis}", *former, type=int, metavar="N", help=help_text, **several)


def add_refactor(parser: argparse.ArgumentParser, *former: str) -> None:
    add_renamed(
        parser,
        "--refactor",
        *former,
        type=home_path,
        metavar="DATA",
        help="make smaller ranks of the token factors the best ones for tokens as frequent as in "
        "this folder of tokenized data; the model stays the same at its whole rank",
    )


def add_renamed(
    parser: argparse.ArgumentParser, flag: str, *former: str, required: bool = False, **options: Any
) -> None:
    """Add a flag of which former names are still taken, but no longer shown."""
    names = parser.add_mutually_exclusive_group(required=required)
    names.add_argument(flag, **options)
    hidden = {"dest": flag.removeprefix("--"), "help": argparse.SUPPRESS}
    for name in former:
        names.add_argument(name, **options | hidden)
