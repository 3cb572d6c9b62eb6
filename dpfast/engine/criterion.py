"""PrivateCriterion: what Opacus' ghost mode returns in the place of the criterion."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpfast.engine.outputs import Reduction
from dpfast.errors import ConfigError


class PrivateCriterion:
    """``criterion``, reduced example by example; its result is an ordinary tensor, with ``backward()``."""

    def __init__(self, criterion: Any, reduction: Reduction) -> None:
        stated = getattr(criterion, "reduction", reduction)
        if stated != reduction:
            raise ConfigError(
                f"criterion: its reduction is {stated!r}, loss_reduction is {reduction!r}; give both the same"
            )
        self.criterion, self.reduction = criterion, reduction

    def __getattr__(self, name: str) -> Any:
        """The criterion's."""
        if name == "criterion":
            raise AttributeError(name)
        return getattr(self.criterion, name)

    def __call__(self, *args: Any, shape: Sequence[int] | None = None, **kwargs: Any) -> Tensor:
        """The loss. shape: of logits ``[B, T, classes]`` that were flattened to ``[B*T, classes]``: the loss of an
        example is then the mean (or sum) over its own tokens, less those that the criterion ignores.
        """
        usual = getattr(self.criterion, "reduction", None)
        self.criterion.reduction = "none"
        try:
            losses: Tensor = self.criterion(*args, **kwargs)
        finally:
            self.criterion.reduction = usual
        if shape is not None and len(losses) == shape[0] * shape[1]:
            losses = self._by_example(losses.view(shape[0], shape[1]), args, kwargs)
        return losses.mean(0) if self.reduction == "mean" else losses.sum(0)

    def _by_example(self, losses: Tensor, args: Any, kwargs: Any) -> Tensor:
        if self.reduction == "sum":
            return losses.sum(1)
        ignored = getattr(self.criterion, "ignore_index", None)
        targets = kwargs.get("target", args[1] if len(args) > 1 else None)
        if ignored is None or targets is None:
            return losses.mean(1)
        counted = (targets.view(losses.shape) != ignored).sum(1).clamp(min=1)
        return torch.sum(losses, 1) / counted
