"""The configurations of a model's parts. No torch: plans are made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.z_image.checkpoints import sources
from models.z_image.family import QWEN3_4B, ROOT, TRANSFORMER_CONFIG, VAE_CONFIG
from shared.errors import UserError
from shared.files.unchanged import while_unchanged
from shared.weights.files import Folders

ACTIVATION = 2  # bytes of a value on a card
VAE_VALUE = 4  # the VAE computes in fp32


@dataclass(frozen=True)
class Shape:
    """The transformer's dimensions, under the names of its config.json."""

    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    cap_feat_dim: int = 2560
    in_channels: int = 16
    patch_size: int = 2

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        return cls(**{k: config[k] for k in cls.__dataclass_fields__ if k in config})

    @property
    def hidden(self) -> int:
        return int(self.dim / 3 * 8)

    @property
    def linear_weights(self) -> int:
        """Of one block, without its modulation."""
        return 4 * self.dim**2 + 3 * self.dim * self.hidden

    def image_tokens(self, width: int, height: int) -> int:
        side = 8 * self.patch_size
        return _padded((width // side) * (height // side))


def _padded(length: int) -> int:
    return math.ceil(length / 32) * 32


def part_configs(model_def: Mapping[str, Any], folders: Folders) -> dict[str, Mapping[str, Any]]:
    """Of "transformer", "text_encoder" and "vae". UserError when one cannot be read."""
    return {
        "transformer": transformer_config(model_def),
        "text_encoder": read_config(sources.encoder_config(model_def, folders) or QWEN3_4B),
        "vae": read_config(model_def.get("vae_config") or VAE_CONFIG),
    }


def transformer_config(model_def: Mapping[str, Any]) -> Mapping[str, Any]:
    return read_config(model_def.get("transformer_config") or TRANSFORMER_CONFIG)


def read_config(config: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration given in the card itself, or as a path from the project's root. Whoever gets it shares
    it.
    """
    return config if isinstance(config, Mapping) else _read(ROOT / config)


@while_unchanged(answers=32)
def _read(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(
            f"The configuration {path} cannot be read ({error.strerror}): correct the card."
        ) from error
    except ValueError as error:
        raise UserError(f"The configuration {path} is not JSON ({error}): correct the file.") from error
