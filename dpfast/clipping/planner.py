"""What a private step will cost, before it runs: a trace with fake tensors, which have shapes and no numbers.

The trace runs the step's own code (capture, terms, choice of forms), so the plan shows what the step will do. Peak
memory is that of live tensor storages, as the allocator would see them; time is a prediction from FLOPs, bytes and the
device's rates (``dpfast.kernels.rates``), which are known of some that need not be here.
"""

import copy
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeCopyMode, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dpfast.clipping.accumulate import Accumulation
from dpfast.clipping.capture import Capture
from dpfast.clipping.forms import Forms
from dpfast.clipping.ownership import Ownership
from dpfast.clipping.passes import Begun, Pass
from dpfast.clipping.problems import refuse
from dpfast.clipping.rule import ClipRule
from dpfast.clipping.trees import replace_tensors, tensors_in
from dpfast.clipping.watch import Inventory
from dpfast.errors import CaptureError
from dpfast.kernels import cost
from dpfast.kernels.dispatch import planned_for
from dpfast.kernels.rates import Rates, named, rates_of
from dpfast.kernels.registry import scratch_bytes
from dpfast.performance import Performance
from dpfast.tables import columns

Losses = Callable[..., Tensor]  # (model, *inputs) -> [B*K]

# Python, for each use of parameters, in calls of an op: 0.3 ms where one takes 30 us. (It runs between convolutions,
# which leave nothing of it in the caches; by itself it takes a quarter of that.)
HANDLING = 10


@dataclass(frozen=True)
class Layer:
    """A weight whose gradients are computed from factors, and what the forms would cost.

    shape: of the weight; form: the one chosen; costs: of every form.
    """

    name: str
    shape: tuple[int, ...]
    form: cost.Form
    costs: dict[cost.Form, cost.Cost]


@dataclass(frozen=True)
class Total:
    """working: seconds, predicted; calling: of Python meanwhile, if a GPU works; peak: bytes of tensors that a step
    holds at a time, beyond the model and its inputs.
    """

    working: float
    calling: float
    peak: int

    @property
    def seconds(self) -> float:
        """Of the whole step, whichever takes longer."""
        return max(self.working, self.calling)


@dataclass(frozen=True)
class StepPlan:
    """One private step of ``examples`` of ``augmult`` rows, and the ordinary step of the same rows; ``str`` is a table.

    small: number of the other parameters (biases, affines of norms), whose gradients are stored: ``small_bytes``.
    kernels: that the private step calls beside torch's own.
    showing: the private step when it has to show that examples stay apart, without the time of probes that repeat.
    """

    examples: int
    augmult: int
    layers: tuple[Layer, ...]
    small: int
    small_bytes: int
    kernels: tuple[cost.Kernel, ...]
    private: Total
    showing: Total
    ordinary: Total

    @property
    def peak(self) -> int:
        """Bytes of tensors that any private step of these rows holds at a time."""
        return max(self.private.peak, self.showing.peak)

    def ratio(self, form: cost.Form | None = None) -> float:
        """Predicted time of the private step over that of the ordinary one; with one form for all weights, if given."""
        chosen = sum(layer.costs[layer.form].seconds for layer in self.layers)
        forced = chosen if form is None else sum(layer.costs[form].seconds for layer in self.layers)
        private = replace(self.private, working=self.private.working - chosen + forced)
        return private.seconds / self.ordinary.seconds

    def __str__(self) -> str:
        rows = [("weight", "shape", "form", "ms", "MB kept")]
        for layer in self.layers:
            of = layer.costs[layer.form]
            shape = "x".join(map(str, layer.shape))
            rows.append((layer.name, shape, layer.form, f"{1e3 * of.seconds:.2f}", f"{of.kept / 1e6:.2f}"))
        rows.append((f"{self.small} biases, affines, ...", "", "materialise", "", f"{self.small_bytes / 1e6:.2f}"))
        lines = list(columns(rows, words=range(3)))
        showing = f"      ({self.showing.peak / 1e6:,.1f} MB where it shows that examples stay apart)"
        for name, total, note in (("private step", self.private, showing), ("ordinary step", self.ordinary, "")):
            lines.append(f"{name:14} {total.seconds:8.3f} s {total.peak / 1e6:10,.1f} MB{note}")
        if self.private.calling:
            works, calls = self.private.working, self.private.calling
            lines.append(
                f"{'':14} {works:8.3f} s on the GPU, {calls:.3f} s of Python meanwhile: the step takes the longer"
            )
        memory = self.private.peak / self.ordinary.peak
        forced = ", ".join(f"{form} {self.ratio(form):.2f}" for form in cost.FORMS)
        lines.append(f"{'ratio':14} {self.ratio():8.3f}   {memory:10.3f}      (time with one form for all: {forced})")
        return "\n".join(lines)


class GpuAutocast(TorchFunctionMode):
    """For a trace on the CPU: what autocast computes in float32 on a GPU, and there in its own dtype."""

    WIDENED = frozenset((F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.WIDENED and torch.is_autocast_enabled("cpu"):
            args, kwargs = replace_tensors((args, kwargs), lambda t: t.float() if t.is_floating_point() else t)
        return func(*args, **kwargs)


class Meter(TorchDispatchMode):
    """Counts what dispatched operations cost: FLOPs, bytes read and written, and the most bytes alive at a time."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        """known: tensors that were there before, and do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.brain_flops = self.read = self.written = self.calls = self.launches = 0
        self.alive = self.peak = 0
        self.of_dpfast: list[tuple[str, str, int]] = []  # ops without a form: shape of the first input, bytes
        self._sizes = {_key(t): 0 for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        made = [t for t in tensors_in(output) if _key(t) not in self._sizes]
        for t in made:
            self._see(t.untyped_storage())
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            flops = _flops(func, counted, args, kwargs, output)
            if made and made[0].dtype in (torch.bfloat16, torch.float16):
                self.brain_flops += flops
            else:
                self.flops += flops
            self.peak = max(self.peak, self.alive + _reordered(func, args))
        elif func.namespace == "dpfast":
            self.peak = max(self.peak, self.alive + scratch_bytes(func, args))
        if counted is None and made and not _has_a_form(func):
            read, written = (sum(t.nbytes for t in tensors) for tensors in (tensors_in((args, kwargs)), made))
            self.read += read
            self.written += written
            if func.namespace == "dpfast":
                self.of_dpfast.append((func._opname, "x".join(map(str, args[0].shape)), read + written))
        self.calls += 1
        self.launches += bool(made)
        return output

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._sizes[key] = size
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)

    def total(self, rates: Rates, norms: float = 0.0, uses: int = 0) -> Total:
        """As the device's rates have it. norms: seconds of what has a form; uses: of parameters, seen to by Python."""
        products = self.flops / rates.library + self.brain_flops / rates.library_brain
        working = norms + products + self.read * rates.load + self.written * rates.store
        calling = self.calls * rates.op + HANDLING * rates.call * uses
        if rates.is_gpu:
            return Total(working + self.launches * rates.gap, calling, self.peak)
        return Total(working + calling, 0.0, self.peak)

    def kernels(self, rates: Rates) -> tuple[cost.Kernel, ...]:
        """dpfast's, of ops without a form: they take as long as their bytes."""
        call = rates.gap if rates.is_gpu else rates.call
        return tuple(cost.Kernel(op, shape, 0.0, size, size * rates.load + call) for op, shape, size in self.of_dpfast)


def _flops(func: Any, counted: Callable[..., int], args: Any, kwargs: Any, output: Any) -> int:
    """As torch counts them, but for backward passes of convolutions, which it counts as if there were one group."""
    if func is not torch.ops.aten.convolution_backward.default:
        return counted(*args, **kwargs, out_val=output)
    g, x, weight, *_, (of_input, of_weight, _) = args
    small = x if args[7] else g  # transposed
    return 2 * small.numel() * weight[0].numel() * (of_input + of_weight)


def _reordered(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes of the copies, in layouts of its own, that oneDNN makes for the backward pass of a convolution."""
    if func is not torch.ops.aten.convolution_backward.default or args[0].device.type != "cpu":
        return 0
    g, x, *_, (_, of_weight, _) = args
    sizes = [t.numel() * t.element_size() for t in (g, x)]
    return sum(sizes) if of_weight else max(sizes)


def _has_a_form(func: Any) -> bool:
    """Whether an op is one of those whose time ``cost`` predicts."""
    return func.name().startswith(("dpfast::conv_", "dpfast::linear_", "dpfast::embedding_", "dpfast::clip_"))


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def plan_step(
    model: nn.Module,
    losses: Losses,
    inputs: tuple[Tensor, ...],
    *,
    augmult: int = 1,
    performance: Performance | None = None,
    part: bool = False,
    device: str | None = None,
) -> StepPlan:
    """The plan of ``losses(model, *inputs) -> [B*K]``; nothing is computed.

    device: one of ``dpfast.kernels.rates.DEVICES``, which need not be here; by default the model's.

    part: the losses are of some rows of one example, whose other rows other passes bring. A compiled model is planned
    as the eager one, which holds more: fused operations keep less of what is between them.

    Raises ``CaptureError`` for a model that cannot be clipped, or that looks at numbers (``.item()``), which a trace
    has not.
    """
    performance = performance or Performance()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        fake = copy.deepcopy(model)
    for p in fake.parameters():
        p.grad = None
    given = tuple(mode.from_tensor(t) for t in inputs)
    rates = named(device) if device else rates_of(next((p.device.type for p in fake.parameters()), "cpu"))
    try:
        with mode, planned_for("triton" if device else None), GpuAutocast() if device else nullcontext():
            ordinary, rows = _ordinary(fake, losses, given)
            alone = performance.form == "example" and rows <= augmult
            step = partial(
                _private,
                fake,
                losses,
                given,
                augmult,
                Forms(performance, rates if device else None),
                part=part,
                alone=alone,
            )
            private, accumulation = step()
            showing = step(showing=True)[0] if accumulation.examples > 1 else private
    except DataDependentOutputException as error:
        raise CaptureError(
            f"the step cannot be planned: it looks at numbers ({error}), and a plan knows only shapes; use torch.where"
        ) from error
    of_forms = [cost.kernels(work, form, rates) for _, work, form in accumulation.chosen]
    layers = [
        Layer(
            name,
            tuple(accumulation.parameters[name].shape),
            form,
            {f: cost.predict(work, f, rates) for f in cost.FORMS},
        )
        for name, work, form in accumulation.chosen
    ]
    norms = sum(layer.costs[layer.form].seconds for layer in layers)
    uses = 0 if alone else len(accumulation.tape.uses)
    factored = {layer.name for layer in layers}
    others = [p for name, p in accumulation.parameters.items() if name not in factored]
    return StepPlan(
        accumulation.examples,
        augmult,
        tuple(layers),
        len(others),
        sum(accumulation.examples * p.numel() * p.element_size() for p in others),
        (*(kernel for pair in of_forms for kernel in pair), *private.kernels(rates)),
        private.total(rates, norms, uses),
        showing.total(rates, norms, uses),
        ordinary.total(rates),
    )


def _meter(model: nn.Module, inputs: tuple[Tensor, ...]) -> Meter:
    return Meter([*model.parameters(), *model.buffers(), *inputs])


def _ordinary(model: nn.Module, losses: Losses, inputs: tuple[Tensor, ...]) -> tuple[Meter, int]:
    """And the number of rows."""
    with _meter(model, inputs) as meter:
        rows = losses(model, *inputs)
        count = len(rows)
        rows.mean().backward()
    for p in model.parameters():
        p.grad = None
    return meter, count


def _private(
    model: nn.Module,
    losses: Losses,
    inputs: tuple[Tensor, ...],
    augmult: int,
    forms: Forms,
    *,
    part: bool,
    alone: bool,
    showing: bool = False,
) -> tuple[Meter, Accumulation]:
    """The step as ``GhostClipper`` takes it, less what it looks at numbers for: verdicts and fingerprints.

    part: a pass after the first, beside the gradients of those before it. alone: autograd makes the gradient of one
    example. showing: with one run of each probe.
    """
    tensors = Inventory.of(model)
    with _meter(model, inputs) as meter:
        capture = Capture(tensors.trainable, tensors.fixed, torch.zeros((), requires_grad=True), on_start=lambda: None)
        capture.detach = not alone
        seen = {name: p.new_zeros(1, *p.shape) for name, p in tensors.trainable.items()} if part else {}
        with capture:
            rows = losses(model, *inputs)
            with torch._C.DisableTorchFunction():
                examples = 1 if part else len(rows) // augmult
                mask, rule = rows.new_ones(examples, dtype=torch.bool), ClipRule(max_grad_norm=1.0)
                step = Pass(
                    capture=capture,
                    parameters=tensors.trainable,
                    ownership=Ownership(),
                    forms=forms,
                    losses=rows,
                    examples=examples,
                    augmult=augmult,
                    rule=rule,
                    path=(),
                    mask=mask,
                    begun=Begun(seen, 0, mask) if part else None,
                )
                del rows, seen
                if showing:
                    _forward_again(model, losses, inputs)
                accumulation = step.accumulate_unshown(showing=showing)
                refuse(capture.tape.problems)
                with torch.no_grad():
                    clipped = accumulation.finish(rule, mask)
                    held = {name: clipped.sums.pop(name).contiguous() for name in tuple(clipped.sums)}
        del held
    return meter, accumulation


def _forward_again(model: nn.Module, losses: Losses, inputs: tuple[Tensor, ...]) -> None:
    """On other inputs, as probes do."""
    with torch.no_grad():
        before = losses(model, *inputs)
        after = losses(model, *[t.clone() for t in inputs])
    del before, after
