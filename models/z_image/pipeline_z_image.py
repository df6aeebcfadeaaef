"""Prompt to picture: text features, Euler steps with optional classifier-free guidance, VAE."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from models.z_image import control as control_nets
from models.z_image import image_tensors, unified_sampler, vae
from models.z_image.checkpoints.control_layout import INPAINT_CHANNELS
from models.z_image.control import Guide, Share, ZImageControlModel
from models.z_image.image_tensors import Given, Known, Pictures
from models.z_image.nag import Nag
from models.z_image.seed_variety import SeedVariety
from models.z_image.sigmas import make_sigmas
from models.z_image.text_encoder import prompt_cache, text_encoding
from models.z_image.text_encoder.prompt_cache import Encoded, PromptCache
from models.z_image.tiles import Forward, Grid
from models.z_image.transformer_z_image import Conditioning, ZImageTransformer2DModel, dit_time
from models.z_image.unified_sampler import UnifiedConfig
from shared.errors import UserError
from shared.gpu.interrupt import listening
from shared.gpu.offloading import Residency
from shared.gpu.placement import Placement
from shared.loras.apply import set_multipliers
from shared.settings.validation import check_argument

PARTS = ("transformer", "text_encoder", "vae")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DEFAULT_SIDE = 1024  # pixels
MAX_TOKENS = 512  # of a prompt, that the models were trained to read
SIZE_MULTIPLE = 16  # pixels: 8 by the VAE, 2 by the patches
DEFAULT_NEGATIVE_PROMPT = (
    "low quality, worst quality, blurry, pixelated, noisy, artifacts, watermark, text, logo, "
    "bad anatomy, bad hands, extra limbs"
)

#: called after each step with its number (from 1), the number of steps and the predicted clean latents
StepCallback = Callable[[int, int, Sequence[Tensor]], None]

#: from a step (counted from 0) and their number to the strength of each attached LoRA
LoraStrengths = Callable[[int, int], Sequence[float]]

#: texts, and features given in their stead
Prompts = tuple[list[str], Sequence[Tensor] | None]


@dataclass(frozen=True)
class ZImageOutput:
    """images: PIL images; a tensor for output_type "pt" ([n, 3, H, W] in 0..1) and "latent" ([n, 16, h, w]);
    an array for "np" ([n, H, W, 3] in 0..1).

    notes: what was substituted, one sentence each.
    """

    images: Any
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Usual:
    """What a model takes where a call says nothing."""

    num_inference_steps: int = 8
    guidance_scale: float = 0.0
    control_context_scale: float = 0.75


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance as in the official code: pos + scale * (pos - neg), on when scale > 1."""

    scale: float = 0.0
    normalization: float = 0.0
    truncation: float | None = 1.0

    @property
    def on(self) -> bool:
        return self.scale > 1

    def acts_at(self, t: float) -> bool:
        """t = 1 - sigma; guidance ends once t exceeds the truncation."""
        return self.on and (self.truncation is None or self.truncation > 1 or t <= self.truncation)

    def combine(self, positive: Tensor, negative: Tensor) -> Tensor:
        """One sample's guided prediction; normalization c limits its norm to c times the positive one's."""
        prediction = positive + self.scale * (positive - negative)
        if self.normalization > 0:
            limit = self.normalization * torch.linalg.vector_norm(positive)
            norm = torch.linalg.vector_norm(prediction)
            prediction = torch.where(norm > limit, prediction * (limit / norm), prediction)
        return prediction


class ZImagePipeline(Mapping[str, nn.Module]):
    """Callable as in the model documents, and the mapping of its parts that offloading needs."""

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
        cfg_normalization: float | bool = 0.0,
        cfg_truncation: float | None = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Sequence[Tensor] | None = None,
        negative_prompt_embeds: Sequence[Tensor] | None = None,
        flow_shift: float | None = None,
        sample_solver: str | None = None,
        unified_sampler_config: Mapping[str, Any] | None = None,
        NAG_scale: float = 1.0,
        NAG_tau: float = 3.5,
        NAG_alpha: float = 0.5,
        seed_variety: float = 0.0,
        seed_variety_share: float = 0.5,
        seed_variety_until: float = 0.5,
        image: Given | None = None,
        denoising_strength: float = 1.0,
        inpaint_mask: Given | None = None,
        mask_feather: float = 0.0,
        control_image: Given | None = None,
        control_context_scale: float | None = None,
        control_start: float = 0.0,
        control_end: float = 1.0,
        tile: int | None = None,
        max_sequence_length: int = MAX_TOKENS,
        output_type: str = "pil",
        callback: StepCallback | None = None,
        lora_strengths: LoraStrengths | None = None,
        on_phase: Callable[[str], None] = lambda phase: None,
        interrupt: Callable[[], bool] | None = None,
    ) -> ZImageOutput:
        """Make `num_images_per_prompt` pictures of each prompt.

        What is None is as `usual` for the model; height and width are then 1024.
        height, width: pixels, multiples of 16. num_inference_steps: forwards of the transformer.
        guidance_scale: see Guidance. generator: one for all pictures or one for each; noise is drawn on its
        device.
        latents: the noise itself, [n, 16, height / 8, width / 8]. *_embeds: features [L, hidden] for prompts.
        flow_shift: static shift of the schedule instead of the model's. interrupt: asked before every layer.
        sample_solver, unified_sampler_config: see unified_sampler.resolve; no name means the model's own.
        NAG_*: see Nag; it acts at a scale above 1 while guidance is off.
        seed_variety*: see SeedVariety; each picture's noise comes from its generator's seed.
        image: a picture to start from, see pictures.Given; denoising_strength: how far from it, 0 (it comes
        back as it is) to 1 (only its mask's surroundings are left of it).
        inpaint_mask: white where `image` is repainted; every other pixel stays. mask_feather: see
        pictures.prepare.
        control_image: what the model's control network follows, a map as its preprocessor makes it, at
        control_context_scale (0 to 2) from control_start to control_end of the steps (0 to 1, see Share).
        tile: denoise in overlapping tiles of so many pixels, a multiple of 16, instead of the whole picture.
        lora_strengths: of the LoRAs attached to the transformer; without it they keep those they have.
        Raises UserError for values that make no picture, Cancelled when interrupted.
        """
        height, width = (DEFAULT_SIDE if side is None else side for side in (height, width))
        check_size(height, width, tile)
        if num_inference_steps is None:
            num_inference_steps = self._usual_steps(sample_solver)
        guidance_scale = self.usual.guidance_scale if guidance_scale is None else guidance_scale
        if control_context_scale is None:
            control_context_scale = self.usual.control_context_scale
        _check_ranges(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            cfg_normalization=float(cfg_normalization or 0),
            cfg_truncation=cfg_truncation,
            flow_shift=flow_shift,
            num_images_per_prompt=num_images_per_prompt,
        )
        _check_output(output_type, max_sequence_length)
        notes: list[str] = []
        share = Share(control_context_scale, control_start, control_end)
        given = image_tensors.prepare(width, height, image, inpaint_mask, control_image, mask_feather, notes)
        strength = _strength(denoising_strength, given)
        if strength == 0:
            return self._unchanged(given, num_images_per_prompt, prompt, prompt_embeds, output_type, notes)
        unified = self._unified(sample_solver, num_inference_steps, unified_sampler_config, notes)
        guidance = Guidance(guidance_scale, float(cfg_normalization or 0), cfg_truncation)
        nag = Nag(NAG_scale, NAG_tau, NAG_alpha)
        if unified:
            guidance, nag = _unguided(guidance, nag, notes)
        nag_acts = nag.scale > 1 and not guidance.on
        variety = SeedVariety(seed_variety, seed_variety_share, seed_variety_until)

        on_phase("Encoding prompt")
        prompts = _as_list(prompt, prompt_embeds)
        negatives: list[str] = []
        if guidance.on or nag_acts:
            wanted = len(prompts if prompt_embeds is None else prompt_embeds)
            defaulted = notes if negative_prompt_embeds is None else []
            negatives = _negative_texts(negative_prompt, wanted, defaulted)
        elif any(text.strip() for text in _as_texts(negative_prompt)):
            notes.append("The negative prompt did not act: guidance (or NAG) was off or not for this model.")
        with listening(interrupt):
            positive, negative = self._features(
                [(prompts, prompt_embeds), (negatives, negative_prompt_embeds if negatives else None)],
                max_sequence_length,
                notes,
            )

        rows, columns = height // self.vae_scale_factor, width // self.vae_scale_factor
        grid = Grid.of(rows, columns, tile and tile // self.vae_scale_factor)
        count = len(positive) * num_images_per_prompt
        generators = _generators(generator, count)
        samples = self._noise(rows, columns, generators, latents)
        tokens = grid.rows * grid.columns // 4
        levels = self._levels(unified, num_inference_steps, tokens, flow_shift, strength)
        acting = share.steps(len(levels) - 1) if self._controls(given, notes) else set[int]()
        source, known, context = self._encode_pictures(given, acting, strength, on_phase, interrupt)
        if source is not None:
            samples = [levels[0] * x + (1 - levels[0]) * source for x in samples]

        steps = len(levels) - 1
        varied = variety.for_each(positive, num_images_per_prompt, generators) if variety.on else []
        on_phase("Denoising")
        with contextlib.ExitStack() as in_use:
            in_use.enter_context(listening(interrupt))
            in_use.enter_context(self._in_use(self.transformer))
            conditionings: list[Conditioning] = []
            opposites: list[Conditioning] = []

            def prepare(step: int) -> None:
                read, repeat = positive, num_images_per_prompt
                if variety.acts_at(step, steps):
                    read, repeat = varied, 1
                conditionings[:] = self._prepare(read, grid.rows, grid.columns, repeat)
                opposites[:] = self._prepare(negative, grid.rows, grid.columns, num_images_per_prompt)

            callback = self._before_steps(lora_strengths, variety, steps, prepare, callback)
            guides: list[Guide | None] = [None] * len(grid.cuts)
            if context is not None and self.control is not None:
                in_use.enter_context(self._in_use(self.control))
                parts = [context[(slice(None), *cut)] for cut in grid.cuts]
                guides = [self._guide(self.control, x, share.scale, levels, acting) for x in parts]
            if unified:
                predictions = [
                    functools.partial(self._twin_forward, conditionings, guide, interrupt) for guide in guides
                ]
                predict = functools.partial(_velocities, self._held(grid.joined(predictions), known))
                samples = unified_sampler.sample(predict, samples, unified, generators, callback, levels)
                samples = [x.float() for x in samples]
            else:
                acts = nag if nag_acts else None
                forwards = [
                    self._forward(conditionings, opposites, guidance, acts, guide, interrupt)
                    for guide in guides
                ]
                forward = self._held(grid.joined(forwards), known)
                samples = self._denoise(samples, levels, forward, callback)
        if not all(torch.isfinite(x).all() for x in samples):
            raise UserError(
                "The model computed values that are not numbers, so there is no picture: use --bf16 instead "
                "of --fp16, or another file of this model."
            )
        if output_type == "latent":
            return ZImageOutput(torch.stack(samples), notes)
        on_phase("Decoding")
        return ZImageOutput(self._decode(samples, given, output_type, interrupt), notes)

    def _levels(
        self,
        unified: UnifiedConfig | None,
        steps: int,
        tokens: int,
        flow_shift: float | None,
        strength: float,
    ) -> list[float]:
        """The run's noise levels, falling to 0."""
        if unified is None:
            return make_sigmas(steps, self.scheduler_config, tokens, flow_shift, strength)
        return [strength * t for t in unified_sampler.time_grid(unified)]

    def _controls(self, given: Pictures, notes: list[str]) -> bool:
        """Whether the control network has something to follow. UserError for a control picture without it."""
        if self.control is None:
            if given.control is not None:
                raise UserError(
                    "There is a control picture, but this model has no control network: choose one that has, "
                    "or leave the picture out."
                )
            return False
        wanted = given.control is not None or (given.painted is not None and self.control.layout.inpaints)
        if not wanted:
            notes.append("There was no control picture, so the model's control network did not act.")
        return wanted

    def _encode_pictures(
        self,
        given: Pictures,
        acting: Set[int],
        strength: float,
        on_phase: Callable[[str], None],
        interrupt: Callable[[], bool] | None,
    ) -> tuple[Tensor | None, Known | None, Tensor | None]:
        """(latents to start from, what masked denoising holds, control context), each where it is needed.

        A control network that knows masks is told what is repainted; without it, the rest is held.
        """
        channels = self.control.layout.channels if self.control is not None and acting else 0
        tells = given.painted is not None and channels == INPAINT_CHANNELS
        holds = given.painted is not None and not tells
        todo = {
            "image": given.image if strength < 1 or holds else None,
            "control": given.control if channels else None,
            "kept": _kept(given) if tells else None,
        }
        if not any(x is not None for x in todo.values()):
            return None, None, None
        on_phase("Encoding pictures")
        with self._in_use(self.vae):
            latents = {
                name: None if x is None else vae.encode(self.vae, x, self.vae_tile, interrupt)
                for name, x in todo.items()
            }
        source, known, context = latents["image"], None, None
        source = None if source is None else source.to(self.device)
        if holds and source is not None and given.painted is not None:
            known = Known.of(source, given.painted)
        if channels:
            context = control_nets.context(channels, latents["control"], latents["kept"], given.painted)
        return source if strength < 1 else None, known, context

    def _guide(
        self,
        control: ZImageControlModel,
        context: Tensor,
        scale: float,
        levels: Sequence[float],
        acting: Set[int],
    ) -> Guide:
        control.follow(self.transformer)
        embedded = control.embed(context.to(self.device), self.transformer.x_pad_token)
        return Guide(control, embedded, scale, levels, acting)

    def _unchanged(
        self,
        given: Pictures,
        repeat: int,
        prompt: Any,
        embeds: Any,
        output_type: str,
        notes: list[str],
    ) -> ZImageOutput:
        """The picture itself, as often as pictures were asked for."""
        assert given.image is not None
        count = repeat * len(_as_list(prompt, embeds) if embeds is None else embeds)
        if output_type == "latent":
            with self._in_use(self.vae):
                latent = vae.encode(self.vae, given.image, self.vae_tile)
            return ZImageOutput(torch.stack([latent] * count).to(self.device), notes)
        return ZImageOutput(self._as_output([given.image] * count, output_type), notes)

    def _features(self, groups: Sequence[Prompts], limit: int, notes: list[str]) -> list[list[Tensor]]:
        """Each group's features on the device; equal texts share one tensor."""
        texts = dict.fromkeys(text for group, embeds in groups if embeds is None for text in group)
        known = {}
        for text, encoded in self._encode(list(texts), limit).items():
            known[text] = encoded.features.to(self.device)
            if encoded.dropped:
                notes.append(
                    f"The prompt is {encoded.dropped} tokens longer than the {limit} the model reads; it did "
                    f"not see the end: {text_encoding.cut(self.tokenizer, text, limit)}"
                )
        return [
            [known[text] for text in group] if embeds is None else [x.to(self.device) for x in embeds]
            for group, embeds in groups
        ]

    def _encode(self, texts: list[str], limit: int) -> dict[str, Encoded]:
        """From the cache; the encoder works once, for all that are missing there."""
        if not texts:  # features were given, and there may be no tokenizer
            return {}
        template = str(self.tokenizer.chat_template)
        keys = {text: prompt_cache.key(self.encoder_id, template, text, limit) for text in texts}
        encoded = {text: hit for text in texts if (hit := self.prompt_cache.get(keys[text])) is not None}
        missing = [text for text in texts if text not in encoded]
        if missing:
            encoder = self.text_encoder
            with self._in_use(encoder):
                for text in missing:
                    encoded[text] = text_encoding.encode(encoder, self.tokenizer, text, self.device, limit)
                    self.prompt_cache.put(keys[text], encoded[text])
        return encoded

    def _in_use(self, part: nn.Module) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.residency is None else self.residency.use(part)

    def _prepare(self, features: list[Tensor], rows: int, columns: int, repeat: int) -> list[Conditioning]:
        prepared = {id(x): self.transformer.prepare(x, rows, columns) for x in features}
        return [prepared[id(x)] for x in features for _ in range(repeat)]

    def _before_steps(
        self,
        strengths: LoraStrengths | None,
        variety: SeedVariety,
        steps: int,
        prepare: Callable[[int], None],
        callback: StepCallback | None,
    ) -> StepCallback:
        """Get ready for the first step; the callback to be called after each step does so for the next one.

        The prompts are prepared anew whenever the strengths change, since LoRAs act on that, too, and when
        seed variety ends.
        """
        prepared_with: list[Any] = []

        def before(step: int) -> None:
            values = None if strengths is None else list(strengths(step, steps))
            wanted = [values, variety.acts_at(step, steps)]
            if prepared_with == wanted:
                return
            if values is not None:
                set_multipliers(self.transformer, values)
            prepare(step)
            prepared_with[:] = wanted

        def after(step: int, total: int, denoised: Sequence[Tensor]) -> None:
            if callback is not None:
                callback(step, total, denoised)
            if step < total:
                before(step)

        before(0)
        return after

    def _noise(
        self,
        rows: int,
        columns: int,
        generators: Sequence[torch.Generator | None],
        latents: Tensor | None,
    ) -> list[Tensor]:
        """Each image's own start, fp32: drawn on the CPU unless the generator lives elsewhere."""
        shape = (self.transformer.in_channels, rows, columns)
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

    def _forward(
        self,
        conditionings: list[Conditioning],
        opposites: list[Conditioning],
        guidance: Guidance,
        nag: Nag | None,
        guide: Guide | None,
        interrupt: Callable[[], bool] | None,
    ) -> Forward:
        """One step's prediction of x - z: plain, with classifier-free guidance, or with NAG."""

        def forward(samples: list[Tensor], sigma: float) -> list[Tensor]:
            guided = nag is None and guidance.acts_at(1 - sigma)
            control = guide and guide.at(sigma, len(samples) * (2 if guided else 1))
            t = torch.tensor([(1000 - sigma * 1000) / 1000], dtype=torch.float32, device=self.device)
            if nag is not None:
                outputs = self.transformer(
                    samples, t, conditionings, interrupt, negatives=opposites, nag=nag, control=control
                )
            elif guided:
                both = conditionings + opposites
                outputs = self.transformer(samples * 2, t, both, interrupt, control=control)
                pairs = zip(outputs[: len(samples)], outputs[len(samples) :], strict=True)
                outputs = [guidance.combine(pos.float(), neg.float()) for pos, neg in pairs]
            else:
                outputs = self.transformer(samples, t, conditionings, interrupt, control=control)
            return [x.float() for x in outputs]

        return forward

    @staticmethod
    def _denoise(
        samples: list[Tensor], sigmas: list[float], forward: Forward, callback: StepCallback | None
    ) -> list[Tensor]:
        """Euler: x += (sigma_next - sigma) * velocity, where velocity = -(the transformer's output)."""
        steps = len(sigmas) - 1
        for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:], strict=False), 1):
            outputs = forward(samples, sigma)
            if callback is not None:
                callback(i, steps, [x + sigma * out for x, out in zip(samples, outputs, strict=True)])
            samples = [x + (sigma - sigma_next) * out for x, out in zip(samples, outputs, strict=True)]
        return samples

    def _usual_steps(self, sample_solver: str | None) -> int:
        """Of the sampler that is asked for, where that is not the model's own."""
        asked = unified_sampler.is_unified(sample_solver)
        return UnifiedConfig.sampling_steps if asked else self.usual.num_inference_steps

    def _unified(
        self,
        sample_solver: str | None,
        steps: int,
        overrides: Mapping[str, Any] | None,
        notes: list[str],
    ) -> UnifiedConfig | None:
        """The unified sampler's configuration, or None where the scheduler's steps are to run."""
        solver = sample_solver or ("unified" if self.unified_solver else "")
        if not unified_sampler.is_unified(solver):
            if solver.strip().lower() not in ("", "default", "euler"):
                raise UserError(
                    f"sample_solver came as '{solver}'; expected unified, unified_2s, unified_4s, twinflow, "
                    "or no name for the model's own."
                )
            if overrides:
                raise UserError(
                    "unified_sampler_config acts with sample_solver='unified' only; set that too."
                )
            return None
        config = unified_sampler.resolve(solver, steps, overrides)
        if config.sampling_steps != steps and not (overrides or {}).get("sampling_steps"):
            notes.append(
                f"{solver} takes {config.sampling_steps} steps; the {steps} asked for were not used."
            )
        if idle := unified_sampler.without_effect(config):
            notes.append(idle)
        if not self.transformer.has_second_time_embedder:
            notes.append(
                "This model's file has no second time embedder; the first one is used for both, so pictures "
                "can be less exact than with a complete TwinFlow file."
            )
        return config

    def _twin_forward(
        self,
        conditionings: list[Conditioning],
        guide: Guide | None,
        interrupt: Callable[[], bool] | None,
        xs: list[Tensor],
        t: float,
        tt: float,
    ) -> list[Tensor]:
        """TwinFlow's model call: x - z at noise level t, asked to jump to tt; fp64."""
        times = dit_time(torch.tensor([t, tt], dtype=torch.float64, device=self.device))
        control = guide and guide.at(t, len(xs))
        outputs = self.transformer(
            xs, times[:1], conditionings, interrupt, target_t=times[1:], control=control
        )
        return [x.double() for x in outputs]

    @staticmethod
    def _held(forward: Forward, known: Known | None) -> Forward:
        """`forward`, exact for what is known."""
        if known is None:
            return forward

        def held(samples: list[Tensor], level: float, *target: float) -> list[Tensor]:
            return known.hold(forward(samples, level, *target), samples, level)

        return held

    def _decode(
        self,
        samples: list[Tensor],
        given: Pictures,
        output_type: str,
        interrupt: Callable[[], bool] | None,
    ) -> Any:
        with self._in_use(self.vae):
            made = [given.joined(vae.decode(self.vae, x, self.vae_tile, interrupt)) for x in samples]
        return self._as_output(made, output_type)

    def _as_output(self, made: list[Tensor], output_type: str) -> Any:
        if output_type == "pt":
            return torch.stack(made).to(self.device)
        if output_type == "np":
            return torch.stack(made).permute(0, 2, 3, 1).float().cpu().numpy()
        return [to_pil(p) for p in made]


def check_size(height: int, width: int, tile: int | None = None) -> None:
    for name, value in (("height", height), ("width", width), ("tile", tile)):
        if value is not None and (value % SIZE_MULTIPLE or value <= 0):
            near = max(SIZE_MULTIPLE, round(value / SIZE_MULTIPLE) * SIZE_MULTIPLE)
            raise UserError(
                f"The {name} {value} is not a multiple of {SIZE_MULTIPLE}; the nearest is {near}."
            )


def _check_ranges(**arguments: Any) -> None:
    """UserError for a number outside of the page's range; None is not checked."""
    settings = {"num_images_per_prompt": "batch_size"}
    for name, value in arguments.items():
        if value is not None:
            check_argument(settings.get(name, name), value, name)


def _check_output(output_type: str, max_sequence_length: int) -> None:
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type came as {output_type!r}; expected one of {', '.join(OUTPUT_TYPES)}.")
    if not 1 <= max_sequence_length <= MAX_TOKENS:
        raise UserError(
            f"max_sequence_length came as {max_sequence_length}; expected a whole number from 1 to "
            f"{MAX_TOKENS}."
        )


def _velocities(forward: Forward, xs: list[Tensor], t: float, tt: float) -> list[Tensor]:
    """The unified sampler's z - x."""
    return [-x for x in forward(xs, t, tt)]


def _strength(value: float, given: Pictures) -> float:
    """How far from the picture a run starts; 1 without one."""
    if not 0 <= value <= 1:
        raise UserError(f"denoising_strength came as {value}; expected a number from 0 to 1.")
    return value if given.image is not None else 1.0


def _kept(given: Pictures) -> Tensor:
    assert given.image is not None and given.painted is not None
    return control_nets.without_painted(given.image, given.painted)


def to_pil(picture: Tensor) -> Image.Image:
    """[3, H, W] in 0..1 -> RGB image."""
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).cpu().numpy().astype(np.uint8))


def _as_list(prompt: str | Sequence[str] | None, embeds: Sequence[Tensor] | None) -> list[str]:
    """The texts to encode: none where their features are given."""
    if embeds is not None:
        return []
    if prompt is None:
        raise UserError("There is neither a prompt nor prompt_embeds: give one of them.")
    return [prompt] if isinstance(prompt, str) else list(prompt)


def _generators(generator: Any, count: int) -> list[torch.Generator | None]:
    generators = list(generator) if isinstance(generator, Sequence) else [generator] * count
    if len(generators) != count:
        raise UserError(
            f"There are {len(generators)} generators for {count} images: give one for each, or one."
        )
    return generators


def _unguided(guidance: Guidance, nag: Nag, notes: list[str]) -> tuple[Guidance, Nag]:
    """Off, both: the unified sampler's models were trained with their guidance inside."""
    if guidance.on:
        notes.append("guidance_scale does not act with the unified sampler and was not used.")
    if nag.scale > 1:
        notes.append("NAG_scale does not act with the unified sampler and was not used.")
    return Guidance(), Nag()


def _as_texts(texts: str | Sequence[str] | None) -> list[str]:
    return [texts or ""] if texts is None or isinstance(texts, str) else list(texts)


def _negative_texts(negative: str | Sequence[str] | None, count: int, notes: list[str]) -> list[str]:
    """One negative prompt for each prompt; the default where the user gave none."""
    texts = [negative or ""] * count if negative is None or isinstance(negative, str) else list(negative)
    if len(texts) != count:
        raise UserError(
            f"There are {len(texts)} negative prompts for {count} prompts: give one for each, or one."
        )
    if any(not text.strip() for text in texts):
        notes.append(f"The negative prompt was empty; the default was used: {DEFAULT_NEGATIVE_PROMPT}")
    return [text if text.strip() else DEFAULT_NEGATIVE_PROMPT for text in texts]
