"""Studies: small ones whose outcome is known, resumed without repeating, and choices that read nothing private."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from dpfast.data import ImageSet, font_digits, real_digits
from dpfast.errors import ConfigError, DataError
from dpfast.evaluation import ClassifierSpec, accuracy, predict_probabilities, studies, train_classifier
from dpfast.evaluation.intervals import accuracy_interval, rank_correlation
from dpfast.evaluation.studies import (
    accuracy_by_count,
    balanced_order,
    classifier_grid,
    correct_counts,
    rank_transfer,
    select_classifier,
    split_synthetic,
)
from dpfast.privacy import Ledger, Plan, choice_release, noised_choice
from dpfast.runs.metrics import Results

QUICK = ClassifierSpec(widths=(8, 8), steps=40, batch_size=32)
# From useless (a learning rate of 1e-6) to good, and so in one order wherever they are scored.
GRID = classifier_grid(QUICK, learning_rate=[1e-6, 1e-4, 1e-3, 1e-2], weight_decay=[0.0, 0.05, 0.5])


@pytest.fixture(scope="module")
def synthetic():
    return font_digits(600, seed=0)


@pytest.fixture(scope="module")
def test():
    return font_digits(200, seed=50)


@pytest.fixture
def trained(monkeypatch):
    """Calls of train_classifier."""
    calls = []
    real = studies.train_classifier
    spy = lambda *args, **options: calls.append(options) or real(*args, **options)  # noqa: E731
    monkeypatch.setattr(studies, "train_classifier", spy)
    return calls


# By number of images


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 2, 2, 2, 2], [2, 1, 0, 2, 1, 0], [1, 1, 1]])
def test_balanced_order_takes_turns(labels):
    images = ImageSet(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), torch.tensor(labels), ("a", "b", "c"))
    queues = {c: [i for i, label in enumerate(labels) if label == c] for c in range(3)}
    expected = [queue[turn] for turn in range(len(labels)) for queue in queues.values() if turn < len(queue)]
    assert balanced_order(images).tolist() == expected


def test_more_images_are_better_and_each_set_holds_the_smaller_ones(synthetic, test, trained):
    spec = replace(QUICK, steps=80)
    few, many = accuracy_by_count(synthetic, test, counts=[20, 595], spec=spec, seeds=[0, 1])
    assert many.mean > few.mean + 0.1
    subsets = [call["subset"] for call in trained]
    assert [len(s) for s in subsets] == [20, 20, 595, 595]
    assert torch.equal(subsets[2][:20], subsets[0])
    assert synthetic.labels[subsets[0]].bincount().tolist() == [2] * 10
    assert synthetic.labels[subsets[2]].bincount().tolist() == [60] * 5 + [59] * 5


def test_accuracies_and_ensembles_are_those_of_the_models(synthetic, test):
    (found,) = accuracy_by_count(synthetic, test, counts=[100], spec=QUICK, seeds=[3, 4, 5])
    models = [
        train_classifier(synthetic.select(balanced_order(synthetic)[:100]), spec=QUICK, seed=seed) for seed in (3, 4, 5)
    ]
    assert found.accuracies == tuple(accuracy(model, test) for model in models)
    mean = sum(predict_probabilities(model, test.images).double() for model in models)
    assert found.ensemble == pytest.approx(float((mean.argmax(1) == test.labels).double().mean()), abs=1 / 200)
    assert found.mean == pytest.approx(np.mean(found.accuracies))
    assert found.interval == accuracy_interval(found.mean, 200)
    assert found.ensemble_interval == accuracy_interval(found.ensemble, 200)


def test_an_ensemble_averages_probabilities():
    """Not votes, nor logits: one sure classifier outvotes two that waver."""
    labels = torch.zeros(1, dtype=torch.int64)
    one = ImageSet(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), labels, ("a", "b"))
    both = font_digits(20, seed=0)
    synthetic = ImageSet(both.images, both.labels % 2, ("a", "b"))
    results = {}
    accuracy_by_count(synthetic, one, counts=[4], spec=QUICK, seeds=[0, 1, 2], results=results)
    keys = [key for key in results if key.endswith("probabilities")]
    for key, share in zip(keys, (0.95, 0.4, 0.4), strict=True):
        results[key] = studies._to_text(torch.tensor([[share, 1 - share]]))
    (found,) = accuracy_by_count(synthetic, one, counts=[4], spec=QUICK, seeds=[0, 1, 2], results=results)
    assert found.ensemble == 1.0


def interrupted_after(store, writes):
    """The store, whose next write after so many raises."""

    class Interrupted(type(store)):
        def __setitem__(self, key, value):
            nonlocal writes
            if writes == 0:
                raise KeyboardInterrupt
            writes -= 1
            super().__setitem__(key, value)

    store.__class__ = Interrupted
    return store


@pytest.mark.parametrize("writes", [0, 1, 2, 5])
def test_an_interrupted_study_goes_on_with_what_is_there(writes, synthetic, test, trained, tmp_path):
    arguments = {"counts": [20, 50], "spec": replace(QUICK, steps=8), "seeds": [0, 1]}
    expected = accuracy_by_count(synthetic, test, **arguments)
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        accuracy_by_count(synthetic, test, **arguments, results=interrupted_after(Results(path), writes))
    trained.clear()
    again = accuracy_by_count(synthetic, test, **arguments, results=Results(path))
    assert again == expected
    assert len(trained) == 4 - writes // 2
    trained.clear()
    assert accuracy_by_count(synthetic, test, **arguments, results=Results(path)) == expected
    assert not trained
    assert all(isinstance(value, float | str) for value in json.loads(path.read_text()).values())


def test_results_of_other_settings_are_not_taken(synthetic, test, trained):
    results = {}
    for rate in (1e-2, 1e-3):
        spec = replace(QUICK, steps=2, learning_rate=rate)
        accuracy_by_count(synthetic, test, counts=[20], spec=spec, seeds=[0], results=results)
    assert len(trained) == 2


def test_more_images_than_a_class_has_are_refused(test):
    digits = font_digits(100, seed=0)
    kept = digits.labels != 3
    kept[(digits.labels == 3).nonzero()[0]] = True
    skewed = digits.select(kept.nonzero().flatten())
    accuracy_by_count(skewed, test, counts=[10], spec=replace(QUICK, steps=2), seeds=[0])
    for count in (50, 5000):
        with pytest.raises(
            DataError, match=f"{count} images of 10 classes need {count // 10} of each.*fewer of class '3'"
        ):
            accuracy_by_count(skewed, test, counts=[count], spec=QUICK, seeds=[0])


# Ranks


def test_ranks_of_good_and_bad_settings_transfer(synthetic, test, trained):
    results = {}
    found = rank_transfer(synthetic, test, GRID, held_out=0.25, results=results)
    assert found.settings == tuple(GRID)
    assert found.rho == stats.spearmanr(found.synthetic, found.real).statistic
    assert found.rho > 0.8
    assert found.interval[0] < found.rho <= found.interval[1] <= 1
    assert len(trained) == 12
    train, held_out = split_synthetic(synthetic, held_out=0.25)
    model = train_classifier(synthetic.select(train), spec=GRID[found.settings[5]], seed=0)
    assert found.synthetic[5] == accuracy(model, synthetic.select(held_out))
    assert found.real[5] == accuracy(model, test)
    assert rank_transfer(synthetic, test, GRID, held_out=0.25, results=results) == found
    choice = select_classifier(GRID, synthetic, held_out=0.25, results=results)
    assert len(trained) == 12
    assert tuple(choice.accuracies.values()) == found.synthetic


def test_few_settings_are_no_study(synthetic, test):
    few = dict(list(GRID.items())[:11])
    with pytest.raises(ConfigError, match="12 settings or more, got 11; make them with classifier_grid"):
        rank_transfer(synthetic, test, few)


def test_the_interval_of_a_rank_correlation_covers_it():
    """Normal pairs of correlation r have rho = 6 / pi arcsin(r / 2) (Pearson 1907)."""
    random = np.random.default_rng(0)
    r, covered = 0.8, 0
    rho = 6 / np.pi * np.arcsin(r / 2)
    for trial in range(100):
        pairs = random.multivariate_normal([0, 0], [[1, r], [r, 1]], size=30)
        value, (low, high) = rank_correlation(pairs[:, 0].tolist(), pairs[:, 1].tolist(), seed=trial, resamples=500)
        assert low <= value <= high
        covered += low <= rho <= high
    assert 88 <= covered <= 99


def test_rank_correlations_at_their_ends():
    values = [0.1, 0.4, 0.2, 0.9, 0.5]
    assert rank_correlation(values, [10 * v for v in values]) == (pytest.approx(1), pytest.approx((1, 1)))
    assert rank_correlation(values, [-v for v in values])[0] == pytest.approx(-1)
    # Of ten pairs nine are equal: many a resample holds one value only, and has no order.
    low, high = rank_correlation([0.5] * 9 + [0.6], [0.5] * 9 + [0.6])[1]
    assert (low, high) == pytest.approx((0, 1))
    with pytest.raises(DataError, match="all equal"):
        rank_correlation([0.5] * 5, values)


# Choices


def test_the_choice_is_the_best_on_held_out_synthetic_images(synthetic):
    settings = classifier_grid(QUICK, learning_rate=[1e-6, 1e-2, 1e-4])
    choice = select_classifier(settings, synthetic, held_out=0.25)
    assert choice.name == "learning_rate=0.01"
    assert choice.spec == settings[choice.name]
    assert choice.accuracies[choice.name] == max(choice.accuracies.values())
    with pytest.raises(ConfigError, match="got none"):
        select_classifier({}, synthetic)


def test_a_grid_holds_every_combination_by_name():
    grid = classifier_grid(QUICK, network=["small-cnn", "wrn-16-1"], learning_rate=[0.1, 0.2, 0.3])
    assert len(grid) == len(set(grid.values())) == 6
    assert grid["network=wrn-16-1, learning_rate=0.2"] == replace(QUICK, network="wrn-16-1", learning_rate=0.2)


def test_the_split_keeps_classes_apart_and_together(synthetic):
    train, held_out = split_synthetic(synthetic)
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(600))
    assert synthetic.labels[held_out].bincount().tolist() == [5] * 10
    assert not torch.equal(held_out, split_synthetic(synthetic, seed=1)[1])
    with pytest.raises(DataError, match="cannot be split"):
        split_synthetic(synthetic.select([0, 1]))


def test_counts_for_a_noised_choice(synthetic):
    """From the classifiers of synthetic images to a choice on private ones, paid for by the plan of the training."""
    private = real_digits("train", fold=0)
    settings = classifier_grid(QUICK, learning_rate=[1e-6, 1e-2])
    models = [train_classifier(synthetic, spec=spec, seed=0) for spec in settings.values()]
    counts = correct_counts(models, private)
    assert counts.tolist() == [round(accuracy(model, private) * len(private)) for model in models]
    # What the release takes for granted: an image fewer moves each count by 1 at most.
    for dropped in range(0, len(private), 97):
        kept = [i for i in range(len(private)) if i != dropped]
        moved = counts - correct_counts(models, private.select(kept))
        assert set(moved.tolist()) <= {0, 1}
    plan = Plan(
        dataset_size=len(private),
        expected_batch_size=100,
        max_grad_norm=1.0,
        steps=2,
        target_delta=1e-4,
        noise_multiplier=2.0,
        other_releases=[choice_release(settings=2, sigma=20.0)],
    )
    with Ledger(None, plan) as ledger:
        choice = noised_choice(counts, sigma=20.0, ledger=ledger)
    assert list(settings)[choice.index] == "learning_rate=0.01"
