"""What one use contributes to one tensor's per-example gradients, kept in the form that is cheapest to hold.

Every term gives ``materialise() -> G [B, *shape]``, squared norms ``[B]`` and ``clipped_sum(w) -> sum_i w_i G_i``. A
factored term is held as the factors of a linear map and needs no G: its ``sq_norms(form)`` come with a bound on their
rounding error (0 for a direct sum of squares), its ``sizes()`` are the rows per example M, inputs D and outputs P.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dpfast.kernels import clip, conv, embedding, linear

FactoredForm = Literal["gram", "direct"]


@dataclass(frozen=True)
class Stored:
    """Per-example gradients ``[B, *shape]`` themselves."""

    grads: Tensor

    def materialise(self) -> Tensor:
        return self.grads

    def sq_norms(self) -> Tensor:
        """``|G_i|^2 [B]``: a sum of squares, without a copy of the gradients."""
        dims = tuple(range(1, self.grads.ndim))
        norms: Tensor = torch.linalg.vector_norm(self.grads, dim=dims) if dims else self.grads.abs()
        return norms.square()

    def clipped_sum(self, w: Tensor) -> Tensor:
        return clip.clipped_sum(self.grads, w)


@dataclass(frozen=True)
class LinearTerm:
    """Weight ``[P, D]`` of a linear map with inputs ``a [B, M, D]`` and output gradients ``g [B, M, P]``."""

    a: Tensor
    g: Tensor

    def materialise(self) -> Tensor:
        return linear.per_example_grads(self.a, self.g)

    def clipped_sum(self, w: Tensor) -> Tensor:
        return linear.clipped_sum(self.a, self.g, w)

    def sizes(self) -> tuple[int, int, int]:
        return self.a.shape[1], self.a.shape[2], self.g.shape[2]

    def sq_norms(self, form: FactoredForm) -> tuple[Tensor, Tensor]:
        if form == "gram":
            return linear.gram_sq_norms(self.a, self.g)
        return _exact(linear.direct_sq_norms(self.a, self.g))


@dataclass(frozen=True)
class ConvTerm:
    """Weight of a convolution with inputs ``a [N, Cin, *space]`` and output gradients ``g [N, Cout, *out]``."""

    a: Tensor
    g: Tensor
    spec: conv.ConvSpec
    examples: int

    def materialise(self) -> Tensor:
        return conv.per_example_grads(self.a, self.g, self.spec, self.examples)

    def clipped_sum(self, w: Tensor) -> Tensor:
        return conv.clipped_sum(self.a, self.g, self.spec, w)

    def sizes(self) -> tuple[int, int, int]:
        first, *rest = self.spec.weight_shape
        small = self.a if self.spec.transposed else self.g
        positions = small[0, 0].numel() * (small.shape[0] // self.examples)
        return positions, torch.Size(rest).numel(), first

    def sq_norms(self, form: FactoredForm) -> tuple[Tensor, Tensor]:
        if form == "gram":
            return conv.gram_sq_norms(self.a, self.g, self.spec, self.examples)
        return _exact(conv.direct_sq_norms(self.a, self.g, self.spec, self.examples))


@dataclass(frozen=True)
class EmbeddingTerm:
    """Table ``[V, D]`` looked up at ``index [B, M]``, with gradients ``g [B, M, D]``."""

    index: Tensor
    g: Tensor
    table_rows: int

    def materialise(self) -> Tensor:
        return embedding.per_example_grads(self.index, self.g, self.table_rows)

    def clipped_sum(self, w: Tensor) -> Tensor:
        return embedding.clipped_sum(self.index, self.g, self.table_rows, w)

    def sizes(self) -> tuple[int, int, int]:
        return self.index.shape[1], self.table_rows, self.g.shape[2]

    def sq_norms(self, form: FactoredForm) -> tuple[Tensor, Tensor]:
        if form == "gram":
            return embedding.gram_sq_norms(self.index, self.g)
        return _exact(embedding.direct_sq_norms(self.index, self.g, self.table_rows))


FactoredTerm = LinearTerm | ConvTerm | EmbeddingTerm
Term = Stored | FactoredTerm


def _exact(sq: Tensor) -> tuple[Tensor, Tensor]:
    return sq, torch.zeros_like(sq)
