"""``norm`` on a GPU, in Triton: sums by channel, then what follows from them, then the gradient of x.

Memory-bound: x and g are read once for the sums, and once more for dx. Channels are read side by side, whatever their
groups; a group's statistics are put together from those of its channels (Chan, Golub, LeVeque 1983), each about a
number of its own channel, so that a large mean does no harm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpfast.kernels.affine.triton import WARPS, tile
from dpfast.kernels.launch import blocks, padded


@triton.jit
def _added(lanes):
    return tl.sum(lanes.to(tl.float64), 0)


@triton.jit
def sums(x, g, x_n, x_c, x_s, g_n, g_c, g_s, C, S, out, size, BC: tl.constexpr, BK: tl.constexpr):
    """Of each row and channel, four arrays ``[N, C]`` of ``size`` numbers: the mean of x; the sums of squared
    deviations from it, of g, and of g times the deviation.
    """
    across = tl.cdiv(C, BC)
    program = tl.program_id(0)
    n = (program // across).to(tl.int64)
    c = program % across * BC + tl.arange(0, BC)
    x += n * x_n + c[None, :] * x_c
    g += n * g_n + c[None, :] * g_c
    about = tl.load(x, mask=(c < C)[None, :], other=0.0).to(tl.float32)
    first, second = tl.zeros((BK, BC), tl.float32), tl.zeros((BK, BC), tl.float32)
    of_g, of_gx = tl.zeros((BK, BC), tl.float32), tl.zeros((BK, BC), tl.float32)
    for start in range(0, S, BK):
        s = (start + tl.arange(0, BK))[:, None]
        inside = (s < S) & (c < C)[None, :]
        away = tl.where(inside, tl.load(x + s * x_s, mask=inside, other=0.0).to(tl.float32) - about, 0.0)
        y = tl.load(g + s * g_s, mask=inside, other=0.0).to(tl.float32)
        first += away
        second += away * away
        of_g += y
        of_gx += y * away
    total, total_g = _added(first), _added(of_g)
    mean = total / S
    out += n * C + c
    tl.store(out, tl.sum(about, 0) + mean, mask=c < C)
    tl.store(out + size, tl.maximum(_added(second) - total * mean, 0.0), mask=c < C)
    tl.store(out + 2 * size, total_g, mask=c < C)
    tl.store(out + 3 * size, _added(of_gx) - mean * total_g, mask=c < C)


@triton.jit
def finish(
    found, size, gamma, rows, C, S, per_group, eps, weight, bias, lines,
    BC: tl.constexpr, BG: tl.constexpr, SCALED: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Gradients ``[B, C]`` from ``sums``; and ``lines``, four arrays ``[N, C]``: dx = first * g + second * (x - third)
    + fourth. BG: channels of a group, padded; SCALED: whether there is a ``gamma [C]``.
    """
    across = tl.cdiv(C, BC)
    program = tl.program_id(0)
    i = (program // across).to(tl.int64)
    c = program % across * BC + tl.arange(0, BC)
    first_of_group = c // per_group * per_group
    others = first_of_group[:, None] + tl.arange(0, BG)[None, :]
    of_group = (tl.arange(0, BG) < per_group)[None, :] & (c < C)[:, None]
    own_gamma, gammas = tl.full((BC,), 1.0, tl.float32), tl.full((BC, BG), 1.0, tl.float32)
    if SCALED:
        own_gamma = tl.load(gamma + c, mask=c < C, other=0.0)
        gammas = tl.load(gamma + others, mask=of_group, other=0.0)
    of_weight, of_bias = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for row in range(rows):
        at = found + (i * rows + row) * C
        about = tl.load(at + first_of_group, mask=c < C, other=0.0)
        centres = tl.load(at + others, mask=of_group, other=0.0) - about[:, None]
        mean = tl.sum(tl.where(of_group, centres, 0.0), 1) / per_group  # about a number of the group itself
        away = tl.where(of_group, centres - mean[:, None], 0.0)
        spread = tl.load(at + size + others, mask=of_group, other=0.0)
        variance = (tl.sum(spread, 1) / S + tl.sum(away * away, 1)) / per_group
        scale = 1 / tl.sqrt_rn(variance + eps)
        g = tl.load(at + 2 * size + c, mask=c < C, other=0.0)
        centre = tl.load(at + c, mask=c < C, other=0.0)
        gx = tl.load(at + 3 * size + c, mask=c < C, other=0.0) + (centre - about - mean) * g
        of_bias += g
        of_weight += scale * gx
        if LINES:
            gs = tl.load(at + 2 * size + others, mask=of_group, other=0.0)
            gxs = tl.load(at + 3 * size + others, mask=of_group, other=0.0) + away * gs
            h = tl.sum(gammas * gs, 1) / (per_group * S)
            hx = scale * tl.sum(gammas * gxs, 1) / (per_group * S)
            to = lines + (i * rows + row) * C + c
            tl.store(to, scale * own_gamma, mask=c < C)
            tl.store(to + size, -scale * scale * hx, mask=c < C)
            tl.store(to + 2 * size, centre, mask=c < C)
            tl.store(to + 3 * size, -scale * (h + scale * hx * (centre - about - mean)), mask=c < C)
    tl.store(weight + i * C + c, of_weight, mask=c < C)
    tl.store(bias + i * C + c, of_bias, mask=c < C)


@triton.jit
def write(
    x, g, dx, x_n, x_c, x_s, g_n, g_c, g_s, dx_n, dx_c, dx_s, lines, size, C, S, BC: tl.constexpr, BK: tl.constexpr
):
    """dx, by the lines of ``finish``."""
    along, across = tl.cdiv(S, BK), tl.cdiv(C, BC)
    program = tl.program_id(0)
    n = (program // (across * along)).to(tl.int64)
    c = program // along % across * BC + tl.arange(0, BC)
    s = (program % along * BK + tl.arange(0, BK))[:, None]
    inside = (s < S) & (c < C)[None, :]
    lines += n * C + c
    of_g, of_x = tl.load(lines, mask=c < C, other=0.0), tl.load(lines + size, mask=c < C, other=0.0)
    about, rest = tl.load(lines + 2 * size, mask=c < C, other=0.0), tl.load(lines + 3 * size, mask=c < C, other=0.0)
    values = tl.load(x + n * x_n + s * x_s + c[None, :] * x_c, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(g + n * g_n + s * g_s + c[None, :] * g_c, mask=inside, other=0.0).to(tl.float32)
    found = of_g[None, :] * y + (of_x[None, :] * (values - about[None, :]) + rest[None, :])
    tl.store(dx + n * dx_n + s * dx_s + c[None, :] * dx_c, found.to(dx.dtype.element_ty), mask=inside)


def group_norm_grads(x: Tensor, g: Tensor, groups: int, eps: float, examples: int) -> tuple[Tensor, Tensor]:
    """``weight = sum x_hat * g``, ``bias = sum g``; [N, C, S] -> two of [B, C]."""
    return _run(x, g, None, None, groups, eps, examples)


def group_norm_backward(
    x: Tensor, g: Tensor, weight: Tensor | None, groups: int, eps: float, examples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x, and these."""
    dx = torch.empty_like(x)
    return dx, *_run(x, g, weight, dx, groups, eps, examples)


def _run(
    x: Tensor, g: Tensor, gamma: Tensor | None, dx: Tensor | None, groups: int, eps: float, examples: int
) -> tuple[Tensor, Tensor]:
    n, c, s = x.shape
    weight, bias = (x.new_empty((examples, c), dtype=torch.float32) for _ in range(2))
    if not x.numel():
        return weight.zero_(), bias.zero_()
    found, size = x.new_empty((4 if dx is None else 8, n, c), dtype=torch.float32), n * c
    lines = found[4:]
    width, length = tile(c, s, dense_channels=x.stride(1) == 1)
    across = blocks(c, width)
    sums[(n * across,)](x, g, *x.stride(), *g.stride(), c, s, found, size, BC=width, BK=length, num_warps=WARPS)
    narrow, group, warps = of_groups(width, c // groups)
    finish[(examples * blocks(c, narrow),)](
        found, size, found if gamma is None else gamma, n // examples, c, s, c // groups, eps, weight, bias, lines,
        BC=narrow, BG=group, SCALED=gamma is not None, LINES=dx is not None, num_warps=warps,
    )  # fmt: skip
    if dx is not None:
        write[(n * across * blocks(s, length),)](
            x, g, dx, *x.stride(), *g.stride(), *dx.stride(), lines, size, c, s,
            BC=width, BK=length, num_warps=WARPS,
        )  # fmt: skip
    return weight, bias


def of_groups(width: int, per_group: int) -> tuple[int, int, int]:
    """Channels of a program of ``finish``, of their groups, and warps: some numbers of each thread."""
    group = padded(per_group)
    channels = min(width, 16, max(1, 512 // group))
    return channels, group, max(1, min(8, channels * group // 256))
