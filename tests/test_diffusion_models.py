"""Networks: presets, what a specification refuses, folders of diffusers, new labels."""

import copy
import dataclasses
import json

import pytest
import torch

from cases import losses
from checks import check, fallbacks
from dpfast.diffusion import UNetSpec, build_unet, load_unet, relabel
from dpfast.diffusion.models import ADM_32, CAMELYON17, CIFAR10, MNIST
from dpfast.errors import ConfigError, FileError

ADM = {"scale_shift": True, "resblock_updown": True}
TINY = UNetSpec(widths=(8, 16), norm_groups=4, attention=(1,), mid_attention=True, attention_head_dim=4)


def parameters(spec: UNetSpec) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_unet(spec, seed=0).parameters())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (MNIST, 4_024_641),
        (CIFAR10, 83_351_811),
        (CAMELYON17, 83_351_811 - 8 * 768),
        (dataclasses.replace(ADM_32, scale_shift=True), 89_110_083),
        (dataclasses.replace(ADM_32, **ADM), 99_336_195),
    ],
    ids=["MNIST", "CIFAR10", "CAMELYON17", "scale shift", "ADM"],
)
def test_parameters_of_presets(spec, expected) -> None:
    assert parameters(spec) == expected


def inputs(rows: int, labels: int = 11):
    torch.manual_seed(1)
    return torch.randn(rows, 1, 8, 8), torch.randint(0, 1000, (rows,)), torch.randint(0, labels, (rows,))


@pytest.mark.parametrize("options", [{"scale_shift": True}, {"resblock_updown": True}, ADM], ids=str)
def test_options_of_adm_are_clipped_as_they_should(options) -> None:
    """Everything has a rule, and attention its norm."""
    model = build_unet(dataclasses.replace(TINY, **options), seed=0)
    assert model.mid_block.attentions[0].group_norm is not None
    with fallbacks() as slow:
        check(model, inputs(4), augmult=2, forms=["auto"], losses=losses)
    assert not slow


def test_heads_that_do_not_fill_the_width() -> None:
    with pytest.raises(ConfigError, match=r"attended widths \[8, 16\] must be multiples of attention_head_dim=6"):
        dataclasses.replace(TINY, attention=(0,), attention_head_dim=6)


def sample(model, labels=None):
    x, t, y = inputs(3)
    with torch.no_grad():
        return model(x, t, y if labels is None else labels).sample


def test_a_saved_folder_and_a_pipeline_of_it(tmp_path) -> None:
    model = build_unet(TINY, seed=0)
    model.save_pretrained(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "unet", str(tmp_path)):
        loaded = load_unet(folder)
        assert not loaded.training
        assert torch.equal(sample(loaded), sample(model.eval()))
    loaded.save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()


def test_folders_that_hold_something_else(tmp_path) -> None:
    with pytest.raises(FileError, match=r"config\.json cannot be read .* a folder that save_pretrained wrote"):
        load_unet(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(FileError, match="holds a AutoencoderKL; expected a UNet2DModel"):
        load_unet(tmp_path)


def test_a_pickle_is_not_opened(tmp_path) -> None:
    build_unet(TINY, seed=0).save_pretrained(tmp_path, safe_serialization=False)
    assert [path.name for path in tmp_path.glob("*.bin")]
    with pytest.raises(FileError, match="no UNet2DModel in safetensors"):
        load_unet(tmp_path)


@pytest.mark.parametrize("what", ["missing", "other shape", "torn"])
def test_weights_that_do_not_fit(tmp_path, what) -> None:
    from safetensors.torch import load_file, save_file

    build_unet(TINY, seed=0).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"] = torch.ones(3)
    if what == "missing":
        del weights["conv_in.bias"]
    save_file(weights, path)
    if what == "torn":
        path.write_bytes(path.read_bytes()[:1000])
    match = r"missing keys: conv_in\.bias" if what == "missing" else "no UNet2DModel in safetensors"
    with pytest.raises(FileError, match=match):
        load_unet(tmp_path)


@pytest.mark.parametrize("train", [True, False])
def test_new_labels(tmp_path, train) -> None:
    """A table of 4 classes and the null class, as large as the old one; nothing else changes."""
    from diffusers import UNet2DModel

    model = build_unet(TINY, seed=0).train(train)
    with torch.no_grad():
        model.class_embedding.weight *= 3
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    assert relabel(model, 4, seed=1) is model
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert list(after) == list(before)
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["class_embedding.weight"]
    table = after["class_embedding.weight"]
    assert table.shape == (5, 32)
    assert 2.5 < table.square().mean().sqrt() < 3.5
    assert model.class_embedding.training == train
    model.eval().save_pretrained(tmp_path)
    labels = torch.tensor([0, 4, 2])
    assert torch.equal(sample(UNet2DModel.from_pretrained(tmp_path).eval(), labels), sample(model, labels))


def test_new_labels_come_from_the_seed() -> None:
    tables = [relabel(build_unet(TINY, seed=0), 4, seed=seed).class_embedding.weight for seed in (1, 1, 2)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("kind", [None, "identity"])
def test_new_labels_for_a_network_without_a_table(tmp_path, kind) -> None:
    """What it computed without labels it computes with any."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    settings = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "class_embed_type": kind}
    model = UNet2DModel(**settings, **blocks, attention_head_dim=4).eval()
    x, t, _ = inputs(3)
    with torch.no_grad():
        before = model(x, t, torch.zeros(3, 32) if kind else None).sample
    relabel(model, 4, seed=0).save_pretrained(tmp_path)
    labels = torch.tensor([0, 4, 2])
    assert torch.equal(sample(model, labels), before)
    assert torch.equal(sample(load_unet(tmp_path), labels), before)


def test_what_cannot_be_relabelled() -> None:
    with pytest.raises(ConfigError, match=r"num_classes=0\): expected 1 or more"):
        relabel(build_unet(TINY, seed=0), 0, seed=0)
    with pytest.raises(ConfigError, match="a Linear has no time_embedding; expected a UNet2DModel"):
        relabel(torch.nn.Linear(2, 2), 3, seed=0)
