"""The two ways through a private backward pass: a batch of examples, or one example alone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpfast.clipping.accumulate import Accumulation, Clipped
from dpfast.clipping.capture import Capture
from dpfast.clipping.ownership import Evidence, Ownership, possible_dims, weigh
from dpfast.clipping.problems import Problem, refuse
from dpfast.clipping.rows import Rows
from dpfast.clipping.tape import Receive, TapedUse
from dpfast.clipping.terms import Stored
from dpfast.kernels.clip import clip_factors
from dpfast.performance import Performance

Record = tuple[TapedUse, tuple[Tensor, ...], Tensor]


@contextmanager
def no_capture() -> Iterator[None]:
    """Plain torch: neither recorded by autograd nor seen by the capture."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        yield


@dataclass(frozen=True)
class Pass:
    """Everything a backward pass over ``losses [B*K]`` needs."""

    capture: Capture
    parameters: Mapping[str, nn.Parameter]
    ownership: Ownership
    performance: Performance
    losses: Tensor
    examples: int
    augmult: int
    max_grad_norm: float
    mask: Tensor  # False for examples that contribute nothing: padding, and those whose loss is not finite

    def run(self) -> Clipped:
        """Norms, factors and clipped sums; raises ``CaptureError`` with all problems, writes nothing."""
        return self._all_at_once() if self.capture.detach else self._one_example()

    def _all_at_once(self) -> Clipped:
        tape = self.capture.tape
        pending = self.ownership.pending(tape.uses) if self.examples > 1 else set()
        records: list[Record] = []
        accumulation = Accumulation(
            self.parameters, self.capture.derived, tape, self.examples, self.performance, self.losses.device
        )

        def receive(use: TapedUse, saved: tuple[Tensor, ...], g: Tensor) -> None:
            if use.site not in tape.uses:
                tape.problems.append(_unseen(use))
            elif pending:
                records.append((use, saved, g))
            else:
                accumulation.add(use, saved, g, self._rows(use, g))

        leaked = self._backward(None, receive, retain_graph=bool(pending))
        refuse(tape.problems + [_leak(name) for name, grad in leaked.items() if grad is not None])
        if pending:
            self._show_ownership([record for record in records if record[0].site in pending])
        with no_capture():
            for use, saved, g in records:
                accumulation.add(use, saved, g, self._rows(use, g))
            return accumulation.finish(self.max_grad_norm, self.mask)

    def _show_ownership(self, records: list[Record]) -> None:
        """Back-propagate single examples until every use that received a gradient has a row dimension."""
        evidence = {
            use.site: Evidence(possible_dims(use, g, self.examples)) for use, _, g in records if bool((g != 0).any())
        }

        def observe(example: int) -> None:
            def receive(use: TapedUse, _saved: tuple[Tensor, ...], g: Tensor) -> None:
                if use.site in evidence:
                    evidence[use.site] = weigh(evidence[use.site], g, example, self.examples)

            self._backward(example, receive, retain_graph=True)

        for example in _spread(self.examples):
            if all(found.settled for found in evidence.values()):
                break
            observe(example)
        refuse(self.ownership.settle(evidence))

    def _one_example(self) -> Clipped:
        """The batch is one example: its gradient is the ordinary one, and no rows can mix."""
        assert self.examples == 1
        grads = self._backward(None, lambda *_: None, retain_graph=False)
        refuse(self.capture.tape.problems)
        with no_capture():
            stored = {name: Stored(grad.unsqueeze(0)) for name, grad in grads.items() if grad is not None}
            sq = self.losses.new_zeros(1, dtype=torch.float64)
            for term in stored.values():
                sq += term.sq_norms()
            factors = torch.where(self.mask, clip_factors(sq, self.max_grad_norm), 0)
            return Clipped(sq.sqrt(), factors, {name: term.clipped_sum(factors) for name, term in stored.items()})

    def _backward(self, example: int | None, receive: Receive, *, retain_graph: bool) -> dict[str, Tensor | None]:
        """Back-propagate all losses, or one example's; what autograd itself gives each parameter.

        Meanwhile every ``p.grad`` is set aside, so that whatever reaches one (a path that was not captured, a backward
        pass inside the backward pass) is seen and never added to what the clipper has written. The capture stays on:
        activation checkpointing runs parts of the forward pass again.
        """
        cotangent = torch.full_like(self.losses, 1 / self.augmult)
        if example is not None:
            rows = torch.arange(len(cotangent), device=cotangent.device) // self.augmult
            cotangent = torch.where(rows == example, cotangent, 0)
        parameters = list(self.parameters.values())
        set_aside = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            with torch._C._EnableTorchFunction(), self.capture.tape.receiving(receive):
                # torch.autograd.backward, less its own torch-function dispatch: that would leave the capture
                grads = torch.autograd.Variable._execution_engine.run_backward(
                    (self.losses,),
                    (cotangent,),
                    retain_graph,
                    False,  # create_graph
                    (self.capture.tape.anchor, *parameters),
                    allow_unreachable=True,
                    accumulate_grad=False,
                )
            return {
                name: p.grad if grad is None else grad
                for (name, p), grad in zip(self.parameters.items(), grads[1:], strict=True)
            }
        finally:
            for p, grad in zip(parameters, set_aside, strict=True):
                p.grad = grad

    def _rows(self, use: TapedUse, g: Tensor) -> Rows:
        possible = possible_dims(use, g, self.examples)
        dim = self.ownership.dims.get(use.site, possible[0] if possible else 0)
        if self.examples > 1 and dim not in possible:
            refuse(
                [
                    Problem(
                        use.site.names,
                        f"{use.site.function}: the output cannot be cut into examples along dimension {dim}",
                        "keep the rows of the batch together along one dimension",
                    )
                ]
            )
        return Rows(self.examples, dim)


def _spread(examples: int) -> list[int]:
    """All examples, the first and the last in front."""
    return [0, examples - 1, *range(1, examples - 1)]


def _unseen(use: TapedUse) -> Problem:
    return Problem(
        use.site.names,
        f"{use.site.function}: first run during the backward pass, so nothing is known of its rows",
        "checkpoint activations with use_reentrant=False",
    )


def _leak(name: str) -> Problem:
    return Problem(
        (name,),
        "the losses depend on this parameter along a path that was not captured",
        "run the whole forward pass inside `with clipper`, outside scripted functions, and checkpoint activations with"
        " use_reentrant=False",
    )
