"""Ways to fine-tune: a private step moves what is meant to move, by the oracle's gradient; plain diffusers opens it."""

import copy
import sys

import pytest
import torch
from torch import nn

from dpfast import DPOptimizer, GhostClipper, Plan
from dpfast.data import RowKeys, font_digits
from dpfast.data.images import to_signed
from dpfast.diffusion import DiffusionObjective, NoiseSpec, UNetSpec, build_scheduler, build_unet
from dpfast.diffusion.finetune import attention_only, lora, merge
from dpfast.errors import ConfigError
from oracle import Clipped, assert_as_good_as_torch, per_example

SPEC = UNetSpec(widths=(8, 16), norm_groups=4, attention=(1,), mid_attention=True, attention_head_dim=4)
B, K, C = 3, 4, 0.05


def unet(spec: UNetSpec = SPEC) -> nn.Module:
    return build_unet(spec, seed=0)


WAYS = {
    "attention": (lambda: attention_only(unet()), ("attentions",)),
    "attention and classes": (lambda: attention_only(unet(), class_embedding=True), ("attentions", "class_embedding")),
    "adapters": (lambda: lora(unet(), 2), ("lora",)),
    "adapters and classes": (lambda: lora(unet(), 2, alpha=4, class_embedding=True), ("lora", "class_embedding")),
    "noise multiplicity": (unet, ("",)),
}


class Recorder(nn.Module):
    def forward(self, noisy, t, labels):
        self.rows = noisy, t, labels
        return torch.zeros_like(noisy)


def squared_error(model, rows):
    noisy, t, labels, target = rows
    return (model(noisy, t, labels).sample - target).square().flatten(1).mean(1)


@pytest.fixture(scope="module")
def batch():
    """An objective of images as they are, its arguments, and the rows that it makes of them."""
    data, keys = font_digits(B, seed=0), RowKeys(7, torch.arange(B), 1, K)
    objective = DiffusionObjective(scheduler=build_scheduler(NoiseSpec()), num_classes=10)
    recorder = Recorder()
    objective(recorder, data.images, data.labels, keys)
    clean = to_signed(data.images).repeat_interleave(K, 0)
    target = objective.target(clean, keys.normal(*clean.shape[1:], stream="noise"), recorder.rows[1])
    return objective, (data.images, data.labels, keys), (*recorder.rows, target)


@pytest.mark.parametrize("way", WAYS)
def test_a_private_step(way, batch, tmp_path) -> None:
    from diffusers import UNet2DModel

    (build, trained), (objective, arguments, rows) = WAYS[way], batch
    model = build()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in model.named_parameters() if any(part in name for part in trained)}

    before = copy.deepcopy(model.state_dict())
    settings = {"augmult": K, "max_grad_norm": C}
    exact = per_example(model, squared_error, rows, **settings)
    plain = per_example(model, squared_error, rows, **settings, dtype=torch.float32)
    clipper = GhostClipper(model, **settings)
    plan = Plan(dataset_size=10, expected_batch_size=B, max_grad_norm=C, steps=1, target_epsilon=8, target_delta=1e-2)
    optimizer = DPOptimizer(torch.optim.SGD(clipper.parameters.values(), lr=0.1), plan, clipper)
    with clipper:
        norms = clipper.backward(objective(model, *arguments)).norms
    sums = {name: p.grad.clone() for name, p in clipper.parameters.items()}
    assert_as_good_as_torch(Clipped(norms, sums), plain, exact)
    optimizer.step()
    assert {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])} == names

    saved = merge(model).eval()
    saved.save_pretrained(tmp_path)
    opened = UNet2DModel.from_pretrained(tmp_path).eval()
    assert opened.state_dict().keys() == unet().state_dict().keys()
    with torch.no_grad():
        expected = model.eval()(*rows[:3]).sample
        torch.testing.assert_close(opened(*rows[:3]).sample, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(opened(*rows[:3]).sample, saved(*rows[:3]).sample)


def test_a_merged_copy_leaves_its_model_to_be_trained() -> None:
    model = lora(unet(), 2)
    names = list(model.state_dict())
    merge(model)
    assert list(model.state_dict()) == names
    assert not hasattr(merge(model), "peft_config")


def test_adapters_begin_without_effect_and_come_from_their_seed() -> None:
    plain, rows = unet(), (torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 10]))
    state = torch.get_rng_state()
    first, again, other = (lora(unet(), 2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        torch.testing.assert_close(first(*rows).sample, plain(*rows).sample, rtol=0, atol=0)
    drawn = [torch.cat([p.flatten() for p in m.parameters() if p.requires_grad]) for m in (first, again, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_alpha_scales_the_adapters() -> None:
    deltas = []
    for alpha in (None, 6.0):
        model = lora(unet(), 2, alpha=alpha)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.fill_(0.1)
        deltas.append(merge(model).mid_block.attentions[0].to_q.weight - unet().mid_block.attentions[0].to_q.weight)
    torch.testing.assert_close(deltas[1], 3 * deltas[0], rtol=1e-4, atol=1e-6)


def test_what_cannot_be_fine_tuned_so() -> None:
    bare = UNetSpec(widths=(8, 8), norm_groups=4)
    with pytest.raises(ConfigError, match="this UNet2DModel has no attention of diffusers"):
        attention_only(unet(bare))
    with pytest.raises(ConfigError, match=r"this UNet2DModel has none of to_q, to_k, to_v, to_out\.0"):
        lora(unet(bare), 2)
    with pytest.raises(ConfigError, match=r"lora\(rank=0\): expected 1 or more"):
        lora(unet(), 0)
    with pytest.raises(ConfigError, match=r"has adapters already; merge\(model\)"):
        lora(lora(unet(), 2), 2)


@pytest.mark.parametrize("way", [attention_only, lambda model, **options: lora(model, 2, **options)])
def test_classes_of_a_network_that_knows_none(way) -> None:
    """Refused before anything is frozen."""
    model = unet()
    model.class_embedding = None
    with pytest.raises(ConfigError, match=r"this UNet2DModel knows no classes; relabel\(model, \.\.\.\) first"):
        way(model, class_embedding=True)
    assert all(p.requires_grad for p in model.parameters())


def test_without_peft(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="pip install peft"):
        lora(unet(), 2)
