"""The device side of a Residency on the CPU, for logic only: what is copied, when, and whether it may be.

"Device" memory is a clone in RAM. A copy runs as late as it possibly could on a card, when computing waits
for it, and until then its target holds bytes that are NaN in every floating dtype: weights read too early, or
from a slot that was given to another block, spoil the result.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

POISON = 0xFF


class CountingTransport:
    """moved: bytes copied to the "device"; live: bytes there that anything still holds; pinned: bytes of
    page-locked RAM; copies: the sizes of the single copies."""

    def __init__(self, pinnable: int | None = None) -> None:
        self.moved = self.live = self.pinned = self.clock = 0
        self.copies: list[int] = []
        self._pinnable = pinnable
        self._queue: list[Sequence[tuple[Tensor, Tensor]]] = []
        self._done = 0
        self._device: set[int] = set()  # storages that are device memory
        self._read: dict[int, int] = {}  # storage -> when a block last computed with it

    def host(self, nbytes: int) -> Tensor | None:
        if self._pinnable is not None and self.pinned + nbytes > self._pinnable:
            return None
        self.pinned += nbytes
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def release(self, buffer: Tensor) -> None:
        self.pinned -= len(buffer)

    def free(self) -> int:
        return 1 << 40

    def empty(self, nbytes: int) -> Tensor:
        memory = torch.full((nbytes,), POISON, dtype=torch.uint8)
        self.live += nbytes
        self._device.add(_storage(memory))
        weakref.finalize(memory.untyped_storage(), self._gone, nbytes, _storage(memory))
        return memory

    def _gone(self, nbytes: int, storage: int) -> None:
        self.live -= nbytes
        self._device.discard(storage)

    def mark(self) -> int:
        return self.clock

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: int) -> int:
        for target, source in pairs:
            last_read = self._read.get(_storage(target), -1)
            assert after > last_read, "this memory may still be read by what was asked of the device before"
            assert target.dtype == source.dtype and target.stride() == source.stride()
            nbytes = target.numel() * target.element_size()
            start = target.storage_offset() * target.element_size()
            memory = torch.empty(0, dtype=torch.uint8).set_(target.untyped_storage())
            memory[start : start + nbytes] = POISON
            self.copies.append(nbytes)
            self.moved += nbytes
        self._queue.append(pairs)
        return len(self._queue)

    def wait(self, mark: int) -> None:
        for i in range(self._done, mark):
            for target, source in self._queue[i]:
                target.copy_(source)
            self._queue[i] = ()
        self._done = max(self._done, mark)

    def trim(self) -> None: ...

    def watch(self, blocks: Sequence[nn.Module]) -> None:
        """Note when each of `blocks` computes, and that it does so with memory of the device."""
        for block in blocks:
            block.register_forward_hook(self._computed)

    def _computed(self, block: nn.Module, *_: object) -> None:
        self.clock += 1
        for x in (*block.parameters(), *block.buffers()):
            assert _storage(x) in self._device, f"a weight {tuple(x.shape)} was not on the device"
            self._read[_storage(x)] = self.clock - 1


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
