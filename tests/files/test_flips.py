"""No flipped bit passes unnoticed: the short form of `tests/faults/flip.py`, and a longer one."""

import collections

import pytest
from faults.flip import KINDS, try_one


def outcomes(seeds, folder) -> tuple[collections.Counter, set[str]]:
    """How often each outcome came, and the kinds of files that were damaged."""
    cases = [try_one(seed, folder / str(seed)) for seed in seeds]
    wrong = [case for case in cases if case["outcome"] not in ("equal", "error")]
    assert not wrong, wrong
    kinds = {case["what"].split(":")[0] for case in cases}
    return collections.Counter(case["outcome"] for case in cases), kinds


def test_a_flipped_bit_is_named_or_changes_nothing(tmp_path):
    found, _ = outcomes(range(10), tmp_path)
    assert found["error"] >= 4, "or what is flipped is read by nobody"


@pytest.mark.slow
def test_200_flipped_bits(tmp_path):
    found, kinds = outcomes(range(1000, 1200), tmp_path)
    assert found["error"] >= 80
    assert kinds == set(KINDS)
