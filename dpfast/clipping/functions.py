"""What the capture knows of torch functions beside their rules: what they read, write and make."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dpfast.clipping.trees import function_name, tensors_in

FACTORIES = frozenset(  # make constants out of nothing
    {
        *(torch.arange, torch.linspace, torch.logspace, torch.tril_indices, torch.triu_indices),
        *(torch.zeros, torch.ones, torch.full, torch.eye, torch.empty, torch.tensor, torch.scalar_tensor),
    }
)
NUMBERS = frozenset(  # of these, what is made from numbers that may be data
    {
        *(torch.zeros, torch.ones, torch.full, torch.empty, torch.tensor, torch.scalar_tensor),
        *(torch.full_like, Tensor.new_full, Tensor.new_tensor, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty),
    }
)
ARITHMETIC = frozenset(
    {
        *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.sub, Tensor.sub, Tensor.__sub__),
        *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
    }
)
READ_OUT = frozenset(  # hand numbers to Python, from where they can go anywhere
    {
        *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__format__),
        *(Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__, Tensor.__complex__),
        *(torch.equal, Tensor.equal, torch.allclose, Tensor.allclose, Tensor.__contains__, Tensor.__repr__),
        *(torch.is_nonzero, Tensor.is_nonzero),
    }
)
INDEXED = frozenset((Tensor.__getitem__, Tensor.__setitem__))  # a slice up to a tensor reads it out
RANDOM = frozenset(  # make no constants, whatever they are made from
    {
        *(torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, torch.dropout, F.dropout),
        *(torch.rand_like, torch.randn_like, torch.randint_like),
    }
)
SELECTS = frozenset(  # pick rows by the numbers of their first argument
    {
        *(torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.where),
        *(torch.masked_select, Tensor.masked_select, torch.unique, Tensor.unique),
        *(torch.unique_consecutive, Tensor.unique_consecutive, torch.msort, Tensor.msort),
    }
)
ORDERS = frozenset(  # or put them into another order, along the dimension that is the first argument but one
    {torch.sort, Tensor.sort, torch.argsort, Tensor.argsort, torch.topk, Tensor.topk}
)
SELECTS_BY_INDEX = frozenset(  # or by those of another argument
    {
        *(Tensor.__getitem__, torch.index_select, Tensor.index_select, torch.gather, Tensor.gather),
        *(torch.take, Tensor.take, torch.take_along_dim, Tensor.take_along_dim),
        *(torch.repeat_interleave, Tensor.repeat_interleave, F.embedding, torch.embedding),
    }
)
_DIM_OF = {  # of these, the place of the argument ``dim``, along which they pick
    **dict.fromkeys((torch.index_select, Tensor.index_select, torch.gather, Tensor.gather), 1),
    **dict.fromkeys((torch.take_along_dim, Tensor.take_along_dim), 2),
    **dict.fromkeys((torch.repeat_interleave, Tensor.repeat_interleave), 2),
}
PUTS_BACK = frozenset(  # what was selected where it belongs; or what was not, where data says
    getattr(home, name)
    for name in ("index_add", "index_copy", "index_put", "scatter", "scatter_add", "masked_scatter")
    for home, name in ((torch, name), (Tensor, name), (Tensor, name + "_"))
    if hasattr(home, name)
) | {Tensor.__setitem__}
LOWERED = frozenset(  # autocast takes all that they are given to its own dtype
    {
        *(getattr(F, f"conv{kind}{dims}d") for kind in ("", "_transpose") for dims in (1, 2, 3)),
        *(getattr(torch, f"conv{kind}{dims}d") for kind in ("", "_transpose") for dims in (1, 2, 3)),
        *(F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.einsum),
        *(torch.mm, Tensor.mm, torch.bmm, Tensor.bmm),
    }
)
BACK_PROPAGATES = frozenset((Tensor.backward, torch.autograd.backward))
AS_ANOTHER = frozenset(  # read only the shape or dtype of their other arguments
    {
        *(Tensor.expand_as, Tensor.view_as, Tensor.reshape_as, Tensor.type_as, Tensor.to),
        *(torch.zeros_like, torch.ones_like),
    }
)
METADATA = frozenset(  # tell of a tensor what its numbers have no part in
    {
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "is_cuda")
        ),
        *(Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.nelement, Tensor.element_size),
        *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_contiguous, Tensor.storage_offset),
        *(Tensor.__len__, Tensor.get_device),
    }
)
_AUGMENTED = frozenset(
    f"__{name}__"
    for name in (
        *("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
        *("iand", "ior", "ixor", "ilshift", "irshift", "idiv"),
    )
)
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call changes in place."""
    written = tensors_in(args[0]) if args and (_is_in_place(func) or (kwargs and kwargs.get("inplace"))) else []
    return written + tensors_in(kwargs["out"]) if kwargs and "out" in kwargs else written


@functools.cache
def _is_in_place(func: Any) -> bool:
    name = function_name(func)
    with_underscore = name.endswith("_") and not name.endswith("__")
    return with_underscore or name in _AUGMENTED or func == _SET_DATA


def selected_dims(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], data: list[Tensor]) -> list[int]:
    """The dimensions of its first tensor along which a call of ``SELECTS_BY_INDEX`` picks by what ``data`` holds."""
    source = tensors_in((args, kwargs))[0]
    if func is Tensor.__getitem__:
        return _indexed_dims(source, args[1], {id(t) for t in data})
    place = _DIM_OF.get(func)
    dim = None if place is None else kwargs.get("dim", args[place] if len(args) > place else None)
    return list(range(source.ndim)) if dim is None else [dim % max(1, source.ndim)]


def _indexed_dims(source: Tensor, index: Any, data: set[int]) -> list[int]:
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, Tensor) and id(part) in data and not part.ndim for part in parts):
        return list(range(source.ndim))  # a truth value of its own keeps all, or nothing

    def width(part: Any) -> int:
        """How many dimensions a part of an index takes up."""
        if part is None or part is Ellipsis or isinstance(part, bool):
            return 0
        return part.ndim if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) else 1

    found, dim = list[int](), 0
    for place, part in enumerate(parts):
        if part is Ellipsis:
            dim = source.ndim - sum(map(width, parts[place + 1 :]))
            continue
        if any(id(t) in data for t in tensors_in(part)):
            found += range(dim, dim + width(part))
        dim += width(part)
    return found


def storage(t: Tensor) -> int:
    """Where a tensor's numbers lie: equal for views, ``detach()`` and ``.data``."""
    if isinstance(t, FakeTensor):
        return t.untyped_storage()._cdata
    return t.untyped_storage().data_ptr() if t.layout == torch.strided and not t.is_meta else 0


def random_state() -> Tensor:
    """Of the CPU's generator and, where there are any in use, of the current GPU's."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return torch.cat(states)
