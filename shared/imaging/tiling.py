"""Pictures too large to compute at once: cut into overlapping tiles whose results fade into each other.

A tile is not exactly the part of the whole that it covers, because what computes looks at all it is given. So
each tile fades into the next along a linear ramp.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from shared.errors import Cancelled

Span = tuple[int, int]
Interrupt = Callable[[], bool]


def tiles(size: int, tile: int, overlap: int) -> list[Span]:
    """(start, stop) of the fewest parts of `tile` that cover `size`, evenly spaced.

    Neighbours share at least `overlap` (less than `tile`); one whole span where `size` is not above `tile`.
    """
    if size <= tile:
        return [(0, size)]
    count = math.ceil((size - overlap) / (tile - overlap))
    starts = [i * (size - tile) // (count - 1) for i in range(count)]
    return [(start, start + tile) for start in starts]


def ramps(spans: list[Span]) -> list[Tensor]:
    """Each span's share of its positions, fp32: linear where spans overlap; the shares of a position add up
    to 1.
    """
    shares = [torch.ones(stop - start) for start, stop in spans]
    for i, ((_, stop), (start, _)) in enumerate(zip(spans, spans[1:], strict=False)):
        ramp = (torch.arange(stop - start) + 0.5) / (stop - start)
        shares[i + 1][: len(ramp)] *= ramp
        shares[i][len(shares[i]) - len(ramp) :] *= ramp.flip(0)
    total = torch.zeros(spans[-1][1])
    for (start, stop), share in zip(spans, shares, strict=True):
        total[start:stop] += share
    return [share / total[start:stop] for (start, stop), share in zip(spans, shares, strict=True)]


def by_tiles(
    compute: Callable[[Tensor], Tensor],
    x: Tensor,
    channels: int,
    rows: list[Span],
    columns: list[Span],
    unit: int,
    unit_out: int,
    interrupt: Interrupt | None = None,
) -> Tensor:
    """[c, h * unit, w * unit] -> [channels, h * unit_out, w * unit_out], fp32, in RAM: `compute` on each tile
    [1, c, ...], and their blend. Raises Cancelled between tiles.

    rows, columns: the tiles along both sides, in units.
    """
    vertical, horizontal = (ramps([_times(span, unit_out) for span in spans]) for spans in (rows, columns))
    result = torch.zeros(channels, rows[-1][1] * unit_out, columns[-1][1] * unit_out)
    for row, down in zip(rows, vertical, strict=True):
        for column, across in zip(columns, horizontal, strict=True):
            if interrupt is not None and interrupt():
                raise Cancelled
            part = compute(x[None, :, slice(*_times(row, unit)), slice(*_times(column, unit))])[0]
            part = part.float().cpu() * down[:, None] * across
            result[:, slice(*_times(row, unit_out)), slice(*_times(column, unit_out))] += part
    return result


def _times(span: Span, unit: int) -> Span:
    return span[0] * unit, span[1] * unit
