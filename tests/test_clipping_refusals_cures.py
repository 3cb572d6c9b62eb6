"""What a refusal tells the user to do: of those whose words no other test reads, and of a model full of one problem."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import Raw, losses
from checks import check
from dpfast import GhostClipper, Performance
from dpfast.clipping import plan_step
from dpfast.clipping.ownership import ENOUGH_STEPS
from dpfast.errors import CaptureError, ConfigError


def step(model, x, *, loss=losses, **settings) -> None:
    clipper = GhostClipper(model, **{"max_grad_norm": 1.0, **settings})
    with clipper:
        clipper.backward(loss(model, (x,)))


def refused(what: str, cure: str, run, *arguments, **settings) -> str:
    """The message, in which the cure follows what is wrong."""
    with pytest.raises(CaptureError) as caught:
        run(*arguments, **settings)
    assert re.search(rf"{what}[\s\S]*{cure}", str(caught.value)), caught.value
    return str(caught.value)


# Models


def complex_result(m, x):
    return torch.fft.ifft(torch.fft.fft(x) * torch.view_as_complex(m.p[:, :2].contiguous())).real


def attended(m, x):
    return F.scaled_dot_product_attention(x @ m.p, x, m.p.expand(6, 4, 4), dropout_p=0.5)


def written_into(m, x):
    h = x.clone()
    h.data = m.p[0].expand(6, 4)
    return h


def written_by_numpy(m, x):
    m.mask.numpy()[0] = x[0, 0].item()
    return F.linear(x, m.p)


def only_on_large_numbers(m, x):
    if x.min() < 2:
        raise ValueError("too small")
    return F.linear(x, m.p)


def in_sequence(m, x):
    return F.linear(x, m.p) + F.linear(x, m.p).flip(0)


X, PIXELS, WORDS = torch.full((6, 4), 3.0), torch.ones(6, 2, 3, 3), torch.zeros(6, 2, dtype=torch.long)
OF_FORWARD = {  # a forward function, its input, what is wrong, the cure
    "complex": (complex_result, X, "p: mul: a complex result", r"torch\.view_as_real"),
    "dropout": (attended, torch.ones(6, 4, 4), "p: scaled_dot.* draws random numbers", "move the dropout out"),
    "x.data = p": (
        written_into,
        X,
        r"p: \S+ writes a trainable parameter into another",
        r"\(x = p instead of x\.data = p",
    ),
    "numpy": (
        written_by_numpy,
        X,
        "mask: changed during",
        r"freeze it \(eval mode, no running statistics\), or update",
    ),
    "mixing": (
        lambda m, x: F.linear(x - x.mean(0), m.p),
        X,
        "one example's input changes",
        "statistics over the batch",
    ),
    "sequence first": (in_sequence, torch.ones(6, 6, 4), "input changes", "begin with a batch of another size than"),
    "infinities": (
        lambda m, x: F.linear(x + 0 * x.sum(), m.p),
        X,
        "not finite makes",
        r"replace .* \(torch\.nan_to_num",
    ),
    "own range": (
        only_on_large_numbers,
        X,
        "fails on synthetic .* too small",
        "Let it run on any numbers in its inputs'",
    ),
}


@pytest.mark.filterwarnings("ignore:dpfast has no rule")
@pytest.mark.parametrize("name", OF_FORWARD)
def test_cures_of_what_a_model_does(name) -> None:
    forward, x, what, cure = OF_FORWARD[name]
    model = Raw(forward, p=(4, 4))
    refused(what, cure, step, model, x)
    assert model.p.grad is None


OF_LAYER = {
    "instance norm": (
        nn.InstanceNorm2d(2, track_running_stats=True),
        PIXELS,
        "keeps statistics",
        r"=False, or keep .* eval",
    ),
    "embedding": (
        nn.Embedding(9, 4, max_norm=0.1),
        WORDS,
        "max_norm rewrites",
        "renormalise after the optimizer's step",
    ),
    "fake quantisation": (
        torch.ao.quantization.FusedMovingAvgObsFakeQuantize(),
        X,
        "range of private",
        "disable_observer",
    ),
}


class Before(nn.Module):
    """Something trainable after a layer."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.layer, self.scale = layer, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.layer(x) * self.scale


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min")
@pytest.mark.parametrize("name", OF_LAYER)
def test_cures_of_layers_that_keep_what_they_see(name) -> None:
    layer, x, what, cure = OF_LAYER[name]
    refused(what, cure, step, Before(layer), x)


def with_complex_parameter() -> nn.Module:
    model = nn.Linear(3, 3)
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    return model


OF_PARAMETERS = {
    "lazy": (
        lambda: nn.LazyLinear(3),
        "weight, bias: a lazy layer",
        "run the model once on public or random input first",
    ),
    "complex": (
        with_complex_parameter,
        "phase: complex parameters",
        r"keep real and imaginary parts \(torch\.view_as_real",
    ),
}


@pytest.mark.parametrize("name", OF_PARAMETERS)
def test_cures_of_parameters(name) -> None:
    model, what, cure = OF_PARAMETERS[name]
    refused(what, cure, GhostClipper, model(), max_grad_norm=1.0)


# Recurrent layers


def of_sequence(m, rows):
    return m(*rows)[0].square().flatten(1).mean(1)


def cannot(*_):
    raise RuntimeError("cudnn RNN backward can only be called in training mode")


RECURRENT = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
}


@pytest.mark.filterwarnings("ignore:dpfast has no rule")
@pytest.mark.parametrize("name", RECURRENT)
def test_cures_of_recurrent_layers(name, monkeypatch) -> None:
    """By torch.func, oneDNN differentiates no LSTM; cuDNN, none of them in eval mode."""
    layer, settings = RECURRENT[name]
    if name != "lstm" or not torch.backends.mkldnn.is_available():
        monkeypatch.setattr(torch.func, "vjp", cannot)
    model = layer(4, 3, batch_first=True, **settings)
    what = rf"weight_ih_l0, .*: {name}: dpfast has no rule for it, and torch\.func cannot differentiate it\n"
    cell = f"nn.{layer.__name__}Cell"
    message = refused(
        what, f"cure: step through the sequence with {cell}", step, model, torch.randn(6, 5, 4), loss=of_sequence
    )
    assert "Tensor" not in message, "torch's own words"
    assert ("within torch.backends.mkldnn.flags(enabled=False)" in message) == (name == "lstm")


@pytest.mark.filterwarnings("ignore:dpfast has no rule")
def test_cures_of_other_calls_without_a_rule(monkeypatch) -> None:
    monkeypatch.setattr(torch.func, "vjp", cannot)
    what, cure = "p: hypot: .* cannot differentiate it", "write it with operations that torch.func can differentiate"
    refused(what, cure, step, Raw(lambda m, x: torch.hypot(x, m.p[0]), p=(4, 4)), X)


@pytest.mark.filterwarnings("ignore:dpfast has no rule", "ignore:TF32 acceleration")
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_that_torch_can_differentiate(name) -> None:
    """An LSTM as its message has it."""
    layer, settings = RECURRENT[name]
    torch.manual_seed(0)
    with torch.backends.mkldnn.flags(enabled=False):
        model = layer(4, 3, batch_first=True, **settings)
        check(model, (torch.randn(6, 5, 4),), augmult=2, forms=["auto"], losses=of_sequence)


# Calls


def centred(model, rows):
    each = losses(model, rows)
    return each - 0.5 * each.mean()


def beside_the_rows(model, rows):
    return losses(model, rows) + 0 * model(rows[0].mean(0)).sum()


def without_gradients(model, rows):
    with torch.no_grad():
        return losses(model, rows)


def of_another_model(_, rows):
    return losses(nn.Linear(4, 3), rows)


class Once(torch.autograd.Function):
    """Gives a gradient in the first of several backward passes only."""

    @staticmethod
    def forward(ctx, x):
        ctx.given = False
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        before, ctx.given = ctx.given, True
        return None if before else g


def once(model, rows):
    return Once.apply(losses(model, rows))


OF_LOSSES = {  # a loss, what is wrong, the cure
    "centred": (
        centred,
        "weight, bias: linear: .* reaches rows of other examples",
        "keep examples apart along one dim",
    ),
    "no rows": (
        beside_the_rows,
        "linear: the output cannot be cut into examples",
        "keep the rows of the batch together",
    ),
    "no_grad": (without_gradients, r"bias, weight ran under torch\.no_grad", "use use_reentrant=False"),
    "once": (
        once,
        "weight, bias: linear: two backward passes over the same losses gave it different gradients, or one none",
        "write custom gradients so that they may be asked for several times",
    ),
    "another model": (of_another_model, "no trainable parameter used since", "inside `with clipper`, one forward pass"),
}


@pytest.mark.parametrize("name", OF_LOSSES)
def test_cures_of_losses(name) -> None:
    loss, what, cure = OF_LOSSES[name]
    model = nn.Linear(4, 3)
    refused(what, cure, step, model, torch.randn(6, 4), loss=loss)
    assert model.weight.grad is None


@pytest.mark.parametrize(
    ("parts", "mask", "what", "cure"),
    [
        ([(2, True), (2, False)], None, "expected all of its augmult=3 rows", "more=True in every pass but the last"),
        ([(2, True)], torch.ones(1, dtype=torch.bool), "take no example_mask", "leave padding out"),
    ],
    ids=["rows", "mask"],
)
def test_cures_of_passes_over_one_example(parts, mask, what, cure) -> None:
    model = nn.Linear(4, 3)

    def run() -> None:
        with GhostClipper(model, max_grad_norm=1.0, augmult=3) as clipper:
            for rows, more in parts:
                clipper.backward(losses(model, (torch.randn(rows, 4),)), more=more, example_mask=mask)

    refused(f"passes over one example.*{what}", cure, run)
    assert model.weight.grad is None


def test_cures_of_plans() -> None:
    model = Raw(only_on_large_numbers, p=(4, 4))
    refused("looks at numbers", r"use torch\.where", plan_step, model, lambda m, x: losses(m, (x,)), (X,), augmult=1)


SETTINGS = {
    "augmult": (lambda: GhostClipper(nn.Linear(3, 3), max_grad_norm=1.0, augmult=0), "=0: expected at least 1 row"),
    "form": (lambda: Performance(form="ghost"), "='ghost'.: expected one of auto, gram, direct, materialise, example"),
    "microbatch": (lambda: Performance(microbatch=0), "=0.: expected a positive number or None"),
    "memory_budget": (lambda: Performance(memory_budget=-1), "=-1.: expected a positive number of bytes or None"),
    "memory_budget in words": (
        lambda: Performance(memory_budget="1GB"),
        "='1GB'.: expected a positive number of bytes",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_values_out_of_range(name) -> None:
    make, expected = SETTINGS[name]
    with pytest.raises(ConfigError, match=name.split()[0] + expected):
        make()


# Many layers with one problem


def many(layers: int = 50, *, norm: bool = False) -> nn.Module:
    """With 100 parameters."""
    return nn.Sequential(*(nn.BatchNorm1d(4) if norm else nn.Linear(4, 4) for _ in range(layers)))


@pytest.mark.parametrize("form", ["auto", "example"])
@pytest.mark.parametrize("outside", [False, True], ids=["all inside", "forward before the block"])
def test_no_backward_pass_of_ones_own_is_silent(form, outside) -> None:
    """Whoever reaches p.grad: where autograd computes the gradient, no use would tell."""
    model, x = nn.Linear(4, 3), torch.randn(1, 4)
    clipper = GhostClipper(model, max_grad_norm=1.0, performance=Performance(form=form))
    before = model(x).sum()
    with pytest.raises(CaptureError, match=r"weight, bias: back-propagated outside clipper\.backward"), clipper:
        (before if outside else model(x).sum()).backward()
    assert model.weight.grad is None


def test_another_model_may_back_propagate_inside_the_block() -> None:
    model, other, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(6, 4)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with clipper:
        other(x).sum().backward()
        clipper.backward(losses(model, (x,)))
    assert other.weight.grad.any()
    assert model.weight.grad.any()


def backward_by_habit(model, x) -> None:
    with GhostClipper(model, max_grad_norm=1.0):
        losses(model, (x,)).mean().backward()


def forward_outside(model, x) -> None:
    outside = losses(model, (x,))
    with GhostClipper(model, max_grad_norm=1.0) as clipper:
        clipper.backward(outside)


OF_MANY = {  # whose mistake, what is wrong, the cure that is named first
    "norms": (step, "0.weight, 0.bias, .*: batch_norm.* mixes the rows", "replace BatchNorm by GroupNorm"),
    "backward": (
        backward_by_habit,
        r"49.weight, 49.bias, .*: back-propagated outside",
        r"call clipper\.backward\(losses\)",
    ),
    "forward": (
        forward_outside,
        "0.weight, 0.bias, .*: the losses depend on",
        "run the whole forward pass inside `with",
    ),
}


@pytest.mark.parametrize("name", OF_MANY)
def test_one_problem_of_many_layers_is_said_once(name) -> None:
    run, what, cure = OF_MANY[name]
    model = many(norm=name == "norms")
    message = refused(what, f"cure: {cure}", run, model, torch.randn(6, 4))
    assert "(1 problem)" in message
    assert " and 95 more: " in message
    assert len(message.splitlines()) == 3
    assert all(p.grad is None for p in model.parameters())


def test_problems_of_one_cure_share_it() -> None:
    """Each with its own names."""
    norm = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))
    message = refused(
        r"1.weight, 1.bias: linear: .*\n.*0.weight, 0.bias: layer_norm: ", "cure: ", step, norm, X, loss=centred
    )
    assert "(2 problems)" in message
    assert message.count("cure:") == 1


# Warnings


def of_no_input(m, x):
    return m.p.mean(0) + 0 * x


def other_calls(m, x):
    return F.linear(x, m.p) if x.mean() > 2 else F.linear(x * 1, m.p)


def by_attribute(m, x):
    m.kept = x.detach().clone()
    return F.linear(x, m.p)


def looked_up(model, rows):
    return model(rows[0] * rows[0][:, 1][(rows[0][:, 0].abs() % 6).long(), None]).square().mean(1)


def all_alike(model, rows):
    return model(rows[0], torch.zeros(6, dtype=torch.long)).square().mean(1)


OF_WARNINGS = {  # a forward function, a loss, what is said
    "unused": (lambda m, x: F.linear(x, m.p), losses, "no loss depends on other: .*; freeze what stays"),
    "read out": (other_calls, losses, r"\(__bool__\).* Use torch\.where, or decide outside of the model"),
    "selected": (lambda m, x: F.linear(x, m.p), looked_up, r"by __getitem__.* Look things up before the block, or in"),
    "other calls": (other_calls, losses, "on synthetic input it calls other functions than on the batch's own"),
    "labels of 0": (
        lambda m, x, of: F.linear(x + of[:, None], m.p),
        all_alike,
        r"its inputs \(labels, say\) was 0 in every row",
    ),
    "unmoved": (of_no_input, losses, "its output does not depend on its input"),
    "attribute": (by_attribute, losses, r"it reads Raw\.kept, .* hand tensors over as arguments, their rows along"),
}


@pytest.mark.parametrize("name", OF_WARNINGS)
def test_what_warnings_say_to_do(name) -> None:
    forward, loss, said = OF_WARNINGS[name]
    torch.manual_seed(0)
    clipper = GhostClipper(Raw(forward, p=(4, 4), other=(2,)), max_grad_norm=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(ENOUGH_STEPS):
            clipper.zero_grad()
            x = 3 + torch.randn(6, 4)
            with clipper:
                clipper.backward(loss(clipper.model, (x,)))
    messages = [str(w.message) for w in caught]
    assert [m for m in messages if re.search(said, m)], messages
