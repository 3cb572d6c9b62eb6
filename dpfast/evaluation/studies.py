"""Studies of what synthetic images are worth, and a choice of classifier that reads no private image.

Accuracy by number of synthetic images, and whether classifiers rank alike on synthetic and on real images: figures 3
and 4 of Ghalebikesabi et al. (arXiv 2302.13861). What is measured on real private images is not protected: it is there
to judge by, not to publish and not to choose by; ``select_classifier`` and ``dpfast.privacy.noised_choice`` choose.

Every classifier's result goes into ``results`` as soon as it is known, and what is there is not computed again. Keys
hold a hash of the classifier's settings, and nothing about the images: those of other images belong in another mapping.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpfast.data.images import ImageSet
from dpfast.errors import ConfigError, DataError
from dpfast.evaluation.classifier import (
    ClassifierSpec,
    accuracy,
    predict_classes,
    predict_probabilities,
    train_classifier,
)
from dpfast.evaluation.intervals import accuracy_interval, rank_correlation
from dpfast.evaluation.tasks import Results, Task, work_off
from dpfast.progress import Progress, silent
from dpfast.ranks import Ranks

FEWEST_SETTINGS = 12  # the interval of a rank correlation of fewer spans nearly everything
HELD_OUT = 1 / 12  # 5,000 of 60,000 images, as in DPImageBench


@dataclass(frozen=True, kw_only=True)
class CountAccuracy:
    """Classifiers trained on ``count`` images. accuracies: 0 to 1, by seed. ensemble: accuracy of the mean of their
    probabilities. All on the same ``test_images`` images, which is what the 95% intervals speak of.
    """

    count: int
    accuracies: tuple[float, ...]
    ensemble: float
    test_images: int

    @property
    def mean(self) -> float:
        """Of the single classifiers."""
        return fmean(self.accuracies)

    @property
    def interval(self) -> tuple[float, float]:
        """Of ``mean``."""
        return accuracy_interval(self.mean, self.test_images)

    @property
    def ensemble_interval(self) -> tuple[float, float]:
        """Of ``ensemble``."""
        return accuracy_interval(self.ensemble, self.test_images)


@dataclass(frozen=True, kw_only=True)
class RankTransfer:
    """Accuracies of each setting's classifier on held-out synthetic images and on real ones, Spearman's rho between
    them and its 95% interval.
    """

    settings: tuple[str, ...]
    synthetic: tuple[float, ...]
    real: tuple[float, ...]
    rho: float
    interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ClassifierChoice:
    """The setting that was chosen, and the accuracies on held-out synthetic images that it was chosen by."""

    name: str
    spec: ClassifierSpec
    accuracies: Mapping[str, float]


def accuracy_by_count(
    synthetic: ImageSet,
    test: ImageSet,
    *,
    counts: Sequence[int],
    spec: ClassifierSpec,
    seeds: Sequence[int],
    results: Results | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
    ranks: Ranks | None = None,
) -> list[CountAccuracy]:
    """Accuracy on ``test`` of classifiers trained on the first n synthetic images of ``balanced_order``, for each n in
    ``counts``: each set contains the smaller ones, and every classifier takes ``spec.steps`` steps.

    results: gets the accuracy of each classifier, and its probabilities as text, of which ensembles are made.
    ranks: ``torch.distributed``'s processes by default, which share the classifiers: all of them call this with the
    same arguments. The results of rank 0 are those that count, and rank 0 is heard.

    Raises DataError when there are too few images of some class for the largest count.
    """
    ranks = ranks or Ranks.current()
    kept: Results = {} if results is None else results
    study = CountStudy(
        synthetic,
        test,
        counts=counts,
        spec=spec,
        seeds=seeds,
        device=device,
        progress=progress if ranks.leads else silent,
    )
    work_off(study.tasks(), kept, ranks)
    return ranks.first(lambda: study.found(kept))


@dataclass(frozen=True, kw_only=True)
class _Classifier:
    """One of the study: the images ``chosen`` (int64) that it is trained on, its seed, the name of its accuracy."""

    chosen: Tensor
    seed: int
    key: str


class CountStudy:
    """The classifiers of ``accuracy_by_count``, to be trained by whoever is free. Raises what it raises."""

    def __init__(
        self,
        synthetic: ImageSet,
        test: ImageSet,
        *,
        counts: Sequence[int],
        spec: ClassifierSpec,
        seeds: Sequence[int],
        device: str | torch.device,
        progress: Progress,
    ) -> None:
        self._synthetic, self._test, self._spec = synthetic, test, spec
        self._device, self._progress = device, progress
        order = balanced_order(synthetic)
        self._classifiers: dict[int, list[_Classifier]] = {}  # by count
        for count in counts:
            chosen = _balanced(synthetic, order, count)
            keys = [(seed, _key(spec, "accuracy_by_count", count, seed)) for seed in seeds]
            self._classifiers[count] = [_Classifier(chosen=chosen, seed=seed, key=key) for seed, key in keys]

    def tasks(self) -> dict[str, Task]:
        """For ``work_off``."""
        every = [classifier for of_count in self._classifiers.values() for classifier in of_count]
        return {classifier.key: partial(self._measure, classifier) for classifier in every}

    def found(self, results: Results) -> list[CountAccuracy]:
        """From the results of all tasks, by count."""
        return [self._together(count, [c.key for c in of], results) for count, of in self._classifiers.items()]

    def _measure(self, of: _Classifier) -> dict[str, Any]:
        model = train_classifier(
            self._synthetic,
            spec=self._spec,
            seed=of.seed,
            subset=of.chosen,
            device=self._device,
            progress=self._progress,
        )
        probabilities = _to_text(predict_probabilities(model, self._test.images))
        return {f"{of.key}.probabilities": probabilities, of.key: accuracy(model, self._test)}

    def _together(self, count: int, keys: Sequence[str], results: Results) -> CountAccuracy:
        size = len(self._test)
        mean = np.mean([_from_text(results[f"{key}.probabilities"], size) for key in keys], axis=0)
        return CountAccuracy(
            count=count,
            accuracies=tuple(results[key] for key in keys),
            ensemble=float((mean.argmax(1) == self._test.labels.numpy()).mean()),
            test_images=size,
        )


def rank_transfer(
    synthetic: ImageSet,
    real_validation: ImageSet,
    settings: Mapping[str, ClassifierSpec],
    *,
    held_out: float = HELD_OUT,
    seed: int = 0,
    results: Results | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> RankTransfer:
    """Whether classifiers that are better on held-out synthetic images are better on real ones.

    Each setting's classifier is trained on all synthetic images but the share ``held_out``, then scored on these and on
    ``real_validation``. The interval is of a bootstrap over settings.

    Raises ConfigError for fewer than 12 settings, DataError where all score alike.
    """
    if len(settings) < FEWEST_SETTINGS:
        raise ConfigError(
            f"rank_transfer: expected {FEWEST_SETTINGS} settings or more, got {len(settings)}; make them with"
            " classifier_grid"
        )
    scorer = Scorer(synthetic, held_out=held_out, seed=seed, results=results, device=device, progress=progress)
    scored = [scorer(spec, real=real_validation) for spec in settings.values()]
    on_synthetic, on_real = (tuple(scores[name] for scores in scored) for name in ("synthetic", "real"))
    rho, interval = rank_correlation(on_synthetic, on_real, seed=seed)
    return RankTransfer(settings=tuple(settings), synthetic=on_synthetic, real=on_real, rho=rho, interval=interval)


def select_classifier(
    settings: Mapping[str, ClassifierSpec],
    synthetic: ImageSet,
    *,
    held_out: float = HELD_OUT,
    seed: int = 0,
    results: Results | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> ClassifierChoice:
    """The setting that is best on held-out synthetic images, the first of several: private images have no part in it.

    With the ``results`` of a ``rank_transfer`` of the same synthetic images nothing is trained again.
    """
    if not settings:
        raise ConfigError("select_classifier: expected one setting or more, got none")
    scorer = Scorer(synthetic, held_out=held_out, seed=seed, results=results, device=device, progress=progress)
    accuracies = {name: scorer(spec)["synthetic"] for name, spec in settings.items()}
    best = max(accuracies, key=lambda name: accuracies[name])
    return ClassifierChoice(name=best, spec=settings[best], accuracies=accuracies)


def correct_counts(models: Sequence[nn.Module], validation: ImageSet) -> Tensor:
    """How many images of ``validation`` each model labels correctly, int64 ``[len(models)]``: private where the images
    are, and what ``dpfast.privacy.noised_choice`` takes.
    """
    return torch.stack([(predict_classes(model, validation.images) == validation.labels).sum() for model in models])


def classifier_grid(base: ClassifierSpec, **choices: Sequence[Any]) -> dict[str, ClassifierSpec]:
    """``base`` with each combination of ``choices`` (fields and their values), by a name that says what differs."""
    grid = {}
    for values in product(*choices.values()):
        changes = dict(zip(choices, values, strict=True))
        grid[", ".join(f"{field}={value}" for field, value in changes.items())] = replace(base, **changes)
    return grid


def balanced_order(images: ImageSet) -> Tensor:
    """int64 ``[n]``: one image of each class, then the next of each, in the order in which they come."""
    labels = images.labels
    by_class = labels.argsort(stable=True)
    sizes = labels.bincount(minlength=images.num_classes)
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return (rank * images.num_classes + labels).argsort()


def split_synthetic(images: ImageSet, *, held_out: float = HELD_OUT, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Numbers of the images to train on and of those to score on, int64, with equal shares of each class."""
    from sklearn.model_selection import train_test_split

    try:
        train, scored = train_test_split(
            np.arange(len(images)), test_size=held_out, stratify=images.labels.numpy(), random_state=seed
        )
    except ValueError as error:
        raise DataError(f"{len(images)} images cannot be split with held_out={held_out:g}: {error}") from error
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(scored))


class Scorer:
    """Trains a setting's classifier on most synthetic images, and scores it on the others and on further sets."""

    def __init__(
        self,
        synthetic: ImageSet,
        *,
        held_out: float = HELD_OUT,
        seed: int = 0,
        results: Results | None = None,
        device: str | torch.device = "cpu",
        progress: Progress = silent,
    ) -> None:
        self._synthetic, self._seed = synthetic, seed
        self._results: Results = {} if results is None else results
        self._train, self._scored = split_synthetic(synthetic, held_out=held_out, seed=seed)
        self._name = f"held_out={held_out:.4g}"
        self._device, self._progress = device, progress

    def __call__(self, spec: ClassifierSpec, **further: ImageSet) -> dict[str, float]:
        """Accuracies by name of the set; the held-out images are "synthetic"."""
        sets = {"synthetic": self._synthetic, **further}
        keys = {name: _key(spec, self._name, self._seed, name) for name in sets}
        if any(key not in self._results for key in keys.values()):
            model = train_classifier(
                self._synthetic,
                spec=spec,
                seed=self._seed,
                subset=self._train,
                device=self._device,
                progress=self._progress,
            )
            for name, images in sets.items():
                self._results[keys[name]] = accuracy(
                    model, images, subset=self._scored if name == "synthetic" else None
                )
        return {name: self._results[key] for name, key in keys.items()}


def _balanced(images: ImageSet, order: Tensor, count: int) -> Tensor:
    chosen = order[:count]
    sizes = images.labels[chosen].bincount(minlength=images.num_classes)
    if len(chosen) < count or int(sizes.max() - sizes.min()) > 1:
        scarce = images.classes[int(images.labels.bincount(minlength=images.num_classes).argmin())]
        raise DataError(
            f"{count} images of {images.num_classes} classes need {-(-count // images.num_classes)} of each; there are"
            f" fewer of class {scarce!r}: sample more, or ask for less"
        )
    return chosen


def _key(spec: ClassifierSpec, *parts: object) -> str:
    return ".".join(map(str, [*parts, hashlib.sha256(repr(spec).encode()).hexdigest()[:12]]))


def _to_text(probabilities: Tensor) -> str:
    return base64.b64encode(probabilities.numpy().astype("<f2").tobytes()).decode()


def _from_text(text: str, count: int) -> np.ndarray:
    """float64 ``[count, classes]``."""
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float64).reshape(count, -1)
