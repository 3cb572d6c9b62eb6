"""Memory with several names, lists that change after a call, arguments that are not what they seem: all were silent."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import Case, Raw, floats, losses
from checks import check
from dpfast import GhostClipper
from dpfast.errors import CaptureError

pytestmark = pytest.mark.filterwarnings("ignore:dpfast has no rule", "ignore:it was not shown")


def through_a_view(m, x):
    buffer = torch.zeros(len(x), 8, dtype=x.dtype)
    buffer[:, :5].copy_(F.linear(x, m.a).tanh())
    return F.linear(buffer, m.b) + x


def view_before_the_write(m, x):
    buffer = torch.zeros(len(x), 8, dtype=x.dtype)
    view = buffer[:, :5]
    buffer[:, :5] = F.linear(x, m.a).tanh()
    return F.linear(view, m.b[:, :5]) + x


def by_a_use(m, x):
    buffer = torch.zeros(len(x), 8, dtype=x.dtype)
    buffer[:, :5].lerp_(F.linear(x, m.a).tanh(), m.w)
    return F.linear(buffer, m.b) + x


def of_parameters(m, x):
    buffer = torch.zeros(5, 4, dtype=x.dtype)
    view = buffer.view(5, 4)
    buffer.copy_(m.a)
    return F.linear(F.linear(x, view).tanh(), m.b[:, :5]) + x


def list_replaced(m, x):
    parts = [x, m.a[:1].expand_as(x)]
    h = torch.hstack(parts)
    parts[0], parts[1] = h, h * 2
    return F.linear(h, m.b)


def list_that_grows(m, x):
    parts = [x, m.a[:1].expand_as(x)]
    for _ in range(2):
        parts.append(F.linear(torch.hstack(parts)[:, :8], m.b).tanh())
    return parts[-1]


def dims_that_change(m, x):
    dims = [1, 0]
    w = m.b.permute(dims)
    dims[:] = [0, 1]
    return torch.einsum("nd,pd->np", x, w)


@pytest.mark.parametrize(
    "forward",
    [
        *(through_a_view, view_before_the_write, by_a_use),
        *(list_replaced, list_that_grows, dims_that_change),
    ],
)
def test_against_the_oracle(forward) -> None:
    shapes = {"a": (5, 4), "b": (4, 8), "w": (5,)}
    used = {name: shapes[name] for name in shapes if f"m.{name}" in source(forward)}
    model, inputs = Case(forward.__name__, lambda: Raw(forward, **used), floats(4)).build(rows=6)
    check(model, inputs, augmult=2)


def test_parameters_behind_another_name_are_refused() -> None:
    clipper = GhostClipper(Raw(of_parameters, a=(5, 4), b=(4, 8)), max_grad_norm=0.1)
    with pytest.raises(CaptureError, match="a: the losses depend on it along a path"), clipper:
        clipper.backward(losses(clipper.model, (torch.randn(6, 4),)))


def source(function) -> str:
    return " ".join(f"m.{name}" for name in function.__code__.co_names)


def by_out(m, x):
    buffer = torch.zeros(len(x), 8, dtype=x.dtype)
    torch.mul(x, 2, out=buffer[:, :4])
    return F.linear(F.linear(buffer, m.b).tanh() * x, m.a)


def by_copy(m, x):
    buffer = torch.zeros(len(x), 8, dtype=x.dtype)
    buffer[:, :4].copy_(x)
    return F.linear(F.linear(buffer, m.b).tanh() * x, m.a)


@pytest.mark.parametrize("forward", [by_out, by_copy])
def test_data_in_a_buffer_spoils_nobody_else(forward) -> None:
    """The buffer was taken for a constant, whose product with everybody's gradient was NaN."""
    model, (x,) = Case("", lambda: Raw(forward, a=(5, 4), b=(4, 8)), floats(4)).build(rows=6)
    x[2] = float("inf")
    clipper = GhostClipper(model, max_grad_norm=0.1)
    with clipper:
        norms = clipper.backward(losses(model, (x,))).norms
    assert norms.isfinite().tolist() == [True, True, False, True, True, True]


class Timed(nn.Module):
    """Something for each row is made of parameters and constants alone, and meets the rows where there is no rule."""

    def __init__(self, meet) -> None:
        super().__init__()
        self.meet, self.of_time, self.of_input = meet, nn.Linear(1, 4), nn.Linear(4, 4)

    def forward(self, x):
        t = torch.linspace(0, 1, len(x), dtype=x.dtype)
        return self.meet(self.of_input(x), self.of_time(t[:, None]).mul(3).sin())


@pytest.mark.parametrize("meet", [torch.maximum, torch.logaddexp, torch.hypot])
def test_rows_made_of_parameters_alone(meet) -> None:
    torch.manual_seed(0)
    model, x = Timed(meet), torch.randn(6, 4)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    clipper.zero_grad()
    with clipper:
        norms = clipper.backward(losses(model, (x,))).norms
    model.double()
    whole = losses(model, (x.double(),))  # a row of the batch has a time of its own
    for norm, loss in zip(norms, whole, strict=True):
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        torch.testing.assert_close(norm, torch.cat([g.flatten() for g in grads]).norm(), rtol=1e-5, atol=0)


def test_a_function_that_torch_maps_wrongly() -> None:
    """``vmap`` of the vjp of ``linalg.solve`` without gradients (torch 2.13): norms were a million times off."""

    def solve(m, x):
        return torch.linalg.solve(m.a + 3 * torch.eye(4, dtype=x.dtype), x.mT)

    model, inputs = Case("", lambda: Raw(solve, a=(4, 4)), floats(3, 4)).build(rows=6)
    check(model, inputs, augmult=2)


@pytest.mark.parametrize("scale", [1e-24, 1e20, 1e24])
def test_weights_scaled_out_of_all_proportion(scale) -> None:
    """The squares of a gradient by ``w * 1e24`` vanish before they are those of ``w``."""

    def scaled(m, x):
        return F.linear(x, m.w * scale) * (1 / scale)

    model, inputs = Case("", lambda: Raw(scaled, w=(5, 4)), floats(3, 4)).build(rows=6)
    check(model, inputs, augmult=2)
