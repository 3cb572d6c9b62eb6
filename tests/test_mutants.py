"""Known bugs of DP-SGD, planted: whoever should notice them does, and finds nothing without them."""

import re

import pytest

import catchers
import mutants
from dpfast.errors import CaptureError, PrivacyError

CATCHERS = sorted({mutant.catcher for mutant in mutants.MUTANTS})


@pytest.mark.parametrize("name", CATCHERS)
def test_nothing_is_caught_where_nothing_is_planted(name) -> None:
    getattr(catchers, name)()


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_caught(mutant, monkeypatch) -> None:
    calls = mutant.plant(monkeypatch)
    try:
        getattr(catchers, mutant.catcher)()
    except (AssertionError, CaptureError, PrivacyError):
        assert calls, "found before anything came by what was planted"
    else:
        pytest.fail(f"missed; calls of what was planted: {dict(calls)}")


def test_the_table_is_generated() -> None:
    (written,) = re.findall(r"<!-- mutants: begin[^\n]*\n(.*?)\n<!-- mutants: end", mutants.PAGE.read_text(), re.DOTALL)
    assert written == mutants.table()
