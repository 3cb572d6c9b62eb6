"""What hides from a probe: weights that are zero, rows in other places, decisions on data, backward passes inside."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpfast import DPOptimizer, GhostClipper, Plan
from dpfast.errors import CaptureError
from oracle import Clipped, assert_as_good_as_torch, per_example

ROWS = 12


class Two(nn.Module):
    """Two layers; ``between(model, hidden)`` is what mixes."""

    def __init__(self, between=lambda m, h: h, last: float = 1.0, gate: float = 1.0):
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(6, 8), nn.Linear(8, 6), nn.Parameter(torch.full((8,), float(gate)))
        self.between = between
        for p in self.b.parameters():
            p.data.mul_(last)

    def forward(self, x):
        return self.b(self.between(self, self.a(x).tanh()))


def standardised(h, dim=0):
    return (h - h.mean(dim, keepdim=True)) / (h.std(dim, keepdim=True) + 1e-5)


def step(clipper, *inputs, call=None):
    call = call or clipper.model
    with clipper:
        clipper.backward(call(*inputs).square().flatten(1).mean(1))


MIXTURES = {
    "zero output layer, as ADM, DiT and ControlNet have": lambda: Two(
        lambda m, h: standardised(h).detach() + h, last=0
    ),
    "output layer of 1e-5, as EDM has": lambda: Two(lambda m, h: standardised(h), last=1e-5),
    "zero gate": lambda: Two(lambda m, h: h + m.gate * (h - h.mean(0)), gate=0),
}


@pytest.mark.filterwarnings("ignore:no loss depends on gate")
@pytest.mark.parametrize("what", MIXTURES)
def test_weights_that_are_zero_hide_no_mixture(what) -> None:
    model = MIXTURES[what]()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(CaptureError, match="changing one example's input changes"):
        step(GhostClipper(model, max_grad_norm=1.0), torch.randn(ROWS, 6))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.filterwarnings("ignore:no loss depends on")
def test_weights_that_are_zero_are_left_as_they_are() -> None:
    model = Two(last=0, gate=0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    inputs = (torch.randn(ROWS, 6),)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    step(clipper, *inputs)  # and the graph is none the worse for the probe
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.filterwarnings("ignore:no loss depends on gate")
def test_probes_are_repeated_after_updates() -> None:
    """A frozen switch stands for whatever begins to mix later."""
    model = Two(lambda m, h: h + torch.where(m.switch > 0, h - h.mean(0), 0))
    model.register_buffer("switch", torch.zeros(()))
    plan = Plan(dataset_size=100, expected_batch_size=12, max_grad_norm=1, steps=9, target_delta=1e-3, target_epsilon=9)
    clipper = GhostClipper(model, max_grad_norm=1)
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), plan, clipper)

    def steps(count):
        for _ in range(count):
            step(clipper, torch.randn(ROWS, 6))
            optimizer.step()

    steps(3)
    model.switch.fill_(1)
    with pytest.raises(CaptureError, match="cannot be clipped per example"):
        steps(2)  # after the fourth update a probe is due


class Conditioned(nn.Module):
    """``condition`` is standardised along its rows, then added."""

    def __init__(self, dim=0, make=lambda c: c):
        super().__init__()
        self.a, self.c, self.b = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 6)
        self.dim, self.make = dim, make

    def forward(self, x, condition):
        return self.b((self.a(x) + self.make(self.c(standardised(condition, self.dim)))).tanh())


class SequenceFirst(Two):
    def forward(self, x, t):
        return self.b(self.a(standardised(x, 1)).tanh()).mean(0) + t.view(-1, 1)


CONDITIONS = {
    "one for each example": (lambda: Conditioned(make=lambda c: c.repeat_interleave(2, 0)), torch.randn(ROWS // 2, 4)),
    "sequence first": (lambda: Conditioned(1, lambda c: c.mean(0)), torch.randn(5, ROWS, 4)),
}


@pytest.mark.parametrize("what", CONDITIONS)
def test_each_input_has_its_own_dimension_of_rows(what) -> None:
    make, condition = CONDITIONS[what]
    with pytest.raises(CaptureError, match="changing one example's input changes"):
        step(GhostClipper(make(), max_grad_norm=1.0, augmult=2), torch.randn(ROWS, 6), condition)


@pytest.mark.filterwarnings("ignore:no loss depends on gate")
def test_sequence_first_beside_rows_first() -> None:
    with pytest.raises(CaptureError, match="changing one example's input changes"):
        step(GhostClipper(SequenceFirst(), max_grad_norm=1.0), torch.randn(5, ROWS, 6), torch.rand(ROWS))


def test_inputs_in_a_namespace() -> None:
    model = Conditioned()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    model.forward = lambda x, also: Conditioned.forward(model, x, also.condition)
    with pytest.raises(CaptureError, match="changing one example's input changes"):
        step(clipper, torch.randn(ROWS, 6), SimpleNamespace(condition=torch.randn(ROWS, 4)))


@pytest.mark.filterwarnings("ignore:no loss depends on gate")
def test_inputs_that_the_probe_cannot_vary_are_said() -> None:
    class Opaque:
        def __init__(self):
            self.condition = torch.randn(ROWS, 8)

    class Takes(Two):
        def forward(self, x, other):
            return self.b(self.a(x).tanh() + standardised(other.condition))

    class Left(Two):
        def forward(self, x):
            return self.b(self.a(x).tanh() + standardised(self.condition))

    with pytest.warns(UserWarning, match=r"it reads Opaque"):
        step(GhostClipper(Takes(), max_grad_norm=1.0), torch.randn(ROWS, 6), Opaque())
    model = Left()
    model.condition = torch.randn(ROWS, 8)
    with pytest.warns(UserWarning, match=r"it reads Left\.condition"):
        step(GhostClipper(model, max_grad_norm=1.0), torch.randn(ROWS, 6))


@pytest.mark.filterwarnings("ignore:no loss depends on gate")
@pytest.mark.parametrize("other", [torch.randn(3 * ROWS, 8), torch.randn(2, 5, ROWS, 8), [1, 2] * (ROWS // 2)])
def test_inputs_whose_rows_the_probe_does_not_find_are_said(other) -> None:
    class Takes(Two):
        def forward(self, x, other):
            return self.b(self.a(x).tanh() + torch.as_tensor(other).float().mean())

    with pytest.warns(UserWarning, match=r"it reads a (tensor|list of)"):
        step(GhostClipper(Takes(), max_grad_norm=1.0), torch.randn(ROWS, 6), other)


DECISIONS = {
    "__bool__": lambda h: h / 255 if h.max() > 1 else h,
    "__contains__": lambda h: h / 255 if 0.5 in h else h,
    "equal": lambda h: h / 255 if torch.equal(h, h + 1) else h,
    "__getitem__": lambda h: h + h[:, : 4 + 0 * h.argmax()].sum(1, keepdim=True),
}


@pytest.mark.filterwarnings("ignore:no loss depends on gate")
@pytest.mark.parametrize("how", DECISIONS)
def test_decisions_on_data_are_said(how) -> None:
    with pytest.warns(UserWarning, match=rf"reads numbers out of the batch \(({how}|.*, {how})\)"):
        step(GhostClipper(Two(lambda m, h: DECISIONS[how](h)), max_grad_norm=1.0), torch.randn(ROWS, 6))


@pytest.mark.filterwarnings("ignore:no loss depends on gate", "ignore:it was not shown")
def test_selections_of_rows_are_shown_at_every_step() -> None:
    """Two experts by timestep: the same number of rows may belong to other examples."""

    class Experts(Two):
        def forward(self, x, t):
            low, high = (t < 500).nonzero()[:, 0], (t >= 500).nonzero()[:, 0]
            parts = torch.zeros_like(x).index_add(0, low, self.b(self.a(x[low]))), self.b(self.a(x[high]))
            return parts[0].index_add(0, high, parts[1])

    clipper = GhostClipper(Experts(), max_grad_norm=1.0, augmult=4)
    even, uneven = torch.tensor([1, 1, 999, 999] * 2), torch.tensor([1, 1, 1, 999, 1, 999, 999, 999])
    for _ in range(2):
        step(clipper, torch.randn(8, 6), even)
    with pytest.raises(CaptureError, match="data has picked its rows"):
        step(clipper, torch.randn(8, 6), uneven)


class Expert(nn.Module):
    """Tokens that a mask picks go through a layer of their own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, keep):
        return torch.zeros_like(x).masked_scatter(keep[..., None].expand_as(x), self.layer(x[keep]).tanh())


class Dropped(Expert):
    """The same by numbers of rows."""

    def forward(self, x, keep):
        rows = keep.nonzero()[:, 0]
        return torch.zeros_like(x).index_add(0, rows, self.layer(x[rows]).tanh())


class LookedUp(Expert):
    """Rows taken as an embedding takes them."""

    def forward(self, x, keep):
        rows = keep.nonzero()[:, 0]
        return torch.zeros_like(x).index_add(0, rows, self.layer(F.embedding(rows, x)).tanh())


class Dispatched(Expert):
    """All rows are put where data says, and back."""

    def forward(self, x, keep):
        place = torch.argsort(keep.long(), stable=True)
        return self.layer(torch.zeros_like(x).index_add(0, place, x)).tanh()[place]


class Repeated(Expert):
    def forward(self, x, counts):
        taken = self.layer(x.repeat_interleave(counts, 0)).tanh()
        owners = torch.arange(len(x)).repeat_interleave(counts)
        return torch.zeros_like(x).index_add(0, owners, taken)


class InParts(Expert):
    """What is selected goes through a call that returns several tensors."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(4, 4)

    def forward(self, x, keep):
        rows = keep.nonzero()[:, 0]
        _, state = self.cell(x[rows])
        return torch.zeros_like(x).index_add(0, rows, self.layer(state).tanh())


EVEN, ALL_OF_ONE = torch.zeros(4, 5, dtype=torch.bool), torch.zeros(4, 5, dtype=torch.bool)
EVEN[:, 2], ALL_OF_ONE[0, :4] = True, True


@pytest.mark.filterwarnings("ignore:it was not shown")
@pytest.mark.parametrize(
    ("model", "augmult", "shape", "first", "then"),
    [
        (Expert, 1, (4, 5, 4), EVEN, ALL_OF_ONE),
        (Dropped, 2, (4, 4), torch.tensor([1, 0, 1, 0]).bool(), torch.tensor([1, 1, 0, 0]).bool()),
        (InParts, 2, (4, 4), torch.tensor([1, 0, 1, 0]).bool(), torch.tensor([1, 1, 0, 0]).bool()),
        (LookedUp, 2, (4, 4), torch.tensor([1, 0, 1, 0]).bool(), torch.tensor([1, 1, 0, 0]).bool()),
        (Dispatched, 1, (4, 4), torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 0, 0])),
        (Repeated, 1, (2, 4), torch.tensor([2, 2]), torch.tensor([1, 3])),
    ],
)
def test_selections_that_could_be_one_of_each(model, augmult, shape, first, then) -> None:
    """As many tokens as rows, or as examples: another step's may all be of one example."""
    clipper = GhostClipper(model(), max_grad_norm=1.0, augmult=augmult)
    for _ in range(3):
        step(clipper, torch.randn(shape), first)
    with pytest.raises(CaptureError, match="data has picked its rows"):
        step(clipper, torch.randn(shape), then)


class Implicit(nn.Module):
    """A deep equilibrium layer: a hook differentiates inside the backward pass."""

    def __init__(self):
        super().__init__()
        self.f, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        z = torch.tanh(self.f(x))
        at = z.detach().requires_grad_()
        again = torch.tanh(self.f(at) + x)
        if z.requires_grad:
            z.register_hook(lambda g: g + torch.autograd.grad(again, at, g, retain_graph=True)[0])
        return self.out(z)


def test_a_backward_pass_inside_the_backward_pass_is_refused() -> None:
    clipper = GhostClipper(Implicit(), max_grad_norm=1.0)
    for _ in range(2):
        with pytest.raises(CaptureError, match="a backward pass inside the backward pass"):
            step(clipper, torch.randn(6, 4))


class Hides(torch.autograd.Function):
    """The identity; its backward differentiates another graph."""

    @staticmethod
    def forward(ctx, h, graph):
        ctx.graph = graph
        return h.clone()

    @staticmethod
    def backward(ctx, g):
        at, out = ctx.graph
        return torch.autograd.grad(out, at, g, retain_graph=True)[0], None


def test_a_graph_hidden_behind_views_is_refused() -> None:
    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.inner, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = self.a(x)
            at = h.detach().requires_grad_()
            out = self.inner(at.transpose(0, 1)).tanh().transpose(0, 1)
            return self.b(Hides.apply(h, (at, out)))

    with pytest.raises(CaptureError, match=r"inner\.weight.*a backward pass inside"):
        step(GhostClipper(Hiding(), max_grad_norm=1.0), torch.randn(4, 4, 4))


EINSUMS = {
    "table": ("tnd,pd->ntp", {"w": (5, 4)}, (0, 1)),
    "two tables": ("ntd,td,d->nd", {"pos": (6, 4), "scale": (4,)}, (1, 0)),
}


@pytest.mark.filterwarnings("ignore:dpfast has no rule")
@pytest.mark.parametrize("zero", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("what", EINSUMS)
def test_rows_of_a_fallback_are_found_with_zero_parameters(what, zero) -> None:
    """As many positions as rows, parameters of zero: every way to cut the arguments gives the same output."""
    formula, shapes, _ = EINSUMS[what]

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            for i, (name, shape) in enumerate(shapes.items()):
                self.register_parameter(name, nn.Parameter((zero if i == len(shapes) - 1 else 1) * torch.randn(shape)))

        def forward(self, x):
            h = self.first(x)
            h = h.transpose(0, 1) if formula.startswith("t") else h
            return torch.einsum(formula, h, *(getattr(self, name) for name in shapes)).flatten(1)

    def losses(m, rows):
        return (m(*rows) + 1).square().mean(1)

    torch.manual_seed(0)
    model, inputs = Product(), (torch.randn(6, 6, 4),)
    settings = {"augmult": 1, "max_grad_norm": 0.5}
    exact = per_example(model, losses, inputs, **settings)
    plain = per_example(model, losses, inputs, **settings, dtype=torch.float32)
    clipper = GhostClipper(model, **settings)
    with clipper:
        norms = clipper.backward(losses(model, inputs)).norms
    sums = {name: p.grad for name, p in clipper.parameters.items()}
    assert_as_good_as_torch(Clipped(norms, sums), plain, exact)


def test_losses_averaged_over_augmentations_beside_an_input_for_each_example() -> None:
    model = Conditioned(make=lambda c: c.repeat_interleave(2, 0))
    model.forward = lambda x, c: model.b((model.a(x) + model.c(c).repeat_interleave(2, 0)).tanh())
    clipper = GhostClipper(model, max_grad_norm=1.0, augmult=2)
    with pytest.raises(CaptureError, match="fewer losses than rows"), clipper:
        clipper.backward(model(torch.randn(ROWS, 6), torch.randn(ROWS // 2, 4)).square().mean(1).view(-1, 2).mean(1))


def test_probes_leave_attributes_as_they_are() -> None:
    """A count, a running mean for the monitor: of the batches, not of what probes are made of."""

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls, self.mean = nn.Linear(4, 3), 0, torch.zeros(3)

        def forward(self, x):
            self.calls += 1
            h = self.linear(x)
            with torch.no_grad():
                self.mean = 0.5 * self.mean + h.mean(0)
            return h

    model, x, y = Watched(), torch.randn(6, 4), torch.randn(6, 4)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    for batch in (x, y):
        with clipper:
            clipper.backward(model(batch).square().mean(1))
    assert model.calls == 2
    torch.testing.assert_close(model.mean, 0.5 * model.linear(x).mean(0) + model.linear(y).mean(0))
