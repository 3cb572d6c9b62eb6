"""What one use contributes to one tensor's per-example gradients, kept in the form that is cheapest to hold.

Every term gives ``materialise() -> G [B, *shape]`` and ``clipped_sum(w) -> sum_i w_i G_i``. A factored term is held as
the factors of a linear map; ``stored()``, ``measured()`` and ``by_gram()`` put it into one of the forms.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpfast.kernels import clip, conv, embedding, linear


class Term(Protocol):
    """Gradients of one tensor, whose squared norms ``sq [B]`` are known up to ``bound [B]`` (None: exactly)."""

    @property
    def sq(self) -> Tensor: ...

    @property
    def bound(self) -> Tensor | None: ...

    def clipped_sum(self, w: Tensor) -> Tensor: ...


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
class Measured:
    """A factored term whose gradients were computed for their norms, and are computed again for the sum."""

    term: "FactoredTerm"
    sq: Tensor

    bound = None

    def clipped_sum(self, w: Tensor) -> Tensor:
        return self.term.clipped_sum(w)


@dataclass(frozen=True)
class ByGram:
    """A factored term whose norms come from Gram matrices, which err by at most ``bound``."""

    term: "FactoredTerm"
    sq: Tensor
    bound: Tensor

    def clipped_sum(self, w: Tensor) -> Tensor:
        return self.term.weighted_sum(w)


class FactoredTerm:
    """Factors of ``G_i``, which can be put into any form.

    ``sizes()``: the rows per example M, inputs D and outputs P.
    """

    def stored(self) -> Stored:
        raise NotImplementedError

    def measured(self) -> Measured:
        raise NotImplementedError

    def by_gram(self) -> ByGram:
        raise NotImplementedError

    def clipped_sum(self, w: Tensor) -> Tensor:
        """Of the very ``G_i`` that ``measured`` measures."""
        raise NotImplementedError

    def weighted_sum(self, w: Tensor) -> Tensor:
        """The fastest sum: its rounding may differ from that of what was measured."""
        return self.clipped_sum(w)

    def sizes(self) -> tuple[int, int, int]:
        raise NotImplementedError

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

    def sizes(self) -> tuple[int, int, int]:
        return self.a.shape[1], self.a.shape[2], self.g.shape[2]


@dataclass(frozen=True)
class ConvTerm(FactoredTerm):
    """Weight of a convolution with inputs ``a [N, Cin, *space]`` and output gradients ``g [N, Cout, *out]``."""

    a: Tensor
    g: Tensor
    spec: conv.ConvSpec
    examples: int

    def stored(self) -> Stored:
        return Stored(*conv.per_example_grads(self.a, self.g, self.spec, self.examples))

    def measured(self) -> Measured:
        return Measured(self, conv.sq_norms(self.a, self.g, self.spec, self.examples))

    def by_gram(self) -> ByGram:
        return ByGram(self, *conv.gram_sq_norms(self.a, self.g, self.spec, self.examples))

    def clipped_sum(self, w: Tensor) -> Tensor:
        return conv.clipped_sum(self.a, self.g, self.spec, w)

    def sizes(self) -> tuple[int, int, int]:
        first, *rest = self.spec.weight_shape
        small = self.a if self.spec.transposed else self.g
        positions = small[0, 0].numel() * (small.shape[0] // self.examples)
        return positions, torch.Size(rest).numel(), first


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

    def sizes(self) -> tuple[int, int, int]:
        return self.index.shape[1], self.table_rows, self.g.shape[2]
