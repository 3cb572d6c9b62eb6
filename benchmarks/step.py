"""A private step against the non-private step of the same rows, and against what others offer.

    python -m benchmarks.step                        # every row of the table, about an hour on two cores
    python -m benchmarks.step --row "unet6m float32 B=8 K=1" --rounds 15
    python -m benchmarks.step --model digits -B 16 -K 4 --contestants non-private dpfast
    python -m benchmarks.step --table                # the table in the README, from the committed results
    python -m benchmarks.step --sweep                # over B, K and width of small models, a quarter of an hour
    python -m benchmarks.step --plots                # the figures of that, from the committed results

First the resident size of a fresh process for each contestant, while memory is free. Then the gate: norms and clipped
sum agree with a float64 loop over examples, or nothing is timed. Then time, in interleaved rounds of one process, and
the peak of live tensor storages of one step: as ratios to the non-private step, eager to eager, compiled to compiled.
"""

import argparse
import copy
import json
import os
import re
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import contestants as c
from benchmarks import results
from benchmarks.cases import MODELS, ROWS, SWEEP_TAG, SWEEPS, Row
from dpfast import Performance, measure
from dpfast.bench import why_not as not_run
from dpfast.clipping.planner import StepPlan
from dpfast.kernels import cost

BASE, COMPILED, PASSES = "non-private", "non-private compiled", "dpfast in passes"
LIKE = 32  # rows whose memory a step in passes may take
DPFAST = {"dpfast": Performance(), "dpfast compiled": Performance(compile=True)} | {
    f"dpfast {form}": Performance(form=form) for form in ("gram", "direct", "materialise")
}
CONTESTANTS: dict[str, c.Contestant] = {
    BASE: c.non_private,
    COMPILED: c.non_private_compiled,
    **{name: c.dpfast(performance) for name, performance in DPFAST.items()},
    PASSES: c.dpfast_in_passes(LIKE),
    "example at a time": c.example_at_a_time,
    "vmap": c.vmap,
    "Opacus hooks": c.opacus_hooks,
    "Opacus ghost": c.opacus_ghost,
}
SWEPT = (BASE, "dpfast", "example at a time", "Opacus hooks", "vmap")
MOST_STORED = 2 << 30  # bytes of gradients in a sweep: a contestant that stores more is left out
# Relative errors that pass the gate. float32: a hundred roundings, far below any mistake of a factor; bfloat16 is held
# against a float32 step, whose activations differ by that much.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


def performance_of(name: str, row: Row) -> Performance:
    """Of dpfast's."""
    return replace(DPFAST[name], memory_budget=row.memory_budget)


def contestant(name: str, row: Row) -> c.Contestant:
    return c.dpfast(performance_of(name, row)) if name in DPFAST else CONTESTANTS[name]


def task_of(row: Row) -> c.Task:
    model = MODELS[row.model]
    return c.Task(
        model=model.build().train(),
        inputs=model.inputs(row.examples * row.augmult),
        examples=row.examples,
        augmult=row.augmult,
        max_grad_norm=0.1,
        dtype=getattr(torch, row.dtype),
    )


def oracle(task: c.Task) -> c.Clipped:
    """In float64, example by example, with plain autograd."""
    model = copy.deepcopy(task.model).double()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    norms = []
    for i in range(task.examples):
        rows = tuple(x.double() if x.is_floating_point() else x for x in task.rows(i))
        out = model(*rows).sample
        loss = (out - rows[0]).square().flatten(1).mean(1).mean()
        grads = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        norms.append(torch.stack([g.norm() for g in grads.values()]).norm())
        for name, g in grads.items():
            sums[name] += task.factors(norms[-1]) * g
    return c.Clipped(torch.stack(norms), sums)


def ordinary(task: c.Task) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss in float64."""
    model = copy.deepcopy(task.model).double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in task.inputs)
    (model(*inputs).sample - inputs[0]).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error_of(found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> float:
    """Relative error of all tensors together."""
    wrong = torch.stack([(found[name].double() - e).norm() for name, e in exact.items()]).norm()
    return (wrong / torch.stack([e.norm() for e in exact.values()]).norm()).item()


def error(got: c.Clipped, exact: c.Clipped) -> float:
    """The larger of the relative errors of any norm and of all sums together."""
    norms = ((got.norms.double() - exact.norms).abs() / exact.norms).max().item()
    return max(norms, error_of(got.sums, exact.sums))


def takes_passes(row: Row) -> bool:
    """Whether there is one example, of more rows than a step in passes is to be like."""
    return row.examples == 1 and row.augmult > LIKE


def why_not(name: str, row: Row, planned: StepPlan | None) -> str | None:
    """Why a contestant does not take part in a row, if it does not. planned: of those that are dpfast's."""
    if name == "Opacus ghost" and row.augmult > 1:
        return "clips rows, not examples"
    if name == PASSES and not takes_passes(row):
        return f"for one example of more than {LIKE} rows"
    if planned is not None and DPFAST[name].form in cost.FORMS:
        return not_run(planned, row.memory_budget)
    return None


def entry(row: Row, name: str, *, resident: bool) -> dict[str, Any]:
    """What is known of a contestant before it runs here: plan, why it is skipped, the size of a process of its own."""
    settings = {key: value for key, value in vars(row).items() if key not in ("time", "memory")}  # those are targets
    found: dict[str, Any] = {"row": row.name, **settings, "contestant": name}
    planned = c.planned(task_of(row), performance_of(name, row)) if name in DPFAST else None
    if planned is not None:
        found["planned_peak"], found["planned_time"] = planned.private.peak, planned.ratio()
    if reason := why_not(name, row, planned):
        found["skipped"] = reason
    elif resident and (size := resident_of(row, name)):
        found["resident"] = size
    return found


def run_row(row: Row, names: Iterable[str], rounds: int, *, resident: bool = True) -> list[dict[str, Any]]:
    """One JSON row for each contestant."""
    found = [entry(row, name, resident=resident) for name in names]  # first: later this process fills the memory
    exact, mean, steps = oracle(task_of(row)), ordinary(task_of(row)), {}
    for outcome in found:
        if "skipped" in outcome:
            continue
        name = outcome["contestant"]
        try:
            task = task_of(row)
            step = contestant(name, row)(task)
            result = warmed_up(step)
        except Exception as failure:  # a contestant that fails is a result, too
            outcome["skipped"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}"
            continue
        clips = isinstance(result, c.Clipped)
        outcome["error"] = error(result, exact) if clips else error_of(task.gradient(), mean)
        if outcome["error"] > TOLERANCE[getattr(torch, row.dtype)]:
            outcome["skipped"] = "wrong"
            continue
        steps[name] = step
        print(f"  {name}: {outcome['error']:.1e}", flush=True)
    seconds = measure.interleaved(steps, rounds=rounds)
    peaks = {name: measure.peak_storages(step) for name, step in steps.items()}
    for outcome in found:
        name = outcome["contestant"]
        if name in steps:
            base = COMPILED if name == "dpfast compiled" and COMPILED in steps else BASE
            outcome["base"], outcome["time"] = base, measure.ratio(seconds, name, base)
            outcome["seconds"] = statistics.median(seconds[name])
            outcome["peak"] = peaks[name]
            outcome["memory"] = peaks[name] / peaks[base]
        if name == PASSES and name in steps:
            outcome["memory_to_like"] = peaks[name] / peak_of_like(row)
    return found


def warmed_up(step: c.Step) -> c.Clipped | None:
    """What it gives after a few: the first ones are probed, or compiled."""
    for _ in range(2):
        step()
    return step()


def peak_of_like(row: Row) -> int:
    """Bytes, of a step of ``LIKE`` rows."""
    step = contestant("dpfast", row)(task_of(replace(row, augmult=LIKE)))
    warmed_up(step)
    return measure.peak_storages(step)


def sweep() -> dict[Row, list[str]]:
    """The rows of all figures, once, and who takes part: those who need not store too many gradients."""
    rows = dict.fromkeys(row for figure in SWEEPS.values() for row in figure)
    return {row: [name for name in SWEPT if stored_by(name, row) <= MOST_STORED] for row in rows}


def stored_by(name: str, row: Row) -> int:
    """Bytes of gradients that a contestant keeps at a time."""
    copies = {"vmap": row.examples, "Opacus hooks": row.examples * row.augmult}.get(name, 1)
    return 4 * copies * sum(p.numel() for p in MODELS[row.model].build().parameters())


def resident_of(row: Row, name: str) -> int | None:
    """Bytes at most resident in a fresh process of three steps, whose allocator is as usual; None if it fails.

    Linux alone tells.
    """
    command = [sys.executable, "-m", "benchmarks.step", "--resident", json.dumps(vars(row)), name]
    usual = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=results.ROOT, env=usual)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def print_resident(row: Row, name: str) -> None:
    warmed_up(contestant(name, row)(task_of(row)))
    # Not getrusage: what it says of a process is at least what its parent was when it forked.
    (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    print(1024 * int(peak))


def table(rows: list[dict[str, Any]]) -> str:
    """Newest result of each contestant in each row: time and peak memory relative to the non-private step."""
    newest = {(r["row"], r["contestant"]): r for r in rows}
    cases = [row for row in ROWS if (row.name, BASE) in newest]
    titles = [
        f"{row.model}{' bf16' if row.dtype == 'bfloat16' else ''}<br>{row.examples}, {row.augmult}" for row in cases
    ]
    lines = [["model<br>B, K", *titles], ["---"] * (1 + len(cases))]
    lines.append(["*target*", *(f"*{row.time:.2f}, {row.memory:.2f}*" for row in cases)])
    for name in CONTESTANTS:
        found = [newest.get((row.name, name)) if name != PASSES or takes_passes(row) else None for row in cases]
        if name != BASE and any(found):
            lines.append([name, *map(cell, found)])
    of_dpfast = [{name: r for name in DPFAST if (r := newest.get((row.name, name)))} for row in cases]
    lines.append(["dpfast / fastest form", *map(over_the_fastest, of_dpfast)])
    lines.append(["planned / measured memory", *map(planned_memory, of_dpfast)])
    for name in (BASE, "dpfast"):
        sizes = [newest.get((row.name, name), {}).get("resident") for row in cases]
        lines.append([f"resident MB, {name}", *(f"{size / 1e6:,.0f}" if size else "" for size in sizes)])
    in_passes = [newest.get((row.name, PASSES), {}).get("memory_to_like") for row in cases]
    lines.append([f"memory in passes / at 1, {LIKE}", *(f"{m:.2f}" if m else "" for m in in_passes)])
    lines.append(["processor", *(newest[row.name, BASE]["machine"]["processor"] for row in cases)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def over_the_fastest(found: dict[str, dict[str, Any]]) -> str:
    """Time of the automatic choice over that of the best single form."""
    forms = [r["time"] for name, r in found.items() if DPFAST[name].form in cost.FORMS and "time" in r]
    return f"{found['dpfast']['time'] / min(forms):.2f}" if forms and "time" in found.get("dpfast", {}) else ""


def planned_memory(found: dict[str, dict[str, Any]]) -> str:
    r = found.get("dpfast", {})
    return f"{r['planned_peak'] / r['peak']:.2f}" if "peak" in r else ""


def cell(r: dict[str, Any] | None) -> str:
    if r is None:
        return ""
    return str(r["skipped"]).split(":")[0] if "skipped" in r else f"{r['time']:.2f}, {r['memory']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", nargs="+", choices=[row.name for row in ROWS], help="of the table; all by default")
    parser.add_argument("--model", choices=MODELS, help="instead of a row of the table, with -B and -K")
    parser.add_argument("-B", type=int, default=8, help="examples")
    parser.add_argument("-K", type=int, default=1, help="rows of each example")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--memory-budget", type=int, help="bytes, for dpfast; forms over it are not run")
    parser.add_argument("--rounds", type=int, help="9, in a sweep 5")
    parser.add_argument("--dry", action="store_true", help="print, and add nothing to the results")
    parser.add_argument("--table", action="store_true", help="only write the table into the README")
    parser.add_argument("--sweep", action="store_true", help="the rows of the figures, instead of those of the table")
    parser.add_argument("--plots", action="store_true", help="only draw the figures")
    parser.add_argument("--resident", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.resident:
        print_resident(Row(**json.loads(options.resident[0])), options.resident[1])
        return
    if not (options.table or options.plots):
        run(options)
    if options.dry:
        return
    if options.sweep or options.plots:
        from benchmarks import plots

        print(*plots.write(results.rows("step"), results.FOLDER), sep="\n")
    else:
        results.write_between_markers(results.ROOT / "README.md", "step", table(results.rows("step")))


def run(options: argparse.Namespace) -> None:
    """Measure what was asked for, row by row; results are kept as they come."""
    names = list(dict.fromkeys([BASE, *options.contestants]))
    chosen = {row: names for row in ROWS if not options.row or row.name in options.row}
    if options.model:
        chosen = {Row(options.model, options.B, options.K, options.dtype): names}
    chosen = {replace(row, memory_budget=options.memory_budget): names for row, names in chosen.items()}
    if options.sweep:
        chosen = sweep()
    rounds = options.rounds or (5 if options.sweep else 9)
    tag = {"tag": SWEEP_TAG} if options.sweep else {}
    for row, names in chosen.items():
        print(row.name, flush=True)
        for outcome in run_row(row, names, rounds, resident=not (options.dry or options.sweep)):
            print(f"  {outcome['contestant']:22} {cell(outcome)}", flush=True)
            if not options.dry:
                results.append("step", outcome | tag)


if __name__ == "__main__":
    main()
