"""What is trained on, publicly or privately: a loss for each row of a batch."""

from typing import Any, Protocol

from torch import Tensor, nn


class Objective(Protocol):
    """``(model, *examples, keys) -> losses [B * K]``.

    examples: tensors ``[B, ...]``, as the data set gives them (images uint8 and labels). keys: their ``RowKeys``, from
    which the K rows of each example draw augmentation, timestep and noise. Row ``i * K + k`` belongs to example i
    alone: nothing mixes rows, nothing is reduced over them.
    """

    def __call__(self, model: nn.Module, /, *args: Any, **kwargs: Any) -> Tensor: ...
