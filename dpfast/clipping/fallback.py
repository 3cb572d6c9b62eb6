"""Per-example gradients of any torch call with trainable arguments, by vector-Jacobian products: correct and slow."""

import warnings
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from dpfast.clipping.problems import Problem, refusal
from dpfast.clipping.rows import Rows
from dpfast.clipping.tape import Terms, Use
from dpfast.clipping.terms import Stored
from dpfast.clipping.trees import function_name, replace_tensors, tensors_in
from dpfast.kernels.precision import accumulation_dtype

CURES = {  # for what torch.func cannot differentiate
    "lstm": "step through the sequence with nn.LSTMCell, or freeze it (or, slowly and on a CPU, take the step within"
    " torch.backends.mkldnn.flags(enabled=False))",
    "gru": "step through the sequence with nn.GRUCell, or freeze it",
    "rnn_tanh": "step through the sequence with nn.RNNCell, or freeze it",
    "rnn_relu": "step through the sequence with nn.RNNCell, or freeze it",
}
CHUNK_ELEMENTS = 1 << 24  # masked copies of the output gradient that are alive at a time


def fallback_use(
    func: Any,
    args: Any,
    kwargs: Any,
    is_tracked: Callable[[Any], bool],
    *,
    names: tuple[str, ...] = (),
    result: int | None = None,
) -> Use | Problem:
    """A use whose terms come from ``torch.func.vjp`` of the call itself, one masked cotangent per example.

    names: of the parameters, for messages; result: which one, when the call returns several.
    """
    name = function_name(func)
    if kwargs.get("out") is not None or name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        return Problem(
            (),
            "a trainable parameter enters a change in place that dpfast has no rule for",
            "use the operation's out-of-place form (x = x.op(p), torch.where for indexed assignment)",
        )
    saved = tuple(tensors_in((args, kwargs)))
    target_ids = list(dict.fromkeys(id(t) for t in saved if is_tracked(t)))
    targets = {id(t): t for t in saved if is_tracked(t)}
    device = saved[0].device.type
    autocast, precision = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def call(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """The call with other values of its trainable arguments and other tensors."""
        by_target = dict(zip(target_ids, values, strict=True))
        order = iter(tensors)

        def substitute(original: Tensor) -> Tensor:
            current = next(order)
            return by_target.get(id(original), current)

        new_args, new_kwargs = replace_tensors((args, kwargs), substitute)
        with torch.autocast(device, precision, enabled=autocast, cache_enabled=False):
            output = func(*new_args, **new_kwargs)
        tensor: Tensor = output if result is None else output[result]
        return tensor

    def terms(saved: tuple[Tensor, ...], g: Tensor, rows: Rows) -> Terms:
        is_data = [id(original) not in targets for original in tensors_in((args, kwargs))]
        values = [targets[key].detach() for key in target_ids]
        try:
            dims = _row_dims(call, values, saved, is_data, g, rows)
            grads = _per_example(call, values, saved, dims, g, rows)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            what = f"{name}: dpfast has no rule for it, and torch.func cannot differentiate it"
            cure = CURES.get(name, "write it with operations that torch.func can differentiate, or freeze it")
            raise refusal([Problem(names, what, cure)]) from error
        if grads is None:
            what = f"{name}: the rows of its arguments cannot be told apart"
            cure = "keep the rows of the batch along one dimension of every argument"
            raise refusal([Problem(names, what, cure)])
        wide = [grad.to(accumulation_dtype(grad)) for grad in grads]  # sums of what is rounded would be rounded, too
        return [(targets[key], Stored(grad)) for key, grad in zip(target_ids, wide, strict=True)]

    return Use(saved, terms, ruled=False)


Call = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
Dims = tuple[int | None, ...]  # per tensor: the dimension that holds the rows, None if none does


def _alone(tensors: Sequence[Tensor], dims: Dims, example: int, examples: int) -> list[Tensor]:
    """The tensors with every example's rows replaced by those of ``example``."""
    return [
        t if dim is None else _tiled(Rows(examples, dim).split(t)[example], dim, examples)
        for t, dim in zip(tensors, dims, strict=True)
    ]


def _tiled(block: Tensor, dim: int, examples: int) -> Tensor:
    """``[R, ...]``, rows first, to ``[..., examples * R, ...]`` with the rows along ``dim``."""
    return block.repeat(examples, *[1] * (block.ndim - 1)).movedim(0, dim)


def _row_dims(
    call: Call, values: Sequence[Tensor], saved: Sequence[Tensor], is_data: Sequence[bool], g: Tensor, rows: Rows
) -> Dims | None:
    """Where ``[*values, *saved]`` hold rows: shown by making an example alone in the batch, which must keep its output.

    With random numbers for the values, whose zeros would hide everything. They hold rows where something for each row
    was computed from parameters alone (an embedding of ``torch.arange``, a bias expanded).
    """
    size, n = g.shape[rows.dim], len(values)
    generator = torch.Generator().manual_seed(0)
    held = [*(torch.randn(v.shape, generator=generator).to(v) for v in values), *saved]

    def fitting(t: Tensor) -> list[int | None]:
        return sorted((d for d in range(t.ndim) if t.shape[d] == size), key=lambda d: d != rows.dim)

    choices: list[list[int | None]] = [[None, *fitting(v)] for v in values]
    choices += [[*fitting(t), None] if data else [None] for t, data in zip(saved, is_data, strict=True)]
    output = rows.split(call(held[:n], saved))
    finite = [i for i in range(rows.examples) if bool(output[i].isfinite().all())]
    shown = {finite[0], finite[-1]} if finite else set()
    scale = max((output[i].abs().max().item() for i in shown if output[i].numel()), default=1.0)

    def keeps_outputs(dims: Dims) -> bool:
        for i in shown:
            alone = _alone(held, dims, i, rows.examples)
            got = rows.split(call(alone[:n], alone[n:]))[0]
            if not torch.allclose(got, output[i], rtol=1e-4, atol=1e-5 * scale):
                return False
        return True

    return next(filter(keeps_outputs, product(*choices)), None)


def _per_example(
    call: Call, values: Sequence[Tensor], saved: Sequence[Tensor], dims: Dims | None, g: Tensor, rows: Rows
) -> tuple[Tensor, ...] | None:
    """Gradients ``[B, *value.shape]``, each computed with its example alone in the batch.

    Masking the gradient alone would not do: 0 * inf of one example's activations is NaN in everybody's gradient.
    """
    if dims is None:
        return None
    everything, n = [*values, *saved], len(values)
    with_rows = [i for i, dim in enumerate(dims) if dim is not None]
    blocks = [Rows(rows.examples, cast(int, dims[i])).split(everything[i]) for i in with_rows]

    def of(g_block: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        """Of a value that holds rows, those of the example, rows first."""
        held = list(everything)
        for i, block in zip(with_rows, own, strict=True):
            held[i] = _tiled(block, cast(int, dims[i]), rows.examples)
        nothing = torch.zeros_like(g_block).repeat(rows.examples - 1, *[1] * (g_block.ndim - 1))
        cotangent = torch.cat([g_block, nothing]).movedim(0, rows.dim)
        grads: tuple[Tensor, ...] = torch.func.vjp(lambda *v: call(v, held[n:]), *held[:n])[1](cotangent)
        return tuple(
            grad if dim is None else Rows(rows.examples, dim).split(grad)[0]
            for grad, dim in zip(grads, dims[:n], strict=True)
        )

    batched = (rows.split(g), *blocks)
    grads = _mapped(of, batched, chunk=max(1, CHUNK_ELEMENTS // max(1, g.numel())))
    if grads is None:
        each = [of(*(b[i] for b in batched)) for i in range(rows.examples)]
        grads = tuple(torch.stack(of_all) for of_all in zip(*each, strict=True))
    return tuple(grad if dim is None else _in_place(grad, dim) for grad, dim in zip(grads, dims[:n], strict=True))


def _mapped(of: Callable[..., tuple[Tensor, ...]], batched: Sequence[Tensor], chunk: int) -> tuple[Tensor, ...] | None:
    """``of`` for all examples at once; None if torch cannot, or does it wrongly (``linalg.solve`` in torch 2.13)."""
    try:
        with warnings.catch_warnings():  # torch says which operations it maps slowly; the user knows that it is slow
            warnings.filterwarnings("ignore", message="There is a performance drop")
            mapped: tuple[Tensor, ...] = torch.func.vmap(of, chunk_size=chunk)(*batched)
    except RuntimeError:  # an operation without a batching rule
        return None
    norms = torch.stack([grad.flatten(1).double().norm(dim=1) for grad in mapped]).norm(dim=0)
    example = int(norms.nan_to_num(-1, -1, -1).argmax())
    plain = of(*(b[example] for b in batched))
    errors = torch.stack([(one - grad[example]).double().norm() for one, grad in zip(plain, mapped, strict=True)])
    return mapped if bool(errors.norm() <= 1e-3 * norms[example]) or not norms[example].isfinite() else None


def _in_place(grads: Tensor, dim: int) -> Tensor:
    """``[B, R, ...]``, what each example's own rows have, to ``[B, *shape]`` with the B * R rows along ``dim``."""
    b = len(grads)
    whole = grads.new_zeros(b, b, *grads.shape[1:])
    whole[range(b), range(b)] = grads
    return whole.flatten(1, 2).movedim(1, dim + 1)
