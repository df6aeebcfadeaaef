"""A card that is not there, for either engine: what tests of offloading ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from shared.gpu.offloading import Residency
from tests.support.counting import CountingTransport
from tests.support.fake_cuda import FakeCuda


@dataclass
class Card:
    """engine: "stream" or "mmgp". side: what counts, with moved, live and pinned."""

    engine: str
    side: CountingTransport | FakeCuda

    def residency(self, pinned_limit: int = 1 << 30) -> Residency:
        if isinstance(self.side, CountingTransport):
            return Residency(torch.device("cpu"), pinned_limit=pinned_limit, transport=self.side)
        return Residency(torch.device("cuda"), engine="mmgp", pinned_limit=pinned_limit)

    def watched(self, blocks: Sequence[nn.Module]) -> Residency:
        """A residency; `blocks` may compute on the card only."""
        self.side.watch(blocks)
        return self.residency()

    @property
    def moved(self) -> int:
        return self.side.moved

    @property
    def live(self) -> int:
        return self.side.live

    @property
    def pinned(self) -> int:
        return self.side.pinned


@pytest.fixture(params=["stream", "mmgp"])
def card(request: Any, monkeypatch: pytest.MonkeyPatch) -> Card:
    """A card under each of the two engines."""
    if request.param == "stream":
        return Card("stream", CountingTransport())
    side = FakeCuda()
    side.install(monkeypatch)
    return Card("mmgp", side)
