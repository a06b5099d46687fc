"""Notices go to stderr once, results to stdout, and --quiet leaves warnings only."""

import argparse
import logging

import pytest

from ml_embed import notices


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
