"""What is driven on the card that is not there, with its bounds. No torch: the tests' own process reads
it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

FULL = 30  # layers
FEW = 3  # of the same width, for what only varies options: two of them get a hint of a control network
PICTURE, MASK = "<picture>", "<mask>"  # in the place of a setting's path


@dataclass(frozen=True)
class Case:
    """One job. file: a key of holes.TRANSFORMERS; control: one of holes.CONTROLS, or none. dtype, vae_dtype:
    as torch names them. tile: of the VAE, in pixels. residency: a key of drive.RESIDENCIES.

    Bounds: kernels, and copies to the card, of any step after the first; waits of the whole job: one for each
    prompt, picture to encode, preview, tile of the VAE and finished picture.
    """

    kernels: int
    file: str = "turbo bf16"
    model: str = "z_image"
    layers: int = FEW
    steps: int = 2
    size: int = 1024
    dtype: str = ""
    vae_dtype: str = ""
    control: str = ""
    lora: bool = False
    quantize: bool = False
    int8_encoder: bool = False
    twin: bool = False  # the unified solver on a file without the second embedder
    tile: int | None = None
    pictures: int = 1
    copies: int = 1
    waits: int = 5
    residency: str = "whole"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unified(self) -> bool:
        return "unified_solver" in self.model_def

    @property
    def model_def(self) -> dict[str, Any]:
        return {"unified_solver": True} if self.file.startswith("twinflow") or self.twin else {}


def _nag(scale: float) -> dict[str, Any]:
    return {"NAG_scale": scale, "negative_prompt": "blurry"}


def _control(kernels: int, generation: str = "2.1", **others: Any) -> Case:
    models = {"1": "z_image_control", "2.0": "z_image_control2", "2.1": "z_image_control2_1"}
    guide = {"image_guide": PICTURE, "control_preprocessor": "canny", **others.pop("settings", {})}
    others = {"model": models[generation], **others}
    return Case(kernels, control=generation, settings=guide, **others)


MASKED = {"image_start": PICTURE, "image_mask": MASK}
GUIDED = {"guidance_scale": 4.0}
HALF = "float16"
CASES: dict[str, Case] = {
    "turbo bf16": Case(861, layers=FULL),
    "turbo int8": Case(1117, file="turbo int8", layers=FULL, int8_encoder=True),
    "nunchaku int4": Case(2205, file="turbo int4", layers=FULL),
    "turbo fp16": Case(342, dtype=HALF),
    "int8 fp16": Case(422, file="turbo int8", dtype=HALF),
    "nunchaku fp16": Case(622, file="turbo int4", dtype=HALF),
    "quantize on load": Case(194, quantize=True),
    "twinflow 2": Case(198, file="twinflow bf16", copies=2),
    "twinflow 4, order 2": Case(383, file="twinflow bf16", steps=4, settings={"sampling_order": 2}, copies=3),
    "twinflow on turbo": Case(198, twin=True, copies=2),
    "base cfg": Case(
        311, file="base bf16", model="z_image_base",
        settings={**GUIDED, "cfg_normalization": 1.0, "flow_shift": 6.0},
        waits=6,
    ),
    "base int8 cfg": Case(384, file="base int8", model="z_image_base", settings=GUIDED, waits=6),
    "nag": Case(213, settings=_nag(3.0), copies=2, waits=6),
    "nag fp16": Case(396, dtype=HALF, settings=_nag(3.0), copies=2, waits=6),
    "variety": Case(206, settings={"seed_variety": 0.5}, copies=2, waits=6),
    "batch 2": Case(305, pictures=2, waits=9),
    "image to image": Case(159, settings={"image_start": PICTURE, "denoising_strength": 0.6}, waits=6),
    "inpaint": Case(162, settings=MASKED, waits=6),
    "twinflow inpaint": Case(202, file="twinflow bf16", settings=MASKED, copies=2, waits=6),
    "hires": Case(159, settings={"hires_scale": 1.5, "hires_strength": 0.4, "hires_steps": 2}, waits=9),
    "hires tiled": Case(
        159, size=512,
        settings={"hires_scale": 2.0, "hires_strength": 0.4, "hires_steps": 2, "hires_tile": 1024},
        waits=9,
    ),
    "tiled vae": Case(159, tile=512, waits=13),
    "vae bf16": Case(159, vae_dtype="bfloat16"),
    "control 2.1": _control(276, waits=6),
    "control 2.1 fp16": _control(627, dtype=HALF, waits=6),
    "control 2.1 inpaint": _control(276, settings=MASKED, waits=8),
    "control 2.1 int8 nag": _control(380, file="turbo int8", settings=_nag(2.0), copies=2, waits=7),
    "control 2.0": _control(276, "2.0", waits=6),
    "control v1": _control(243, "1", waits=6),
    "control 2.1 base cfg": _control(538, file="base bf16", model="z_image_base", settings=GUIDED, waits=7),
    "control 2.1 twinflow": _control(315, file="twinflow bf16", copies=2, waits=6),
    "lora bf16": Case(353, lora=True, steps=3, copies=3, waits=6),
    "lora int8": Case(407, file="turbo int8", lora=True, steps=3, copies=3, waits=6),
    "lora int4": Case(647, file="turbo int4", lora=True, steps=3, copies=3, waits=6),
    "lora fp16": Case(613, dtype=HALF, lora=True, steps=3, copies=3, waits=6),
}  # fmt: skip


#: those that are driven once more with mmgp moving the weights, block by block
BY_MMGP = (
    "turbo fp16", "int8 fp16", "nunchaku fp16", "quantize on load", "twinflow 2", "base cfg",
    "base int8 cfg", "nag", "batch 2", "inpaint", "hires", "vae bf16", "control 2.1", "control 2.1 int8 nag",
    "control 2.0", "control v1", "lora bf16", "lora int8", "lora int4", "lora fp16",
)  # fmt: skip
CASES |= {f"{name}, by mmgp": replace(CASES[name], residency="mmgp") for name in BY_MMGP}


@dataclass(frozen=True)
class Mutation:
    """A fault put into one function of the program. place: module:qualified name. before: the text there,
    which occurs once; after: what stands in its place. case: the job that meets it. beyond: what a step then
    has more of than that job may."""

    place: str
    before: str
    after: str
    case: str = "image to image"
    beyond: tuple[str, ...] = ()


_MODEL = "models.z_image.transformer_z_image:ZImageTransformer2DModel"
_STEP = "models.z_image.sampling:Denoiser.step"
_PREDICT = "self.predict(samples, sigma)"
REFUSED: dict[str, Mutation] = {  # what a card refuses
    "angles are not moved": Mutation(f"{_MODEL}.rope", ".to(device)", ""),
    "latents keep their dtype": Mutation(f"{_MODEL}._embed_image", ".to(self.dtype)", ""),
    "the mask is not moved": Mutation(
        "models.z_image.image_tensors:InpaintConstraint.of", ".to(latent.device)", "", "inpaint"
    ),
    "strengths are not moved": Mutation(
        "shared.loras.apply:Strength.on", "self.values.to(x.device)", "self.values", "lora bf16"
    ),
    "the sampler's noise is not moved": Mutation(
        "models.z_image.unified_sampler:_noise", ".to(like)", "", "twinflow 4, order 2"
    ),
    "the VAE's input keeps its dtype": Mutation(
        "models.z_image.vae:decode", "(vae.device, vae.dtype)", "(vae.device)", "vae bf16"
    ),
}
COUNTED: dict[str, Mutation] = {  # what a card does, but slowly
    "a step asks for a value": Mutation(
        _STEP, _PREDICT, f"[x * x.sum().item() for x in {_PREDICT}]", beyond=("wait", "kernels")
    ),
    "a step brings its result to RAM": Mutation(
        _STEP, _PREDICT, f"[x.cpu().to(x.device) for x in {_PREDICT}]", beyond=("down", "copies")
    ),
    "a layer casts to and fro": Mutation(
        "models.z_image.transformer_z_image:add_gated",
        "x.addcmul_(gate, h)", "x.addcmul_(gate, h.float().to(h.dtype))", beyond=("kernels",),
    ),
}  # fmt: skip
