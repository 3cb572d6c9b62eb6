"""Compile every Triton kernel in every launch configuration for a GPU that need not be here; one JSON line for each.

Usage: python compile_kernels.py CAPABILITY (80 or 90) [PART_OF_A_NAME]. What the assembler says: registers, stack,
shared memory, and the matrix instructions in PTX; products of 32-bit numbers.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dpfast.kernels.affine import triton as affine
from dpfast.kernels.clip import triton as clip
from dpfast.kernels.conv import launches, triton_gram
from dpfast.kernels.conv import triton as conv
from dpfast.kernels.embedding import triton as embedding
from dpfast.kernels.keyed import triton as keyed
from dpfast.kernels.launch import registers
from dpfast.kernels.linear import triton as linear
from dpfast.kernels.linear.launches import GRAMS, GramLaunch
from dpfast.kernels.noise import triton as noise
from dpfast.kernels.norm import triton as norm
from dpfast.kernels.precision import BLOCK

DTYPES = {"bf16": "ieee", "fp16": "ieee", "fp32": "tf32x3"}


@dataclass(frozen=True)
class Variant:
    """types: of arguments that are not numbers; every number is an i32."""

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    aligned: frozenset[str] = frozenset()  # numbers that 16 divides
    matrix_rows: int = 0  # of its products


MODES = {  # what a program does with its tile: STORE, NORM, SUM
    "norm": (False, True, False),
    "store+norm": (True, True, False),
    "sum": (True, False, True),
}


def conv_variants(dtype: str, *, tma: bool) -> Iterator[Variant]:
    """Every launch in every mode; the first with blocks of other shapes, and with few positions."""
    for mode, (store, measured, total) in MODES.items():
        for described in (True, False) if tma else (False,):
            every = launches.launches(described=described, total=total, half=dtype != "fp32")
            for launch in every:
                flags = {"STORE": store, "NORM": measured, "SUM": total, "UPCAST": False, "PRECISION": DTYPES[dtype]}
                make = by_descriptors if described else by_pointers
                yield from make(f"{mode} {dtype} {launch}", dtype, launch, flags, every=launch == every[0])


RESULTS = {"w": "*fp32", "out": "*fp32", "parts": "*fp32"}
OUT = {"out_i", "out_p", "out_tap"}


def by_descriptors(
    name: str, dtype: str, launch: launches.Launch, flags: dict[str, Any], *, every: bool
) -> Iterator[Variant]:
    """With blocks of lines in a row, of one line, of small images, and of few positions (``every``)."""
    blocks = (1, 2, launch.k // 2), (1, 1, launch.k), (launch.k // 16, 4, 4), (1, 4, launches.LEAST // 4)
    for block in blocks if every else blocks[:1]:
        shape = ", ".join(map(str, (1, *block)))
        sides = {"x": launch.c, "y": launch.p}
        types = {side: f"tensordesc<{dtype}[{shape}, {channels}]>" for side, channels in sides.items()}
        tile = dict(zip(("BN", "BH", "BW", "BP", "BC"), (*block, launch.p, launch.c), strict=True))
        tile |= {"ROWS": launch.rows, "COLUMNS": launch.columns, "out_c": 1}
        yield Variant(
            f"conv.by_descriptors {name} {block}",
            conv.by_descriptors,
            types | RESULTS,
            tile | flags,
            launch.warps,
            launch.stages,
            frozenset(OUT),
            launch.p,
        )


def by_pointers(
    name: str, dtype: str, launch: launches.Launch, flags: dict[str, Any], *, every: bool
) -> Iterator[Variant]:
    """A 3x3 convolution of channels_last images, of strides that 16 divides and of others; a linear map."""
    geometry = dict.fromkeys(("D", "OD", "KD", "SD", "SH", "SW", "DD", "DH", "DW", "PH", "PW", "GROUPS"), 1)
    geometry |= {"H": 32, "W": 32, "OH": 32, "OW": 32, "KH": 3, "KW": 3, "PD": 0, "x_c": 1, "y_p": 1, "out_c": 1}
    strides = {f"{side}_{dim}" for side in "xy" for dim in "indhw"}
    flat = geometry | dict.fromkeys(("H", "W", "OH", "OW", "KH", "KW"), 1) | {"PH": 0, "PW": 0}
    kinds = {"": (geometry, strides | OUT), "unaligned": (geometry, set()), "linear": (flat, strides | OUT)}
    chosen = kinds if flags["STORE"] else ("",)  # what stores does all that norms alone do
    for kind, positions in [*itertools.product(chosen, [launch.k]), *([("", launches.LEAST)] if every else [])]:
        shape, aligned = kinds[kind]
        sizes = {"P": 2 * launch.p, "C": 2 * launch.c, "BK": positions, "BP": launch.p, "BC": launch.c}
        yield Variant(
            f"conv.by_pointers {name} {positions} {kind}",
            conv.by_pointers,
            {"x": f"*{dtype}", "y": f"*{dtype}"} | RESULTS,
            shape | sizes | flags,
            launch.warps,
            launch.stages,
            frozenset(aligned),
            launch.p,
        )


def gram_variants(dtype: str) -> Iterator[Variant]:
    """Of strides that 16 divides, and of others."""
    for aligned in (True, False):
        yield from _gram_variants(dtype, GRAMS[dtype != "fp32", aligned], aligned=aligned)


def _gram_variants(dtype: str, launch: GramLaunch, *, aligned: bool) -> Iterator[Variant]:
    tile = {"BM": launch.m, "BK": launch.k, "BLOCK": BLOCK, "UPCAST": False, "PRECISION": DTYPES[dtype]}
    out = {"sq": "*fp32", "magnitude": "*fp32"}
    how = (launch.warps, launch.stages)
    name = f"{dtype} {'aligned' if aligned else 'unaligned'}"
    for maps in (1, linear.AT_ONCE):
        strides = ("i32", "i32", "constexpr")
        types = {"a": f"*{dtype}", "a_strides": strides, "gs": (f"*{dtype}",) * maps, "g_strides": (strides,) * maps}
        constants = {("a_strides", 2): 1, **{("g_strides", i, 2): 1 for i in range(maps)}}
        yield Variant(
            f"linear.gram {name} {maps}",
            linear.gram,
            types | out | {"Ps": ("i32",) * maps},
            tile | constants,
            *how,
            frozenset({"a_strides", "D", "gs", "g_strides", "Ps"} if aligned else ()),
            launch.m,
        )
    divided = frozenset({"stride_i", "stride_m", "K", "P"} if aligned else ())
    yield Variant(
        f"conv.pixel_gram {name}",
        triton_gram.pixel_gram,
        {"x": f"*{dtype}", "out": "*fp32"},
        tile,
        *how,
        divided,
        launch.m,
    )
    yield Variant(
        f"conv.shifted_gram {name}",
        triton_gram.shifted_gram,
        {"pixels": "*fp32", "y": f"*{dtype}"} | out,
        tile,
        *how,
        divided,
        launch.m,
    )


def memory_variants(dtype: str) -> Iterator[Variant]:
    for dense in (False, True):
        width, length = affine.tile(256, 1024, dense_channels=dense)
        sides, tile = {"a": f"*{dtype}", "g": f"*{dtype}"}, {"BC": width, "BK": length}
        ones = {"a_c": 1, "g_c": 1} if dense else {"a_s": 1, "g_s": 1}
        for scaled in (False, True):
            yield Variant(
                f"affine.sums {dtype} {dense} {scaled}",
                affine.sums,
                sides | {"weight": "*fp32", "bias": "*fp32"},
                tile | ones | {"SCALED": scaled},
                affine.WARPS,
            )
        sides, ones = {"x": f"*{dtype}", "g": f"*{dtype}"}, {"x_c": 1, "g_c": 1} if dense else {"x_s": 1, "g_s": 1}
        yield Variant(f"norm.sums {dtype} {dense}", norm.sums, sides | {"out": "*fp32"}, tile | ones, norm.WARPS)
        ones |= {"dx_c": 1} if dense else {"dx_s": 1}
        yield Variant(
            f"norm.write {dtype} {dense}",
            norm.write,
            sides | {"dx": f"*{dtype}", "lines": "*fp32"},
            tile | ones,
            norm.WARPS,
        )


def finish_variants() -> Iterator[Variant]:
    pointers = dict.fromkeys(("found", "gamma", "weight", "bias", "lines"), "*fp32") | {"eps": "fp32"}
    for per_group, (scaled, lines) in itertools.product((1, 12, 40, 384, 1024), ((True, True), (False, False))):
        channels, group, warps = norm.of_groups(128, per_group)
        flags = {"BC": channels, "BG": group, "SCALED": scaled, "LINES": lines}
        yield Variant(f"norm.finish fp32 {per_group} {scaled} {lines}", norm.finish, pointers, flags, warps)


def embedding_variants(dtype: str) -> Iterator[Variant]:
    """Gradients, and sums of them and of what lies in any order; few features and many."""
    lookups = {"pairs": "*i64", "order": "*i64", "starts": "*i32", "w": "*fp32", "out": "*fp32"}
    aligned = frozenset({"g_i", "g_m", "x_i", "x_m", "D", "out_i", "out_m", "out_v"})
    for width in (16, embedding.FEATURES):
        for squared in (False, True):
            tile = {"BD": width, "STEPS": embedding.STEPS, "SQUARED": squared, "g_d": 1}
            yield Variant(
                f"embedding.gradients {dtype} {width} {squared}",
                embedding.gradients,
                lookups | {"g": f"*{dtype}"},
                tile,
                max(1, width // 128),
                aligned=aligned,
            )
    for width in (16, embedding.TILE[0]):
        for first, kind, dense in ((True, "fp32", {"x_d": 1}), (False, dtype, {"x_d": 1}), (False, dtype, {})):
            tile = {"BD": width, "BN": embedding.TILE[1], "FIRST": first}
            yield Variant(
                f"embedding.weighted_sums {dtype} {width} {first} {dense}",
                embedding.weighted_sums,
                lookups | {"x": f"*{kind}"},
                tile | dense,
                aligned=aligned if dense else frozenset(),
            )


def clip_variants() -> Iterator[Variant]:
    yield Variant(
        "clip.squares fp32", clip.squares, {"flat": "*fp32", "parts": "*fp32"}, {"BLOCK": clip.NUMBERS}, clip.WARPS
    )
    yield Variant(
        "clip.weighted_sums fp32",
        clip.weighted_sums,
        {"table": "*i64", "w": "*fp32"},
        {"BLOCK": clip.NUMBERS, "STEPS": 9},
        clip.WARPS,
    )


def noise_variants() -> Iterator[Variant]:
    for dtype in ("fp32", "fp64"):
        types = {"x": f"*{dtype}", "out": f"*{dtype}", "table": "*i64"}
        yield Variant(f"noise.add_noise {dtype}", noise.add_noise, types, {"BLOCKS": noise.BLOCKS}, noise.WARPS)


def keyed_variants() -> Iterator[Variant]:
    types = {"out": "*fp32", "ids": "*i64", "table": "*i64"}
    for size, warps in ((32, 1), (keyed.BLOCKS, keyed.WARPS)):
        for normal in (False, True):
            yield Variant(
                f"keyed.philox fp32 {size} {normal}", keyed.philox, types, {"BLOCKS": size, "NORMAL": normal}, warps
            )


def variants(capability: int, dtypes: tuple[str, ...] = tuple(DTYPES)) -> list[Variant]:
    found = [*clip_variants(), *finish_variants(), *noise_variants(), *keyed_variants()]
    for dtype in dtypes:
        found += [*conv_variants(dtype, tma=capability >= 90), *gram_variants(dtype), *memory_variants(dtype)]
        found += embedding_variants(dtype)
    return found


def source(of: Variant) -> ASTSource:
    names = of.kernel.arg_names
    constants = {
        (names.index(k),) if isinstance(k, str) else (names.index(k[0]), *k[1:]): v
        for k, v in of.constants.items()
        if isinstance(k, tuple) or k in names
    }
    signature = {n: "constexpr" if (i,) in constants else of.types.get(n, "i32") for i, n in enumerate(names)}
    divisible = [
        path
        for i, n in enumerate(names)
        for path, kind in leaves((i,), signature[n])
        if path not in constants and (kind.startswith("*") or n in of.aligned)
    ]
    return ASTSource(of.kernel, signature, constants, {path: [["tt.divisibility", 16]] for path in divisible})


def leaves(path: tuple[int, ...], kind: Any) -> Iterator[tuple[tuple[int, ...], str]]:
    """Arguments inside of tuples, by their place."""
    if isinstance(kind, tuple):
        for i, each in enumerate(kind):
            yield from leaves((*path, i), each)
    else:
        yield path, kind


def compiled(number: int, capability: int) -> dict[str, Any]:
    """What became of a variant (kernels themselves do not go from process to process), or why nothing did."""
    of = variants(capability)[number]
    row: dict[str, Any] = {"name": of.name, "capability": capability, "matrix_rows": of.matrix_rows}
    try:
        options = {"num_warps": of.warps, "num_stages": of.stages}
        options |= {"maxnreg": registers(of.warps)} if of.matrix_rows else {}
        made = triton.compile(source(of), target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {error}"[:500]}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    used, stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    ptx = made.asm["ptx"]
    return row | {
        "registers": used,
        "stack": stack,
        "local": local,
        "shared": made.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "bulk": ptx.count("cp.async.bulk"),
        "narrow": len(re.findall(r"arith\.muli .* : (?:tensor<\w+x)?i32", made.asm["ttir"])),
    }


if __name__ == "__main__":
    target = int(sys.argv[1])
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    chosen = [i for i, of in enumerate(variants(target)) if only in of.name]
    with ProcessPoolExecutor(int(os.environ.get("JOBS", "1")), get_context("fork")) as pool:
        for row in pool.map(compiled, chosen, [target] * len(chosen)):
            print(json.dumps(row), flush=True)
