"""What one use contributes to one tensor's per-example gradients, kept in the form that is cheapest to hold.

Every term gives ``materialise() -> G [B, *shape]`` and ``clipped_sum(w) -> sum_i w_i G_i``. A factored term is held as
the factors of a linear map; ``stored()``, ``measured()`` and ``by_gram()`` put it into one of the forms.
"""

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from dpfast.clipping.derived import Chain
from dpfast.kernels import clip, conv, embedding, linear
from dpfast.kernels.cost import Form, Work


class Kept(Protocol):
    """Gradients of one tensor that can be summed."""

    def clipped_sum(self, w: Tensor) -> Tensor: ...


class Term(Kept, Protocol):
    """Those whose squared norms ``sq [B]`` are known up to ``bound [B]`` (None: exactly)."""

    @property
    def sq(self) -> Tensor: ...

    @property
    def bound(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Stored:
    """Per-example gradients ``[B, *shape]`` themselves."""

    grads: Tensor
    known_sq: Tensor | None = None

    bound = None

    @property
    def sq(self) -> Tensor:
        """``|G_i|^2 [B]``, float64."""
        return clip.sq_norms(self.grads) if self.known_sq is None else self.known_sq

    def materialise(self) -> Tensor:
        return self.grads

    def clipped_sum(self, w: Tensor) -> Tensor:
        return clip.clipped_sum(self.grads, w)


@dataclass(frozen=True)
class Packed:
    """Stored gradients of a convolution's weight, ``flat [B, numbers]`` in the order of ``spec``, and their ``sq``."""

    flat: Tensor
    sq: Tensor
    spec: conv.ConvSpec

    bound = None

    @property
    def grads(self) -> Tensor:
        return self.spec.weights(self.flat)

    def clipped_sum(self, w: Tensor) -> Tensor:
        return self.spec.weight(clip.clipped_sums([self.flat], w)[0])


@dataclass(frozen=True)
class Joined:
    """Stored gradients of several parameters side by side, ``[B, n]``."""

    flat: Tensor
    shapes: dict[str, torch.Size]

    bound = None

    @classmethod
    def of(cls, grads: Mapping[str, Tensor]) -> Self:
        """grads: ``[B, *shape]`` by name."""
        flat = torch.cat([g.reshape(len(g), -1) for g in grads.values()], 1)
        return cls(flat, {name: g.shape[1:] for name, g in grads.items()})

    @property
    def sq(self) -> Tensor:
        """Of all of them together, ``[B]``."""
        return clip.sq_norms(self.flat)

    def clipped_sums(self, w: Tensor) -> dict[str, Tensor]:
        """By name."""
        total = clip.clipped_sum(self.flat, w)
        parts = total.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


@dataclass(frozen=True)
class PulledBack:
    """A term of a tensor that moved and scaled a parameter's entries: of that parameter."""

    term: Term
    chain: Chain

    @property
    def sq(self) -> Tensor:
        """In float64: the square of a small scale would vanish in float32."""
        return self.term.sq.double() * self.chain.scale**2

    @property
    def bound(self) -> Tensor | None:
        bound = self.term.bound
        return None if bound is None else bound.double() * self.chain.scale**2

    def clipped_sum(self, w: Tensor) -> Tensor:
        return self.chain.pull_back(self.term.clipped_sum(w))


@dataclass(frozen=True)
class Measured:
    """A factored term whose gradients were computed for their norms, and are computed again for the sum."""

    term: "FactoredTerm"
    sq: Tensor

    bound = None

    def clipped_sum(self, w: Tensor) -> Tensor:
        return self.term.clipped_sum(w)


@dataclass(frozen=True)
class BookKept:
    """A factored term whose norms come from elsewhere than its gradients (from a Gram, perhaps shared)."""

    term: "FactoredTerm"

    def clipped_sum(self, w: Tensor) -> Tensor:
        return self.term.weighted_sum(w)


@dataclass(frozen=True)
class ByGram(BookKept):
    """With norms from Gram matrices of its own, which err by at most ``bound``."""

    sq: Tensor
    bound: Tensor


class FactoredTerm:
    """Factors of ``G_i``, which can be put into any form. ``g``: their output gradients."""

    g: Tensor

    def stored(self) -> Stored | Packed:
        raise NotImplementedError

    def measured(self) -> Measured:
        raise NotImplementedError

    def by_gram(self) -> ByGram:
        raise NotImplementedError

    def in_form(self, form: Form) -> Term:
        """What is kept of it until the factors are known."""
        if form == "materialise":
            return self.stored()
        return self.by_gram() if form == "gram" else self.measured()

    def clipped_sum(self, w: Tensor) -> Tensor:
        """Of the very ``G_i`` that ``measured`` measures."""
        raise NotImplementedError

    def weighted_sum(self, w: Tensor) -> Tensor:
        """The fastest sum: its rounding may differ from that of what was measured."""
        return self.clipped_sum(w)

    def work(self) -> Work:
        """What the forms have to compute."""
        raise NotImplementedError

    @property
    def device_type(self) -> str:
        return self.g.device.type

    def materialise(self) -> Tensor:
        return self.stored().grads


@dataclass(frozen=True)
class LinearTerm(FactoredTerm):
    """Weight ``[P, D]`` of a linear map with inputs ``a [B, M, D]`` and output gradients ``g [B, M, P]``."""

    a: Tensor
    g: Tensor

    def stored(self) -> Stored:
        return Stored(*linear.per_example_grads(self.a, self.g))

    def measured(self) -> Measured:
        return Measured(self, linear.sq_norms(self.a, self.g))

    def by_gram(self) -> ByGram:
        return ByGram(self, *linear.gram_sq_norms(self.a, self.g))

    def clipped_sum(self, w: Tensor) -> Tensor:
        return linear.clipped_sum(self.a, self.g, w)

    def weighted_sum(self, w: Tensor) -> Tensor:
        return linear.weighted_sum(self.a, self.g, w)

    def work(self) -> Work:
        b, m, d = self.a.shape
        held, brain = _bytes(self.a, self.g), _are_brain(self.a, self.g)
        return Work(b, m, d, self.g.shape[2], pixels=d, held=held, brain=brain)


@dataclass(frozen=True)
class ConvTerm(FactoredTerm):
    """Weight of a convolution with inputs ``a [N, Cin, *space]`` and output gradients ``g [N, Cout, *out]``."""

    a: Tensor
    g: Tensor
    spec: conv.ConvSpec
    examples: int

    def stored(self) -> Packed:
        return Packed(*conv.packed_grads(self.a, self.g, self.spec, self.examples), self.spec)

    def measured(self) -> Measured:
        return Measured(self, conv.sq_norms(self.a, self.g, self.spec, self.examples))

    def by_gram(self) -> ByGram:
        return ByGram(self, *conv.gram_sq_norms(self.a, self.g, self.spec, self.examples))

    def clipped_sum(self, w: Tensor) -> Tensor:
        return conv.clipped_sum(self.a, self.g, self.spec, w)

    def work(self) -> Work:
        held, brain = _bytes(self.a, self.g), _are_brain(self.a, self.g)
        small = self.a if self.spec.transposed else self.g
        return _conv_work(self.spec, small.shape, self.examples, held, brain, conv.has_pixel_gram(self.a, self.spec))


@functools.lru_cache(maxsize=4096)
def _conv_work(
    spec: conv.ConvSpec, small: torch.Size, examples: int, held: int, brain: bool, has_pixel_gram: bool
) -> Work:
    """small: shape of the output gradient; of a transposed convolution, of the input."""
    first, channels, *kernel = spec.weight_shape
    inputs, positions = channels * math.prod(kernel), math.prod(small[2:])
    return Work(
        examples,
        rows=small[0] // examples * positions,
        inputs=inputs,
        outputs=first,
        pixels=channels if has_pixel_gram else inputs,
        taps=math.prod(kernel),
        held=held,
        brain=brain,
        groups=spec.groups,
        positions=max(1, positions),
    )


@dataclass(frozen=True)
class EmbeddingTerm(FactoredTerm):
    """Table ``[V, D]`` looked up at ``index [B, M]``, with gradients ``g [B, M, D]``."""

    index: Tensor
    g: Tensor
    table_rows: int

    def stored(self) -> Stored:
        return Stored(embedding.per_example_grads(self.index, self.g, self.table_rows))

    def measured(self) -> Measured:
        return Measured(self, embedding.sq_norms(self.index, self.g, self.table_rows))

    def by_gram(self) -> ByGram:
        return ByGram(self, *embedding.gram_sq_norms(self.index, self.g))

    def clipped_sum(self, w: Tensor) -> Tensor:
        return embedding.clipped_sum(self.index, self.g, self.table_rows, w)

    def weighted_sum(self, w: Tensor) -> Tensor:
        return embedding.weighted_sum(self.index, self.g, self.table_rows, w)

    def work(self) -> Work:
        b, m, d = self.g.shape
        return Work(b, m, self.table_rows, d, pixels=0, held=_bytes(self.index, self.g), dense=False)


@dataclass(frozen=True)
class Viewed(FactoredTerm):
    """A factored term whose gradients become the target's as ``reshape(shape).permute(order).reshape(final)``."""

    term: FactoredTerm
    shape: tuple[int, ...]
    order: tuple[int, ...]
    final: tuple[int, ...]

    def _view(self, total: Tensor) -> Tensor:
        return total.reshape(self.shape).permute(self.order).reshape(self.final)

    def stored(self) -> Stored:
        stored = self.term.stored()
        grads, b = stored.grads, len(stored.grads)
        grads = grads.reshape(b, *self.shape).permute(0, *(d + 1 for d in self.order)).reshape(b, *self.final)
        return Stored(grads, stored.sq)

    def measured(self) -> Measured:
        return Measured(self, self.term.measured().sq)

    def by_gram(self) -> ByGram:
        gram = self.term.by_gram()
        return ByGram(self, gram.sq, gram.bound)

    def clipped_sum(self, w: Tensor) -> Tensor:
        return self._view(self.term.clipped_sum(w))

    def weighted_sum(self, w: Tensor) -> Tensor:
        return self._view(self.term.weighted_sum(w))

    def work(self) -> Work:
        return self.term.work()

    @property
    def device_type(self) -> str:
        return self.term.device_type


def owned(kept: Any, lent: Collection[int]) -> Any:
    """``kept`` (a term, or gradients) with copies of what lies in storages that are only lent."""
    if not lent:
        return kept
    if isinstance(kept, Tensor):
        return kept.clone() if kept.untyped_storage()._cdata in lent else kept
    if not is_dataclass(kept) or isinstance(kept, type | conv.ConvSpec):
        return kept
    return replace(kept, **{field.name: owned(getattr(kept, field.name), lent) for field in fields(kept)})


def _are_brain(*tensors: Tensor) -> bool:
    return all(t.dtype in (torch.bfloat16, torch.float16) for t in tensors)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
