"""GhostClipper: per-example clipping for any model in any loop."""

import warnings
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from dpfast.clipping.accumulate import Clipped
from dpfast.clipping.capture import Capture
from dpfast.clipping.ownership import Ownership, forward_problems
from dpfast.clipping.passes import Pass
from dpfast.clipping.problems import Problem, listed, refuse
from dpfast.clipping.trees import tensors_in
from dpfast.errors import CaptureError, ConfigError
from dpfast.performance import Performance


@dataclass(frozen=True)
class ClipResult:
    """Per-example gradient norms ``|G_i|`` and clip factors ``w_i``, both float64 ``[B]``.

    Both are computed from private data without noise: for debugging only, never to be logged or released.
    """

    norms: Tensor
    clip_factors: Tensor

    def __repr__(self) -> str:
        return "ClipResult(private values are not shown)"


class GhostClipper:
    """Adds ``sum_i min(1, C / |G_i|) G_i`` to ``p.grad``, where ``G_i`` is the gradient of one example.

    ``G_i`` is the mean over the example's K augmentations, over all trainable parameters together, as in
    Ghalebikesabi et al. (arXiv 2302.13861); row ``i*K + k`` of a batch is augmentation k of example i::

        clipper = dpfast.GhostClipper(model, max_grad_norm=1.0, augmult=K)
        with clipper:
            losses = loss_fn(model(x, t))    # one loss per row, [B*K]
            clipper.backward(losses)

    Guarantee: adding or removing one example moves the sum by at most C = ``max_grad_norm`` in Euclidean norm (up to
    float32 rounding, and up to 0.5% where a Gram is used: ``accumulate.GRAM_TRUST``), replacing one by at most 2C; an
    example whose loss or gradient is not finite contributes exactly 0. A model for which this cannot be
    shown is refused with ``CaptureError`` before any ``p.grad`` is written. Nothing is stored on the model; outside the
    block it is untouched. The caller owes two things: each example is in a batch once, and dropout inside the model
    reads a generator whose seed nobody knows (``DPTrainer`` sees to both).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_grad_norm: float,
        augmult: int = 1,
        performance: Performance | None = None,
    ) -> None:
        """
        model: any module; frozen parameters cost nothing.
        max_grad_norm: the clip norm C.
        augmult: K, the number of consecutive rows that belong to one example.
        performance: how to compute; never changes the result.

        Raises ``ConfigError`` for values out of range and ``CaptureError`` for half-precision parameters.
        """
        if not (max_grad_norm > 0 and max_grad_norm < float("inf")):
            raise ConfigError(f"max_grad_norm={max_grad_norm!r}: expected a positive, finite number")
        if isinstance(model, torch.jit.ScriptModule):
            raise CaptureError("a scripted model hides its operations: give the Python module it was made from")
        if augmult < 1:
            raise ConfigError(f"augmult={augmult!r}: expected at least 1 row per example")
        self.model = model
        self.max_grad_norm = float(max_grad_norm)
        self.augmult = augmult
        self.performance = performance or Performance()
        self._ownership = Ownership()
        self._forward_shown = False
        self._written: dict[int, tuple[Tensor, int]] = {}  # by id of the parameter: its p.grad and version
        self._named_unused: set[str] = set()
        self._capture: Capture | None = None
        self._model_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._input_shape: torch.Size | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        refuse(_parameter_problems(self.parameters))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name: those whose gradients are clipped together."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def wrote(self, parameter: nn.Parameter) -> bool:
        """Whether ``parameter.grad`` is None or exactly what this clipper last wrote."""
        if parameter.grad is None:
            return True
        grad, version = self._written.get(id(parameter), (None, 0))
        return parameter.grad is grad and parameter.grad._version == version

    def zero_grad(self) -> None:
        """Forget the accumulated sum: ``p.grad = None``."""
        for p in self.parameters.values():
            p.grad = None
        self._written.clear()

    def __enter__(self) -> Self:
        if self._capture is not None:
            raise CaptureError("this clipper is already active: leave its `with` block before entering it again")
        parameters = self.parameters
        refuse(_parameter_problems(parameters))
        constants = [*self.model.buffers(), *(p for p in self.model.parameters() if not p.requires_grad)]
        self._capture = Capture(parameters, constants)
        self._versions = self._current_versions()
        self._input_shape = None
        self._hook = self.model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        self._capture.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        assert self._capture is not None
        assert self._hook is not None
        self._capture.__exit__(kind, value, tb)  # type: ignore[no-untyped-call]
        self._hook.remove()
        if kind is None and self._capture.tape.uses:
            warnings.warn("left `with clipper` without clipper.backward(losses): nothing was learned", stacklevel=2)
        self._capture = self._model_call = self._hook = None

    def backward(self, losses: Tensor, *, example_mask: Tensor | None = None) -> ClipResult:
        """Clip and add to ``p.grad`` (created if None).

        losses: ``[B*K]``, one per row, not reduced, not scaled.
        example_mask: ``[B]`` of bool; False marks padding, which contributes exactly 0.

        Raises ``CaptureError``, listing every problem at once, before any ``p.grad`` is written.
        """
        capture = self._capture
        if capture is None:
            raise CaptureError("clipper.backward was called outside `with clipper`: compute the losses inside, too")
        try:
            with torch._C.DisableTorchFunction():
                examples = self._check_losses(losses, example_mask)
                refuse(capture.tape.problems + self._state_problems())
                if examples and not losses.requires_grad:
                    raise CaptureError("losses depend on no trainable parameter: compute them inside `with clipper`")
                self._show_forward(len(losses))
                clipped = self._clip(losses, examples, example_mask)
                self._write(clipped.sums)
        finally:
            capture.restart()
        if examples:
            self._warn_unused(clipped.sums)
        return ClipResult(clipped.norms, clipped.factors)

    def _clip(self, losses: Tensor, examples: int, mask: Tensor | None) -> Clipped:
        assert self._capture is not None
        if examples == 0:
            nothing = losses.detach().new_zeros(0, dtype=torch.float64)
            return Clipped(nothing, nothing, sums={})
        finite = losses.detach().isfinite().view(examples, -1).all(1)
        return Pass(
            capture=self._capture,
            parameters=self.parameters,
            ownership=self._ownership,
            performance=self.performance,
            losses=losses,
            examples=examples,
            augmult=self.augmult,
            max_grad_norm=self.max_grad_norm,
            mask=finite if mask is None else finite & mask,
        ).run()

    def _check_losses(self, losses: Tensor, mask: Tensor | None) -> int:
        """B, or ``CaptureError`` when ``losses`` is not one number per row."""
        rows = f"[B*{self.augmult}], one loss per row"
        if losses.ndim != 1:
            reduced = (
                " (reduced already? use reduction='none' and average over pixels only)" if losses.ndim == 0 else ""
            )
            raise CaptureError(f"losses have {losses.ndim} dimensions{reduced}: expected {rows}")
        if len(losses) % self.augmult:
            raise CaptureError(
                f"the number of losses is no multiple of augmult={self.augmult}: expected {rows}, all K rows of an"
                " example together"
            )
        examples = len(losses) // self.augmult
        if examples != 1 and self._capture is not None and not self._capture.detach:
            raise CaptureError(
                "the form 'example' took the model's input for one example, but there are losses of more: give the"
                " model all rows of the losses at once"
            )
        if self._averages_rows(len(losses)):
            raise CaptureError(
                f"there are fewer losses than rows in the model's input: expected {rows}; do not average over rows, not"
                " even over the K rows of an example (the clipper does)"
            )
        if mask is not None and (mask.shape != (examples,) or mask.dtype != torch.bool):
            raise CaptureError(
                f"example_mask of {mask.dtype} with {mask.ndim} dimensions: expected one torch.bool per example, [B]"
            )
        return examples

    def _averages_rows(self, losses: int) -> bool:
        """Whether the model saw more rows than there are losses (along dimension 1 in sequence-first models)."""
        shape = self._input_shape
        if shape is None or shape[0] <= losses:
            return False
        return not (len(shape) == 3 and shape[1] == losses)

    # What must hold before and after

    def _current_versions(self) -> dict[str, tuple[int, int]]:
        """Identity and version of every parameter and buffer (a count of batches aside): a change in place shows."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: (id(t), t._version) for name, t in named if not name.endswith("num_batches_tracked")}

    def _state_problems(self) -> list[Problem]:
        buffers = {name for name, _ in self.model.named_buffers()}
        now = self._current_versions()
        changed = [name for name in now.keys() | self._versions.keys() if now.get(name) != self._versions.get(name)]
        problems = [
            Problem(
                (name,),
                "changed during a private step" + (": a buffer would carry private data" if name in buffers else ""),
                "freeze it (eval mode, no running statistics), or update it from public data outside the step",
            )
            for name in sorted(changed)
        ]
        foreign = [name for name, p in self.parameters.items() if not self.wrote(p)]
        if foreign:
            problems.append(
                Problem(
                    (listed(foreign),),
                    "p.grad holds what this clipper did not write",
                    "call zero_grad() first, and let no other backward pass reach these parameters",
                )
            )
        return problems

    def _before_model(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model runs: what must not change, what the forward probe needs, how many rows there are."""
        capture = self._capture
        assert capture is not None
        if not capture.started:
            capture.started = True
            self._versions = self._current_versions()
            first = next((t for t in tensors_in((args, kwargs)) if t.ndim), None)
            alone = first is not None and first.shape[0] == self.augmult
            capture.detach = not (alone and self.performance.form == "example")
            self._input_shape = None if first is None else first.shape
        if not self._forward_shown and self._model_call is None:
            self._model_call = (args, kwargs)

    def _show_forward(self, rows: int) -> None:
        """Once, on synthetic input: no example's input changes another example's output."""
        if self._forward_shown or self._model_call is None or rows == 0:
            return
        refuse(forward_problems(self.model, *self._model_call, rows=rows, augmult=self.augmult))
        self._forward_shown = True
        self._model_call = None

    def _write(self, sums: dict[str, Tensor]) -> None:
        """Add the sums of one complete backward pass to ``p.grad``."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                if p.grad is None:
                    p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
                if name in sums:
                    p.grad += sums[name].to(p.dtype)
                self._written[id(p)] = (p.grad, p.grad._version)

    def _warn_unused(self, sums: dict[str, Tensor]) -> None:
        unused = [name for name in self.parameters if name not in sums and name not in self._named_unused]
        if unused:
            self._named_unused.update(unused)
            warnings.warn(
                f"no loss depends on {listed(unused)}: noise is added to them all the same; freeze what is not trained",
                stacklevel=3,
            )


def _parameter_problems(parameters: dict[str, nn.Parameter]) -> list[Problem]:
    problems = []
    half = [name for name, p in parameters.items() if p.dtype not in (torch.float32, torch.float64)]
    if half:
        what = (
            "half-precision parameters: the sum of clipped gradients would be rounded after its sensitivity was bounded"
        )
        cure = "keep float32 parameters and compute in bfloat16 under torch.autocast"
        problems.append(Problem((listed(half),), what, cure))
    hooked = [name for name, p in parameters.items() if p._post_accumulate_grad_hooks]
    if hooked:
        what = "a hook on its accumulated gradient would see, or use, what is not clipped"
        problems.append(Problem((listed(hooked),), what, "remove the hook: the update is DPOptimizer's"))
    return problems
