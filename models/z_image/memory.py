"""What Z-Image's parts need of memory and work, as formulas: no torch, so that plans cost milliseconds.

The activation formulas count what is alive at the worst moment of a forward under inference; the tests hold
them against the real modules, run without memory on torch's meta device. Attention counts as one that never
stores its matrix (every backend here).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.z_image.checkpoints.control_layout import SHARED, ControlLayout
from models.z_image.checkpoints.part_configs import ACTIVATION, VAE_VALUE, Shape
from shared.gpu.footprint import Needs
from shared.imaging import hires as enlarging

MAX_CAPTION = 512  # tokens; how many a prompt has is only known once it is encoded
PICTURES = ("image_start", "image_guide")  # settings whose pictures the VAE encodes
VAE_TILES = (1024, 768, 512, 384, 256)  # pixels
LATENT_STATE = 6  # fp32 copies of a latent around a step: sample, output, prediction, preview, NaN check


@dataclass(frozen=True)
class Sizes:
    """One forward: the tokens of its longest sequence and how many sequences there are.

    image, caption, negative: tokens (negative: of the caption that NAG adds to the same sequence, else 0).
    control: the layout of the control network that acts.
    """

    image: int
    caption: int
    sequences: int = 1
    negative: int = 0
    control: ControlLayout | None = None

    @property
    def tokens(self) -> int:
        return self.image + self.caption + self.negative


# ---- activations -------------------------------------------------------------------------------------------


def transformer_bytes(shape: Shape, sizes: Sizes, value: int = ACTIVATION, quantized: bool = False) -> int:
    """Alive at the worst moment of a forward: inside one block, beside the other sequences' states.

    Rotating queries and keys is that moment: the stream, its normed copy, values, queries and keys before and
    after (7 of `value` bytes), and both in fp32 (8 bytes). With NAG it is the guidance: 7 of `value` bytes,
    and 20 per image token for the two answers in fp32.
    quantized: integer products of the feed-forward layer, and one layer's weights unpacked.
    """
    inside = sizes.tokens * shape.dim * (7 * value + 8)
    if sizes.negative:
        inside = max(inside, shape.dim * (sizes.tokens * 7 * value + sizes.image * 20))
    if quantized:
        products = sizes.tokens * (shape.dim * 2 * value + shape.hidden * (value + 8))
        inside = max(inside, products, shape.dim * shape.hidden * 6)
    waiting = (sizes.sequences - 1) * sizes.tokens * shape.dim * value
    rope = sizes.sequences * sizes.tokens * (shape.dim // shape.n_heads) * 4
    if sizes.negative:
        rope *= 3  # the caption's, the negative caption's, and both in one
    latents = sizes.sequences * sizes.image * shape.patch_size**2 * shape.in_channels * 4
    captions = 2 * (sizes.caption + sizes.negative) * shape.dim * value
    return inside + waiting + rope + latents + captions + control_bytes(shape, sizes, value)


def control_bytes(shape: Shape, sizes: Sizes, value: int = ACTIVATION) -> int:
    """What a control network adds to a forward: while its block computes, all of the base's sequences wait
    (one more than without it), the others' control tokens, and the hints. The control tokens as embedded stay
    for the whole run.
    """
    if sizes.control is None:
        return 0
    together = 2 * sizes.sequences * sizes.tokens
    first = 3 * sizes.sequences * sizes.image  # before the noise refiner, with the hints of two layers
    modulation = 32  # rows' worth: of a second block, and times
    return shape.dim * value * (max(together, first) + sizes.tokens + modulation)


def step_flops(shape: Shape, sizes: Sizes) -> tuple[float, float]:
    """(in linear layers, in attention) of one forward over all sequences."""
    layers, refiners = shape.n_layers, shape.n_refiner_layers
    if sizes.control is not None:
        layers += len(sizes.control.places)
        refiners += len(sizes.control.places) if sizes.control.refiner == SHARED else shape.n_refiner_layers
    blocks = layers * sizes.tokens + refiners * sizes.image
    attention = layers * sizes.tokens**2 + refiners * sizes.image**2
    return (
        2.0 * sizes.sequences * blocks * shape.linear_weights,
        4.0 * sizes.sequences * attention * shape.dim,
    )


def text_encoder_bytes(config: Mapping[str, Any], tokens: int, value: int = ACTIVATION) -> int:
    """Qwen3 on one prompt: gate, its SiLU and up, about four copies of the stream, and the rotation."""
    per_token = 3 * config["intermediate_size"] + 4 * config["hidden_size"] + 3 * config["head_dim"]
    return tokens * per_token * value


def decode_bytes(config: Mapping[str, Any], width: int, height: int, value: int = VAE_VALUE) -> int:
    """VAE decoder on width x height pixels: three copies of its widest layer at full resolution."""
    channels = config["block_out_channels"][:2]
    return width * height * (3 * max(channels) + 4) * value


def encode_bytes(config: Mapping[str, Any], width: int, height: int, value: int = VAE_VALUE) -> int:
    """VAE encoder on width x height pixels: five copies of its first layers at full resolution."""
    return width * height * (5 * config["block_out_channels"][0] + 4) * value


# ---- a job -------------------------------------------------------------------------------------------------


def needs(
    configs: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    *,
    lora_bytes: int = 0,
    control: ControlLayout | None = None,
) -> Needs:
    """Of a job with these settings. configs: of "transformer", "text_encoder", "vae".

    lora_bytes: of the adapters' files, which stay on the card beside the layers that they change.
    control: the layout of the model's control network.
    """
    shape = Shape.of(configs["transformer"])
    passes, last = enlarging.run_sizes(settings)
    each = [_sizes(shape, settings, *run, control) for run in passes]
    tokens = [images * shape.image_tokens(width, height) for width, height, images in passes]
    state = max(*tokens, shape.image_tokens(*last))  # tiles are parts of one picture
    state = LATENT_STATE * state * shape.patch_size**2 * shape.in_channels * 4 + lora_bytes
    linear, attention = max(step_flops(shape, sizes) for sizes in each)
    return Needs(
        encode=text_encoder_bytes(configs["text_encoder"], MAX_CAPTION),
        denoise=state + max(transformer_bytes(shape, sizes) for sizes in each),
        denoise_quantized=state + max(transformer_bytes(shape, sizes, quantized=True) for sizes in each),
        decode=_decode_table(configs["vae"], *last, settings),
        linear_flops=linear,
        attention_flops=attention,
    )


def _sizes(
    shape: Shape,
    settings: Mapping[str, Any],
    width: int,
    height: int,
    images: int,
    control: ControlLayout | None,
) -> Sizes:
    """Of a pass over so many images at once."""
    guided = settings.get("guidance_scale", 0) > 1
    nag = settings.get("NAG_scale", 1) > 1 and not guided
    acting = ("image_guide", "image_mask", "outpaint")  # what a control network is told
    return Sizes(
        shape.image_tokens(width, height),
        MAX_CAPTION,
        images * 2 if guided else images,
        MAX_CAPTION if nag else 0,
        control if any(map(settings.get, acting)) else None,
    )


def _decode_table(
    config: Mapping[str, Any], width: int, height: int, settings: Mapping[str, Any]
) -> dict[int | None, int]:
    """Tile -> bytes, the whole picture first; the smaller tiles only where they save something."""
    hires = enlarging.Hires.of(settings)
    encodes = any(map(settings.get, PICTURES)) or (hires is not None and hires.strength > 0)
    least = enlarging.WORK_BYTES if hires is not None and hires.upscaler != enlarging.LANCZOS else 0

    def cost(w: int, h: int) -> int:
        return max(decode_bytes(config, w, h), encode_bytes(config, w, h) if encodes else 0, least)

    table: dict[int | None, int] = {None: cost(width, height)}
    for tile in VAE_TILES:
        if tile < max(width, height):
            table[tile] = cost(min(tile, width), min(tile, height))
    return table
