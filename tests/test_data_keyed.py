"""Keyed randomness: independence from the batch."""

import pytest
import torch

from dpfast.data.augment import Augment
from dpfast.data.keyed import RowKeys
from dpfast.errors import ConfigError


def keys(ids: list[int], *, seed: int = 3, step: int = 5, augmult: int = 2) -> RowKeys:
    return RowKeys(seed, torch.tensor(ids, dtype=torch.int64), step, augmult)


@pytest.mark.parametrize("draw", ["uniform", "normal"])
def test_rows_belong_to_the_example(draw):
    full = getattr(keys([7, 2, 11]), draw)(3, 5, stream="a")
    part = getattr(keys([11, 7]), draw)(3, 5, stream="a")
    assert full.shape == (6, 3, 5)
    assert full.dtype == torch.float32
    assert torch.equal(part, full[[4, 5, 0, 1]])


def test_every_part_of_the_key_matters():
    base = keys([1]).uniform(8, stream="a")
    assert torch.equal(base, keys([1]).uniform(8, stream="a"))
    others = [
        keys([2]).uniform(8, stream="a"),
        keys([1], seed=4).uniform(8, stream="a"),
        keys([1], step=6).uniform(8, stream="a"),
        keys([1]).uniform(8, stream="b"),
        base.flip(0),  # the other augmentation
    ]
    assert all(not torch.equal(base, other) for other in others)
    assert torch.equal(keys([1]).uniform(3, stream="a"), base[:, :3])


def test_distributions():
    many = keys(list(range(2000)), augmult=3)
    u, z = many.uniform(9, stream="u"), many.normal(9, stream="z")
    assert float(u.min()) >= 0.0
    assert float(u.max()) < 1.0
    # Four standard errors of 54,000 draws.
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / u.numel()) ** 0.5
    assert abs(float(z.mean())) < 4 * z.numel() ** -0.5
    assert abs(float(z.var()) - 1.0) < 4 * (2 / z.numel()) ** 0.5
    assert abs(float((z[:, 0] * z[:, 1]).mean())) < 4 * len(z) ** -0.5
    assert abs(float((z.abs() < 1.959964).float().mean()) - 0.95) < 0.004


def test_empty_batch_and_bad_keys():
    empty = RowKeys(0, torch.empty(0, dtype=torch.int64), 0, 4)
    assert empty.uniform(2, stream="a").shape == (0, 2)
    assert empty.normal(2, 3, stream="a").shape == (0, 2, 3)
    with pytest.raises(ConfigError, match="int64"):
        RowKeys(0, torch.zeros(2), 0, 1)
    with pytest.raises(ConfigError, match="augmult"):
        RowKeys(0, torch.zeros(2, dtype=torch.int64), 0, 0)


def test_shifts_and_flips_are_crops_of_the_own_image():
    images = torch.arange(3 * 16, dtype=torch.float32).view(3, 1, 4, 4)
    rows = Augment(flip=True, shift=1, fill=-1.0)(images, keys([5, 6, 7], augmult=8))
    assert rows.shape == (24, 1, 4, 4)
    padded = torch.nn.functional.pad(images, [1] * 4, value=-1.0)
    crops = [[padded[i, :, y : y + 4, x : x + 4] for y in range(3) for x in range(3)] for i in range(3)]
    for row, value in enumerate(rows):
        candidates = crops[row // 8] + [crop.flip(2) for crop in crops[row // 8]]
        assert any(torch.equal(value, crop) for crop in candidates)
    assert len({tuple(row.flatten().tolist()) for row in rows[:8]}) > 1


def test_augment_none_repeats():
    images = torch.rand(2, 1, 4, 4)
    assert torch.equal(Augment()(images, keys([1, 2])), images[[0, 0, 1, 1]])
    with pytest.raises(ConfigError, match="shift"):
        Augment(shift=-1)
