"""LoRAs for the Mini."""

from collections.abc import Mapping
from typing import Any

from tests.support.lora_writers import SHAPES, factors

DIM, HIDDEN = 128, 341
MINI_SHAPES = {name: tuple({96: DIM, 256: HIDDEN}[side] for side in shape) for name, shape in SHAPES.items()}


def mini_factors(seed: int = 0, scale: float = 0.3, shapes: Mapping[str, Any] = MINI_SHAPES) -> Any:
    return {name: (a, scale * b, alpha) for name, (a, b, alpha) in factors(shapes, seed=seed).items()}  # type: ignore[arg-type]
