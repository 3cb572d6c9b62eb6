"""The classifiers by name: published sizes, published shapes, and training that streams."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpfast import GhostClipper
from dpfast.data import Augment, ImageSet, RowKeys, real_digits
from dpfast.data.images import batch_indices, to_signed
from dpfast.errors import CaptureError, ConfigError
from dpfast.evaluation import (
    ClassifierSpec,
    WideResNet,
    accuracy,
    build_classifier,
    predict_classes,
    predict_probabilities,
    train_classifier,
)
from dpfast.evaluation.networks import norm_layer
from dpfast.seeding import seeded

NAMES = ["small-cnn", "wrn-16-1", "wrn-16-4", "wrn-40-4", "resnet-18"]


def images(count, side=32, channels=3, classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count) % classes, tuple(str(c) for c in range(classes)))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def build(network, **changes):
    return build_classifier(images(1), ClassifierSpec(network=network, **changes), seed=0)


@pytest.mark.parametrize(
    ("depth", "widen", "millions"),
    [(40, 1, 0.6), (40, 2, 2.2), (40, 4, 8.9), (40, 8, 35.7), (28, 10, 36.5), (16, 8, 11.0)],
)
def test_wide_resnets_have_the_sizes_of_their_paper(depth, widen, millions):
    with torch.device("meta"):
        model = WideResNet(3, 10, depth=depth, widen=widen, norm=norm_layer("batch", 1))
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.051)
    # Of 40 layers, 37 are 3x3 convolutions beside the shortcuts; the paper counts two of these and the linear layer.
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.kernel_size == (3, 3) for m in convs) == depth - 3
    assert sum(m.kernel_size == (1, 1) for m in convs) == (3 if widen > 1 else 2)


def test_sizes_are_known_and_the_norm_does_not_change_them():
    sizes = {name: parameters(build(name)) for name in NAMES}
    assert sizes["resnet-18"] == 11_173_962
    assert sizes["wrn-40-4"] == pytest.approx(8.95e6, rel=2e-3)
    assert {name: parameters(build(name, norm="batch")) for name in NAMES} == sizes


def test_a_depth_that_makes_no_blocks_is_refused():
    with pytest.raises(ConfigError, match="6 n"):
        WideResNet(3, 10, depth=18, widen=1, norm=norm_layer("group", 8))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3)])
def test_logits_are_the_head_of_the_features(name, norm, side, channels):
    given = images(2, side, channels)
    model = build_classifier(given, ClassifierSpec(network=name, norm=norm), seed=0).eval()
    features = model.features(given.images)
    assert features.shape == (2, model.num_features)
    torch.testing.assert_close(model(given.images), model.head(features))
    torch.testing.assert_close(model(to_signed(given.images)), model(given.images))
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.GroupNorm | nn.BatchNorm2d)}
    assert kinds == {nn.GroupNorm if norm == "group" else nn.BatchNorm2d}
    assert predict_classes(model, given.images[:0]).shape == (0,)


def test_a_wide_block_is_pre_activated():
    """relu(norm) comes first, and where the width changes the shortcut reads what it gives."""
    _, first, second = next(build("wrn-16-1").body.children()), *list(build("wrn-16-4").body.children())[1:3]
    x = torch.randn(2, 16, 8, 8)
    active = F.relu(first.activation[0](x))
    torch.testing.assert_close(first(x), first.residual(active) + F.conv2d(active, first.shortcut.weight))
    y = first(x)
    assert second.shortcut is None
    torch.testing.assert_close(second(y) - second.residual(F.relu(second.activation[0](y))), y)


@pytest.mark.parametrize("name", NAMES[1:])
def test_signals_keep_their_size_at_the_start(name):
    with torch.no_grad():
        logits = build(name, norm="batch").train()(images(8).images)
    assert 0.05 < float(logits.std()) < 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network": "vgg"}, "expected one of small-cnn, wrn-16-1"),
        ({"norm": "layer"}, "expected one of group, batch"),
        ({"optimizer": "adam"}, "expected one of adamw, sgd"),
        ({"network": "wrn-40-4", "groups": 32}, r"\(16, 64, 128, 256\) must be multiples of groups=32"),
        ({"widths": (12, 24)}, "groups=8"),
    ],
)
def test_wrong_specs_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        ClassifierSpec(**changes)


def test_only_group_norm_can_be_trained_privately():
    given = images(4, 8, 1)
    for norm, refused in (("group", False), ("batch", True)):
        model = build_classifier(given, ClassifierSpec(network="wrn-16-1", norm=norm), seed=0).train()
        clipper = GhostClipper(model, max_grad_norm=1.0)
        try:
            with clipper:
                losses = F.cross_entropy(model(to_signed(given.images)), given.labels, reduction="none")
                clipper.backward(losses)
        except CaptureError:
            assert refused
        else:
            assert not refused
            assert all(p.grad is not None for p in model.parameters())


def test_one_step_of_the_papers_classifier():
    """SGD with Nesterov momentum, its first step by hand: lr (1 + momentum) (gradient + weight decay * weight)."""
    given = images(8, 16)
    spec = ClassifierSpec(
        network="wrn-40-4", norm="batch", optimizer="sgd", learning_rate=0.1, weight_decay=5e-4, batch_size=8, steps=1,
        warp=0.0, pixel_noise=0.0, augment=Augment(flip=True, shift=4, fill=-1.0),
    )  # fmt: skip
    trained = train_classifier(given, spec=spec, seed=3)
    expected = build_classifier(given, spec, seed=3).train()
    ids = batch_indices(8, 8, 0, seed=3)
    rows = spec.augment(to_signed(given.images[ids]), RowKeys(3, ids, 0))
    assert not torch.equal(rows, to_signed(given.images[ids]))
    F.cross_entropy(expected(rows), given.labels[ids], label_smoothing=0.1).backward()
    schedule = torch.optim.lr_scheduler.OneCycleLR(torch.optim.SGD(expected.parameters()), max_lr=0.1, total_steps=1)
    for ours, theirs in zip(trained.parameters(), expected.parameters(), strict=True):
        stepped = theirs - schedule.get_last_lr()[0] * 1.9 * (theirs.grad + 5e-4 * theirs)
        torch.testing.assert_close(ours, stepped, rtol=1e-4, atol=1e-6)


def test_sgd_learns():
    train, test = real_digits("train", fold=0), real_digits("test", fold=0)
    spec = ClassifierSpec(
        widths=(8, 16), norm="batch", optimizer="sgd", learning_rate=0.1, weight_decay=5e-4, steps=150,
        augment=Augment(shift=1, fill=-1.0), warp=0.0, pixel_noise=0.0,
    )  # fmt: skip
    assert accuracy(train_classifier(train, spec=spec, seed=0), test) > 0.9


def test_the_digits_recipe_trains_as_it_did_on_the_whole_set_as_floats():
    """The loop as it was before images were streamed, bit by bit."""
    given, spec, seed = real_digits("train", fold=0), ClassifierSpec(widths=(8, 16), steps=5), 7
    with seeded(seed):
        old = build_classifier(given, spec, seed=seed).train()
    whole, generator = to_signed(given.images), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(old.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=spec.learning_rate, total_steps=spec.steps)
    for step in range(spec.steps):
        ids = batch_indices(len(given), spec.batch_size, step, seed=seed)
        jitter = torch.empty(spec.batch_size, 2, 3).uniform_(-0.12, 0.12, generator=generator)
        grid = F.affine_grid(torch.eye(2, 3) + jitter, [spec.batch_size, 1, 8, 8], align_corners=False)
        warped = F.grid_sample(whole[ids] + 1.0, grid, align_corners=False) - 1.0
        rows = warped + 0.1 * torch.randn(warped.shape, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(old(rows), given.labels[ids], label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()
    new = train_classifier(given, spec=spec, seed=seed)
    for ours, theirs in zip(new.parameters(), old.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_subset_trains_as_a_set_of_its_own():
    given, spec = real_digits("train", fold=0), ClassifierSpec(widths=(8, 8), steps=4, batch_size=16)
    chosen = torch.arange(5, 400, 3)
    of_part = train_classifier(given, spec=spec, seed=0, subset=chosen)
    alone = train_classifier(given.select(chosen), spec=spec, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(of_part.parameters(), alone.parameters(), strict=True))


def test_probabilities_agree_with_classes_in_any_chunks():
    given = images(50, 8, 1)
    model = build_classifier(given, ClassifierSpec(), seed=0).train()
    probabilities = predict_probabilities(model, given.images, batch_size=7)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(50))
    torch.testing.assert_close(probabilities, predict_probabilities(model, given.images))
    assert torch.equal(probabilities.argmax(1), predict_classes(model, given.images))
    assert model.training


def anonymous_megabytes():
    """Memory of this process that is no file's: pages of a memory-mapped file can be dropped at any time."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


class Watched(nn.Module):
    """Passes logits on. No hook: torch's own code for those makes reference cycles, which keep the batches alive."""

    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def forward(self, logits):
        self.watch()
        return logits


def mapped(path, count):
    pixels = np.memmap(path, np.uint8, "w+", shape=(count, 3, 32, 32))
    return ImageSet(torch.from_numpy(pixels), torch.arange(count) % 10, tuple("0123456789"))


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """20,000 images are 61 MB as bytes and 246 MB as floats; neither is ever in memory."""
    spec = ClassifierSpec(widths=(8, 8), steps=4, batch_size=64, augment=Augment(flip=True, shift=4))
    train_classifier(mapped(tmp_path / "warm", 100), spec=spec, seed=0)
    large = mapped(tmp_path / "images", 20_000)
    before, seen = anonymous_megabytes(), []
    watch = lambda *_: seen.append(anonymous_megabytes())  # noqa: E731
    train_classifier(large, spec=spec, seed=0, progress=watch)
    reader = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10), Watched(watch))
    predict_classes(reader, large.images)
    predict_probabilities(reader, large.images)
    assert len(seen) > 4 + 2 * 20
    assert max(seen) - before < 40
