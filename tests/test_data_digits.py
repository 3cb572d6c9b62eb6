"""Image sets, the split of the real scans, and the rendered fonts."""

import pytest
import torch

from dpfast.data import ImageSet, font_digits, real_digits
from dpfast.data.images import to_signed, to_uint8
from dpfast.errors import ConfigError, DataError


def as_rows(dataset: ImageSet) -> set[tuple[int, ...]]:
    return {tuple(row) for row in dataset.images.flatten(1).tolist()}


def test_real_split_is_stratified_and_disjoint():
    train, test = real_digits("train"), real_digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.image_shape == (1, 8, 8)
    assert train.num_classes == 10
    assert int(train.images.max()) == 255
    assert train.images.dtype == torch.uint8
    assert test.labels.bincount().min() >= 34
    assert test.labels.bincount().max() <= 38
    assert not as_rows(train) & as_rows(test)


def test_the_split_never_changes():
    """A changed split would mix scans that settings were chosen on into the test."""
    assert real_digits("train").fingerprint()[:16] == "e2ba015cfcef1f3b"
    assert real_digits("test").fingerprint()[:16] == "e66d65527c23af0d"


def test_folds_partition_the_training_part():
    train, test = as_rows(real_digits("train")), as_rows(real_digits("test"))
    held_out = [real_digits("test", fold=fold) for fold in range(5)]
    assert sum(map(len, held_out)) == 1437
    assert set().union(*map(as_rows, held_out)) == train
    for fold in range(5):
        kept = as_rows(real_digits("train", fold=fold))
        assert not kept & as_rows(held_out[fold])
        assert not kept & test


def test_bad_split_and_fold():
    with pytest.raises(ConfigError, match="split must be"):
        real_digits("validation")
    with pytest.raises(ConfigError, match=r"0\.\.4"):
        real_digits("train", fold=5)


def test_fonts_are_fixed_by_the_seed_and_balanced():
    state = torch.get_rng_state()
    first, again, other = font_digits(300, seed=1), font_digits(300, seed=1), font_digits(300, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert first.labels.bincount().tolist() == [30] * 10
    assert first.images.shape == (300, 1, 8, 8)
    assert font_digits(20, seed=1, size=16).images.shape == (20, 1, 16, 16)


def test_every_font_image_shows_a_digit():
    images = font_digits(1000, seed=4).images.float() / 255
    ink = images.mean((1, 2, 3))
    assert float(ink.min()) > 0.02
    assert float(ink.max()) < 0.8
    assert bool((images.amax((1, 2, 3)) > 0.3).all())


def test_image_set_names_every_problem():
    with pytest.raises(DataError) as caught:
        ImageSet(torch.zeros(3, 8, 8), torch.tensor([0, 5], dtype=torch.int32), ("a", "b"))
    message = str(caught.value)
    for part in ("uint8", "[n, C, H, W]", "int64", "one per image", "0..1"):
        assert part in message


def test_select_copies():
    dataset = real_digits("train")
    part = dataset.select([2, 0])
    assert len(part) == 2
    assert torch.equal(part.images[1], dataset.images[0])
    part.images.zero_()
    assert int(dataset.images[0].max()) > 0


def test_pixels_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_signed(pixels)), pixels)
    assert to_signed(pixels).min() == -1
    assert to_signed(pixels).max() == 1
