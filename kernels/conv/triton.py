"""``conv`` on a GPU, in Triton: each example's weight gradient as one matrix product over its rows and positions.

    G_i[p, tap, c] = sum over rows n and positions t of y[i, n, p, t] * x[i, n, c, t stride + tap dilation - padding]

An implicit matrix product: no patches are made. A program holds a tile of G_i in registers, in float32, and runs over
all rows and positions of the example, so that the sum over K augmentations is free; then it stores the tile, or the
sum of its squares, or adds ``w_i`` times it to the sum over examples (the very numbers whose squares were added up).
Nothing is added atomically: the same inputs give the same bits.

    2 B M D P FLOPs; reads x and y once for each tile in a row (column) of tiles, mostly from the L2 cache; writes B D P
    numbers, or one per tile, or D P for each part of the batch.

Columns of G_i are cut into blocks of channels of one tap; a program takes several blocks of rows and of columns, 192 x
192 at most. Where channels lie next to each other and the stride is 1 (channels_last, linear layers), blocks of x and y
are fetched by the tensor memory accelerator, whose bounds are the padding; all else is fetched through pointers.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dpfast.kernels.clip import triton as clip
from dpfast.kernels.conv import problem
from dpfast.kernels.conv.launches import Chosen, Launch, chosen, measuring, shares
from dpfast.kernels.conv.problem import Problem, three
from dpfast.kernels.conv.spec import ConvSpec
from dpfast.kernels.launch import UPCAST, blocks, has_descriptors, padded, precision, processors, registers


@triton.jit
def _zeros(N: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(N):
        tiles = tiles + (tl.zeros((BP, BC), tl.float32),)
    return tiles


@triton.jit
def _product(y, x, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + y.T @ x``."""
    if UPCAST:  # the interpreter cannot calculate in low precision
        y, x = y.to(tl.float32), x.to(tl.float32)
    return tl.dot(tl.trans(y), x, acc, input_precision=PRECISION)


@triton.jit
def _weighted(totals, tiles, w):
    """An example without a weight adds exactly 0."""
    new = ()
    for j in tl.static_range(len(tiles)):
        new = new + (totals[j] + tl.where(w > 0, w * tiles[j], 0.0),)
    return new


@triton.jit
def _finish(tiles, column, last, p, out, parts, P, C, CB, out_p, out_tap, out_c,
            BP: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
            STORE: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Store tiles, or the sum of their squares; ``column``: the first block of columns, of ``last`` in all."""
    sq = 0.0
    for jp in tl.static_range(ROWS):
        for jc in tl.static_range(COLUMNS):
            block = column + jc
            tile = tiles[jp * COLUMNS + jc]
            rows = p + jp * BP + tl.arange(0, BP)[:, None]
            channels = block % CB * BC + tl.arange(0, BC)[None, :]
            inside = (rows < P) & (channels < C) & (block < last)
            if NORM:
                sq += tl.sum(tl.where(inside, tile * tile, 0.0))
            if STORE:
                place = rows.to(tl.int64) * out_p + block // CB * out_tap + channels * out_c
                tl.store(out + place, tile, mask=inside)
    if NORM:
        tl.store(parts, sq)


@triton.jit
def by_descriptors(
    x, y, w, out, parts,
    examples, per_program, rows, high, wide,
    P, C, taps, kernel_w, dilation_h, dilation_w, padding_h, padding_w,
    out_i, out_p, out_tap, out_c,
    BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STORE: tl.constexpr, NORM: tl.constexpr, SUM: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x, y: descriptors of ``[B, R, H, W, C]`` and ``[B, R, high, wide, P]``, in blocks ``[1, BN, BH, BW, BC or BP]``.

    Reading outside of them gives zeros: the padding, rows of other examples, channels that are not there.
    """
    CB = tl.cdiv(C, BC)
    last = taps * CB
    PB = tl.cdiv(P, BP * ROWS)
    programs = PB * tl.cdiv(last, COLUMNS)
    program = tl.program_id(0)
    part = program // programs
    p = program % programs % PB * (BP * ROWS)
    column = program % programs // PB * COLUMNS
    across, down = tl.cdiv(wide, BW), tl.cdiv(high, BH)
    steps = tl.cdiv(rows, BN) * down * across
    tiles = _zeros(ROWS * COLUMNS, BP, BC)
    totals = _zeros(ROWS * COLUMNS if SUM else 0, BP, BC)
    for i in range(part * per_program, tl.minimum((part + 1) * per_program, examples)):
        if SUM:
            tiles = _zeros(ROWS * COLUMNS, BP, BC)
        for step in range(steps):
            n, h, v = step // (down * across) * BN, step // across % down * BH, step % across * BW
            xs = ()
            for jc in tl.static_range(COLUMNS):
                block = column + jc
                tap = block // CB
                at_h = h + tap // kernel_w * dilation_h - padding_h
                at_w = v + tap % kernel_w * dilation_w - padding_w
                xs = xs + (x.load([i, n, at_h, at_w, block % CB * BC]).reshape(BN * BH * BW, BC),)
            new = ()
            for jp in tl.static_range(ROWS):
                g = y.load([i, n, h, v, p + jp * BP]).reshape(BN * BH * BW, BP)
                for jc in tl.static_range(COLUMNS):
                    new = new + (_product(g, xs[jc], tiles[jp * COLUMNS + jc], UPCAST, PRECISION),)
            tiles = new
        if SUM:
            totals = _weighted(totals, tiles, tl.load(w + i))
    if SUM:
        tiles = totals
    _finish(tiles, column, last, p, out + part.to(tl.int64) * out_i, parts + program, P, C, CB, out_p, out_tap, out_c,
            BP, BC, ROWS, COLUMNS, STORE, NORM)  # fmt: skip


@triton.jit
def by_pointers(
    x, y, w, out, parts,
    examples, per_program, rows,
    x_i, x_n, x_d, x_h, x_w, x_c, y_i, y_n, y_d, y_h, y_w, y_p,
    out_i, out_p, out_tap, out_c,
    P: tl.constexpr, C: tl.constexpr, GROUPS: tl.constexpr,
    D: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OD: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DD: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BK: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, STORE: tl.constexpr, NORM: tl.constexpr, SUM: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Any geometry: each position's place is calculated, what lies outside of the input is masked."""
    T: tl.constexpr = OD * OH * OW
    PB: tl.constexpr = (P + BP - 1) // BP
    CB: tl.constexpr = (C + BC - 1) // BC
    last: tl.constexpr = KD * KH * KW * CB
    program = tl.program_id(0)
    part = program // (GROUPS * PB * last)
    group = program // (PB * last) % GROUPS
    column = program // PB % last
    p = program % PB * BP
    tap = column // CB
    kd, kh, kw = tap // (KH * KW) * DD - PD, tap // KW % KH * DH - PH, tap % KW * DW - PW
    in_p = p + tl.arange(0, BP)[None, :]
    in_c = column % CB * BC + tl.arange(0, BC)[None, :]
    x += (group * C + in_c).to(tl.int64) * x_c
    y += (group * P + in_p).to(tl.int64) * y_p
    tile = tl.zeros((BP, BC), tl.float32)
    total = tile
    first = part.to(tl.int64) * per_program
    for e in range(tl.minimum(per_program, examples - part * per_program)):
        i = first + e
        if SUM:
            tile = tl.zeros((BP, BC), tl.float32)
        for start in range(0, rows * T, BK):
            at = start + tl.arange(0, BK)[:, None]
            n, t = (at // T).to(tl.int64), at % T
            od, oh, ow = t // (OH * OW), t // OW % OH, t % OW
            d, h, v = od * SD + kd, oh * SH + kh, ow * SW + kw
            real = at < rows * T
            inside = real & (d >= 0) & (d < D) & (h >= 0) & (h < H) & (v >= 0) & (v < W)
            a = tl.load(x + i * x_i + n * x_n + d * x_d + h * x_h + v * x_w, mask=inside & (in_c < C), other=0.0)
            g = tl.load(y + i * y_i + n * y_n + od * y_d + oh * y_h + ow * y_w, mask=real & (in_p < P), other=0.0)
            tile = _product(g, a, tile, UPCAST, PRECISION)
        if SUM:
            (total,) = _weighted((total,), (tile,), tl.load(w + i))
    if SUM:
        tile = total
    place = out + part.to(tl.int64) * out_i + group * P * out_p
    _finish((tile,), column, last, p, place, parts + program, P, C, CB, out_p, out_tap, out_c,
            BP, BC, 1, 1, STORE, NORM)  # fmt: skip


STEP = 16  # bytes in which a descriptor counts


class Side(NamedTuple):
    """x or y as ``[B, R, D, H, W, channels of all groups]``."""

    t: Tensor
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def in_steps(self) -> bool:
        """Whether a descriptor can describe it."""
        steps = [stride * self.t.element_size() for size, stride in self._of_whole() if size > 1]
        dense = self.strides[-1] == 1 and self.t.data_ptr() % STEP == 0
        return dense and all(step > 0 and step % STEP == 0 for step in steps)

    @property
    def spacing(self) -> int | None:
        """From one position to the next of all rows, where it is the same everywhere."""
        spacing, run = None, 1
        for size, stride in reversed(list(zip(self.sizes[1:-1], self.strides[1:-1], strict=True))):
            if size == 1:
                continue
            if spacing is None:
                spacing = stride
            elif stride != run * spacing:
                return None
            run *= size
        return spacing or 0

    def descriptor(self, block: tuple[int, ...]) -> TensorDescriptor:
        """Of all but the depth."""
        strides: list[int] = []
        run = blocks(self.sizes[-1], STEP) * STEP
        for size, stride in reversed(self._of_whole()):  # of one alone, any stride will do: the usual one
            strides.insert(0, stride if size > 1 else run)
            run = strides[0] * size
        return TensorDescriptor(self.t, [*self.sizes[:2], *self.sizes[3:]], [*strides, 1], list(block))

    def _of_whole(self) -> list[tuple[int, int]]:
        """Sizes and strides of all dimensions but depth and channels."""
        return [(self.sizes[i], self.strides[i]) for i in (0, 1, 3, 4)]


class Gradients:
    """The weight gradients that a problem asks for."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        _, _, groups, c, p = problem.sizes
        space, out, kernel, stride, dilation = (three(numbers, 1) for numbers in problem.geometry[:5])
        self.geometry = space, out, kernel, stride, dilation, three(problem.geometry[5], 0)
        self.x = self._side(problem.x, space, groups * c, problem.x_stride)
        self.y = self._side(problem.y, out, groups * p, problem.y_stride)
        self.taps = math.prod(kernel)
        self.positions = problem.sizes[1] * math.prod(out)
        self.half = problem.x.dtype != torch.float32
        flat = space[0] == out[0] == kernel[0] == 1
        simple = flat and groups == 1 and stride == (1, 1, 1) and not problem.empty
        self.described = simple and has_descriptors(problem.x.device) and self.x.in_steps and self.y.in_steps

    def per_example_grads(self) -> tuple[Tensor, Tensor]:
        """``[B, numbers]``, and their squared norms ``[B]``."""
        out = self._new(self.problem.sizes[0], self.problem.numbers)
        return out, self._squares(out, partial(chosen, total=False))

    def shares(self, most: int) -> int:
        """Into how many the positions of an example should be cut; they divide ``most``."""
        return self._launch(shares, most=most)[0]

    def sq_norms(self) -> Tensor:
        """``[B]``, float64."""
        return self._squares(None, measuring)

    def clipped_sum(self, w: Tensor) -> Tensor:
        """``[numbers]``."""
        problem, examples = self.problem, self.problem.sizes[0]
        if problem.empty:
            return self._new(problem.numbers).zero_()
        found = self._launch(chosen, total=True)
        out = self._new(blocks(examples, found.each), problem.numbers)
        self._run(found, len(out), w=w.float().contiguous(), out=out)
        return out[0] if len(out) == 1 else out.sum(0)

    def _squares(self, out: Tensor | None, choose: Callable[..., Chosen]) -> Tensor:
        problem, examples = self.problem, self.problem.sizes[0]
        if problem.empty:
            if out is not None:
                out.zero_()
            return problem.x.new_zeros(examples, dtype=torch.float64)
        found = self._launch(choose)
        parts = self._new(examples, found.tiles)
        self._run(found, examples, out=out, parts=parts)
        return parts.sum(1, dtype=torch.float64)

    def _side(self, t: Tensor, space: tuple[int, ...], channels: int, strides: tuple[int, ...]) -> Side:
        examples, rows, *_ = self.problem.sizes
        row, channel, *within = strides
        return Side(t, (examples, rows, *space, channels), (rows * row, row, *three(within, 0), channel))

    def _new(self, *shape: int) -> Tensor:
        return self.problem.x.new_empty(shape, dtype=torch.float32)

    def _launch(self, choose: Callable[..., Any], **of: int) -> Any:
        """What one of ``launches`` says of this problem."""
        asked = self.problem.sizes, self.positions, self.taps, processors(self.problem.x.device)
        return choose(*asked, described=self.described, half=self.half, **of)

    def _run(
        self,
        found: Chosen,
        parts_of_batch: int,
        *,
        w: Tensor | None = None,
        out: Tensor | None = None,
        parts: Tensor | None = None,
    ) -> None:
        """parts_of_batch: of so many examples each."""
        launch = found.launch
        examples, _, groups, c, p = self.problem.sizes
        order = (c * self.taps, 1, self.taps) if self.problem.by_channel else (c, groups * p * c, 1)
        by = self._by_descriptors if self.described else self._by_pointers
        kernel, inputs, geometry, constants = by(launch)
        kernel[(found.tiles * parts_of_batch,)](
            *inputs,
            *[t if t is not None else self.problem.x for t in (w, out, parts)],  # None: not looked at
            examples,
            found.each,
            *geometry,
            self.problem.numbers,
            *order,
            **constants,
            BP=launch.p,
            BC=launch.c,
            STORE=out is not None,
            NORM=parts is not None,
            SUM=w is not None,
            UPCAST=UPCAST,
            PRECISION=precision(self.problem.x.dtype),
            num_warps=launch.warps,
            num_stages=launch.stages,
            maxnreg=registers(launch.warps),
        )

    def _by_descriptors(self, launch: Launch) -> tuple[Any, list[Any], list[int], dict[str, int]]:
        _, rows, _, c, p = self.problem.sizes
        _, (_, high, wide), kernel, _, dilation, padding = self.geometry
        at_a_time = launch.at_a_time(self.positions)
        across = min(at_a_time, padded(wide))
        down = min(at_a_time // across, padded(high))
        block = (1, at_a_time // (across * down), down, across)
        inputs = [self.x.descriptor((*block, launch.c)), self.y.descriptor((*block, launch.p))]
        geometry = [rows, high, wide, p, c, self.taps, kernel[2], *dilation[1:], *padding[1:]]
        constants = {"BN": block[1], "BH": down, "BW": across, "ROWS": launch.rows, "COLUMNS": launch.columns}
        return by_descriptors, inputs, geometry, constants

    def _by_pointers(self, launch: Launch) -> tuple[Any, list[Any], list[int], dict[str, int]]:
        _, rows, groups, c, p = self.problem.sizes
        geometry, strides = self.geometry, [self.x.strides, self.y.strides]
        space, out, _, stride, _, padding = geometry
        same = space == out and self.taps == 1 and stride == (1, 1, 1) and padding == (0, 0, 0)
        if same and self.x.spacing is not None and self.y.spacing is not None:  # every position is a row of its own
            rows, geometry = rows * math.prod(out), ((1, 1, 1), (1, 1, 1), *geometry[2:])
            strides = [(s.strides[0], s.spacing or 0, 0, 0, 0, s.strides[-1]) for s in (self.x, self.y)]
        constants = {"P": p, "C": c, "GROUPS": groups, "BK": launch.at_a_time(self.positions)}
        for letters, numbers in zip(("", "O", "K", "S", "D", "P"), geometry, strict=True):
            constants |= {letters + dim: number for dim, number in zip("DHW", numbers, strict=True)}
        return by_pointers, [self.x.t, self.y.t], [rows, *strides[0], *strides[1]], constants


def per_example_grads(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> tuple[Tensor, Tensor]:
    """``G [B, numbers]`` in the order of ``spec``, and ``|G_i|^2 [B]`` of the numbers stored."""
    a, g = channels_last(a, 1), channels_last(g, 1)

    def cut(count: int) -> Gradients:
        return Gradients(problem.of_convolution(a, g, spec, examples * count))

    return stored(cut, len(a) // max(1, examples))


def sq_norms(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> Tensor:
    """``|G_i|^2 [B]``, float64; no ``G_i`` is stored."""
    return _of_convolution(a, g, spec, examples).sq_norms()


def clipped_sum(a: Tensor, g: Tensor, spec: ConvSpec, w: Tensor) -> Tensor:
    """``sum_i w_i G_i [numbers]`` of the very ``G_i`` that the others measure; ``w_i = 0`` contributes exactly 0."""
    return _of_convolution(a, g, spec, len(w)).clipped_sum(w)


def _of_convolution(a: Tensor, g: Tensor, spec: ConvSpec, examples: int) -> Gradients:
    return Gradients(problem.of_convolution(channels_last(a, 1), channels_last(g, 1), spec, examples))


def stored(gradients: Callable[[int], Gradients], most: int) -> tuple[Tensor, Tensor]:
    """``G [B, numbers]`` and their squared norms. gradients: of examples cut into so many, which divide ``most``."""
    whole = gradients(1)
    count = whole.shares(most)
    if count == 1:
        return whole.per_example_grads()
    flat = gradients(count).per_example_grads()[0].unflatten(0, (-1, count)).sum(1)
    return flat, clip.sq_norms(flat)


def channels_last(t: Tensor, dim: int) -> Tensor:
    """The same numbers with channels next to each other, in a copy if need be: tiles are read many times."""
    return t if t.shape[dim] < 2 or t.stride(dim) == 1 else t.movedim(dim, -1).contiguous().movedim(-1, dim)
