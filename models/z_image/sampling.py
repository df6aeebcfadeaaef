"""From noise to latents: the noise levels of a run, classifier-free guidance, and the steps themselves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from models.arguments import check, default
from models.z_image import unified_sampler
from models.z_image.control import Guide
from models.z_image.image_tensors import InpaintConstraint
from models.z_image.nag import Nag
from models.z_image.seed_variety import SeedVariety
from models.z_image.tiles import LatentTiles
from models.z_image.transformer_z_image import Conditioning, ZImageTransformer2DModel, dit_time
from models.z_image.unified_sampler import UnifiedConfig
from shared.loras.apply import set_multipliers

#: called after each step with its number (from 1), the number of steps and the predicted clean latents
StepCallback = Callable[[int, int, Sequence[Tensor]], None]

#: from a step (counted from 0) and their number to the strength of each attached LoRA
LoraStrengths = Callable[[int, int], Sequence[float]]


# ---- noise levels ------------------------------------------------------------------------------------------


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
    """steps + 1 noise levels from 1 down to 0: FlowMatchEulerDiscrete's. `flow_shift` replaces the
    configuration's static shift.

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


# ---- guidance ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance as in the official code: pos + scale * (pos - neg), on when scale > 1.

    UserError for numbers out of the settings' ranges.
    """

    scale: float = 0.0
    normalization: float = default("cfg_normalization")
    truncation: float | None = default("cfg_truncation")

    def __post_init__(self) -> None:
        check(
            guidance_scale=self.scale,
            cfg_normalization=self.normalization,
            cfg_truncation=self.truncation,
        )

    @property
    def on(self) -> bool:
        return self.scale > 1

    def acts_at(self, t: float) -> bool:
        """t = 1 - sigma; guidance ends once t exceeds the truncation."""
        return self.on and (self.truncation is None or t <= self.truncation)

    def combine(self, positive: Tensor, negative: Tensor) -> Tensor:
        """One sample's guided prediction; normalization c limits its norm to c times the positive one's."""
        prediction = positive + self.scale * (positive - negative)
        if self.normalization > 0:
            limit = self.normalization * torch.linalg.vector_norm(positive)
            norm = torch.linalg.vector_norm(prediction)
            prediction = torch.where(norm > limit, prediction * (limit / norm), prediction)
        return prediction


# ---- the run -----------------------------------------------------------------------------------------------


@dataclass
class Denoiser:
    """A run of the transformer over falling noise levels, `sigmas`, for all images at once.

    positive, negative: each image's prompt features [L, hidden]; negative: none where nothing moves away from
    them. varied: the positive ones while seed variety acts. nag: where it guides. guides: a control network's
    for each tile, or None. constraint: what masked denoising leaves as it is.
    """

    transformer: ZImageTransformer2DModel
    sigmas: Sequence[float]
    tiles: LatentTiles
    positive: Sequence[Tensor]
    negative: Sequence[Tensor]
    varied: Sequence[Tensor]
    guidance: Guidance
    nag: Nag | None
    variety: SeedVariety
    guides: Sequence[Guide | None]
    constraint: InpaintConstraint | None
    lora_strengths: LoraStrengths | None = None
    callback: StepCallback | None = None
    interrupt: Callable[[], bool] | None = None
    conditionings: list[Conditioning] = field(default_factory=list, init=False)
    negatives: list[Conditioning] = field(default_factory=list, init=False)
    _prepared_for: tuple[list[float] | None, bool] | None = field(default=None, init=False)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def euler(self, samples: list[Tensor]) -> list[Tensor]:
        """The latents that the samples become, fp32."""
        self.before_step(0)
        for number in range(self.steps):
            samples = self.step(samples, number)
        return samples

    def unified(
        self, samples: list[Tensor], config: UnifiedConfig, generators: Sequence[torch.Generator | None]
    ) -> list[Tensor]:
        """The same with TwinFlow's sampler, whose step noise comes from the images' generators."""
        self.before_step(0)
        latents = unified_sampler.sample(
            self.velocities, samples, config, generators, self.after_step, self.sigmas
        )
        return [x.float() for x in latents]

    def before_step(self, number: int) -> None:
        """Get ready for a step, counted from 0. The prompts are prepared anew whenever the LoRAs' strengths
        change, since LoRAs act on that, too, and when seed variety ends.
        """
        strengths = None if self.lora_strengths is None else list(self.lora_strengths(number, self.steps))
        varies = self.variety.acts_at(number, self.steps)
        if self._prepared_for == (strengths, varies):
            return
        if strengths is not None:
            set_multipliers(self.transformer, strengths)
        self.conditionings = self._prepare(self.varied if varies else self.positive)
        self.negatives = self._prepare(self.negative)
        self._prepared_for = strengths, varies

    def after_step(self, number: int, steps: int, denoised: Sequence[Tensor]) -> None:
        """number: counted from 1. denoised: the predicted clean latents."""
        if self.callback is not None:
            self.callback(number, steps, denoised)
        if number < steps:
            self.before_step(number)

    def step(self, samples: list[Tensor], number: int) -> list[Tensor]:
        """Euler: x += (sigma_next - sigma) * velocity, where velocity = -(the transformer's output)."""
        sigma, sigma_next = self.sigmas[number : number + 2]
        outputs = self.predict(samples, sigma)
        denoised = [x + sigma * out for x, out in zip(samples, outputs, strict=True)]
        self.after_step(number + 1, self.steps, denoised)
        return [x + (sigma - sigma_next) * out for x, out in zip(samples, outputs, strict=True)]

    def predict(self, samples: list[Tensor], sigma: float) -> list[Tensor]:
        """x - z (image minus noise) for the samples at a noise level, fp32."""
        return self._whole(functools.partial(self._predict_tile, sigma=sigma), samples, sigma)

    def velocities(self, samples: list[Tensor], t: float, target: float) -> list[Tensor]:
        """z - x at noise level t, asked to jump to `target`, fp64: the unified sampler's `Predict`."""
        outputs = self._whole(functools.partial(self._predict_twin, t=t, target=target), samples, t)
        return [-x for x in outputs]

    def _whole(
        self, predict: Callable[[int, list[Tensor]], list[Tensor]], samples: list[Tensor], sigma: float
    ) -> list[Tensor]:
        """Put together from the tiles' predictions, exact for what the constraint knows."""
        outputs = self.tiles.joined(predict, samples)
        return outputs if self.constraint is None else self.constraint.apply(outputs, samples, sigma)

    def _predict_tile(self, tile: int, samples: list[Tensor], sigma: float) -> list[Tensor]:
        """Of one tile: plain, with classifier-free guidance, or with NAG."""
        guided = self.nag is None and self.guidance.acts_at(1 - sigma)
        guide = self.guides[tile]
        control = guide and guide.at(sigma, len(samples) * (2 if guided else 1))
        t = torch.tensor([(1000 - sigma * 1000) / 1000], dtype=torch.float32, device=samples[0].device)
        forward = functools.partial(self.transformer, interrupt=self.interrupt, control=control)
        if self.nag is not None:
            outputs = forward(samples, t, self.conditionings, negatives=self.negatives, nag=self.nag)
        elif guided:
            outputs = forward(samples * 2, t, self.conditionings + self.negatives)
            pairs = zip(outputs[: len(samples)], outputs[len(samples) :], strict=True)
            outputs = [self.guidance.combine(pos.float(), neg.float()) for pos, neg in pairs]
        else:
            outputs = forward(samples, t, self.conditionings)
        return [x.float() for x in outputs]

    def _predict_twin(self, tile: int, samples: list[Tensor], t: float, target: float) -> list[Tensor]:
        """Of one tile, as TwinFlow's models are asked."""
        times = dit_time(torch.tensor([t, target], dtype=torch.float64, device=samples[0].device))
        guide = self.guides[tile]
        control = guide and guide.at(t, len(samples))
        outputs = self.transformer(
            samples, times[:1], self.conditionings, self.interrupt, target_t=times[1:], control=control
        )
        return [x.double() for x in outputs]

    def _prepare(self, features: Sequence[Tensor]) -> list[Conditioning]:
        """One for each image; equal features are prepared once."""
        rows, columns = self.tiles.rows, self.tiles.columns
        prepared = {id(x): self.transformer.prepare(x, rows, columns) for x in features}
        return [prepared[id(x)] for x in features]
