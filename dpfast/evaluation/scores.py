"""Scores of synthetic images against real ones, in the features of an ``Extractor``.

FID (Heusel et al., arXiv 1706.08500), KID (Binkowski et al., arXiv 1801.01401), the Inception score (Salimans et al.,
arXiv 1606.03498), precision and recall (Kynkaanniemi et al., arXiv 1904.06991), density and coverage (Naeem et al.,
arXiv 2002.09797). Computed from the private images without protection: to judge by, not to publish.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dpfast.data.images import ImageSet
from dpfast.errors import ConfigError, DataError
from dpfast.evaluation.extractors import Extractor, features, probabilities
from dpfast.evaluation.frechet import frechet_of_features
from dpfast.evaluation.neighbors import overlap
from dpfast.progress import Progress, silent

_BLOCK = 4096  # rows of features that become float64 at a time


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """What the scores depend on besides images and extractor; the defaults are those of their papers.

    kid_subsets, kid_subset_size: KID is the mean over so many random subsets of so many images. splits: of the
    Inception score. precision_neighbors, coverage_neighbors: k of precision and recall, of density and coverage. seed:
    of the subsets and of the order in which images are split.
    """

    kid_subsets: int = 100
    kid_subset_size: int = 1000
    splits: int = 10
    precision_neighbors: int = 3
    coverage_neighbors: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"kid_subsets": 1, "kid_subset_size": 2, "splits": 1, "precision_neighbors": 1, "coverage_neighbors": 1}
        wrong = [f"{name}={getattr(self, name)}" for name, low in least.items() if getattr(self, name) < low]
        if wrong:
            raise ConfigError(f"ScoreSettings: {', '.join(wrong)}; expected at least {least}")

    @classmethod
    def fitting(cls, images: int) -> Self:
        """The defaults, with no more images in a subset and no more splits than there are images in a set."""
        return cls(kid_subset_size=min(cls.kid_subset_size, images), splits=min(cls.splits, images))

    @property
    def fewest_images(self) -> int:
        """Images that each set must have."""
        return max(self.kid_subset_size, self.splits, self.precision_neighbors + 1, self.coverage_neighbors + 1)


@dataclass(frozen=True, kw_only=True)
class ImageScores:
    """All scores of one set, and all that they depend on: only those with the same extractor (by sha256), settings and
    numbers of images can be compared.

    inception_score, inception_score_std: None where the extractor knows no classes. Standard deviations are over
    subsets (KID) and splits (Inception score).
    """

    fid: float
    kid: float
    kid_std: float
    inception_score: float | None
    inception_score_std: float | None
    precision: float
    recall: float
    density: float
    coverage: float
    real_images: int
    synthetic_images: int
    extractor: str
    sha256: str
    settings: ScoreSettings

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def image_scores(
    extractor: Extractor,
    real: ImageSet,
    synthetic: ImageSet,
    *,
    settings: ScoreSettings | None = None,
    batch_size: int = 256,
    folder: Path | None = None,
    progress: Progress = silent,
) -> ImageScores:
    """All scores of ``synthetic`` against ``real``.

    Images are read ``batch_size`` at a time and may lie in memory-mapped files. Their features (float32, 0.5 GB for
    60,000 images under Inception) stay on a GPU that made them, else in a nameless file of ``folder`` (by default of
    the system's folder for temporary files); scores are made of them block by block.

    Raises DataError for too few images, or images of different shapes, and for features that are not finite;
    ConfigError for what is no ``Extractor`` or no ``ImageSet``.
    """
    settings = settings or ScoreSettings()
    _check_types(extractor, real=real, synthetic=synthetic)
    _check(real, synthetic, settings)
    read = partial(features, extractor, batch_size=batch_size, folder=folder, progress=progress)
    ours, theirs = (read(images.images) for images in (synthetic, real))
    classes = probabilities(extractor, synthetic.images, batch_size=batch_size, folder=folder, progress=progress)
    distance, distance_std = kernel_distance(
        theirs, ours, subsets=settings.kid_subsets, subset_size=settings.kid_subset_size, seed=settings.seed
    )
    sharpness = (
        (None, None) if classes is None else inception_score(classes, splits=settings.splits, seed=settings.seed)
    )
    shared = overlap(
        theirs,
        ours,
        precision_neighbors=settings.precision_neighbors,
        coverage_neighbors=settings.coverage_neighbors,
    )
    return ImageScores(
        fid=frechet_of_features(theirs.split(_BLOCK), ours.split(_BLOCK)),
        kid=distance,
        kid_std=distance_std,
        inception_score=sharpness[0],
        inception_score_std=sharpness[1],
        **asdict(shared),
        real_images=len(real),
        synthetic_images=len(synthetic),
        extractor=extractor.name,
        sha256=extractor.sha256,
        settings=settings,
    )


def kernel_distance(
    real: Tensor, synthetic: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID of features ``[n, d]`` and ``[m, d]``: mean and standard deviation over random subsets.

    Of each pair of subsets the unbiased estimate of the squared maximum mean discrepancy under the kernel
    ``(x y / d + 1)^3``, which is 0 on average for equal distributions and may be negative.
    """
    if min(len(real), len(synthetic)) < subset_size or subset_size < 2:
        raise DataError(
            f"KID over subsets of {subset_size} images needs as many in each set, and two or more, got {len(real)}"
            f" real and {len(synthetic)} synthetic images; change subset_size or sample more"
        )
    generator = torch.Generator().manual_seed(seed)

    def drawn(values: Tensor) -> Tensor:
        return values[torch.randperm(len(values), generator=generator)[:subset_size].to(values.device)].double()

    estimates = torch.tensor([_squared_mmd(drawn(real), drawn(synthetic)) for _ in range(subsets)], dtype=torch.float64)
    return float(estimates.mean()), float(estimates.std(correction=0))


def inception_score(probabilities: Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """``exp(E KL(p(y | x) || p(y)))`` of class probabilities ``[n, classes]``: mean and standard deviation over
    ``splits`` parts of the shuffled images. Between 1 and the number of classes.
    """
    if len(probabilities) < splits:
        raise DataError(f"the Inception score in {splits} splits needs as many images, got {len(probabilities)}")
    order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(seed))
    parts = order.to(probabilities.device).tensor_split(splits)
    scores = torch.stack([_exponential_information(probabilities, part) for part in parts])
    return float(scores.mean()), float(scores.std(correction=0))


def _squared_mmd(first: Tensor, second: Tensor) -> float:
    """Unbiased, of as many vectors in each set."""
    count = len(first)
    within = sum(kernel.sum() - kernel.trace() for kernel in (_kernel(first, first), _kernel(second, second)))
    return float(within / (count * (count - 1)) - 2 * _kernel(first, second).mean())


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _exponential_information(probabilities: Tensor, ids: Tensor) -> Tensor:
    """Of the rows ``ids``: the mean of ``p log q``, q the mean of p, is ``q log q``."""
    total, own = (probabilities.new_zeros(size, dtype=torch.float64) for size in (probabilities.shape[1], 1))
    for block in ids.split(_BLOCK):
        rows = probabilities[block].double()
        total, own = total + rows.sum(0), own + torch.xlogy(rows, rows).sum()
    mean = total / len(ids)
    return (own / len(ids) - torch.xlogy(mean, mean).sum()).exp()


def _check_types(extractor: object, **sets: object) -> None:
    wrong = []
    if not isinstance(extractor, Extractor):
        got = type(extractor).__name__
        wrong.append(
            f"extractor must be an Extractor, got {got}; give module_extractor(name, module) or another of them"
        )
    for name, images in sets.items():
        if not isinstance(images, ImageSet):
            got = f"Tensor {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            wrong.append(f"{name} must be an ImageSet, got {got}; give ImageSet(images, labels, classes)")
    if wrong:
        raise ConfigError("image_scores: " + "\n".join(wrong))


def _check(real: ImageSet, synthetic: ImageSet, settings: ScoreSettings) -> None:
    if real.image_shape != synthetic.image_shape:
        raise DataError(
            f"scores compare images of one shape, got {real.image_shape} (real) and {synthetic.image_shape} (synthetic)"
        )
    if min(len(real), len(synthetic)) < settings.fewest_images:
        raise DataError(
            f"scores with {settings} need {settings.fewest_images} images or more in each set, got {len(real)} real and"
            f" {len(synthetic)} synthetic; sample more, or lower what asks for them: "
            f"ScoreSettings.fitting({min(len(real), len(synthetic))})"
        )
