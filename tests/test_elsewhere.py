"""What is predicted for a GPU that is not here."""

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from dpfast.cli import app
from dpfast.clipping import plan_step
from dpfast.diffusion.models import ADM_32, build_unet
from dpfast.errors import ConfigError
from dpfast.kernels import cost
from dpfast.kernels.conv.launches import chosen, launches, measuring, shares
from dpfast.kernels.cost import Work
from dpfast.kernels.rates import H200, USUAL, named
from dpfast.runs import elsewhere

CONV = Work(128, rows=1024, inputs=9 * 384, outputs=384, pixels=384, taps=9, held=2 * 128 * 1024 * 768, brain=True)
SMALL = dataclasses.replace(ADM_32, image_size=8, widths=(32,), attention=(), layers_per_block=1, attention_head_dim=8)


def test_the_papers_unet() -> None:
    with torch.device("meta"):
        model = build_unet(ADM_32, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 83_351_811


@pytest.mark.parametrize("form", cost.FORMS)
@pytest.mark.parametrize("brain", [True, False])
def test_no_kernel_beats_the_device(form, brain) -> None:
    """Nor is any predicted to take more than a hundred times what it must."""
    for work in (
        CONV,
        dataclasses.replace(CONV, examples=1, held=CONV.held // 128),
        Work(64, 77, 130, 70, pixels=130, held=64 * 77 * 800),
    ):
        for kernel in cost.kernels(dataclasses.replace(work, brain=brain), form, H200):
            least = max(kernel.flops / (H200.library_brain if brain else H200.library), kernel.bytes * H200.load)
            assert least <= kernel.seconds
            assert kernel.seconds <= 100 * least + 1e-4


def test_flops_and_bytes_of_kernels() -> None:
    norms, total = cost.kernels(CONV, "direct", H200)
    assert norms.flops == total.flops == 2 * 128 * 1024 * 9 * 384 * 384
    assert norms.bytes == CONV.held
    stored, _ = cost.kernels(CONV, "materialise", H200)
    assert stored.bytes == CONV.held + 4 * 128 * 9 * 384 * 384
    gram, _ = cost.kernels(CONV, "gram", H200)
    assert gram.flops == 2 * 128 * 1024**2 * (384 + 384)


def test_a_predicted_cost_is_that_of_its_kernels() -> None:
    for form in cost.FORMS:
        for rates in (USUAL, H200):
            seconds = sum(kernel.seconds for kernel in cost.kernels(CONV, form, rates))
            assert cost.predict(CONV, form, rates).seconds == seconds


def test_few_programs_leave_processors_idle() -> None:
    """The first weights of few examples take as long as those of more."""

    def seconds(examples: int) -> float:
        work = dataclasses.replace(CONV, examples=examples, held=2 * examples * 1024 * 768)
        return cost.predict(work, "direct", H200).seconds

    assert seconds(1) > 0.5 * seconds(2)
    assert seconds(256) == pytest.approx(2 * seconds(128), rel=0.1)


@pytest.mark.parametrize("total", [True, False])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("described", [True, False])
def test_launches_cover_a_gradient(described, half, total) -> None:
    for examples, groups, c, p, taps in (
        (1, 1, 3, 192, 9),
        (300, 1, 192, 192, 9),
        (7, 4, 1, 1, 25),
        (2, 1, 70, 130, 1),
    ):
        found = chosen((examples, 1, groups, c, p), 77, taps, 132, described=described, total=total, half=half)
        assert found.launch in launches(described=described, total=total, half=half)
        assert found.tiles >= groups * taps * c * p / (
            found.launch.p * found.launch.rows * found.launch.c * found.launch.columns
        )
        assert 1 <= found.each <= (examples if total else 1)


@pytest.mark.parametrize("processors", [4, 108, 132])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("described", [True, False])
def test_norms_are_of_the_products_that_are_summed(described, half, processors) -> None:
    """In one order: as many positions at a time, by the same kind of matrix unit."""
    for examples, positions, channels, outputs, taps in itertools.product(
        (1, 32, 300), (20, 64, 1000), (3, 48, 192), (3, 70, 128), (1, 9)
    ):
        asked = ((examples, 1, 1, channels, outputs), positions, taps, processors)
        norms = measuring(*asked, described=described, half=half)
        total = chosen(*asked, described=described, total=True, half=half)
        assert norms.each == 1
        assert norms.launch.at_a_time(positions) == total.launch.at_a_time(positions)
        assert (norms.launch.p >= 64) == (total.launch.p >= 64)


def test_examples_are_cut_where_they_are_few() -> None:
    few, many = (
        shares((examples, 1, 1, 192, 192), 65536, 9, 132, most=128, described=True, half=True)[0]
        for examples in (4, 512)
    )
    assert few > 1
    assert many == 1
    assert (
        shares((4, 1, 1, 192, 192), 65536, 9, 132, most=3, described=True, half=True)[0] == 1
    )  # nothing that divides 3


def losses(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().flatten(1).mean(1)


def test_a_gpu_works_while_python_calls() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 8, 3))
    plan = plan_step(model, losses, (torch.randn(4, 8, 12, 12),), augmult=2, device="h200")
    assert plan.private.seconds == plan.private.calling > plan.private.working > 0
    here = plan_step(model, losses, (torch.randn(4, 8, 12, 12),), augmult=2)
    assert here.private.calling == 0
    assert {layer.name for layer in here.layers} == {layer.name for layer in plan.layers}
    assert {kernel.op for kernel in plan.kernels} >= {"group_norm_backward", "bias_grads"}


def test_a_device_that_nobody_knows() -> None:
    with pytest.raises(ConfigError, match=r"device='h300': expected h200, or none for this machine"):
        named("h300")


@pytest.fixture
def _small(monkeypatch) -> None:
    monkeypatch.setattr(elsewhere, "ADM_32", SMALL)
    monkeypatch.setattr(elsewhere, "AUGMULTS", (1, 128))
    monkeypatch.setattr(elsewhere, "named", lambda device: dataclasses.replace(named(device), memory=10**10))


@pytest.mark.usefixtures("_small")
def test_the_plan_of_every_multiplicity() -> None:
    result = CliRunner().invoke(app, ["plan", "--device", "h200", "--kernels"], catch_exceptions=False)
    lines = result.stdout.splitlines()
    assert "PREDICTED for one H200; nothing was measured" in lines[0]
    rows = [line.split() for line in lines[4:6]]
    assert [row[0] for row in rows] == ["1", "128"]
    for augmult, images, ordinary, private, ratio, *_ in rows:
        assert int(augmult) * int(images) == int(rows[0][1])
        assert float(ratio) == pytest.approx(float(private) / float(ordinary), abs=0.3)
    assert "TFLOP/s" in result.stdout


def test_the_readme_shows_what_is_predicted() -> None:
    """One of its rows, of the paper's UNet."""
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    (shown,) = re.findall(
        r"<!-- predicted: begin[^\n]*\n.*\n\| (128 .*?) \| \*[^|]*\* \|\n<!-- predicted: end", readme, re.S
    )
    rows = 128 * int(shown.split(" | ")[1])
    _, row = elsewhere.compared({128: elsewhere.Setting.of_paper().plan(rows, 128, "h200")})
    assert shown == " | ".join(row)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan"], "expected a recipe"),
        (["plan", "--device", "h300"], "expected h200, or none"),
        (["plan", "digits", "--kernels"], "leave out the recipe"),
        (["plan", "--device", "h200", "--set", "private.steps=3"], "--set needs a recipe"),
        (["plan", "digits", "--device", "a100"], "expected h200"),
    ],
)
def test_what_cannot_be_planned_says_so(arguments, words) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_recipe_on_another_device() -> None:
    result = CliRunner().invoke(app, ["plan", "digits", "--device", "h200"])
    assert result.exit_code == 0
    assert "a physical batch on h200" in result.stdout


def test_plans_need_no_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from dpfast.clipping import plan_step
model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.GroupNorm(4, 16), torch.nn.Conv2d(16, 8, 1))
print(plan_step(model, lambda m, x: m(x).flatten(1).mean(1), (torch.randn(4, 8, 9, 9),), augmult=2, device="h200"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "private step" in done.stdout
