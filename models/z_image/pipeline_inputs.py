"""What a call of the pipeline asks for, checked and completed with what is usual for the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.arguments import check, default
from models.z_image import unified_sampler
from models.z_image.control import ControlSchedule
from models.z_image.family import LARGEST_SIDE, SIZE_MULTIPLE, SMALLEST_SIDE
from models.z_image.image_tensors import ImageTensors
from models.z_image.nag import Nag
from models.z_image.sampling import Guidance, make_sigmas
from models.z_image.seed_variety import SeedVariety
from models.z_image.unified_sampler import UnifiedConfig
from shared.errors import UserError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DEFAULT_SIDE = 1024  # pixels
MAX_TOKENS = 512  # of a prompt, that the models were trained to read
DEFAULT_NEGATIVE_PROMPT = (
    "low quality, worst quality, blurry, pixelated, noisy, artifacts, watermark, text, logo, "
    "bad anatomy, bad hands, extra limbs"
)

Generators = list[torch.Generator | None]


@dataclass(frozen=True)
class Usual:
    """What a model takes where a call says nothing."""

    num_inference_steps: int = 8
    guidance_scale: float = 0.0
    control_context_scale: float = default("control_context_scale")

    def guidance(
        self, scale: float | None, normalization: float | None, truncation: float | None
    ) -> Guidance:
        scale = self.guidance_scale if scale is None else scale
        return Guidance(scale, float(normalization or 0), truncation)

    def control(self, scale: float | None, start: float, end: float) -> ControlSchedule:
        return ControlSchedule(self.control_context_scale if scale is None else scale, start, end)


@dataclass(frozen=True)
class ModelTraits:
    """What of a model decides what a call may ask of it.

    unified: it is made for the unified sampler. second_time_embedder: its file is a complete TwinFlow one.
    """

    usual: Usual
    unified: bool
    second_time_embedder: bool


@dataclass(frozen=True)
class Canvas:
    """The size in pixels that is made, and that of the tiles it is denoised in (None: as a whole)."""

    width: int
    height: int
    tile: int | None = None

    @classmethod
    def checked(cls, width: int | None, height: int | None, tile: int | None) -> Canvas:
        """UserError for a side that the page would refuse, too; a picture in tiles may be of any size."""
        width, height = (DEFAULT_SIDE if side is None else side for side in (width, height))
        for name, value in (("height", height), ("width", width), ("tile", tile)):
            if value is not None:
                _check_side(name, value, *((SIZE_MULTIPLE, None) if tile else (SMALLEST_SIDE, LARGEST_SIDE)))
        return cls(width, height, tile)

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


def _check_side(name: str, value: Any, smallest: int, largest: int | None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and smallest <= value <= (largest or value) and value % SIZE_MULTIPLE == 0:
        return
    near = ""
    if isinstance(value, int | float) and math.isfinite(value):
        multiple = max(smallest, round(value / SIZE_MULTIPLE) * SIZE_MULTIPLE)
        near = f", the nearest is {min(multiple, largest or multiple)}"
    bounds = f" from {smallest} to {largest} pixels" if largest else ""
    raise UserError(f"The {name} came as {value!r}; expected a multiple of {SIZE_MULTIPLE}{bounds}{near}.")


@dataclass(frozen=True)
class Sampler:
    """steps: as asked for. unified: the unified sampler's configuration; None where the scheduler's steps
    are to run. notes: what was substituted.
    """

    steps: int
    unified: UnifiedConfig | None = None
    flow_shift: float | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def chosen(
        cls,
        traits: ModelTraits,
        name: str | None,
        steps: int | None,
        overrides: Mapping[str, Any] | None,
        flow_shift: float | None,
    ) -> Sampler:
        """name: a sample_solver; none means the model's own. overrides: of the unified sampler's parameters.
        UserError for names and numbers that do not exist.
        """
        if steps is None:  # as usual for the sampler that is asked for, where that is not the model's own
            asked = unified_sampler.is_unified(name)
            steps = UnifiedConfig.sampling_steps if asked else traits.usual.num_inference_steps
        check(num_inference_steps=steps, flow_shift=flow_shift)
        solver = name or ("unified" if traits.unified else "")
        if unified_sampler.is_unified(solver):
            config = unified_sampler.resolve(solver, steps, overrides)
            own_steps = bool((overrides or {}).get("sampling_steps"))
            return cls(steps, config, flow_shift, _unified_notes(solver, steps, config, own_steps, traits))
        if solver.strip().lower() not in ("", "default", "euler"):
            raise UserError(
                f"sample_solver came as '{solver}'; expected unified, unified_2s, unified_4s, twinflow, "
                "or no name for the model's own."
            )
        if overrides:
            raise UserError("unified_sampler_config acts with sample_solver='unified' only; set that too.")
        return cls(steps, None, flow_shift)

    def sigmas(self, scheduler_config: Mapping[str, Any], tokens: int, strength: float) -> list[float]:
        """The run's noise levels, falling to 0. tokens: of the image. strength: see make_sigmas."""
        if self.unified is None:
            return make_sigmas(self.steps, scheduler_config, tokens, self.flow_shift, strength)
        return [strength * t for t in unified_sampler.time_grid(self.unified)]


def _unified_notes(
    solver: str, steps: int, config: UnifiedConfig, own_steps: bool, traits: ModelTraits
) -> tuple[str, ...]:
    notes = []
    if config.sampling_steps != steps and not own_steps:
        notes.append(f"{solver} takes {config.sampling_steps} steps; the {steps} asked for were not used.")
    if idle := unified_sampler.without_effect(config):
        notes.append(idle)
    if not traits.second_time_embedder:
        notes.append(
            "This model's file has no second time embedder; the first one is used for both, so pictures "
            "can be less exact than with a complete TwinFlow file."
        )
    return tuple(notes)


@dataclass(frozen=True)
class Prompts:
    """texts: to encode; none where `embeds`, features [L, hidden], were given in their stead."""

    texts: Sequence[str] = ()
    embeds: Sequence[Tensor] | None = None

    @classmethod
    def of(cls, prompt: str | Sequence[str] | None, embeds: Sequence[Tensor] | None) -> Prompts:
        if embeds is not None:
            return cls((), embeds)
        if prompt is None:
            raise UserError("There is neither a prompt nor prompt_embeds: give one of them.")
        return cls([prompt] if isinstance(prompt, str) else list(prompt))

    def __len__(self) -> int:
        return len(self.texts if self.embeds is None else self.embeds)


@dataclass(frozen=True)
class Steering:
    """What the pictures are moved away from, and how; without negatives, from nothing.

    nag: None where it does not act.
    """

    guidance: Guidance = Guidance()
    nag: Nag | None = None
    negatives: Prompts = Prompts()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        guidance: Guidance,
        nag: Nag,
        negative_prompt: str | Sequence[str] | None,
        embeds: Sequence[Tensor] | None,
        prompts: int,
        unified: bool,
    ) -> Steering:
        """embeds: instead of the negative prompt. prompts: how many there are. unified: the unified sampler's
        models were trained with their guidance inside, so neither acts.
        """
        chosen = {"guidance_scale": guidance.on, "NAG_scale": nag.on}
        idle = [name for name, on in chosen.items() if on and unified]
        notes = [f"{name} does not act with the unified sampler and was not used." for name in idle]
        if unified or not (guidance.on or nag.on):
            if any(text.strip() for text in _as_list(negative_prompt)):
                notes.append(
                    "The negative prompt did not act: guidance (or NAG) was off or not for this model."
                )
            return cls(notes=tuple(notes))
        texts = _negative_texts(negative_prompt, prompts)
        if embeds is None and any(not text.strip() for text in texts):
            notes.append(f"The negative prompt was empty; the default was used: {DEFAULT_NEGATIVE_PROMPT}")
        filled = [text if text.strip() else DEFAULT_NEGATIVE_PROMPT for text in texts]
        negatives = Prompts(filled) if embeds is None else Prompts(embeds=embeds)
        return cls(guidance, None if guidance.on else nag, negatives, tuple(notes))


def _as_list(texts: str | Sequence[str] | None) -> list[str]:
    return [texts or ""] if texts is None or isinstance(texts, str) else list(texts)


def _negative_texts(negative: str | Sequence[str] | None, count: int) -> list[str]:
    """One for each of `count` prompts."""
    texts = _as_list(negative)
    if negative is None or isinstance(negative, str):
        texts *= count
    if len(texts) != count:
        raise UserError(
            f"There are {len(texts)} negative prompts for {count} prompts: give one for each, or one."
        )
    return texts


def generators_for(generator: Any, prompts: int, images_per_prompt: int) -> Generators:
    """One for each image, which may be the same."""
    check(num_images_per_prompt=images_per_prompt)
    count = prompts * images_per_prompt
    generators = list(generator) if isinstance(generator, Sequence) else [generator] * count
    if len(generators) != count:
        raise UserError(
            f"There are {len(generators)} generators for {count} images: give one for each, or one."
        )
    return generators


@dataclass(frozen=True)
class PipelineInputs:
    """A call's arguments, checked: UserError for those that make no picture.

    denoising_strength: how far from `images.image`. latents: the noise itself, [n, 16, height / 8,
    width / 8].
    """

    canvas: Canvas
    prompts: Prompts
    steering: Steering
    sampler: Sampler
    variety: SeedVariety
    images: ImageTensors
    control: ControlSchedule
    denoising_strength: float
    images_per_prompt: int
    generators: Generators
    latents: Tensor | None
    max_sequence_length: int
    output_type: str

    def __post_init__(self) -> None:
        if self.output_type not in OUTPUT_TYPES:
            raise UserError(
                f"output_type came as {self.output_type!r}; expected one of {', '.join(OUTPUT_TYPES)}."
            )
        if not 1 <= self.max_sequence_length <= MAX_TOKENS:
            raise UserError(
                f"max_sequence_length came as {self.max_sequence_length}; expected a whole number from 1 to "
                f"{MAX_TOKENS}."
            )
        check(denoising_strength=self.denoising_strength)

    @property
    def strength(self) -> float:
        """How far from the picture the run starts; 1 without one."""
        return self.denoising_strength if self.images.image is not None else 1.0

    @property
    def notes(self) -> list[str]:
        """What was substituted."""
        return [*self.images.notes, *self.sampler.notes, *self.steering.notes]
