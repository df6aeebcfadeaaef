"""A job's settings to the pipeline's arguments: the one place that knows both names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from models.z_image.pipeline_z_image import ZImagePipeline
from models.z_image.preview import LatentRgb
from models.z_image.z_image_handler import DEFAULT_FOLDERS, SAMPLER_SETTINGS
from shared import attention
from shared.imaging import masks, preprocess, sources
from shared.loras.apply import use_files
from shared.loras.multipliers import Multipliers
from shared.loras.names import ModelNames
from shared.offloading import Placement
from shared.settings import parse_parameters, parse_resolution

#: settings that are pipeline arguments of the same name
SAME_NAME = (
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "cfg_normalization",
    "cfg_truncation",
    "flow_shift",
    "sample_solver",
    "NAG_scale",
    "NAG_tau",
    "NAG_alpha",
    "seed_variety",
)

#: the same, in percent
IN_PERCENT = ("seed_variety_share", "seed_variety_until")

Previews = Callable[[], list[Image.Image]]


@dataclass(frozen=True)
class Generation:
    """What a job made. notes: what was substituted. extra: further entries for the metadata."""

    images: list[Image.Image]
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


class Plan(Protocol):
    """What of an engine's plan is for the models."""

    @property
    def vae_tile(self) -> int | None: ...
    @property
    def compile(self) -> bool: ...
    def placements(self) -> Mapping[str, Mapping[str, Any]]: ...


class ZImageProcessor:
    """Runs the pipeline for a job."""

    def __init__(
        self,
        pipe: ZImagePipeline,
        latent_rgb: LatentRgb,
        choose_attention: Callable[[str | None], tuple[str, str | None]] = attention.choose,
        extras: Path = DEFAULT_FOLDERS.ckpts,
    ) -> None:
        """choose_attention: from a job's wish (None: the program's) to a backend and a note for the user.
        extras: folder of the control preprocessors' models.
        """
        self.extras = extras
        self.pipe, self.latent_rgb, self.choose_attention = pipe, latent_rgb, choose_attention
        self.multipliers = Multipliers(())

    def apply_plan(self, plan: Plan) -> None:
        """From now on work as `plan` says. What it leaves as it was stays where it is."""
        pipe = self.pipe
        pipe.vae_tile = plan.vae_tile
        pipe.placements = self._placements(plan.placements())
        for part, placement in pipe.placements.items():
            if part in pipe and (part != "text_encoder" or pipe.text_encoder_loaded):
                pipe.residency.place(pipe[part], placement)
        if plan.compile:
            pipe.transformer.compile()

    def _placements(self, planned: Mapping[str, Mapping[str, Any]]) -> dict[str, Placement]:
        """A control network is placed with the transformer: the plan counts its blocks as the first ones to
        be streamed."""
        placements = {part: Placement(**how) for part, how in planned.items()}
        base = placements.get("transformer")
        if self.pipe.control is None or base is None:
            return placements
        resident, transformer = base.resident_blocks, self.pipe.transformer
        beyond = None
        if resident is not None:
            count = sum(len(getattr(transformer, stack)) for stack in transformer.streamed_blocks)
            beyond, resident = max(0, resident - count), min(resident, count)
        return placements | {
            "transformer": replace(base, resident_blocks=resident),
            "control": replace(base, resident_blocks=beyond),
        }

    def use_loras(self, paths: Sequence[Path], multipliers: Multipliers, names: ModelNames) -> bool:
        """From now on draw with these LoRA files, and no others. UserError when one of them cannot be used.

        The base model stays loaded. False, and nothing is read, when the files are those that it has.
        """
        self.multipliers = Multipliers(())
        transformer = self.pipe.transformer
        changed = use_files(transformer, paths, names, lambda: self.pipe.residency.evict(transformer))
        self.multipliers = multipliers
        return changed

    def generate(
        self,
        settings: Mapping[str, Any],
        *,
        seeds: Sequence[int],
        on_phase: Callable[[str], None],
        on_step: Callable[[int, int, Previews], None],
        interrupt: Callable[[], bool],
    ) -> Generation:
        """One picture for each seed. Raises Cancelled once `interrupt` is true, UserError for bad input."""
        sampler = {name: settings[name] for name in SAMPLER_SETTINGS if name in settings}
        width, height = parse_resolution(settings["resolution"])
        given, part, notes = _pictures(settings, width, height, self.extras)
        if part:
            width, height = part.size

        def step(number: int, total: int, denoised: Sequence[Tensor]) -> None:
            on_step(number, total, lambda: [self.latent_rgb.render(x, (width, height)) for x in denoised])

        backend, note = self.choose_attention(settings.get("override_attention"))
        self.pipe.transformer.set_attention_backend(backend)
        output = self.pipe(
            prompt=settings["prompt"],
            height=height,
            width=width,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            unified_sampler_config=sampler or None,
            callback=step,
            lora_strengths=self.multipliers.at,
            on_phase=on_phase,
            interrupt=interrupt,
            **{name: settings[name] for name in SAME_NAME if name in settings},
            **{name: settings[name] / 100 for name in IN_PERCENT if name in settings},
            **given,
        )
        images = [part.put_back(image) for image in output.images] if part else output.images
        return Generation(images, [*([note] if note else []), *notes, *output.notes])


@dataclass(frozen=True)
class Part:
    """The part of a picture that is painted alone. mask: the whole picture's. feather: in its pixels."""

    box: masks.Box
    whole: Image.Image
    mask: Image.Image
    feather: float

    @property
    def size(self) -> tuple[int, int]:
        return self.box.width, self.box.height

    def put_back(self, painted: Image.Image) -> Image.Image:
        """The whole picture with the painted part in its place."""
        return self.box.put_back(self.whole, painted, self.mask, self.feather)


def _pictures(
    settings: Mapping[str, Any], width: int, height: int, extras: Path
) -> tuple[dict[str, Any], Part | None, list[str]]:
    """The pipeline's arguments for a job's pictures, and notes. UserError for what cannot be used.

    With a Part, they are for a picture of its size.
    """
    given: dict[str, Any] = {}
    notes: list[str] = []
    part = None
    if settings.get("image_start") and settings.get("image_mask") and settings.get("mask_only"):
        given, part, notes = _part(settings, width, height)
    elif settings.get("image_start"):
        source = sources.load_picture(settings["image_start"])
        fitted = sources.fit_source(source, width, height)
        notes += fitted.notes
        given |= {"image": fitted.image, "denoising_strength": settings["denoising_strength"]}
        if settings.get("image_mask"):
            mask, said = masks.from_upload(settings["image_mask"], source.image.size)
            mask = sources.fit(mask, width, height, resample=sources.NEAREST).image
            given["inpaint_mask"] = masks.grow(mask, settings["mask_expand"])
            given["mask_feather"] = settings["mask_feather"]
            notes += said
    if settings.get("image_guide") and settings["control_net_weight"]:
        picture = sources.load_picture(settings["image_guide"])
        name, values = settings["control_preprocessor"], parse_parameters(settings["control_parameters"])
        size = part.whole.size if part else (width, height)
        control = preprocess.control_map(name, picture.image, *size, values, folder=extras)
        given["control_image"] = part.box.cut(control) if part else control
    if "control_net_weight" in settings:
        given["control_context_scale"] = settings["control_net_weight"]
        given |= {name: settings[name] / 100 for name in ("control_start", "control_end")}
    return given, part, notes


def _part(settings: Mapping[str, Any], width: int, height: int) -> tuple[dict[str, Any], Part, list[str]]:
    """The pipeline's arguments for the part around the mask, of at most as many pixels as width x height."""
    source = sources.load_picture(settings["image_start"])
    mask, said = masks.from_upload(settings["image_mask"], source.image.size)
    mask = masks.grow(mask, settings["mask_expand"])
    side = math.isqrt(width * height)
    box = masks.crop_around(mask, settings["mask_margin"], min_size=min(512, side), max_size=side)
    given = {
        "image": box.cut(source.image),
        "inpaint_mask": box.cut(mask, sources.NEAREST),
        "denoising_strength": settings["denoising_strength"],
    }
    part = Part(box, source.image, mask, settings["mask_feather"])
    return given, part, [*source.notes, *said]
