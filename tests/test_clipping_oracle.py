"""GhostClipper against the float64 oracle: every layer, form, layout and number of augmentations."""

import gc
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import CONVOLUTIONS, EVERY, LAYERS, LAYOUTS, PATTERNS, Case, losses, relayout, unet, unet_inputs
from checks import FORMS, check, clip, fallbacks
from dpfast import GhostClipper, Performance
from dpfast.kernels import linear
from dpfast.performance import Form
from oracle import Clipped, assert_as_good_as_torch, per_example


@pytest.mark.parametrize("augmult", [1, 3, 8])
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_every_layer_and_form(case: Case, augmult: int) -> None:
    model, inputs = case.build(rows=3 * augmult)
    with fallbacks() as slow:
        check(model, inputs, augmult=augmult)
    assert bool(slow) == case.slow_rule


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*LAYERS, *CONVOLUTIONS], ids=lambda case: case.name)
def test_every_layout(case: Case, layout: str) -> None:
    model, inputs = case.build(rows=6)
    # torch 2.13 crashes in GroupNorm's own backward on channels_last inputs that need no gradient.
    crashes = layout == "channels_last" and case.name == "group-norm"
    forms = [form for form in FORMS if not (crashes and form == "example")]
    laid_out = tuple(relayout(x, layout) if x.is_floating_point() else x for x in inputs)
    check(model, laid_out, augmult=2, forms=forms)


@pytest.mark.parametrize("augmult", [1, 3, 8])
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
def test_unet_of_diffusers(augmult: int, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = unet().to(memory_format=memory_format)
    images, *rest = unet_inputs(3 * augmult)
    check(model, (images.contiguous(memory_format=memory_format), *rest), augmult=augmult)


class Attention(nn.Module):
    """Queries, keys and values of one input; then queries of that, keys and values of another."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ModuleList(nn.Linear(6, n) for n in (4, 4, 6))
        self.cross = nn.ModuleList(nn.Linear(6, n, bias=False) for n in (5, 5, 3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(*[of(x) for of in self.own])
        q, k, v = (of(given) for of, given in zip(self.cross, (x, context, context), strict=True))
        return F.scaled_dot_product_attention(q, k, v)


def test_maps_of_one_input_share_its_gram(monkeypatch) -> None:
    torch.manual_seed(0)
    model, inputs = Attention(), (torch.randn(6, 7, 6), torch.randn(6, 5, 6))
    check(model, inputs, augmult=2)
    together = []

    def counted(a: Tensor, *g: Tensor) -> tuple[Tensor, Tensor]:
        together.append(len(g))
        return linear.gram_sq_norms(a, *g)

    monkeypatch.setattr("dpfast.clipping.accumulate.linear", SimpleNamespace(gram_sq_norms=counted))
    clip(model, inputs, augmult=2, max_grad_norm=1.0, form="gram")
    assert together == [2, 3]  # keys and values of the context, then all three of x


@pytest.mark.filterwarnings("ignore:dpfast has no rule")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", PATTERNS, ids=lambda case: case.name)
def test_an_example_in_several_passes(case: Case, form: Form) -> None:
    """Its K rows come in parts of 3, 1 and 2; whatever the form, nothing is clipped before the last."""
    model, inputs = case.build(rows=12)
    settings = {"augmult": 6, "max_grad_norm": 0.1}
    exact = per_example(model, losses, inputs, **settings)
    plain = per_example(model, losses, inputs, **settings, dtype=torch.float32)
    clipper = GhostClipper(model, **settings, performance=Performance(form=form))
    norms = []
    with clipper:
        for start, end in ((0, 3), (3, 4), (4, 6), (6, 9), (9, 10), (10, 12)):
            more = end % 6 != 0
            result = clipper.backward(losses(model, tuple(x[start:end] for x in inputs)), more=more)
            assert len(result.norms) == (not more)
            norms.append(result.norms)
    got = Clipped(torch.cat(norms), {name: p.grad for name, p in clipper.parameters.items()})
    assert_as_good_as_torch(got, plain, exact)


@pytest.mark.filterwarnings("ignore:dpfast has no rule")
@pytest.mark.parametrize("case", PATTERNS, ids=lambda case: case.name)
def test_later_steps_take_the_path_without_probes(case: Case) -> None:
    model, inputs = case.build(rows=6)
    settings = {"augmult": 2, "max_grad_norm": 0.1}
    exact = per_example(model, losses, inputs, **settings)
    plain = per_example(model, losses, inputs, **settings, dtype=torch.float32)
    clipper = GhostClipper(model, **settings)
    for _ in range(3):
        clipper.zero_grad()
        with clipper:
            norms = clipper.backward(losses(model, inputs)).norms
        sums = {name: p.grad.clone() for name, p in clipper.parameters.items()}
        assert_as_good_as_torch(Clipped(norms, sums), plain, exact)


def test_a_step_leaves_no_activations_behind() -> None:
    """Without the garbage collector: no reference cycle keeps a graph alive."""
    torch.manual_seed(0)
    model, inputs = unet(), unet_inputs(8)
    clipper = GhostClipper(model, max_grad_norm=0.1, augmult=2)

    def tensors_after_a_step() -> int:
        with clipper:
            clipper.backward(losses(model, inputs))
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        tensors_after_a_step()
        first = tensors_after_a_step()
        assert tensors_after_a_step() == first
    finally:
        gc.enable()


def test_several_backward_passes_add_up() -> None:
    torch.manual_seed(0)
    model = unet()
    inputs = unet_inputs(8)
    settings = {"augmult": 2, "max_grad_norm": 0.1}
    exact = per_example(model, losses, inputs, **settings)
    plain = per_example(model, losses, inputs, **settings, dtype=torch.float32)
    clipper = GhostClipper(model, **settings)
    norms = []
    for rows in (slice(0, 2), slice(2, 8)):
        with clipper:
            norms.append(clipper.backward(losses(model, tuple(x[rows] for x in inputs))).norms)
    sums = {name: p.grad for name, p in clipper.parameters.items()}
    assert_as_good_as_torch(Clipped(torch.cat(norms), sums), plain, exact)


@pytest.mark.parametrize("form", FORMS)
def test_double_precision_model(form: str) -> None:
    model, inputs = CONVOLUTIONS[1].build(rows=6)
    model, inputs = model.double(), tuple(x.double() for x in inputs)
    exact = per_example(model, losses, inputs, augmult=2, max_grad_norm=0.1)
    got = clip(model, inputs, augmult=2, max_grad_norm=0.1, form=form)
    torch.testing.assert_close(got.norms, exact.norms, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_sequence_first(form: str) -> None:
    """Rows along dimension 1, as sequence-first transformers have them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 4))

    def transposed(m, rows):
        return m(rows[0].transpose(0, 1)).transpose(0, 1).square().flatten(1).mean(1)

    inputs = (torch.randn(6, 6, 5),)
    settings = {"augmult": 2, "max_grad_norm": 0.2, "losses": transposed}
    exact = per_example(model, transposed, inputs, augmult=2, max_grad_norm=0.2)
    plain = per_example(model, transposed, inputs, augmult=2, max_grad_norm=0.2, dtype=torch.float32)
    assert_as_good_as_torch(clip(model, inputs, form=form, **settings), plain, exact)


def test_a_bound_that_is_not_a_number_vouches_for_nothing(monkeypatch) -> None:
    """Of a Gram: such an example contributes 0."""

    def without_bound(a, *_, **__):
        return torch.ones(len(a), dtype=torch.float64), torch.tensor([0.0, float("nan")], dtype=torch.float64)

    monkeypatch.setattr("dpfast.kernels.linear.gram_sq_norms", without_bound)
    model = nn.Linear(3, 2, bias=False)
    clipper = GhostClipper(model, max_grad_norm=1.0, performance=Performance(form="gram"))
    with clipper:
        result = clipper.backward(model(torch.randn(2, 4, 3)).square().flatten(1).sum(1))
    assert result.clip_factors.tolist() == [1, 0]
