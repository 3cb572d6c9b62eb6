"""Whose rows: what the probes find, what they need, and when they are made again."""

import contextlib
import dataclasses
import math
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import Raw, losses
from dpfast import DPOptimizer, GhostClipper, Plan
from dpfast.clipping.ownership import ENOUGH_STEPS, groups
from dpfast.errors import CaptureError
from oracle import per_example

SHOWS_8 = 2 + 2 * 3  # backward passes of a step: twice all of 8 examples, and those that have and lack each bit


def clip(clipper, x, loss=losses):
    """Norms of one step."""
    clipper.zero_grad()
    with clipper:
        return clipper.backward(loss(clipper.model, (x,))).norms


@pytest.mark.parametrize("examples", [2, 3, 7, 8, 33])
def test_groups_part_every_example_from_every_other(examples) -> None:
    parted = {(i, j) for group in groups(examples) for i in group for j in set(range(examples)) - set(group)}
    assert parted == {(i, j) for i in range(examples) for j in range(examples) if i != j}
    assert len(groups(examples)) == 2 * math.ceil(math.log2(examples))


def swap(h, i, j):
    """Rows i and j meet; the others stay apart."""
    order = list(range(len(h)))
    order[i], order[j] = j, i
    return h + h[order]


@pytest.mark.parametrize("pair", [(0, 7), (3, 4), (2, 5)])
def test_two_examples_anywhere_that_meet(pair) -> None:
    model = Raw(
        lambda m, x: F.linear(swap(F.linear(x, m.first), *pair) if len(x) == 8 else x, m.last),
        first=(5, 5),
        last=(5, 5),
    )
    clipper = GhostClipper(model, max_grad_norm=1.0)
    clipper._calls.show = lambda rows: ""  # this test is about the backward probe alone
    with pytest.raises(CaptureError, match="first: linear: the gradient of one example's loss reaches rows"):
        clip(clipper, torch.randn(8, 5))


class ScaledByBright(nn.Module):
    """A norm whose scale comes from the batch, from bright images only: no forward probe sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 8, 3), nn.Linear(3, 8)
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x):
        bright = (x.nan_to_num().amin((1, 2, 3), keepdim=True) > 5).float()
        scale = 1 + self.scale((x.nan_to_num() * bright).sum((0, 2, 3))) * bright.max()
        return F.group_norm(self.conv(x), 2, scale, self.shift)


def test_examples_that_meet_in_the_scale_of_a_norm() -> None:
    x = torch.randn(8, 3, 6, 6)
    x[0] += 50
    with pytest.raises(CaptureError, match=r"scale.weight.*linear: the gradient of one example's loss reaches rows"):
        clip(GhostClipper(ScaledByBright(), max_grad_norm=1.0), x)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * min(1.0, 1e-3 / g.nan_to_num().norm().item())


def hooked(h):
    if h.requires_grad:
        h.register_hook(lambda g: g * (1e-3 / g.norm()).clamp(max=1))
    return h


@pytest.mark.parametrize("scale", [Scaled.apply, hooked], ids=["function", "hook"])
def test_gradients_scaled_by_a_norm_of_the_batch(scale) -> None:
    """No gradient leaves its rows, and yet each depends on all."""
    model = Raw(lambda m, x: F.linear(scale(F.linear(x, m.first).tanh()), m.last), first=(5, 5), last=(5, 5))
    with pytest.raises(CaptureError, match="first: linear: the gradient of one example's loss reaches rows"):
        clip(GhostClipper(model, max_grad_norm=1.0), torch.randn(8, 5))


RANGES = {
    "dynamic threshold": lambda x: x / x.abs().flatten().quantile(0.9).clamp(min=1),
    "largest": lambda x: x / x.abs().max().clamp(min=1),
    "negative": lambda x: x - x.clamp(max=0).sum(0),
    "count": lambda x: x * x[x > 1].shape[0],
    "a row in the middle": lambda x: x * x[2],
    "behind a zero": lambda x: x + 0.0 * x.roll(1, 0),
}


@pytest.mark.parametrize("what", RANGES)
def test_what_meets_outside_of_the_usual_range(what) -> None:
    model = Raw(lambda m, x: F.linear(x + RANGES[what](x).detach(), m.weight), weight=(5, 5))
    with pytest.raises(CaptureError, match=r"cannot be clipped per example"):
        clip(GhostClipper(model, max_grad_norm=1.0), torch.randn(16, 5).clamp(0.1, 0.9))


def test_packed_attention_is_refused() -> None:
    """A mask parts the examples of one long sequence, but 0 * NaN is NaN."""

    def packed(m, x):
        n, t, d = x.shape
        q, k, v = F.linear(x.reshape(1, n * t, d), m.qkv).chunk(3, -1)
        own = torch.arange(n * t) // t
        bias = torch.zeros(n * t, n * t).masked_fill(own[:, None] != own[None], -math.inf)
        return (torch.softmax(q @ k.mT + bias, -1) @ v).view(n, t, d)

    with pytest.raises(CaptureError, match="one example whose numbers are not finite makes"):
        clip(GhostClipper(Raw(packed, qkv=(12, 4)), max_grad_norm=1.0), torch.randn(6, 3, 4))


def test_a_broken_example_settles_no_dimension() -> None:
    """Sequence first, and only the broken example goes there: nothing finite says where the rows are."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            y = self.a(x.transpose(0, 1)).tanh().transpose(0, 1)
            return torch.where(x.isfinite().all(2, keepdim=True), self.b(x), y)

    x = torch.randn(4, 8, 4)
    x[3] = math.nan
    norms = clip(GhostClipper(Gated(), max_grad_norm=1.0), x)
    assert norms.isfinite().tolist() == [True, True, True, False]


@pytest.mark.parametrize("augmult", [4, 16])
def test_as_many_positions_as_divide_by_the_examples(augmult) -> None:
    """Along 64 positions 8 blocks fit, but no rows: where they are is shown once."""
    model = Raw(lambda m, x: F.linear(F.linear(x, m.a).tanh(), m.b), a=(5, 4), b=(3, 5))
    clipper = GhostClipper(model, max_grad_norm=1.0, augmult=augmult)
    counts = [count_passes(clipper, torch.randn(8 * augmult, 64, 4)) for _ in range(3)]
    assert counts == [SHOWS_8, 1, 1]


def test_an_unfrozen_gate_is_shown_anew() -> None:
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gate = nn.Linear(4, 4), nn.Parameter(torch.zeros(4), requires_grad=False)

        def forward(self, x):
            h = self.a(x)
            return h + torch.where(self.gate > 0, h - h.mean(0).detach(), 0) * self.gate

    model, x = Gate(), torch.randn(8, 4)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    for step in range(6):
        clip(clipper, x)
        with torch.no_grad():
            model.a.weight += 0.1 * step
    model.gate.requires_grad_(True)
    with pytest.raises(CaptureError, match="changing one example's input"):
        clip(clipper, x)


def test_rows_that_meet_one_way_only() -> None:
    """Row 5 reads row 2: no gradient of rows 0 to 4 shows it."""

    def forward(m, x):
        h = F.linear(x, m.first)
        read = torch.zeros(len(x), len(x))
        if len(x) == 8:
            read[5, 2] = 1
        return F.linear(h + read @ h, m.last)

    clipper = GhostClipper(Raw(forward, first=(5, 5), last=(5, 5)), max_grad_norm=1.0)
    clipper._calls.show = lambda rows: ""  # this test is about the backward probe alone
    with pytest.raises(CaptureError, match="reaches rows of other examples"):
        clip(clipper, torch.randn(8, 5))


class SequenceFirst(nn.Module):
    """Rows in dimension 1 inside; only the first position reaches the loss."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.transpose(0, 1)))[0])


@pytest.mark.parametrize("spoil", ["nan", "padding"])
def test_one_example_alone_does_not_settle_the_dimension(spoil) -> None:
    """The first batch shows one example only, whose gradient would fit two dimensions."""
    torch.manual_seed(0)
    model = SequenceFirst()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    first, weight = torch.randn(2, 4, 4), torch.ones(2)
    if spoil == "nan":
        first[1, 0, 0] = math.nan
    else:
        weight[1] = 0
    clip(clipper, first, lambda m, rows: losses(m, rows) * weight)
    x = torch.randn(4, 4, 4) * 5
    exact = per_example(model, losses, (x,), augmult=1, max_grad_norm=1.0)
    torch.testing.assert_close(clip(clipper, x), exact.norms, rtol=1e-5, atol=0)


def test_a_causal_mixture_behind_a_batch_of_padding() -> None:
    model = Raw(lambda m, x: F.linear(F.linear(x, m.first).cumsum(0), m.last), first=(4, 4), last=(4, 4))
    clipper = GhostClipper(model, max_grad_norm=1.0)
    clipper._calls.show = lambda rows: ""  # this test is about the backward probe alone
    weight = torch.tensor([1.0, 0.0])
    clip(clipper, torch.randn(2, 4), lambda m, rows: losses(m, rows) * weight)
    with pytest.raises(CaptureError, match="reaches rows of other examples"):
        clip(clipper, torch.randn(2, 4))


@pytest.mark.parametrize("mixture", [lambda h: h - 0.9 * h.mean(0), lambda h: h / h.detach().abs().mean(0)])
def test_mixing_that_begins_later(mixture) -> None:
    """Another path through the model is probed anew, backward and forward."""
    model = Raw(
        lambda m, x: F.linear(mixture(F.linear(x, m.first)) if m.mixes else F.linear(x, m.first), m.last),
        first=(5, 5),
        last=(5, 5),
    )
    model.mixes = False
    clipper = GhostClipper(model, max_grad_norm=1.0)
    clip(clipper, torch.randn(6, 5))
    model.mixes = True
    with pytest.raises(CaptureError, match="example"):
        clip(clipper, torch.randn(6, 5))


def test_layers_that_are_skipped_now_and_then() -> None:
    """The same layers in another order of calls: rows in another dimension."""
    torch.manual_seed(0)

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.skip = nn.Linear(4, 4), False

        def forward(self, x):
            h = x if self.skip else self.layer(x)
            return self.layer(h.transpose(0, 1)).transpose(0, 1)

    model = Sometimes()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    for skip in (False, True, False):
        model.skip = skip
        x = torch.randn(4, 4, 4)
        exact = per_example(model, losses, (x,), augmult=1, max_grad_norm=1.0)
        torch.testing.assert_close(clip(clipper, x), exact.norms, rtol=1e-5, atol=0)


class Mixes(nn.Module):
    """Where a gate is open."""

    def __init__(self, mixture):
        super().__init__()
        self.first, self.last, self.mixture = nn.Linear(5, 5), nn.Linear(5, 5), mixture
        self.register_buffer("gate", torch.zeros((), dtype=torch.bool))

    def forward(self, x):
        h = self.first(x)
        return self.last(h + self.mixture(self, h))


@pytest.mark.parametrize("behind", [lambda h: h, lambda h: h.detach()], ids=["plain", "detached"])
@pytest.mark.parametrize("how", ["a buffer", "more examples"])
def test_mixing_that_waits(how, behind) -> None:
    """On the same path: for a buffer to change, or for a batch of more examples."""
    mixtures = {
        "a buffer": lambda m, h: torch.where(m.gate, behind(h).mean(0), 0),
        "more examples": lambda m, h: behind(h)[6:].sum(0),
    }
    model = Mixes(mixtures[how])
    clipper = GhostClipper(model, max_grad_norm=1.0)
    for _ in range(2):
        clip(clipper, torch.randn(6, 5))
    model.gate.fill_(True)
    with pytest.raises(CaptureError, match="example"):
        clip(clipper, torch.randn(8 if how == "more examples" else 6, 5))


def looked_up(table):
    """A loss that is scaled by what each row finds in a table, or in what ``table`` makes of the batch."""

    def loss(m, rows):
        (x,) = rows
        source = table(x) if callable(table) else table
        return m(x * source[(10 * x[:, 0].abs()).long() % 5].view(-1, 1)).square().mean(1)

    return loss


def test_a_table_is_no_batch() -> None:
    """Nobody has changed it since an earlier step: what is looked up there were no rows of others."""
    clipper = GhostClipper(nn.Linear(5, 3), max_grad_norm=0.1)
    loss = looked_up(torch.rand(1000))
    assert [count_passes(clipper, torch.randn(8, 5), loss) for _ in range(4)] == [SHOWS_8, SHOWS_8, 1, 1]


def test_what_may_hold_the_batch_is_shown_at_every_step() -> None:
    buffer = torch.empty(8)

    def written(x):
        return buffer.copy_(x[:, 1])

    def written_by_numpy(x):
        buffer.numpy()[:] = x[:, 1].numpy()
        return buffer

    for table in (lambda x: x[:, 1], written, written_by_numpy):
        clipper = GhostClipper(nn.Linear(5, 3), max_grad_norm=0.1)
        with pytest.warns(UserWarning, match=r"data picks rows inside the block \(by __getitem__\)"):
            assert all(count_passes(clipper, torch.randn(8, 5), looked_up(table)) > 1 for _ in range(4))


class Masked(nn.Module):
    """Keeps some tokens ``[N, T, 4]`` of each row, as masked autoencoders do, along the dimension beside the rows."""

    def __init__(self, keep) -> None:
        super().__init__()
        self.first, self.last, self.keep = nn.Linear(4, 4), nn.Linear(4, 3), keep

    def forward(self, x):
        return self.last(self.keep(self.first(x), x[..., 0].argsort(1)[:, :5]))


KEEPS = {
    "gather": lambda h, at: h.gather(1, at.unsqueeze(-1).expand(-1, -1, 4)),
    "take_along_dim": lambda h, at: torch.take_along_dim(h, at.unsqueeze(-1), dim=-2),
    "index": lambda h, at: h[torch.arange(len(h)).unsqueeze(1), at],
    "index and dots": lambda h, at: h[torch.arange(len(h)).unsqueeze(1), at, ...],
}


@pytest.mark.parametrize("how", KEEPS)
def test_what_picks_beside_the_rows_is_shown_once(how) -> None:
    clipper = GhostClipper(Masked(KEEPS[how]), max_grad_norm=0.1, augmult=2)
    counts = [count_passes(clipper, torch.randn(16, 7, 4)) for _ in range(4)]
    assert counts == [SHOWS_8, 1, 1, 1]


@pytest.mark.parametrize(
    ("keep", "tokens"),
    [
        (KEEPS["gather"], 16),
        (KEEPS["index"], 8),
        (lambda h, at: h.transpose(0, 1)[at.T, torch.arange(len(h)), ...].transpose(0, 1), 7),
        (lambda h, at: h.transpose(0, 1).gather(0, at.T.unsqueeze(-1).expand(-1, -1, 4)).transpose(0, 1), 7),
        (lambda h, _: h[(h > -99).all()][0], 7),
    ],
    ids=["as many tokens as rows", "as many as examples", "index, tokens first", "gather, tokens first", "all or none"],
)
def test_what_may_pick_among_the_rows_is_shown_at_every_step(keep, tokens) -> None:
    clipper = GhostClipper(Masked(keep), max_grad_norm=0.1, augmult=2)
    with pytest.warns(UserWarning, match="data picks rows inside the block"):
        assert all(count_passes(clipper, torch.randn(16, tokens, 4)) > 1 for _ in range(4))


class TokensFirst(nn.Module):
    """Rows ``[5, N, 4]`` along the second dimension; what is far outside of the probes' range takes a neighbour's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        at = (torch.arange(x.shape[1]) + (x[0, :, 0] > 1e3).long()) % x.shape[1]
        return self.last(self.first(x)[:, at].tanh())


# torch's own, at the first import of inductor.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_that_is_not_first_is_not_beside_the_rows(compiled, monkeypatch) -> None:
    """What goes into the model is taken for the batch's size until there are losses."""
    monkeypatch.setattr("dpfast.clipping.private.COMPILER", "aot_eager")
    model = torch.compile(TokensFirst()) if compiled else TokensFirst()
    clipper = GhostClipper(model, max_grad_norm=1e-3)
    loss = lambda m, rows: m(rows[0]).square().mean((0, 2))  # noqa: E731
    x = torch.randn(5, 8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            clip(clipper, x, loss)
        x[0, 3, 0] = 2e3
        with pytest.raises(CaptureError, match="reaches rows of other examples"):
            clip(clipper, x, loss)


def test_a_loss_that_overflows_is_of_one_example_alone() -> None:
    """Its gradients are finite and huge: sums of them must not be what makes the step fail."""
    clipper = GhostClipper(nn.Linear(4, 4096, bias=False), max_grad_norm=1.0)
    x = torch.randn(8, 4)
    x[3] = 5e37
    with clipper:
        factors = clipper.backward(losses(clipper.model, (x,))).clip_factors
    assert factors[3] == 0
    assert (factors[:3] > 0).all()


def test_gradients_are_compared_beside_what_is_not_finite() -> None:
    """One number of each example's gradient is not; the others are scaled by a norm of the batch's."""
    spoil = torch.zeros(8, 6)
    spoil[:, 0] = float("nan")

    def loss(model, rows):
        y = Scaled.apply(model(rows[0]))
        y.register_hook(lambda g: g + spoil)
        return y.square().mean(1)

    clipper = GhostClipper(nn.Linear(4, 6), max_grad_norm=1.0)
    with pytest.raises(CaptureError, match="reaches rows of other examples"):
        clip(clipper, torch.randn(8, 4), loss)


def count_passes(clipper, x, loss=losses) -> int:
    """Backward passes of one step."""
    passes = []
    hooked = lambda m, rows: _Counted.apply(loss(m, rows), passes)  # noqa: E731
    clip(clipper, x, hooked)
    return len(passes)


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, passes):
        ctx.passes = passes
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.passes.append(1)
        return g, None


def test_what_was_shown_is_not_shown_again() -> None:
    clipper = GhostClipper(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), max_grad_norm=1.0)
    assert count_passes(clipper, torch.randn(8, 5)) == SHOWS_8
    assert count_passes(clipper, torch.randn(8, 5)) == 1
    assert count_passes(clipper, torch.randn(6, 5)) == 1, "another batch size is no other path"
    assert count_passes(clipper, torch.randn(11, 5)) == 2 + 2 * 4, "but there are pairs that were not seen"
    clipper.model.eval()
    assert count_passes(clipper, torch.randn(8, 5)) > 1, "another mode is"


def test_examples_without_gradients_are_waited_for_so_long_only() -> None:
    weight = torch.tensor([1.0, 1.0, 0, 0, 0, 0, 0, 0])
    clipper = GhostClipper(nn.Linear(5, 3), max_grad_norm=1.0)

    def weighted(m, rows):
        return losses(m, rows) * weight

    counts = [count_passes(clipper, torch.randn(8, 5), weighted) for _ in range(ENOUGH_STEPS + 1)]
    assert counts == [SHOWS_8] * ENOUGH_STEPS + [1]


def test_many_paths_are_said_once() -> None:
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(6))

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.taken = layers, 0

        def forward(self, x):
            for i, layer in enumerate(self.layers):
                x = layer(x) if self.taken >> i & 1 else x
            return x

    clipper = GhostClipper(Deep(), max_grad_norm=1.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for clipper.model.taken in range(1, 40):
            clip(clipper, torch.randn(4, 3))
    assert [str(w.message)[:44] for w in said if "paths" in str(w.message)] == [
        "the model has taken more than 32 different p"
    ]


class Statistics(nn.Module):
    """Statistics of the batch behind a detach: only the forward probe sees them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x)
        return self.b(h / h.detach().abs().mean(0))


@dataclasses.dataclass
class Output:
    sample: torch.Tensor


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Statistics()

    def forward(self, x):
        return Output(self.net(x))


@pytest.mark.parametrize(
    "loss",
    [lambda m, r: m(*r).sample.square().mean(1), lambda m, r: losses(m.net, r)],
    ids=["a dataclass comes out", "a part of the model is called"],
)
def test_the_forward_probe_sees(loss) -> None:
    with pytest.raises(CaptureError, match="changing one example's input changes"):
        clip(GhostClipper(Wrapped(), max_grad_norm=1.0), torch.randn(8, 4), loss)


def test_the_forward_probe_sees_sequence_first_models() -> None:
    class Turned(Statistics):
        def forward(self, x):
            h = self.a(x)
            return self.b(h / h.detach().abs().mean(1, keepdim=True))

    def turned(m, rows):
        return m(rows[0].transpose(0, 1).contiguous()).square().mean((0, 2))

    with pytest.raises(CaptureError, match="changing one example's input changes"):
        clip(GhostClipper(Turned(), max_grad_norm=1.0), torch.randn(6, 3, 4), turned)


def test_a_forward_pass_that_cannot_be_probed_is_said_once() -> None:
    model = Raw(lambda m, x: x, weight=(5, 3))
    clipper = GhostClipper(model, max_grad_norm=1.0)

    def direct(m, rows):
        return (rows[0] @ m.weight).square().mean(1)

    with pytest.warns(UserWarning, match="not shown that the model takes no statistics .* not called with rows"):
        clip(clipper, torch.randn(8, 5), direct)
    clip(clipper, torch.randn(8, 5), direct)


@pytest.mark.parametrize("positions", [5, 6])
def test_statistics_where_positions_are_as_many_as_rows(positions) -> None:
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x - x.mean(0).detach())

    with pytest.raises(CaptureError, match="changing one example's input changes"):
        clip(GhostClipper(Centred(), max_grad_norm=1.0), torch.randn(6, positions, 4))


def test_statistics_beside_infinite_outputs() -> None:
    """Masked logits are -inf: they must not switch the comparison off."""

    class Masked(Statistics):
        def forward(self, x):
            return super().forward(x) + torch.tensor([0.0, 0.0, -math.inf])

    with pytest.raises(CaptureError, match="changing one example's input changes"):
        clip(GhostClipper(Masked(), max_grad_norm=1.0), torch.randn(8, 4), lambda m, r: m(*r)[:, :2].square().mean(1))


class Tokens(nn.Module):
    """Text in, statistics of the batch inside."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.table(x).mean(1)
        return self.layer(h / h.detach().abs().mean(0))


@pytest.mark.parametrize("first", [torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 3]] * 4)], ids=["one", "all equal"])
def test_whole_numbers_that_leave_nothing_to_change(first) -> None:
    """A first batch that cannot show anything does not vouch for the next."""
    clipper = GhostClipper(Tokens(), max_grad_norm=1.0)
    with contextlib.suppress(CaptureError):
        clip(clipper, first)
    with pytest.raises(CaptureError, match="changing one example's input changes"):
        clip(clipper, torch.randint(0, 7, (6, 3)))


def test_a_second_call_with_other_arguments_is_probed_too() -> None:
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, cond=None):
            return self.layer(x if cond is None else x + cond / cond.std(0).detach())

    def both(m, rows):
        return (m(*rows) + m(*rows, rows[0].sin())).square().mean(1)

    with pytest.raises(CaptureError, match="changing one example's input changes"):
        clip(GhostClipper(Conditioned(), max_grad_norm=1.0), torch.randn(8, 4), both)


def test_a_path_taken_at_random_is_probed_as_it_was_taken() -> None:
    class Sometimes(Statistics):
        def forward(self, x):
            return super().forward(x) if torch.rand(()) < 0.3 else self.b(self.a(x))

    torch.manual_seed(0)
    clipper = GhostClipper(Sometimes(), max_grad_norm=1.0)

    def many_steps():
        for _ in range(30):
            clip(clipper, torch.randn(8, 4))

    with pytest.raises(CaptureError, match="changing one example's input changes"):
        many_steps()


def test_parts_called_one_by_one_are_said() -> None:
    """Between them the user's code is out of sight."""
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "decoder": nn.Linear(4, 3)})

    def coded(m, rows):
        z = m["encoder"](*rows)
        return m["decoder"](z / z.detach().std(0)).square().mean(1)

    with pytest.warns(UserWarning, match=r"its parts decoder, encoder were called one by one"):
        clip(GhostClipper(model, max_grad_norm=1.0), torch.randn(8, 4), coded)


def test_own_generators_and_counters_are_no_mixture() -> None:
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.generator = nn.Linear(4, 3), torch.Generator()

        def forward(self, x):
            return self.layer(x + torch.randn(x.shape, generator=self.generator))

    with pytest.warns(UserWarning, match="two results for one input"):
        clip(GhostClipper(Own(), max_grad_norm=1.0), torch.randn(8, 4))


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(()).item()])
def test_randomness_that_all_share_is_repeated(draw) -> None:
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x * draw())

    clipper = GhostClipper(Noisy(), max_grad_norm=1.0)
    clip(clipper, torch.randn(8, 4))
    assert clipper._calls._shown


def test_a_causal_mask_as_an_argument() -> None:
    """As many positions as rows: it is public all the same."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, mask):
            q = self.layer(x)
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    x, mask = torch.randn(6, 6, 4), torch.ones(6, 6).tril().log()
    clip(GhostClipper(Attention(), max_grad_norm=1.0), x, lambda m, r: m(*r, mask).square().mean((1, 2)))


def test_models_that_fail_on_synthetic_input() -> None:
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            assert x.max() > 1, "expected unscaled images"
            return self.layer(x)

    with pytest.raises(CaptureError, match=r"fails on synthetic input .*AssertionError: expected unscaled"):
        clip(GhostClipper(Picky(), max_grad_norm=1.0), 5 + torch.rand(8, 4))


def test_inputs_made_inside_the_block_are_data() -> None:
    model = nn.Linear(4, 3)
    rows = torch.randn(6, 4).tolist()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with clipper:
        got = clipper.backward(losses(model, (torch.tensor(rows),))).norms
    exact = per_example(model, losses, (torch.tensor(rows),), augmult=1, max_grad_norm=1.0)
    torch.testing.assert_close(got, exact.norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("inputs", [torch.randint(0, 9, (5, 8)), torch.randn(5, 8, 4)], ids=["tokens", "features"])
def test_sequence_first_inputs_are_no_averaged_losses(inputs) -> None:
    """Five positions, then eight: more positions than rows, too."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x if x.is_floating_point() else self.table(x))

    torch.manual_seed(0)
    model = First()
    model.table.requires_grad_(not inputs.is_floating_point())

    def per_row(m, rows):
        return m(rows[0].transpose(0, 1)).square().mean((0, 2))

    for x in (inputs, inputs.transpose(0, 1).contiguous()):
        exact = per_example(model, per_row, (x,), augmult=1, max_grad_norm=1.0)
        torch.testing.assert_close(
            clip(GhostClipper(model, max_grad_norm=1.0), x, per_row), exact.norms, rtol=1e-5, atol=0
        )
        clip(GhostClipper(model, max_grad_norm=1.0), x, per_row)


def test_an_output_that_no_loss_uses() -> None:
    """It costs no probes for ever, and is looked at when it is used."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x), self.b(x)

    clipper = GhostClipper(Heads(), max_grad_norm=1.0)

    def first(m, rows):
        return m(*rows)[0].square().mean(1)

    with pytest.warns(UserWarning, match=r"no loss depends on b\.weight"):
        clip(clipper, torch.randn(8, 4), first)
    assert [count_passes(clipper, torch.randn(8, 4), first) for _ in range(2)] == [SHOWS_8, 1]


@pytest.mark.parametrize("features", [7, 8])
def test_square_batches_are_no_masks(features) -> None:
    """As many features as rows: data all the same."""

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(features, 3)

        def forward(self, x, t):
            return self.layer(x - x.mean(0).detach()) + t[:, None]

    t = torch.rand(8)
    with pytest.raises(CaptureError, match="changing one example's input changes"):
        clip(
            GhostClipper(Centred(), max_grad_norm=1.0), torch.randn(8, features), lambda m, r: m(*r, t).square().mean(1)
        )


@pytest.mark.parametrize("masked", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_statistics_beside_hugely_negative_outputs(masked) -> None:
    class Masked(Statistics):
        def forward(self, x):
            return super().forward(x) + torch.tensor([0.0, 0.0, masked])

    with pytest.raises(CaptureError, match="changing one example's input changes"):
        clip(GhostClipper(Masked(), max_grad_norm=1.0), torch.randn(8, 4), lambda m, r: m(*r)[:, :2].square().mean(1))


def test_statistics_in_half_precision() -> None:
    def cast(m, rows):
        with torch.autocast("cpu", torch.bfloat16):
            return m(*rows).float().square().mean(1)

    with pytest.raises(CaptureError, match="changing one example's input changes"):
        clip(GhostClipper(Statistics(), max_grad_norm=1.0), torch.randn(8, 4), cast)


def test_calls_that_differ_in_an_option() -> None:
    class Optional(Statistics):
        def forward(self, x, normed=False):
            return super().forward(x) if normed else self.b(self.a(x))

    def both(m, rows):
        return (m(*rows) + m(*rows, normed=True)).square().mean(1)

    with pytest.raises(CaptureError, match="changing one example's input changes"):
        clip(GhostClipper(Optional(), max_grad_norm=1.0), torch.randn(8, 4), both)


def test_calls_without_gradients_are_probed_too() -> None:
    model = nn.ModuleDict({"encoder": Statistics(), "head": nn.Linear(3, 3)})
    model["encoder"].requires_grad_(False)

    def latent(m, rows):
        with torch.no_grad():
            z = m["encoder"](*rows)
        return m["head"](z).square().mean(1)

    with pytest.raises(CaptureError, match="changing one example's input changes"):
        clip(GhostClipper(model, max_grad_norm=1.0), torch.randn(8, 4), latent)


@pytest.mark.filterwarnings("ignore:it was not shown")
def test_parts_called_under_autocast() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "head": nn.Linear(4, 3)})

    def cast(m, rows):
        with torch.autocast("cpu", torch.bfloat16):
            z = m["head"](m["encoder"](*rows))
        return z.float().square().mean(1)

    clip(GhostClipper(model, max_grad_norm=1.0), torch.randn(8, 4), cast)


@pytest.mark.filterwarnings("ignore:no loss depends on")
@pytest.mark.parametrize("shape", [(8, 4), (8, 5, 4)])
def test_heads_that_take_turns(shape) -> None:
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

        def forward(self, x):
            return [head(x) for head in self.heads]

    clipper = GhostClipper(Heads(), max_grad_norm=1.0)
    for k in (0, 1, 0, 2, 1, 2):
        x = torch.randn(shape)
        norms = clip(clipper, x, lambda m, r: m(*r)[k].square().flatten(1).mean(1))  # noqa: B023
        exact = per_example(clipper.model.heads[k], losses_of_head, (x,), augmult=1, max_grad_norm=1.0)
        torch.testing.assert_close(norms, exact.norms, rtol=1e-5, atol=0)


def losses_of_head(m, rows):
    return m(*rows).square().flatten(1).mean(1)


def test_random_code_before_the_model_is_no_new_path() -> None:
    clipper = GhostClipper(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), max_grad_norm=1.0)

    def flipped(times):
        def loss(m, rows):
            x = rows[0]
            for _ in range(times):
                x = x.flip(1)
            return _Counted.apply(m(x).square().mean(1), passes)

        passes = []
        clip(clipper, torch.randn(8, 4), loss)
        return len(passes)

    assert [flipped(times) for times in (1, 2, 3)] == [SHOWS_8, 1, 1]


def test_k_rows_averaged_beside_as_many_positions() -> None:
    """Four losses of eight rows of four positions: K rows were averaged, whatever the positions say."""
    with pytest.raises(CaptureError, match="fewer losses than rows"):
        clip(
            GhostClipper(nn.Linear(5, 3), max_grad_norm=1.0, augmult=2),
            torch.randn(8, 4, 5),
            lambda m, r: m(*r).square().mean((1, 2)).view(4, 2).mean(1),
        )


@pytest.mark.filterwarnings("ignore:it was not shown")
def test_constants_given_to_a_part() -> None:
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.place, self.image = nn.Embedding(5, 3), nn.Embedding(4, 3), nn.Linear(4, 3)
            self.register_buffer("classes", torch.arange(5))

    def compared(m, rows):
        own = m.image(*rows)
        return (own @ m.table(m.classes).mT).square().mean(1) + (own @ m.place(torch.arange(4)).mT).square().mean(1)

    model = Named()
    x = torch.randn(8, 4)
    exact = per_example(model, compared, (x,), augmult=2, max_grad_norm=1.0)
    norms = clip(GhostClipper(model, max_grad_norm=1.0, augmult=2), x, compared)
    torch.testing.assert_close(norms, exact.norms, rtol=1e-5, atol=0)


def test_what_a_model_comes_to_do_is_seen_before_the_last_step(monkeypatch):
    """A gate that opens after 3 updates, when there is no time for more repeats than the first."""
    monkeypatch.setattr("dpfast.pace.FREE", 0.0)
    monkeypatch.setattr("dpfast.pace.SHARE", 0.0)

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.open = nn.Linear(4, 3), torch.tensor(False)

        def forward(self, x):
            out = self.layer(x)
            return out - torch.where(self.open, out.detach().mean(0), torch.zeros(3))

    torch.manual_seed(0)
    model, x = Gated(), torch.randn(6, 4)
    plan = Plan(
        dataset_size=6, expected_batch_size=6, max_grad_norm=1.0, steps=6, target_delta=1e-3, noise_multiplier=1.0
    )
    clipper = GhostClipper(model, max_grad_norm=1.0)
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), plan, clipper)

    def train():
        for step in range(plan.steps):
            model.open.fill_(step >= 3)
            with clipper:
                clipper.backward(model(x).square().sum(1))
            optimizer.step()

    with pytest.raises(CaptureError, match=r"changing one example.s input changes"):
        train()
    assert optimizer.steps_taken == 5


@pytest.mark.parametrize("fixed", [False, True], ids=["any size", "one size alone"])
def test_a_repeated_probe_takes_few_examples_where_the_model_does(fixed):
    sizes = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.open = nn.Linear(4, 3), torch.tensor(False)

        def forward(self, x):
            if fixed and len(x) != 24:
                raise ValueError("another size")
            sizes.append(len(x))
            out = self.layer(x)
            return out - torch.where(self.open, out.detach().mean(0), torch.zeros(3))

    torch.manual_seed(0)
    model, x = Model(), torch.randn(24, 4)
    clipper = GhostClipper(model, max_grad_norm=1.0, augmult=2)

    def step():
        sizes.clear()
        with clipper:
            clipper.backward(model(x).square().sum(1))
        clipper.zero_grad()
        with torch.no_grad():
            model.layer.weight += 0.01

    step()
    assert set(sizes) == {24}
    step()
    assert set(sizes) == ({24} if fixed else {24, 16})
    assert sizes.count(24) == (4 if fixed else 1)
    model.open.fill_(True)
    clipper.show_again()
    with pytest.raises(CaptureError, match=r"changing one example's input changes"):
        step()
