"""Attention backends: one function each, chosen by name.

Every backend takes queries, keys and values of shape [batch, tokens, heads, head_dim] and returns
[batch, tokens, heads * head_dim] in their dtype. None of them takes a mask: every sequence of this project is
attended in full (see `models/z_image/transformer_z_image.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import UserError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled dot-product attention; it picks its own kernel for the device."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 2 (package flash-attn)."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v).flatten(2)


def flash_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 3 (package flash_attn_interface, Hopper cards)."""
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v)
    return (out[0] if isinstance(out, tuple) else out).flatten(2)


#: name -> (function, package it needs); the names are those of the model documents.
BACKENDS: dict[str, tuple[Attend, str | None]] = {
    "sdpa": (sdpa, None),
    "flash": (flash, "flash_attn"),
    "_flash_3": (flash_3, "flash_attn_interface"),
}


def get(name: str) -> Attend:
    """The backend called `name` ("auto" = sdpa). Raises UserError when it does not exist or cannot run."""
    name = "sdpa" if name in ("", "auto") else name
    if name not in BACKENDS:
        raise UserError(f"Attention backend '{name}' does not exist; choose one of: {', '.join(BACKENDS)}.")
    function, package = BACKENDS[name]
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"Attention backend '{name}' needs the package {package}, which is missing; use --attention sdpa."
        )
    if package and not torch.cuda.is_available():
        raise UserError(f"Attention backend '{name}' runs on CUDA cards only; use --attention sdpa.")
    return function
