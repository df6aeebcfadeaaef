"""Which packages have kernels for which weights and cards. No torch, so that a plan can count on them before
the worker has tried them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass

Capability = tuple[int, int]


@dataclass(frozen=True)
class Reach:
    """lowest, highest: compute capabilities of the NVIDIA cards on which a package's kernel wins by the
    arithmetic of their tensor cores. amd: AMD cards may try it."""

    package: str
    lowest: Capability = (7, 5)
    highest: Capability = (99, 0)
    amd: bool = False

    def suits(self, capability: Capability | None) -> bool:
        """capability: of an NVIDIA card; None: an AMD card."""
        return self.amd if capability is None else self.lowest <= capability <= self.highest


# Hopper and later multiply 4-bit integers no faster than 8-bit ones, so int4 ends at 8.9; fp4 begins at 12.0.
#: kind of quantized weights -> who multiplies them as they are, the best first
QUANTIZED = {
    "int8": (Reach("comfy_kitchen", amd=True),),
    "svdq-int4": (Reach("comfy_kitchen", (8, 0), (8, 9)), Reach("nunchaku", (7, 5), (8, 9))),
    "svdq-fp4": (Reach("nunchaku", (12, 0), (12, 1)),),
}
INSTALLED_WITH_A_CARD = ("comfy_kitchen",)  # by start.py, where it finds an NVIDIA card


def expected(capability: Capability, packages: Collection[str]) -> frozenset[str]:
    """The kinds that these packages have kernels for on such a card; one that fails its trial is left out
    only then."""
    return frozenset(
        kind
        for kind, reaches in QUANTIZED.items()
        if any(reach.package in packages and reach.suits(capability) for reach in reaches)
    )


def installed() -> frozenset[str]:
    """Those of the packages that are here. They are not imported for that."""
    names = {reach.package for reaches in QUANTIZED.values() for reach in reaches}
    return frozenset(name for name in names if importlib.util.find_spec(name) is not None)
