"""Streams a model's blocks from RAM while they compute: one flat page-locked buffer per block, two places on
the card that blocks take turns in, a copy stream, and events instead of waiting (`--offload stream`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shared.gpu import heap, interrupt
from shared.gpu.placement import Placement, Units, block_lists, resident_blocks, tensors_by_unit
from shared.gpu.transport import Transport

log = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes between tensors that share a buffer: what cudaMalloc gives, so no kernel is slower


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


class StreamedPart:
    """A part on the card: units with a slot of their own, and the others taking turns in one or two slots.

    A block is copied into the slot that the block before last has left. Which block follows which is learned
    from the passes (`successor`), so an order other than the modules' own costs one late copy per surprise.
    """

    def __init__(
        self,
        transport: Transport,
        units: Mapping[nn.Module, list[Segment]],
        tensors: Units,
        resident: Sequence[nn.Module],
        successor: dict[nn.Module | None, nn.Module],
        prefetch: bool,
    ) -> None:
        self._transport, self._units, self._successor = transport, units, successor
        self._tensors = tensors
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

    def holds(self, units: Units) -> bool:
        return _same(self._tensors, units)

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
class _Known:
    """What the engine remembers of a part. segments: those in page-locked RAM. successor: which streamed
    block follows which; it holds for one placement of the same blocks."""

    segments: list[Segment] = field(default_factory=list)
    successor: dict[nn.Module | None, nn.Module] = field(default_factory=dict)
    laid_out: tuple[Placement, list[nn.Module]] | None = None


class StreamEngine:
    """See `placement.Engine`. Tensors keep their identity; parts may have modules in common, whose weights
    then lie in page-locked RAM once."""

    def __init__(self, transport: Transport, pinned_limit: int) -> None:
        """pinned_limit: bytes of RAM to page-lock at most."""
        self._transport, self._limit = transport, pinned_limit
        self._known: dict[nn.Module, _Known] = {}
        self._said_unpinned = False

    def free(self) -> int:
        return self._transport.free()

    def trim(self) -> None:
        self._transport.trim()

    def bring(self, part: nn.Module, units: Units, placement: Placement) -> StreamedPart:
        known, before = self._known.setdefault(part, _Known()), self.pinned()
        if known.laid_out != (placement, list(units)):
            known.successor.clear()
            known.laid_out = placement, list(units)
        blocks = [[block for block in blocks if block in units] for blocks in block_lists(part)]
        resident = [part, *resident_blocks(blocks, placement.resident_blocks)]
        others = [s for other in self._known.values() if other is not known for s in other.segments]
        packed = {id(x): s for s in (*others, *known.segments) if s.is_home() for x in s.tensors}
        whole = {unit: _whole_segments(xs, packed) for unit, xs in units.items()}
        previous, known.segments = known.segments, [s for segments in whole.values() for s in segments]
        self._release(previous)  # before anything is packed anew: it may be what there is no room for
        theirs = {id(x) for s in others for x in s.tensors if packed.get(id(x)) is s}
        stays = set(resident)
        segments = {}
        for unit in sorted(units, key=stays.__contains__):  # the streamed ones need page-locked RAM the most
            locks = placement.pinned and not (placement.streamed_only and unit in stays)
            locked = known.segments if locks else None
            interrupt.check()  # packing a large model takes seconds
            segments[unit] = whole[unit] + self._remaining_segments(units[unit], whole[unit], theirs, locked)
        if self.pinned() > before:
            heap.trim()
        return StreamedPart(
            self._transport,
            {unit: segments[unit] for unit in units},
            units,
            resident,
            known.successor,
            placement.prefetch,
        )

    def _remaining_segments(
        self, tensors: list[Tensor], whole: list[Segment], theirs: set[int], locked: list[Segment] | None
    ) -> list[Segment]:
        """Those tensors of a unit that no packed segment brings: packed now, and added to `locked`, where
        that is given.

        theirs: ids of tensors in other parts' segments. What lies there together with tensors that this unit
        lacks is copied from there.
        """
        have = {id(x) for s in whole for x in s.tensors}
        segments = []
        if borrowed := [x for x in tensors if id(x) in theirs - have]:
            segments.append(Segment(borrowed))
        if rest := [x for x in tensors if id(x) not in theirs | have]:
            segments.append(segment := Segment(rest))
            if locked is not None and self._pack(segment):
                locked.append(segment)
        return segments

    def _pack(self, segment: Segment) -> bool:
        buffer = None
        if segment.nbytes and self.pinned() + segment.nbytes <= self._limit:
            buffer = self._transport.host(segment.nbytes)
            if buffer is None:
                self._limit = self.pinned()  # asking again for every further block would take long
        if buffer is None and segment.nbytes and not self._said_unpinned:
            self._said_unpinned = True
            log.warning(
                "No more than %.1f GiB of RAM could be page-locked; the other weights are copied from "
                "ordinary RAM, which is slower.",
                self.pinned() / 2**30,
            )
        if buffer is not None:
            segment.pack(buffer)
        return buffer is not None

    def pinned(self) -> int:
        segments = {id(s): s for known in self._known.values() for s in known.segments}
        return sum(s.nbytes for s in segments.values())

    def unpin(self, part: nn.Module) -> None:
        if part in self._known:
            self._release(self._known.pop(part).segments)

    def _release(self, segments: Sequence[Segment]) -> None:
        """Unlock the pages of those that no part uses any more."""
        used = {id(s) for known in self._known.values() for s in known.segments}
        for segment in segments:
            if id(segment) not in used and segment.buffer is not None:
                self._transport.release(segment.buffer)


def _whole_segments(tensors: Sequence[Tensor], packed: Mapping[int, Segment]) -> list[Segment]:
    """The packed segments that hold nothing but some of `tensors`."""
    wanted = {id(x) for x in tensors}
    found = {id(s): s for x in tensors if (s := packed.get(id(x))) is not None}
    return [s for s in found.values() if {id(x) for x in s.tensors} <= wanted]


def _same(some: Units, others: Units) -> bool:
    ids = [[(unit, [id(x) for x in xs]) for unit, xs in units.items()] for units in (some, others)]
    return ids[0] == ids[1]


def sizes_of(part: nn.Module) -> list[int]:
    """Bytes on the card of what is outside of the part's blocks, then of each block."""
    return [_layout(tensors)[1] for tensors in tensors_by_unit(part).values()]
