"""Per-example weight gradients of convolutions (1-d to 3-d, plain and transposed), their norms and clipped sum.

Shapes: input ``a [N, Cin, *space]``, output gradient ``g [N, Cout, *out]``, ``N = B * R`` rows, R consecutive rows
per example. ``ConvSpec`` holds the geometry. With patches of the input a convolution is a linear map per group
(``D = Cin/groups * taps``, ``M = R * positions``), so the forms and costs are those of ``dpfast.kernels.linear``.
A transposed convolution is the same with the roles of input and output gradient exchanged.

    per_example_grads   2 B M D P FLOPs, writes B D P numbers, the norms in the same pass
    sq_norms            2 B M D P FLOPs, nothing stored
    gram_sq_norms       2 B M^2 (D + P) FLOPs, D = Cin where pixels are multiplied; a bound on the rounding error
    clipped_sum         2 B M D P FLOPs

Any strides and memory formats; bfloat16 and float16 are summed in float32. On the CPU ``native`` computes float32 and
bfloat16, on a GPU ``triton`` these and float16; the library (oneDNN, cuDNN) computes the rest, one example at a time.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from dpfast.kernels.chunks import bytes_alive
from dpfast.kernels.conv import problem, reference
from dpfast.kernels.conv.spec import ConvSpec
from dpfast.kernels.dispatch import NATIVE_DTYPES, TRITON_DTYPES, Backend, choose, expect, expected, implementation
from dpfast.kernels.precision import accumulation_dtype
from dpfast.kernels.registry import register

__all__ = [
    "ConvSpec",
    "clipped_sum",
    "gram_sq_norms",
    "has_pixel_gram",
    "packed_grads",
    "per_example_grads",
    "sq_norms",
]


def per_example_grads(
    a: Tensor, g: Tensor, spec: ConvSpec, examples: int, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """``G [B, *weight_shape]`` (a view of memory in ``spec``'s order) and ``|G_i|^2 [B]`` of the numbers stored."""
    flat, sq = packed_grads(a, g, spec, examples, backend=backend)
    return spec.weights(flat), sq


def packed_grads(
    a: Tensor, g: Tensor, spec: ConvSpec, examples: int, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """The same as ``[B, numbers]``: ``spec.weights`` makes weights of it."""
    _check(a, g, spec, examples)
    flat, sq = _per_example_grads(a, g, *spec.arguments, examples, backend)
    return flat, sq


def sq_norms(a: Tensor, g: Tensor, spec: ConvSpec, examples: int, *, backend: Backend | None = None) -> Tensor:
    """``|G_i|^2 [B]``, float64, of the ``G_i`` that ``clipped_sum`` adds up; none is stored."""
    _check(a, g, spec, examples)
    return _sq_norms(a, g, *spec.arguments, examples, backend)


def gram_sq_norms(
    a: Tensor, g: Tensor, spec: ConvSpec, examples: int, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """``|G_i|^2 [B]`` from Gram matrices of pixels or patches, and the bound on its rounding error ``[B]``."""
    _check(a, g, spec, examples)
    return _gram_sq_norms(a, g, *spec.arguments, examples, backend)


def clipped_sum(a: Tensor, g: Tensor, spec: ConvSpec, w: Tensor, *, backend: Backend | None = None) -> Tensor:
    """``sum_i w_i G_i``, of the weight's shape; an example with ``w_i = 0`` contributes exactly 0."""
    _check(a, g, spec, len(w), w)
    flat = _clipped_sum(a, g, *spec.arguments, w, backend)
    return spec.weight(flat)


def has_pixel_gram(a: Tensor, spec: ConvSpec) -> bool:
    """Whether ``gram_sq_norms`` multiplies pixels instead of patches; also for tensors without numbers."""
    return _pixels(expected(a, **_DTYPES), spec)


def _check(a: Tensor, g: Tensor, spec: ConvSpec, examples: int, w: Tensor | None = None) -> None:
    first, channels, dims = spec.weight_shape[0], spec.weight_shape[1] * spec.groups, 2 + len(spec.kernel)
    inputs, outputs = (first, channels) if spec.transposed else (channels, first)
    fits = a.ndim == g.ndim == dims and len(a) == len(g) and a.shape[1] == inputs and g.shape[1] == outputs
    if fits and len(a) % max(1, examples) == 0 and (w is None or w.ndim == 1):
        return
    shape = f"expected a [N, {inputs}, *space] and g [N, {outputs}, *out] for a weight {list(spec.weight_shape)}"
    expect(
        "conv",
        [f"{shape}, and examples ({examples}) or w [B] that divide N"],
        a=a,
        g=g,
        **({"w": w} if w is not None else {}),
    )


def _choose(backend: Backend | None, a: Tensor, g: Tensor) -> Backend:
    return choose(backend, a, g, **_DTYPES) if backend is not None or a.dtype == g.dtype else "reference"


def _pixels(chosen: Backend, spec: ConvSpec) -> bool:
    """Whether a backend multiplies pixels for a Gram."""
    return chosen != "reference" and bool(_of_grams(chosen).takes_gram(spec))


def _implementation(backend: Backend | None, a: Tensor, g: Tensor) -> Any:
    chosen = _choose(backend, a, g)
    return implementation(__name__, "library" if chosen == "reference" else chosen)


def _of_grams(chosen: Backend) -> Any:
    """What is known of a backend's Grams, whether or not it is installed here."""
    return problem if chosen == "triton" else implementation(__name__, chosen)


_DTYPES: dict[Backend, Collection[torch.dtype]] = {"native": NATIVE_DTYPES, "triton": TRITON_DTYPES}
_GEOMETRY = (
    "Tensor a, Tensor g, int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, bool transposed,"
    " int[] output_padding"
)


def _split(arguments: tuple[Any, ...]) -> tuple[ConvSpec, tuple[Any, ...]]:
    """The geometry of the schema as a ``ConvSpec``, and what comes after it."""
    return ConvSpec.from_arguments(*arguments[:7]), arguments[7:]


def _run_per_example_grads(a: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    spec, (examples, backend) = _split(rest)
    flat, sq = _implementation(backend, a, g).per_example_grads(a, g, spec, examples)
    return flat, sq


def _fake_per_example_grads(a: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    spec, (examples, _) = _split(rest)
    flat = a.new_empty((examples, spec.numbers), dtype=accumulation_dtype(a, g))
    return flat, a.new_empty(examples, dtype=torch.float64)


def _run_sq_norms(a: Tensor, g: Tensor, *rest: Any) -> Tensor:
    spec, (examples, backend) = _split(rest)
    sq: Tensor = _implementation(backend, a, g).sq_norms(a, g, spec, examples)
    return sq


def _fake_sq_norms(a: Tensor, g: Tensor, *rest: Any) -> Tensor:  # noqa: ARG001
    _, (examples, _) = _split(rest)
    return a.new_empty(examples, dtype=torch.float64)


def _run_gram_sq_norms(a: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    spec, (examples, backend) = _split(rest)
    chosen = _choose(backend, a, g)
    if _pixels(chosen, spec):
        kernel = implementation(__name__, "triton_gram" if chosen == "triton" else chosen)
        sq, bound = kernel.gram_sq_norms(a, g, spec, examples)
        return sq, bound
    sq, bound = reference.gram_sq_norms_in_chunks(a, g, spec, examples)
    return sq.double(), bound.double()


def _fake_gram_sq_norms(a: Tensor, _g: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, (examples, _) = _split(rest)
    sq = a.new_empty(examples, dtype=torch.float64)
    return sq, torch.empty_like(sq)


def _gram_scratch(a: Tensor, g: Tensor, *rest: Any) -> int:
    spec, (examples, _) = _split(rest)
    rows = a.shape[0] // max(1, examples)
    chosen = expected(a, g, **_DTYPES)
    kernel = _of_grams(chosen).gram_bytes(a, g, rows) if _pixels(chosen, spec) else None
    return bytes_alive(reference.gram_bytes(a, g, spec, rows) if kernel is None else kernel, examples)


def _native_scratch(a: Tensor, g: Tensor, *rest: Any) -> int:
    """Of what sums over rows, for norms (``examples``) or with weights."""
    spec, (last, _) = _split(rest)
    if expected(a, g, **_DTYPES) != "native":
        return 0
    weighted = isinstance(last, Tensor)
    examples = len(last) if weighted else last
    return int(implementation(__name__, "native").scratch_bytes(a, g, spec, examples, weighted=weighted))


def _run_clipped_sum(a: Tensor, g: Tensor, *rest: Any) -> Tensor:
    spec, (w, backend) = _split(rest)
    flat: Tensor = _implementation(backend, a, g).clipped_sum(a, g, spec, w)
    return flat


def _fake_clipped_sum(a: Tensor, g: Tensor, *rest: Any) -> Tensor:
    spec, _ = _split(rest)
    return a.new_empty(spec.numbers, dtype=accumulation_dtype(a, g))


_per_example_grads = register(
    f"conv_per_example_grads({_GEOMETRY}, int examples, str? backend) -> (Tensor, Tensor)",
    _run_per_example_grads,
    _fake_per_example_grads,
    _native_scratch,
)
_sq_norms = register(
    f"conv_sq_norms({_GEOMETRY}, int examples, str? backend) -> Tensor", _run_sq_norms, _fake_sq_norms, _native_scratch
)
_gram_sq_norms = register(
    f"conv_gram_sq_norms({_GEOMETRY}, int examples, str? backend) -> (Tensor, Tensor)",
    _run_gram_sq_norms,
    _fake_gram_sq_norms,
    _gram_scratch,
)
_clipped_sum = register(
    f"conv_clipped_sum({_GEOMETRY}, Tensor w, str? backend) -> Tensor",
    _run_clipped_sum,
    _fake_clipped_sum,
    _native_scratch,
)
