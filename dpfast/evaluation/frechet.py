"""Frechet distance between two sets of images, in the features of a classifier trained on public data.

Heusel et al. (arXiv 1706.08500) use an Inception network; on 8x8 digits its features mean nothing, so the score
names its extractor and is comparable only with scores of the same one.
"""

import torch
from torch import Tensor, nn

from dpfast.data.images import ImageSet
from dpfast.errors import DataError
from dpfast.evaluation.networks import Classifier

EXTRACTOR = "digits-cnn-fonts"


class FeatureExtractor(nn.Module):
    """The classifier's penultimate layer on uint8 images, ``[n, num_features]``."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier.eval()
        self.num_features = classifier.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)


@torch.no_grad()
def frechet_distance(classifier: Classifier, first: ImageSet, second: ImageSet, *, batch_size: int = 2000) -> float:
    """Torchmetrics' FrechetInceptionDistance of two sets, features from ``classifier`` (trained on public fonts).

    Symmetric, 0 for equal sets, in squared feature units. Raises DataError for sets of fewer than two images.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(first), len(second)) < 2:
        raise DataError(
            f"the Frechet distance needs two images or more in each set, got {len(first)} and {len(second)}"
        )
    metric = FrechetInceptionDistance(feature=FeatureExtractor(classifier), input_img_size=first.image_shape)
    for images, real in ((first.images, True), (second.images, False)):
        for chunk in images.split(batch_size):
            metric.update(chunk, real=real)
    return float(metric.compute())
