"""mmgp's side of a card on the CPU, for logic only: what it copies to "cuda" are counted clones.

It says nothing of speed, overlap or real memory.
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared.gpu.offloading_mmgp import load_mmgp


class FakeCuda:
    """moved: bytes copied to the "card"; live: bytes there that anything still holds; peak: the most of them;
    pinned: bytes of page-locked RAM; waits: how often the card was waited for. room: bytes that it has."""

    def __init__(self, room: int = 16 << 30, pinnable: int | None = None) -> None:
        self.moved = self.live = self.peak = self.pinned = self.waits = 0
        self.room, self._pinnable = room, pinnable
        self._there: set[int] = set()
        self._locked: dict[int, int] = {}

    def install(self, monkeypatch: Any) -> None:
        mmgp = load_mmgp()  # its import looks at what is replaced here
        monkeypatch.setattr(mmgp, "gc", types.SimpleNamespace(collect=lambda: 0))  # a third of a second each
        real_to = Tensor.to

        def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not any(map(_is_cuda, (*args, kwargs.get("device")))):
                return real_to(x, *args, **kwargs)
            args = tuple("cpu" if _is_cuda(arg) else arg for arg in args)
            kwargs = {k: "cpu" if _is_cuda(value) else value for k, value in kwargs.items()}
            return self._arrived(real_to(x, *args, **kwargs).clone())

        def lockable(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
                tensor = make(*args, **kwargs)
                if pin_memory:
                    self._lock(tensor)
                return tensor

            return made

        def synchronize(*_: Any) -> None:
            self.waits += 1

        class Stream:  # a class, as annotations of what is imported later name it
            def __init__(self, *_: Any, **__: Any) -> None: ...

            def synchronize(self) -> None:
                synchronize()

        replaced: dict[str, Any] = {
            "get_device_properties": lambda *_: types.SimpleNamespace(total_memory=self.room, name="fake"),
            "mem_get_info": lambda *_: (self.room - self.live, self.room),
            "Stream": Stream,
            "default_stream": Stream,
            "current_stream": Stream,
            "stream": lambda _: contextlib.nullcontext(),
            "synchronize": synchronize,
            "empty_cache": lambda: None,
            "memory_reserved": lambda *_: 0,
            "memory_allocated": lambda *_: self.live,
        }
        for name, stand_in in replaced.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, lockable(getattr(torch, name)))
        monkeypatch.setattr(torch, "set_default_device", lambda _: None)
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: _storage(x) in self._there))
        monkeypatch.setattr(Tensor, "is_pinned", lambda x: _storage(x) in self._locked)
        monkeypatch.setattr(Tensor, "cuda", lambda x, *_, **__: to(x, "cuda"))
        monkeypatch.setattr(Tensor, "to", to)

    def watch(self, blocks: Sequence[nn.Module]) -> None:
        """Have each of `blocks` compute with memory of the card only."""
        for block in blocks:
            block.register_forward_hook(self._check)

    def _check(self, block: nn.Module, *_: object) -> None:
        for x in (*block.parameters(), *block.buffers()):
            assert _storage(x) in self._there, f"a weight {tuple(x.shape)} was not on the card"

    def _arrived(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        count = storage.nbytes()
        if self.live + count > self.room:
            raise torch.OutOfMemoryError("the fake card is full")
        self.moved += count
        self.live += count
        self.peak = max(self.peak, self.live)
        self._there.add(storage.data_ptr())
        weakref.finalize(storage, self._gone, count, storage.data_ptr())
        return x

    def _gone(self, count: int, address: int) -> None:
        self.live -= count
        self._there.discard(address)

    def _lock(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if self._pinnable is not None and self.pinned + storage.nbytes() > self._pinnable:
            raise RuntimeError("no more memory can be page-locked")
        self.pinned += storage.nbytes()
        self._locked[storage.data_ptr()] = storage.nbytes()
        weakref.finalize(storage, self._unlocked, storage.data_ptr())

    def _unlocked(self, address: int) -> None:
        self.pinned -= self._locked.pop(address)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
