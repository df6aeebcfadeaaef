"""Places the parts of a model on the device: whole, or block by block while they compute.

Two engines move them: mmgp (offloading_mmgp.py), which Wan2GP's cards have run for long and which is the
default on a card, and a streamer of our own (offloading_stream.py). docs/performance.md counts what each
moves.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shared.gpu.offloading_mmgp import MmgpEngine
from shared.gpu.offloading_stream import StreamEngine, sizes_of
from shared.gpu.placement import Engine, OnCard, Placement, Status, tensors_by_unit
from shared.gpu.transport import CudaTransport, Transport, pinned_bytes

ACTIVATION_BYTES = 3 << 30  # left free beside a part that nobody placed


@dataclass
class _Part:
    """What a Residency knows of a part. depth: of nested uses. moved: bytes, when it left the card."""

    placement: Placement
    card: OnCard | None = None
    tensors: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    depth: int = 0
    moved: int = 0


class Residency:
    """Keeps a pipeline's parts where they can compute: one per worker and device.

    A part is any module. Its repeated blocks, which can be streamed, are the children of the ModuleLists
    that its attribute `streamed_blocks` names, in the order of the forward pass (without it: `layers`, if it
    has them). Blocks that stay are taken from the last list first. Submodules named in its attribute
    `stays_in_ram` never go to the card. A part that nobody placed stays there as far as it fits. Change
    weights in place only while their part is off the card; tensors that come, go or are replaced are noticed
    at the next use.

    On a CPU nothing is moved or packed. Not for use from several threads.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        engine: str = "stream",
        pinned_limit: int | None = None,
        transport: Transport | None = None,
    ) -> None:
        """engine: one of offload_engines.SLOTS. pinned_limit: bytes of RAM to page-lock at most; None as
        `pinned_bytes()`. transport: in the place of the card's, for "stream"."""
        self.device = device
        self._parts: dict[nn.Module, _Part] = {}
        self._engine: Engine | None = None
        limit = pinned_bytes() if pinned_limit is None else pinned_limit
        if transport is None and device.type != "cuda":
            return
        if engine == "mmgp":
            self._engine = MmgpEngine(device, limit)
        else:
            self._engine = StreamEngine(transport or CudaTransport(device), limit)

    def place(self, part: nn.Module, placement: Placement) -> None:
        """From now on `part` lies as `placement` says; it leaves the card first when that changes it."""
        known = self._parts.setdefault(part, _Part(placement))
        if known.placement == placement:
            return
        self.evict(part)
        if known.placement.pinned and not placement.pinned and self._engine is not None:
            self._engine.unpin(part)
        known.placement = placement

    @contextlib.contextmanager
    def use(self, part: nn.Module) -> Iterator[None]:
        """The part computes on the device inside. Other parts that are not to be kept leave first, but for
        those in use themselves. Raises torch.OutOfMemoryError, with the part in RAM, when it does not fit."""
        if self._engine is None:
            yield
            return
        if part not in self._parts:
            self._parts[part] = _Part(_fitting(part, self._engine.free() - ACTIVATION_BYTES))
        known = self._parts[part]
        if known.card is None or known.depth == 0:
            known.card = self._bring(self._engine, part, known)
        known.depth += 1
        try:
            if known.depth == 1:
                known.card.attach()
            yield
        finally:
            known.depth -= 1
            if known.depth == 0:
                known.card.detach()

    def evict(self, part: nn.Module | None = None) -> None:
        """Take a part (None: every part that is not in use) off the card."""
        chosen = [self._parts[part]] if part in self._parts else []
        if part is None:
            chosen = [known for known in self._parts.values() if not known.depth]
        elif chosen and chosen[0].depth:
            raise RuntimeError(f"{type(part).__name__} is computing: it can leave the card after its use.")
        gone = [known for known in chosen if known.card is not None]
        for known in gone:
            assert known.card is not None
            known.card.evict()
            known.moved, known.card = known.card.moved, None
        if gone and self._engine is not None:
            self._engine.trim()

    def refresh(self, part: nn.Module) -> None:
        """The part's tensors were changed: it is laid out anew at its next use.

        Needed only for a part that is kept on the card while the same tensors get other values; those that
        were not touched keep their place in RAM.
        """
        self.evict(part)

    def forget(self, part: nn.Module | None = None) -> None:
        """Let a part (None: every part) go, with its memory on the card and its page-locked RAM."""
        for gone in [part] if part is not None else list(self._parts):
            if gone in self._parts:
                self.evict(gone)
                if self._engine is not None:
                    self._engine.unpin(gone)
                del self._parts[gone]

    def status(self) -> Status:
        on_card: Counter[str] = Counter()
        moved: Counter[str] = Counter()
        for part, known in self._parts.items():
            card = known.card
            on_card[type(part).__name__] += card.bytes if card else 0
            moved[type(part).__name__] += card.moved if card else known.moved
        return Status(dict(on_card), dict(moved), self._engine.pinned() if self._engine is not None else 0)

    # -- how a part gets onto the card

    @torch.inference_mode(False)  # what is made here outlives the caller's mode
    @torch.no_grad()
    def _bring(self, engine: Engine, part: nn.Module, known: _Part) -> OnCard:
        elsewhere = {
            id(x)
            for other in self._parts.values()
            if other.depth
            for xs in other.tensors.values()
            for x in xs
        }
        tensors = tensors_by_unit(part, elsewhere)  # what a part in use shares with this one, that one moves
        wanted = {id(x) for xs in tensors.values() for x in xs}
        for other, state in list(self._parts.items()):
            shares = any(id(x) in wanted for xs in state.tensors.values() for x in xs)
            if state is not known and not state.depth and (shares or not state.placement.keep):
                self.evict(other)
        if known.card is not None and not known.card.holds(tensors):
            self.evict(part)
            tensors = tensors_by_unit(part, elsewhere)
        if known.card is None:
            known.tensors = tensors
            return engine.bring(part, tensors, known.placement)
        known.card.moved = 0
        return known.card


def _fitting(part: nn.Module, room: int) -> Placement:
    """Whole where it fits, else as many blocks as leave room for two in transit."""
    base, *blocks = sizes_of(part)
    if base + sum(blocks) <= room or not blocks:
        return Placement()
    largest = max(blocks)
    return Placement(max(0, (room - base - 2 * largest) // largest))
