"""A whole run in a process of its own, which ends at a moment that nobody chose: killed, its disk full, a write torn,
or the power cut, which undoes what was not synced.

The processes are forks of one that has done such a run before, so that they begin at once. What they draw and charge is
told to a journal in shared memory, which no kill loses and no full disk stops.
"""

import hashlib
import json
import mmap
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import struct
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing import forkserver
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from dpfast import trainer
from dpfast.errors import DPFastError
from dpfast.kernels import noise
from dpfast.optimizer import DPOptimizer
from dpfast.recipes import load
from dpfast.runs.pipeline import execute
from test_runs import TINY, Recorder

KINDS = ("killed", "disk full", "write torn", "power cut")
STEPS = 20
SMALLER = ("widths=[8]", "private.sample_rate=0.01", "private.augmult=1", "baseline.sample_rate=0.01", "seeds=1")
SETTINGS = (*TINY, *SMALLER, f"private.steps={STEPS}")
_LONGEST = 120.0  # seconds that no run takes


class Journal:
    """Lines of JSON in a mapped file: 8 bytes of length, then the lines."""

    SIZE = 1 << 22

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(self.SIZE))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.SIZE)

    def add(self, kind: str, **values: Any) -> None:
        line = (json.dumps({"kind": kind, **values}) + "\n").encode()
        (end,) = struct.unpack_from("<q", self._map, 0)
        self._map[8 + end : 8 + end + len(line)] = line
        struct.pack_into("<q", self._map, 0, end + len(line))

    def count(self, text: bytes) -> int:
        (end,) = struct.unpack_from("<q", self._map, 0)
        return self._map[8 : 8 + end].count(text)

    def lines(self) -> list[dict[str, Any]]:
        (end,) = struct.unpack_from("<q", self._map, 0)
        return [json.loads(line) for line in self._map[8 : 8 + end].splitlines()]


@dataclass(frozen=True)
class Cut:
    """What is to happen: ``after`` so many seconds or, if ``steps`` is not 0, in that step of the process, counted from
    1. seed: of everything else that chance decides.
    """

    kind: str
    seed: int
    after: float = 0.0
    steps: int = 0


@dataclass(frozen=True)
class Ended:
    """How a process ended: cut off, "done", "refused" (with what it said) or "crashed" (with its traceback); and its
    journal.
    """

    how: str
    said: str
    lines: list[dict[str, Any]]


class Place:
    """A folder of runs, and what of it is on stable storage. journals: a folder for what processes tell.

    plant: a bug of ``PLANTS`` that all processes have.
    """

    def __init__(self, runs: Path, journals: Path, *, plant: str = "") -> None:
        runs.mkdir()
        journals.mkdir()
        self.runs, self.journals, self.plant = runs, journals, plant
        self._processes = 0
        self._disk = Tree.of(runs, journals)

    def run(self, cut: Cut | None = None) -> Ended:
        """The tiny recipe, begun or gone on with, in one more process."""
        self._processes += 1
        journal = self.journals / str(self._processes)
        journal.mkdir()
        told = Journal(journal / "lines")
        process = _server().Process(target=_child, args=(self.runs, journal, cut, self.plant))
        process.start()
        kills = cut is not None and cut.kind in ("killed", "power cut")
        if cut is not None and kills:
            _wait(process, told, cut)
        else:
            process.join(_LONGEST)
        if process.is_alive():
            process.kill()
            process.join()
            how = "cut off" if kills else "crashed"
        else:
            how = "cut off" if process.exitcode == -signal.SIGXFSZ else "crashed"
        lines = told.lines()
        said = f"exit code {process.exitcode}"
        for line in lines:
            if line["kind"] == "ended":
                how, said = line["how"], line["said"]
        self._disk.follow(lines)
        if cut is not None and cut.kind == "power cut" and how == "cut off":
            self._disk.come_back(self.runs, Random(cut.seed))
            self._disk = Tree.of(self.runs, journal)
        return Ended(how, said, lines)


def _wait(process: Any, told: Journal, cut: Cut) -> None:
    """Until the moment of the cut, or the end of the process."""
    if not cut.steps:
        process.join(cut.after)
        return
    end = time.monotonic() + _LONGEST
    while process.is_alive() and time.monotonic() < end and told.count(b'"kind": "step"') < cut.steps:
        time.sleep(0.001)
    time.sleep(Random(cut.seed).uniform(0, 0.02))


def _server() -> Any:
    """Started at its first use; it finds the modules of the tests by ``PYTHONPATH`` alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cuts_warm"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


# In the process


def _child(runs: Path, journal: Path, cut: Cut | None, plant: str) -> None:
    told = Journal(journal / "lines")
    fills = cut is not None and cut.kind in ("disk full", "write torn")
    _tell_of_steps(told, {cut.steps: partial(_fill_the_disk, cut, runs)} if cut is not None and fills else {})
    _tell_of_syncs(told, journal)
    if plant:
        PLANTS[plant]()
    if cut is not None and fills and not cut.steps:
        signal.signal(signal.SIGALRM, lambda *_: _fill_the_disk(cut, runs))
        signal.setitimer(signal.ITIMER_REAL, max(cut.after, 1e-3))
    try:
        execute(load("digits", SETTINGS), runs, Recorder())
    except DPFastError as error:
        told.add("ended", how="refused", said=f"{type(error).__name__}: {error}")
    except BaseException:
        told.add("ended", how="crashed", said=traceback.format_exc())
    else:
        told.add("ended", how="done", said="")


def _tell_of_steps(told: Journal, then: dict[int, Callable[[], None]]) -> None:
    """Of every step that begins, of every sample, and of every key before its noise is drawn. then: what is to be done
    when the step of that number begins.
    """
    step, noised, sampled, numbers = DPOptimizer.step, noise.noised, trainer.poisson_sample, count(1)
    current: list[tuple[str, int]] = []

    def watched_step(self: DPOptimizer, *arguments: Any) -> None:
        number = next(numbers)
        told.add("step")
        current[:] = [(str(self.ledger.path), number)]
        then.get(number, lambda: None)()
        step(self, *arguments)

    def watched_noise(values: torch.Tensor, scale: float, divisor: float, key: bytes, **options: Any) -> torch.Tensor:
        told.add("noise", step=current[0], key=hashlib.sha256(key).hexdigest())
        return noised(values, scale, divisor, key, **options)

    def watched_sample(size: int, rate: float) -> torch.Tensor:
        sample = sampled(size, rate)
        told.add("sample", hash=hashlib.sha256(sample.numpy().tobytes()).hexdigest(), size=len(sample))
        return sample

    DPOptimizer.step = watched_step  # type: ignore[method-assign]
    noise.noised = watched_noise
    trainer.poisson_sample = watched_sample


def _tell_of_syncs(told: Journal, journal: Path) -> None:
    """Of what is on stable storage: the bytes of a file, the names in a folder."""
    fsync, copies = os.fsync, iter(range(1 << 30))

    def watched(fd: int) -> None:
        fsync(fd)
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            names = {entry.name: entry.inode() for entry in os.scandir(f"/proc/self/fd/{fd}")}
            told.add("synced folder", inode=status.st_ino, names=names)
        else:
            number = next(copies)
            # The link keeps its number from being given to another file.
            os.link(os.readlink(f"/proc/self/fd/{fd}"), journal / f"held-{number}")
            shutil.copyfile(f"/proc/self/fd/{fd}", journal / f"copy-{number}")
            told.add("synced file", inode=status.st_ino, copy=str(journal / f"copy-{number}"))

    os.fsync = watched


def _fill_the_disk(cut: Cut, runs: Path) -> None:
    """From now on no file grows beyond some size: the kernel writes a part, and then fails or kills."""
    random, torn = Random(cut.seed), cut.kind == "write torn"
    ledgers = [path.stat().st_size + random.randrange(150) for path in runs.rglob("ledger.jsonl")]
    size = random.choice([*ledgers, random.randrange(20_000), 0])
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if torn else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _charge_late() -> None:
    update = DPOptimizer._update

    def late(self: DPOptimizer, step: int) -> None:
        charge = self.ledger.charge
        self.ledger.charge = lambda _: None  # type: ignore[method-assign]
        update(self, step)
        self.ledger.charge = charge  # type: ignore[method-assign]
        charge(step)

    DPOptimizer._update = late  # type: ignore[method-assign]


def _never_sync_a_ledger() -> None:
    fsync = os.fsync
    os.fsync = lambda fd: None if os.readlink(f"/proc/self/fd/{fd}").endswith("ledger.jsonl") else fsync(fd)


# Bugs, to see that they are found.
PLANTS = {"charged after the update": _charge_late, "a ledger that is not synced": _never_sync_a_ledger}


# Power cuts


@dataclass
class Tree:
    """What is on stable storage: the bytes of each file and the names in each folder, by inode."""

    files: dict[int, bytes]
    folders: dict[int, dict[str, int]]

    @classmethod
    def of(cls, root: Path, holder: Path) -> "Tree":
        """All that is there. Links in ``holder`` keep the inodes of its files from being given to others."""
        tree = cls({}, {})
        for path in [root, *root.rglob("*")]:
            inode = path.stat().st_ino
            if path.is_dir():
                tree.folders[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
            else:
                tree.files[inode] = path.read_bytes()
                if not (holder / f"found-{inode}").exists():
                    os.link(path, holder / f"found-{inode}")
        return tree

    def follow(self, lines: list[dict[str, Any]]) -> None:
        """What a process has synced."""
        for line in lines:
            if line["kind"] == "synced folder":
                self.folders[line["inode"]] = line["names"]
            elif line["kind"] == "synced file":
                self.files[line["inode"]] = Path(line["copy"]).read_bytes()

    def come_back(self, root: Path, random: Random) -> None:
        """Make of ``root`` what may be found there when the power is back: what is stable, and by chance more."""
        new = Path(tempfile.mkdtemp(dir=root.parent))
        holder = Path(tempfile.mkdtemp(dir=root.parent))
        self._rebuild(root.stat().st_ino, Tree.of(root, holder), new, random)
        shutil.rmtree(root)
        shutil.rmtree(holder)
        new.rename(root)

    def _rebuild(self, folder: int, seen: "Tree", new: Path, random: Random) -> None:
        stable, latest = self.folders.get(folder, {}), seen.folders.get(folder, {})
        for name in sorted({*stable, *latest}):
            inode = random.choice([stable.get(name), latest.get(name)])
            if inode is None:
                continue
            if inode in self.folders or inode in seen.folders:
                (new / name).mkdir()
                self._rebuild(inode, seen, new / name, random)
            else:
                (new / name).write_bytes(self._content(inode, seen, random))

    def _content(self, inode: int, seen: "Tree", random: Random) -> bytes:
        stable, latest = self.files.get(inode, b""), seen.files.get(inode)
        if latest is None or latest == stable:
            return stable
        kept = random.randint(len(stable) if latest.startswith(stable) else 0, len(latest))
        return random.choice([stable, latest, latest[:kept], latest[:kept] + bytes(len(latest) - kept)])
