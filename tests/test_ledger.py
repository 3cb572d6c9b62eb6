"""The ledger never forgets a spent step, and never mixes runs."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from dpfast.errors import BudgetExhausted, LedgerError, PrivacyError
from dpfast.privacy import GaussianRelease, Ledger, Plan, entropy, read_ledger
from dpfast.testing import injected_entropy


def make_plan(**changes):
    values = {
        "dataset_size": 1000,
        "expected_batch_size": 100,
        "max_grad_norm": 1.0,
        "steps": 4,
        "target_delta": 1e-5,
        "noise_multiplier": 2.0,
    }
    return Plan(**{**values, **changes})


PLAN = make_plan()
ONCE = GaussianRelease(description="once", noise_multiplier=9.0)
TWICE = GaussianRelease(description="twice", noise_multiplier=12.0, count=2)
WITH_RELEASES = make_plan(other_releases=[ONCE, TWICE])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "ledger.jsonl"


def spend(path, *steps, plan=PLAN):
    with Ledger(path, plan) as ledger:
        for step in steps:
            ledger.charge(step)
        return ledger.charged_steps


def test_steps_are_remembered(path):
    assert spend(path) == 0
    assert spend(path, 1, 2) == 2
    assert spend(path, 3) == 3
    assert read_ledger(path).charged_steps == 3
    assert read_ledger(path).plan == PLAN


def test_in_memory_it_counts_the_same():
    with Ledger(None, PLAN) as ledger:
        for step in range(1, 5):
            ledger.charge(step)
        with pytest.raises(BudgetExhausted, match="all 4 planned steps"):
            ledger.charge(5)
        assert ledger.charged_steps == 4
        assert ledger.epsilon() == PLAN.epsilon()


@pytest.mark.parametrize("step", [0, 1, 3])
def test_only_the_next_step_can_be_charged(path, step):
    with Ledger(path, PLAN) as ledger:
        ledger.charge(1)
        with pytest.raises(LedgerError, match=f"expected step 2, got {step}"):
            ledger.charge(step)
    assert read_ledger(path).charged_steps == 1


def test_it_stops_at_the_budget_for_good(path):
    spend(path, 1, 2, 3, 4)
    with Ledger(path, PLAN) as ledger, pytest.raises(BudgetExhausted, match="another Plan"):
        ledger.charge(5)
    assert read_ledger(path).charged_steps == 4


def test_the_record_is_on_disk_when_charge_returns(path, monkeypatch):
    events = []
    real_write, real_sync = os.pwrite, os.fsync
    with Ledger(path, PLAN) as ledger:
        monkeypatch.setattr(os, "pwrite", lambda *a: events.append("write") or real_write(*a))
        monkeypatch.setattr(os, "fsync", lambda fd: events.append("sync") or real_sync(fd))
        ledger.charge(1)
        assert events == ["write", "sync"]
        assert read_ledger(path).charged_steps == 1


def test_cut_off_at_any_byte_no_whole_or_begun_step_is_lost(path):
    spend(path, 1, 2)
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in [*range(0, ends[0] - 2, 17), *range(ends[0] - 2, len(content) + 1)]:
        path.write_bytes(content[:cut])
        # Whole lines after the header, and one more when the cut falls inside a later line.
        expected = sum(end <= cut for end in ends[1:]) + (cut > ends[0] and cut not in ends)
        if cut >= ends[0]:
            assert read_ledger(path).charged_steps == expected
        assert spend(path) == max(0, expected)
        assert spend(path) == max(0, expected)
        whole = path.read_bytes()
        assert whole == content[: ends[max(0, expected)]]


def test_a_torn_tail_longer_than_a_record_counts_once(path):
    spend(path, 1)
    with path.open("ab") as file:
        file.write(b"\0" * 4096)
    assert spend(path) == 2
    assert spend(path, 3) == 3


def test_a_torn_tail_beyond_the_plan_is_damage(path):
    spend(path, 1, 2, 3, 4)
    with path.open("ab") as file:
        file.write(b"{")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="more than the 4 planned steps"):
        Ledger(path, PLAN)
    assert path.read_bytes() == before


def altered(lines, foreign):
    """Every way of altering a ledger of three steps, by name."""
    yield "changed step", [*lines[:2], lines[2].replace(b'"step": 2', b'"step": 7'), lines[3]]
    yield "changed plan", [lines[0].replace(b'"steps": 4', b'"steps": 9'), *lines[1:]]
    yield "changed checksum", [*lines[:3], lines[3][:-6] + b'0000"}']
    yield "dropped line", [lines[0], lines[1], lines[3]]
    yield "dropped first step", [lines[0], *lines[2:]]
    yield "swapped lines", [lines[0], lines[2], lines[1], lines[3]]
    yield "repeated line", [*lines, lines[3]]
    yield "empty line", [*lines[:2], b"", *lines[2:]]
    yield "not JSON", [*lines[:2], b"\xff\xfe", *lines[2:]]
    yield "no header", lines[1:]
    yield "line of another ledger", [*lines[:3], foreign[3]]


def test_alterations_are_refused_and_left_as_they_are(path):
    other = path.with_name("other")
    spend(path, 1, 2, 3)
    spend(other, 1, 2, 3, plan=make_plan(steps=5))
    for name, lines in altered(path.read_bytes().splitlines(), other.read_bytes().splitlines()):
        content = b"\n".join([*lines, b""])
        path.write_bytes(content)
        with pytest.raises(LedgerError, match=r"altered|not a ledger"):
            Ledger(path, PLAN)
        with pytest.raises(LedgerError, match=r"altered|not a ledger"):
            read_ledger(path)
        assert path.read_bytes() == content, name


def test_another_plan_is_refused_with_the_difference(path):
    spend(path, 1)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"another plan \(steps: 4 there, 5 here\)"):
        Ledger(path, make_plan(steps=5))
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"my thesis", b"my\nthesis\n", b"\x80\x02", b"{}\n", b"[1]\n"])
def test_a_foreign_file_is_refused_and_kept(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="not a ledger"):
        Ledger(path, PLAN)
    assert path.read_bytes() == content


def test_unusable_paths(tmp_path):
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger(tmp_path, PLAN)
    with pytest.raises(LedgerError, match="cannot be read"):
        read_ledger(tmp_path / "missing")


def test_a_second_opening_is_refused_until_the_first_closes(path):
    ledger = Ledger(path, PLAN)
    with pytest.raises(LedgerError, match="in use by another process"):
        Ledger(path, PLAN)
    ledger.charge(1)
    ledger.close()
    ledger.close()
    assert spend(path, 2) == 2
    with pytest.raises(LedgerError, match="closed"):
        ledger.charge(3)


def test_the_lock_is_seen_by_other_processes(path):
    lock = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with Ledger(path, PLAN):
        ran = subprocess.run([sys.executable, "-c", lock, str(path)], capture_output=True, text=True)
        assert "BlockingIOError" in ran.stderr
    assert subprocess.run([sys.executable, "-c", lock, str(path)]).returncode == 0


def test_a_refused_opening_releases_the_lock(path):
    spend(path, 1)
    with pytest.raises(LedgerError, match="another plan"):
        Ledger(path, make_plan(steps=5))
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("broken", "spent"), [("pwrite", 1), ("fsync", 2)])
def test_a_full_disk_refuses_the_step_and_loses_none(path, monkeypatch, broken, spent):
    with Ledger(path, PLAN) as ledger:
        ledger.charge(1)
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, full_disk)
            with pytest.raises(LedgerError, match="No space left"):
                ledger.charge(2)
        with pytest.raises(LedgerError, match="closed"):
            ledger.charge(2)
    assert spend(path) == spent


def test_half_a_record_on_a_full_disk_is_a_spent_step(path, monkeypatch):
    real = os.pwrite

    def half(fd, data, offset):
        monkeypatch.setattr(os, "pwrite", full_disk)
        return real(fd, data[: len(data) // 2], offset)

    with Ledger(path, PLAN) as ledger:
        monkeypatch.setattr(os, "pwrite", half)
        with pytest.raises(LedgerError, match="No space left"):
            ledger.charge(1)
    monkeypatch.setattr(os, "pwrite", real)
    assert spend(path) == 1


@pytest.mark.parametrize("how", ["deleted", "grown", "cut"])
def test_a_file_changed_while_in_use_stops_the_run(path, how):
    with Ledger(path, PLAN) as ledger:
        ledger.charge(1)
        if how == "deleted":
            path.unlink()
        else:
            content = path.read_bytes()
            path.write_bytes(content + b"x" if how == "grown" else content[:-9])
        with pytest.raises(LedgerError, match="changed or deleted"):
            ledger.charge(2)


def test_nothing_in_it_depends_on_the_clock_or_the_run(tmp_path):
    for name in ("a", "b"):
        spend(tmp_path / name, 1, 2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    header, record, _ = map(json.loads, (tmp_path / "a").read_text().splitlines())
    assert header["fingerprint"] == PLAN.fingerprint()
    assert set(record) == {"step", "checksum"}


def test_test_entropy_marks_what_it_writes(path):
    spend(path, 1)
    assert not read_ledger(path).test_entropy
    with injected_entropy(0):
        spend(path, 2)
    assert entropy.TEST_ENTROPY == "TEST ENTROPY: no guarantee"
    assert entropy.TEST_ENTROPY in path.read_text().splitlines()[2]
    assert read_ledger(path).test_entropy
    with Ledger(path, PLAN) as ledger:
        assert ledger.test_entropy


def test_unsafe_debug_marks_what_it_writes_and_nothing_else(path):
    spend(path, 1)
    usual = path.read_bytes()
    assert not read_ledger(path).unsafe_debug
    with Ledger(path, PLAN, unsafe_debug=True) as ledger:
        ledger.charge(2)
        assert ledger.unsafe_debug
    spend(path, 3)
    assert path.read_bytes().startswith(usual)
    assert ["UNSAFE DEBUG" in line for line in path.read_text().splitlines()] == [False, False, True, False]
    assert read_ledger(path).unsafe_debug
    with Ledger(path, PLAN) as ledger:
        assert ledger.unsafe_debug
    path.write_bytes(path.read_bytes().replace(b"UNSAFE DEBUG", b"SAFE NOT SO "))
    with pytest.raises(LedgerError, match="altered"):
        read_ledger(path)


def test_a_ledger_that_begins_under_unsafe_debug_is_marked_from_its_first_line(path):
    with Ledger(path, PLAN, unsafe_debug=True) as ledger:
        assert ledger.unsafe_debug
    assert read_ledger(path).unsafe_debug
    assert Ledger(None, PLAN, unsafe_debug=True).unsafe_debug
    assert not Ledger(None, PLAN).unsafe_debug


@pytest.mark.parametrize("begun_with", [False, True])
def test_a_line_cut_off_is_completed_as_it_was_begun(path, begun_with):
    """Not as the next process marks its own."""
    with Ledger(path, WITH_RELEASES) as ledger:
        ledger.charge(1)
    start = path.stat().st_size
    with Ledger(path, WITH_RELEASES, unsafe_debug=begun_with) as ledger:
        ledger.charge_release(TWICE)
    content = path.read_bytes()
    told = content.index(b'"debug"' if begun_with else b'"checksum"', start) + len(b'"d')
    for cut in range(told, len(content)):
        path.write_bytes(content[:cut])
        found = read_ledger(path)
        assert (found.charged_steps, found.draws, found.unsafe_debug) == (1, 1, begun_with)
        with Ledger(path, WITH_RELEASES, unsafe_debug=not begun_with) as ledger:
            assert ledger.charged_steps == 1
        assert path.read_bytes() == content


# Other releases


def test_a_release_is_drawn_as_often_as_planned_and_never_again(path):
    with Ledger(path, WITH_RELEASES) as ledger:
        ledger.charge_release(TWICE)
        ledger.charge(1)
        ledger.charge_release(ONCE)
    with Ledger(path, WITH_RELEASES) as ledger:
        ledger.charge_release(TWICE)
        ledger.charge(2)
        for release in (ONCE, TWICE):
            with pytest.raises(BudgetExhausted, match=f"all planned draws of .*{release.description}"):
                ledger.charge_release(release)
        assert ledger.charged_steps == 2
        assert ledger.epsilon() == WITH_RELEASES.epsilon(2)
    assert read_ledger(path).charged_steps == 2
    assert read_ledger(path).draws == 3


def test_a_release_listed_twice_is_two_draws():
    with Ledger(None, make_plan(other_releases=[ONCE, ONCE])) as ledger:
        ledger.charge_release(ONCE)
        ledger.charge_release(ONCE)
        with pytest.raises(BudgetExhausted):
            ledger.charge_release(ONCE)


@pytest.mark.parametrize("changes", [{"noise_multiplier": 8.9}, {"count": 3}, {"description": "thrice"}])
def test_a_release_that_the_plan_does_not_list_is_refused(path, changes):
    other = GaussianRelease(**{**vars(TWICE), **changes})
    with Ledger(path, WITH_RELEASES) as ledger, pytest.raises(PrivacyError, match=r"not accounted for.*list it there"):
        ledger.charge_release(other)
    assert b'release": 1' not in path.read_bytes()


def test_the_draw_is_on_disk_when_its_charge_returns(path, monkeypatch):
    events = []
    real_write, real_sync = os.pwrite, os.fsync
    with Ledger(path, WITH_RELEASES) as ledger:
        monkeypatch.setattr(os, "pwrite", lambda *a: events.append("write") or real_write(*a))
        monkeypatch.setattr(os, "fsync", lambda fd: events.append("sync") or real_sync(fd))
        ledger.charge_release(ONCE)
    assert events == ["write", "sync"]
    with pytest.raises(LedgerError, match="closed"):
        ledger.charge_release(TWICE)


def left(ledger, release):
    """Draws that the ledger still allows, none of them taken back."""
    count = 0
    while True:
        try:
            ledger.charge_release(release)
        except BudgetExhausted:
            return count
        count += 1


def test_a_draw_cut_off_at_any_byte_is_spent_where_it_can_be_told(path):
    spend(path, 1, 2, 3, 4, plan=WITH_RELEASES)
    with Ledger(path, WITH_RELEASES) as ledger:
        ledger.charge_release(TWICE)
        start = path.stat().st_size
        ledger.charge_release(TWICE)
    content = path.read_bytes()
    for cut in range(start, len(content) + 1):
        path.write_bytes(content[:cut])
        assert read_ledger(path).charged_steps == 4
        with Ledger(path, WITH_RELEASES) as ledger:
            assert ledger.charged_steps == 4
            assert path.read_bytes()[:cut] == content[:cut] or cut < start + len('{"release": 1')
            # Up to the number nothing says which release it was: one of those that are left has been spent.
            spent = 3 - left(ledger, ONCE) - left(ledger, TWICE) - 1
            assert spent == (cut > start)


def test_a_cut_off_draw_is_no_step_where_steps_are_left(path):
    with Ledger(path, WITH_RELEASES) as ledger:
        ledger.charge_release(ONCE)
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    assert read_ledger(path).charged_steps == 0
    with Ledger(path, WITH_RELEASES) as ledger:
        assert ledger.charged_steps == 0
        with pytest.raises(BudgetExhausted):
            ledger.charge_release(ONCE)
    assert path.read_bytes() == content


def test_draws_beyond_the_plan_are_damage(path):
    with Ledger(path, WITH_RELEASES) as ledger:
        ledger.charge_release(ONCE)
        state = ledger._state
        for forged in ({"release": 0, "draw": 2}, {"release": 2, "draw": 1}, {"release": -1, "draw": 1}):
            before = path.read_bytes()
            path.write_bytes(before + state.line(forged))
            with pytest.raises(LedgerError, match="planned releases"):
                read_ledger(path)
            path.write_bytes(before)
        for forged in ({"release": 0, "draw": 1}, {"release": 1, "draw": 2}, {"release": [1], "draw": 1}):
            path.write_bytes(before + state.line(forged))
            with pytest.raises(LedgerError, match="the next draw of another release; the file was altered"):
                read_ledger(path)
