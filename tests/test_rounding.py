"""What is more than rounding, entry by entry."""

import pytest
import torch

from dpfast.clipping.rounding import differ

ROWS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
UNITS = torch.tensor([1e9, 1e5, 3e4, 1.0, 1e-3])  # of the columns of a table
NAN, INF = torch.nan, torch.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_column", [False, True])
def test_rounding_is_no_difference(dtype, by_column):
    one = (ROWS * UNITS).to(dtype)
    other = one * (1 + torch.finfo(dtype).eps / 2 * torch.sign(ROWS).to(dtype))
    assert not differ(one, other, by_column=by_column)
    assert not differ(one[:0], other[:0], by_column=by_column)


@pytest.mark.parametrize("column", range(5))
def test_a_column_is_not_hidden_by_larger_ones(column):
    one = ROWS * UNITS
    other = one.clone()
    other[:, column] -= 1e-3 * UNITS[column]
    assert differ(one, other, by_column=True)


def test_a_huge_entry_hides_no_other():
    one = torch.tensor([-1e9, 1.0, 2.0, 3.0])
    assert differ(one, one + torch.tensor([0.0, 1e-3, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("one", "other", "are_other"),
    [
        ([2**53], [2**53 + 1], True),
        ([2**60], [2**60], False),
        ([True], [False], True),
        ([NAN, 1.0], [NAN, 1.0], False),
        ([NAN, 1.0], [1.0, 1.0], True),
        ([INF, 1.0], [INF, 1.0], False),
        ([INF, 1.0], [-INF, 1.0], True),
        ([INF, 1.0], [NAN, 1.0], True),
        ([1 + 1j], [1 + 1.00000001j], False),
        ([1 + 1j], [1 + 1.001j], True),
        ([1.0, 2.0], [1.0], True),
    ],
)
@pytest.mark.parametrize("by_column", [False, True])
def test_numbers(one, other, are_other, by_column):
    assert differ(torch.tensor(one), torch.tensor(other), by_column=by_column) is are_other


def test_conjugates_are_compared_as_they_are():
    one = torch.tensor([1 + 1j])
    assert differ(one, one.conj())
    assert not differ(one.conj(), one.conj().resolve_conj())
