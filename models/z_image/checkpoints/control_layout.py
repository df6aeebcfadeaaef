"""Which generation a control network's file is, told by its keys and never by its name. No torch: the planner
asks, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from models.z_image.checkpoints import weight_names
from shared.errors import UserError
from shared.files.unchanged import while_unchanged
from shared.weights import formats
from shared.weights.files import read_header

EMBEDDER = "control_all_x_embedder.2-1.weight"
LATENT_CHANNELS = 16
INPAINT_CHANNELS = 33  # control latent 16, mask 1, latent of what is kept 16

#: which blocks see the image tokens before the noise refiner
PLAIN, SHARED, OWN = "plain", "shared", "own"


class Dimensions(Protocol):
    """What is asked of the base model's configuration."""

    @property
    def n_layers(self) -> int: ...
    @property
    def patch_size(self) -> int: ...


@dataclass(frozen=True)
class ControlLayout:
    """channels: of the context. places: the base's layers that get a hint. refiner: PLAIN blocks refine the
    control tokens (v1); the main blocks pass over the image tokens first (SHARED, 2.0); blocks of their OWN
    do (2.1, lite).
    """

    channels: int
    places: tuple[int, ...]
    refiner: str

    @classmethod
    def of(cls, checkpoint: formats.Checkpoint, base: Dimensions) -> ControlLayout:
        """Of a checkpoint inspected with names.CONTROL. UserError for a layout this program does not know."""
        label = ", ".join(file.name for file in checkpoint.files)
        channels = checkpoint.entries[EMBEDDER].shape[1] / base.patch_size**2
        if channels not in (LATENT_CHANNELS, INPAINT_CHANNELS):
            raise UserError(
                f"{label} is a control network for {channels:g} channels; expected {LATENT_CHANNELS} or "
                f"{INPAINT_CHANNELS}: take one made for this model."
            )
        matches = (re.match(r"control_layers\.(\d+)\.", name) for name in checkpoint.entries)
        blocks = {int(match[1]) for match in matches if match}
        if not blocks or blocks != set(range(len(blocks))) or len(blocks) > base.n_layers:
            raise UserError(
                f"{label} has the control layers {sorted(blocks)} for a model of {base.n_layers} layers: "
                "it is incomplete, or made for another model."
            )
        places = tuple(range(0, base.n_layers, round(base.n_layers / len(blocks))))[: len(blocks)]
        if channels == LATENT_CHANNELS:
            return cls(LATENT_CHANNELS, places, PLAIN)
        return cls(INPAINT_CHANNELS, places, OWN if _is_trained(checkpoint) else SHARED)

    @property
    def inpaints(self) -> bool:
        """Whether its context has channels for what is to be repainted."""
        return self.channels == INPAINT_CHANNELS

    def unused(self, name: str) -> bool:
        """Whether a file of this layout has the tensor of that name but no use for it."""
        return self.refiner == SHARED and name.startswith("control_noise_refiner.")


def _is_trained(checkpoint: formats.Checkpoint) -> bool:
    """Whether the file's refiner blocks give hints: the first one's projection is there and not all zero."""
    entry = checkpoint.entries.get("control_noise_refiner.0.after_proj.weight")
    return entry is not None and bool(read_header(entry.file).read(entry.source).strip(b"\0"))


@while_unchanged(answers=16)
def read(file: Path, base: Dimensions) -> tuple[formats.Checkpoint, ControlLayout]:
    """What a file holds, and its layout. UserError when it is no control network, or damaged."""
    checkpoint = formats.inspect([file], weight_names.CONTROL)
    return checkpoint, ControlLayout.of(checkpoint, base)


def is_control(file: Path) -> bool:
    """Whether a file's tensors are a control network's. UserError when it is damaged."""
    known = weight_names.CONTROL.known
    return file.is_file() and any(name.endswith(known) for name in read_header(file).entries)
