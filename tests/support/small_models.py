"""A small model with every kind of layer."""

import torch
from torch import nn


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 33)
        self.body = nn.ModuleList([nn.Linear(33, 33), nn.Linear(33, 5, bias=False)])
        self.norm = nn.RMSNorm(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.body[1](self.body[0](self.embed(x)).tanh()))
