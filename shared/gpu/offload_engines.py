"""The engines that move weights between RAM and card, by name; no torch, so that plans know them, too."""

from __future__ import annotations

import importlib.util

#: engine -> how many streamed blocks lie on the card at once: one computes and the next one comes. mmgp's are
#: allocated on two streams, and what one of them frees the other cannot have.
SLOTS = {"mmgp": 3, "stream": 2}


def has_mmgp() -> bool:
    """Whether mmgp is installed. It is not imported for that, which takes seconds."""
    return importlib.util.find_spec("mmgp") is not None


def default_engine() -> str:
    """The engine where nobody chose one."""
    return "mmgp" if has_mmgp() else "stream"
