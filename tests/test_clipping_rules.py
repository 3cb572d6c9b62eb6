"""Rules for single functions against the oracle, in every form: attention, cells, products, joins, moved weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import CONVOLUTIONS, LAYERS, PATTERNS, Case, Raw, floats, losses
from checks import check, clip, fallbacks
from dpfast import GhostClipper, Performance
from dpfast.clipping.rules.attention import multi_head_attention
from dpfast.clipping.terms import ConvTerm, EmbeddingTerm, LinearTerm, Viewed
from oracle import assert_as_good_as_torch, per_example


class Attention(nn.Module):
    """``nn.MultiheadAttention`` as a layer of one input, or of two (queries and keys)."""

    def __init__(self, *, calls=None, values=False, **settings) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **{"batch_first": True, **settings})
        for p in self.attention.parameters():
            nn.init.normal_(p, std=0.5)
        self.calls, self.values, self.first = calls or {}, values, self.attention.batch_first

    def forward(self, x, y=None):
        y = x if y is None else y
        z = y.sin() if self.values else y
        x, y, z = (x, y, z) if self.first else (t.transpose(0, 1) for t in (x, y, z))
        if not self.first and not self.values:
            z = y
        out, weights = self.attention(x, y, z, **self.calls)
        out = out if self.first else out.transpose(0, 1)
        return out if weights is None else out + weights.square().flatten(1).sum(1)[:, None, None]


def two(*shapes):
    return lambda n: tuple(torch.randn(n, *shape) for shape in shapes)


CAUSAL = torch.triu(torch.full((3, 3), float("-inf")), 1)
PADDING = torch.tensor([[False, False, True]])


class Padded(Attention):
    def forward(self, x):
        return self.attention(x, x, x, key_padding_mask=PADDING.expand(len(x), -1), **self.calls)[0]


ATTENTION = [
    Case("self", lambda: Attention(calls={"need_weights": False}), floats(3, 4)),
    Case("self-weights", lambda: Attention(calls={"average_attn_weights": False}), floats(3, 4)),
    Case("self-sequence-first", lambda: Attention(batch_first=False), floats(3, 4)),
    Case("cross", Attention, two((3, 4), (5, 4))),
    Case("cross-values", lambda: Attention(values=True, bias=False), two((3, 4), (5, 4))),
    Case("cross-sequence-first", lambda: Attention(batch_first=False, values=True), two((3, 4), (5, 4))),
    Case("other-widths", lambda: Attention(kdim=5, vdim=5), two((3, 4), (2, 5))),
    Case("added-keys", lambda: Attention(add_bias_kv=True, add_zero_attn=True), floats(3, 4)),
    Case(
        "causal", lambda: Attention(calls={"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}), floats(3, 4)
    ),
    Case("causal-mask", lambda: Attention(add_zero_attn=True, calls={"attn_mask": CAUSAL < 0}), floats(3, 4)),
    Case("padded", lambda: Padded(calls={"need_weights": False}), floats(3, 4)),
    Case("padded-causal", lambda: Padded(calls={"attn_mask": CAUSAL < 0, "is_causal": True}), floats(3, 4)),
    Case("encoder", lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True, norm_first=True), floats(3, 4)),
    Case("encoder-eval", lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.1, batch_first=True).eval(), floats(3, 4)),
    Case("decoder", lambda: nn.TransformerDecoderLayer(4, 2, 6, 0.0, batch_first=True), two((3, 4), (5, 4))),
]


def steps(cell: nn.Module):
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x):
            state = None
            for t in range(x.shape[1]):
                state = self.cell(x[:, t], state)
            return torch.cat(state, 1) if isinstance(state, tuple) else state

    return Steps()


CELLS = [
    Case("lstm", lambda: steps(nn.LSTMCell(4, 3)), floats(3, 4)),
    Case("gru", lambda: steps(nn.GRUCell(4, 3)), floats(3, 4)),
    Case("gru-no-bias", lambda: steps(nn.GRUCell(4, 3, bias=False)), floats(1, 4)),
    Case("rnn", lambda: steps(nn.RNNCell(4, 3)), floats(3, 4)),
    Case("rnn-relu", lambda: steps(nn.RNNCell(4, 3, nonlinearity="relu")), floats(3, 4)),
]


def raw(name: str, forward, inputs=floats(5, 4), *, slow: bool = False, **shapes) -> Case:
    return Case(name, lambda: Raw(forward, **shapes), inputs, slow)


PRODUCTS = [
    raw("einsum-channels-last", lambda m, x: torch.einsum("bhwc,co->bhwo", x, m.w), floats(2, 3, 4), w=(4, 3)),
    raw("einsum-weight-first", lambda m, x: torch.einsum("oc,bchw->bohw", m.w, x), floats(4, 2, 3), w=(3, 4)),
    raw("einsum-ellipsis", lambda m, x: torch.einsum("...c,cd->...d", x, m.w), w=(4, 3)),
    raw("einsum-heads", lambda m, x: torch.einsum("bthd,hde->bthe", x, m.w), floats(5, 2, 4), w=(2, 4, 3)),
    raw("einsum-heads-joined", lambda m, x: torch.einsum("bthd,hde->bte", x, m.w), floats(5, 2, 4), w=(2, 4, 3)),
    raw("einsum-split-heads", lambda m, x: torch.einsum("btd,dhe->bhte", x, m.w), w=(4, 2, 3)),
    raw("einsum-rows-second", lambda m, x: torch.einsum("bd,td->tb", x[:, 0], m.w).t(), w=(3, 4)),
    raw("einsum-list", lambda m, x: torch.einsum("ntc,dc->ntd", [x, m.w]), w=(3, 4)),
    raw("einsum-outer", lambda m, x: torch.einsum("ntc,p->ntcp", x, m.w), w=(3,)),
    raw("einsum-scale", lambda m, x: torch.einsum("ntc,c->ntc", x, m.w), w=(4,)),
    raw("einsum-number", lambda m, x: torch.einsum("ntc,->ntc", x, m.w), w=()),
    raw("einsum-three", lambda m, x: torch.einsum("ntc,cd,d->ntd", x, m.w, m.v), w=(4, 3), v=(3,), slow=True),
    raw("einsum-summed", lambda m, x: torch.einsum("ntc,de->nte", x, m.w), w=(3, 2), slow=True),
    raw("matmul-left", lambda m, x: m.w @ x, w=(3, 5)),
    raw("matmul-left-rows-last", lambda m, x: (m.w @ x[:, 0].t()).t(), w=(3, 4)),
    raw("matmul-heads", lambda m, x: x[:, None] @ m.w, w=(2, 4, 3)),
    raw("matmul-heads-left", lambda m, x: m.w @ x[:, None], w=(2, 3, 5)),
    raw("matmul-one-head", lambda m, x: x.unflatten(1, (5, 1)) @ m.w, w=(1, 4, 3)),
    raw("matmul-vector", lambda m, x: x @ m.w, w=(4,)),
    raw("matmul-vector-left", lambda m, x: m.w @ x, w=(5,)),
    raw("bmm", lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), floats(2, 4), w=(2, 4, 3)),
    raw("addmm", lambda m, x: torch.addmm(m.b, x.view(-1, 4), m.w).view(len(x), 5, 3), w=(4, 3), b=(3,)),
    raw("addmm-scaled", lambda m, x: m.b.addmm(x[:, 0], m.w, beta=0.5, alpha=-2), w=(4, 3), b=(3,)),
    raw("addmm-bias", lambda m, x: torch.addmm(m.b, x[:, 0], m.mask[:4, :4]), b=(4,)),
    raw(
        "baddbmm",
        lambda m, x: torch.baddbmm(m.b, x.transpose(0, 1), m.w).transpose(0, 1),
        floats(2, 4),
        w=(2, 4, 3),
        b=(3,),
    ),
    raw("tensordot", lambda m, x: torch.tensordot(x, m.w, 1), w=(4, 3)),
    raw("tensordot-dims", lambda m, x: torch.tensordot(m.w, x, ([2, 0], [1, -1])).t(), w=(4, 3, 5)),
    Case("bilinear-rows", lambda: nn.Bilinear(4, 3, 5), two((2, 4), (2, 3))),
    Case("bilinear-no-bias", lambda: nn.Bilinear(4, 3, 5, bias=False), two((4,), (3,))),
]


def learned_tokens(m, x):
    tokens = m.token.expand(x.shape[0], 1, -1)
    return torch.cat([tokens, x, m.last.repeat(len(x), 2, 1)], 1) * m.scale.expand_as(tokens)


def joined_in_place(m, x):
    """What was expanded is not what was changed afterwards."""
    tokens = m.token.repeat(len(x), 1, 1)
    tokens.mul_(3)
    return torch.cat([tokens, x], 1)


def joined_out_of_sight(m, x):
    """The same, where the capture cannot see it."""
    tokens = m.token.repeat(len(x), 1, 1)
    with torch._C.DisableTorchFunction():
        tokens.mul_(3)
    return torch.cat([tokens, x], 1)


ENTRYWISE = [
    raw("tokens", learned_tokens, token=(1, 1, 4), last=(1, 1, 4), scale=(4,)),
    raw("token-of-a-vector", lambda m, x: torch.cat((m.t[None, None].expand(len(x), -1, -1), x), dim=-2), t=(4,)),
    raw("token-changed-in-place", joined_in_place, token=(1, 1, 4)),
    raw("token-changed-out-of-sight", joined_out_of_sight, token=(1, 1, 4)),
    raw("stack", lambda m, x: torch.stack([x, m.p.expand_as(x), m.q.expand_as(x)], 2), p=(5, 4), q=(4,)),
    raw("stack-first", lambda m, x: torch.stack([x, m.p.expand_as(x)]).transpose(0, 1), p=(5, 4)),
    raw("cat-of-one-parameter", lambda m, x: torch.cat([m.p.expand_as(x), x, m.p.expand_as(x)], -1), p=(5, 1)),
    raw("where-both", lambda m, x: torch.where(x > 0.5, m.p, m.q), p=(4,), q=(5, 1)),
    raw("where-masked", lambda m, x: torch.where(x[:, :, :1] > 0.5, m.p, x), p=(1, 1, 4)),
    raw("where-method", lambda m, x: m.p.where(x > 0.5, x) + x.where(x > 0.7, m.q), p=(4,), q=()),
    raw("masked-fill", lambda m, x: x.masked_fill(x > 0.5, m.p), p=()),
    raw("divide-by", lambda m, x: x / (m.p.abs() + 0.5), p=(5, 1)),
    raw("divided", lambda m, x: m.p / (x.abs() + 0.5), p=(4,)),
    raw("reciprocal", lambda m, x: 2 / (x * m.p + 9), p=(4,)),
    raw("divide-in-place", lambda m, x: x.sin().div_(m.p.exp()), p=(4,)),
    raw("lerp", lambda m, x: torch.lerp(x, x.sin(), m.p), p=(4,)),
    raw("lerp-ends", lambda m, x: torch.lerp(m.p, m.q, x) + torch.lerp(m.p, x, 0.3), p=(4,), q=(5, 1)),
    raw("addcmul", lambda m, x: torch.addcmul(x, m.p, x, value=-2) + torch.addcmul(m.q, x, x), p=(4,), q=(5, 1)),
    raw("positions-resized", lambda m, x: x + F.interpolate(m.p, 5, mode="linear").mT, p=(1, 4, 3)),
    Case("prelu-one", nn.PReLU, floats(5, 4)),
    raw("index-select", lambda m, x: x + m.p.index_select(0, x[:, 0, 0].gt(0).long())[:, None], p=(3, 4)),
    raw("iterated", lambda m, x: sum(F.linear(x, w) for w in m.p), p=(2, 3, 4)),
]


def halves(m, x):
    first, second = m.w.split(3)
    return F.linear(F.linear(x, first, m.b[:3]).sin(), second[:, :3], m.b[3:])


def overlapping(m, x):
    return F.linear(x, m.w[:4]) * F.linear(x, m.w[2:])


def changed_through_a_view(m, x):
    """A chain that is no longer true."""
    w = m.w * 1.0
    w.view(-1)[:3].mul_(4)
    return F.linear(x, w)


def changed_out_of_sight(m, x):
    w = m.w * 1.0
    with torch._C.DisableTorchFunction():
        w.mul_(4)
    return F.linear(x, w)


def moved_after_a_change(m, x):
    w = m.w * 1.0
    with torch._C.DisableTorchFunction():
        w.mul_(4)
    return F.linear(x, w.t())


def changed_by_another(m, x):
    w = m.w * 2.0
    w[0] = m.q
    return F.linear(x, w)


MOVED = [
    raw("equalised", lambda m, x: F.linear(x, m.w * 0.3, m.b * 0.1), w=(6, 4), b=(6,)),
    raw("scaled-twice", lambda m, x: F.linear(x, -(2 * m.w) / 7), w=(6, 4)),
    raw("by-a-tiny-number", lambda m, x: 1e12 * F.linear(x, m.w * 1e-12), w=(6, 4)),
    raw("by-zero", lambda m, x: F.linear(x, m.w * 0) + F.linear(x, m.v), w=(6, 4), v=(6, 4)),
    raw("cast", lambda m, x: F.linear(x, m.w.to(x.dtype), m.b.type_as(x)), w=(6, 4), b=(6,)),
    raw("conv-squeezed", lambda m, x: F.linear(x, m.w.squeeze(-1), m.b), w=(6, 4, 1), b=(6,)),
    raw("conv-from-matrix", lambda m, x: F.conv1d(x.mT, m.w[:, :, None]), w=(6, 4)),
    raw("conv-flipped", lambda m, x: F.conv1d(x.mT, m.w.flip(-1).permute(1, 0, 2)), w=(4, 6, 3)),
    raw("transposed", lambda m, x: x @ m.w.T + F.linear(x, m.v.mT.contiguous()), w=(6, 4), v=(4, 6)),
    raw("rows-of-a-table", lambda m, x: x + m.p[:5] + m.p[7], p=(9, 4)),
    raw("halves", halves, w=(6, 4), b=(6,)),
    raw("chunks", lambda m, x: torch.cat([F.linear(x, w) for w in m.w.chunk(3)], -1), w=(6, 4)),
    raw("columns", lambda m, x: F.linear(x, m.w[:, :4]) + F.linear(x, m.w[:, 4:]), w=(6, 8)),
    raw("overlapping", overlapping, w=(6, 4)),
    raw("a-part-and-all", lambda m, x: F.linear(x, m.w[:3]).repeat(1, 1, 2) * F.linear(x, m.w), w=(6, 4)),
    raw("twice-one-view", lambda m, x: F.linear(F.linear(x, (w := m.w.t())), w), w=(4, 4)),
    raw("changed-through-a-view", changed_through_a_view, w=(6, 4)),
    raw("changed-out-of-sight", changed_out_of_sight, w=(6, 4)),
    raw("moved-after-a-change", moved_after_a_change, w=(4, 6)),
    raw("changed-by-another", changed_by_another, w=(6, 4), q=(4,)),
    raw("table-scaled", lambda m, y: F.embedding(y, m.t * 3.0), lambda n: (torch.randint(0, 7, (n, 3)),), t=(7, 4)),
]


EVERY = [*ATTENTION, *CELLS, *PRODUCTS, *ENTRYWISE, *MOVED]
OF_LABELS = MOVED[-1:]  # no number of its input can be broken


@pytest.mark.parametrize("augmult", [1, 3])
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_every_rule_and_form(case: Case, augmult: int) -> None:
    model, inputs = case.build(rows=3 * augmult)
    with fallbacks() as slow:
        check(model, inputs, augmult=augmult)
    assert bool(slow) == case.slow_rule


# Used twice in part, or not made of one parameter by moves and numbers alone.
MATERIALISED = {
    "columns",
    "overlapping",
    "a-part-and-all",
    "twice-one-view",
    "changed-through-a-view",
    "changed-out-of-sight",
    "moved-after-a-change",
    "changed-by-another",
}
IN_FORM = [c for c in [*PRODUCTS, *MOVED] if not c.slow_rule and c.name not in MATERIALISED]


@pytest.mark.parametrize("case", IN_FORM, ids=lambda case: case.name)
def test_products_and_moved_weights_keep_their_form(case: Case, monkeypatch) -> None:
    """Not a single gradient [B, *shape] of a matrix is made for them."""

    def forbidden(self):
        raise AssertionError(f"{type(self).__name__} was materialised")

    for term in (LinearTerm, ConvTerm, EmbeddingTerm, Viewed):
        monkeypatch.setattr(term, "stored", forbidden)
    model, inputs = case.build(rows=6)
    check(model, inputs, augmult=2, forms=["gram"])


# Attention, against torch


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("case", [c for c in ATTENTION if c.build(1)[0].__class__.__name__ in ("Attention", "Padded")])
def test_composed_attention_is_that_of_torch(case: Case, dropout: float, monkeypatch) -> None:
    """Outputs, weights and random numbers."""
    model, inputs = case.build(rows=5)
    model.attention.dropout = dropout
    torch.manual_seed(1)
    theirs = model(*inputs)
    after = torch.get_rng_state()
    monkeypatch.setattr(F, "multi_head_attention_forward", multi_head_attention)
    torch.manual_seed(1)
    ours = model(*inputs)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_without_a_batch(need_weights: bool, monkeypatch) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2)
    x, mask = torch.randn(3, 4), {"key_padding_mask": PADDING[0], "attn_mask": CAUSAL < 0}
    theirs = model(x, x, x, need_weights=need_weights, **mask)
    monkeypatch.setattr(F, "multi_head_attention_forward", multi_head_attention)
    ours = model(x, x, x, need_weights=need_weights, **mask)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", ["auto", "gram", "direct", "materialise"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: Attention(dropout=0.3, calls={"need_weights": False}),
        lambda: Attention(dropout=0.3),
        lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.3, batch_first=True),
    ],
    ids=["fused", "weights", "encoder"],
)
def test_dropout_in_attention(build, form: str) -> None:
    """Against one graph of the whole batch, with the same random numbers: they are drawn once."""
    torch.manual_seed(0)
    model, x = build().double(), torch.randn(6, 3, 4, dtype=torch.float64)
    parameters = list(model.parameters())

    def drawn(m, rows):
        torch.manual_seed(3)
        return losses(m, rows)

    whole = drawn(model, (x,)).view(3, 2).mean(1)
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in whole]
    norms = torch.stack([torch.cat([g.flatten() for g in each]).norm() for each in grads])
    clipper = GhostClipper(model, max_grad_norm=norms.median().item(), augmult=2, performance=Performance(form=form))
    with clipper:
        result = clipper.backward(drawn(model, (x,)))
    torch.testing.assert_close(result.norms, norms, rtol=1e-9, atol=0)
    factors = (norms.median() / norms).clamp(max=1)
    for p, of_examples in zip(parameters, zip(*grads, strict=True), strict=True):
        expected = sum(w * g for w, g in zip(factors, of_examples, strict=True))
        torch.testing.assert_close(p.grad, expected)


# What one record can do


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [c for c in EVERY if not c.slow_rule and c not in OF_LABELS], ids=lambda c: c.name)
def test_one_broken_example_spoils_nobody_else(case: Case, value: float) -> None:
    """Padding with broken numbers adds nothing, and what is not finite is like padding."""
    model, inputs = case.build(rows=4)
    padding = torch.tensor([True, False])

    def clipped(x, mask=None):
        clipper = GhostClipper(model, max_grad_norm=0.1, augmult=2)
        clipper.zero_grad()
        with clipper:
            factors = clipper.backward(losses(model, x), example_mask=mask).clip_factors
        return factors, {name: p.grad.clone() for name, p in clipper.parameters.items()}

    _, alone = clipped(inputs, padding)
    broken = tuple(x.clone() for x in inputs)
    broken[0][3].flatten()[0] = value
    for mask in (padding, None):
        factors, sums = clipped(broken, mask)
        for name, total in sums.items():
            if factors[1] == 0:  # torch.where and 1 / x may leave the gradient finite
                torch.testing.assert_close(total, alone[name])
            assert total.isfinite().all()


@pytest.mark.parametrize(
    "case",
    [c for c in [*ATTENTION, *PRODUCTS] if len(list(c.build(1)[0].parameters())) > 1],
    ids=lambda case: case.name,
)
@pytest.mark.filterwarnings("ignore:dpfast has no rule")
def test_frozen_operands(case: Case) -> None:
    """Every other parameter is frozen."""
    model, inputs = case.build(rows=6)
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    check(model, inputs, augmult=2, forms=["auto"])


@pytest.mark.parametrize("form", ["gram", "auto"])
def test_a_gram_of_a_scaled_weight_never_understates(form) -> None:
    """Its bound is scaled with it. Positions that nearly cancel; the clip norm is far below."""
    torch.manual_seed(0)
    model = Raw(lambda m, x: F.linear(x, (m.w * 0.01).t()), w=(64, 64))
    sign = torch.tensor([1.0, -1.0]).repeat(8).view(1, 16, 1)
    x = torch.randn(4, 1, 64).expand(4, 16, 64) + 1e-5 * torch.randn(4, 16, 64)

    def cancelling(rows):
        return (model(rows) * sign).flatten(1).sum(1) * 1e4

    grads = [torch.autograd.grad(loss, model.w, retain_graph=True)[0] for loss in cancelling(x)]
    exact = torch.stack([g.double().norm() for g in grads])
    clipper = GhostClipper(model, max_grad_norm=1e-3, performance=Performance(form=form))
    with clipper:
        result = clipper.backward(cancelling(x))
    assert (result.norms >= exact * (1 - 1e-3)).all()
    assert model.w.grad.norm() <= 4e-3 * (1 + 1e-3)


def test_composed_calls_are_probed_once() -> None:
    """To the path of a step an attention is one call, in the probe as in the step."""
    clipper = GhostClipper(Attention(), max_grad_norm=1.0)
    with clipper:
        clipper.backward(losses(clipper.model, (torch.randn(4, 3, 4),)))
    assert len(clipper._calls._shown) == 1


def half_like(m, x):
    """Activations in bfloat16, as modules of mixed precision have them, unless everything is float64."""
    h = x if x.dtype == torch.float64 else x.bfloat16()
    h = F.conv1d(h.mT, m.w.to(h.dtype)[:, :, None], m.b.to(h.dtype)).mT
    return F.linear(h.sin(), m.v.type_as(h) * 0.5).to(x.dtype)


@pytest.mark.parametrize("form", ["auto", "gram", "direct", "materialise"])
def test_weights_cast_to_bfloat16(form: str) -> None:
    torch.manual_seed(0)
    model, rows = Raw(half_like, w=(6, 4), b=(6,), v=(5, 6)), (torch.randn(6, 7, 4),)
    settings = {"augmult": 2, "max_grad_norm": 0.1}
    exact = per_example(model, losses, rows, **settings)
    plain = per_example(model, losses, rows, **settings, dtype=torch.float32)
    got = clip(model, rows, **settings, form=form)
    assert_as_good_as_torch(got, plain, exact, dtype=torch.bfloat16)
    for name, total in got.sums.items():  # the sums themselves are not rounded to the type of the activations
        assert not torch.equal(total.bfloat16().float(), total), name


def test_a_scaled_weight_may_change_its_scale() -> None:
    """A chain is of one step: nothing of it is remembered."""
    model, x = Raw(lambda m, x: F.linear(x, m.w * m.gain), w=(3, 4)), (torch.randn(4, 4),)
    clipper = GhostClipper(model, max_grad_norm=1e9)
    for gain in (1.0, -2.0, 1):
        model.gain = gain
        clipper.zero_grad()
        with clipper:
            clipper.backward(losses(model, x))
        (expected,) = torch.autograd.grad(losses(model, x).sum(), [model.w])
        torch.testing.assert_close(model.w.grad, expected)


def test_a_step_in_the_block_keeps_the_form(monkeypatch) -> None:
    """An optimizer's step between two passes of one block changes numbers, not what a parameter is."""
    monkeypatch.setattr(LinearTerm, "stored", None)
    model = nn.Linear(4, 3)
    clipper = GhostClipper(model, max_grad_norm=1.0, performance=Performance(form="gram"))
    with clipper:
        for _ in range(2):
            clipper.backward(losses(model, (torch.randn(6, 4),)))
            with torch.no_grad():
                model.weight -= 0.1 * model.weight.grad
            clipper.zero_grad()


class Modulated(nn.Module):
    """A group norm, or an instance norm, whose scale or shift comes from the input."""

    def __init__(self, norm, *, scale: bool) -> None:
        super().__init__()
        self.conv, self.made, self.norm, self.scale = nn.Conv2d(3, 4, 1), nn.Linear(3, 4), norm, scale
        self.own = nn.Parameter(torch.randn(4))

    def forward(self, x):
        made = self.made(x.mean((0, 2, 3)))
        scale, shift = (made, self.own) if self.scale else (self.own, made)
        return self.norm(self.conv(x), scale, shift).sin()


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize(
    "norm",
    [lambda h, w, b: F.group_norm(h, 2, w, b), lambda h, w, b: F.instance_norm(h, weight=w, bias=b)],
    ids=["group", "instance"],
)
def test_norms_whose_affine_comes_from_data(norm, scale) -> None:
    """Of one example: no rows can meet."""
    torch.manual_seed(0)
    with fallbacks():  # the layer that makes it has one row for all
        check(Modulated(norm, scale=scale), (torch.randn(4, 3, 5, 5),), augmult=4)


def test_a_scale_that_changes_after_its_norm_is_an_error() -> None:
    """As it is for autograd."""

    def changed(m, x):
        scale = torch.full((4,), 2.0)
        h = F.group_norm(F.conv2d(x, m.w), 2, scale, m.b)
        scale.zero_()
        return h

    clipper = GhostClipper(Raw(changed, w=(4, 3, 1, 1), b=(4,)), max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), clipper:
        clipper.backward(losses(clipper.model, (torch.randn(2, 3, 5, 5),)))


class Twice(nn.Module):
    """Two calls of one function, of one input; ``saved``: what their results saved of it."""

    def __init__(self, call, shape) -> None:
        super().__init__()
        self.call, self.q, self.k = call, nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))

    def forward(self, x):
        x = 2.0 * x
        results = self.call(x, self.q), self.call(x, self.k)
        if torch.is_grad_enabled():
            saved = [t for result in results for t in result.grad_fn.saved_tensors if t.shape == x.shape]
            self.saved = {(t.dtype, t.data_ptr()) for t in saved}
        return sum(results)


@pytest.mark.parametrize(
    ("call", "shape"),
    [
        (F.conv2d, (3, 6, 3, 3)),
        (F.linear, (3, 6)),
        (lambda x, w: torch.einsum("nthd,pd->nthp", x, w), (3, 6)),
    ],
    ids=["conv2d", "linear", "einsum"],
)
def test_under_autocast_the_tape_keeps_what_the_call_multiplied(call, shape) -> None:
    """One copy in the dtype of the call, for autograd and the tape, and for all calls in a row that take it."""
    model, x = Twice(call, shape), torch.randn(4, 6, 6, 6)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with clipper:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        kept = model.saved
        clipper.backward(out.float().square().flatten(1).sum(1))
    assert len(kept) == 1
    assert {dtype for dtype, _ in kept} == {torch.bfloat16}


UNDER_AUTOCAST = ("conv2d", "conv2d-1x1", "conv-transpose2d", "linear-3d", "embedding", "group-norm", "raw-attention")
LOWERED = [case for case in (*LAYERS, *CONVOLUTIONS, *PATTERNS) if case.name in UNDER_AUTOCAST]


@pytest.mark.parametrize("form", ["auto", "gram", "direct", "materialise"])
@pytest.mark.parametrize("case", LOWERED, ids=lambda case: case.name)
def test_what_is_called_under_autocast_clips_alike(case: Case, form: str) -> None:
    """A backward pass inside of the block that lowers the forward pass is none of what is lowered."""
    model, inputs = case.build(4)
    found = []
    for inside in (False, True):
        clipper = GhostClipper(model, max_grad_norm=0.1, performance=Performance(form=form))
        with clipper:
            with torch.autocast("cpu", torch.bfloat16):
                of_rows = losses(model, inputs)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                clipped = clipper.backward(of_rows)
        found.append([clipped.norms, *(p.grad.clone() for p in clipper.parameters.values())])
        clipper.zero_grad()
    for outside, inside in zip(*found, strict=True):
        torch.testing.assert_close(inside, outside, rtol=0, atol=0)
