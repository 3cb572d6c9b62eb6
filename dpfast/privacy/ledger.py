"""The ledger: which steps have been spent, and which other releases drawn, written down before each is.

A JSON-lines file. First line: the plan, its fingerprint, the library version. Then one line a step, and one a draw
of another release (by its place in the plan's list). Each line ends in the SHA-256 of the line before it and itself,
so that nothing can be changed, dropped or reordered unseen. Nothing in it depends on the data or on the clock.
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dpfast.errors import BudgetExhausted, LedgerError, PrivacyError
from dpfast.files import lock, make_folder, sync_folder
from dpfast.privacy import entropy
from dpfast.privacy.plan import Plan
from dpfast.privacy.releases import GaussianRelease
from dpfast.unnoised import MARK

_KIND = "dpfast ledger 1"
_ADDS = "what was spent stays spent and adds to its epsilon"
_RESTORE = f"Restore a copy made after its last step, or begin elsewhere: {_ADDS}"


def all_spent(plan: Plan) -> str:
    """What is said where a step is asked for after the plan's last."""
    return f"all {plan.steps} planned steps are spent; a longer training is another Plan, from its first step on"


def library_version() -> str:
    """Version of the installed dpfast, for what is written down."""
    try:
        return version("dpfast")
    except PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True, kw_only=True)
class LedgerContents:
    """What a ledger file says. draws: of other releases, all together. ``test_entropy``: some of it was written under
    ``injected_entropy``, ``unsafe_debug``: under that of ``DPTrainer``.
    """

    plan: Plan
    charged_steps: int
    draws: int
    test_entropy: bool
    unsafe_debug: bool


class Ledger:
    """The spent steps of one plan, on disk (``path``) or, with ``path=None``, for the life of the object.

    unsafe_debug: every line written by this object carries the mark that un-noised values are shown.

    Guarantee: when ``charge(n)`` returns, step n is on stable storage as spent; a crash at any moment loses
    no spent step. A last line that was cut off by a crash counts as spent and is completed when the file is
    opened again. No second process (or object) can open the file meanwhile. An old copy put back in its place
    is not noticed, and checksums find accidents, not a forger.

    Raises LedgerError, and leaves the file as it was, when the file belongs to another plan, has been
    altered, is not a ledger, or is in use, and FileError when its file system knows no locks.
    """

    def __init__(self, path: str | os.PathLike[str] | None, plan: Plan, *, unsafe_debug: bool = False) -> None:
        self.plan = plan
        self._marks_debug = unsafe_debug
        self.path = None if path is None else Path(path)
        self._fd: int | None = None
        self._closed = False
        self._state = _State()
        header = _header(plan, unsafe_debug)
        if self.path is None:
            self._state.add(header)
        else:
            self._open(self.path, header)

    @property
    def charged_steps(self) -> int:
        """Number of steps spent, whether or not their updates were ever applied."""
        return self._state.steps

    @property
    def test_entropy(self) -> bool:
        """True when any line was written under ``injected_entropy``."""
        return self._state.test_entropy

    @property
    def unsafe_debug(self) -> bool:
        """True when any line carries the mark that un-noised values are shown."""
        return self._state.unsafe_debug

    def epsilon(self) -> float:
        """Epsilon spent so far at the plan's delta, the plan's other releases included."""
        return self.plan.epsilon(self.charged_steps)

    def charge(self, step: int) -> None:
        """Record that ``step`` is spent, before it is taken. ``step`` is ``charged_steps + 1``, or
        LedgerError.

        Raises BudgetExhausted beyond the plan's last step. A record that cannot be written (a full disk) is a
        LedgerError: the step must not be taken, and the ledger must be opened again.
        """
        self._check_open()
        if step != self.charged_steps + 1:
            raise LedgerError(f"ledger {self._name}: expected step {self.charged_steps + 1}, got {step}")
        if step > self.plan.steps:
            raise BudgetExhausted(f"{all_spent(self.plan)}, and {_ADDS}")
        self._append(_record(step, self._marks_debug))

    def charge_release(self, release: GaussianRelease) -> None:
        """Record that one draw of ``release`` is spent, before it is drawn. ``epsilon()`` holds the cost of all its
        ``count`` draws from the beginning.

        Raises PrivacyError when the plan's ``other_releases`` do not list it, exactly as it is, and BudgetExhausted
        when all its draws are spent: what a crash lost is not drawn again.
        """
        self._check_open()
        places = [i for i, listed in enumerate(self.plan.other_releases) if listed == release]
        if not places:
            raise PrivacyError(
                f"{release} is not accounted for: expected it among other_releases of the Plan that this ledger belongs"
                f" to, which are {list(self.plan.other_releases)}; list it there, before anything is trained"
            )
        left = [i for i in places if self._state.draws[i] < release.count]
        if not left:
            raise BudgetExhausted(
                f"all planned draws of {release} are spent; more need another Plan, with a higher count, and {_ADDS}"
            )
        self._append(_draw(left[0], self._state.draws[left[0]] + 1, self._marks_debug))

    def close(self) -> None:
        """Release the file for other processes; what is written stays. May be called twice."""
        self._closed = True
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise LedgerError(f"ledger {self._name}: it is closed; open it again")

    @property
    def _name(self) -> str:
        return "in memory" if self.path is None else str(self.path)

    def _open(self, path: Path, header: dict[str, Any]) -> None:
        try:
            make_folder(path.parent)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise LedgerError(f"ledger {path}: cannot be opened ({error.strerror})") from error
        try:
            if not lock(self._fd, path):
                raise LedgerError(
                    f"ledger {path}: it is in use by another process, or a Ledger of this one; close that"
                )
            content = path.read_bytes()
            if b"\n" not in content:
                self._begin(path, header, content)
            else:
                self._resume(path, content)
            sync_folder(path.parent)  # whoever began it may have been killed before that
        except BaseException:
            self.close()
            raise

    def _begin(self, path: Path, header: dict[str, Any], content: bytes) -> None:
        """An empty file, or one whose first line a crash cut off: no step was ever charged in it."""
        could_be = [self._state.line(_header(self.plan, debug)) for debug in (True, False)]
        begun = content.rstrip(b"\0")  # a power cut may leave zeros
        if not any(line.startswith(begun) and len(content) <= len(line) for line in could_be):
            raise LedgerError(
                f"ledger {path}: this is not a ledger of this plan, and no step was ever charged in it; delete it if a"
                " crash left it, or choose another path"
            )
        self._append(header, over=len(content))

    def _resume(self, path: Path, content: bytes) -> None:
        found, torn = _parse(path, content)
        if not _is_of(found.header, self.plan):
            raise LedgerError(
                f"ledger {path}: it belongs to another plan ({_difference(found.header, self.plan)}): go on with that"
                f" one, or begin another ledger elsewhere, and {_ADDS}"
            )
        cut_off = _cut_off(path, found, self.plan, torn, self._marks_debug)
        self._state = found
        if cut_off is not None:
            # Written over the torn bytes, never truncated first: the file never shows fewer spent steps.
            self._append(cut_off, over=len(torn))

    def _append(self, record: dict[str, Any], over: int = 0) -> None:
        """Write one line after the last whole one (``over``: bytes of a torn line there), then count it."""
        line = self._state.line(record)
        if self._fd is not None:
            try:
                self._write(self._fd, line, self._state.size, over)
            except OSError as error:
                self.close()
                raise LedgerError(
                    f"ledger {self._name}: cannot record a step ({error.strerror}); nothing was trained on "
                    "it. Make room, then run again: the step counts as spent if part of its line was written"
                ) from error
        self._state.add(record)

    def _write(self, fd: int, line: bytes, offset: int, over: int) -> None:
        status = os.fstat(fd)
        if status.st_nlink == 0 or status.st_size != offset + over:
            self.close()
            raise LedgerError(
                f"ledger {self._name}: the file was changed or deleted by somebody else while in use. {_RESTORE}"
            )
        written = 0
        while written < len(line):
            written += os.pwrite(fd, line[written:], offset + written)
        if over > len(line):
            os.ftruncate(fd, offset + len(line))
        os.fsync(fd)


def read_ledger(path: str | os.PathLike[str]) -> LedgerContents:
    """What the ledger at ``path`` says, without lock or repair; a torn last line counts as spent."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"ledger {path}: cannot be read ({error.strerror}); nothing was changed") from error
    state, torn = _parse(path, content)
    try:
        plan = Plan.from_dict(state.header["plan"])
        of_it = _is_of(state.header, plan)
    except Exception as error:
        raise LedgerError(f"ledger {path}: its plan cannot be read by this version of dpfast ({error})") from error
    if not of_it:
        raise LedgerError(
            f"ledger {path}: its plan has another fingerprint than it says; the file was altered. {_RESTORE}"
        )
    cut_off = _cut_off(path, state, plan, torn)
    if cut_off is not None:
        state.add(cut_off)
    return LedgerContents(
        plan=plan,
        charged_steps=state.steps,
        draws=state.draws.total(),
        test_entropy=state.test_entropy,
        unsafe_debug=state.unsafe_debug,
    )


class _State:
    """The lines so far: their number, their bytes, the checksum that the next one continues."""

    def __init__(self) -> None:
        self.header: dict[str, Any] = {}
        self.steps = 0
        self.draws: Counter[int] = Counter()
        self.size = 0
        self.test_entropy = False
        self.unsafe_debug = False
        self._checksum = ""

    def line(self, record: dict[str, Any]) -> bytes:
        return (json.dumps({**record, "checksum": self._chained(record)}) + "\n").encode()

    def add(self, record: dict[str, Any]) -> None:
        self.size, self._checksum = self.size + len(self.line(record)), self._chained(record)
        self.test_entropy |= "entropy" in record
        self.unsafe_debug |= "debug" in record
        if not self.header:
            self.header = record
        elif "release" in record:
            self.draws[record["release"]] = record["draw"]
        else:
            self.steps = record["step"]

    def follows(self, record: dict[str, Any]) -> bool:
        """Whether the record is the next step, or the next draw of its release."""
        if "release" not in record:
            return _is_number(record.get("step"), self.steps + 1)
        place = record["release"]
        return type(place) is int and _is_number(record.get("draw"), self.draws[place] + 1)

    def _chained(self, record: dict[str, Any]) -> str:
        return hashlib.sha256((self._checksum + json.dumps(record)).encode()).hexdigest()


def _header(plan: Plan, debug: bool) -> dict[str, Any]:
    what = {"kind": _KIND, "dpfast": library_version()}
    return {**what, "fingerprint": plan.fingerprint(), "plan": plan.to_dict(), **_marks(debug)}


def _record(step: int, debug: bool) -> dict[str, Any]:
    return {"step": step, **_marks(debug)}


def _draw(place: int, draw: int, debug: bool) -> dict[str, Any]:
    return {"release": place, "draw": draw, **_marks(debug)}


def _marks(debug: bool) -> dict[str, str]:
    marks = {"entropy": entropy.TEST_ENTROPY} if entropy.is_injected() else {}
    return {**marks, "debug": MARK} if debug else marks


def _parse(path: Path, content: bytes) -> tuple[_State, bytes]:
    """Every whole line checked, and the bytes of a torn last line."""
    *lines, torn = content.split(b"\n")
    state = _State()
    for number, line in enumerate(lines):
        record = _decoded(line)
        if number == 0 and record.get("kind") != _KIND:
            raise LedgerError(f"ledger {path}: this is not a ledger; choose another path, or see what put it there")
        if number > 0 and not state.follows(record):
            expected = f"step {state.steps + 1} or the next draw of another release"
            raise LedgerError(
                f"ledger {path}, line {number + 1}: expected {expected}; the file was altered. {_RESTORE}"
            )
        record.pop("checksum", None)
        if state.line(record) != line + b"\n":
            raise LedgerError(f"ledger {path}, line {number + 1}: wrong checksum; the file was altered. {_RESTORE}")
        state.add(record)
    if not lines:
        raise LedgerError(f"ledger {path}: this is not a ledger, or no step was ever taken with it")
    return state, torn


def _cut_off(path: Path, state: _State, plan: Plan, torn: bytes, debug: bool = False) -> dict[str, Any] | None:
    """The record of a torn last line, which counts as spent; where it is not to be told, that of a step if any is left.

    debug: whether lines are marked now; who began the line may have marked otherwise.

    Raises LedgerError when there is more than the plan allows.
    """
    allowed = {i: r.count for i, r in enumerate(plan.other_releases) if isinstance(r, GaussianRelease)}
    could_be = []
    for marks in (debug, not debug):
        could_be += [_record(state.steps + 1, marks)] if state.steps < plan.steps else []
        could_be += [_draw(i, state.draws[i] + 1, marks) for i, count in allowed.items() if state.draws[i] < count]
    over_drawn = any(draws > allowed.get(i, 0) for i, draws in state.draws.items())
    if state.steps > plan.steps or over_drawn or (torn and not could_be):
        raise LedgerError(
            f"ledger {path}: it holds more than the {plan.steps} planned steps and the planned releases; it is damaged."
            f" {_RESTORE}"
        )
    begun = [record for record in could_be if state.line(record).startswith(torn)]
    return [*begun, *could_be][0] if torn else None


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_number(value: object, expected: int) -> bool:
    """1.0 and true are not 1."""
    return type(value) is int and value == expected


def _is_of(header: dict[str, Any], plan: Plan) -> bool:
    """Whether it names the plan, and says what is in it."""
    theirs, ours = (json.dumps(of, sort_keys=True) for of in (header.get("plan"), plan.to_dict()))
    return header.get("fingerprint") == plan.fingerprint() and theirs == ours


def _difference(header: dict[str, Any], plan: Plan) -> str:
    theirs, ours = header.get("plan"), plan.to_dict()
    if not isinstance(theirs, dict):
        return f"{theirs!r} there"
    names = [name for name in ours if theirs.get(name) != ours[name]]
    if not names:
        return f"fingerprint {header.get('fingerprint')!r} there"
    return "; ".join(f"{name}: {theirs.get(name)!r} there, {ours[name]!r} here" for name in names)
