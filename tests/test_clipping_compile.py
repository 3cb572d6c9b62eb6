"""Compiled models: the same sums as the oracle's, the same refusals, and the private graph really runs."""

import copy
import functools
import gc
import logging
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cases import PATTERNS, Case, losses, unet, unet_inputs
from dpfast import GhostClipper, Performance
from dpfast.clipping import private
from dpfast.clipping.capture import Capture
from dpfast.clipping.compiled import Regions
from dpfast.clipping.tape import Tape
from dpfast.errors import CaptureError
from dpfast.measure import peak_storages
from oracle import Clipped, assert_as_good_as_torch, per_example

pytestmark = [
    # torch's own: at the first import of inductor, and where torch.compile looks at an input that is not a leaf.
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
COMPILER = private.COMPILER  # before a fixture takes another
FORMS = ["auto", "gram", "direct", "materialise"]
C = 0.1


@pytest.fixture(autouse=True)
def _traced_only(monkeypatch):
    """Private graphs are traced and partitioned, but not translated to C++, which takes minutes."""
    monkeypatch.setattr(private, "COMPILER", "aot_eager")
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would keep a million lines
    yield
    torch._dynamo.reset()


class Spy:
    """Counts private graphs that were compiled and runs of them, and uses that the capture saw itself."""

    def __init__(self, monkeypatch) -> None:
        self.compiled = self.runs = self.seen = 0
        self._wrap(monkeypatch, private, "private_graph", "compiled")
        self._wrap(monkeypatch, Regions, "_run_private", "runs")
        self._wrap(monkeypatch, Capture, "_use", "seen")

    def _wrap(self, monkeypatch, owner, name, count) -> None:
        usual = getattr(owner, name)

        def counting(*args, **kwargs):
            setattr(self, count, getattr(self, count) + 1)
            return usual(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)


@pytest.fixture
def spy(monkeypatch) -> Spy:
    return Spy(monkeypatch)


class Net(nn.Module):
    """What a UNet is made of, a few of each; ``mix`` is applied to the hidden state."""

    def __init__(self, mix=lambda h: h, norm=lambda: nn.GroupNorm(2, 6), dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(1, 6, 3, padding=1), norm(), nn.Conv2d(6, 1, 3, padding=1)
        self.time, self.label = nn.Linear(4, 6), nn.Embedding(5, 6)
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.mix, self.dropout = mix, nn.Dropout(dropout)

    def forward(self, x, t, y):
        h = self.norm(self.first(x)) + (self.time(t) + self.label(y))[:, :, None, None]
        h = self.dropout(self.mix(F.silu(h)))
        q, k, v = self.qkv(h.flatten(2).transpose(1, 2)).chunk(3, -1)
        attended = self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])
        return self.last(h + attended.transpose(1, 2).unflatten(2, h.shape[2:]))


def net(**changes) -> Net:
    torch.manual_seed(0)
    return Net(**changes)


def net_inputs(rows: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return torch.randn(rows, 1, 4, 4), torch.randn(rows, 4), torch.randint(0, 5, (rows,))


def clipper_of(model, *, augmult=2, **performance) -> GhostClipper:
    return GhostClipper(model, max_grad_norm=C, augmult=augmult, performance=Performance(**performance))


def step(clipper, run) -> Clipped:
    """A step on losses ``run()``."""
    clipper.zero_grad()
    with clipper:
        norms = clipper.backward(run()).norms
    return Clipped(norms, {n.removeprefix("_orig_mod."): p.grad.clone() for n, p in clipper.parameters.items()})


def check(got: Clipped, model, inputs, *, augmult=2, losses=losses) -> None:
    settings = {"augmult": augmult, "max_grad_norm": C}
    plain = per_example(model, losses, inputs, **settings, dtype=torch.float32)
    assert_as_good_as_torch(got, plain, per_example(model, losses, inputs, **settings))


def fullgraph(model):
    return torch.compile(model, fullgraph=True)


def test_unet_of_diffusers(spy) -> None:
    """Every form and K: the first step of a clipper runs eagerly, the others run the one private graph."""
    torch.manual_seed(0)
    model, inputs = unet(), unet_inputs(6)
    compiled = fullgraph(model)
    for augmult in (1, 3):
        settings = {"augmult": augmult, "max_grad_norm": C}
        exact = per_example(model, losses, inputs, **settings)
        plain = per_example(model, losses, inputs, **settings, dtype=torch.float32)
        for form in FORMS:
            clipper = clipper_of(model, augmult=augmult, form=form)
            assert_as_good_as_torch(step(clipper, lambda: losses(compiled, inputs)), plain, exact)
            runs, seen = spy.runs, spy.seen
            assert_as_good_as_torch(step(clipper, lambda: losses(compiled, inputs)), plain, exact)
            assert (spy.runs, spy.seen) == (runs + 1, seen)
    assert spy.compiled == 1


def test_inductor_compiles_forward_and_backward_once(spy, monkeypatch) -> None:
    from torch._inductor import compile_fx

    graphs = []

    def inner(graph, inputs, **options):
        graphs.append(graph)
        return compile_fx.compile_fx_inner(graph, inputs, **options)

    assert COMPILER == "inductor"
    monkeypatch.setattr(private, "COMPILER", functools.partial(compile_fx.compile_fx, inner_compile=inner))
    model, inputs = net(), net_inputs(48)
    compiled, clipper, eager = fullgraph(model), clipper_of(model), clipper_of(model)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        for number in range(5):  # the weights change after 0, 1, 2, 3: ownership is shown again, on the compiled graph
            seen = spy.seen
            check(step(clipper, lambda: losses(compiled, inputs)), model, inputs)
            assert (spy.seen == seen) == (number > 0)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.01 * torch.randn_like(p))
    assert (spy.compiled, spy.runs, len(graphs)) == (1, 4, 2)
    step(eager, lambda: losses(model, inputs))
    peak = peak_storages(lambda: step(clipper, lambda: losses(compiled, inputs)))
    assert peak <= peak_storages(lambda: step(eager, lambda: losses(model, inputs))), "gradients wait for each other"
    nodes = [node for graph in graphs for node in graph.graph.nodes if "convolution_backward" in str(node.target)]
    assert [node.args[-1][1:] for node in nodes] == [[False, False]]  # no gradients of weights and biases


@pytest.mark.parametrize("form", FORMS)
def test_what_is_handed_over_may_be_written_over(form, monkeypatch) -> None:
    """As inductor does with what its graph reads no more: nothing of it may be kept."""
    usual = Tape.record

    def lending(self, use, saved, g):
        assert use.lent
        lent = [t.clone() for t in (g, *saved)]
        usual(self, use, tuple(lent[1:]), lent[0])
        for t in lent:
            t.fill_(7)

    model, inputs = net(), net_inputs(6)
    compiled, clipper = fullgraph(model), clipper_of(model, form=form)
    step(clipper, lambda: losses(compiled, inputs))
    monkeypatch.setattr(Tape, "record", lending)
    for _ in range(2):
        check(step(clipper, lambda: losses(compiled, inputs)), model, inputs)


def test_a_gradient_that_inductor_writes_into(monkeypatch) -> None:
    """The backward pass of ``index_put`` puts zeros into its gradient, in place where nothing reads that afterwards."""

    class Puts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False), nn.Linear(6, 3)
            self.register_buffer("rows", torch.arange(8).view(8, 1))
            self.register_buffer("places", torch.tensor([[0, 1, 2]]))
            self.register_buffer("zero", torch.zeros(()))

        def forward(self, x):
            at = (self.rows[: x.shape[0]], self.places)
            return self.c(torch.index_put(self.b(x), at, self.zero) + self.a(x))

    monkeypatch.setattr(private, "COMPILER", COMPILER)
    torch.manual_seed(0)
    model, x = Puts(), (torch.randn(8, 4),)
    compiled, clipper = fullgraph(model), clipper_of(model, augmult=1, form="direct")
    for _ in range(3):
        check(step(clipper, lambda: losses(compiled, x)), model, x, augmult=1)


def test_a_compiled_part_inside_a_checkpoint(spy) -> None:
    """Runs eagerly, which is said: what was saved of it is computed again, and another run is another's."""

    class Checkpoints(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.last = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 3)
            self.part.compile()

        def forward(self, x):
            return self.last(checkpoint(self.part, x, use_reentrant=False))

    torch.manual_seed(0)
    model, x = Checkpoints(), (torch.randn(6, 4),)
    clipper = clipper_of(model)
    with pytest.warns(UserWarning, match="inside an activation checkpoint"):
        check(step(clipper, lambda: losses(model, x)), model, x)
    for _ in range(2):
        check(step(clipper, lambda: losses(model, x)), model, x)


def test_inductor_and_a_unet_that_it_gets_wrong_by_itself(spy, monkeypatch) -> None:
    """torch 2.13 on the CPU makes most gradients of this network 0 when it chooses memory formats: ours does not."""
    monkeypatch.setattr(private, "COMPILER", COMPILER)
    torch.manual_seed(0)
    model = unet(sample_size=16, block_out_channels=(32, 64), norm_num_groups=32, down_block_types=("DownBlock2D",) * 2,
                 up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    rest = unet_inputs(2)[1:]
    inputs = (torch.randn(2, 1, 16, 16), *rest)
    compiled, clipper = fullgraph(model), clipper_of(model)
    for _ in range(2):
        check(step(clipper, lambda: losses(compiled, inputs)), model, inputs)
    assert (spy.compiled, spy.runs) == (1, 1)


def test_weights_in_channels_last_stay_eager() -> None:
    """On the CPU: torch 2.13 gives a gradient that is 17% off."""
    model, inputs = net().to(memory_format=torch.channels_last), net_inputs(4)
    compiled, clipper = torch.compile(model), clipper_of(model)
    for _ in range(2):
        with pytest.warns(UserWarning, match="weights are channels_last: conv2d with") if _ == 0 else nullcontext():
            check(step(clipper, lambda: losses(compiled, inputs)), model, inputs)


def test_a_function_and_other_sizes(spy) -> None:
    model = net()
    compiled = torch.compile(lambda *inputs: losses(model, inputs), fullgraph=True)
    clipper = clipper_of(model)
    for rows in (6, 4, 8, 6, 4, 8, 6, 4, 8):  # torch.compile makes one graph for 6 and, later, one for any number
        seen = spy.seen
        inputs = net_inputs(rows)
        check(step(clipper, functools.partial(compiled, *inputs)), model, inputs)
    assert spy.seen == seen
    assert (spy.compiled, spy.runs) == (3, 5)


@pytest.mark.parametrize("augmult", [1, 2])
def test_the_form_example(spy, augmult) -> None:
    """A batch of one example is differentiated by autograd itself, through the compiled graph."""
    model, inputs = net(), net_inputs(augmult)
    compiled, clipper = fullgraph(model), clipper_of(model, augmult=augmult, form="example")
    for _ in range(3):
        check(step(clipper, lambda: losses(compiled, inputs)), model, inputs, augmult=augmult)
    assert spy.runs == 2


COMPILED = [
    *("weight-norm", "weight-standardised", "weights-joined", "weight-masked", "used-twice", "tied-embedding"),
    *("frozen-half", "relu-in-place", "multiply", "subtract", "positions-by-index", "table-by-label", "raw-attention"),
    *("einsum", "class-token"),
]
EAGER = ["bias-in-place", "checkpointed", "multi-head-attention", "transformer-layer"]


@pytest.mark.filterwarnings("ignore:dpfast has no rule")
@pytest.mark.parametrize("case", [c for c in PATTERNS if c.name in COMPILED + EAGER], ids=lambda case: case.name)
def test_patterns(case: Case, spy) -> None:
    """What has no private graph runs eagerly, which is said once."""
    model, inputs = case.build(rows=6)
    compiled, clipper = fullgraph(model), clipper_of(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            check(step(clipper, lambda: losses(compiled, inputs)), model, inputs)
    reasons = [str(w.message) for w in said if "runs eagerly" in str(w.message)]
    assert len(reasons) == (case.name in EAGER)
    assert spy.runs == (0 if case.name in EAGER else 2)


@torch.compiler.allow_in_graph
def linear_and_more(x, weight):
    return F.linear(x, weight).relu_()


def test_a_call_that_does_more_than_the_use_inside_it(spy) -> None:
    """``torch.compile`` may take a function for one call: its use must not stand for the whole."""

    class Opaque(nn.Linear):
        def forward(self, x):
            return linear_and_more(x, self.weight) + self.bias

    torch.manual_seed(0)
    model, inputs = Opaque(5, 6), (torch.randn(6, 5),)
    compiled, clipper = fullgraph(model), clipper_of(model)
    with pytest.warns(UserWarning, match="runs eagerly.*linear_and_more does more than the use inside it"):
        check(step(clipper, lambda: losses(compiled, inputs)), model, inputs)
    check(step(clipper, lambda: losses(compiled, inputs)), model, inputs)
    assert spy.runs == 0


def test_what_cannot_be_compiled_runs_eagerly(monkeypatch) -> None:
    def broken(*_):
        raise NotImplementedError("[6, 1, 4, 4]")

    monkeypatch.setattr(private, "COMPILER", broken)
    model, inputs = net(), net_inputs(6)
    compiled, clipper = fullgraph(model), clipper_of(model)
    step(clipper, lambda: losses(compiled, inputs))
    with pytest.warns(UserWarning, match=r"runs eagerly.*could not be compiled \(NotImplementedError\)$"):
        check(step(clipper, lambda: losses(compiled, inputs)), model, inputs)


def test_blocks_that_share_a_graph(spy) -> None:
    """One graph, three sets of parameters: each is looked at, and reported under its own name."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(5), nn.Linear(5, 5)

        def forward(self, x):
            return x + self.inner(self.norm(x)).tanh()

    torch.manual_seed(0)
    model, inputs = nn.Sequential(Block(), Block(), Block()), (torch.randn(6, 7, 5),)
    for block in model:
        block.compile(fullgraph=True)
    clipper = clipper_of(model)
    for _ in range(3):
        check(step(clipper, lambda: losses(model, inputs)), model, inputs)
    assert (spy.compiled, spy.runs) == (2, 6)  # the first block's input needs no gradient


class Counting:
    """A backend for outside the block; counts what it compiled and what ran."""

    compiled = runs = 0

    def __call__(self, graph, _inputs):
        self.compiled += 1

        def run(*inputs):
            self.runs += 1
            return graph(*inputs)

        return run


@pytest.mark.parametrize("given", ["model", "compiled"])
def test_inside_and_outside_take_turns(spy, given) -> None:
    model, inputs, ordinary = net(), net_inputs(6), Counting()
    compiled = torch.compile(model, fullgraph=True, backend=ordinary)
    clipper = clipper_of(model if given == "model" else compiled)
    for turn in range(1, 4):
        clipper.zero_grad()
        losses(compiled, inputs).mean().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        expected = torch.autograd.grad(losses(model, inputs).mean(), list(model.parameters()))
        torch.testing.assert_close(grads, list(expected))
        assert (ordinary.compiled, ordinary.runs, spy.runs) == (1, turn, max(0, turn - 2))
        check(step(clipper, lambda: losses(compiled, inputs)), model, inputs)
        assert (ordinary.runs, spy.runs) == (turn, turn - 1)


def test_a_second_clipper_looks_for_itself(spy) -> None:
    model, inputs = net(), net_inputs(6)
    compiled, first = fullgraph(model), clipper_of(model)
    for _ in range(2):
        step(first, lambda: losses(compiled, inputs))
    for p in (model.first.weight, model.qkv.weight):
        p.requires_grad_(False)
    second = clipper_of(model)
    seen = spy.seen
    check(step(second, lambda: losses(compiled, inputs)), model, inputs)
    assert spy.seen > seen
    check(step(second, lambda: losses(compiled, inputs)), model, inputs)
    assert (spy.compiled, spy.runs) == (2, 2)


# Guarantees


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": lambda h: h - h.mean(0, keepdim=True)}, "other examples|changes the model's output"),
        ({"mix": lambda h: h - h.mean(0, keepdim=True).detach()}, "changes the model's output for another example"),
        ({"norm": lambda: nn.BatchNorm2d(6)}, r"norm\.weight.*batch_norm in training mode mixes"),
    ],
    ids=["mean", "mean-behind-detach", "batch-norm"],
)
def test_what_mixes_rows_is_refused(changes, message, spy) -> None:
    model, inputs = net(**changes), net_inputs(6)
    compiled, clipper = fullgraph(model), clipper_of(model)
    for _ in range(2):
        with pytest.raises(CaptureError, match=message):
            step(clipper, lambda: losses(compiled, inputs))
        assert all(p.grad is None for p in model.parameters())
    assert spy.runs == 0


def test_losses_that_mix_later_are_refused_on_the_compiled_graph(spy) -> None:
    model, inputs = net(), net_inputs(6)
    compiled, clipper = fullgraph(model), clipper_of(model)
    for _ in range(2):
        step(clipper, lambda: losses(compiled, inputs))

    def centred():
        out = compiled(*inputs)
        return (out - out.mean(0)).square().flatten(1).mean(1)

    with pytest.raises(CaptureError, match="reaches rows of other examples"):
        step(clipper, centred)
    assert all(p.grad is None for p in model.parameters())
    assert spy.runs == 2


def test_a_second_backward_pass_and_a_stray_one_are_refused() -> None:
    model, inputs = net(), net_inputs(6)
    compiled, clipper = fullgraph(model), clipper_of(model)
    step(clipper, lambda: losses(compiled, inputs))
    with pytest.raises(CaptureError, match=r"back-propagated outside clipper\.backward"), clipper:
        losses(compiled, inputs).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with clipper:
        old = losses(compiled, inputs)
        clipper.backward(losses(compiled, inputs))
        with pytest.raises(CaptureError, match=r"forward pass before the last clipper\.backward"):
            clipper.backward(old)


def test_weights_changed_after_their_use_are_refused() -> None:
    model, inputs = net(), net_inputs(6)
    compiled, clipper = fullgraph(model), clipper_of(model)
    step(clipper, lambda: losses(compiled, inputs))
    clipper.zero_grad()
    with clipper:
        values = losses(compiled, inputs)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            model.last.weight.mul_(2)
        with pytest.raises(CaptureError, match=r"last\.weight.*changed"):
            clipper.backward(values)


def test_a_buffer_that_is_changed_is_refused() -> None:
    class Remembers(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, x, t, y):
            self.mean.add_(x.detach().mean())
            return super().forward(x, t, y)

    model, inputs = Remembers(), net_inputs(6)
    compiled, clipper = fullgraph(model), clipper_of(model)
    for _ in range(2):
        with pytest.raises(CaptureError, match="private data"):
            step(clipper, lambda: losses(compiled, inputs))
        assert not model.mean.any()


def test_an_example_that_is_not_finite_contributes_nothing(spy) -> None:
    model, inputs = net(), net_inputs(6)
    compiled, clipper = fullgraph(model), clipper_of(model, augmult=1)
    step(clipper, lambda: losses(compiled, inputs))
    whole = tuple(torch.cat([x[:2], x[:1], x[2:]]) for x in inputs)
    whole[0][2] = float("inf")
    for _ in range(2):
        got = step(clipper, lambda: losses(compiled, whole))
    assert spy.runs == 1
    kept = Clipped(got.norms[torch.arange(7) != 2], got.sums)
    check(kept, model, inputs, augmult=1)


# Modes


def test_dropout_is_drawn_anew_in_each_step(spy) -> None:
    model, inputs = net(dropout=0.5), net_inputs(6)
    compiled, clipper = fullgraph(model), clipper_of(model)
    norms = [step(clipper, lambda: losses(compiled, inputs)).norms for _ in range(4)]
    assert spy.runs == 3
    assert not torch.equal(norms[2], norms[3])
    torch.manual_seed(3)
    again = [step(clipper, lambda: losses(compiled, inputs)).norms for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(step(clipper, lambda: losses(compiled, inputs)).norms, again[0])


def test_autocast(spy) -> None:
    model, inputs = net(), net_inputs(6)
    compiled, eager, private = fullgraph(model), clipper_of(model), clipper_of(model)

    def run(module):
        with torch.autocast("cpu", torch.bfloat16):
            return losses(module, inputs).float()

    for _ in range(2):
        expected, got = step(eager, lambda: run(model)), step(private, lambda: run(compiled))
    assert spy.runs == 1
    torch.testing.assert_close(got.norms, expected.norms, rtol=1e-2, atol=0)


def test_forward_passes_without_gradients(spy) -> None:
    """Self-conditioning: the model's own output, without gradients, is an input."""
    model, inputs = net(), net_inputs(6)
    compiled, clipper = fullgraph(model), clipper_of(model)

    def run(module, rows):
        with torch.no_grad():
            x = rows[0] + module(*rows)
        return losses(module, (x, *rows[1:]))

    for _ in range(3):
        check(step(clipper, lambda: run(compiled, inputs)), model, inputs, losses=run)
    assert spy.runs == 4


@pytest.mark.parametrize("given", ["model", "compiled"])
def test_force_eager_is_respected(spy, given) -> None:
    model, inputs = net(), net_inputs(6)
    compiled = fullgraph(model)
    clipper = clipper_of(model if given == "model" else compiled)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):
            check(step(clipper, lambda: losses(compiled, inputs)), model, inputs)
    assert spy.runs == 0


def test_performance_compile(spy) -> None:
    """The clipper compiles the model's calls by itself; outside, the model is an eager one."""
    model, inputs = net(), net_inputs(6)
    before = set(vars(model))
    clipper = clipper_of(model, compile=True)
    for _ in range(3):
        check(step(clipper, lambda: losses(model, inputs)), model, inputs)
    assert (spy.compiled, spy.runs) == (1, 2)
    assert set(vars(model)) == before
    copy.deepcopy(model)(*inputs)
    model(*inputs)
    assert spy.runs == 2


def test_a_step_leaves_no_activations_behind() -> None:
    model, inputs = net(), net_inputs(6)
    compiled, clipper = fullgraph(model), clipper_of(model)

    def tensors_after_a_step() -> int:
        step(clipper, lambda: losses(compiled, inputs))
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for _ in range(2):
        tensors_after_a_step()
    gc.collect()
    gc.disable()
    try:
        first = tensors_after_a_step()
        assert tensors_after_a_step() == first
    finally:
        gc.enable()
