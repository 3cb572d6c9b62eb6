"""What is more than rounding, entry by entry."""

import pytest
import torch

from dpfast.clipping.rounding import but_zeros, differ, of_all, of_columns

ROWS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
UNITS = torch.tensor([1e9, 1e5, 3e4, 1.0, 1e-3])  # of the columns of a table
NAN, INF = torch.nan, torch.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("typical", [of_all, but_zeros, of_columns])
def test_rounding_is_no_difference(dtype, typical):
    one = (ROWS * UNITS).to(dtype)
    other = one * (1 + torch.finfo(dtype).eps / 2 * torch.sign(ROWS).to(dtype))
    assert not differ(one, other, typical)
    assert not differ(one[:0], other[:0], typical)


@pytest.mark.parametrize("column", range(5))
def test_a_column_is_not_hidden_by_larger_ones(column):
    one = ROWS * UNITS
    other = one.clone()
    other[:, column] -= 1e-3 * UNITS[column]
    assert differ(one, other, of_columns)


def test_a_huge_entry_hides_no_other():
    one = torch.tensor([-1e9, 1.0, 2.0, 3.0])
    assert differ(one, one + torch.tensor([0.0, 1e-3, 0.0, 0.0]))


def test_zeros_say_nothing_of_the_others_rounding():
    one = torch.zeros(8, 5)
    one[:2], one[0, 0] = 1.0, 1e-4
    other = one * (1 + 4e-6)
    other[0, 0] += 4e-6
    assert differ(one, other)
    assert not differ(one, other, but_zeros)
    one[3, 0] = other[3, 0] = one[4, 0] = other[4, 0] = 1.0
    assert not differ(one, other, of_columns)


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
@pytest.mark.parametrize("typical", [of_all, but_zeros, of_columns])
def test_numbers(one, other, are_other, typical):
    assert differ(torch.tensor(one), torch.tensor(other), typical) is are_other


def test_conjugates_are_compared_as_they_are():
    one = torch.tensor([1 + 1j])
    assert differ(one, one.conj())
    assert not differ(one.conj(), one.conj().resolve_conj())
