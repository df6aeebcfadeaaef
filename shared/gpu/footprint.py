"""What models say of the memory and the work they need: plain records that the planner weighs. All bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PartSize:
    """Weights of one part.

    block_bytes: of each repeated block, in the order of a pass. ram_bytes: of what never leaves the RAM.
    base_bytes: of all the rest.
    """

    base_bytes: int
    block_bytes: tuple[int, ...] = ()
    ram_bytes: int = 0

    @property
    def total(self) -> int:
        """What a card has to hold of it at most."""
        return self.base_bytes + sum(self.block_bytes)

    def on_card(self, resident: int, slots: int = 2) -> int:
        """What a card holds while `resident` blocks stay there, from the last one backwards, and the others
        pass through `slots` places of the largest one's size.
        """
        streamed = self.block_bytes[: max(0, len(self.block_bytes) - resident)]
        passing = min(slots, len(streamed)) * max(streamed, default=0)
        return self.base_bytes + sum(self.block_bytes[len(streamed) :]) + passing


@dataclass(frozen=True)
class Variant:
    """One file that can serve as a part.

    source: the card's entry (URL or project path). kind: "bf16", "fp16", "fp32", "int8", "fp8", "svdq-int4",
    "svdq-fp4". size: as loaded, so floats count in the dtype they compute in. module: the file of the
    control network that goes with it, whose weights `size` includes.
    """

    source: str
    kind: str
    size: PartSize
    on_disk: bool = True
    module: Variant | None = None


@dataclass(frozen=True)
class Offers:
    """What a model's card offers for each part, best precision first.

    transformer_modules: weights that come on top of any transformer variant (such as a control net).
    """

    transformer: tuple[Variant, ...]
    text_encoder: tuple[Variant, ...] = ()
    vae: PartSize = PartSize(0)
    transformer_modules: int = 0


@dataclass(frozen=True)
class Needs:
    """What one job needs besides the weights.

    encode, denoise, denoise_quantized: activations while the text encoder, the transformer, a quantized
    transformer computes. decode: of the VAE by tile in pixels (None is the whole picture), largest first.
    linear_flops, attention_flops: of one step.
    """

    encode: int = 0
    denoise: int = 0
    denoise_quantized: int = 0
    decode: Mapping[int | None, int] = field(default_factory=lambda: {None: 0})
    linear_flops: float = 0.0
    attention_flops: float = 0.0
