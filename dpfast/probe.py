"""That an objective keeps examples apart: shown on synthetic examples, before the private ones are used."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from dpfast.clipping.calls import brought_out, no_trace_left
from dpfast.clipping.synthetic import Synthetic, Verdict, forward_verdict, repeated_verdict, thorough_verdict
from dpfast.data.keyed import RowKeys
from dpfast.errors import CaptureError
from dpfast.objective import Objective
from dpfast.seeding import RandomState

PROBED_EXAMPLES = 4  # that an objective is shown on
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
SAME_LOSS = 0.02  # losses and gradients in batches of two sizes differ by less: another order of sums, in bfloat16


def show_objective(
    objective: Objective,
    model: nn.Module,
    examples: Sequence[Tensor],
    keys: RowKeys,
    parameters: Iterable[nn.Parameter],
    *,
    seed: int | None = None,
) -> None:
    """There is a loss for each row, and no example changes the loss of another, be it by being there; or
    ``CaptureError``.

    The clipper sees what happens inside the model; this sees what happens around it.

    examples: of whose shapes, types and labels the synthetic ones are made. parameters: those that training moves.
    seed: of the examples that are changed, when this is shown once more, with the weights as they are now; the first
    time (None) it is shown with other weights and input, too.
    """
    count, rows, state = len(keys.ids), keys.augmult, RandomState()

    def losses(*examples: Tensor) -> Tensor:
        state.restore()
        own = replace(keys, ids=keys.ids[: len(examples[0])])
        out = objective(model, *examples, own)
        if not isinstance(out, Tensor) or out.shape != (own.rows,):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise CaptureError(
                f"the objective returned {got} for {len(own.ids)} examples of {rows} rows (keys.augmult): expected one"
                f" loss per row, ({own.rows},), not reduced"
            )
        return out.view(-1, rows)

    batch = Synthetic(rows=count, augmult=1)
    with no_trace_left(model):
        try:

            def probe(batch: Synthetic) -> Verdict:
                return forward_verdict(losses, tuple(examples), {}, batch, seed=seed)

            if seed is None:
                verdict = thorough_verdict(probe, batch, lambda: brought_out(parameters))
            else:
                verdict = repeated_verdict(probe, batch, seed)
        except TypeError as error:
            error.add_note("the objective is called as objective(model, *examples, keys), keys being RowKeys")
            raise
        sized = verdict in ("mixed", "spoiled", "unrepeatable") or _is_the_same_among_fewer(
            losses, [batch(x) for x in examples], model, parameters, thorough=seed is None
        )
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
    if sized is False:
        raise CaptureError(
            "the objective cannot be trained on privately: the loss of an example depends on how many others are in the"
            " batch, and that is private. Divide by no number of examples or rows (the sum over a batch is divided by"
            " the plan's expected batch size)"
        )
    unshown = "it gives two results for the same examples" if verdict == "unrepeatable" else ""
    if sized is None:
        unshown = "their losses change with their number, and so do the random numbers that it draws"
    if unshown:
        warnings.warn(
            f"it was not shown that the objective keeps examples apart: {unshown} (random numbers that are not of the"
            " keys, dropout that is no layer?)",
            stacklevel=4,
        )


def _is_the_same_among_fewer(
    losses: Callable[..., Tensor],
    examples: Sequence[Tensor],
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    *,
    thorough: bool,
) -> bool | None:
    """Whether the first example has the same losses and the same gradient beside fewer others, with the weights as they
    are and (thorough) with some that hide nothing. None: not known, as what is drawn at random depends on how many
    there are.
    """
    trained = [p for p in parameters if p.requires_grad]
    few = [x[: len(x) // 2] for x in examples]

    def of_first(given: Sequence[Tensor]) -> tuple[Tensor, Tensor, RandomState]:
        with torch.enable_grad():
            own = losses(*given)[0]
            drawn = RandomState()
            grads = torch.autograd.grad(own.sum(), trained, allow_unused=True) if own.requires_grad else ()
        return own.detach(), torch.cat([g.flatten() for g in grads if g is not None] or [own.detach()]), drawn

    for weights in (nullcontext, lambda: brought_out(trained)) if thorough else (nullcontext,):
        with without_dropout(model), weights():
            (*found, _), (*among_all, drawn) = of_first(few), of_first(examples)
            losses(*few)
            random = drawn.has_moved()
        if not all(map(_alike, found, among_all)):
            return None if random else False
    return True


def _alike(one: Tensor, other: Tensor) -> bool:
    finite = one.isfinite()
    if one.shape != other.shape or not torch.equal(finite, other.isfinite()):
        return False
    return bool((one - other)[finite].norm() <= SAME_LOSS * one[finite].norm())


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Layers that drop nothing: what they draw depends on how many rows there are."""
    layers = [m for m in model.modules() if isinstance(m, DROPOUTS)]
    rates = [layer.p for layer in layers]
    try:
        for layer in layers:
            layer.p = 0.0
        yield
    finally:
        for layer, rate in zip(layers, rates, strict=True):
            layer.p = rate
