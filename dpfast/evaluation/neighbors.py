"""How two sets of features overlap, by the distances to nearest neighbours.

Improved precision and recall: Kynkaanniemi et al. (arXiv 1904.06991). Density and coverage: Naeem et al. (arXiv
2002.09797). Around each feature vector lies a closed ball that reaches to its k-th nearest neighbour of the same set,
itself not counted; the balls of a set are its manifold.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpfast.errors import DataError

# Rows of a block of distances: 33 MB in float64.
_BLOCK = 2048
# Squared distances come from a product of matrices, whose rounding errors are up to d * 2^-53 of the squared norms
# (2e-13 for Inception's 2048 features). Features are float32: what differs by less than this is the same image.
_SAME = 1e-12


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """precision: share of synthetic features in the real manifold. recall: share of real features in the synthetic one.
    density: in how many real balls a synthetic feature lies on average, over k (may exceed 1). coverage: share of real
    balls that hold a synthetic feature.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def overlap(
    real: Tensor, synthetic: Tensor, *, precision_neighbors: int = 3, coverage_neighbors: int = 5, block: int = _BLOCK
) -> Overlap:
    """Of features ``[n, d]`` and ``[m, d]`` on one device, in float64 and ``block x block`` distances at a time.

    precision_neighbors: k of precision and recall; coverage_neighbors: k of density and coverage; the defaults are the
    authors'. Equal sets have precision, recall and coverage 1, and density (k + 1) / k.

    Raises DataError for sets of k images or fewer.
    """
    most = max(precision_neighbors, coverage_neighbors)
    if min(len(real), len(synthetic)) <= most:
        raise DataError(
            f"the {most} nearest neighbours of each image need more than {most} images in each set, got {len(real)}"
            f" real and {len(synthetic)} synthetic"
        )
    reals, synthetics = real.split(block), synthetic.split(block)
    real_radii = _squared_radii(reals, (precision_neighbors, coverage_neighbors))
    synthetic_radii = _squared_radii(synthetics, (precision_neighbors,))

    precise = real.new_zeros(len(synthetic), dtype=torch.bool).split(block)
    recalled, covered = (real.new_zeros(len(real), dtype=torch.bool).split(block) for _ in range(2))
    within = 0
    for i, rows in enumerate(reals):
        for j, columns in enumerate(synthetics):
            squared = squared_distances(rows, columns)
            precise[j].logical_or_((squared <= real_radii[i][0, :, None]).any(0))
            recalled[i].logical_or_((squared <= synthetic_radii[j][0]).any(1))
            close = squared <= real_radii[i][1, :, None]
            covered[i].logical_or_(close.any(1))
            within += int(close.sum())
    return Overlap(
        precision=_share(precise),
        recall=_share(recalled),
        density=within / (coverage_neighbors * len(synthetic)),
        coverage=_share(covered),
    )


def _squared_radii(blocks: tuple[Tensor, ...], neighbors: tuple[int, ...]) -> list[Tensor]:
    """Squared distance to the k-th nearest other vector, for each k in ``neighbors``: ``[len(neighbors), rows]`` by
    block.
    """
    most, radii = max(neighbors), []
    for rows in blocks:
        nearest = rows.new_empty(len(rows), 0, dtype=torch.float64)
        for columns in blocks:
            candidates = torch.cat([nearest, squared_distances(rows, columns)], 1)
            nearest = candidates.topk(min(most + 1, candidates.shape[1]), largest=False).values
        radii.append(nearest[:, list(neighbors)].T)  # number 0 is the vector itself
    return radii


def squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """float64 ``[n, m]`` of ``[n, d]`` and ``[m, d]``."""
    center = first.mean(0, dtype=torch.float64)  # distances do not depend on it, their rounding errors do
    first, second = first - center, second - center
    norms = first.square().sum(1)[:, None] + second.square().sum(1)
    squared = torch.addmm(norms, first, second.T, alpha=-2.0)
    return squared.masked_fill_(squared <= _SAME * norms, 0.0)


def _share(parts: tuple[Tensor, ...]) -> float:
    return float(torch.cat(parts).double().mean())
