"""A small model whose blocks are streamed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.errors import Cancelled


class Block(nn.Module):
    """Weights of several dtypes and layouts, a scale that is not saved, a bias under two names, and, where
    `tied`, a tensor that is another one's memory."""

    def __init__(self, width: int, extra: int = 0, tied: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.bias = self.linear.bias
        self.halves = nn.Parameter(torch.randn(width + extra).bfloat16())
        self.crossed = nn.Parameter(torch.randn(width, width).T / width)
        weight = self.linear.weight.detach()
        self.register_buffer("tied", weight if tied else weight.clone(), persistent=False)
        self.register_buffer("codes", torch.randint(-99, 99, (width, width), dtype=torch.int8))
        self.register_buffer("nibbles", torch.randint(0, 255, (width, 3), dtype=torch.uint8))
        self.register_buffer("eighths", torch.randn(width).to(torch.float8_e4m3fn))
        self.register_buffer("scale", torch.rand(()) / 99, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.codes.float() * self.scale + self.crossed + self.nibbles.float().mean() / 999
        x = x + torch.tanh(
            self.linear(x) + x @ (mixed - self.tied / 9) + self.halves.float().mean() + self.bias
        )
        return x * self.eighths.float().abs().clamp(0.5, 2)


class Model(nn.Module):
    """Two lists of blocks, of which one pass may skip or reorder some."""

    streamed_blocks = ("first", "layers")

    def __init__(self, first: int = 2, layers: int = 5, width: int = 8, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.table = nn.Embedding(50, width)
        self.start = nn.Parameter(torch.randn(width))
        self.first = nn.ModuleList(Block(width, i, tied) for i in range(first))
        self.layers = nn.ModuleList(Block(width, 100 * i, tied) for i in range(layers))
        self.end = nn.Linear(width, width)

    def blocks(self) -> list[Block]:
        return [*self.first, *self.layers]

    def forward(self, xs: list[Tensor], order: list[int] | None = None, stop: int = 99) -> list[Tensor]:
        xs = [x + self.start for x in xs]
        blocks = self.blocks()
        for n, i in enumerate(range(len(blocks)) if order is None else order):
            if n == stop:
                raise Cancelled
            xs = [blocks[i](x) for x in xs]
        return [self.end(x) for x in xs]


def inputs(count: int = 1) -> list[Tensor]:
    return list(torch.randn(count, 3, 8, generator=torch.Generator().manual_seed(1)))


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(some, others, strict=True)
    )
