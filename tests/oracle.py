"""The one oracle: a float64 loop over examples with plain autograd, independent of everything it judges."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Losses = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]  # (model, rows of the inputs) -> one loss per row


class Clipped:
    """Norms ``[B]`` and, by parameter name, the clipped sum."""

    def __init__(self, norms: Tensor, sums: dict[str, Tensor]) -> None:
        self.norms, self.sums = norms, sums


def per_example(
    model: nn.Module,
    losses: Losses,
    inputs: tuple[Tensor, ...],
    *,
    augmult: int,
    max_grad_norm: float,
    stability: float | None = None,
    dtype=torch.float64,
) -> Clipped:
    """The definition, example by example: gradient of the mean loss of the rows, its norm, its clipped share.

    stability: of automatic clipping.
    """
    model = copy.deepcopy(model).to(dtype)
    inputs = tuple(x.detach().contiguous().to(dtype) if x.is_floating_point() else x for x in inputs)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in trainable.items()}
    norms = []
    for start in range(0, inputs[0].shape[0], augmult):
        rows = tuple(x[start : start + augmult] for x in inputs)
        grads = torch.autograd.grad(losses(model, rows).mean(), list(trainable.values()), allow_unused=True)
        present = {name: grad for name, grad in zip(trainable, grads, strict=True) if grad is not None}
        norm = torch.stack([grad.square().sum() for grad in present.values()]).sum().sqrt()
        norms.append(norm)
        for name, grad in present.items():
            factor = (max_grad_norm / norm).clamp(max=1) if stability is None else max_grad_norm / (norm + stability)
            sums[name] += factor * grad
    return Clipped(torch.stack(norms), sums)


def errors(got: Clipped, exact: Clipped) -> tuple[float, float]:
    """Largest relative error of a norm, and the error of all sums together relative to their norm."""
    norms = ((got.norms.double() - exact.norms).abs() / exact.norms.clamp(min=1e-30)).max().item()
    total = torch.stack([s.square().sum() for s in exact.sums.values()]).sum().sqrt().clamp(min=1e-30)
    parts = [(got.sums[name].double() - s).square().sum() for name, s in exact.sums.items()]
    return norms, (torch.stack(parts).sum().sqrt() / total).item()


def assert_as_good_as_torch(got: Clipped, plain: Clipped, exact: Clipped, dtype=torch.float32) -> None:
    """The 2x rule: an error at most twice that of plain torch in the same dtype, plus a floor of a few roundings."""
    floor = 8 * torch.finfo(dtype).eps
    for name, ours, theirs in zip(("norms", "clipped sum"), errors(got, exact), errors(plain, exact), strict=True):
        assert ours <= 2 * theirs + floor, f"{name}: error {ours:.2e}, plain torch {theirs:.2e}"
