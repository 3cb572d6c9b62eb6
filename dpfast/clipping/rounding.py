"""Whether numbers that were computed twice differ by more than rounding, entry by entry."""

import torch
from torch import Tensor


def real(t: Tensor) -> Tensor:
    """In float64, complex numbers as pairs."""
    return (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).double()


def differ(one: Tensor, other: Tensor, *, by_column: bool = False) -> bool:
    """Beyond rounding: by some eps of an entry's own size or the median's, so that one huge entry (a mask's) does not
    hide the others; by_column: the median of the same place in all rows, as columns have units of their own.

    What is no floating-point number is to be equal. NaN is NaN here.
    """
    if one.shape != other.shape:
        return True
    dtype = torch.promote_types(one.dtype, other.dtype)
    if not (dtype.is_floating_point or dtype.is_complex):
        return not torch.equal(one, other)
    if not one.numel():
        return False
    eps = torch.finfo(dtype).eps
    a, b = real(one.to(dtype)), real(other.to(dtype))
    finite = a.isfinite() & b.isfinite()
    size = torch.where(finite, torch.maximum(a.abs(), b.abs()), torch.nan)
    typical = size.nanmedian(0).values if by_column and size.ndim else size.nanmedian()
    tolerance = (100 * eps if eps < 1e-5 else eps) * torch.maximum(size, typical)
    same = (a == b) | (a.isnan() & b.isnan())
    return bool(torch.where(finite, (a - b).abs() > tolerance, ~same).any())
