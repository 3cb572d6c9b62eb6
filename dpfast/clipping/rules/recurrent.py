"""Cells of recurrent networks as the linear maps and gates they are made of, by the formulas of ``torch.nn``."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _gates(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    return F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh)


def tanh_cell(*arguments: Tensor) -> Tensor:
    return torch.tanh(_gates(*arguments))


def relu_cell(*arguments: Tensor) -> Tensor:
    return torch.relu(_gates(*arguments))


def lstm_cell(input: Tensor, hx: tuple[Tensor, Tensor], *weights: Tensor) -> tuple[Tensor, Tensor]:
    hidden, cell = hx
    take, forget, new, give = _gates(input, hidden, *weights).chunk(4, -1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(take) * torch.tanh(new)
    return torch.sigmoid(give) * torch.tanh(cell), cell


def gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    reset, keep, new = F.linear(input, w_ih, b_ih).chunk(3, -1)
    reset_h, keep_h, new_h = F.linear(hx, w_hh, b_hh).chunk(3, -1)
    new = torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h)
    return torch.lerp(new, hx, torch.sigmoid(keep + keep_h))
