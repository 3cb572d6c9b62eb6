"""Bugs, and the places in dpfast where they are planted: see ``mutants``."""

import hashlib
import itertools
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpfast import checkpoint
from dpfast.clipping.terms import Stored
from dpfast.kernels import clip, conv, noise

Wrong = Callable[..., Any]  # makes a broken function of the one that it stands in for
Plant = Callable[[pytest.MonkeyPatch], Counter[str]]  # counts the calls of what it has planted, by path


def swap(*swaps: tuple[str, Wrong]) -> Plant:
    """At each path a function, or a property, made of the one that stands there."""

    def plant(patch: pytest.MonkeyPatch) -> Counter[str]:
        calls = Counter[str]()
        for path, make in swaps:
            home, _, name = f"dpfast.{path}".rpartition(".")
            real = vars(owner := pkgutil.resolve_name(home))[name]
            patch.setattr(owner, name, _planted(make, real, lambda path=path: calls.update([path])))
        return calls

    return plant


def _planted(make: Wrong, real: Any, called: Callable[[], None]) -> Any:
    usual = real.fget if isinstance(real, property) else real
    wrong = make(usual)

    def planted(*args: Any, **kwargs: Any) -> Any:
        called()
        return wrong(*args, **kwargs)

    return property(planted) if isinstance(real, property) else planted


def anew(make: Callable[[], Plant]) -> Plant:
    """For a bug that remembers something: it begins with nothing each time it is planted."""

    def plant(patch: pytest.MonkeyPatch) -> Counter[str]:
        return make()(patch)

    return plant


# Factors


def factors(wrong: Wrong) -> Plant:
    """wrong: of squared norms, C and the right factors."""
    return swap(("clipping.rule.clip_factors", lambda real: lambda sq, c, **_: wrong(sq, c, real(sq, c))))


def by_layer() -> Plant:
    rule = SimpleNamespace()

    def finish(real: Any) -> Any:
        def wrong(self: Any, given: Any, mask: Tensor) -> Any:
            rule.factors = given.factors
            return real(self, given, mask)

        return wrong

    def sums(real: Any) -> Any:
        def wrong(self: Any, usual: Tensor) -> dict[str, Tensor]:
            return {
                name: term.clipped_sum(rule.factors(term.sq) if hasattr(term, "sq") else usual)
                for name, term in self.kept
            }

        return wrong

    return swap(("clipping.accumulate.Accumulation.finish", finish), ("clipping.accumulate.Accumulation._sums", sums))


# Norms


def norms_of_convolutions(wrong: Wrong) -> Plant:
    """wrong: of squared norms, a, g, ``ConvSpec`` and the number of examples. Gradients stay as they are."""
    return swap(
        ("kernels.conv.sq_norms", lambda real: lambda *of: wrong(real(*of), *of)),
        ("kernels.conv.packed_grads", lambda real: lambda *of: ((got := real(*of))[0], wrong(got[1], *of))),
        ("kernels.conv.gram_sq_norms", lambda real: lambda *of: (wrong((got := real(*of))[0], *of), got[1])),
    )


def norms_of_linear_maps(wrong: Wrong) -> Plant:
    """wrong: of squared norms, a and g."""
    return swap(
        ("kernels.linear.sq_norms", lambda real: lambda *of: wrong(real(*of), *of)),
        ("kernels.linear.per_example_grads", lambda real: lambda *of: ((got := real(*of))[0], wrong(got[1], *of))),
        ("kernels.linear.gram_sq_norms", lambda real: lambda *of: (wrong((got := real(*of))[0], *of), got[1])),
    )


_measured = conv.sq_norms


def of_first_group(sq: Tensor, a: Tensor, g: Tensor, spec: conv.ConvSpec, examples: int) -> Tensor:
    if spec.groups == 1:
        return sq
    outputs, *rest = spec.weight_shape
    one = replace(spec, weight_shape=(outputs // spec.groups, *rest), groups=1)
    return _measured(a[:, : rest[0]], g[:, : one.weight_shape[0]], one, examples)


def as_if_contiguous(_sq: Tensor, a: Tensor, g: Tensor, spec: conv.ConvSpec, examples: int) -> Tensor:
    a, g = (t.as_strided(t.shape, torch.empty(t.shape, device="meta").stride()) for t in (a, g))
    return _measured(a, g, spec, examples)


def of_last_call() -> Plant:
    buffers: dict[Any, Tensor] = {}

    def wrong(sq: Tensor, _a: Tensor, _g: Tensor, spec: conv.ConvSpec, examples: int) -> Tensor:
        stale = buffers.get((spec, examples), sq)
        buffers[spec, examples] = sq
        return stale

    return norms_of_convolutions(wrong)


def without_a_bias(_: Any) -> Any:
    def sq(self: Any) -> Tensor:
        parts = self.flat.split([shape.numel() for shape in self.shapes.values()], 1)
        named = zip(self.shapes, parts, strict=True)
        return clip.sq_norms(torch.cat([part for name, part in named if name != "tokens.bias"], 1))

    return sq


def bias_by_position() -> Plant:
    """The squares of all positions in the place of the square of their sum."""
    squares: dict[int, Tensor] = {}

    def grads(real: Any) -> Any:
        def wrong(g: Tensor) -> Tensor:
            found = real(g)
            squares[id(found)] = g.double().square().sum((1, 2, 3))
            return found

        return wrong

    return swap(
        ("clipping.rules.linear.bias_grads", grads),
        ("clipping.rules.linear.Stored", lambda real: lambda grads: real(grads, squares.pop(id(grads)))),
    )


def of_uses(combined: Callable[[Tensor | None, Tensor], Tensor]) -> Plant:
    """What the squared norms of several uses of a weight make together, one after the other."""
    found: dict[str, Tensor | None] = {}

    def add(real: Any) -> Any:
        def wrong(self: Any, key: int, grads: Tensor) -> None:
            name = self.names[key]
            before = found.get(name) if key in self.partial else None
            found[name] = combined(before, clip.sq_norms(grads))
            real(self, key, grads)

        return wrong

    def keep(real: Any) -> Any:
        return lambda self, name, term: real(
            self, name, Stored(term.grads, found.pop(name)) if name in found and isinstance(term, Stored) else term
        )

    return swap(
        ("clipping.accumulate.Accumulation._add_partial", add), ("clipping.accumulate.Accumulation._keep", keep)
    )


def overwritten(_: Any) -> Any:
    return lambda self, key, grads: self.partial.update({key: grads})


def rough_gram(real: Any) -> Any:
    """With no bound on its error, so that what is negative counts as 0."""
    return lambda *of: ((sq := real(*of)[0]), torch.zeros_like(sq))


def root_of_gram(real: Any) -> Any:
    """Likewise, and the root of what is negative is taken."""
    return lambda *of: ((sq := real(*of)[0]).sqrt().square(), torch.zeros_like(sq))


def weighted_at_once(_: Any) -> Any:
    """Whatever the weights are: 0 times what is not a number is not 0."""
    return lambda a, g, w: (w.to(g.dtype).view(-1, 1, 1) * g).flatten(0, 1).mT @ a.flatten(0, 1)


# Sums


def summed_losses(real: Any) -> Any:
    return lambda self, *of, **how: real(replace(self, losses=self.losses * self.augmult), *of, **how)


def written(times: Callable[[Any], float]) -> Plant:
    def write(real: Any) -> Any:
        return lambda self, sums, parameters: real(self, {n: times(self) * s for n, s in sums.items()}, parameters)

    return swap(("clipping.clipper.GhostClipper._write", write))


def twice(real: Any) -> Any:
    return lambda *of: (real(*of), real(*of))


def kept_sums() -> Plant:
    sums: dict[int, Tensor] = {}

    def add_up(real: Any) -> Any:
        def wrong(parameters: Any, *others: Any) -> None:
            for parameter in parameters.values():
                if parameter.grad is not None:
                    sums[id(parameter)] = parameter.grad + sums.get(id(parameter), 0)
                parameter.grad = sums.get(id(parameter))
            real(parameters, *others)

        return wrong

    return swap(("optimizer.add_up", add_up))


def by_number_drawn(wrong: Wrong) -> Plant:
    """wrong: of the real function of noise, the number of examples drawn, values, scale and divisor."""
    drawn = [1]

    def sample(real: Any) -> Any:
        def watched(*of: Any) -> Tensor:
            found = real(*of)
            drawn[0] = max(1, len(found))
            return found

        return watched

    return swap(
        ("trainer.poisson_sample", sample),
        ("optimizer.noised", off_grid(lambda real, *of: wrong(real, drawn[0], *of))),
    )


# Noise


def noised(wrong: Wrong) -> Plant:
    """wrong: of the real function, values, scale and divisor."""
    return swap(("optimizer.noised", off_grid(wrong)))


def off_grid(wrong: Wrong) -> Wrong:
    return lambda real: lambda x, scale, divisor, **_: wrong(real, x, scale, divisor)


def scaled(scale: Callable[[Any], float]) -> Plant:
    """scale: of the noise, by the plan."""
    return swap(("privacy.plan.Plan.noise_on", lambda _: lambda self, numbers: (scale(self), 0.0)))


def known_noise(key: Callable[[int, Tensor], Any], *, per_process: bool = False) -> Plant:
    """Of a key made of the number of earlier calls (in this process) and the values."""
    calls = [itertools.count()]

    def wrong(_: Any, values: Tensor, scale: float, divisor: float) -> Tensor:
        made = hashlib.sha256(repr(key(next(calls[0]), values)).encode()).digest()
        return noise.noised(values, scale, divisor, made)

    def fit(real: Any) -> Any:
        def begun(self: Any) -> None:
            calls[0] = itertools.count() if per_process else calls[0]
            real(self)

        return begun

    return swap(("optimizer.noised", off_grid(wrong)), ("trainer.DPTrainer.fit", fit))


def all_but_every_second() -> Plant:
    calls = itertools.count()
    return noised(lambda real, x, scale, divisor: real(x, scale * (next(calls) % 2), divisor))


def seeded_noise(_: Any, x: Tensor, scale: float, divisor: float) -> Tensor:
    torch.manual_seed(0)
    return (x + scale * torch.randn_like(x)) / divisor


def global_noise(_: Any, x: Tensor, scale: float, divisor: float) -> Tensor:
    return (x + scale * torch.randn_like(x)) / divisor


def noise_on_grid_alone(real: Any) -> Any:
    return lambda x, scale, divisor, *, grid: x / divisor + real(torch.zeros_like(x), scale, divisor, grid=grid)


def erased_noise() -> Plant:
    """For this an example that is not a number must get as far as the sum."""

    def finish(real: Any) -> Any:
        return lambda self, rule, mask: real(self, rule, torch.ones_like(mask))

    def factors(real: Any) -> Any:
        return lambda sq, c, **_: torch.where(sq.isfinite(), real(sq, c), 1.0)

    return swap(
        ("clipping.accumulate.Accumulation.finish", finish),
        ("clipping.rule.clip_factors", factors),
        ("optimizer.noised", off_grid(lambda real, *of: real(*of).nan_to_num(0.0, 0.0, 0.0))),
    )


# Steps and samples


def only_with_gradients(real: Any) -> Any:
    def step(self: Any, closure: None = None) -> None:
        if any(p.grad is not None and p.grad.any() for p in self.clipper.parameters.values()):
            real(self)

    return step


def no_empty_batches(real: Any) -> Any:
    def cut(self: Any, sample: Tensor) -> Any:
        if not len(sample):
            raise ValueError("an empty batch")
        return real(self, sample)

    return cut


def epochs() -> Plant:
    left, generator = list[int](), torch.Generator().manual_seed(0)

    def sample(size: int, rate: float) -> Tensor:
        if len(left) < round(size * rate):
            left[:] = torch.randperm(size, generator=generator).tolist()
        return torch.tensor(sorted(left.pop() for _ in range(round(size * rate))))

    return swap(("trainer.poisson_sample", lambda _: sample))


def of_one_size() -> Plant:
    generator = torch.Generator().manual_seed(0)

    def sample(size: int, rate: float) -> Tensor:
        return torch.randperm(size, generator=generator)[: round(size * rate)].sort().values

    return swap(("trainer.poisson_sample", lambda _: sample))


def with_replacement() -> Plant:
    generator = torch.Generator().manual_seed(0)

    def sample(size: int, rate: float) -> Tensor:
        return torch.randint(size, (round(size * rate),), generator=generator).sort().values

    return swap(("trainer.poisson_sample", lambda _: sample))


# Accounts


def accounted(**wrongly: Any) -> Plant:
    """What the accountant is told."""
    return swap(("privacy.plan.Plan.mechanism", lambda real: lambda self, *of: replace(real(self, *of), **wrongly)))


def charged_late(real: Any) -> Any:
    def update(self: Any, step: int) -> None:
        ledger = self.ledger
        self.ledger = SimpleNamespace(charge=lambda _: None, charged_steps=ledger.charged_steps)
        real(self, step)
        self.ledger = ledger
        ledger.charge(step)

    return update


def unlimited(_: Any) -> Any:
    return lambda self, step: setattr(self._state, "steps", step)


def other_delta(real: Any) -> Any:
    def made(self: Any) -> None:
        object.__setattr__(self, "target_delta", 5e-4)
        real(self)

    return made


def ledger_of_checkpoint(real: Any) -> Any:
    """Goes back to what was spent when the checkpoint was saved, as an accountant that is saved in it does."""

    @contextmanager
    def opened(self: Any) -> Iterator[Any]:
        path = self._ledger_path()
        if path is not None and path.exists():
            state = checkpoint.load(
                self.state_dir / "checkpoint", kind="private training", fingerprint=self.plan.fingerprint()
            )
            path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[: 1 + state["step"]]))
        with real(self) as ledger:
            yield ledger

    return opened


def uncounted(real: Any) -> Any:
    def resume(self: Any, charged: int) -> None:
        real(self, charged)
        self.lost_steps = 0

    return resume


def score_shown() -> Plant:
    seen: list[float] = [0.0]

    def losses(real: Any) -> Any:
        def watched(*of: Any) -> Tensor:
            found = real(*of)
            seen[0] = float(found.detach().mean())
            return found

        return watched

    return swap(
        ("trainer.DPTrainer._losses", losses),
        ("trainer.DPTrainer._message", lambda real: lambda self: f"{real(self)}, loss {seen[0]:.3f}"),
    )


def unweighed(_: Any) -> Any:
    """Whatever another example's loss has moved."""
    return lambda evidence, *_: evidence


def silent(*paths: str) -> Plant:
    """What should find problems finds none."""
    return swap(*((path, lambda _: lambda *of, **how: []) for path in paths))
