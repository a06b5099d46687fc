"""`ml-embed COMMAND ...`: every command by one name, wherever the package is installed."""

import argparse
import ast
import importlib
import sys
from pathlib import Path

FILES = (
    "make_sample_datasets",
    "tokenize",
    "mine",
    "score_candidates",
    "init_backbone",
    "import_model",
    "prune_backbone",
    "embed_teacher",
    "estimate_scale",
    "train",
    "report",
    "evaluate",
    "evaluate_mteb",
    "import_prompts",
    "choose_cut",
    "average_checkpoints",
    "check_contamination",
    "export",
    "encode",
    "search",
    "replicate",
    "compare_dedicated",
    "compare_mel_init",
    "check_gpu",
    "bench_data",
    "bench_encode",
    "bench_gpu",
    "bench_tokenize",
    "bench_training",
    "build_sample_data",
)
"""The commands, in the order of a recipe; they are named like their files."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names with the others; its exit code."""
    commands = {file.replace("_", "-"): file for file in FILES}
    parser = argparse.ArgumentParser(
        prog="ml-embed",
        usage="%(prog)s COMMAND ...  (its flags: %(prog)s COMMAND --help)",
        description="Train, measure and cut nested multilingual embedding models.",
        epilog="\n".join(
            ["commands:", *(f"  {name:22}{summary(file)}" for name, file in commands.items())]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND", help="one of those below")
    given = sys.argv[1:] if arguments is None else arguments
    name = parser.parse_args(given[:1]).command
    sys.argv[0] = f"ml-embed {name}"  # what the command's own parser calls itself
    return importlib.import_module(f"ml_embed.commands.{commands[name]}").main(given[1:])


def summary(file: str) -> str:
    """The first line of a command's docstring, read without importing what the command needs."""
    source = Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
