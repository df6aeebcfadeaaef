"""Counts the bytes that are alive while modules run on torch's meta device: no memory, no arithmetic."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes that storages made inside the `with` block held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in _tensors((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for x in _tensors(out):
            storage = x.untyped_storage()
            if x.device.type == "meta" and storage not in self._known and id(storage) not in given:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, count: int) -> None:
        self.now -= count


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """In the place of attention: allocates the answer only, as fused kernels do."""
    return torch.empty_like(q)
