"""Probes and checkpoints keep to their share of the time, and probes are not forgotten meanwhile."""

import pytest

from dpfast import pace as module
from dpfast.pace import Allowance, Pace


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_an_allowance_is_a_moment_and_a_share_of_the_time(clock):
    allowance = Allowance()
    with allowance.spending():
        clock.now += 1.5
    assert not allowance.is_left()
    clock.now += 590
    assert not allowance.is_left()  # for as much again
    clock.now += 10
    assert allowance.is_left()


def test_what_is_spent_counts_also_where_it_fails(clock):
    allowance = Allowance()

    def fail():
        with allowance.spending():
            clock.now += 3
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not allowance.is_left()


def test_probes_are_due_after_powers_of_two(clock):
    pace, taken = Pace(), []
    assert not pace.take()
    for change in range(1, 20):
        pace.changed("parameters")
        if pace.take():
            taken.append(change)
    assert taken == [1, 2, 4, 8, 16]


def test_what_has_changed_is_taken_where_somebody_insists(clock):
    pace = Pace()
    pace.insist()
    assert not pace.take()  # nothing has
    taken = []
    for change in range(1, 20):
        pace.changed("parameters")
        if change == 19:
            pace.insist()
        if pace.take():
            taken.append(change)
            with pace.spending(repeated=True):
                clock.now += 9
    assert taken == [1, 19]
    pace.insist()
    assert not pace.take()


def test_each_kind_of_change_is_counted_by_itself(clock):
    pace = Pace()
    for _ in range(3):
        pace.changed("parameters")
    assert pace.take()
    assert not pace.take()
    pace.changed("buffers")
    assert pace.take()


def test_a_probe_that_is_due_waits_until_there_is_time(clock):
    pace = Pace()
    with pace.spending(repeated=False):
        clock.now += 50
    pace.changed("parameters")
    assert pace.take()
    with pace.spending(repeated=True):
        clock.now += 4
    pace.changed("parameters")
    assert not pace.take()
    for _ in range(10):
        clock.now += 140
        pace.changed("parameters")
        assert not pace.take()
    clock.now += 200
    assert pace.take()
    assert not pace.take()


def test_what_is_shown_anew_in_every_step_leaves_the_allowance_to_the_others(clock):
    pace, taken = Pace(), []
    for change in range(1, 2100):
        pace.changed("parameters")
        if pace.take():
            taken.append(change)
            with pace.spending(repeated=True):
                clock.now += 0.01
        with pace.spending(repeated=False):
            clock.now += 0.01
        clock.now += 0.1
    assert taken == [2**power for power in range(12)]


def test_what_is_shown_for_the_first_time_again_is_free_again(clock):
    pace = Pace()
    pace.changed("parameters")
    assert pace.take()
    with pace.spending(repeated=True):
        clock.now += 9
    pace.begin()
    with pace.spending(repeated=True):
        clock.now += 9
    pace.changed("parameters")
    assert pace.take()
