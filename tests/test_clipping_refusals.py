"""What cannot be clipped per example is refused, with names and cures, before any p.grad is written."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import Checkpointed, Raw, losses, unet, unet_inputs
from dpfast import GhostClipper, Performance
from dpfast.errors import CaptureError, ConfigError


def refusal(model, inputs, *, augmult=1, form="auto", loss=losses) -> str:
    """The message; afterwards no parameter has a gradient."""
    clipper = GhostClipper(model, max_grad_norm=1.0, augmult=augmult, performance=Performance(form=form))
    with pytest.raises(CaptureError) as caught, clipper:
        clipper.backward(loss(model, inputs))
    assert all(p.grad is None for p in model.parameters())
    return str(caught.value)


@pytest.mark.parametrize("form", ["auto", "example"])
def test_batch_norm_is_refused_and_its_statistics_stay(form) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {name: b.clone() for name, b in model.named_buffers() if "running" in name}
    message = refusal(model, (torch.randn(4, 3, 5, 5),), form=form)
    assert "1.weight, 1.bias" in message
    assert "mixes the rows" in message
    assert "GroupNorm" in message
    for name, value in before.items():
        assert torch.equal(dict(model.named_buffers())[name], value)


def test_batch_norm_without_parameters_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False, track_running_stats=False))
    assert "mixes the rows" in refusal(model, (torch.randn(4, 3),))


def test_every_problem_in_one_message() -> None:
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.table = nn.Embedding(5, 4, max_norm=1.0)
            self.fill = nn.Parameter(torch.randn(4))

        def forward(self, x):
            h = self.norm(self.conv(x)).mean((2, 3)) + self.table(torch.zeros(len(x), dtype=torch.long) + x.shape[2])
            h[:, 0] = self.fill[0]
            return h

    torch.manual_seed(0)  # a row of the table that is longer than 1
    message = refusal(Bad(), (torch.randn(4, 3, 4, 4),))
    assert "3 problems" in message
    for part in ("norm.weight", "table.weight", "fill", "GroupNorm", "torch.where"):
        assert part in message
    assert message.count("cure:") == 3


MIXERS = {
    "mean over the batch": lambda m, x: F.linear(x - x.mean(0), m.weight),
    "attention over the batch": lambda m, x: F.scaled_dot_product_attention(*[F.linear(x, m.weight)[None]] * 3)[0],
    "a flipped batch": lambda m, x: F.linear(x, m.weight) + F.linear(x, m.weight).flip(0),
    "cumulative sum": lambda m, x: F.linear(x, m.weight).cumsum(0),
}


@pytest.mark.parametrize("form", ["auto", "example"])
@pytest.mark.parametrize("name", MIXERS)
def test_layers_that_mix_rows(name, form) -> None:
    message = refusal(Raw(MIXERS[name], weight=(5, 5)), (torch.randn(6, 5),), augmult=2, form=form)
    assert "example" in message
    assert "cure:" in message


@pytest.mark.parametrize("form", ["auto", "example"])
def test_a_loss_that_mixes_rows(form) -> None:
    def centered(model, inputs):
        out = losses(model, inputs)
        return out - 0.5 * out.mean()

    message = refusal(nn.Linear(5, 5), (torch.randn(6, 5),), augmult=2, loss=centered, form=form)
    assert "weight, bias: linear: the gradient of one example's loss reaches rows of other examples" in message


@pytest.mark.parametrize("form", ["auto", "example"])
def test_statistics_of_the_batch_behind_a_detach(form) -> None:
    """No gradient shows it: only the forward probe does."""
    model = Raw(lambda m, x: F.linear(x - x.mean(0).detach(), m.weight), weight=(5, 5))
    assert "changing one example's input changes" in refusal(model, (torch.randn(6, 5),), augmult=2, form=form)


def test_mixing_is_found_once_gradients_appear() -> None:
    """A zero-initialised last layer hides the rows of the first step; the second step must still be refused."""
    model = Raw(lambda m, x: F.linear(F.linear(x, m.first).cumsum(0), m.last), first=(5, 5), last=(5, 5))
    nn.init.zeros_(model.last)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    clipper._calls.show = lambda rows: ""  # this test is about the backward probe alone
    x = torch.randn(6, 5)
    with clipper:
        clipper.backward(losses(model, (x,)))
        clipper.zero_grad()
        nn.init.normal_(model.last)  # stands for an optimizer's step
        second = losses(model, (x,))
        with pytest.raises(CaptureError, match="first"):
            clipper.backward(second)


def test_zero_initialised_layers_are_learned_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    nn.init.zeros_(model[2].weight)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    for _ in range(2):
        clipper.zero_grad()
        with clipper:
            clipper.backward(losses(model, (torch.randn(6, 5),)))
        nn.init.normal_(model[2].weight)
    assert model[0].weight.grad.norm() > 0


def test_a_changing_buffer() -> None:
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            return self.linear(x)

    message = refusal(Counts(), (torch.randn(4, 3),))
    assert "mean: add_ writes into it during a private step: it would carry private data" in message
    assert "running statistics" in message


def test_a_parameter_changed_in_the_step() -> None:
    def forward(m, x):
        with torch.no_grad():
            m.weight.mul_(0.5)
        return F.linear(x, m.weight)

    message = refusal(Raw(forward, weight=(3, 3)), (torch.randn(4, 3),))
    assert "weight: changed between the forward pass and clipper.backward" in message
    assert "cure: leave the block for that" in message


def test_losses_of_the_wrong_shape() -> None:
    model, x = nn.Linear(3, 3), (torch.randn(6, 3),)
    assert "reduced already? use reduction='none'" in refusal(model, x, loss=lambda m, r: losses(m, r).mean())
    assert re.search(r"2 dimensions.*: expected \[B\*1\], one loss per row", refusal(model, x, loss=lambda m, r: m(*r)))
    assert re.search("no multiple of augmult=4: .* all K rows of an example together", refusal(model, x, augmult=4))
    message = refusal(model, x, loss=lambda m, r: r[0].sum(1))
    assert "depend on no trainable parameter: compute them inside `with clipper`, with gradients enabled" in message


def test_losses_averaged_over_rows() -> None:
    model, x = nn.Linear(3, 3), (torch.randn(8, 3),)
    told = r"fewer losses than rows in the model's input: .* do not average over rows"
    assert re.search(told, refusal(model, x, loss=lambda m, r: losses(m, r).mean().reshape(1)))
    assert re.search(told, refusal(model, x, augmult=2, loss=lambda m, r: losses(m, r).view(-1, 2).mean(1)))


def test_hooks_on_accumulated_gradients() -> None:
    model = nn.Linear(3, 3)
    model.weight.register_post_accumulate_grad_hook(lambda p: p.sub_(p.grad))
    with pytest.raises(CaptureError, match=r"weight: a hook[\s\S]*cure: remove the hook"):
        GhostClipper(model, max_grad_norm=1.0)


def test_a_model_cast_to_half_precision_later() -> None:
    model = nn.Linear(3, 3)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    model.to(torch.bfloat16)
    with pytest.raises(CaptureError, match="half-precision"), clipper:
        pass


def test_a_mean_dressed_as_one_loss_per_row() -> None:
    message = refusal(nn.Linear(3, 3), (torch.randn(6, 3),), loss=lambda m, r: losses(m, r).mean().expand(6))
    assert "reaches rows of other examples" in message


def test_forward_outside_the_block() -> None:
    model = nn.Linear(3, 3)
    outside = losses(model, (torch.randn(4, 3),))
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(CaptureError, match=r"weight, bias: the losses depend on .* along a path"), clipper:
        clipper.backward(outside)
    with pytest.raises(CaptureError, match=r"outside `with clipper`: compute the losses inside"):
        clipper.backward(outside)
    assert model.weight.grad is None


def test_losses_backward_writes_nothing() -> None:
    model = nn.Linear(3, 3)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(CaptureError, match=r"back-propagated outside clipper.backward"), clipper:
        losses(model, (torch.randn(4, 3),)).mean().backward()
    assert model.weight.grad is None


def test_losses_backward_after_the_block_writes_nothing() -> None:
    model = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="nothing was learned"), GhostClipper(model, max_grad_norm=1.0):
        each = losses(model, (torch.randn(4, 3),))
    with pytest.raises(CaptureError, match=r"weight, bias \(linear\): .* call clipper\.backward\(losses\)"):
        each.mean().backward()
    assert model.weight.grad is None


def test_gradient_penalty() -> None:
    def penalised(model, inputs):
        x = inputs[0].requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return losses(model, (x,)) + slope.square().sum(1)

    message = refusal(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), (torch.randn(4, 3),), loss=penalised)
    assert "outside clipper.backward" in message


def test_a_foreign_gradient() -> None:
    model = nn.Linear(3, 3)
    model(torch.randn(4, 3)).sum().backward()
    mine = model.weight.grad.clone()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(CaptureError, match=r"weight, bias: p.grad[\s\S]*cure: call clipper\.zero_grad"), clipper:
        clipper.backward(losses(model, (torch.randn(4, 3),)))
    assert torch.equal(model.weight.grad, mine)


def test_a_gradient_changed_between_two_passes() -> None:
    model, x = nn.Linear(3, 3), (torch.randn(4, 3),)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with clipper:
        clipper.backward(losses(model, x))
    assert not clipper.foreign_gradients()
    model.weight.grad += 1
    assert clipper.foreign_gradients() == ["weight"]
    with pytest.raises(CaptureError, match=r"weight: p\.grad"), clipper:
        clipper.backward(losses(model, x))


def test_a_saved_input_changed_in_place() -> None:
    def forward(m, x):
        h = x.sin()
        y = F.linear(h, m.weight)
        h.zero_()
        return y

    clipper = GhostClipper(Raw(forward, weight=(3, 3)), max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), clipper:
        clipper.backward(losses(clipper.model, (torch.randn(4, 3),)))


@pytest.mark.filterwarnings("ignore:dpfast has no rule")
def test_random_calls_without_a_rule() -> None:
    def attended(m, x):
        query = m.query.expand(len(x), -1, -1)
        return F.scaled_dot_product_attention(query, x, x, dropout_p=0.5)

    message = refusal(Raw(attended, query=(1, 2, 4)), (torch.randn(4, 3, 4),))
    assert "query: scaled_dot_product_attention draws random numbers" in message
    assert "cure: move the dropout out of the call" in message


def test_parametrizations_inside_a_checkpoint() -> None:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(2, 4), nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(lambda h: self.conv(F.silu(self.norm(h))), x, use_reentrant=False)

    message = refusal(Block(), (torch.randn(5, 4, 6),))
    assert "computed from it inside an activation checkpoint" in message
    assert "remove its parametrization" in message


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints() -> None:
    """torch itself refuses them here, and names the cure."""
    clipper = GhostClipper(Checkpointed(use_reentrant=True), max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match="use_reentrant=False"), clipper:
        clipper.backward(losses(clipper.model, (torch.randn(4, 4),)))
    assert all(p.grad is None for p in clipper.model.parameters())


def test_layers_that_first_run_in_the_backward_pass() -> None:
    """A checkpoint written by hand: nothing was shown about the rows of a use that no forward pass has made."""

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, layer):
            ctx.layer = layer
            ctx.save_for_backward(x)
            return layer(x)

        @staticmethod
        def backward(ctx, g):
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                torch.autograd.backward(ctx.layer(x).cumsum(0), g)
            return x.grad, None

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    message = refusal(model, (torch.randn(4, 3),), loss=lambda m, r: Recompute.apply(m[0](*r), m[1]).square().mean(1))
    assert "1.weight, 1.bias: linear: reached by a backward pass inside the backward pass" in message
    assert "cure: checkpoint activations with use_reentrant=False" in message


def test_a_backward_pass_inside_the_backward_pass() -> None:
    """Whatever writes to p.grad behind the clipper's back is seen, and what was there before is kept."""

    class Sneaky(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, model):
            ctx.model = model
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            with torch.enable_grad(), torch._C.DisableTorchFunction():
                ctx.model.weight.square().sum().backward()
            return g, None

    model = nn.Linear(3, 3)
    message = refusal(model, (torch.randn(4, 3),), loss=lambda m, r: Sneaky.apply(losses(m, r), m))
    assert re.search("weight: the losses depend on .* along a path that was not captured", message)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_scripted_models() -> None:
    with pytest.raises(CaptureError, match=r"scripted .* give the Python module it was made from"):
        GhostClipper(torch.jit.script(nn.Linear(3, 3)), max_grad_norm=1.0)


def test_half_precision_parameters() -> None:
    with pytest.raises(CaptureError, match=r"half-precision[\s\S]*cure: keep float32 parameters .* torch\.autocast"):
        GhostClipper(nn.Linear(3, 3).half(), max_grad_norm=1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_clip_norms_out_of_range(value) -> None:
    with pytest.raises(ConfigError, match=r"max_grad_norm=.*: expected a positive, finite number"):
        GhostClipper(nn.Linear(3, 3), max_grad_norm=value)


def test_entered_twice() -> None:
    clipper = GhostClipper(nn.Linear(3, 3), max_grad_norm=1.0)
    with clipper, pytest.raises(CaptureError, match="already active: leave its `with` block"):
        clipper.__enter__()


@pytest.mark.filterwarnings("ignore:it was not shown that the model takes no statistics")
def test_unused_parameters_are_named_once() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(2, 2)})
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.warns(UserWarning, match=r"no loss depends on idle.weight, idle.bias: noise is added"), clipper:
        clipper.backward(losses(model["used"], (torch.randn(4, 3),)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no loss depends")
        with clipper:
            clipper.backward(losses(model["used"], (torch.randn(4, 3),)))
    assert model["idle"].weight.grad.abs().sum() == 0


def test_the_model_is_untouched_outside() -> None:
    torch.manual_seed(0)
    model, inputs = unet(), unet_inputs(4)
    before = set(vars(model))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with clipper:
        clipper.backward(losses(model, inputs))
    clipper.zero_grad()
    assert set(vars(model)) == before
    assert not model._forward_pre_hooks
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    losses(model, inputs).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def indexed(m, x):
    h = x.sin()
    h[:, 0] = m.p[0]
    return h


def in_place_on_a_weight(m, x):
    w = m.p * 2
    return w.expand_as(x).clone().add_(x) * 1.0


def written_into(m, x):
    return torch.mul(x, m.p, out=torch.empty_like(x))


def powered_in_place(m, x):
    return x.abs().add(1).pow_(m.p)


def changed_after_use(m, x):
    w = m.p * 2
    h = x * w
    w.mul_(3)
    return h + w


REFUSED = {  # what a model does: how it is told, and what to do
    "indexed assignment": (indexed, r"p: __setitem__: a trainable parameter enters a change in place", "torch.where"),
    "data into a weight": (in_place_on_a_weight, r"p: add_: a change in place, with data, of a tensor", "out-of-place"),
    "out": (written_into, r"p: mul: a trainable parameter enters a change in place", r"x = x\.op\(p\)"),
    "no rule in place": (powered_in_place, r"p: pow_: a trainable parameter enters a change in place", "out-of-place"),
    "changed after use": (changed_after_use, r"p: changed in place after it", r"w = w \* 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_changes_in_place(name) -> None:
    forward, told, cure = REFUSED[name]
    message = refusal(Raw(forward, p=(4,)), (torch.randn(6, 4),), augmult=2)
    assert re.search(told, message)
    assert re.search(rf"cure: .*{cure}", message)


def test_gradients_scaled_by_frequency() -> None:
    message = refusal(nn.Embedding(5, 4, scale_grad_by_freq=True), (torch.randint(0, 5, (6, 2)),))
    assert "weight: embedding: scale_grad_by_freq counts over the whole batch" in message
    assert "use scale_grad_by_freq=False" in message


@pytest.mark.filterwarnings("ignore:dpfast has no rule")
def test_rows_that_cannot_be_told_apart() -> None:
    """Twice as many rows in the result as in the argument."""
    model = Raw(lambda m, x: torch.kron(x, m.p).view(len(x), -1), p=(2, 3))
    message = refusal(model, (torch.randn(6, 5),))
    assert "p: kron: the rows of its arguments cannot be told apart" in message
    assert "keep the rows of the batch along one dimension of every argument" in message


def test_more_losses_than_one_example_has_rows() -> None:
    """The form "example" decides by the first call what autograd itself computes."""
    model = nn.Linear(3, 3)
    x = torch.randn(6, 3)

    def one_by_one(m, rows):
        return torch.cat([losses(m, (row[None],)) for row in rows[0]])

    message = refusal(model, (x,), form="example", loss=one_by_one)
    assert "took the model's input for one example" in message
    assert "give the model all rows of the losses at once" in message


def test_losses_of_an_earlier_forward_pass() -> None:
    clipper = GhostClipper(nn.Linear(3, 3), max_grad_norm=1.0)
    with clipper:
        first = losses(clipper.model, (torch.randn(4, 3),))
        clipper.backward(losses(clipper.model, (torch.randn(4, 3),)))
        with pytest.raises(CaptureError, match=r"forward pass before the last clipper\.backward.*; add up all losses"):
            clipper.backward(first)
