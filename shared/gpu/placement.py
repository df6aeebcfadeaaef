"""How a part of a model lies on the card and what an engine that moves it has to offer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

#: a part itself -> its tensors outside of the blocks; each block -> its own
Units = Mapping[nn.Module, list[Tensor]]


@dataclass(frozen=True)
class Placement:
    """How a part lies while it is in use, and after.

    resident_blocks: how many of its repeated blocks stay on the card while it is in use; None = all of them.
    keep: it stays on the card when another part is used.
    pinned: its weights lie in page-locked RAM (half the time per copy, and the copy runs beside the
    computing); otherwise they stay where their file is mapped and take no RAM of their own. streamed_only: of
    them, the blocks that are streamed, where the RAM does not suffice for more.
    prefetch: the next block is copied while this one computes, which takes the room of a second block.
    """

    resident_blocks: int | None = None
    keep: bool = False
    pinned: bool = True
    streamed_only: bool = False
    prefetch: bool = True


@dataclass(frozen=True)
class Status:
    """Bytes on the card now, and bytes copied to it during its last use, by the parts' class names; bytes
    of page-locked RAM."""

    on_card: dict[str, int]
    moved: dict[str, int]
    pinned: int


class OnCard(Protocol):
    """A part on the card. bytes: that it takes there. moved: bytes copied there since it came, or since 0."""

    moved: int

    @property
    def bytes(self) -> int: ...
    def holds(self, units: Units) -> bool:
        """Whether the part's tensors still are the ones that came."""

    def attach(self) -> None:
        """A use begins: from here on each block is there when it computes."""

    def detach(self) -> None:
        """It ends."""

    def evict(self) -> None:
        """All tensors back in RAM, nothing left on the card. Not while attached."""


class Engine(Protocol):
    """Moves parts between RAM and card."""

    def free(self) -> int:
        """Bytes of the card that parts can still get."""

    def bring(self, part: nn.Module, units: Units, placement: Placement) -> OnCard:
        """The part onto the card: what stays there, and room for the rest to pass through. Raises
        torch.OutOfMemoryError, with everything in RAM."""

    def unpin(self, part: nn.Module) -> None:
        """Let the part's page-locked RAM go, and all that is known of it; it is off the card."""

    def pinned(self) -> int:
        """Bytes of page-locked RAM."""

    def trim(self) -> None:
        """Give memory of the card that was let go back to the system."""


def block_lists(part: nn.Module) -> list[list[nn.Module]]:
    default = ("layers",) if isinstance(getattr(part, "layers", None), nn.ModuleList) else ()
    return [list(getattr(part, name)) for name in getattr(part, "streamed_blocks", default)]


def _tensors(module: nn.Module, recurse: bool = True) -> Iterator[Tensor]:
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)


def tensors_by_unit(part: nn.Module, elsewhere: Container[int] = ()) -> dict[nn.Module, list[Tensor]]:
    """The tensors that go to the card: the part itself -> those outside of its blocks, block -> its own.

    A tensor that several blocks share counts as outside. `elsewhere`: ids of tensors to leave alone.
    """
    ram = {id(x) for name in getattr(part, "stays_in_ram", ()) for x in _tensors(part.get_submodule(name))}
    blocks = list(dict.fromkeys(block for blocks in block_lists(part) for block in blocks))
    inside = {module for block in blocks for module in block.modules()}
    outside = {id(x) for m in part.modules() if m not in inside for x in _tensors(m, recurse=False)}
    holders = Counter(id(x) for block in blocks for x in _tensors(block))
    outside |= {x for x, count in holders.items() if count > 1}
    units: dict[nn.Module, list[Tensor]] = {part: []}
    for unit in (part, *blocks):
        own = [
            x
            for x in _tensors(unit)
            if (id(x) in outside) == (unit is part) and id(x) not in ram and id(x) not in elsewhere
        ]
        if own:
            units[unit] = own
    for x in (x for xs in units.values() for x in xs):
        if x.is_meta or type(x.data) is not Tensor:
            kind = "an empty tensor" if x.is_meta else type(x.data).__name__
            raise TypeError(f"{type(part).__name__} has {kind} as a weight; only plain tensors can be moved.")
    return units


def resident_blocks(lists: Sequence[Sequence[nn.Module]], count: int | None) -> list[nn.Module]:
    """Which of a part's blocks stay on the card: from the last list first, spread evenly over it, so that
    the copies between them have the most time."""
    left = sum(map(len, lists)) if count is None else count
    chosen: list[nn.Module] = []
    for blocks in reversed(lists):
        n, k = len(blocks), max(0, min(left, len(blocks)))
        chosen += [block for i, block in enumerate(blocks) if (i + 1) * k // n > i * k // n]
        left -= k
    return chosen
