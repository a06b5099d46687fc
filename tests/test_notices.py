"""Notices go to stderr once, results to stdout, and --quiet leaves warnings only."""

import argparse
import logging
import subprocess
import sys

import pytest

from ml_embed import notices

LIBRARYS_BAR = """
import argparse, sys
from ml_embed import notices
notices.parse_command(argparse.ArgumentParser(), sys.argv[1:])
from tqdm import tqdm
list(tqdm(range(3)))
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Given back afterwards."""
    monkeypatch.setenv("TQDM_DISABLE", "")


def command(*flags):
    notices.parse_command(argparse.ArgumentParser(), flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "one\nwarning: two\n"),
        (("--quiet",), "warning: two\n"),
        (("--verbose",), "one\nwarning: two\nthree\n"),
    ],
)
def test_flags_choose_what_is_said(capsys, flags, said):
    command(*flags)
    notices.notice("one")
    notices.warn("two")
    notices.notice("three", logging.DEBUG)
    assert capsys.readouterr() == ("", said)
    assert notices.bars_wanted() == ("--quiet" not in flags)


def test_a_library_call_says_nothing_by_itself(capsys):
    notices.notice("one")
    assert capsys.readouterr() == ("", "")
    assert notices.bars_wanted()


def test_quiet_and_verbose_together_are_refused(capsys):
    with pytest.raises(SystemExit):
        command("--quiet", "--verbose")
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--quiet",)])
def test_quiet_silences_the_bars_of_libraries(flags):
    program = [sys.executable, "-c", LIBRARYS_BAR, *flags]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert bool(done.stderr) == ("--quiet" not in flags)
