"""Measurements one after the other, in a process of their own that may crash or hang; each gives a row of results.

A GPU that has met a bad address answers nothing more in the same process: another one goes on behind that measurement.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import results

Row = dict[str, Any]
AGAIN = 75  # exit status: the row is written, but this process can do no more
BEGINNING = 120  # seconds until the first measurement of a process
OVER = 60  # seconds after which nothing goes on any more


class Missing(Exception):
    """What a measurement needs is not there."""


@dataclass(frozen=True)
class Job:
    """run: gives a row. seconds: how long it usually takes at most. limit: when it has stopped for good."""

    name: str
    run: Callable[[], Row]
    seconds: float = 10
    limit: float = 180


@dataclass(frozen=True)
class Options:
    """only: a part of names. until: the time at which nothing more begins. first: the number of the first job."""

    part: str
    out: Path
    only: str = ""
    dry: bool = False
    until: float = 0.0
    first: int = 0
    progress: Path | None = None

    def command(self) -> list[str]:
        """That makes a process with these."""
        settings = ["--only", self.only, "--out", str(self.out), "--until", str(self.until), "--first", str(self.first)]
        return [self.part, *settings, "--progress", str(self.progress), *(["--dry"] if self.dry else [])]


def work(jobs: Iterable[Job], options: Options) -> None:
    """In a process of its own: every job in turn, and a line and a row for each."""
    left: list[str] = []
    for number, job in enumerate(jobs):
        if number < options.first or options.only not in job.name:
            continue
        if time.time() + job.seconds > options.until:
            left.append(job.name)
            continue
        note(options, {"number": number, "name": job.name, "limit": time.time() + job.limit, "left": left})
        begin = time.perf_counter()
        row = attempt(job)
        put(options, {"name": job.name, **row, "took": round(time.perf_counter() - begin, 2)})
        if "failed" in row and is_dead():
            sys.exit(AGAIN)
    note(options, {"limit": time.time() + OVER, "left": left})


def attempt(job: Job) -> Row:
    """Its row, or why there is none."""
    try:
        return job.run()
    except Missing as reason:
        return {"skipped": str(reason)}
    except Exception as failure:
        kind, message = type(failure).__name__, str(failure).strip().splitlines()
        if kind == "OutOfMemoryError":
            return {"failed": "out of memory"}
        return {"failed": f"{kind}: {message[0][:200] if message else ''}"}
    finally:
        release()


def release() -> None:
    """Memory that nobody uses."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # is_dead says it
            torch.cuda.empty_cache()


def is_dead() -> bool:
    """Whether the GPU no longer answers this process."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def note(options: Options, at: Row) -> None:
    """Where a process is, for the one that watches it. left: names of what it has left out."""
    if options.progress is not None:
        new = options.progress.with_suffix(".new")
        new.write_text(json.dumps({**at, "limit": min(at["limit"], options.until + OVER)}))
        new.replace(options.progress)


def put(options: Options, row: Row) -> None:
    """A row of results, and a line; one for all that is skipped for one reason. run: the same for all rows of one."""
    about = {"part": options.part, "dry": options.dry, "run": options.until}
    results.append(f"gpu-{options.part}", {**about, **row}, options.out)
    reason = options.part, row.get("skipped")
    if reason not in _SAID:
        print(line(row), flush=True)
    if "skipped" in row:
        _SAID.add(reason)


_SAID: set[tuple[str, str | None]] = set()


def line(row: Row) -> str:
    for what in ("skipped", "failed"):
        if what in row:
            return f"{what}: {row['name']}: {row[what]}"
    if "left_out" in row:
        names = row["left_out"]
        return f"left out, for want of time: {', '.join(names[:8])}" + (
            f" and {len(names) - 8} more" * (len(names) > 8)
        )
    return f"{row['name']}: {row.get('line', 'done')} ({row['took']:.1f} s)"


def supervise(options: Options) -> None:
    """Processes that ``work``, until all is done or the time is over."""
    with tempfile.TemporaryDirectory() as folder:
        first, left, status = 0, [], AGAIN
        while status != 0:
            progress = Path(folder) / f"from-{first}"
            status = run(replace(options, first=first, progress=progress), progress)
            at = json.loads(progress.read_text()) if progress.exists() else {"left": []}
            left += at["left"]
            if status != 0 and "number" not in at:
                put(options, {"name": options.part, "failed": f"outside of measurements: {ending(status)}"})
                break
            if status not in (0, AGAIN):
                put(options, {"name": at["name"], "failed": ending(status)})
            first = at.get("number", first) + 1
        if left:
            put(options, {"name": "left out", "left_out": left})


def run(options: Options, progress: Path) -> int:
    """The exit status of one process; a negative one names the signal that ended it."""
    command = [sys.executable, "-m", "benchmarks.gpu", *options.command()]
    limit = time.time() + BEGINNING
    child = subprocess.Popen(command, process_group=0)
    try:
        while child.poll() is None:
            time.sleep(0.1)
            if progress.exists():
                limit = json.loads(progress.read_text())["limit"]
            if time.time() > limit:
                break
    finally:
        with suppress(ProcessLookupError):  # the process, and what it may have left running
            os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def ending(status: int) -> str:
    if status == -signal.SIGKILL:
        return "did not end in time, or was killed"
    return f"the process ended with {signal.Signals(-status).name if status < 0 else f'status {status}'}"
