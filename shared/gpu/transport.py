"""The device side of offloading: memory on both sides of the bus, and copies that computing waits for."""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

PAGE = max(4096, mmap.PAGESIZE)
PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every context of the process


def default_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def pinned_bytes(share: float | None = None) -> int:
    """How much RAM may be page-locked: a share of all of it, by default what the systems bear."""
    if share is None:
        share = 0.40 if sys.platform == "win32" else 0.50
    return int(psutil.virtual_memory().total * share)


class Transport(Protocol):
    """The device side of a Residency: memory on both sides of the bus, and copies that computing waits for.

    A mark is a point in the queue of what was asked of the device; nobody here ever waits for the device
    itself. Copies run in the order in which they were asked for, beside the computing.
    """

    def host(self, nbytes: int) -> Tensor | None:
        """Page-locked RAM as [nbytes] uint8; None when the system refuses it."""

    def release(self, buffer: Tensor) -> None:
        """Turn such a buffer back into ordinary RAM."""

    def free(self) -> int:
        """Bytes of the device that parts can still get."""

    def empty(self, nbytes: int) -> Tensor:
        """[nbytes] uint8 on the device."""

    def mark(self) -> Any:
        """The end of all the computing asked for so far."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:
        """Start copying (to the device, from RAM) once `after` is reached. Returns the mark of its end."""

    def wait(self, mark: Any) -> None:
        """All computing asked for from here on runs after `mark`."""

    def trim(self) -> None:
        """Give memory that was let go back to the system."""


class CudaTransport:
    """A copy stream beside the stream that computes; events order the two.

    Device buffers belong to the computing stream's allocator, so the first copy into one waits for a mark
    taken after it was allocated (its memory may have another owner's kernels queued), and a buffer is let go
    only after `wait` for the last copy into it: the allocator then hands it on in the right order, without
    `record_stream`, which would hold it back until the card has caught up.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)

    def host(self, nbytes: int) -> Tensor | None:
        """torch's own pinned allocator rounds up to powers of two (345 MB to 512), so pages are locked here.

        The buffer has whole pages to itself: locking works by pages, and no two buffers may share one.
        """
        size = -(-nbytes // PAGE) * PAGE
        try:
            memory = torch.empty(size + PAGE, dtype=torch.uint8, device="cpu")
        except RuntimeError:  # no RAM for a copy, however short its life
            return None
        start = -memory.data_ptr() % PAGE
        buffer = memory[start : start + nbytes]
        error = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, PORTABLE)
        if int(error) == 0:
            return buffer
        # the error would otherwise be reported by the next kernel's launch, which has no part in it
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.device)
        return None

    def release(self, buffer: Tensor) -> None:
        self._copies.synchronize()  # pages may not be unlocked under a copy that still reads them
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())

    def free(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: torch.cuda.Event) -> torch.cuda.Event:
        self._copies.wait_event(after)
        with torch.cuda.stream(self._copies):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self._copies.record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def trim(self) -> None:
        """Blocks of another part have another size, and Windows answers a full card with system memory
        instead of an error: cached memory must not stand in the way of the next part."""
        torch.cuda.empty_cache()
