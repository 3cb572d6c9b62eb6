"""Runs that are cut off at random moments lose nothing that was spent, and go on."""

import json
import re
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


class Story:
    """One run, from its first process to the one that ends it."""

    def __init__(self, folder: Path, *, plant: str = "") -> None:
        folder.mkdir()
        self.place, self.done = cuts.Place(folder / "runs", folder / "journals", plant=plant), False
        self.keys: list[str] = []
        self.samples: list[str] = []
        self.steps: dict[str, set[tuple[int, int]]] = defaultdict(set)
        self.processes = 0

    def go_on(self, cut: cuts.Cut | None) -> str:
        """One more process. It says how it ended."""
        ended = self.place.run(cut)
        expected = {"done"} if cut is None else {"done", "refused"} if cut.kind == "disk full" else {"done", "cut off"}
        if ended.how not in expected:
            pytest.fail(f"{cut}: {ended.how}\n{ended.said}")
        if ended.how == "refused":
            assert re.search("too large.*(M|m)ake room", ended.said), ended.said
        for line in ended.lines:
            if line["kind"] == "noise":
                ledger, step = line["step"]
                self.keys.append(line["key"])
                self.steps[ledger].add((self.processes, step))
            elif line["kind"] == "sample" and line["size"] > 1:
                self.samples.append(line["hash"])
        self.processes += 1
        self.done = ended.how == "done"
        for ledger, steps in self.steps.items():
            assert read_ledger(ledger).charged_steps >= len(steps), (cut, ledger)
        assert len(set(self.keys)) == len(self.keys)
        assert len(set(self.samples)) == len(self.samples)
        return ended.how

    def check_finished(self) -> None:
        """Everything is there, charged as planned, and no step was taken beyond the plan."""
        for ledger, steps in self.steps.items():
            found = read_ledger(ledger)
            assert found.charged_steps == found.plan.steps >= len(steps)
        assert len(self.steps) == 2
        at = self.place.runs / "tiny"
        ledger = at / "state/train/ledger.jsonl"
        fingerprint = read_ledger(ledger).plan.fingerprint()
        saved = checkpoint.load(at / "state/train/checkpoint", kind="private training", fingerprint=fingerprint)
        lost = saved["lost_steps"] + cuts.STEPS - saved["step"]  # the last ones, if no step came after the cut
        assert cuts.STEPS - len(self.steps[str(ledger)]) <= lost
        assert json.loads((at / "release/privacy.json").read_text())["epsilon"] <= 1.0
        assert len(load_shards(at / "release/samples")) == 20
        assert all((at / "release" / name).exists() for name in ("model/classes.json", "report.html", "PRIVACY.md"))


def some_cut(number: int, random: Random) -> cuts.Cut:
    """Each kind in turns, four times in a step, then four times at any moment."""
    kind, seed = cuts.KINDS[number % 4], random.getrandbits(32)
    if number % 8 < 4:
        return cuts.Cut(kind, seed, steps=random.randint(1, 3))
    return cuts.Cut(kind, seed, after=random.uniform(0, random.choice([1, 6])))


@pytest.mark.timeout(3600 if trust.FULL else 600)
def test_runs_that_are_cut_off_forget_nothing_and_go_on(tmp_path):
    seed = Random().getrandbits(32)
    print("seed", seed)  # shown if it fails
    random, done, finished = Random(seed), 0, 0
    ended: Counter[str] = Counter()
    while done < CUTS or not finished:
        story = Story(tmp_path / str(finished))
        while not story.done:
            cut = some_cut(done, random) if done < CUTS else None
            how = story.go_on(cut)
            if cut is not None and how != "done":
                ended[f"{cut.kind}, {how}"] += 1
                done += 1
        story.check_finished()
        finished += 1
    trust.record("cuts", cuts=CUTS, finished=finished, ended=dict(ended))


@pytest.mark.parametrize(
    ("plant", "kind"), [("charged after the update", "killed"), ("a ledger that is not synced", "power cut")]
)
def test_a_bug_that_forgets_steps_is_found(tmp_path, plant, kind):
    story, random = Story(tmp_path / "story", plant=plant), Random(0)

    def go_on():
        for _ in range(10):
            story.go_on(cuts.Cut(kind, random.getrandbits(32), steps=2))

    with pytest.raises((AssertionError, pytest.fail.Exception)):
        go_on()
