"""Notices: what a command says beside its results, on stderr. Results are printed on stdout.

Notices are records of Python's `logging` under the name "ml_embed": a program that uses the package
as a library decides itself whether to show them. Commands show them above their progress bars, on
the main process only.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

_logger = logging.getLogger("ml_embed")


def notice(text: str, level: int = logging.INFO) -> None:
    """Say something that a user of a command may want to know, once for all processes."""
    # accelerate.logging would do, but for the "[RANK 0]" that it puts before each line, and its
    # refusal where no accelerator was made.
    if _is_main_process():
        _logger.log(level, text)


def _is_main_process() -> bool:
    # Not imported: that loads torch, which not every command needs, nor one without processes.
    state = sys.modules.get("accelerate.state")
    return not (state and state.PartialState._shared_state) or state.PartialState().is_main_process


def warn(text: str) -> None:
    """Say something that a user has to know; `--quiet` does not silence it."""
    notice(f"warning: {text}", logging.WARNING)


def parse_command(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse a command's arguments, with `--quiet` and `--verbose`, and show notices accordingly."""
    flags = parser.add_mutually_exclusive_group()
    flags.add_argument("--quiet", action="store_true", help="no notices and no progress bars")
    flags.add_argument("--verbose", action="store_true", help="also what helps to find a problem")
    options = parser.parse_args(arguments)
    _logger.setLevel(
        logging.WARNING if options.quiet else logging.DEBUG if options.verbose else logging.INFO
    )
    if options.quiet:
        os.environ["TQDM_DISABLE"] = "1"  # the bars of libraries, which are imported later
    _logger.propagate = False
    _logger.handlers = [_AboveBars()]
    del options.quiet, options.verbose  # known here from now on: the rest is the command's own
    return options


def bars_wanted() -> bool:
    """False after `--quiet`, and on all processes but the first."""
    return _logger.level <= logging.INFO and _is_main_process()


class _AboveBars(logging.Handler):
    """Writes above progress bars instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)
