"""Callbacks of ``DPTrainer``: a CSV file, TensorBoard, or anything of one's own.

Guarantee: what a callback is given of a step (``StepReport``) is public, or computed from what the step has noised:
neither losses nor norms or factors of examples, nor how many of them a step drew. No times either: how long a step took
tells how many it drew. What the loggers write is that and nothing else, so it is covered by the epsilon that the ledger
holds, as the weights after every step are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

import torch
from torch import Tensor, nn

from dpfast.diagnostics import StepReport, Watch
from dpfast.errors import ConfigError, FileError
from dpfast.files import make_folder
from dpfast.privacy.plan import Plan
from dpfast.ranks import Ranks
from dpfast.ranks.alone import Alone

_PREFIX = "dpfast/"  # of TensorBoard's tags


class Training(Protocol):
    """What callbacks may know of a trainer: a ``DPTrainer`` is one."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def ranks(self) -> Ranks: ...

    @property
    def plan(self) -> Plan: ...

    @property
    def charged_steps(self) -> int: ...

    @property
    def lost_steps(self) -> int: ...

    def report_of(self, step: int) -> StepReport:
        """What is known of a step without its diagnostics, before it or after."""

    def averages(self) -> list[Tensor] | None:
        """Of the parameters, in their order, in the averaged model; None without one."""


class Callback(Protocol):
    """Inherit from it and define what is wanted; the rest does nothing. What it raises ends the training, which can go
    on later: a step that was reported is charged, and saved if a checkpoint was due.

    A callback sees the trainer, and with it the private data: what it shows of those, nobody accounts for. Of several
    ranks, rank 0 alone calls its callbacks, in which collectives are refused (``ConfigError``).
    """

    def on_begin(self, trainer: Training) -> None:
        """Before the first step of a call of ``fit``, when what there was before is loaded."""

    def on_step(self, report: StepReport) -> None:
        """After each step, and its checkpoint if one was due."""

    def on_end(self, trainer: Training) -> None:
        """At the end of ``fit``, however it ends, if ``on_begin`` was called."""


class Callbacks:
    """Those of one ``fit``: ``with Callbacks(...) as callbacks``, ``begin``, ``step`` after each step."""

    def __init__(self, callbacks: Sequence[Callback], trainer: Training) -> None:
        self._ranks = trainer.ranks
        self._callbacks, self._trainer = callbacks if self._ranks.leads else (), trainer
        self._watches = any(self._ranks.tell(bool(callbacks))) and trainer.plan.is_private
        self._stack = ExitStack()
        self._watch: Watch | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, traceback)

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """optimizer: the inner one, of which a ``DPOptimizer`` was made."""
        if self._watches:
            self._watch = Watch(optimizer, self._trainer.plan, self._ranks)
            self._stack.callback(self._watch.close)
        self._ranks.first(self._begin)

    def _begin(self) -> None:
        for callback in self._callbacks:
            self._stack.callback(self._called, callback.on_end, self._trainer)
            self._called(callback.on_begin, self._trainer)

    def _called(self, method: Callable[[Any], None], argument: Any) -> None:
        """On rank 0."""
        with Alone(method.__qualname__) if self._ranks.size > 1 else nullcontext():
            method(argument)

    def step(self, step: int) -> None:
        """Report it."""
        trainer, report = self._trainer, self._trainer.report_of(step)
        if self._watch is not None:
            report = replace(report, diagnostics=self._watch.diagnostics(trainer.model, trainer.averages()))

        def tell() -> None:
            for callback in self._callbacks:
                self._called(callback.on_step, report)

        self._ranks.first(tell)


def values(report: StepReport) -> dict[str, float | None]:
    """Everything that the loggers write of a step, by name; None: not known.

    Why each is no release of its own:

    - ``epsilon_at_most``, ``learning_rate`` (``learning_rate_1``, ... of further groups), ``expected_batch_size``,
      ``expected_noise_norm``: from the plan, the settings and the number of the step alone.
    - ``lost_steps``: of interruptions, which are out of scope as crashes are.
    - ``parameter_norm``, ``update_norm``, ``noised_gradient_norm``, ``noise_share``, ``ema_distance``: functions of the
      noised gradient and of the weights, which are private as they are (post-processing).
    """
    first, *others = report.learning_rates
    found: dict[str, float | None] = {"epsilon_at_most": report.epsilon, "learning_rate": first}
    found |= {f"learning_rate_{number}": rate for number, rate in enumerate(others, 1)}
    found |= {"expected_batch_size": report.expected_batch_size, "lost_steps": report.lost_steps}
    names = (
        "parameter_norm",
        "update_norm",
        "noised_gradient_norm",
        "expected_noise_norm",
        "noise_share",
        "ema_distance",
    )
    return found | {name: getattr(report.diagnostics, name, None) for name in names}


def _missing(trainer: Training, last: int, where: Path) -> Iterator[StepReport]:
    """Steps that are charged and not written after ``last``: a process ended in between."""
    if last > trainer.charged_steps:
        raise FileError(
            f"{where}: it has step {last}, the training has taken {trainer.charged_steps}: it belongs to another"
            " training. Give another path, or move it away"
        )
    return (trainer.report_of(step) for step in range(last + 1, trainer.charged_steps + 1))


class CSVLogger(Callback):
    """A line for each step in the file ``path``: its number and ``values``, empty where not known.

    Each line is in the file before the next step begins. Resumed training appends; a line that a kill has cut off, and
    steps that were charged and not written, are written then, without what only that process knew.

    Raises:
        FileError: the file cannot be written, or is of another training (other columns, more steps).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def on_begin(self, trainer: Training) -> None:
        """Open the file, and write what is missing in it."""
        head = ",".join(["step", *values(trainer.report_of(1))])
        try:
            make_folder(self.path.parent)
            last = self._cut_to_whole_lines(head)
            missing = _missing(trainer, last, self.path)
            self._file = self.path.open("a", encoding="utf-8", newline="")
            if self.path.stat().st_size == 0:
                self._line(head)
        except OSError as error:
            raise self._unwritten(error) from error
        for report in missing:
            self.on_step(report)

    def on_step(self, report: StepReport) -> None:
        """Write it."""
        written = ("" if value is None else f"{value:.9g}" for value in values(report).values())
        try:
            self._line(",".join([str(report.step), *written]))
        except OSError as error:
            raise self._unwritten(error) from error

    def on_end(self, trainer: Training) -> None:  # noqa: ARG002
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _line(self, text: str) -> None:
        assert self._file is not None
        self._file.write(text + "\n")
        self._file.flush()

    def _cut_to_whole_lines(self, head: str) -> int:
        """The last step in the file, 0 where there is none."""
        if not self.path.exists():
            return 0
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode(errors="replace").splitlines() or [head]
        first, _, _ = lines[-1].partition(",")
        last = first if len(lines) > 1 else "0"
        begun = bool(whole) or head.encode().startswith(content)  # by a kill within the first line
        if not begun or lines[0] != head or not last.isdecimal():
            raise FileError(
                f"{self.path}: expected the columns {head}; it is of something else, or damaged. Give another path"
            )
        if whole != content:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return int(last)

    def _unwritten(self, error: OSError) -> FileError:
        return FileError(f"cannot write {self.path}: {error.strerror}; make room or give another path, then run again")


class TensorBoardLogger(Callback):
    """``values`` of each step as scalars for TensorBoard, in a file of events of its own for each process that trains.

    As ``CSVLogger`` has it: every step once, written before the next begins. All events bear the time at which the
    process began, by the minute: their own would tell how many images steps drew.

    Raises:
        ConfigError: the package ``tensorboard`` is not installed.
        FileError: the folder cannot be written, or its events are of another training.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._writer: Any = None
        self._began = 0.0
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "TensorBoardLogger: the package tensorboard is not installed: pip install tensorboard, or use CSVLogger"
            ) from error

    def on_begin(self, trainer: Training) -> None:
        """Begin a file, and write what is missing in those that are there."""
        from torch.utils.tensorboard import FileWriter

        missing = _missing(trainer, self._last_step(), self.folder)
        self._began = time.time() // 60 * 60
        try:
            make_folder(self.folder)
            self._writer = FileWriter(str(self.folder))
        except OSError as error:
            raise self._unwritten(error) from error
        for report in missing:
            self.on_step(report)

    def on_step(self, report: StepReport) -> None:
        """Write it, as one record: a kill leaves all of its values or none."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        known = {name: value for name, value in values(report).items() if value is not None}
        scalars = [Summary.Value(tag=_PREFIX + name, simple_value=value) for name, value in known.items()]
        try:
            self._writer.add_summary(Summary(value=scalars), global_step=report.step, walltime=self._began)
            self._writer.flush()
        except OSError as error:
            raise self._unwritten(error) from error

    def on_end(self, trainer: Training) -> None:  # noqa: ARG002
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _last_step(self) -> int:
        """In all files of events that hold scalars of ours; a record that a kill has cut off does not count."""
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        last = 0
        for path in sorted(self.folder.glob("events.out.tfevents.*")):
            for event in LegacyEventFileLoader(str(path)).Load():
                if any(value.tag.startswith(_PREFIX) for value in event.summary.value):
                    last = max(last, event.step)
        return last

    def _unwritten(self, error: OSError) -> FileError:
        return FileError(f"cannot write in {self.folder}: {error.strerror}; make room or give another, then run again")
