"""A picture's settings as a ComfyUI workflow in the form that its API takes ("prompt", see comfy_graph.py).

Only nodes that ComfyUI brings itself; `comfy.walk` reads the result back to the same settings. The schedule
"simple" with a static shift and the sampler "euler" are the noise levels and the steps of the pipeline here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from shared.errors import UserError
from shared.loras import strengths as multipliers
from shared.settings.messages import show
from shared.settings.parsing import parse_parameters, parse_resolution
from shared.settings.table import SETTINGS, idle

#: as ComfyUI's own Z-Image templates call it: the type has the chat template of the text encoder's file
ENCODER_TYPE = "lumina2"
CANNY_RANGE = (0.01, 0.99)  # of its thresholds there; here they count to 255

CANNY = {"low": 100, "high": 200}  # where control_parameters leave them out
#: settings that ComfyUI's own nodes do not have -> the value with which they change nothing
WITHOUT_NODE: dict[str, Any] = {
    "NAG_scale": 1, "seed_variety": 0, "cfg_normalization": 0, "cfg_truncation": 1, "control_start": 0,
    "control_end": 100, "mask_feather": 0, "mask_only": False, "outpaint": "", "hires_tile": 0,
    "hires_upscaler": "lanczos",
}  # fmt: skip
Link = list[Any]  # [node, slot of its output]


@dataclass(frozen=True)
class Files:
    """What the model's files are called in ComfyUI's folders. control: the control network; "" = none."""

    transformer: str
    text_encoder: str
    vae: str
    control: str = ""


@dataclass(frozen=True)
class Workflow:
    """nodes: the JSON. lines: what differs or has no node there, one sentence each."""

    nodes: dict[str, dict[str, Any]]
    lines: list[str]


def export(settings: Mapping[str, Any], files: Files) -> Workflow:
    """The workflow of complete, valid settings. UserError for a model that ComfyUI has no sampler for."""
    if "sample_solver" in settings:
        raise UserError(
            "ComfyUI has no node for TwinFlow models and their unified sampler: take a picture of another "
            "model."
        )
    draft = _Draft(settings)
    model, clip, vae = draft.loaders(files)
    model = draft.control(draft.shifted(draft.loras(model)), vae, files)
    positive = draft.add("CLIPTextEncode", text=settings["prompt"], clip=clip)
    if negative_text := settings.get("negative_prompt"):
        negative = draft.add("CLIPTextEncode", text=negative_text, clip=clip)
    else:
        negative = draft.add("ConditioningZeroOut", conditioning=positive)
    conditions = {"model": model, "positive": positive, "negative": negative}
    pixels = draft.painted(conditions, vae)
    pixels = draft.enlarged(pixels, conditions, vae)
    draft.add("SaveImage", images=pixels, filename_prefix="ZGP")
    draft.say_what_is_missing()
    return Workflow(draft.nodes, draft.lines)


@dataclass
class _Draft:
    """The nodes so far. What its methods take and return are links."""

    settings: Mapping[str, Any]
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def add(self, kind: str, **inputs: Any) -> Link:
        """A node; the link to its first output."""
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]

    # -- the model ------------------------------------------------------------------------------------------

    def loaders(self, files: Files) -> tuple[Link, Link, Link]:
        """Transformer, text encoder, VAE."""
        if files.transformer.endswith(".gguf"):
            model = self.add("UnetLoaderGGUF", unet_name=files.transformer)
            self.lines.append("UnetLoaderGGUF is a node of the pack ComfyUI-GGUF.")
        else:
            model = self.add("UNETLoader", unet_name=files.transformer, weight_dtype="default")
        clip = self.add("CLIPLoader", clip_name=files.text_encoder, type=ENCODER_TYPE, device="default")
        return model, clip, self.add("VAELoader", vae_name=files.vae)

    def loras(self, model: Link) -> Link:
        names = self.settings.get("activated_loras") or []
        strengths = multipliers.parse(self.settings.get("loras_multipliers") or "", len(names))
        first = strengths.at(0, max(1, self.settings["num_inference_steps"]))
        for name, strength in zip(names, first, strict=True):
            file = name.split("?")[0].rsplit("/", 1)[-1] if "://" in name else name
            model = self.add("LoraLoaderModelOnly", model=model, lora_name=file, strength_model=strength)
        if not strengths.constant:
            self.lines.append(
                "LoRA strengths that change over the steps have no node in ComfyUI: the first ones are set."
            )
        return model

    def shifted(self, model: Link) -> Link:
        shift = self.settings.get("flow_shift")
        return model if shift is None else self.add("ModelSamplingAuraFlow", model=model, shift=shift)

    def control(self, model: Link, vae: Link, files: Files) -> Link:
        """The model with its control network, where one acts."""
        weight = self.settings.get("control_net_weight", 0)
        if not (files.control and self.settings.get("image_guide") and weight):
            return model
        image = self._fitted(self._picture("image_guide"))
        image = self._followed(image)
        patch = self.add("ModelPatchLoader", name=files.control)
        return self.add(
            "QwenImageDiffsynthControlnet", model=model, model_patch=patch, vae=vae, image=image,
            strength=weight,
        )  # fmt: skip

    def _followed(self, image: Link) -> Link:
        """The map of a control picture."""
        name = self.settings["control_preprocessor"]
        values = parse_parameters(self.settings.get("control_parameters") or "")
        if name == "canny":
            low, high = (_within(CANNY_RANGE, values.get(one, usual) / 255) for one, usual in CANNY.items())
            return self.add("Canny", image=image, low_threshold=low, high_threshold=high)
        if name != "as_it_is":
            self.lines.append(
                f"ComfyUI itself has no node for the control map {name}: put one of a node pack before the "
                "control node, or load a finished map."
            )
        return self.add("ImageInvert", image=image) if values.get("invert") else image

    # -- the picture ----------------------------------------------------------------------------------------

    def _picture(self, name: str) -> Link:
        file = PurePosixPath(str(self.settings[name]).replace("\\", "/")).name
        self.lines.append(f"{SETTINGS[name].label}: put {file} into ComfyUI's folder input.")
        return self.add("LoadImage", image=file)

    def _fitted(self, image: Link, method: str = "lanczos") -> Link:
        """Cropped and scaled to the resolution, as it is done here."""
        width, height = parse_resolution(self.settings["resolution"])
        return self.add(
            "ImageScale", image=image, upscale_method=method, width=width, height=height, crop="center"
        )

    def painted(self, conditions: Mapping[str, Link], vae: Link) -> Link:
        """The pixels of the first pass."""
        if not self.settings.get("image_start"):
            return self._sampled(self._noise(), conditions, vae, self.settings["num_inference_steps"], 1.0)
        strength = self.settings["denoising_strength"]
        image = self._picture("image_start")
        if not strength:
            return image  # it is only enlarged
        latent = self.add("VAEEncode", pixels=self._fitted(image), vae=vae)
        if self.settings.get("image_mask"):
            latent = self.add("SetLatentNoiseMask", samples=latent, mask=self._mask())
            self.lines.append("Outside of the mask ComfyUI keeps the picture only nearly as it is.")
        if (count := self.settings.get("batch_size", 1)) > 1:
            latent = self.add("RepeatLatentBatch", samples=latent, amount=count)
        return self._sampled(latent, conditions, vae, self.settings["num_inference_steps"], strength)

    def _noise(self) -> Link:
        width, height = parse_resolution(self.settings["resolution"])
        return self.add(
            "EmptySD3LatentImage", width=width, height=height, batch_size=self.settings.get("batch_size", 1)
        )

    def _mask(self) -> Link:
        """White where it is painted, as here; cropped with the picture that it belongs to."""
        image = self._fitted(self._picture("image_mask"), "nearest-exact")
        mask = self.add("ImageToMask", image=image, channel="red")
        grown = self.settings.get("mask_expand", 0)
        return self.add("GrowMask", mask=mask, expand=grown, tapered_corners=True) if grown else mask

    def _sampled(
        self, latent: Link, conditions: Mapping[str, Link], vae: Link, steps: int, strength: float
    ) -> Link:
        """Pixels. steps: of the whole way, of which the node is told those that it takes."""
        samples = self.add(
            "KSampler", **conditions, seed=max(0, self.settings["seed"]),
            steps=max(1, math.ceil(steps * strength)), cfg=_cfg(self.settings.get("guidance_scale", 0)),
            sampler_name="euler", scheduler="simple", latent_image=latent, denoise=strength,
        )  # fmt: skip
        return self.add("VAEDecode", samples=samples, vae=vae)

    def enlarged(self, pixels: Link, conditions: Mapping[str, Link], vae: Link) -> Link:
        """The pixels after the second pass, where there is one."""
        scale = self.settings.get("hires_scale", 1)
        if scale <= 1:
            return pixels
        pixels = self.add("ImageScaleBy", image=pixels, upscale_method="lanczos", scale_by=scale)
        strength = self.settings["hires_denoising_strength"]
        if not strength:
            return pixels
        latent = self.add("VAEEncode", pixels=pixels, vae=vae)
        steps = self.settings["hires_steps"] or self.settings["num_inference_steps"]
        return self._sampled(latent, conditions, vae, steps, strength)

    def say_what_is_missing(self) -> None:
        """A line with the settings that act here and have no node there."""
        off = idle(self.settings)
        lost = [
            f"{SETTINGS[name].label} {_shown(self.settings[name])}"
            for name, neutral in WITHOUT_NODE.items()
            if name not in off and self.settings.get(name, neutral) != neutral
        ]
        if lost:
            self.lines.append(f"Left out, as ComfyUI itself has no node for it: {', '.join(lost)}.")


def _cfg(guidance: float) -> float:
    """Guidance g, pos + g (pos - neg), is the scale 1 + g there; here it is off up to 1."""
    return 1.0 + guidance if guidance > 1 else 1.0


def _within(limits: tuple[float, float], value: float) -> float:
    return min(max(round(value, 2), limits[0]), limits[1])


def _shown(value: Any) -> str:
    return f"{value:g}" if type(value) in (int, float) else show(value)
