"""What being safe costs: shares of private trainings on digits that go into what an unsafe one would not do.

    python -m benchmarks.overhead            # three trainings of each kind, half an hour; adds to overhead.jsonl
    python -m benchmarks.overhead --table    # only writes the table of benchmarks/README.md

The trainings are those of the digits recipe (K = 8), also with a smaller expected batch in as many epochs, with every
probe, checkpoint and line of the ledger on the disk. Time is that of the rest of the same training. First probes, of
the objective and of each size of a physical batch, are listed by themselves, because their number does not grow with
the training.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks import results

SMALL = ("private.sample_rate=0.0446", "private.steps=448")  # as many epochs as the recipe has
KINDS = {
    "64 examples": SMALL,
    "64 examples, noise on a grid": (*SMALL, 'private.noise="grid"'),
    "as the recipe": (),
}
RUNS = 3
PARTS = ("sampling", "ledger", "noise", "checks", "probes", "checkpoints")
MOST = 0.05  # of a step


class Clock:
    """Seconds by part; of two that are inside each other, the outer one's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running = False

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        if self._running:
            yield
            return
        self._running, begin = True, time.perf_counter()
        try:
            yield
        finally:
            self._running = False
            self.seconds[part] += time.perf_counter() - begin

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Have every call of ``owner.name`` timed."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.of(part):
                return function(*arguments, **named)

        setattr(owner, name, timed)

    def watch_repeated(self, owner: Any, name: str, part: str) -> None:
        """The same of blocks ``with owner.name(repeated=True)``."""
        function: Callable[..., Any] = getattr(owner, name)

        @contextmanager
        def timed(*arguments: Any, repeated: bool) -> Iterator[None]:
            with self.of(part) if repeated else nullcontext(), function(*arguments, repeated=repeated):
                yield

        setattr(owner, name, timed)


def measured(settings: tuple[str, ...], clock: Clock) -> dict[str, Any]:
    """Shares of one training; ``clock`` watches."""
    from dpfast.recipes import load
    from dpfast.runs import build, inputs

    recipe = load("digits", settings)
    private = inputs.private_data(recipe)
    plan = build.plan(recipe, len(private))
    with tempfile.TemporaryDirectory() as folder:
        trainer = build.private_trainer(
            recipe,
            recipe.private,
            build.tuned(recipe, build.unet(recipe, private)),
            private,
            plan,
            build.private_objective(recipe, private),
            seed=0,
            state_dir=Path(folder) / "train",
        )
        clock.seconds.clear()
        begin = time.perf_counter()
        trainer.fit()
        seconds = time.perf_counter() - begin
    rest = seconds - sum(clock.seconds.values())
    return {
        "expected_batch_size": plan.expected_batch_size,
        "augmult": recipe.private.augmult,
        "steps": plan.steps,
        "step_seconds": rest / plan.steps,
        "first_probes": clock.seconds["first probes"],
        "shares": {part: clock.seconds[part] / rest for part in PARTS},
    }


def watching() -> Clock:
    """A clock that all of this process's trainings are timed by."""
    from dpfast import checkpoint, optimizer, trainer
    from dpfast.clipping import GhostClipper, clipper
    from dpfast.clipping.calls import ModelCalls
    from dpfast.clipping.passes import Pass
    from dpfast.pace import Pace
    from dpfast.privacy import Ledger

    clock = Clock()
    clock.watch(trainer, "poisson_sample", "sampling")
    clock.watch(Ledger, "charge", "ledger")
    clock.watch(optimizer, "noised", "noise")
    clock.watch(optimizer.DPOptimizer, "_refuse", "checks")
    clock.watch(optimizer, "not_finite", "checks")
    clock.watch(clipper, "seen", "checks")
    for check in ("_see_parameters", "_see_fixed", "_see_inputs", "_state_problems", "_buffer_problems"):
        clock.watch(GhostClipper, check, "checks")
    clock.watch(trainer.DPTrainer, "_show_objective", "first probes")
    clock.watch(ModelCalls, "show", "first probes")
    clock.watch(Pass, "_show", "first probes")
    clock.watch_repeated(Pace, "spending", "probes")
    clock.watch(checkpoint, "save", "checkpoints")
    return clock


def run() -> None:
    torch.set_num_threads(1)
    clock = watching()
    for number in range(RUNS):
        for kind, settings in KINDS.items():
            row = {"kind": kind, **measured(settings, clock)}
            results.append("overhead", row)
            shown = ", ".join(f"{part} {100 * share:.2f}%" for part, share in row["shares"].items())
            print(f"{number + 1}. {kind}: {1e3 * row['step_seconds']:,.0f} ms a step; {shown}", flush=True)


def newest(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By kind, the ``RUNS`` of the last commit. Raises ValueError where they are not all there."""
    found = {
        kind: [row for row in rows if row["kind"] == kind and row["commit"] == rows[-1]["commit"]] for kind in KINDS
    }
    if missing := [kind for kind, of in found.items() if len(of) < RUNS]:
        raise ValueError(f"fewer than {RUNS} runs of {', '.join(missing)}: python -m benchmarks.overhead")
    return {kind: of[-RUNS:] for kind, of in found.items()}


def together(rows: list[dict[str, Any]]) -> float:
    """All shares, median over runs."""
    return statistics.median(sum(row["shares"].values()) for row in rows)


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over runs."""
    lines = [
        f"| expected batch, K = 8 | ms a step | {' | '.join(PARTS)} | together | first probes |",
        "|---" * (len(PARTS) + 4) + "|",
    ]
    for kind, found in newest(rows).items():
        milliseconds = statistics.median(1e3 * row["step_seconds"] for row in found)
        shares = [statistics.median(100 * row["shares"][part] for row in found) for part in PARTS]
        name = f"{kind} ({found[-1]['expected_batch_size']:.0f})" if kind == "as the recipe" else kind
        once = statistics.median(row["first_probes"] for row in found)
        cells = [
            f"{milliseconds:,.0f}",
            *(f"{share:.2f}%" for share in shares),
            f"{100 * together(found):.1f}%",
            f"{once:.1f} s, {once / (once + found[0]['steps'] * milliseconds / 1e3):.0%}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the table")
    if not parser.parse_args().table:
        run()
    rows = results.rows("overhead")
    text = table(rows)
    results.write_between_markers(results.ROOT / "benchmarks/README.md", "overhead", text)
    print(text)
    if any(together(found) > MOST for found in newest(rows).values()):
        sys.exit(f"more than {MOST:.0%} of a step")


if __name__ == "__main__":
    main()
