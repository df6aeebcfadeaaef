"""A job's settings to the pipeline's arguments: the one place that knows both names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from models.z_image.family import DEFAULT_FOLDERS, SAMPLER_SETTINGS
from models.z_image.job import job_images
from models.z_image.job.job_images import Crop, FullCanvas, Scene
from models.z_image.job.latent_preview import LatentRgb
from models.z_image.pipeline_z_image import ZImagePipeline
from shared.gpu import attention
from shared.gpu.placement import Placement
from shared.imaging.hires import Hires, begins_as_it_is
from shared.imaging.upscale import Enlarge, upscaler
from shared.loras.apply import use_files
from shared.loras.names import ModelNames
from shared.loras.strengths import Multipliers
from shared.weights.files import Folders

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
IN_PERCENT = ("seed_variety_share", "seed_variety_until", "control_start", "control_end")

Previews = Callable[[], list[Image.Image]]


@dataclass(frozen=True)
class Generation:
    """What a job made. notes: what was substituted. extra: further entries for the metadata."""

    images: list[Image.Image]
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Watch:
    """Who is told of a job's progress, and asked whether it goes on."""

    on_phase: Callable[[str], None]
    on_step: Callable[[int, int, Previews], None]
    interrupt: Callable[[], bool]

    def under(self, heading: str) -> Watch:
        """The same with a heading before each phase's name."""
        return replace(self, on_phase=lambda phase: self.on_phase(heading + phase))


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
        folders: Folders = DEFAULT_FOLDERS,
    ) -> None:
        """choose_attention: from a job's wish (None: the program's) to a backend and a note for the user.
        folders: with the models of the control preprocessors and the upscalers.
        """
        self.folders = folders
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
        scene, notes = job_images.of_job(settings, self.folders.ckpts)
        hires = Hires.of(settings)
        if hires is not None:  # what cannot be enlarged is better known now
            hires.size(scene.size)
            enlarge = upscaler(hires.upscaler, self.folders, self.pipe.device)
        backend, note = self.choose_attention(settings.get("override_attention"))
        self.pipe.transformer.set_attention_backend(backend)
        notes = [*([note] if note else []), *notes]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        watch = Watch(on_phase, on_step, interrupt)
        if begins_as_it_is(settings) and scene.image is not None:
            images = [scene.image] * len(seeds)
        else:
            region = job_images.select_region(scene, settings)
            images = self._pass(settings, region, generators, watch, notes)
        if hires is not None:
            images = self._enlarged(settings, hires, enlarge, scene, images, generators, watch, notes)
        return Generation(images, list(dict.fromkeys(notes)))

    def _pass(
        self,
        settings: Mapping[str, Any],
        region: FullCanvas | Crop,
        generators: Sequence[torch.Generator],
        watch: Watch,
        notes: list[str],
        **changed: Any,
    ) -> list[Image.Image]:
        """One picture of the scene for each generator. changed: arguments that differ from the settings."""
        sampler = {name: settings[name] for name in SAMPLER_SETTINGS if name in settings}

        def step(number: int, total: int, denoised: Sequence[Tensor]) -> None:
            watch.on_step(number, total, lambda: [self.latent_rgb.render(x, region.size) for x in denoised])

        arguments = {name: settings[name] for name in SAME_NAME if name in settings}
        arguments |= {name: settings[name] / 100 for name in IN_PERCENT if name in settings}
        if "control_net_weight" in settings:
            arguments["control_context_scale"] = settings["control_net_weight"]
        output = self.pipe(
            prompt=settings["prompt"],
            num_images_per_prompt=len(generators),
            generator=generators,
            unified_sampler_config=sampler or None,
            callback=step,
            lora_strengths=self.multipliers.at,
            on_phase=watch.on_phase,
            interrupt=watch.interrupt,
            **arguments | job_images.arguments(region, settings.get("denoising_strength", 1.0)) | changed,
        )
        notes += output.notes
        return [region.paste(image) for image in output.images]

    def _enlarged(
        self,
        settings: Mapping[str, Any],
        hires: Hires,
        enlarge: Enlarge,
        scene: Scene,
        images: Sequence[Image.Image],
        generators: Sequence[torch.Generator],
        watch: Watch,
        notes: list[str],
    ) -> list[Image.Image]:
        """The pictures of the first pass after the second one, which paints one after the other.

        What a mask keeps is the enlarged picture, bit for bit.
        """
        size, made = hires.size(images[0].size), []
        for number, (image, generator) in enumerate(zip(images, generators, strict=True), 1):
            watch.on_phase("Enlarging")
            larger = enlarge(image, size, watch.interrupt)
            if hires.strength:
                of_many = f" of image {number} of {len(images)}" if len(images) > 1 else ""
                region = job_images.select_region(scene.enlarged(larger), settings, hires.scale)
                (larger,) = self._pass(
                    settings,
                    region,
                    [generator],
                    watch.under(f"Second pass{of_many}: "),
                    notes,
                    num_inference_steps=hires.steps,
                    denoising_strength=hires.strength,
                    tile=hires.tile,
                )
            made.append(larger)
        return made
