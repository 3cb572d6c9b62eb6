"""Who took part: membership inference on a released model and its samples, and samples that are copies.

Members are training images, others real images that took no part. An attack gives each a score; how well scores tell
the two apart is its area under the ROC curve, and what matters for privacy its true positives at few false ones
(Carlini et al., arXiv 2112.03570). These attacks know no neighbour's secret: that they find nothing proves nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dpfast.data.images import ImageSet, to_signed
from dpfast.data.keyed import RowKeys
from dpfast.errors import DataError
from dpfast.evaluation.neighbors import squared_distances
from dpfast.objective import Objective
from dpfast.privacy.bounds import rate_limits
from dpfast.progress import Progress, silent

RATES = (0.01, 0.001)  # of false positives


@dataclass(frozen=True, kw_only=True)
class Membership:
    """auroc: 0.5 is a coin toss; auroc_error: its standard error (Hanley and McNeil 1982). true_positives: share of
    members that are told at each of ``RATES`` of false positives, with the upper limit of 95%. members, others: how
    many.
    """

    auroc: float
    auroc_error: float
    true_positives: tuple[tuple[float, float], ...]
    members: int
    others: int


def membership(members: Tensor, others: Tensor) -> Membership:
    """Of scores ``[n]`` and ``[m]`` that are larger for what is thought a member.

    Raises DataError for fewer than two of either kind, or scores that are not finite.
    """
    from scipy.stats import rankdata

    inside, outside = members.double().numpy(), others.double().numpy()
    if min(len(inside), len(outside)) < 2 or not (np.isfinite(inside).all() and np.isfinite(outside).all()):
        raise DataError(
            f"membership: expected two finite scores or more of each kind, got {len(inside)} members and {len(outside)}"
            " others"
        )
    ranks = rankdata(np.concatenate([inside, outside]))[: len(inside)]
    area = (ranks.sum() - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside))
    ordered = np.sort(outside)
    told = []
    for rate in RATES:
        threshold = ordered[len(outside) - 1 - math.floor(rate * len(outside))]
        hits = int((inside > threshold).sum())
        _, high = rate_limits(hits, len(inside), confidence=0.95)
        told.append((hits / len(inside), float(high)))
    return Membership(
        auroc=float(area),
        auroc_error=_area_error(float(area), len(inside), len(outside)),
        true_positives=tuple(told),
        members=len(inside),
        others=len(outside),
    )


@torch.no_grad()
def loss_scores(
    model: nn.Module,
    objective: Objective,
    images: ImageSet,
    *,
    rows: int = 32,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress = silent,
) -> Tensor:
    """``[n]``: minus each image's mean loss over ``rows`` draws of timestep and noise; members should have less.

    objective: without augmentation and dropped labels, which add noise to the scores. Image i has the same draws in
    every set that is scored.
    """
    model.eval()
    device = next(model.parameters()).device
    scores = []
    for ids in torch.arange(len(images)).split(batch_size):
        keys = RowKeys(seed, ids.to(device), 0, rows)
        losses = objective(model, images.images[ids].to(device), images.labels[ids].to(device), keys)
        scores.append(-losses.view(len(ids), rows).mean(1).cpu())
        progress(int(ids[-1]) + 1, len(images), "reading losses")
    return torch.cat(scores)


@dataclass(frozen=True, kw_only=True)
class Copies:
    """nearer: share of samples that lie nearer to a training image than to any of as many real images that took no
    part; half of them would, if training had left no trace and both were alike. nearer_limits: of 95%. pairs: (sample,
    training image), the closest first, and their distances: root of the mean squared difference of pixels, which lie in
    -1..1.
    """

    nearer: float
    nearer_limits: tuple[float, float]
    pairs: tuple[tuple[int, int], ...]
    distances: tuple[float, ...]


def copies(samples: ImageSet, members: ImageSet, others: ImageSet, *, shown: int = 12, seed: int = 0) -> Copies:
    """Nearest neighbours of samples by their pixels; of members and others, as many of either as there are of both."""
    count = min(len(members), len(others))
    chosen = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))[:count]
    to_members, _ = nearest(samples.images, members.images[chosen])
    to_others, _ = nearest(samples.images, others.images[:count])
    nearer = int((to_members < to_others).sum())
    low, high = rate_limits(nearer, len(samples), confidence=0.975)
    distances, numbers = nearest(samples.images, members.images)
    closest = distances.argsort(stable=True)[:shown].tolist()
    return Copies(
        nearer=nearer / len(samples),
        nearer_limits=(float(low), float(high)),
        pairs=tuple((i, int(numbers[i])) for i in closest),
        distances=tuple(float(distances[i]) / math.sqrt(math.prod(samples.image_shape)) for i in closest),
    )


def nearest(images: Tensor, reference: Tensor, *, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Of each of uint8 ``images`` the distance to the nearest of ``reference`` (L2 of pixels of -1..1, float64 ``[n]``)
    and its number (int64 ``[n]``), ``block`` by ``block`` of either, which may lie in memory-mapped files.
    """
    found = []
    for rows in images.split(block):
        best, number = (
            torch.full((len(rows),), math.inf, dtype=torch.float64),
            torch.zeros(len(rows), dtype=torch.int64),
        )
        for first, columns in zip(range(0, len(reference), block), reference.split(block), strict=True):
            smallest, at = squared_distances(to_signed(rows).flatten(1), to_signed(columns).flatten(1)).min(1)
            number = torch.where(smallest < best, first + at, number)
            best = torch.minimum(best, smallest)
        found.append((best.sqrt(), number))
    distances, numbers = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(numbers)


def _area_error(area: float, members: int, others: int) -> float:
    one, other = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (members - 1) * (one - area**2) + (others - 1) * (other - area**2)
    return math.sqrt(max(0.0, variance) / (members * others))
