"""For tests only: private randomness that can be repeated, the sensitivity of a step as it is, measured, and what an
attacker tells of the data by its results.
"""

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
from dpfast.privacy.bounds import LowerBound, two_worlds_bound
from dpfast.seeding import seeded

_NEAR = 0.5  # of the promise: what moves less than this shows little
_TRIED = 16  # neighbours of an audited data set
_SEEDS = 50  # in which an example is waited for: sampled at a rate of 0.1, it is missed in one audit of 200


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
        size: key them by example (``dpfast.data.keyed``) or switch them off. In ``DPTrainer`` noise changes with the
        number of physical batches: make them large. Where the step gives None, the gradients of ``model`` count.
    dataset: an ``ImageSet``, a tensor or a tuple of tensors by example, or a sequence of examples.
    promised: the most that the result may move, as an L2 norm: the clip norm C where it is a sum, C over the expected
        batch size where it is a mean; for "replace" twice that.
    model: its parameters, buffers and gradients are put back before every run. Nothing else that a step changes is:
        make optimizers inside of it, each with a ledger of its own (``DPOptimizer(inner, plan, clipper, Ledger(None,
        plan))``). A whole ``DPTrainer`` is a step too: make one inside, of a plan with ``dataset_size=len(examples)``,
        ``expected_batch_size=rate * len(examples)``, ``steps=1`` and SGD with a learning rate of 1, and give what its
        parameters moved by, times the expected batch size.
    neighbors: examples that are removed (or replaced by another) one by one, all of them where there are no more.
    added: further examples, of the kind of ``dataset``, each added (or put in the place of one) by itself: try extreme
        ones.
    tolerance: relative, what rounding may add.
    seed: of the first randomness. A step that samples is run with further ones until its sample holds the example.

    Raises AssertionError where a result moves further (K times the promise: rows are clipped where examples should be,
    or ``augmult`` is not what the step makes of each), and ConfigError where the same data set gives different results
    twice, no example moves anything, or an argument makes no sense. Warns when none moves anything by half of the
    promise: choose a smaller clip norm, or other examples.
    """
    if not 0 < promised < math.inf or neighbors < 1 or not tolerance >= 0:
        raise ConfigError(
            f"assert_sensitivity: promised={promised!r}, neighbors={neighbors!r}, tolerance={tolerance!r}; expected a"
            " promise above 0, one neighbour or more, and a tolerance that is not negative"
        )
    run = _Repeated(step, model)
    found: list[Sensitivity] = []
    for neighbor, one, other in _neighbors(dataset, added, neighboring, neighbors, seed):
        for tried in range(seed, seed + _SEEDS):
            first = run(one, tried)
            if not found and tried == seed:
                _check_repeatable(first, run(one, seed), tolerance * promised)
            parts = _distances(first, run(other, tried))
            if any(parts.values()):  # else the sample may be without the example
                break
        found.append(
            Sensitivity(measured=math.hypot(*parts.values()), promised=promised, neighbor=neighbor, parts=parts)
        )
    worst = max(found, key=lambda one: math.inf if math.isnan(one.measured) else one.measured)
    if not worst.measured <= promised * (1 + tolerance):
        raise AssertionError(_failure(worst))
    if not worst.measured:
        raise ConfigError(
            f"assert_sensitivity: no example moved a result, with {_SEEDS} seeds: the step does not depend on its data,"
            " gives no gradients, or samples too rarely; let it sample at a higher rate, or not at all"
        )
    if worst.measured < _NEAR * promised:
        warnings.warn(
            f"assert_sensitivity: nothing moved a result by more than {worst.measured:.3g}, where {promised:.3g} is"
            " promised: this shows little. Choose a clip norm below the gradients' norms, or other examples",
            stacklevel=2,
        )
    return worst


def audit_step(
    step: Callable[[Any], Any],
    dataset: Any,
    *,
    epsilon: float,
    delta: float,
    model: nn.Module | None = None,
    repetitions: int = 1000,
    confidence: float = 0.95,
    added: Any = None,
    seed: int = 0,
) -> LowerBound:
    """Run ``step`` many times with an example and without it, and hold how well its results tell the two worlds apart
    against ``epsilon``. For any training step with its noise, of dpfast or not.

        audit_step(step, (images, labels), epsilon=plan.epsilon(1), delta=plan.target_delta, model=model)

    The attacker sees the result, and knows all examples and the state that the step begins with. The example is the one
    that moves the result most under identical randomness, and a result's score is its projection on that very move:
    under Gaussian noise there is no better one (Nasr et al., arXiv 2101.04535). The bound holds whatever the scores
    are. Where a step samples, others come and go, which hides an example that is like them: add one that is not.

    step, dataset, model: as ``assert_sensitivity`` takes them; what the step gives must contain its noise. Its
        randomness is real: dpfast's entropy is the operating system's, and so are the seeds of torch's, numpy's and
        Python's generators, anew in each repetition.
    epsilon, delta: what is claimed of the step, for neighbours that differ by an example more or less.
    repetitions: of each world. n show no epsilon beyond log(n / 8), at a confidence of 0.95.
    confidence: a sound step fails with a probability of ``1 - confidence`` at most (usually far below it).
    added: further examples, each added by itself: try extreme ones.
    seed: of the randomness under which the example is chosen.

    Raises AssertionError where the lower bound exceeds ``epsilon`` or a result is not finite, and ConfigError where no
    example moves anything. Warns when so few repetitions could not refute ``epsilon``.
    """
    if not epsilon >= 0 or repetitions < 1:
        raise ConfigError(
            f"audit_step: epsilon={epsilon!r}, repetitions={repetitions!r}; expected an epsilon that is not negative,"
            " and one repetition or more"
        )
    run = _Repeated(step, model)
    worlds, neighbor, move = _furthest(run, dataset, added, seed)
    scores = [[_along(move, run.anew(world)) for _ in range(repetitions)] for world in worlds]
    if not np.isfinite(scores).all():
        raise AssertionError(f"audit_step: results that are not finite: {neighbor}")
    bound = two_worlds_bound(*scores, delta=delta, confidence=confidence)
    apart = [[float(world)] * repetitions for world in (0, 1)]
    most = two_worlds_bound(*apart, delta=delta, confidence=confidence).epsilon
    if bound.epsilon > epsilon:
        always = ". The two worlds were told apart every time: is there noise?" if bound.epsilon >= most else ""
        raise AssertionError(
            f"epsilon is at least {bound.epsilon:.4g} (delta {delta:g}, confidence {confidence:g}), claimed"
            f" {epsilon:.4g}: {neighbor}{always}"
        )
    if most <= epsilon:
        warnings.warn(
            f"audit_step: {repetitions} repetitions show no epsilon beyond {most:.3g}, where {epsilon:.3g} is claimed:"
            " this shows nothing. Repeat the step more often",
            stacklevel=2,
        )
    return bound


def _furthest(run: "_Repeated", dataset: Any, added: Any, seed: int) -> tuple[tuple[Any, Any], str, dict[str, Tensor]]:
    """The two neighbours that are furthest apart under identical randomness, in words, and from the one to the other.

    Randomness in which none moves anything (a sample without the example) is passed over.
    """
    for tried in range(seed, seed + _SEEDS):
        most, found = 0.0, None
        for neighbor, one, other in _neighbors(dataset, added, "add_remove", _TRIED, seed):
            first, second = run(one, tried), run(other, tried)
            moved = math.hypot(*_distances(first, second).values())
            if not math.isfinite(moved):
                raise AssertionError(f"audit_step: results that are not finite: {neighbor}")
            if moved > most:
                most, found = moved, ((one, other), neighbor, _difference(second, first))
        if found:
            return found
    raise ConfigError(
        f"audit_step: no example moved a result, with {_SEEDS} seeds: the step does not depend on its data, or samples"
        " too rarely"
    )


def _along(move: Mapping[str, Tensor], result: Mapping[str, Tensor]) -> float:
    """The inner product; a tensor that is missing is 0."""
    return math.fsum(float((part * result[name]).sum()) for name, part in move.items() if name in result)


class _Repeated:
    """Runs a step on a data set, always from the same state; its tensors by name, in float64."""

    def __init__(self, step: Callable[[Any], Any], model: nn.Module | None) -> None:
        self._step, self._model = step, model
        self._state = {} if model is None else {name: value.clone() for name, value in model.state_dict().items()}

    def __call__(self, dataset: Any, seed: int) -> dict[str, Tensor]:
        """With the randomness of ``seed``."""
        with injected_entropy(seed):
            return self._run(dataset, seed)

    def anew(self, dataset: Any) -> dict[str, Tensor]:
        """With randomness that there has not been."""
        return self._run(dataset, int.from_bytes(entropy.random_bytes(8), "little") >> 1)

    def _run(self, dataset: Any, seed: int) -> dict[str, Tensor]:
        model = self._model
        if model is not None:
            model.load_state_dict(self._state)
            model.zero_grad(set_to_none=True)
        device = "cpu" if model is None else next(model.parameters()).device
        with seeded(seed, device):
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
            f"the step gave {type(result).__name__}; expected a tensor, a sequence or mapping of"
            " tensors, or None together with model=..., whose gradients are then taken"
        )
    return {str(name): value.detach().double().cpu().clone() for name, value in result.items()}


def _difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By tensor; one that is missing is 0."""
    nothing = torch.zeros(())
    return {name: one.get(name, nothing) - other.get(name, nothing) for name in {**one, **other}}


def _distances(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """L2 by tensor, the largest first."""
    moved = {name: float(part.norm()) for name, part in _difference(one, other).items()}
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
            f"{size} examples, neighboring={neighboring!r}; expected two or more, and 'add_remove' or 'replace'"
        )
    if added is not None and _kind(added) != _kind(dataset):
        raise ConfigError(f"added is a {_kind(added)}; expected a {_kind(dataset)}, like the data set")
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


def _kind(dataset: Any) -> str:
    if isinstance(dataset, tuple):
        return f"tuple of {len(dataset)}"
    known = (kind.__name__ for kind in (ImageSet, Tensor) if isinstance(dataset, kind))
    return next(known, "sequence of examples")


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
