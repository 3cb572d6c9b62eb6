"""Runs that are cut off at random moments lose nothing that was spent, and go on."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import pytest

import cuts
import trust
from dpfast import checkpoint
from dpfast.data.shards import load_shards
from dpfast.privacy import read_ledger

CUTS = 200 if trust.FULL else 8


@pytest.mark.timeout(3600 if trust.FULL else 600)
def test_runs_that_are_cut_off_forget_nothing_and_go_on(tmp_path):
    random, left, finished = Random(), CUTS, 0
    ended: Counter[str] = Counter()
    while left or not finished:
        story = Story(tmp_path / f"runs{finished}", tmp_path / "journal")
        while not story.done:
            kind = cuts.KINDS[left % len(cuts.KINDS)]
            cut = cuts.Cut(kind, random.uniform(0, random.choice([1, 6])), Random(random.random())) if left else None
            how = story.go_on(cut)
            if how != "done":
                ended[f"{kind}: {how}"] += 1
                left -= 1
        story.check_finished()
        finished += 1
    trust.record("cuts", cuts=CUTS, finished=finished, ended=dict(ended))


class Story:
    """One run, from its first process to the one that ends it."""

    def __init__(self, runs: Path, journal: Path) -> None:
        self.runs, self.journal, self.done = runs, journal, False
        runs.mkdir()
        self.keys: list[str] = []
        self.steps: dict[str, set[tuple[int, int]]] = defaultdict(set)
        self.processes = 0

    def go_on(self, cut: cuts.Cut | None) -> str:
        """One more process. It says how it ended."""
        ended = cuts.run(self.runs, self.journal, cut)
        expected = {"done"} if cut is None else {"done", "refused"} if cut.kind == "disk full" else {"done", "cut off"}
        if ended.how not in expected:
            pytest.fail(f"{cut}: {ended.how}\n{ended.said}")
        for line in ended.lines:
            if line["kind"] == "noise":
                ledger, step = line["step"]
                self.keys.append(line["key"])
                self.steps[ledger].add((self.processes, step))
        self.processes += 1
        self.done = ended.how == "done"
        for ledger, steps in self.steps.items():
            assert read_ledger(ledger).charged_steps >= len(steps), (cut, ledger)
        assert len(set(self.keys)) == len(self.keys)
        return ended.how

    def check_finished(self) -> None:
        """Everything is there, charged as planned, and no step was taken beyond the plan."""
        for ledger, steps in self.steps.items():
            found = read_ledger(ledger)
            assert found.charged_steps == found.plan.steps >= len(steps)
        assert len(self.steps) == 2
        state = self.runs / "tiny/state/train"
        plan = read_ledger(state / "ledger.jsonl").plan
        saved = checkpoint.load(state / "checkpoint", kind="private training", fingerprint=plan.fingerprint())
        assert saved["step"] == cuts.STEPS
        assert cuts.STEPS - len(self.steps[str(state / "ledger.jsonl")]) <= saved["lost_steps"] < self.processes
        release = self.runs / "tiny/release"
        assert json.loads((release / "privacy.json").read_text())["epsilon"] <= 1.0
        assert len(load_shards(release / "samples")) == 20
        assert all((release / name).exists() for name in ("model/classes.json", "report.html", "PRIVACY.md"))
