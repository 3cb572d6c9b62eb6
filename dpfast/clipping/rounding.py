"""Whether numbers that were computed twice differ by more than rounding, entry by entry."""

from collections.abc import Callable

import torch
from torch import Tensor


def real(t: Tensor) -> Tensor:
    """In float64, complex numbers as pairs."""
    return (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).double()


def of_all(sizes: Tensor) -> Tensor:
    """Their median, so that one huge entry (a mask's) does not hide the others."""
    return sizes.nanmedian()


def but_zeros(sizes: Tensor) -> Tensor:
    """The median of those that are not 0 (padding)."""
    return of_all(torch.where(sizes > 0, sizes, torch.nan))


def of_columns(sizes: Tensor) -> Tensor:
    """For each place in a row (dimension 0 is that of rows) the median of those that are not 0: columns of a table have
    units of their own.
    """
    if not sizes.ndim:
        return sizes
    sizes = torch.where(sizes > 0, sizes, torch.nan)
    middle = (sizes.isfinite().sum(0, keepdim=True) - 1).clamp(min=0) // 2
    # NaN comes last. median(0) is refused where CUDA has to be deterministic.
    return sizes.sort(0).values.gather(0, middle)


def differ(one: Tensor, other: Tensor, typical: Callable[[Tensor], Tensor] = of_all) -> bool:
    """Beyond rounding: 100 eps (of half types one) of the entry's own size, or of the ``typical`` one if that is more.

    Whole numbers and truth values are to be equal. NaN is NaN here.
    """
    if one.shape != other.shape or one.is_complex() != other.is_complex():
        return True
    precisions = [torch.finfo(t.dtype).eps for t in (one, other) if t.is_floating_point() or t.is_complex()]
    if not precisions:
        return not torch.equal(one, other)
    if not one.numel():
        return False
    eps, a, b = max(precisions), real(one), real(other)
    finite = a.isfinite() & b.isfinite()
    sizes = torch.where(finite, torch.maximum(a.abs(), b.abs()), torch.nan)
    tolerance = (100 * eps if eps < 1e-5 else eps) * torch.fmax(sizes, typical(sizes))
    same = (a == b) | (a.isnan() & b.isnan())
    return bool(torch.where(finite, (a - b).abs() > tolerance, ~same).any())
