"""Attention backends: one function each, chosen by name.

Every backend takes queries, keys and values of shape [batch, tokens, heads, head_dim] and returns
[batch, tokens, heads * head_dim] in their dtype. None of them takes a mask: every sequence of this project is
attended in full (see `models/z_image/transformer_z_image.py`).
"""

from __future__ import annotations

import importlib.util
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import UserError
from shared.settings.table import ATTENTION_PACKAGES

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Capability = tuple[int, int]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled dot-product attention; it picks its own kernel for the device."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 2 (package flash-attn)."""
    if q.dtype == torch.float32:  # none of these packages computes in it
        return sdpa(q, k, v)
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v).flatten(2)


def flash_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 3 (package flash_attn_interface, Hopper cards)."""
    if q.dtype == torch.float32:
        return sdpa(q, k, v)
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v)
    return (out[0] if isinstance(out, tuple) else out).flatten(2)


def sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SageAttention (package sageattention): queries and keys in 8 bits, so a little less exact."""
    if q.dtype == torch.float32:
        return sdpa(q, k, v)
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="NHD").flatten(2)


@dataclass(frozen=True)
class Backend:
    """install: how a user gets its package (ATTENTION_PACKAGES). lowest, highest: compute capability."""

    attend: Attend
    install: str = ""
    lowest: Capability = (0, 0)
    highest: Capability = (99, 9)


#: the names are those of the model documents and of Wan2GP
BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(sdpa),
    "flash": Backend(flash, "install it with: pip install flash-attn", (8, 0)),
    "_flash_3": Backend(
        flash_3, "build it from the folder hopper of github.com/Dao-AILab/flash-attention", (9, 0), (9, 0)
    ),
    "sage": Backend(sage, "install it with: pip install sageattention", (8, 0)),
}


def capability_of(device: torch.device) -> Capability | None:
    """The compute capability of a CUDA card; None for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def choose(
    requested: str | None,
    card_rule: str | Mapping[str, str] | None = None,
    capability: Capability | None = None,
    otherwise: str = "auto",
) -> tuple[str, str | None]:
    """The name of the backend to use, and a sentence for the user where it is not the one asked for.

    requested: a name of BACKENDS; None, "" or "auto" leaves it to `otherwise`, and that to sdpa.
    card_rule: what a model needs: a name, or names by compute capability such as {"<89": "sdpa"}.
    capability: of the CUDA card; None: the current one, if there is any.
    Raises UserError for a name or a rule that does not exist.
    """
    if capability is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
    wish = _named(requested) or _named(otherwise)
    name, note = _known(wish or "sdpa", "Attention backend"), None
    needed = _ruled(card_rule, capability)
    if needed and needed != name:
        name = needed
        note = f"This model needs the attention backend {needed} on this card; {wish} was not used."
    problem = _missing(name, capability)
    if problem:
        return "sdpa", f"Attention backend {name} was replaced by sdpa: {problem}."
    return name, note if wish else None


def _named(name: str | None) -> str:
    return "" if name in (None, "", "auto") else str(name)


def _known(name: str, what: str) -> str:
    if name not in BACKENDS:
        raise UserError(f"{what} '{name}' does not exist; choose one of: {', '.join(BACKENDS)}.")
    return name


def _missing(name: str, capability: Capability | None) -> str:
    """Why this backend cannot run here, and what to do; "" where it can."""
    backend, package = BACKENDS[name], ATTENTION_PACKAGES.get(name)
    if package is None:
        return ""
    if capability is None:
        return "it runs on CUDA cards only"
    if not backend.lowest <= capability <= backend.highest:
        return f"it does not run on cards of compute capability {capability[0]}.{capability[1]}"
    if importlib.util.find_spec(package) is None:
        return f"its package {package} is missing; {backend.install}"
    return ""


# ---------------------------------------------------------------- a card's rule

_COMPARISONS = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq,
}  # fmt: skip


def _ruled(rule: str | Mapping[str, str] | None, capability: Capability | None) -> str:
    """The backend that a model's card asks for on this device; "" where it leaves the choice."""
    if isinstance(rule, Mapping):
        names = [name for condition, name in rule.items() if _holds(condition, capability)]
        rule = names[0] if names else None
    name = _named(rule)
    return _known(name, 'The model card\'s "attention" backend') if name else ""


def _holds(condition: str, capability: Capability | None) -> bool:
    """Whether "<89" holds: a compute capability without its point; & joins conditions, + alternatives."""
    if capability is None:
        return False
    number = capability[0] * 10 + capability[1]
    return any(all(_compared(part, number) for part in parts.split("&")) for parts in condition.split("+"))


def _compared(part: str, number: int) -> bool:
    match = re.fullmatch(r"\s*(<=|>=|<|>|=)?\s*(\d+)\s*", part)
    if match is None:
        raise UserError(
            f'The model card\'s "attention" holds the condition "{part.strip()}"; expected a comparison with '
            'a compute capability, such as "<89": correct the card.'
        )
    return _COMPARISONS[match[1] or "="](number, int(match[2]))
