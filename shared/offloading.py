"""Places the parts of a model on the device: whole, or block by block while they compute.

mmgp does this for Wan2GP. Its hooks move every streamed block twice per step, wait for the device at each,
cast fp32 arguments to the weights' dtype and need every quantized weight to be a tensor subclass
(docs/performance.md has the counts), so this is a streamer of our own: one flat page-locked buffer per block,
two places on the device that blocks take turns in, a copy stream, and events instead of waiting.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shared.transport import CudaTransport, Transport, pinned_bytes

log = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes between tensors that share a buffer: what cudaMalloc gives, so no kernel is slower
ACTIVATION_BYTES = 3 << 30  # left free beside a part that nobody placed


@dataclass(frozen=True)
class Placement:
    """How a part lies while it is in use, and after.

    resident_blocks: how many of its repeated blocks stay on the card while it is in use; None = all of them.
    keep: it stays on the card when another part is used.
    pinned: its weights lie in page-locked RAM, one buffer per block (half the time per copy, and the copy
    runs beside the computing); otherwise they stay where their file is mapped and take no RAM of their own.
    prefetch: the next block is copied while this one computes, which takes the room of a second block.
    """

    resident_blocks: int | None = None
    keep: bool = False
    pinned: bool = True
    prefetch: bool = True


@dataclass(frozen=True)
class Status:
    """Bytes on the card now, and bytes copied to it during its last use, by the parts' class names; bytes
    of page-locked RAM."""

    on_card: dict[str, int]
    moved: dict[str, int]
    pinned: int


@dataclass(frozen=True)
class Spot:
    """Where a tensor lies in a buffer."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + self.shape.numel() * self.dtype.itemsize

    def view(self, buffer: Tensor, like: Tensor | None = None) -> Tensor:
        """The tensor there; as `data` of `like` an inference tensor where that is one, which torch never
        lets change."""
        with torch.inference_mode(like is not None and like.is_inference()):
            start = (buffer.storage_offset() + self.offset) // self.dtype.itemsize
            empty = torch.empty(0, dtype=self.dtype, device=buffer.device)
            return empty.set_(buffer.untyped_storage(), start, self.shape, self.stride)


class Segment:
    """Tensors that travel together: `homes` are their values in RAM, views of `buffer` where that is given.

    `tensors` are the modules' own parameters and buffers. They keep their identity (and so torch.compile's
    guards hold); only what they point to changes between RAM and card.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.homes = [x.data for x in tensors]
        self.buffer: Tensor | None = None
        self.spots, self.nbytes = _layout(self.homes)

    def pack(self, buffer: Tensor) -> None:
        """Move the values into `buffer`, [nbytes] uint8; where they were is let go."""
        self.buffer = buffer
        for i, (x, spot) in enumerate(zip(self.tensors, self.spots, strict=True)):
            spot.view(buffer).copy_(self.homes[i])
            self.homes[i] = x.data = spot.view(buffer, like=x)

    def pairs(self, target: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What to copy so that `target`, [nbytes] uint8 on the device, holds the values."""
        if self.buffer is not None:
            return [(target[: self.nbytes], self.buffer)]
        return [(spot.view(target), home) for spot, home in zip(self.spots, self.homes, strict=True)]

    def is_home(self) -> bool:
        """Whether the tensors still are what was packed, and not on the card or replaced."""
        return all(
            x.device.type == "cpu" and x.data_ptr() == home.data_ptr() and x.shape == home.shape
            for x, home in zip(self.tensors, self.homes, strict=True)
        )


def _layout(tensors: Sequence[Tensor]) -> tuple[list[Spot], int]:
    """A spot for each tensor and the size of the buffer. Tensors that are one in memory share a spot;
    strides stay (a channels-last weight computes other roundings than a contiguous one)."""
    spots: list[Spot] = []
    known: dict[Any, Spot] = {}
    end = 0
    for x in tensors:
        key = (x.data_ptr(), x.dtype, x.shape, x.stride())
        stride = torch.empty_like(x, device="meta").stride()  # the same where it has no gaps and no overlaps
        spot = known.setdefault(key, Spot(end, x.dtype, x.shape, stride))
        spots.append(spot)
        end = max(end, -(-spot.end // ALIGNMENT) * ALIGNMENT)
    return spots, end


class Slot:
    """Device memory for one unit (a block, or all of a part that is no block) at a time."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.unit: nn.Module | None = None
        self.ready: Any = None  # mark of a copy that computing has not been told to wait for
        self._views: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def parts(self, segments: Sequence[Segment]) -> Iterator[tuple[Segment, Tensor]]:
        """The piece of memory that each of a unit's segments has here."""
        start = 0
        for segment in segments:
            yield segment, self.memory[start : start + segment.nbytes]
            start += segment.nbytes

    def bind(self, unit: nn.Module, segments: Sequence[Segment]) -> None:
        """Point the unit's tensors into this memory."""
        if unit not in self._views:
            self._views[unit] = [
                (x, spot.view(part, like=x))
                for segment, part in self.parts(segments)
                for x, spot in zip(segment.tensors, segment.spots, strict=True)
            ]
        for x, view in self._views[unit]:
            x.data = view


class OnCard:
    """A part on the card: units with a slot of their own, and the others taking turns in one or two slots.

    A block is copied into the slot that the block before last has left. Which block follows which is learned
    from the passes (`successor`), so an order other than the modules' own costs one late copy per surprise.
    """

    def __init__(
        self,
        transport: Transport,
        units: Mapping[nn.Module, list[Segment]],
        resident: Sequence[nn.Module],
        successor: dict[nn.Module | None, nn.Module],
        prefetch: bool,
    ) -> None:
        self._transport, self._units, self._successor = transport, units, successor
        self._prefetches = prefetch
        self.moved = 0
        self.bytes = 0
        streamed = [unit for unit in units if unit not in set(resident)]
        self._fixed = {unit: self._slot(self._size(unit)) for unit in resident}
        largest = max((self._size(unit) for unit in streamed), default=0)
        self._shuttles = [self._slot(largest) for _ in streamed[: 2 if prefetch else 1]]
        self._current: nn.Module | None = None  # the streamed block that computes
        self._left = transport.mark()  # no kernel asked for later reads the slot that is to be filled next
        self._calls: dict[nn.Module, Any] = {}
        order: list[nn.Module | None] = [None, *streamed]
        for unit, following in zip(order, streamed, strict=False):
            successor.setdefault(unit, following)
        base, *others = self._fixed
        self._fill(self._fixed[base], base)
        self._prefetch()
        for unit in others:
            self._fill(self._fixed[unit], unit)
        self._arrive(self._fixed[base])

    def _size(self, unit: nn.Module) -> int:
        return sum(segment.nbytes for segment in self._units[unit])

    def _slot(self, nbytes: int) -> Slot:
        self.bytes += nbytes
        return Slot(self._transport.empty(nbytes))

    # -- during a pass

    def attach(self) -> None:
        """Watch the blocks' calls.

        Around whatever `Module.__call__` would run, not as forward hooks: those lie inside what
        `Module.compile` compiles, which neither traces copies nor notices hooks that come and go.
        """
        self._current, self._left = None, self._transport.mark()  # the last use's kernels may still be queued
        for block in list(self._units)[1:]:
            self._calls[block] = block._compiled_call_impl
            block._compiled_call_impl = self._call(block, block._compiled_call_impl or block._call_impl)
        self._prefetch()

    def detach(self) -> None:
        for block, call in self._calls.items():
            block._compiled_call_impl = call
        self._calls.clear()

    def _call(self, block: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        def streamed(*args: Any, **kwargs: Any) -> Any:
            self._enter(block)
            result = call(*args, **kwargs)
            self._prefetch(everywhere=True)
            return result

        return streamed

    def _enter(self, block: nn.Module) -> None:
        """Everything asked of the device from here on finds the block's weights in their place."""
        if block in self._fixed:
            self._arrive(self._fixed[block])
        elif block is not self._current:
            self._left = self._transport.mark()
            slot = next((s for s in self._shuttles if s.unit is block), None) or self._fetch(block)
            self._successor[self._current] = block
            self._current = block
            self._arrive(slot)
            self._prefetch()

    def _prefetch(self, everywhere: bool = False) -> None:
        """Start copying the block that comes next, where that overlaps with computing.

        A copy from pageable memory holds this thread until it has been read: such blocks wait until the
        current one's kernels are queued (`everywhere`).
        """
        following = self._successor.get(self._current)
        if not self._prefetches or following is None or any(s.unit is following for s in self._shuttles):
            return
        if everywhere or all(segment.buffer is not None for segment in self._units[following]):
            self._fetch(following)

    def _fetch(self, block: nn.Module) -> Slot:
        """Start copying a block into the slot that is free or was left; with one slot, that one."""
        preference = {self._current: 2, None: 0}
        slot = min(self._shuttles, key=lambda slot: preference.get(slot.unit, 1))
        if slot.unit is not None:
            self._send_home(slot.unit)
        self._fill(slot, block)
        return slot

    def _fill(self, slot: Slot, unit: nn.Module) -> None:
        slot.unit = None  # should the copy fail
        pairs = [pair for segment, part in slot.parts(self._units[unit]) for pair in segment.pairs(part)]
        slot.ready = self._transport.copy(pairs, self._left)
        slot.unit = unit
        self.moved += self._size(unit)

    def _arrive(self, slot: Slot) -> None:
        """Computing waits for the copy; the unit's tensors point to it."""
        if slot.ready is None or slot.unit is None:
            return
        self._transport.wait(slot.ready)
        slot.bind(slot.unit, self._units[slot.unit])
        slot.ready = None

    # -- after it

    def _send_home(self, unit: nn.Module) -> None:
        for segment in self._units[unit]:
            for x, home in zip(segment.tensors, segment.homes, strict=True):
                x.data = home

    def evict(self) -> None:
        """All tensors back in RAM; the memory goes with this object."""
        for slot in (*self._fixed.values(), *self._shuttles):
            if slot.ready is not None:
                self._transport.wait(slot.ready)  # see CudaTransport
            if slot.unit is not None:
                self._send_home(slot.unit)
        self._fixed.clear()
        self._shuttles.clear()


@dataclass
class _Part:
    """What a Residency knows of a part. segments: those in page-locked RAM. depth: of nested uses."""

    placement: Placement
    card: OnCard | None = None
    tensors: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    successor: dict[nn.Module | None, nn.Module] = field(default_factory=dict)
    depth: int = 0
    moved: int = 0  # bytes, when it left the card


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
        self, device: torch.device, *, pinned_limit: int | None = None, transport: Transport | None = None
    ) -> None:
        """pinned_limit: bytes of RAM to page-lock at most; None as `pinned_bytes()`."""
        self.device = device
        self._transport = transport or (CudaTransport(device) if device.type == "cuda" else None)
        self._limit = pinned_bytes() if pinned_limit is None else pinned_limit
        self._parts: dict[nn.Module, _Part] = {}
        self._said_unpinned = False

    def place(self, part: nn.Module, placement: Placement) -> None:
        """From now on `part` lies as `placement` says; it leaves the card first when that changes it."""
        known = self._parts.setdefault(part, _Part(placement))
        if known.placement == placement:
            return
        self.evict(part)
        if known.placement.pinned and not placement.pinned:
            self._unpin(known)
        known.placement = placement
        known.successor.clear()

    @contextlib.contextmanager
    def use(self, part: nn.Module) -> Iterator[None]:
        """The part computes on the device inside. Other parts that are not to be kept leave first, but for
        those in use themselves. Raises torch.OutOfMemoryError, with the part in RAM, when it does not fit."""
        if self._transport is None:
            yield
            return
        if part not in self._parts:
            self._parts[part] = _Part(_fitting(part, self._transport.free() - ACTIVATION_BYTES))
        known = self._parts[part]
        if known.card is None or known.depth == 0:
            known.card = self._bring(part, known)
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
        if gone and self._transport is not None:
            self._transport.trim()

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
                self._unpin(self._parts[gone])
                del self._parts[gone]

    def status(self) -> Status:
        on_card: Counter[str] = Counter()
        moved: Counter[str] = Counter()
        for part, known in self._parts.items():
            card = known.card
            on_card[type(part).__name__] += card.bytes if card else 0
            moved[type(part).__name__] += card.moved if card else known.moved
        return Status(dict(on_card), dict(moved), self._pinned())

    # -- how a part gets onto the card

    @torch.inference_mode(False)  # what is made here outlives the caller's mode
    @torch.no_grad()
    def _bring(self, part: nn.Module, known: _Part) -> OnCard:
        elsewhere = {
            id(x)
            for other in self._parts.values()
            if other.depth
            for xs in other.tensors.values()
            for x in xs
        }
        tensors = _tensors_by_unit(part, elsewhere)  # what a part in use shares with this one, that one moves
        wanted = {id(x) for xs in tensors.values() for x in xs}
        for other, state in list(self._parts.items()):
            shares = any(id(x) in wanted for xs in state.tensors.values() for x in xs)
            if state is not known and not state.depth and (shares or not state.placement.keep):
                self.evict(other)
        if known.card is not None and not _same(known.tensors, tensors):
            self.evict(part)
        if known.card is None:
            return self._load(part, known, tensors)
        known.card.moved = 0
        return known.card

    def _load(self, part: nn.Module, known: _Part, tensors: dict[nn.Module, list[Tensor]]) -> OnCard:
        assert self._transport is not None
        if list(known.tensors) != list(tensors):
            known.successor.clear()
        known.tensors = tensors
        others = [s for other in self._parts.values() if other is not known for s in other.segments]
        packed = {id(x): s for s in (*others, *known.segments) if s.is_home() for x in s.tensors}
        whole = {unit: _whole_segments(xs, packed) for unit, xs in tensors.items()}
        previous, known.segments = known.segments, [s for segments in whole.values() for s in segments]
        self._release(previous)  # before anything is packed anew: it may be what there is no room for
        theirs = {id(x) for s in others for x in s.tensors if packed.get(id(x)) is s}
        units = {
            unit: whole[unit] + self._remaining_segments(xs, whole[unit], theirs, known)
            for unit, xs in tensors.items()
        }
        blocks = [[b for b in blocks if b in units] for blocks in _block_lists(part)]
        resident = [part, *resident_blocks(blocks, known.placement.resident_blocks)]
        return OnCard(self._transport, units, resident, known.successor, known.placement.prefetch)

    def _remaining_segments(
        self, tensors: list[Tensor], whole: list[Segment], theirs: set[int], known: _Part
    ) -> list[Segment]:
        """Those tensors of a unit that no packed segment brings: packed now where that is wanted.

        theirs: ids of tensors in other parts' segments. What lies there together with tensors that this unit
        lacks is copied from there.
        """
        have = {id(x) for s in whole for x in s.tensors}
        segments = []
        if borrowed := [x for x in tensors if id(x) in theirs - have]:
            segments.append(Segment(borrowed))
        if rest := [x for x in tensors if id(x) not in theirs | have]:
            segments.append(segment := Segment(rest))
            if known.placement.pinned and self._pack(segment):
                known.segments.append(segment)
        return segments

    def _pack(self, segment: Segment) -> bool:
        assert self._transport is not None
        buffer = None
        if segment.nbytes and self._pinned() + segment.nbytes <= self._limit:
            buffer = self._transport.host(segment.nbytes)
            if buffer is None:
                self._limit = self._pinned()  # asking again for every further block would take long
        if buffer is None and segment.nbytes and not self._said_unpinned:
            self._said_unpinned = True
            log.warning(
                "No more than %.1f GiB of RAM could be page-locked; the other weights are copied from "
                "ordinary RAM, which is slower.",
                self._pinned() / 2**30,
            )
        if buffer is not None:
            segment.pack(buffer)
        return buffer is not None

    def _pinned(self) -> int:
        segments = {id(s): s for known in self._parts.values() for s in known.segments}
        return sum(s.nbytes for s in segments.values())

    def _unpin(self, known: _Part) -> None:
        previous, known.segments = known.segments, []
        self._release(previous)

    def _release(self, segments: Sequence[Segment]) -> None:
        """Unlock the pages of those that no part uses any more."""
        used = {id(s) for known in self._parts.values() for s in known.segments}
        for segment in segments:
            if id(segment) not in used and segment.buffer is not None and self._transport is not None:
                self._transport.release(segment.buffer)


def _whole_segments(tensors: Sequence[Tensor], packed: Mapping[int, Segment]) -> list[Segment]:
    """The packed segments that hold nothing but some of `tensors`."""
    wanted = {id(x) for x in tensors}
    found = {id(s): s for x in tensors if (s := packed.get(id(x))) is not None}
    return [s for s in found.values() if {id(x) for x in s.tensors} <= wanted]


def _same(some: Mapping[nn.Module, list[Tensor]], others: Mapping[nn.Module, list[Tensor]]) -> bool:
    ids = [[(unit, [id(x) for x in xs]) for unit, xs in units.items()] for units in (some, others)]
    return ids[0] == ids[1]


def _block_lists(part: nn.Module) -> list[list[nn.Module]]:
    default = ("layers",) if isinstance(getattr(part, "layers", None), nn.ModuleList) else ()
    return [list(getattr(part, name)) for name in getattr(part, "streamed_blocks", default)]


def _tensors(module: nn.Module, recurse: bool = True) -> Iterator[Tensor]:
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)


def _tensors_by_unit(part: nn.Module, elsewhere: Container[int] = ()) -> dict[nn.Module, list[Tensor]]:
    """The tensors that go to the card: the part itself -> those outside of its blocks, block -> its own.

    A tensor that several blocks share counts as outside. `elsewhere`: ids of tensors to leave alone.
    """
    ram = {id(x) for name in getattr(part, "stays_in_ram", ()) for x in _tensors(part.get_submodule(name))}
    blocks = list(dict.fromkeys(block for blocks in _block_lists(part) for block in blocks))
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


def sizes_of(part: nn.Module) -> list[int]:
    """Bytes on the card of what is outside of the part's blocks, then of each block."""
    return [_layout(tensors)[1] for tensors in _tensors_by_unit(part).values()]


def _fitting(part: nn.Module, room: int) -> Placement:
    """Whole where it fits, else as many blocks as leave room for two in transit."""
    base, *blocks = sizes_of(part)
    if base + sum(blocks) <= room or not blocks:
        return Placement()
    largest = max(blocks)
    return Placement(max(0, (room - base - 2 * largest) // largest))


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
