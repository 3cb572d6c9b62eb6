"""Whole steps of an 83M and a 6M UNet in bfloat16, channels_last: each contestant beside the non-private step.

The gate: norms of a few examples agree with their gradients by autograd in float32, and the sum is the one that the
norms call for, with the tolerance of ``benchmarks.step``. (In float64 all examples of a row would take minutes.)
"""

import copy
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import around
from benchmarks import contestants as c
from benchmarks.cases import MODELS, Row
from benchmarks.gpu.jobs import Job, Missing, Options, release
from benchmarks.gpu.jobs import Row as Found
from benchmarks.gpu.machine import device, require
from benchmarks.step import BASE, COMPILED, CONTESTANTS, TOLERANCE, contestant, error, error_of
from dpfast import Performance, measure
from dpfast.kernels.precision import full_precision

GRAPHS, PRIVATE_COMPILED, PLAN = "non-private in CUDA graphs", "dpfast compiled", "plan of dpfast"
AROUND = "views, noise, Adam"  # relative to dpfast
MOST = "most"  # rows whose non-private step leaves most of the memory to what may need more
SIZES, SHARE = (512, 256, 128, 64), 0.35
FEW, PASS = 8, 32  # examples whose norms are gated; rows of a pass in float32
SPENT, ROUNDS = 12.0, 15  # seconds of a contestant's rounds, and the most of them
LONG = 5.0  # seconds of a step that is not taken more often than need be
FORMS = ("dpfast direct", "dpfast materialise", "dpfast gram")
PEERS = ("vmap", "Opacus hooks", "Opacus ghost")
GRAM_K = 4  # beyond, an example's Gram of all its positions fits nowhere
ALL = (1, 16, 4, 128)


@dataclass(frozen=True)
class Wave:
    """Contestants at each K, of so many rows. seconds: that one takes, about. float32 is without TF32.

    layout: of the model's weights and of images.
    """

    model: str
    rows: int | str
    augmults: tuple[int, ...]
    contestants: tuple[str, ...]
    seconds: float = 15
    dtype: str = "bfloat16"
    layout: torch.memory_format = torch.channels_last

    def row(self, augmult: int, rows: int) -> Row:
        return Row(self.model, rows // augmult, augmult, self.dtype)


WAVES = (
    Wave("unet83m", MOST, (1,), (BASE,), 25),
    Wave("unet83m", MOST, ALL, ("dpfast",), 30),
    Wave("unet83m", MOST, (128, 16), ("example at a time",), 20),
    Wave("unet6m", MOST, (1,), (BASE,)),
    Wave("unet6m", MOST, ALL, ("dpfast",), 20),
    Wave("unet83m", MOST, (1,), (COMPILED, PRIVATE_COMPILED), 90),
    Wave("unet83m", 64, (1,), (BASE, "dpfast", *PEERS), 20, "float32"),
    Wave("unet83m", 64, (1, 4), ("dpfast", "vmap"), 20),
    Wave("unet83m", MOST, (1, 16), FORMS, 20),
    Wave("unet83m", MOST, (16, 4, 128), (PRIVATE_COMPILED,), 90),
    Wave("unet83m", MOST, (4, 1), ("example at a time",), 60),
    Wave("unet6m", MOST, (1,), (COMPILED, PRIVATE_COMPILED), 60),
    Wave("unet6m", MOST, (1, 4), ("dpfast", *PEERS), 20, "float32"),
    Wave("unet6m", MOST, (128, 16, 4, 1), ("example at a time", *PEERS), 20),
    Wave("unet6m", MOST, (16, 4, 128), (PRIVATE_COMPILED,), 60),
    Wave("unet83m", MOST, (4, 128), FORMS, 20),
    Wave("unet6m", MOST, ALL, FORMS),
    Wave("unet83m", MOST, ALL, (PLAN,)),
    Wave("unet83m", MOST, (16, 1), (AROUND,)),
    Wave("unet83m", MOST, (1,), (GRAPHS,), 90),
    Wave("unet6m", MOST, (1,), (GRAPHS,), 60),
    Wave("unet83m", MOST, (1,), (COMPILED, PRIVATE_COMPILED), 90, layout=torch.contiguous_format),
)
DRY_WAVES = (
    Wave("digits", MOST, (1,), (BASE,)),
    Wave("digits", MOST, (4,), ("dpfast", "example at a time", PLAN, AROUND)),
    Wave("digits", 4, (1,), ("dpfast materialise", *PEERS), dtype="float32"),
)


def jobs(options: Options) -> Iterator[Job]:
    warnings.filterwarnings("ignore")
    bench = Bench((8,) if options.dry else SIZES)
    for wave in DRY_WAVES if options.dry else WAVES:
        for augmult in wave.augmults:
            for name in wave.contestants:
                layout = "" if wave.layout == torch.channels_last else " contiguous"
                title = f"{wave.model} {wave.dtype}{layout}, {wave.rows} rows, K={augmult}: {name}"
                yield Job(title, partial(bench.measured, wave, augmult, name), wave.seconds, limit=240)


def why_not(name: str, row: Row) -> str | None:
    if name == "Opacus ghost" and row.augmult > 1:
        return "it clips rows, not examples"
    if name == "dpfast gram" and row.augmult > GRAM_K:
        return f"Grams of K={row.augmult} times 1,024 positions"
    return "fewer rows than K" if row.examples == 0 else None


def in_graphs(task: c.Task) -> c.Step:
    """The non-private step, compiled, in CUDA graphs."""
    compiled = torch.compile(task.losses, mode="reduce-overhead")

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        task.forget()
        compiled().mean().backward()

    return step


@dataclass(frozen=True)
class Base:
    """A non-private step, its seconds, and bytes at most beyond the model."""

    task: c.Task
    step: c.Step
    seconds: float
    peak: int


class Bench:
    """What contestants share: weights of a model, the number of rows, non-private steps."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.models: dict[str, nn.Module] = {}
        self.rows: dict[str, int] = {}
        self.bases: dict[tuple[Row, str, torch.memory_format], Base] = {}

    def model(self, name: str) -> nn.Module:
        """On the device; contestants take copies."""
        if name not in self.models:
            require("diffusers")
            self.models[name] = MODELS[name].build().train().to(device())
        return self.models[name]

    def task(self, row: Row, layout: torch.memory_format) -> c.Task:
        images, *others = (x.to(device()) for x in MODELS[row.model].inputs(row.examples * row.augmult))
        model = copy.deepcopy(self.model(row.model)).to(memory_format=layout)
        inputs, dtype = (images.contiguous(memory_format=layout), *others), getattr(torch, row.dtype)
        return c.Task(model, inputs, row.examples, row.augmult, max_grad_norm=0.1, dtype=dtype)

    def most(self, model: str) -> int:
        """Rows of the largest non-private step that takes no more than ``SHARE`` of the memory."""
        if model not in self.rows:
            self.rows[model] = next((rows for rows in self.sizes[:-1] if self.fits(model, rows)), self.sizes[-1])
        return self.rows[model]

    def fits(self, model: str, rows: int) -> bool:
        key = Row(model, rows, 1, "bfloat16"), BASE, torch.channels_last
        try:
            if self.base(*key).peak <= SHARE * torch.cuda.mem_get_info()[1]:
                return True
        except torch.OutOfMemoryError:
            pass
        self.bases.pop(key, None)
        release()
        return False

    def base(self, row: Row, name: str, layout: torch.memory_format) -> Base:
        """Which knows rows, not examples: the same for every K."""
        key = replace(row, examples=row.examples * row.augmult, augmult=1), name, layout
        if key not in self.bases:
            task = self.task(row, layout)
            step = CONTESTANTS[name](task)
            for _ in range(2):
                step()
            seconds, _ = timed(step)
            task.forget()
            self.bases[key] = Base(task, step, seconds, measure.peak_storages(step))
            task.forget()
        return self.bases[key]

    def measured(self, wave: Wave, augmult: int, name: str) -> Found:
        row = wave.row(augmult, self.most(wave.model) if wave.rows == MOST else int(wave.rows))
        if reason := why_not(name, row):
            raise Missing(reason)
        if "Opacus" in name:
            require("opacus")
        found = {"row": row.name, "model": row.model, "B": row.examples, "K": augmult, "dtype": row.dtype}
        found |= {"layout": str(wave.layout).removeprefix("torch."), "contestant": name}
        with full_precision() if row.dtype == "float32" else nullcontext():
            return found | self.outcome(row, name, wave.layout)

    def outcome(self, row: Row, name: str, layout: torch.memory_format) -> Found:
        if name == PLAN:
            return planned(self.task(row, layout))
        if name == AROUND:
            return around.measured(self.task(row, layout), row.model, ROUNDS)
        base_name = COMPILED if name == PRIVATE_COMPILED else BASE
        base = self.base(row, base_name, layout)
        if name in (BASE, COMPILED):
            own = self.base(row, name, layout)
            task, step = own.task, own.step
        else:
            task = self.task(row, layout)
            step = in_graphs(task) if name == GRAPHS else contestant(name, row)(task)
        first, once, result = warmed_up(step)
        wrong, allowed = judged(task, self.model(row.model), result)
        found: Found = {"base": base_name, "first": first, "error": wrong}
        if not wrong <= allowed:
            return found | {"failed": f"wrong, by {wrong:.1e}; {allowed:.1e} is allowed"}
        del result
        return found | beside(base, step, once, task)


def timed(step: c.Step) -> tuple[float, c.Clipped | None]:
    measure.synchronize()
    begin = time.perf_counter()
    result = step()
    measure.synchronize()
    return time.perf_counter() - begin, result


def warmed_up(step: c.Step) -> tuple[float, float, c.Clipped | None]:
    """Seconds of the first step, which probes or compiles, and of the last; what it gives."""
    first, result = timed(step)
    again, result = timed(step)
    if again > LONG:
        return first, again, result
    return first, *timed(step)


def beside(base: Base, step: c.Step, once: float, task: c.Task) -> Found:
    """Time and memory relative to a non-private step."""
    rounds = max(1, min(ROUNDS, int(SPENT / (once + base.seconds))))
    seconds = measure.interleaved({"base": base.step, "": step}, rounds=rounds, warmup=int(once < 1))
    task.forget()
    peak = base.peak if step is base.step else measure.peak_storages(step)
    task.forget()
    found = {
        "rounds": rounds,
        "seconds": statistics.median(seconds[""]),
        "base_seconds": statistics.median(seconds["base"]),
        "time": measure.ratio(seconds, "", "base"),
        "peak": peak,
        "base_peak": base.peak,
        "memory": peak / base.peak,
    }
    said = f"{1e3 * found['seconds']:,.1f} ms, {found['time']:.3f} of the non-private step's"
    return found | {"line": f"{said}; {peak / 1e9:.2f} GB, {found['memory']:.3f}"}


def judged(task: c.Task, model: nn.Module, result: c.Clipped | None) -> tuple[float, float]:
    """The error of a step, and what is allowed: ``TOLERANCE``, or twice that of torch in the same dtype.

    model: with the weights of the task.
    """
    of_torch = replace(task, model=model)
    exact = by_autograd(replace(of_torch, dtype=torch.float32), result)
    sums = task.gradient() if result is None else result.sums
    norms = exact.norms if result is None else result.norms[few(task)].double()
    wrong, allowed = off(c.Clipped(norms, sums), exact), TOLERANCE[task.dtype]
    if wrong > allowed:
        allowed = max(allowed, 2 * off(by_autograd(of_torch, result), exact))
    return wrong, allowed


def off(got: c.Clipped, exact: c.Clipped) -> float:
    return error(got, exact) if len(exact.norms) else error_of(got.sums, exact.sums)


def by_autograd(task: c.Task, result: c.Clipped | None) -> c.Clipped:
    """Norms of a few examples, and the sum that the norms of all examples in ``result`` call for.

    Without one: the gradient of the mean loss.
    """
    each = 1 / task.augmult
    if result is None:
        mean = torch.full((len(task.inputs[0]),), 1 / len(task.inputs[0]), device=task.inputs[0].device)
        return c.Clipped(mean.new_zeros(0), gradient(task, mean))
    weights = each * task.factors(result.norms).float().repeat_interleave(task.augmult)
    norms = []
    for i in few(task):
        alone = torch.zeros_like(weights)
        alone[i * task.augmult : (i + 1) * task.augmult] = each
        norms.append(torch.stack([g.double().norm() for g in gradient(task, alone).values()]).norm())
    return c.Clipped(torch.stack(norms), gradient(task, weights))


def few(task: c.Task) -> list[int]:
    """Examples whose norms are gated, the first and the last among them."""
    return sorted({round(i) for i in torch.linspace(0, task.examples - 1, min(FEW, task.examples)).tolist()})


def gradient(task: c.Task, weights: Tensor) -> dict[str, Tensor]:
    """Of the sum of losses times ``weights [N]``, some rows at a time."""
    task.forget()
    with full_precision():
        for first in range(0, len(weights), PASS):
            own = slice(first, first + PASS)
            if weights[own].any():
                (weights[own] * task.losses(inputs=tuple(x[own] for x in task.inputs))).sum().backward()
    found = task.gradient()
    task.forget()
    return found


def planned(task: c.Task) -> Found:
    """What dpfast predicts of its step, on this device."""
    plan = c.planned(task, Performance())
    found = {"planned_time": plan.ratio(), "planned_peak": plan.private.peak, "planned_base_peak": plan.ordinary.peak}
    said = f"{plan.ratio():.3f} of the non-private step's time, {plan.private.peak / 1e9:.2f} GB"
    return found | {"line": f"{said}, {plan.private.peak / plan.ordinary.peak:.3f}"}
