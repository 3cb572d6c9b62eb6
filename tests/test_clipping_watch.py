"""What a private step leaves as it was: buffers, parameters, gradients, however somebody tries to change them."""

import copy
import dataclasses
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import Raw, losses
from dpfast import DPOptimizer, GhostClipper, Performance, Plan
from dpfast.clipping.watch import changed, seen
from dpfast.errors import CaptureError, PrivacyError
from oracle import per_example

PLAN = Plan(dataset_size=50, expected_batch_size=20, max_grad_norm=1.0, steps=9, target_delta=1e-3, noise_multiplier=1)


class Keeps(nn.Module):
    """Writes into one of its tensors in the forward pass."""

    def __init__(self, write=lambda m, x: None):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.write = write

    def forward(self, x):
        self.write(self, x)
        return self.linear(x)


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


WRITES = {
    "in place": lambda m, x: m.mean.add_(x.mean(0)),
    "+=": lambda m, x: m.mean.__iadd__(x.mean(0)),
    "indexed": lambda m, x: m.mean.__setitem__(0, x[0, 0]),
    ".data": lambda m, x: m.mean.data.mul_(0.9).add_(x.mean(0)),
    "detached": lambda m, x: m.mean.detach().copy_(x.mean(0)),
    "a view": lambda m, x: m.mean.view(2, 2)[0].copy_(x[0, :2]),
    "out=": lambda m, x: torch.mean(x, 0, out=m.mean),
    "foreach": lambda m, x: torch._foreach_add_([m.mean], [x.mean(0)]),
    "a frozen parameter": lambda m, x: m.frozen.copy_(x.mean(0)),
    "a parameter": lambda m, x: m.linear.bias.data.add_(x.mean(0)),
    "assigned data": lambda m, x: setattr(m.linear.bias, "data", x.mean(0)),
}


def step_that_writes(model, write, where) -> None:
    """One private step in which ``write(model, data)`` runs somewhere."""
    x = torch.randn(6, 4)
    with GhostClipper(model, max_grad_norm=1.0) as clipper:
        if where == "before the model":
            write(model, x)
        model.write = write if where == "in the model" else model.write
        clipper.backward(losses(model, (x,)))
        if where == "after backward":
            write(model, x)


WHERE = ["before the model", "in the model", "after backward"]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("how", WRITES)
def test_data_written_into_the_model_is_refused_before_it_is_written(how, where) -> None:
    model = Keeps()
    before = state(model)
    with pytest.raises(CaptureError, match="writes into it during a private step"):
        step_that_writes(model, torch.no_grad()(WRITES[how]), where)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name


@pytest.mark.parametrize("where", WHERE)
def test_buffers_changed_through_numpy(where) -> None:
    with pytest.raises(CaptureError, match="mean: changed during a private step"):
        step_that_writes(Keeps(), lambda m, x: m.mean.numpy().__setitem__(0, x[0, 0].item()), where)


def test_a_workspace_that_is_no_buffer_may_be_written() -> None:
    space = torch.zeros(6, 4)

    def forward(m, x):
        space.copy_(x.detach())
        return F.linear(x, m.weight)

    clipper = GhostClipper(Raw(forward, weight=(4, 4)), max_grad_norm=1.0)
    clipper._calls.show = lambda rows: ""  # the workspace has the size of this batch, not of the probe's
    with clipper:
        clipper.backward(losses(clipper.model, (torch.randn(6, 4),)))


CHANGES = {
    "in place": lambda g: g.mul_(1000),
    ".data": lambda g: g.data.mul_(1000),
    "numpy": lambda g: g.numpy().__imul__(1000),
}


@pytest.mark.parametrize("how", [*CHANGES, "replaced", "clip_grad_norm_", "GradScaler"])
def test_a_changed_sum_is_refused(how) -> None:
    model = nn.Linear(4, 3)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), PLAN, clipper)
    with clipper:
        clipper.backward(losses(model, (torch.randn(6, 4),)))
    before = state(model)
    if how == "clip_grad_norm_":
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    elif how == "GradScaler":
        scaler = torch.amp.GradScaler("cpu", init_scale=1e-3)
        scaler.scale(torch.zeros(1))
        with pytest.raises(PrivacyError, match="is not what the clipper wrote"):
            scaler.step(optimizer)
    elif how == "replaced":
        model.weight.grad = model.weight.grad.clone()
    else:
        CHANGES[how](model.weight.grad)
    with pytest.raises(PrivacyError, match="is not what the clipper wrote"):
        optimizer.step()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_clip_norm_and_the_rows_of_an_example_are_fixed() -> None:
    clipper = GhostClipper(nn.Linear(4, 3), max_grad_norm=1.0, augmult=2)
    for name in ("max_grad_norm", "augmult"):
        with pytest.raises(AttributeError):
            setattr(clipper, name, 5)


def test_several_steps_in_one_block() -> None:
    """The optimizer's own update is no change behind the clipper's back."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    optimizer = DPOptimizer(torch.optim.Adam(model.parameters()), PLAN, clipper)
    x = torch.randn(6, 4)
    steps = []
    with clipper:
        for _ in range(3):
            steps.append((state(model), clipper.backward(losses(model, (x,))).norms))
            optimizer.step()
    for before, norms in steps:
        assert not torch.equal(model.weight, before["weight"])
        model.load_state_dict(before)
        oracle = per_example(model, losses, (x,), augmult=1, max_grad_norm=1.0)
        torch.testing.assert_close(norms, oracle.norms, rtol=1e-5, atol=0)


def test_rows_that_would_be_clipped_twice() -> None:
    """Two losses of the same rows are one sum, not two: said, since other examples may share the tensors."""
    clipper = GhostClipper(nn.Linear(4, 3), max_grad_norm=1.0)
    x = torch.randn(6, 4)
    with clipper:
        clipper.backward(losses(clipper.model, (x,)))
        with pytest.warns(UserWarning, match="add up all losses of a row"):
            clipper.backward(3 * losses(clipper.model, (x,)))
        clipper.backward(losses(clipper.model, (x.clone(),)))  # others, which happen to be alike
        x.normal_()
        clipper.backward(losses(clipper.model, (x,)))
    again = GhostClipper(clipper.model, max_grad_norm=1.0)
    with again:
        again.zero_grad()
        again.backward(losses(again.model, (x,)))
        for p in again.model.parameters():
            p.grad.zero_()
        again.backward(losses(again.model, (x,)))  # what was there is gone: another step


def test_freezing_between_the_passes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    clipper = GhostClipper(model, max_grad_norm=1.0)

    def freezing(m, rows):
        total = losses(m, rows)
        m[0].requires_grad_(False)
        return total

    with pytest.raises(CaptureError, match=r"0\.weight, 0\.bias: changed .*frozen or unfrozen"), clipper:
        clipper.backward(freezing(model, (torch.randn(6, 4),)))
    assert model[0].weight.grad is None


def test_freezing_between_two_steps_of_a_block() -> None:
    model, x = nn.Linear(4, 4), torch.randn(5, 4)
    clipper = GhostClipper(model, max_grad_norm=1.0)

    def twice():
        with clipper:
            clipper.backward(losses(model, (x,)))
            clipper.zero_grad()
            model.weight.requires_grad_(False)
            clipper.backward(losses(model, (x,)))

    with pytest.raises(CaptureError, match=r"weight: changed .* frozen or unfrozen inside the block"):
        twice()


def test_zero_grad_forgets_what_was_frozen_since() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with GhostClipper(model, max_grad_norm=1.0) as clipper:
        clipper.backward(losses(model, (torch.randn(6, 4),)))
    model[0].requires_grad_(False)
    clipper.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
def test_any_change_shows(dtype) -> None:
    t = torch.ones(3, 5).to(dtype).t()
    before = seen({"t": t, "other": torch.zeros(2)})
    assert not changed({"t": before["t"]}, seen({"t": t}))
    t[4, 2] = 0
    assert changed({"t": before["t"]}, seen({"t": t})) == ["t"]
    assert changed({}, seen({"t": t})) == ["t"]


def test_an_empty_tensor_is_seen_too() -> None:
    t = torch.zeros(0, 3)
    assert not changed(seen({"t": t}), seen({"t": t}))


def test_losses_of_an_earlier_forward_pass() -> None:
    """Two forward passes, then two backward passes: the second would add nothing."""
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with clipper:
        first, second = losses(model, (x,)), losses(model, (x + 1,))
        clipper.backward(first)
        with pytest.raises(CaptureError, match=r"a forward pass before the last clipper\.backward"):
            clipper.backward(second)
    with clipper, pytest.raises(CaptureError, match="no trainable parameter used since"):
        clipper.backward(losses(nn.Linear(4, 3), (x,)))


def test_parameters_used_before_the_model_is_called() -> None:
    """In the form "example", too."""
    torch.manual_seed(0)
    model = Raw(lambda m, x: F.linear(x, m.weight), weight=(4, 4), scale=(4,))

    def scaled(m, rows):
        return m(rows[0] * m.scale).square().mean(1)

    x = torch.randn(2, 4)
    exact = per_example(model, scaled, (x,), augmult=2, max_grad_norm=0.1)
    for form in ("auto", "example"):
        clipper = GhostClipper(model, max_grad_norm=0.1, augmult=2, performance=Performance(form=form))
        clipper.zero_grad()
        with clipper:
            clipper.backward(scaled(model, (x,)))
        for name, p in clipper.parameters.items():
            torch.testing.assert_close(p.grad.double(), exact.sums[name], rtol=1e-5, atol=1e-8)
        clipper.zero_grad()


@pytest.mark.filterwarnings("ignore:dpfast has no rule")
def test_complex_results() -> None:
    model = Raw(lambda m, x: torch.fft.ifft(torch.fft.fft(x) * torch.view_as_complex(m.weight)).real, weight=(4, 2))
    with (
        pytest.raises(CaptureError, match=r"weight: .*a complex result"),
        GhostClipper(model, max_grad_norm=1.0) as clipper,
    ):
        clipper.backward(losses(model, (torch.randn(6, 4),)))


IN_PLACE = {
    "data into a repeated parameter": lambda m, x: m.row.repeat(len(x), 1).sub_(F.linear(x, m.weight)),
    "data into a scaled weight": lambda m, x: F.linear(x, (m.weight * 2).add_(x.mean())),
    "a weight scaled between two uses": lambda m, x: F.linear(x, m.scaled) + F.linear(x, m.scaled.mul_(2)),
}


@pytest.mark.parametrize("how", IN_PLACE)
def test_derived_tensors_changed_in_place(how) -> None:
    def forward(m, x):
        m.scaled = m.weight * 2
        return IN_PLACE[how](m, x)

    with (
        pytest.raises(CaptureError, match="in place"),
        GhostClipper(Raw(forward, weight=(4, 4), row=(1, 4)), max_grad_norm=1.0) as clipper,
    ):
        clipper.backward(losses(clipper.model, (torch.randn(6, 4),)))


AS_ANOTHER = {
    "expand_as": lambda m, x: x + m.row.expand_as(x),
    "type_as": lambda m, x: x + m.row.type_as(x),
    "view_as": lambda m, x: x + m.row.view_as(x[0]),
    "to another": lambda m, x: x + m.row.to(x),
    "data to its type": lambda m, x: x.type_as(m.row) * m.row,
    "broadcast_tensors": lambda m, x: torch.mul(*torch.broadcast_tensors(x, m.row)),
    "rsub": lambda m, x: torch.rsub(m.row, x, alpha=3) + torch.rsub(x, m.row, alpha=2),
    "assembled in place": lambda m, x: x + m.row.new_zeros(2, 4).index_copy_(0, torch.tensor([1]), m.row[None])[1],
    "scaled in place before its use": lambda m, x: F.linear(x, (m.weight * 2).mul_(3)),
}


@pytest.mark.parametrize("how", AS_ANOTHER)
def test_shapes_and_types_taken_from_the_data(how) -> None:
    torch.manual_seed(0)
    model = Raw(AS_ANOTHER[how], row=(4,), weight=(4, 4))
    x = torch.randn(6, 4)
    exact = per_example(model, losses, (x,), augmult=2, max_grad_norm=0.1)
    clipper = GhostClipper(model, max_grad_norm=0.1, augmult=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no loss depends on")
        for _ in range(2):
            clipper.zero_grad()
            with clipper:
                result = clipper.backward(losses(model, (x,)))
    assert not x.requires_grad, "the batch is the user's"
    torch.testing.assert_close(result.norms, exact.norms, rtol=1e-5, atol=0)
    for name, p in clipper.parameters.items():
        torch.testing.assert_close(p.grad.double(), exact.sums[name], rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_are_named() -> None:
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=True))

    clipper = GhostClipper(First(), max_grad_norm=1.0)
    with pytest.warns(UserWarning, match=r"first\.weight ran under torch.no_grad.*use_reentrant=False"), clipper:
        clipper.backward(losses(clipper.model, (torch.randn(6, 4),)))


def test_lazy_layers() -> None:
    with pytest.raises(CaptureError, match="lazy layer"):
        GhostClipper(nn.LazyLinear(3), max_grad_norm=1.0)


def test_hooks_on_gradients() -> None:
    model = nn.Linear(4, 3)
    model.weight.register_hook(lambda g: g * 10)
    with pytest.raises(CaptureError, match="a hook on its gradient"):
        GhostClipper(model, max_grad_norm=1.0)


def test_the_fallback_is_named_once_at_the_line_that_calls() -> None:
    model = Raw(lambda m, x: (x.abs() + 0.5).pow(m.weight), weight=(4,))
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            clipper.zero_grad()
            with clipper:
                clipper.backward(losses(model, (torch.randn(6, 4),)))
    assert [str(w.message).split(":")[0] for w in said] == ["dpfast has no rule for pow with weight"]
    assert said[0].filename == __file__


def test_a_second_optimizer_is_no_second_budget() -> None:
    model = nn.Linear(4, 3)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    for epoch in range(3):
        optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), PLAN, clipper)
        assert optimizer.steps_taken == 3 * epoch
        for _ in range(3):
            optimizer.step()
    with pytest.raises(PrivacyError, match="planned steps are spent"):
        DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), PLAN, clipper).step()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_of_the_process(precision) -> None:
    """Where products of float32 may be rounded to TF32 or bfloat16, norms and sums are not."""
    torch.manual_seed(0)
    model = nn.Linear(256, 256, bias=False)
    a = torch.randint(1, 16, (1, 1, 256)).float()
    h = torch.randint(1, 16, (1, 1, 256)).float()
    x, cotangent = torch.cat([a, 2.99 * a], 1), torch.cat([3 * h, -h], 1)
    torch.set_float32_matmul_precision(precision)
    try:
        for form in ("gram", "direct", "materialise"):
            clipper = GhostClipper(model, max_grad_norm=1.0, performance=Performance(form=form))
            clipper.zero_grad()
            with clipper:
                clipper.backward((model(x) * cotangent).sum((1, 2)))
            assert model.weight.grad.double().norm() <= 1 + 1e-5
            clipper.zero_grad()
    finally:
        torch.set_float32_matmul_precision("highest")


class Observing(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.out = layer, nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.layer(x).flatten(1)[:, :4])


def frozen(layer):
    return layer.requires_grad_(False)


OBSERVERS = {
    "instance norm": (nn.InstanceNorm2d(2, track_running_stats=True), torch.randn(6, 2, 3, 3)),
    "embedding": (nn.Embedding(9, 4, max_norm=0.1), torch.randint(0, 9, (6, 2))),
    "frozen embedding": (frozen(nn.Embedding(9, 4, max_norm=0.1)), torch.randint(0, 9, (6, 2))),
    "bag": (nn.EmbeddingBag(9, 4, max_norm=0.1), torch.randint(0, 9, (6, 2))),
    "frozen bag": (frozen(nn.EmbeddingBag(9, 4, max_norm=0.1)), torch.randint(0, 9, (6, 2))),
    "fake quantisation": (torch.ao.quantization.FusedMovingAvgObsFakeQuantize(), torch.randn(6, 4)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min")
@pytest.mark.parametrize("what", OBSERVERS)
def test_layers_that_write_what_they_see(what) -> None:
    layer, x = OBSERVERS[what]
    model = Observing(copy.deepcopy(layer))
    before = state(model)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(CaptureError, match=r"statistics of private|max_norm rewrites|range of private"), clipper:
        clipper.backward(losses(model, (x,)))
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_a_buffer_changed_behind_the_capture_is_put_back() -> None:
    model = Keeps(lambda m, x: m.mean.numpy().__setitem__(0, x[0, 0].item()))
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(CaptureError, match="mean: changed"), clipper:
        clipper.backward(losses(model, (torch.randn(6, 4),)))
    assert not model.mean.any()


IN_BACKWARD = {
    "a buffer": lambda m, g: m.mean.fill_(g.norm().item()),
    "a frozen parameter": lambda m, g: m.frozen.data.fill_(g.norm().item()),
    "a parameter": lambda m, g: m.linear.bias.data.fill_(g.norm().item()),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("where", IN_BACKWARD)
def test_what_a_hook_writes_during_the_backward_pass_is_refused(where) -> None:
    model = Keeps()

    def hook(_, grads) -> None:
        IN_BACKWARD[where](model, grads[0])

    model.linear.register_full_backward_pre_hook(hook)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(CaptureError, match="changed"), clipper:
        clipper.backward(losses(model, (torch.randn(6, 4),)))
    assert all(p.grad is None for p in model.parameters())
    assert not model.mean.any()


def test_an_interrupted_step_leaves_no_data_in_a_buffer() -> None:
    """The cache is computed once, from the batch; then the user's own code fails."""

    def remember(m, x):
        if not m.mean.any():
            m.mean = x.mean(0).detach()

    model = Keeps(remember)
    before = model.mean
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(CaptureError, match="losses have 0 dimensions"), clipper:
        clipper.backward(losses(model, (torch.randn(6, 4),)).mean())
    assert model.mean is before
    assert not model.mean.any()


class Grows(nn.Module):
    """A cache that is computed when it is first needed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.zeros(0, 4), persistent=False)

    def forward(self, x):
        if len(self.table) < x.shape[1]:
            self.table = torch.arange(4.0 * x.shape[1]).view(-1, 4).sin()
        return self.layer(x + self.table[: x.shape[1]])


class Counting(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.layer, self.number = nn.Linear(4, 4), number
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += self.number(x)
        return self.layer(x)


COUNTED = {
    "steps": lambda x: 1,  # of the physical batches of a sample, which tell its size
    "rows": lambda x: x.shape[0],
    "rows as a tensor": lambda x: torch.tensor(x.shape[0]),
    "outliers": lambda x: x[x > 1].shape[0],
}


@pytest.mark.parametrize("what", COUNTED)
def test_counters_are_refused(what) -> None:
    clipper = GhostClipper(Counting(COUNTED[what]), max_grad_norm=1.0)
    with pytest.raises(CaptureError, match="count: changed during a private step"), clipper:
        clipper.backward(losses(clipper.model, (torch.randn(6, 4),)))
    assert clipper.model.count == 0


HARMLESS = {
    "a cache that grows": (Grows, lambda n: torch.randn(6, n, 4)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), lambda n: torch.randn(6, 4)),
    "a sparse buffer": (lambda: _with_buffer(torch.eye(3).to_sparse()), lambda n: torch.randn(6, 4)),
}


def _with_buffer(value):
    model = nn.Linear(4, 4)
    model.register_buffer("constant", value)
    return model


@pytest.mark.filterwarnings("ignore:it was not shown", "ignore:Sparse")
@pytest.mark.parametrize("what", HARMLESS)
def test_buffers_that_change_without_data(what) -> None:
    torch.manual_seed(0)
    make, inputs = HARMLESS[what]
    model = make()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with clipper:
        for n in (3, 5, 5):
            clipper.backward(losses(model, (inputs(n),)))
            clipper.zero_grad()


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x.abs().add(1) ** m.p,
        lambda m, x: torch.hypot(x, m.p),
        lambda m, x: torch.cdist(x, m.rows),
        lambda m, x: m.p**x,
    ],
    ids=["power", "hypot", "cdist", "base"],
)
@pytest.mark.filterwarnings("ignore:dpfast has no rule", "ignore:no loss depends on")
def test_functions_that_save_their_result(forward) -> None:
    torch.manual_seed(0)
    model = Raw(forward, p=(4,), rows=(5, 4))
    model.p.data.abs_().add_(0.5)
    x = torch.randn(6, 4)
    exact = per_example(model, losses, (x,), augmult=2, max_grad_norm=0.1)
    with GhostClipper(model, max_grad_norm=0.1, augmult=2) as clipper:
        got = clipper.backward(losses(model, (x,))).norms
    torch.testing.assert_close(got, exact.norms, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:dpfast has no rule")
def test_the_fallback_under_autocast() -> None:
    torch.manual_seed(0)
    model = Raw(lambda m, x: torch.einsum("nd,pd->np", F.linear(x, m.first), m.second), first=(4, 4), second=(3, 4))

    def cast(m, rows):
        with torch.autocast("cpu", torch.bfloat16):
            return m(*rows).float().square().mean(1)

    x = torch.randn(6, 4)
    exact = per_example(model, cast, (x,), augmult=2, max_grad_norm=0.1)
    with GhostClipper(model, max_grad_norm=0.1, augmult=2) as clipper:
        got = clipper.backward(cast(model, (x,))).norms
    torch.testing.assert_close(got, exact.norms, rtol=2e-2, atol=0)


@pytest.mark.filterwarnings("ignore:dpfast has no rule")
def test_the_fallback_leaves_no_activations_behind() -> None:
    model = Raw(lambda m, x: torch.einsum("nd,pd->np", F.linear(x, m.first), m.second), first=(4, 4), second=(3, 4))
    clipper = GhostClipper(model, max_grad_norm=1.0)

    def alive() -> int:
        clipper.zero_grad()
        with clipper:
            for _ in range(2):
                clipper.backward(losses(model, (torch.randn(6, 4),)))
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    alive()
    first = alive()
    assert [alive() for _ in range(3)] == [first] * 3


def test_two_optimizers_made_at_once_have_one_budget() -> None:
    model = nn.Linear(4, 3)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    both = [DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), PLAN, clipper) for _ in range(2)]
    both[0].step()
    both[1].step()
    assert [optimizer.steps_taken for optimizer in both] == [2, 2]
    other = dataclasses.replace(PLAN, steps=3)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    old = DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), PLAN, clipper)
    DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), other, clipper).step()
    with pytest.raises(PrivacyError, match="another DPOptimizer of this clipper"):
        old.step()


def test_gradients_set_to_zero_are_no_foreign_ones() -> None:
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    for _ in range(2):
        with clipper:
            clipper.backward(losses(model, (x,)))
        first = model.weight.grad.clone()
        model.zero_grad(set_to_none=False)
    assert first.norm() <= 6
    assert not clipper.foreign_gradients()


def test_the_fallback_adds_up_in_float32() -> None:
    """The rounding of a sum would be of the size of its sensitivity."""
    model = Raw(lambda m, x: torch.hypot(x.bfloat16(), m.p.bfloat16()), p=(4,))
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.warns(UserWarning, match="no rule for hypot"), clipper:
        clipper.backward(losses(model, (torch.randn(6, 4),)))
    assert not torch.equal(model.p.grad, model.p.grad.bfloat16().float())


@pytest.mark.parametrize(
    "write",
    [
        lambda m, x: m.mean.fill_(x.abs().max().item()),
        lambda m, x: m.mean.mul_(0.9).add_(0.1 * float(x.max())),
        lambda m, x: setattr(m, "mean", torch.full((4,), x.max().item())),
    ],
    ids=["item", "float", "another tensor"],
)
def test_numbers_read_out_of_the_data(write) -> None:
    model = Keeps(lambda m, x: write(m, x.detach()))
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(CaptureError, match="mean: changed"), clipper:
        clipper.backward(losses(model, (torch.randn(6, 4),)))


def test_another_order_shows() -> None:
    t = torch.arange(5.0)
    before = seen({"t": t})
    t.numpy()[:] = t.numpy()[::-1].copy()
    assert changed(before, seen({"t": t})) == ["t"]


class Replaces(Counting):
    def forward(self, x):
        self.count = self.number(self)
        return self.layer(x)


@pytest.mark.parametrize(
    "number",
    [
        lambda m: m.count + 1,
        lambda m: (m.count + 6) % 9999,
        lambda m: torch.tensor(6.0),
        lambda m: torch.full_like(m.count, 6),
        lambda m: torch.ones(6).sum(),
    ],
    ids=["added", "and more", "a number", "filled", "a size"],
)
def test_counters_in_new_tensors_are_refused(number) -> None:
    clipper = GhostClipper(Replaces(number), max_grad_norm=1.0)
    with pytest.raises(CaptureError, match="count: changed during a private step"), clipper:
        clipper.backward(losses(clipper.model, (torch.randn(6, 4),)))


@pytest.mark.parametrize(
    "make", [lambda m: m.count.cos(), lambda m: torch.arange(3.0).cos()], ids=["of itself", "anew"]
)
def test_buffers_that_each_pass_replaces(make) -> None:
    model = Replaces(make)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="it was not shown")
        for _ in range(3):
            with clipper:
                clipper.backward(losses(model, (torch.randn(6, 4),)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min")
def test_observers_switched_off() -> None:
    observer = torch.ao.quantization.FusedMovingAvgObsFakeQuantize()
    observer(torch.randn(6, 4))
    observer.disable_observer()
    clipper = GhostClipper(Observing(observer), max_grad_norm=1.0)
    with clipper:
        clipper.backward(losses(clipper.model, (torch.randn(6, 4),)))
