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
import traceback
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

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

    def lines(self) -> list[dict[str, Any]]:
        (end,) = struct.unpack_from("<q", self._map, 0)
        return [json.loads(line) for line in self._map[8 : 8 + end].splitlines()]


@dataclass(frozen=True)
class Cut:
    """What is to happen, ``after`` so many seconds. random: of everything else that chance decides."""

    kind: str
    after: float
    random: Random


@dataclass(frozen=True)
class Ended:
    """How a process ended: cut off, "done", "refused" (with what it said) or "crashed" (with its traceback); and its
    journal.
    """

    how: str
    said: str
    lines: list[dict[str, Any]]


def run(runs: Path, journal: Path, cut: Cut | None = None) -> Ended:
    """The tiny recipe in the folder ``runs``, begun or gone on with; journal: a folder for what it tells."""
    remove(journal)
    journal.mkdir()
    told, before = Journal(journal / "lines"), Tree.of(runs)
    process = _server().Process(target=_child, args=(runs, journal, cut))
    process.start()
    by_parent = cut is not None and cut.kind in ("killed", "power cut")
    process.join(cut.after if by_parent and cut is not None else _LONGEST)
    if process.is_alive():
        process.kill()
        process.join()
        how = "cut off" if by_parent else "crashed"
    else:
        how = "cut off" if process.exitcode == -signal.SIGXFSZ else "crashed"
    lines = told.lines()
    ends = [line for line in lines if line["kind"] == "ended"]
    if ends:
        how = ends[0]["how"]
    if how == "cut off" and cut is not None and cut.kind == "power cut":
        before.after_power_cut(runs, lines, cut.random)
    return Ended(how, ends[0]["said"] if ends else f"exit code {process.exitcode}", lines)


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _server() -> Any:
    """Started at its first use; it finds the modules of the tests by ``PYTHONPATH`` alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cuts_warm"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


# In the process


def _child(runs: Path, journal: Path, cut: Cut | None) -> None:
    told = Journal(journal / "lines")
    _tell_of_noise(told)
    _tell_of_syncs(told, runs, journal)
    if cut is not None and cut.kind in ("disk full", "write torn"):
        _fill_the_disk(cut, runs)
    try:
        execute(load("digits", SETTINGS), runs, Recorder())
    except DPFastError as error:
        told.add("ended", how="refused", said=f"{type(error).__name__}: {error}")
    except BaseException:
        told.add("ended", how="crashed", said=traceback.format_exc())
    else:
        told.add("ended", how="done", said="")


def _tell_of_noise(told: Journal) -> None:
    """Of every key before its noise is drawn, and of every step before the first of its keys."""
    step, noised, steps = DPOptimizer.step, noise.noised, iter(range(1 << 30))
    current: list[tuple[str, int]] = []

    def watched_step(self: DPOptimizer, *arguments: Any) -> None:
        current[:] = [(str(self.ledger.path), next(steps))]
        step(self, *arguments)

    def watched_noise(values: torch.Tensor, scale: float, divisor: float, key: bytes, **options: Any) -> torch.Tensor:
        told.add("noise", step=current[0], key=hashlib.sha256(key).hexdigest())
        return noised(values, scale, divisor, key, **options)

    DPOptimizer.step = watched_step  # type: ignore[method-assign]
    noise.noised = watched_noise


def _tell_of_syncs(told: Journal, runs: Path, journal: Path) -> None:
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
    """From that moment on no file grows beyond some size: the kernel writes a part, and then fails or kills."""
    torn = cut.kind == "write torn"

    def now(*_: object) -> None:
        ledgers = [path.stat().st_size for path in runs.rglob("ledger.jsonl")]
        sizes = [size + cut.random.randrange(150) for size in ledgers] + [cut.random.randrange(20_000), 0]
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if torn else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (cut.random.choice(sizes), resource.RLIM_INFINITY))

    signal.signal(signal.SIGALRM, now)
    signal.setitimer(signal.ITIMER_REAL, max(cut.after, 1e-3))


# Power cuts


@dataclass
class Tree:
    """What is on stable storage: the bytes of each file and the names in each folder, by inode."""

    files: dict[int, bytes]
    folders: dict[int, dict[str, int]]

    @classmethod
    def of(cls, root: Path) -> "Tree":
        tree = cls({}, {})
        for path in [root, *root.rglob("*")]:
            if path.is_dir():
                tree.folders[path.stat().st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
            else:
                tree.files[path.stat().st_ino] = path.read_bytes()
        return tree

    def after_power_cut(self, root: Path, lines: list[dict[str, Any]], random: Random) -> None:
        """Make of ``root`` what may be found there when the power is back: what was synced, and by chance more."""
        for line in lines:
            if line["kind"] == "synced folder":
                self.folders[line["inode"]] = line["names"]
            elif line["kind"] == "synced file":
                self.files[line["inode"]] = Path(line["copy"]).read_bytes()
        new = Path(tempfile.mkdtemp(dir=root.parent))
        self._rebuild(root.stat().st_ino, Tree.of(root), new, random)
        shutil.rmtree(root)
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
        kept = random.randrange(len(latest) + 1)
        return random.choice([stable, latest, latest[:kept], latest[:kept] + bytes(len(latest) - kept)])
