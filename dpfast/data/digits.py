"""The embedded example: real handwritten digits as private data, printed ones as public data."""

from functools import cache
from typing import Literal

import numpy as np
import torch

from dpfast.data.fonts import FontStyle, render_digits
from dpfast.data.images import ImageSet
from dpfast.errors import ConfigError

DIGIT_CLASSES = tuple("0123456789")
FOLDS = 5
_SPLIT_SEED = 20230226  # fixed for good: a changed split would mix test scans into training


def real_digits(split: Literal["train", "test"], *, fold: int | None = None) -> ImageSet:
    """scikit-learn's 1,797 handwritten 8x8 scans: 1,437 to train on, 360 to test on, stratified by class.

    Pixels 0..16 become ``round(v * 255 / 16)``. With ``fold`` in 0..4 the 80% are split again: "test" is that
    fifth, "train" the other four, and the test scans are out of reach. Use folds to choose hyperparameters.
    Source: UCI "Optical recognition of handwritten digits", as bundled with scikit-learn.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"split must be 'train' or 'test', got {split!r}")
    train, test = _split()
    if fold is None:
        return _scans().select(train if split == "train" else test)
    if fold not in range(FOLDS):
        raise ConfigError(f"fold must be one of 0..{FOLDS - 1} or None, got {fold!r}")
    kept, held_out = _folds()[fold]
    return _scans().select(kept if split == "train" else held_out)


def font_digits(count: int, *, seed: int, size: int = 8, style: FontStyle | None = None) -> ImageSet:
    """``count`` public digits from matplotlib's fonts, ``[count, 1, size, size]``, classes as equal as can be."""
    labels = torch.arange(count) % len(DIGIT_CLASSES)
    labels = labels[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    return ImageSet(render_digits(labels, seed=seed + 1, size=size, style=style), labels, DIGIT_CLASSES)


@cache
def _scans() -> ImageSet:
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)
    return ImageSet(torch.from_numpy(pixels)[:, None], torch.from_numpy(scans.target).long(), DIGIT_CLASSES)


@cache
def _split() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.model_selection import train_test_split

    labels = _scans().labels.numpy()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=_SPLIT_SEED)
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(test))


@cache
def _folds() -> list[tuple[torch.Tensor, torch.Tensor]]:
    from sklearn.model_selection import StratifiedKFold

    train, _ = _split()
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=_SPLIT_SEED)
    folds = splitter.split(np.zeros(len(train)), _scans().labels[train].numpy())
    return [(train[torch.from_numpy(kept)], train[torch.from_numpy(held_out)]) for kept, held_out in folds]
