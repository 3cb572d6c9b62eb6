"""Standard normal numbers from uniform ones (Box and Muller 1958), for Triton's kernels; in float64."""

import triton
import triton.language as tl


@triton.jit
def turn(u):
    """Cosine and sine of 2 pi u, u in 0 .. 1: of the rest of a quarter by Taylor's series, then turned by quarters."""
    shifted = u * 4.0 + 6755399441055744.0  # 1.5 * 2^52: quarters in the lowest bits
    x = (u * 4.0 - (shifted - 6755399441055744.0)) * 1.5707963267948966
    quarters, t = shifted.to(tl.int64, bitcast=True), x * x
    s, c = tl.full(u.shape, 1.0, tl.float64), tl.full(u.shape, 1.0, tl.float64)
    for k in tl.static_range(16, 0, -2):
        s, c = 1.0 - s * t * (1.0 / (k * (k + 1))), 1.0 - c * t * (1.0 / (k * (k - 1)))
    s *= x
    is_odd = (quarters & 1) == 1
    cosine, sine = tl.where(is_odd, s, c), tl.where(is_odd, c, s)
    return tl.where(((quarters + 1) & 2) == 2, -cosine, cosine), tl.where((quarters & 2) == 2, -sine, sine)


@triton.jit
def box_muller(u, v):
    """Two of a pair: 0 < u <= 1 and 0 <= v <= 1."""
    radius = tl.sqrt(-2.0 * tl.log(u))
    cosine, sine = turn(v)
    return radius * cosine, radius * sine
