"""The classifier and the Frechet distance."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dpfast.data import ImageSet, RowKeys, font_digits, real_digits
from dpfast.errors import DataError
from dpfast.evaluation import (
    ClassifierObjective,
    ClassifierSpec,
    accuracy,
    build_classifier,
    predict_classes,
    train_classifier,
)
from dpfast.evaluation.extractors import extractor_name
from dpfast.evaluation.frechet import frechet_distance
from dpfast.evaluation.intervals import accuracy_interval, differ

QUICK = ClassifierSpec(widths=(8, 16), steps=80, batch_size=64)


@pytest.fixture(scope="module")
def fold():
    return real_digits("train", fold=0), real_digits("test", fold=0)


@pytest.fixture(scope="module")
def reader(fold):
    return train_classifier(fold[0], spec=QUICK, seed=0)


def test_reads_real_digits(fold, reader):
    assert accuracy(reader, fold[1]) > 0.9


def test_training_is_fixed_by_its_seed_and_leaves_global_state(fold):
    spec = ClassifierSpec(widths=(8, 8), steps=3, batch_size=16)
    state = torch.get_rng_state()
    first, again, other = (train_classifier(fold[0], spec=spec, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_private_objective_gives_one_loss_per_row(fold):
    dataset = fold[0]
    model = build_classifier(dataset, QUICK, seed=0)
    images, labels = dataset.images[:5], dataset.labels[:5]
    losses = ClassifierObjective()(model, images, labels, RowKeys(0, torch.arange(5), 0, 3))
    assert losses.shape == (15,)
    part = ClassifierObjective()(model, images[3:], labels[3:], RowKeys(0, torch.tensor([3, 4]), 0, 3))
    torch.testing.assert_close(part, losses[9:], rtol=1e-5, atol=1e-6)
    unmoved = ClassifierObjective(augment=ClassifierObjective().augment.__class__())
    plain = unmoved(model, images, labels, RowKeys(0, torch.arange(5), 0, 1))
    torch.testing.assert_close(plain, F.cross_entropy(model(images), labels, reduction="none"))


def test_the_network_mixes_no_rows(fold):
    model = build_classifier(fold[0], ClassifierSpec(), seed=0)
    assert 30_000 <= sum(p.numel() for p in model.parameters()) <= 60_000
    images = fold[0].images[:4]
    changed = images.clone()
    changed[0] = 255 - changed[0]
    torch.testing.assert_close(model(changed)[1:], model(images)[1:], rtol=1e-5, atol=1e-6)


def test_empty_sets_are_refused(reader):
    empty = font_digits(0, seed=0)
    with pytest.raises(DataError, match="empty"):
        train_classifier(empty, seed=0)
    with pytest.raises(DataError, match="empty"):
        accuracy(reader, empty)
    assert predict_classes(reader, empty.images).shape == (0,)


def test_frechet_against_its_formula(reader, fold):
    real, fonts = fold[0], font_digits(1000, seed=0)
    value = frechet_distance(reader, real, fonts)
    a, b = (reader.features(s.images).detach().double().numpy() for s in (real, fonts))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.clip(np.linalg.eigvals(cov_a @ cov_b).real, 0, None)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert value == pytest.approx(expected, rel=1e-4)
    assert value > 10 * abs(frechet_distance(reader, real, real))


def test_an_extractor_is_named_by_the_public_images_it_knows(reader, fold):
    assert extractor_name("fonts") == "digits-cnn-fonts"
    assert extractor_name("imagenet32") == "small-cnn-imagenet32"
    broken = copy.deepcopy(reader)
    torch.nn.init.constant_(next(broken.parameters()), math.nan)
    for public, said in (({}, "digits-cnn-fonts"), ({"public": "imagenet32"}, "small-cnn-imagenet32")):
        with pytest.raises(DataError, match=said):
            frechet_distance(broken, fold[0], fold[1], **public)


def test_frechet_needs_two_images(reader, fold):
    one = fold[0].select([0])
    with pytest.raises(DataError, match="two images"):
        frechet_distance(reader, one, fold[0])


def test_classes_that_never_occur_are_fine(fold):
    real = fold[0]
    small = ImageSet(real.images[:20], torch.zeros(20, dtype=torch.int64), real.classes)
    model = train_classifier(small, spec=ClassifierSpec(widths=(8, 8), steps=20, batch_size=8), seed=0)
    assert accuracy(model, small) == 1.0


def test_wilson_interval_inverts_the_score_test():
    low, high = accuracy_interval(0.9, 360)
    for end in (low, high):
        assert abs(0.9 - end) / (end * (1 - end) / 360) ** 0.5 == pytest.approx(1.96, abs=1e-3)
    assert accuracy_interval(1.0, 360) == (pytest.approx(1 - 1.96**2 / (360 + 1.96**2), abs=1e-4), 1.0)
    assert accuracy_interval(0.0, 10)[0] == 0.0


def test_differences_are_called_so_at_the_stated_rate():
    """Two classifiers of one accuracy, read on images of their own, differ "measurably" in 5% of cases or fewer."""
    random = np.random.default_rng(0)
    shares = random.binomial(360, 0.95, size=(4000, 2)) / 360
    found = np.mean([differ(first, second, 360) for first, second in shares])
    assert 0.02 < found < 0.06
    assert differ(0.95, 0.99, 360)
    assert not differ(1.0, 1.0, 360)
