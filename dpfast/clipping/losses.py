"""What losses must look like: one number per row, all rows of an example together."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dpfast.errors import CaptureError


def check_losses(losses: Tensor, mask: Tensor | None, augmult: int, inputs: Iterable[Tensor]) -> int:
    """B, or ``CaptureError`` when ``losses`` is not one number per row; ``inputs`` are those of the model."""
    rows = f"[B*{augmult}], one loss per row"
    if losses.ndim != 1:
        reduced = "reduced already? use reduction='none' and average over pixels only"
        what = reduced if losses.ndim == 0 else "average over all but the rows: losses.flatten(1).mean(1)"
        raise CaptureError(f"losses have {losses.ndim} dimensions ({what}): expected {rows}")
    if len(losses) % augmult:
        raise CaptureError(
            f"the number of losses is no multiple of augmult={augmult}: expected {rows}, all K rows of an example"
            " together (or, in several passes over one example, more=True in every pass but the last)"
        )
    examples = len(losses) // augmult
    if _averages_rows([t for t in inputs if t.ndim], len(losses), augmult):
        raise CaptureError(
            f"there are fewer losses than rows in the model's input: expected {rows}; do not average over rows, not"
            " even over the K rows of an example (the clipper does), and put no other rows beside them (public"
            " ones, an unconditional half). What belongs to one row goes into the model as [B*K, parts, ...]"
        )
    if mask is not None and (mask.shape != (examples,) or mask.dtype != torch.bool):
        raise CaptureError(
            f"example_mask of {mask.dtype} with {mask.ndim} dimensions: expected one torch.bool per example, [B]"
        )
    return examples


def check_part(losses: Tensor, mask: Tensor | None, augmult: int, begun: int, *, more: bool) -> int:
    """1: the example of whose K rows these are some, after ``begun`` others; or ``CaptureError``."""
    rows = begun + losses.numel()
    if losses.ndim != 1 or rows == begun or rows > augmult or more != (rows < augmult):
        raise CaptureError(
            f"passes over one example: expected all of its augmult={augmult} rows, one loss for each, some in each"
            " pass, and more=True in every pass but the last"
        )
    if mask is not None:
        raise CaptureError("passes over one example take no example_mask: leave padding out")
    return 1


def _averages_rows(inputs: list[Tensor], losses: int, augmult: int) -> bool:
    """Whether the model saw more rows than there are losses, and no input has as many."""
    if not inputs or inputs[0].shape[0] <= losses:
        return False
    k_averaged = augmult > 1 and inputs[0].shape[0] == augmult * losses
    return k_averaged or not any(t.shape[0] == losses or (_sequence(t) and t.shape[1] == losses) for t in inputs)


def _sequence(t: Tensor) -> bool:
    """Whether it may be sequence first: features ``[T, N, D]`` or tokens ``[T, N]``."""
    return t.ndim == 3 or (t.ndim == 2 and not t.is_floating_point())
