"""Fused and quantized kernels by name, where the device has them; everywhere else plain torch."""

from collections.abc import Callable

import torch


def find(op: str, device: torch.device) -> Callable[..., torch.Tensor] | None:
    """The kernel for `op` on `device`; None: compute with plain torch."""
    return None
