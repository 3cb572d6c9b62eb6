"""Frechet distance between two sets of images, in the features of a network that was trained on public data.

Heusel et al. (arXiv 1706.08500) use an Inception network; on 8x8 digits its features mean nothing, so the score
names its extractor and is comparable only with scores of the same one.
"""

from collections.abc import Iterable
from itertools import chain

from torch import Tensor, nn

from dpfast.data.images import ImageSet
from dpfast.errors import DataError
from dpfast.evaluation.extractors import classifier_extractor, extractor_name, feature_blocks
from dpfast.evaluation.networks import Classifier


def frechet_distance(
    classifier: Classifier, first: ImageSet, second: ImageSet, *, public: str = "fonts", batch_size: int = 2000
) -> float:
    """``frechet_of_features`` of two sets, features from ``classifier``, which was trained on these public images.

    Raises DataError for sets of fewer than two images.
    """
    if min(len(first), len(second)) < 2:
        raise DataError(
            f"the Frechet distance needs two images or more in each set, got {len(first)} and {len(second)}"
        )
    extractor = classifier_extractor(extractor_name(public), classifier)
    one, other = (feature_blocks(extractor, images.images, batch_size=batch_size) for images in (first, second))
    return frechet_of_features(one, other)


def frechet_of_features(first: Iterable[Tensor], second: Iterable[Tensor]) -> float:
    """Torchmetrics' FrechetInceptionDistance of two sets of features, each given in blocks ``[rows, d]``.

    ``|mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2))`` with covariances C, summed up block by block in float64.
    Symmetric, 0 for equal sets, in squared feature units. It falls as sets grow: compare sets of the same sizes.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    first = iter(first)
    head = next(first)
    metric = FrechetInceptionDistance(feature=_Given(head.shape[1])).to(head.device)
    for block in chain([head], first):
        metric.update(block, real=True)
    for block in second:
        metric.update(block, real=False)
    return float(metric.compute())


class _Given(nn.Module):
    """Stands where torchmetrics expects the extractor: it is given features, not images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
