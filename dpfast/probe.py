"""That an objective keeps examples apart: shown on synthetic examples, before the private ones are used."""

import warnings
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from dpfast.clipping.calls import brought_out, no_trace_left
from dpfast.clipping.synthetic import Synthetic, forward_verdict, thorough_verdict
from dpfast.data.keyed import RowKeys
from dpfast.errors import CaptureError
from dpfast.objective import Objective
from dpfast.seeding import RandomState

PROBED_EXAMPLES = 4  # that an objective is shown on


def show_objective(
    objective: Objective,
    model: nn.Module,
    examples: Sequence[Tensor],
    keys: RowKeys,
    parameters: Iterable[nn.Parameter],
) -> None:
    """There is a loss for each row, and no example changes the loss of another; or ``CaptureError``.

    The clipper sees what happens inside the model; this sees what happens around it.

    examples: of whose shapes, types and labels the synthetic ones are made. parameters: those that training moves.
    """
    count, rows, state = len(keys.ids), keys.augmult, RandomState()

    def losses(*examples: Tensor) -> Tensor:
        state.restore()
        out = objective(model, *examples, keys)
        if not isinstance(out, Tensor) or out.shape != (keys.rows,):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise CaptureError(
                f"the objective returned {got} for {count} examples of {rows} rows (keys.augmult): expected one"
                f" loss per row, ({keys.rows},), not reduced"
            )
        return out.view(count, rows)

    with no_trace_left(model):
        try:
            verdict = thorough_verdict(
                lambda batch: forward_verdict(losses, tuple(examples), {}, batch),
                Synthetic(rows=count, augmult=1),
                lambda: brought_out(parameters),
            )
        except TypeError as error:
            error.add_note("the objective is called as objective(model, *examples, keys), keys being RowKeys")
            raise
    if verdict == "mixed":
        raise CaptureError(
            "the objective cannot be trained on privately: changing one example changes the loss of another. Use no"
            " statistics of the batch (means, standardisation, BatchNorm in training mode), not even behind"
            " detach(); draw random numbers from the keys, which belong to an example"
        )
    if verdict == "spoiled":
        raise CaptureError(
            "the objective cannot be trained on privately: an example whose numbers are not finite makes the losses of"
            " others so. Keep the rows of the examples in places of their own, or replace such numbers first"
            " (torch.nan_to_num)"
        )
    if verdict == "unrepeatable":
        warnings.warn(
            "it was not shown that the objective keeps examples apart: it gives two results for the same examples"
            " (random numbers that are not of the keys?)",
            stacklevel=4,
        )
