"""What one use contributes to one tensor's per-example gradients, kept in the form that is cheapest to hold.

Every term gives ``materialise() -> G [B, *shape]`` and ``clipped_sum(w) -> sum_i w_i G_i``. A factored term is held as
the factors of a linear map: ``each()`` yields one ``G_i`` after the other, ``gram()`` squared norms and a bound on
their rounding error, both ``[B]``, ``sizes()`` the rows per example M, inputs D and outputs P.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dpfast.kernels import clip, conv, embedding, linear


@dataclass(frozen=True)
class Stored:
    """Per-example gradients ``[B, *shape]`` themselves."""

    grads: Tensor

    def materialise(self) -> Tensor:
        return self.grads

    def sq_norms(self) -> Tensor:
        """``|G_i|^2 [B]``, float64."""
        return clip.sq_norms(self.grads)

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

    def each(self) -> Iterator[Tensor]:
        return (linear.per_example_grads(a, g) for a, g in zip(self.a, self.g, strict=True))

    def gram(self) -> tuple[Tensor, Tensor]:
        return linear.gram_sq_norms(self.a, self.g)


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

    def each(self) -> Iterator[Tensor]:
        return conv.each_grad(self.a, self.g, self.spec, self.examples)

    def gram(self) -> tuple[Tensor, Tensor]:
        return conv.gram_sq_norms(self.a, self.g, self.spec, self.examples)


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

    def each(self) -> Iterator[Tensor]:
        pairs = zip(self.index, self.g, strict=True)
        return (embedding.per_example_grads(i[None], g[None], self.table_rows)[0] for i, g in pairs)

    def gram(self) -> tuple[Tensor, Tensor]:
        return embedding.gram_sq_norms(self.index, self.g)


@dataclass(frozen=True)
class Recomputed:
    """A factored term whose gradients are computed once for their norms and once more for the sum, never stored.

    ``w_i`` multiplies the very ``G_i`` whose norm was taken: weighting a factor instead rounds every product anew, and
    where positions cancel the rounding of one example can exceed the clip norm a thousandfold.
    """

    term: "FactoredTerm"

    def materialise(self) -> Tensor:
        return self.term.materialise()

    def sq_norms(self) -> Tensor:
        return torch.cat([clip.sq_norms(grad.unsqueeze(0)) for grad in self.term.each()])

    def clipped_sum(self, w: Tensor) -> Tensor:
        shares = (torch.where(f > 0, f.to(grad.dtype) * grad, 0) for f, grad in zip(w, self.term.each(), strict=True))
        total = next(shares).clone()
        for share in shares:
            total += share
        return total


FactoredTerm = LinearTerm | ConvTerm | EmbeddingTerm
Term = Stored | Recomputed | FactoredTerm
