"""The noise levels of a run: FlowMatchEulerDiscrete with a static shift; N steps are N forwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler


def calculate_shift(
    image_seq_len: int,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """mu for schedulers with `use_dynamic_shifting`: linear from (base_seq_len, base_shift) to the max
    pair.
    """
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    return base_shift + slope * (image_seq_len - base_seq_len)


def make_sigmas(
    steps: int,
    config: Mapping[str, Any],
    image_seq_len: int,
    flow_shift: float | None = None,
    strength: float = 1.0,
) -> list[float]:
    """steps + 1 noise levels from 1 down to 0. `flow_shift` replaces the configuration's static shift.

    strength: below 1 the run starts from a picture, at that share of the way (before the shift), and takes
    that share of the steps, rounded up.
    """
    steps = math.ceil(steps * strength)
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    if flow_shift is not None:
        config |= {"shift": flow_shift, "use_dynamic_shifting": False}
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    lengths = (config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096))
    mu = calculate_shift(
        image_seq_len, *lengths, config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    )
    scheduler.set_timesteps(sigmas=torch.linspace(strength, strength / steps, steps).tolist(), mu=mu)
    return scheduler.sigmas.tolist()
