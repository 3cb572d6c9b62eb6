"""Stand-ins are read as the real files are, and a classifier can tell their classes apart."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dpfast.cli import app
from dpfast.data.formats import PUBLISHED
from dpfast.data.prepare import prepare_store
from dpfast.data.standin import STAND_INS, draw, write_stand_in
from dpfast.data.store import open_store
from dpfast.errors import ConfigError, DataError
from dpfast.evaluation import ClassifierSpec, accuracy, train_classifier

SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet32": (3, 32, 32), "camelyon17": (3, 32, 32)}


@pytest.mark.parametrize("name", STAND_INS)
def test_files_are_read_as_the_real_ones(name, tmp_path):
    write_stand_in(name, tmp_path / "source", train=40, test=20)
    store = prepare_store(name, tmp_path / "source", tmp_path / "store", partial=True)
    assert store.partial
    assert store.shape == SHAPES[name] == PUBLISHED[name].published.shape
    assert len(store.classes) == PUBLISHED[name].published.classes
    assert [split.count for split in store.splits.values()] == [40, 20]
    train = open_store(tmp_path / "store", "train", name=name)
    assert train.labels.unique().tolist() == list(range(2 if name == "camelyon17" else 10))


def test_classes_can_be_told_apart(tmp_path):
    write_stand_in("mnist", tmp_path / "source", train=500, test=200)
    prepare_store("mnist", tmp_path / "source", tmp_path / "store", partial=True, size=12)
    model = train_classifier(open_store(tmp_path / "store", "train"), spec=ClassifierSpec(steps=120), seed=0)
    assert accuracy(model, open_store(tmp_path / "store", "test")) > 0.8


def test_a_drawing_is_fixed_by_its_seed():
    labels = np.arange(10)
    first, again, other = (draw(labels, size=16, channels=3, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert torch.from_numpy(first).dtype == torch.uint8


def test_it_is_not_mixed_with_other_files(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"")
    with pytest.raises(DataError, match="is not empty"):
        write_stand_in("cifar10", tmp_path)
    with pytest.raises(ConfigError, match="camelyon17, cifar10, imagenet32, mnist"):
        write_stand_in("celeba", tmp_path / "new")


def test_the_command(tmp_path):
    result = CliRunner().invoke(app, ["data", "stand-in", "mnist", "--out", str(tmp_path / "m"), "--train", "20"])
    assert result.exit_code == 0
    assert "No image of the real data set" in result.stdout
    assert (tmp_path / "m/train-images-idx3-ubyte.gz").exists()
