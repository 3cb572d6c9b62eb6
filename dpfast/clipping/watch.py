"""Numbers by which a change of a tensor shows, however it was made: in place, through ``.data``, through numpy."""

from collections.abc import Mapping

import torch
from torch import Tensor

Seen = dict[str, tuple[int, int]]  # by name: the identity of a tensor, and the sum of its bits

ORDERED = 1 << 16  # numbers in a tensor up to which another order shows, too: buffers and small layers
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def seen(tensors: Mapping[str, Tensor]) -> Seen:
    """What to compare later. Reads every tensor once; one transfer per device."""
    sums = {name: _sum_of_bits(t) for name, t in tensors.items()}
    by_device: dict[torch.device, list[str]] = {}
    for name, total in sums.items():
        by_device.setdefault(total.device, []).append(name)
    values = {
        name: value
        for names in by_device.values()
        for name, value in zip(names, torch.stack([sums[name] for name in names]).tolist(), strict=True)
    }
    return {name: (id(t), values[name]) for name, t in tensors.items()}


def changed(before: Seen, now: Seen) -> list[str]:
    """Names of tensors that came, went, were replaced or hold other numbers."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def _sum_of_bits(t: Tensor) -> Tensor:
    if t.layout != torch.strided:
        t = t.coalesce() if t.layout == torch.sparse_coo else t.to_sparse_coo().coalesce()
        return _sum_of_bits(t.indices()) + _sum_of_bits(t.values())
    t = torch.view_as_real(t) if t.is_complex() else t
    flat = t.detach().reshape(-1)
    bits = flat.view(_WHOLE[flat.element_size()])
    if bits.numel() <= ORDERED:
        bits = bits * torch.arange(1, bits.numel() + 1, device=bits.device)
    return bits.sum(dtype=torch.int64)
