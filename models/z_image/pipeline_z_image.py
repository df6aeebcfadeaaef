"""Prompt to picture: text features, steps of the transformer with optional guidance, VAE."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from models.arguments import default
from models.z_image import control as control_nets
from models.z_image import image_tensors, vae
from models.z_image.control import Guide, ZImageControlModel
from models.z_image.image_tensors import ImageInput, ImageTensors, InpaintConstraint
from models.z_image.nag import Nag
from models.z_image.pipeline_inputs import (
    MAX_TOKENS,
    Canvas,
    ModelTraits,
    PipelineInputs,
    Prompts,
    Sampler,
    Steering,
    Usual,
    generators_for,
)
from models.z_image.sampling import Denoiser, LoraStrengths, StepCallback
from models.z_image.seed_variety import SeedVariety
from models.z_image.text_encoder import prompt_cache, text_encoding
from models.z_image.text_encoder.prompt_cache import Encoded, PromptCache
from models.z_image.tiles import LatentTiles
from models.z_image.transformer_z_image import ZImageTransformer2DModel
from shared.errors import UserError
from shared.gpu.interrupt import listening
from shared.gpu.offloading import Residency
from shared.gpu.placement import Placement

PARTS = ("transformer", "text_encoder", "vae")


@dataclass(frozen=True)
class ZImageOutput:
    """images: PIL images; a tensor for output_type "pt" ([n, 3, H, W] in 0..1) and "latent" ([n, 16, h, w]);
    an array for "np" ([n, H, W, 3] in 0..1).

    notes: what was substituted, one sentence each.
    """

    images: Any
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Hooks:
    """What a call is given to follow a run by, and to end it."""

    callback: StepCallback | None
    lora_strengths: LoraStrengths | None
    on_phase: Callable[[str], None]
    interrupt: Callable[[], bool] | None


@dataclass(frozen=True)
class EncodedPrompts:
    """Features [L, hidden] on the device; equal texts share one tensor. notes: what was cut off."""

    positive: list[Tensor]
    negative: list[Tensor]
    notes: list[str]


@dataclass(frozen=True)
class EncodedImages:
    """start: latents to start from. constraint: what masked denoising leaves as it is. control: the control
    network's context, which acts in the steps `acting`. Each where it is needed.
    """

    start: Tensor | None = None
    constraint: InpaintConstraint | None = None
    control: Tensor | None = None
    acting: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()


class ZImagePipeline(Mapping[str, nn.Module]):
    """Callable as in the model documents, and the mapping of its parts that offloading needs.

    A call makes `num_images_per_prompt` pictures of each prompt. Raises UserError for values that make no
    picture, Cancelled when interrupted. What is None is as `usual` for the model; height and width are then
    1024.

    height, width: pixels, multiples of 16. num_inference_steps: forwards of the transformer.
    guidance_scale: see Guidance. generator: one for all pictures or one for each; noise is drawn on its
    device.
    latents: the noise itself, [n, 16, height / 8, width / 8]. *_embeds: features [L, hidden] for prompts.
    flow_shift: static shift of the schedule instead of the model's. interrupt: asked before every layer.
    sample_solver, unified_sampler_config: see unified_sampler.resolve; no name means the model's own.
    NAG_*: see Nag; it acts at a scale above 1 while guidance is off.
    seed_variety*: see SeedVariety; each picture's noise comes from its generator's seed.
    image: a picture to start from, see image_tensors.ImageInput; denoising_strength: how far from it, 0
    (it comes back as it is) to 1 (only its mask's surroundings are left of it).
    inpaint_mask: white where `image` is repainted; every other pixel stays. mask_feather: see
    image_tensors.prepare.
    control_image: what the model's control network follows, a map as its preprocessor makes it, at
    control_context_scale (0 to 2) from control_start to control_end of the steps (0 to 1, see
    ControlSchedule).
    tile: denoise in overlapping tiles of so many pixels, a multiple of 16, instead of the whole picture.
    lora_strengths: of the LoRAs attached to the transformer; without it they keep those they have.
    """

    def __init__(
        self,
        transformer: ZImageTransformer2DModel,
        text_encoder: nn.Module | Callable[[], nn.Module],
        vae: AutoencoderKL,
        tokenizer: Any,
        scheduler_config: Mapping[str, Any],
        device: torch.device | str = "cpu",
        *,
        prompt_cache: PromptCache | None = None,
        encoder_id: str | None = None,
    ) -> None:
        """text_encoder: the module, or what loads it when a prompt is not in `prompt_cache` (default: one in
        memory). encoder_id: see text_encoding.identity; None is an encoder that no other pipeline has.
        """
        self._text_encoder = text_encoder
        self.prompt_cache = prompt_cache or PromptCache()
        self.encoder_id = encoder_id or uuid.uuid4().hex
        self.transformer, self.vae = transformer, vae
        self.control: ZImageControlModel | None = None
        self.vae_tile: int | None = None  # pixels, a multiple of 64; None decodes whole pictures
        self.tokenizer, self.scheduler_config = tokenizer, scheduler_config
        self.device = torch.device(device)
        self.unified_solver = False  # whether the model is made for the unified sampler
        self.usual = Usual()
        self.residency = Residency(self.device)  # brings each part to the device when it computes
        self.placements: Mapping[str, Placement] = {}  # a plan's, for the parts that are not loaded yet
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def traits(self) -> ModelTraits:
        return ModelTraits(self.usual, self.unified_solver, self.transformer.has_second_time_embedder)

    @property
    def text_encoder(self) -> nn.Module:
        """Loaded when first asked for."""
        if not isinstance(self._text_encoder, nn.Module):
            with torch.inference_mode(False):  # a call's mode would stay with the weights
                self._text_encoder = self._text_encoder()
            if "text_encoder" in self.placements:
                self.residency.place(self._text_encoder, self.placements["text_encoder"])
        return self._text_encoder

    @property
    def text_encoder_loaded(self) -> bool:
        return isinstance(self._text_encoder, nn.Module)

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        """By name: a mapping would fetch the part, which loads the text encoder."""
        return name in set(self)

    def __iter__(self) -> Iterator[str]:
        return iter(PARTS if self.control is None else (*PARTS, "control"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        cfg_normalization: float | bool = default("cfg_normalization"),
        cfg_truncation: float | None = default("cfg_truncation"),
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Sequence[Tensor] | None = None,
        negative_prompt_embeds: Sequence[Tensor] | None = None,
        flow_shift: float | None = None,
        sample_solver: str | None = None,
        unified_sampler_config: Mapping[str, Any] | None = None,
        NAG_scale: float = default("NAG_scale"),
        NAG_tau: float = default("NAG_tau"),
        NAG_alpha: float = default("NAG_alpha"),
        seed_variety: float = default("seed_variety"),
        seed_variety_share: float = default("seed_variety_share"),
        seed_variety_until: float = default("seed_variety_until"),
        image: ImageInput | None = None,
        denoising_strength: float = 1.0,
        inpaint_mask: ImageInput | None = None,
        mask_feather: float = 0.0,
        control_image: ImageInput | None = None,
        control_context_scale: float | None = None,
        control_start: float = default("control_start"),
        control_end: float = default("control_end"),
        tile: int | None = None,
        max_sequence_length: int = MAX_TOKENS,
        output_type: str = "pil",
        callback: StepCallback | None = None,
        lora_strengths: LoraStrengths | None = None,
        on_phase: Callable[[str], None] = lambda phase: None,
        interrupt: Callable[[], bool] | None = None,
    ) -> ZImageOutput:
        """Make `num_images_per_prompt` pictures of each prompt: see the class."""
        traits, canvas = self.traits, Canvas.checked(width, height, tile)
        prompts = Prompts.of(prompt, prompt_embeds)
        sampler = Sampler.chosen(
            traits, sample_solver, num_inference_steps, unified_sampler_config, flow_shift
        )
        guidance = traits.usual.guidance(guidance_scale, cfg_normalization, cfg_truncation)
        nag = Nag(NAG_scale, NAG_tau, NAG_alpha)
        unified = sampler.unified is not None
        steering = Steering.of(guidance, nag, negative_prompt, negative_prompt_embeds, len(prompts), unified)
        variety = SeedVariety(seed_variety, seed_variety_share, seed_variety_until)
        images = image_tensors.prepare(canvas.size, image, inpaint_mask, control_image, mask_feather)
        control = traits.usual.control(control_context_scale, control_start, control_end)
        generators = generators_for(generator, len(prompts), num_images_per_prompt)
        inputs = PipelineInputs(
            canvas, prompts, steering, sampler, variety, images, control, denoising_strength,
            num_images_per_prompt, generators, latents, max_sequence_length, output_type,
        )
        return self._run(inputs, Hooks(callback, lora_strengths, on_phase, interrupt))

    def _run(self, inputs: PipelineInputs, hooks: Hooks) -> ZImageOutput:
        if inputs.strength == 0:
            return self._unchanged(inputs)
        # 1. prompts to features
        hooks.on_phase("Encoding prompt")
        with listening(hooks.interrupt):
            prompts = self._encode_prompts(inputs)
        # 2. noise, and pictures to latents
        samples = self._noise(inputs)
        sigmas = self._sigmas(inputs)
        images = self._encode_images(inputs, len(sigmas) - 1, hooks)
        if images.start is not None:
            samples = [sigmas[0] * x + (1 - sigmas[0]) * images.start for x in samples]
        # 3. steps of the transformer
        samples = self._denoise(inputs, prompts, images, samples, sigmas, hooks)
        notes = [*inputs.notes, *prompts.notes, *images.notes]
        if inputs.output_type == "latent":
            return ZImageOutput(torch.stack(samples), notes)
        # 4. latents to pictures
        hooks.on_phase("Decoding")
        return ZImageOutput(self._decode(samples, inputs, hooks.interrupt), notes)

    def _unchanged(self, inputs: PipelineInputs) -> ZImageOutput:
        """The picture itself, as often as pictures were asked for."""
        picture, notes = inputs.images.image, list(inputs.images.notes)
        assert picture is not None
        count = len(inputs.generators)
        if inputs.output_type == "latent":
            with self._in_use(self.vae):
                latent = vae.encode(self.vae, picture, self.vae_tile)
            return ZImageOutput(torch.stack([latent] * count).to(self.device), notes)
        return ZImageOutput(self._as_output([picture] * count, inputs.output_type), notes)

    # ---- prompts -------------------------------------------------------------------------------------------

    def _encode_prompts(self, inputs: PipelineInputs) -> EncodedPrompts:
        positive, negative, limit = inputs.prompts, inputs.steering.negatives, inputs.max_sequence_length
        features, notes = {}, []
        for text, encoded in self.encode([*positive.texts, *negative.texts], limit).items():
            features[text] = encoded.features.to(self.device)
            if encoded.dropped:
                notes.append(
                    f"The prompt is {encoded.dropped} tokens longer than the {limit} the model reads; it did "
                    f"not see the end: {text_encoding.cut(self.tokenizer, text, limit)}"
                )

        def of(prompts: Prompts) -> list[Tensor]:
            if prompts.embeds is not None:
                return [x.to(self.device) for x in prompts.embeds]
            return [features[text] for text in prompts.texts]

        return EncodedPrompts(of(positive), of(negative), notes)

    def encode(self, texts: Sequence[str], limit: int = MAX_TOKENS) -> dict[str, Encoded]:
        """Each text's features, from the cache; the encoder works once, for all that are missing there.

        limit: tokens that are read of a text.
        """
        if not texts:  # features were given, and there may be no tokenizer
            return {}
        template = str(self.tokenizer.chat_template)
        keys = {text: prompt_cache.key(self.encoder_id, template, text, limit) for text in texts}
        encoded = {text: hit for text, key in keys.items() if (hit := self.prompt_cache.get(key)) is not None}
        missing = [text for text in keys if text not in encoded]
        if missing:
            encoder = self.text_encoder
            with self._in_use(encoder):
                for text in missing:
                    encoded[text] = text_encoding.encode(encoder, self.tokenizer, text, self.device, limit)
                    self.prompt_cache.put(keys[text], encoded[text])
        return encoded

    # ---- latents -------------------------------------------------------------------------------------------

    def _latent_size(self, canvas: Canvas) -> tuple[int, int]:
        """(rows, columns)"""
        return canvas.height // self.vae_scale_factor, canvas.width // self.vae_scale_factor

    def _tiles(self, canvas: Canvas) -> LatentTiles:
        return LatentTiles.of(
            *self._latent_size(canvas), canvas.tile and canvas.tile // self.vae_scale_factor
        )

    def _noise(self, inputs: PipelineInputs) -> list[Tensor]:
        """Each image's own start, fp32: drawn on the CPU unless the generator lives elsewhere."""
        shape = (self.transformer.in_channels, *self._latent_size(inputs.canvas))
        generators, latents = inputs.generators, inputs.latents
        if latents is not None:
            if tuple(latents.shape) != (len(generators), *shape):
                raise UserError(
                    f"latents have the shape {tuple(latents.shape)}; "
                    f"this run needs {(len(generators), *shape)}."
                )
            return list(latents.to(self.device, torch.float32))
        return [
            torch.randn(shape, generator=g, device=g.device if g else "cpu", dtype=torch.float32).to(
                self.device
            )
            for g in generators
        ]

    def _sigmas(self, inputs: PipelineInputs) -> list[float]:
        """The run's noise levels, falling to 0."""
        tiles = self._tiles(inputs.canvas)
        tokens = tiles.rows * tiles.columns // 4
        return inputs.sampler.sigmas(self.scheduler_config, tokens, inputs.strength)

    def _encode_images(self, inputs: PipelineInputs, steps: int, hooks: Hooks) -> EncodedImages:
        """A control network that knows masks is told what is repainted; without it, the rest is held."""
        images, strength = inputs.images, inputs.strength
        acts, notes = self._controls(images, inputs.control.scale)
        acting = frozenset(inputs.control.steps(steps) if acts else ())
        layout = self.control.layout if self.control is not None and acting else None
        tells = images.painted is not None and layout is not None and layout.inpaints
        holds = images.painted is not None and not tells
        todo = {
            "image": images.image if strength < 1 or holds else None,
            "control": images.control if layout else None,
            "kept": _kept(images) if tells else None,
        }
        if not any(x is not None for x in todo.values()):
            return EncodedImages(acting=acting, notes=notes)
        hooks.on_phase("Encoding pictures")
        with self._in_use(self.vae):
            latents = {
                name: None if x is None else vae.encode(self.vae, x, self.vae_tile, hooks.interrupt)
                for name, x in todo.items()
            }
        start, constraint, context = latents["image"], None, None
        start = None if start is None else start.to(self.device)
        if holds and start is not None and images.painted is not None:
            constraint = InpaintConstraint.of(start, images.painted)
        if layout is not None:
            context = control_nets.context(
                layout.channels, latents["control"], latents["kept"], images.painted
            )
        return EncodedImages(start if strength < 1 else None, constraint, context, acting, notes)

    def _controls(self, images: ImageTensors, weight: float) -> tuple[bool, tuple[str, ...]]:
        """(whether the control network has something to follow, notes). UserError for a control picture
        without a network.
        """
        if self.control is None:
            if images.control is not None:
                raise UserError(
                    "There is a control picture, but this model has no control network: choose one that has, "
                    "or leave the picture out."
                )
            return False, ()
        if weight == 0:
            return False, ("The control weight is 0, so the model's control network did not act.",)
        if images.control is not None or (images.painted is not None and self.control.layout.inpaints):
            return True, ()
        return False, ("There was no control picture, so the model's control network did not act.",)

    # ---- steps ---------------------------------------------------------------------------------------------

    def _denoise(
        self,
        inputs: PipelineInputs,
        prompts: EncodedPrompts,
        images: EncodedImages,
        samples: list[Tensor],
        sigmas: list[float],
        hooks: Hooks,
    ) -> list[Tensor]:
        """The latents that the samples become. UserError when they are not numbers."""
        repeat, variety = inputs.images_per_prompt, inputs.variety
        varied = variety.for_each(prompts.positive, repeat, inputs.generators) if variety.on else []
        hooks.on_phase("Denoising")
        with contextlib.ExitStack() as in_use:
            in_use.enter_context(listening(hooks.interrupt))
            in_use.enter_context(self._in_use(self.transformer))
            tiles = self._tiles(inputs.canvas)
            denoiser = Denoiser(
                transformer=self.transformer,
                sigmas=sigmas,
                tiles=tiles,
                positive=[x for x in prompts.positive for _ in range(repeat)],
                negative=[x for x in prompts.negative for _ in range(repeat)],
                varied=varied,
                guidance=inputs.steering.guidance,
                nag=inputs.steering.nag,
                variety=variety,
                guides=self._guides(inputs, images, tiles, sigmas, in_use),
                constraint=images.constraint,
                lora_strengths=hooks.lora_strengths,
                callback=hooks.callback,
                interrupt=hooks.interrupt,
            )
            unified = inputs.sampler.unified
            samples = (
                denoiser.unified(samples, unified, inputs.generators) if unified else denoiser.euler(samples)
            )
        if not all(torch.isfinite(x).all() for x in samples):
            raise UserError(
                "The model computed values that are not numbers, so there is no picture: use --bf16 instead "
                "of --fp16, or another file of this model."
            )
        return samples

    def _guides(
        self,
        inputs: PipelineInputs,
        images: EncodedImages,
        tiles: LatentTiles,
        sigmas: list[float],
        in_use: contextlib.ExitStack,
    ) -> list[Guide | None]:
        """The control network, which stays in use, for each tile."""
        control, context = self.control, images.control
        if control is None or context is None:
            return [None] * len(tiles.cuts)
        in_use.enter_context(self._in_use(control))
        control.follow(self.transformer)
        parts = (context[(slice(None), *cut)].to(self.device) for cut in tiles.cuts)
        pad, scale = self.transformer.x_pad_token, inputs.control.scale
        return [Guide(control, control.embed(part, pad), scale, sigmas, images.acting) for part in parts]

    def _in_use(self, part: nn.Module) -> contextlib.AbstractContextManager[Any]:
        return self.residency.use(part)

    def _decode(
        self, samples: list[Tensor], inputs: PipelineInputs, interrupt: Callable[[], bool] | None
    ) -> Any:
        with self._in_use(self.vae):
            decoded = (vae.decode(self.vae, x, self.vae_tile, interrupt) for x in samples)
            pictures = [inputs.images.joined(picture) for picture in decoded]
        return self._as_output(pictures, inputs.output_type)

    def _as_output(self, made: list[Tensor], output_type: str) -> Any:
        if output_type == "pt":
            return torch.stack(made).to(self.device)
        if output_type == "np":
            return torch.stack(made).permute(0, 2, 3, 1).float().cpu().numpy()
        return [to_pil(p) for p in made]


def _kept(images: ImageTensors) -> Tensor:
    assert images.image is not None and images.painted is not None
    return control_nets.without_painted(images.image, images.painted)


def to_pil(picture: Tensor) -> Image.Image:
    """[3, H, W] in 0..1 -> RGB image."""
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).cpu().numpy().astype(np.uint8))
