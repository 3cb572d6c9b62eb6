"""Where the user's losses are cut off from the model: leaves in the place of the model's outputs."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpfast.clipping.calls import Autocast, no_trace_left
from dpfast.clipping.problems import Problem
from dpfast.clipping.trees import replace_tensors
from dpfast.engine.shadows import Unseen
from dpfast.errors import CaptureError
from dpfast.seeding import RandomState

Reduction = Literal["mean", "sum"]  # of losses over the rows of a physical batch


@dataclass(frozen=True)
class Cut:
    """An output of the model, ``real``, and the leaf that took its place in the user's code; ``has_rows``: whether it
    has a row for each of the batch's.
    """

    real: Tensor
    leaf: Tensor
    has_rows: bool


def cut(output: Any, rows: int) -> tuple[Any, list[Cut], list[Tensor]]:
    """The model's ``output`` with every tensor that autograd follows cut off from its graph, in the same tree; the
    cuts, and what stands in the tree for each.
    """
    cuts: dict[int, tuple[Cut, Tensor]] = {}

    def replaced(t: Tensor) -> Tensor:
        if not t.requires_grad:
            return t
        if id(t) not in cuts:  # one tensor in two places of the tree stays one
            leaf = t.detach().requires_grad_()
            # A clone, so that the user may change it in place: a leaf may not, nor what the model's graph has saved.
            cuts[id(t)] = Cut(t, leaf, t.ndim > 0 and len(t) == rows), leaf.clone()
        return cuts[id(t)][1]

    with torch._C.DisableTorchFunction():
        tree = replace_tensors(output, replaced)
    return tree, [one for one, _ in cuts.values()], [given for _, given in cuts.values()]


def evaluated(module: nn.Module, call: tuple[Any, Any]) -> Any:
    """What the module returns for arguments in eval mode; nothing of the call is left behind.

    Raises ``Unseen`` where random numbers are drawn all the same.
    """
    args, kwargs = replace_tensors(call, Tensor.detach)
    fast = torch.backends.mha.get_fastpath_enabled()  # in eval mode alone: other shapes, and wrong under CPU's autocast
    with Autocast().again(), torch._C.DisableTorchFunction(), no_trace_left(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is said of the user's own call was said
        for part in module.modules():
            part.training = False  # by hand: train() may do more than that
        before = RandomState()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            output = module(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        if before.has_moved():
            raise Unseen("the model draws random numbers in eval mode")
        return output


def roots(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """What a call of ``Tensor.backward`` or ``torch.autograd.backward`` starts from, with the gradients given."""
    tensors = args[0] if args else kwargs.get("tensors", kwargs.get("self"))
    given = args[1] if len(args) > 1 else kwargs.get("gradient", kwargs.get("grad_tensors"))
    losses = [tensors] if isinstance(tensors, Tensor) else list(tensors or ())
    if given is None:
        return losses, [None] * len(losses)
    return losses, [given] if isinstance(given, Tensor) else list(given)


def scale_of_sum(
    losses: Sequence[Tensor], gradient: Sequence[Tensor | None], rows: int, reduction: Reduction, augmult: int
) -> float:
    """By which the gradient of the losses is that of a sum over rows."""
    if all(t.shape == (rows,) for t in losses) and all(g is None for g in gradient):
        return 1.0
    if any(t.numel() != 1 for t in losses) or any(g is not None and g.numel() != 1 for g in gradient):
        raise CaptureError(
            f"backward() of a private loss: expected one number, the {reduction} over the rows of the batch, or one"
            f" loss for each row, [B*{augmult}] (losses.backward(), without a gradient); got {losses[0].ndim}"
            " dimensions. Average over tokens or pixels of a row first (padding left out): losses.flatten(1).mean(1)"
        )
    return float(rows) if reduction == "mean" else 1.0


def surrogate_losses(cuts: Sequence[Cut], gradients: Sequence[Tensor | None], rows: int, scale: float) -> Tensor:
    """``[rows]``: numbers whose gradients with respect to the model's outputs are the losses', times ``scale``.

    They are finite where output and gradient are, as the losses themselves.
    """
    total: Tensor | None = None
    for one, g in zip(cuts, gradients, strict=True):
        if g is None or not one.has_rows:
            continue
        wide = torch.promote_types(one.real.dtype, torch.float32)
        each = (one.real.to(wide).reshape(rows, -1) * (g.to(wide) * scale).reshape(rows, -1)).sum(1)
        total = each if total is None else total + each
    if total is None:
        raise CaptureError(
            "the loss depends on no output of the private model: compute it from what model(...) returned for this"
            " batch, with gradients enabled"
        )
    return total


def reached_beside(loss: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[bool, list[Tensor], bool]:
    """What the graph of a loss ends at: whether at one of ``leaves``; leaves that are none of them; whether it goes on
    into a model that the clipper watches.
    """
    ours = {id(leaf) for leaf in leaves}
    at_cut, inside, others = False, False, list[Tensor]()
    visited: set[Any] = set()
    waiting: list[Any] = [t.grad_fn for t in loss]
    for t in loss:
        if t.grad_fn is None and t.requires_grad:
            at_cut |= id(t) in ours
            others += [] if id(t) in ours else [t]
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and leaf.grad_fn is None:
            if id(leaf) in ours:
                at_cut = True
            else:
                others.append(leaf)
        if getattr(node, "uses", None) is not None and hasattr(node, "tape"):
            inside = True
            continue
        waiting.extend(following for following, _ in node.next_functions)
    return at_cut, others, inside


def unrowed(cuts: Sequence[Cut], gradients: Sequence[Tensor | None]) -> list[Problem]:
    """A problem for each output without rows that the loss depends on."""
    used = [
        one
        for one, g in zip(cuts, gradients, strict=True)
        if g is not None and not one.has_rows and bool((g != 0).any())
    ]
    what = "the loss depends on an output of the model that has no row for each of the batch's (a loss that the model"
    what += " computes and averages itself, say)"
    cure = "have the model return one number, or more, for each row, and compute the loss from these outside of it"
    return [Problem((), what, cure)] * bool(used)
