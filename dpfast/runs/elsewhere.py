"""What a private step of the paper's UNet will cost on a GPU that is not here: predictions, nothing is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpfast.clipping import StepPlan, plan_step
from dpfast.diffusion.models import ADM_32, build_unet
from dpfast.kernels.rates import Rates, named
from dpfast.progress import Progress
from dpfast.tables import columns

AUGMULTS = (1, 4, 16, 128)
_USED = 0.9  # of the memory
_KERNELS = 25  # kinds of calls that are shown
_LEGEND = """
ordinary, private: seconds of a step; time, memory: the private step over the ordinary one.
GB: tensors at the peak of a step that shows that examples stay apart (the first, later ever fewer), beyond the model
and the optimizer. calling: seconds of Python in the private step, hidden where the GPU takes longer.
gram, direct, materialise: weights whose norms take that form."""
_LETTERS = """
GFLOP, MB, ms: of one call, with B examples of M positions (of all their rows), D inputs and P outputs."""


def state_bytes(model: nn.Module) -> int:
    """Of parameters, their clipped sum, Adam's two moments and a running mean, in float32."""
    return 4 * 5 * sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Setting:
    """A model, on whose rows the step is planned in bfloat16 and channels_last."""

    model: nn.Module

    @classmethod
    def of_paper(cls) -> Setting:
        return cls(build_unet(ADM_32, seed=0).to(memory_format=torch.channels_last))

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def plans(self, device: str, progress: Progress) -> dict[int, StepPlan]:
        """Of as many rows as fit, for every multiplicity."""
        rows, found = self.rows(device), {}
        for number, augmult in enumerate(AUGMULTS):
            progress(number, len(AUGMULTS), f"K = {augmult}")
            found[augmult] = self.plan(rows, augmult, device)
        progress(len(AUGMULTS), len(AUGMULTS), "done")
        return found

    def plan(self, rows: int, augmult: int, device: str) -> StepPlan:
        shape = (rows, ADM_32.channels, ADM_32.image_size, ADM_32.image_size)
        images = torch.zeros(1).expand(shape).to(memory_format=torch.channels_last)
        numbers = torch.zeros(rows, dtype=torch.int64)
        return plan_step(self.model, _losses, (images, numbers, numbers), augmult=augmult, device=device)

    def rows(self, device: str) -> int:
        """The largest power of two whose private step is predicted to fit the device's memory, at K = 1; one example's
        at least, at the largest K.
        """
        few = max(AUGMULTS)
        room = _USED * named(device).memory - state_bytes(self.model)
        return few * 2 ** max(0, int(math.log2(room / self.plan(few, 1, device).peak)))


def _losses(model: nn.Module, images: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    """Of a network that predicts the noise, ``[N]``."""
    with torch.autocast(images.device.type, torch.bfloat16):
        out = model(images, timesteps, labels).sample
    return (out.float() - images).square().flatten(1).mean(1)


def foretold(device: str, progress: Progress, *, kernels: bool) -> Iterator[str]:
    """The lines of ``dpfast plan --device``.

    Raises:
        ConfigError: a device of which nothing is known.
    """
    rates = named(device)
    setting = Setting.of_paper()
    plans = setting.plans(device, progress)
    rows = max(AUGMULTS) * plans[max(AUGMULTS)].examples
    yield f"PREDICTED for one {device.upper()}; nothing was measured. Assumed: {_assumed(rates)}."
    yield (
        f"UNet2DModel of {setting.parameters / 1e6:.1f}M parameters, 32x32, bfloat16 autocast, channels_last,"
        f" {rows} rows at a time."
    )
    yield ""
    yield from columns(compared(plans), words=())
    yield _LEGEND
    if kernels:
        for augmult, plan in plans.items():
            yield f"\ndpfast's kernels in the private step at K = {augmult} (torch's are not shown), longest first:"
            yield from columns(_listed(plan), words=(1, 2))
        yield _LETTERS


def _assumed(rates: Rates) -> str:
    return (
        f"{rates.library_brain / 1e12:.0f} TFLOP/s in torch's products and at most {rates.brain / 1e12:.0f} in ours,"
        f" {1e-12 / rates.load:.1f} TB/s, {1e6 * rates.gap:.1f} us between kernels;"
        f" of Python {1e6 * rates.op:.0f} us for a call of torch, {1e6 * rates.call:.0f} us for one of dpfast"
    )


def compared(plans: dict[int, StepPlan]) -> Iterator[tuple[str, ...]]:
    """A head, and a row for each multiplicity."""
    yield "K", "images", "ordinary", "private", "time", "memory", "GB", "calling", "gram", "direct", "materialise"
    for augmult, plan in plans.items():
        forms = [layer.form for layer in plan.layers]
        yield (
            str(augmult),
            str(plan.examples),
            f"{plan.ordinary.seconds:.3f}",
            f"{plan.private.seconds:.3f}",
            f"{plan.ratio():.2f}",
            f"{plan.private.peak / plan.ordinary.peak:.2f}",
            f"{plan.peak / 1e9:.0f}",
            f"{plan.private.calling:.3f}",
            *(str(forms.count(form)) for form in ("gram", "direct", "materialise")),
        )


def _listed(plan: StepPlan) -> Iterator[tuple[str, ...]]:
    yield "calls", "op", "shape", "GFLOP", "MB", "ms", "TFLOP/s", "TB/s", "ms of all"
    calls = {kernel: plan.kernels.count(kernel) for kernel in dict.fromkeys(plan.kernels)}
    longest = sorted(calls, key=lambda kernel: calls[kernel] * kernel.seconds, reverse=True)
    for kernel in longest[:_KERNELS]:
        yield (
            str(calls[kernel]),
            kernel.op,
            kernel.shape,
            f"{kernel.flops / 1e9:,.1f}",
            f"{kernel.bytes / 1e6:,.1f}",
            f"{1e3 * kernel.seconds:.3f}",
            f"{kernel.flops / kernel.seconds / 1e12:.0f}",
            f"{kernel.bytes / kernel.seconds / 1e12:.2f}",
            f"{1e3 * calls[kernel] * kernel.seconds:.2f}",
        )
    rest = longest[_KERNELS:]
    if rest:
        total = sum(calls[kernel] * kernel.seconds for kernel in rest)
        yield str(sum(calls[kernel] for kernel in rest)), "others", *[""] * 6, f"{1e3 * total:.2f}"
