"""``keyed``: Philox against its published vectors, and every backend against the formulas."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dpfast.kernels import keyed
from dpfast.kernels.dispatch import KernelError
from dpfast.kernels.keyed.reference import philox4x32
from kernel_cases import BACKENDS, device, needs_native, needs_triton, poisoned, threads  # noqa: F401 (fixtures)

KERNELS = [pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_triton)]
# Random123 1.09, tests/kat_vectors, "philox4x32 10".
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected) -> None:
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_are_of_the_published_words(backend) -> None:
    """Of the vector whose block is the first of a row."""
    found = keyed.uniform(torch.tensor([0]), 1, (0, 0), step=0, count=4, backend=backend)
    assert found.tolist() == [[(word >> 8) * 2.0**-24 for word in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)]]


def assert_same(examples: int, rows: int, count: int, backend) -> None:
    ids = torch.randint(0, 1 << 32, (examples,))
    how = {"step": 0xFFFFFFF0, "count": count, "first": 3}
    for draw in (keyed.uniform, keyed.normal):
        ours, exact = (draw(ids, rows, (0xFFFFFFFF, 12345), **how, backend=name) for name in (backend, "reference"))
        assert ours.shape == (examples * rows, count)
        assert ours.dtype == torch.float32
        if draw is keyed.uniform:
            assert torch.equal(ours, exact)
        else:  # a number may lie between two of float32
            torch.testing.assert_close(ours, exact, rtol=2e-7, atol=1e-15)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("examples", "rows", "count"),
    [
        (1, 1, 1),
        (3, 2, 5),
        (2, 3, 64),
        (1, 2, 1030),
        (0, 2, 3),
        (2, 1, 0),
        pytest.param(40, 7, 301, marks=pytest.mark.large),
    ],
)
def test_every_backend_draws_the_same(examples, rows, count, backend) -> None:
    assert_same(examples, rows, count, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_does_not_know_its_neighbours(backend) -> None:
    """Whatever lies around it: fewer examples, rows or numbers."""
    ids, key = torch.tensor([7, 1 << 31, 5]), (1, 2)
    for draw in (keyed.uniform, keyed.normal):
        full = draw(ids, 3, key, step=9, count=40, backend=backend).view(3, 3, 40)
        part = draw(ids[1:], 2, key, step=9, count=11, first=1, backend=backend).view(2, 2, 11)
        assert torch.equal(part, full[1:, 1:, :11])


def test_what_cannot_be() -> None:
    for ids in (torch.zeros(2), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(KernelError, match=r"ids int64 \[B\]"):
            keyed.uniform(ids, 1, (0, 0), step=0, count=1)
    for key, step, first in (((0,), 0, 0), ((0, 1 << 32), 0, 0), ((0, 0), -1, 0), ((0, 0), 0, 0xFFFFFFFF)):
        with pytest.raises(KernelError, match="of 32 bits"):
            keyed.normal(torch.zeros(1, dtype=torch.int64), 2, key, step=step, count=1, first=first)


def test_a_compiled_caller_is_compiled_once() -> None:
    """Whatever the step and the key."""
    compiled = CompileCounter()
    ids = torch.arange(3)

    @torch.compile(backend=compiled, fullgraph=True)
    def draw(step: int, key: tuple[int, int]) -> torch.Tensor:
        return 2 * keyed.normal(ids, 2, key, step=step, count=5)

    for step in range(2, 8):
        key = (7 * step, 11 * step)
        assert torch.equal(draw(step, key), 2 * keyed.normal(ids, 2, key, step=step, count=5))
    assert compiled.frame_count <= 2
