"""``linear`` on the CPU: a convolution with one tap and M positions (``csrc/cpu/conv.cpp``)."""

from torch import Tensor

from dpfast.kernels.conv.native import Gradients
from dpfast.kernels.conv.problem import of_linear


def per_example_grads(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``G [B, P, D]``, and ``|G_i|^2 [B]`` of the numbers stored."""
    grads, sq = Gradients(of_linear(a, g)).per_example_grads()
    return grads.view(len(a), g.shape[2], a.shape[2]), sq


def sq_norms(a: Tensor, g: Tensor) -> Tensor:
    """``|G_i|^2 [B]``, float64; no ``G_i`` is stored."""
    return Gradients(of_linear(a, g)).sq_norms()


def clipped_sum(a: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """``sum_i w_i G_i [P, D]`` of the very ``G_i`` that the others measure."""
    return Gradients(of_linear(a, g)).clipped_sum(w).view(g.shape[2], a.shape[2])


def scratch_bytes(a: Tensor, g: Tensor, *, weighted: bool) -> int:
    """Of the numbers that a call sums in. weighted: of ``clipped_sum``."""
    return Gradients(of_linear(a, g)).scratch_bytes(weighted=weighted)
