"""For tests only: private randomness that can be repeated, and the sensitivity of a step as it is, measured."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dpfast.data.images import ImageSet
from dpfast.errors import ConfigError
from dpfast.privacy import entropy
from dpfast.seeding import seeded

_NEAR = 0.5  # of the promise: what moves less than this shows little


@contextmanager
def injected_entropy(seed: int) -> Iterator[None]:
    """Replace the operating system's entropy by streams that ``seed`` determines, inside the ``with`` block: one for
    each request, so that a request for fewer bytes gets the first of the same.

    Whoever knows the seed can subtract the noise: there is NO privacy. Ledger lines and privacy statements
    written inside say "TEST ENTROPY: no guarantee".
    """
    outside, requests = entropy.source, itertools.count()
    entropy.source = lambda count: np.random.Generator(np.random.Philox([seed, next(requests)])).bytes(count)
    try:
        yield
    finally:
        entropy.source = outside


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The most that a step's result moved between neighbouring data sets, as an L2 norm over all its tensors.

    promised: what it may move. neighbor: what was done to the data set then. parts: what each tensor moved, the most
    first.
    """

    measured: float
    promised: float
    neighbor: str
    parts: dict[str, float]


def assert_sensitivity(
    step: Callable[[Any], Any],
    dataset: Any,
    *,
    promised: float,
    model: nn.Module | None = None,
    neighboring: Literal["add_remove", "replace"] = "add_remove",
    neighbors: int = 16,
    added: Any = None,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Sensitivity:
    """Run ``step`` on neighbouring data sets under identical randomness, and hold what its results move by against what
    it promises. For any training step, of dpfast or not.

        def step(examples):
            images, labels = examples
            with clipper:
                clipper.backward(cross_entropy(model(images), labels, reduction="none"))

        assert_sensitivity(step, (images, labels), promised=clipper.max_grad_norm, model=model)

    step: takes a data set of the kind of ``dataset`` and gives the tensors that noise makes private (one, a sequence or
        a mapping by name): the sum of clipped gradients, that sum with its noise, or the update made of it. Noise is
        the same in both runs and cancels: the generators of torch, numpy and Python start from ``seed``, and so does
        dpfast's entropy (``injected_entropy``). Numbers drawn for a whole batch at once (dropout) may change with its
        size: key them by example (``dpfast.data.keyed``) or switch them off. Where it gives None, the gradients of
        ``model`` count.
    dataset: an ``ImageSet``, a tensor or a tuple of tensors by example, or a sequence of examples.
    promised: the most that the result may move, as an L2 norm: the clip norm C where it is a sum, C over the expected
        batch size where it is a mean; for "replace" twice that.
    model: its parameters, buffers and gradients are put back before every run. Nothing else that a step changes is:
        make optimizers inside of it.
    neighbors: examples that are removed (or replaced by another) one by one, all of them where there are no more.
    added: further examples, of the kind of ``dataset``, each added (or put in the place of one) by itself: try extreme
        ones.
    tolerance: relative, what rounding may add.

    Raises AssertionError where a result moves further, and ConfigError where the same data set gives different results
    twice. Warns when no neighbour moved anything by half of the promise: choose a smaller clip norm, or other examples.
    """
    run = _Repeated(step, model, seed)
    found: list[Sensitivity] = []
    for neighbor, one, other in _neighbors(dataset, added, neighboring, neighbors, seed):
        first = run(one)
        if not found:
            _check_repeatable(first, run(one), tolerance * promised)
        parts = _distances(first, run(other))
        found.append(
            Sensitivity(measured=math.hypot(*parts.values()), promised=promised, neighbor=neighbor, parts=parts)
        )
    worst = max(found, key=lambda one: math.inf if math.isnan(one.measured) else one.measured)
    if not worst.measured <= promised * (1 + tolerance):
        raise AssertionError(_failure(worst))
    if worst.measured < _NEAR * promised:
        warnings.warn(
            f"assert_sensitivity: nothing moved a result by more than {worst.measured:.3g}, where {promised:.3g} is"
            " promised: this shows little. Choose a clip norm below the gradients' norms, or other examples",
            stacklevel=2,
        )
    return worst


class _Repeated:
    """Runs a step on a data set, always from the same state and randomness; its tensors by name, in float64."""

    def __init__(self, step: Callable[[Any], Any], model: nn.Module | None, seed: int) -> None:
        self._step, self._model, self._seed = step, model, seed
        self._state = {} if model is None else {name: value.clone() for name, value in model.state_dict().items()}

    def __call__(self, dataset: Any) -> dict[str, Tensor]:
        model = self._model
        if model is not None:
            model.load_state_dict(self._state)
            model.zero_grad(set_to_none=True)
        device = "cpu" if model is None else next(model.parameters()).device
        with seeded(self._seed, device), injected_entropy(self._seed):
            result = self._step(dataset)
        if result is None and model is not None:
            result = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return _named(result)


def _named(result: Any) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        result = {"result": result}
    elif isinstance(result, Sequence):
        result = {f"[{i}]": value for i, value in enumerate(result)}
    if not isinstance(result, Mapping) or not all(isinstance(value, Tensor) for value in result.values()):
        raise ConfigError(
            f"assert_sensitivity: the step gave {type(result).__name__}; expected a tensor, a sequence or mapping of"
            " tensors, or None together with model=..., whose gradients are then taken"
        )
    return {str(name): value.detach().double().cpu().clone() for name, value in result.items()}


def _distances(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """L2 by tensor, the largest first; one that is missing is 0."""
    nothing = torch.zeros(())
    moved = {name: float((one.get(name, nothing) - other.get(name, nothing)).norm()) for name in {**one, **other}}
    return dict(sorted(moved.items(), key=lambda item: -item[1]))


def _check_repeatable(first: Mapping[str, Tensor], again: Mapping[str, Tensor], allowed: float) -> None:
    moved = _distances(first, again)
    if math.hypot(*moved.values()) > allowed:  # what is not a number is found to move too far
        raise ConfigError(
            f"assert_sensitivity: the same data set gave results {math.hypot(*moved.values()):.3g} apart"
            f" ({next(iter(moved))}): the step keeps a state (give it as model=..., make optimizers inside), or draws"
            " from a generator of its own (use torch's, numpy's or Python's shared one)"
        )


def _failure(found: Sensitivity) -> str:
    most = ", ".join(f"{name} {moved:.3g}" for name, moved in list(found.parts.items())[:3])
    return (
        f"sensitivity {found.measured:.6g}, promised {found.promised:.6g} ({found.measured / found.promised:.4g}"
        f" times): {found.neighbor}. Moved most: {most}"
    )


def _neighbors(dataset: Any, added: Any, neighboring: str, neighbors: int, seed: int) -> Iterator[tuple[str, Any, Any]]:
    """(What is done to it, data set, neighbour): they differ at the end, where no other example changes its place."""
    size = _size(dataset)
    if size < 2 or neighboring not in ("add_remove", "replace"):
        raise ConfigError(
            f"assert_sensitivity: {size} examples, neighboring={neighboring!r}; expected two or more, and"
            " 'add_remove' or 'replace'"
        )
    every = torch.arange(size)
    for i in torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:neighbors].tolist():
        rest = every[every != i]
        one = _select(dataset, torch.cat([rest, every[i : i + 1]]))
        if neighboring == "add_remove":
            yield f"example {i} removed", one, _select(dataset, rest)
        else:
            yield f"example {i} replaced", one, _select(dataset, torch.cat([rest, rest[i % (size - 1)].view(1)]))
    for i in range(0 if added is None else _size(added)):
        extra = _select(added, torch.tensor([i]))
        if neighboring == "add_remove":
            yield f"example {i} of added ones added", dataset, _joined(dataset, extra)
        else:
            yield f"the last example replaced by added one {i}", dataset, _joined(_select(dataset, every[:-1]), extra)


def _size(dataset: Any) -> int:
    return len(dataset[0]) if isinstance(dataset, tuple) else len(dataset)


def _select(dataset: Any, ids: Tensor) -> Any:
    if isinstance(dataset, ImageSet):
        return dataset.select(ids)
    if isinstance(dataset, Tensor):
        return dataset[ids]
    if isinstance(dataset, tuple):
        return tuple(part[ids] for part in dataset)
    return [dataset[i] for i in ids.tolist()]


def _joined(dataset: Any, extra: Any) -> Any:
    if isinstance(dataset, ImageSet):
        images, labels = (torch.cat([getattr(x, name) for x in (dataset, extra)]) for name in ("images", "labels"))
        return ImageSet(images, labels, dataset.classes)
    if isinstance(dataset, Tensor):
        return torch.cat([dataset, extra])
    if isinstance(dataset, tuple):
        return tuple(torch.cat(pair) for pair in zip(dataset, extra, strict=True))
    return [*(dataset[i] for i in range(len(dataset))), *extra]
