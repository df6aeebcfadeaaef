"""What Z-Image's parts need of memory and work, as formulas: no torch, so that plans cost milliseconds.

The activation formulas count what is alive at the worst moment of a forward under inference; the tests hold
them against the real modules, run without memory on torch's meta device. Attention counts as one that never
stores its matrix (every backend here).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.z_image.checkpoints import control_layout as layouts
from models.z_image.checkpoints import weight_names
from models.z_image.checkpoints.control_layout import OWN, PLAIN, SHARED, Layout
from shared.errors import UserError
from shared.files.unchanged import while_unchanged
from shared.gpu.footprint import Needs, Offers, PartSize, Variant
from shared.imaging import hires as enlarging
from shared.weights import formats
from shared.weights.files import (
    Folders,
    Required,
    check_safetensors,
    describe,
    file_name,
    is_url,
    locate,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
MAX_CAPTION = 512  # tokens; how many a prompt has is only known once it is encoded
STACKS = ("context_refiner", "noise_refiner", "layers")  # blocks that can be streamed, as a pass meets them
CONTROL_STACKS = ("control_noise_refiner", "control_layers")
PICTURES = ("image_start", "image_guide")  # settings whose pictures the VAE encodes
NAMES = {"transformer": weight_names.TRANSFORMER, "text_encoder": weight_names.TEXT_ENCODER}
VAE_TILES = (1024, 768, 512, 384, 256)  # pixels
ACTIVATION = 2  # bytes of a value on a card
VAE_VALUE = 4  # the VAE computes in fp32
LATENT_STATE = 6  # fp32 copies of a latent around a step: sample, output, prediction, preview, NaN check

#: (expression for a file's name, kind); for files that are not on disk, whose headers cannot be asked
KINDS_BY_NAME = (
    (r"svdq[-_]int4", "svdq-int4"),
    (r"svdq[-_](fp4|nvfp4)", "svdq-fp4"),
    (r"int8", "int8"),
    (r"fp8|e4m3|e5m2", "fp8"),
    (r"(?<!b)f(p)?16", "fp16"),
    (r"fp?32", "fp32"),
)
#: (expression for a file's name, channels, distance of the hinted layers, refiner); as above
LAYOUTS_BY_NAME: tuple[tuple[str, int, int, str], ...] = (
    (r"lite", 33, 10, OWN),
    (r"2\.1", 33, 2, OWN),
    (r"union-?2", 33, 2, SHARED),
    (r"", 16, 5, PLAIN),
)
PUBLISHED_VAE = 83_819_683  # parameters


@dataclass(frozen=True)
class Shape:
    """The transformer's dimensions, under the names of its config.json."""

    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    cap_feat_dim: int = 2560
    in_channels: int = 16
    patch_size: int = 2

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        return cls(**{k: config[k] for k in cls.__dataclass_fields__ if k in config})

    @property
    def hidden(self) -> int:
        return int(self.dim / 3 * 8)

    @property
    def linear_weights(self) -> int:
        """Of one block, without its modulation."""
        return 4 * self.dim**2 + 3 * self.dim * self.hidden

    def image_tokens(self, width: int, height: int) -> int:
        side = 8 * self.patch_size
        return _padded((width // side) * (height // side))


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
    control: Layout | None = None

    @property
    def tokens(self) -> int:
        return self.image + self.caption + self.negative


def _padded(length: int) -> int:
    return math.ceil(length / 32) * 32


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
    control: Layout | None = None,
) -> Needs:
    """Of a job with these settings. configs: of "transformer", "text_encoder", "vae".

    lora_bytes: of the adapters' files, which stay on the card beside the layers that they change.
    control: the layout of the model's control network.
    """
    shape = Shape.of(configs["transformer"])
    passes, last = enlarging.run_sizes(settings)
    each = [_sizes(shape, settings, *one, control) for one in passes]
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
    shape: Shape, settings: Mapping[str, Any], width: int, height: int, images: int, control: Layout | None
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


# ---- weights -----------------------------------------------------------------------------------------------


def offers(
    needed: Iterable[Required],
    configs: Mapping[str, Mapping[str, Any]],
    folders: Folders,
    float_bytes: int | None = ACTIVATION,
) -> Offers:
    """What the card's files are, best precision first: from their headers where they are on disk, else from
    their names and the published models' sizes.

    float_bytes: of unquantized weights once loaded; None: 2 where the file has bf16, else 4. A damaged file
    offers nothing; where no other is left, the UserError that names it is raised.
    """
    needed = list(needed)
    roles = {role: [one for one in needed if one.role == role] for role in ("transformer", "text_encoder")}
    found = {
        role: tuple(v for one in ones for v in _variants(one, configs, folders, float_bytes))
        for role, ones in roles.items()
    }
    modules = [one for one in needed if one.role.startswith("module")]
    nets = [
        v for one in modules[:1] for v in control_variants(one, configs["transformer"], folders, float_bytes)
    ]
    transformers = found["transformer"]
    if modules:
        transformers = tuple(_beside(v, net) for v in transformers for net in nets)
    vae = next((one for one in needed if one.role == "vae"), None)
    return Offers(
        transformers,
        found["text_encoder"],
        PartSize(_vae_weights(vae, folders) * VAE_VALUE),
    )


def _beside(transformer: Variant, net: Variant) -> Variant:
    """A transformer with its control network, whose blocks are the first to be streamed. They pass through
    two places of their own.
    """
    size, control = transformer.size, net.size
    base = size.base_bytes + control.base_bytes + 2 * max(control.block_bytes)
    both = PartSize(base, control.block_bytes + size.block_bytes, size.ram_bytes)
    return replace(transformer, size=both, on_disk=transformer.on_disk and net.on_disk, module=net)


def control_layout(one: Required, base: Mapping[str, Any], folders: Folders) -> Layout:
    """The layout of a card's control network: from its file, else what its name says is published. UserError
    when the file is damaged.
    """
    path = describe(one, folders).path
    if path is not None:
        return layouts.read(path, Shape.of(base))[1]
    name = file_name(one.alternatives[0]).lower()
    _, channels, step, refiner = next(known for known in LAYOUTS_BY_NAME if re.search(known[0], name))
    return Layout(channels, tuple(range(0, Shape.of(base).n_layers, step)), refiner)


def control_variants(
    one: Required, base: Mapping[str, Any], folders: Folders, float_bytes: int | None = ACTIVATION
) -> list[Variant]:
    """The files that can serve as a card's control network; sizes as of `measure` and `published_size`.
    UserError when the only one is damaged.
    """
    layout, value = control_layout(one, base, folders), float_bytes or ACTIVATION

    def published(kind: str) -> PartSize:
        return _large_or_cast(lambda count: _control_size(base, layout, kind, count), kind, value)

    def measured(path: Path) -> tuple[str, PartSize]:
        held, layout = layouts.read(path, Shape.of(base))
        bits = 8 * (min(value, 2) if held.is_large else value)
        stacks = ("control_layers",) if layout.refiner == SHARED else CONTROL_STACKS
        blocks = tuple(n for stack in stacks for n in held.block_bytes(stack, bits))
        everything = held.bytes_under("", bits)
        rest = everything - sum(sum(held.block_bytes(s, bits)) for s in CONTROL_STACKS)
        return _kind_of(held), PartSize(rest, blocks)

    return _alternatives(one, folders, measured, published)


def _control_size(base: Mapping[str, Any], layout: Layout, kind: str, float_bytes: int) -> PartSize:
    """quanto's published files are taken to have the projections in int8, too."""
    shape = Shape.of(base)
    d, weight = shape.dim, WEIGHT_BYTES.get(kind, float_bytes)
    plain = (min(d, 256) + 1) * 4 * d + 4 * d + 2 * d // shape.n_heads
    block = int(shape.linear_weights * weight + plain * float_bytes)
    projection = int(d * d * weight + d * float_bytes)
    hinting = [block + projection * (2 if i == 0 else 1) for i in range(len(layout.places))]
    refiner = {PLAIN: [block] * shape.n_refiner_layers, OWN: hinting[: shape.n_refiner_layers]}
    embedder = (shape.patch_size**2 * layout.channels + 1) * d * float_bytes
    return PartSize(embedder, (*refiner.get(layout.refiner, []), *hinting))


def _variants(
    one: Required, configs: Mapping[str, Mapping[str, Any]], folders: Folders, float_bytes: int | None
) -> list[Variant]:
    config = configs[one.role]
    return _alternatives(
        one,
        folders,
        lambda path: measure(path, float_bytes, one.role, config),
        lambda kind: published_size(one.role, kind, config, float_bytes or ACTIVATION),
    )


def _alternatives(
    one: Required,
    folders: Folders,
    measured: Callable[[Path], tuple[str, PartSize]],
    published: Callable[[str], PartSize],
) -> list[Variant]:
    """measured: (kind, size) of a file. published: the size of a file of a kind that is not here."""
    found, problem = [], None
    for source in one.alternatives:
        path = locate(source, folders, one.target)
        if path is None and not is_url(source):
            continue  # a place where some users have the file
        if path is None:
            kind = kind_by_name(file_name(source))
            found.append(Variant(source, kind, published(kind), on_disk=False))
            continue
        try:
            kind, size = measured(path)
        except UserError as error:
            problem = problem or error
        else:
            found.append(Variant(source, kind, size))
    if problem and not found:
        raise problem
    return found


def _kind_of(held: formats.Checkpoint) -> str:
    return next((kind for kind, _ in Counter(held.quantized.values()).most_common(1)), held.label)


def kind_by_name(name: str) -> str:
    return next((kind for rule, kind in KINDS_BY_NAME if re.search(rule, name.lower())), "bf16")


def precisions(sources: Iterable[str], folders: Folders) -> list[str]:
    """The kinds of these files in their order: from the headers of those that are here, else by the names of
    those that have an address.
    """
    kinds = []
    for source in sources:
        path = locate(source, folders)
        if path is not None:
            kinds.append(_known_kind(path))
        elif is_url(source):
            kinds.append(kind_by_name(file_name(source)))
    return list(dict.fromkeys(filter(None, kinds)))


def _known_kind(path: Path) -> str:
    """Of a file or folder; "" for a damaged one."""
    try:
        return measure(path)[0]
    except (UserError, OSError):
        return ""


def measure(
    path: Path,
    float_bytes: int | None = ACTIVATION,
    role: str = "transformer",
    config: Mapping[str, Any] | None = None,
) -> tuple[str, PartSize]:
    """(kind, size as loaded) of a file or a folder of shards, from headers. UserError when it is damaged."""
    return _measured(path, float_bytes, role, (config or {}).get("num_hidden_layers"))


@while_unchanged(answers=256)
def _measured(path: Path, float_bytes: int | None, role: str, layers: int | None) -> tuple[str, PartSize]:
    """layers: of a text encoder, whose last one is never computed."""
    held = formats.inspect([path], NAMES[role])
    kind = _kind_of(held)
    bits = 8 * (float_bytes or (4 if kind in ("fp16", "fp32") else 2))
    if held.is_large:
        bits = min(bits, 16)  # the layers' weights, which are nearly all of it
    blocks = [held.block_bytes(stack, bits) for stack in STACKS]
    ram, unused = held.bytes_under("embed_tokens."), 0
    if role == "text_encoder":
        blocks = [counts[: layers - 1] if layers else counts for counts in blocks]
        unused = held.bytes_under("norm.", bits) + held.bytes_under("lm_head.", bits)
    everything = held.bytes_under("", bits) - sum(sum(held.block_bytes(stack, bits)) for stack in STACKS)
    everything -= held.bytes_under("embed_tokens.", bits)
    return kind, PartSize(everything - unused, tuple(n for counts in blocks for n in counts), ram)


#: kind -> bytes of a quantized weight with its group scales
WEIGHT_BYTES = {"int8": 1.0, "fp8": 1.0, "svdq-int4": 0.5 + 2 / 64, "svdq-fp4": 0.5 + 1 / 16}
#: kind -> rank of the 16-bit part, of the published files
RANKS = {"svdq-int4": 256, "svdq-fp4": 128}


def published_size(
    role: str, kind: str, config: Mapping[str, Any], float_bytes: int = ACTIVATION
) -> PartSize:
    """As loaded, of a file of `kind` that is not here yet."""
    build = _text_encoder_size if role == "text_encoder" else _transformer_size
    return _large_or_cast(lambda count: build(config, kind, count), kind, float_bytes)


def _large_or_cast(size: Callable[[int], PartSize], kind: str, float_bytes: int) -> PartSize:
    """The size with floats of `float_bytes`; where they are many and the file has them in 16 bits, they stay
    as they are."""
    many = size(2).total - size(0).total >= formats.LARGE
    return size(2 if many and kind not in ("fp32", "fp64") else float_bytes)


def download_bytes(
    one: Required, source: str, configs: Mapping[str, Mapping[str, Any]], folders: Folders
) -> int:
    """Of a file that is not here, as far as its name and the published models tell; 0 for small files."""
    kind = kind_by_name(file_name(source))
    if one.role == "vae":
        return PUBLISHED_VAE * ACTIVATION
    if one.role.startswith("module"):
        layout = control_layout(one, configs["transformer"], folders)
        if layout.refiner == SHARED:
            layout = replace(layout, refiner=OWN)  # the file has such blocks, though nothing uses them
        return _control_size(configs["transformer"], layout, kind, ACTIVATION).total
    if one.role not in NAMES:
        return 0
    size = published_size(one.role, kind, configs[one.role])
    unused = size.block_bytes[-1] if one.role == "text_encoder" else 0  # its last layer, which is not loaded
    return size.total + size.ram_bytes + unused


def _transformer_size(config: Mapping[str, Any], kind: str, float_bytes: int) -> PartSize:
    """Nunchaku quantizes the refiners too; quanto's published files are taken not to."""
    shape = Shape.of(config)
    d, linear = shape.dim, shape.linear_weights
    time = min(d, 256)
    modulation, norms = (time + 1) * 4 * d, 4 * d + 2 * d // shape.n_heads
    rank = RANKS.get(kind, 0)  # on 4 fused layers: qkv, out, the first two of the feed-forward, the last
    low_rank = rank * ((3 * d + d) + 2 * d + (2 * shape.hidden + d) + (shape.hidden + d))
    weights = linear * WEIGHT_BYTES.get(kind, float_bytes) + low_rank * float_bytes
    refined = weights if rank else linear * float_bytes
    layer = int(weights + (modulation + norms) * float_bytes)
    context, noise = (int(refined + plain * float_bytes) for plain in (norms, modulation + norms))
    patch = shape.patch_size**2 * shape.in_channels
    embedders = 2 * patch * d + shape.cap_feat_dim * d + (time + 5) * d + 1024 * (512 + 1)
    refiners = (context,) * shape.n_refiner_layers + (noise,) * shape.n_refiner_layers
    return PartSize(embedders * float_bytes, refiners + (layer,) * shape.n_layers)


def _text_encoder_size(config: Mapping[str, Any], kind: str, float_bytes: int) -> PartSize:
    """Qwen3 without its last layer, which is never computed; its embedding stays in RAM."""
    h, heads, pairs = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    linear = 2 * h * config["head_dim"] * (heads + pairs) + 3 * h * config["intermediate_size"]
    norms = 2 * h + 2 * config["head_dim"]
    block = int(linear * WEIGHT_BYTES.get(kind, float_bytes) + norms * float_bytes)
    embedding = config["vocab_size"] * h * ACTIVATION  # as its file has it
    return PartSize(0, (block,) * (config["num_hidden_layers"] - 1), embedding)


def _vae_weights(one: Required | None, folders: Folders) -> int:
    """Parameters of the VAE."""
    found = (locate(source, folders, one.target) for source in one.alternatives) if one else ()
    path = next((path for path in found if path is not None), None)
    if path is None or path.is_dir():
        return PUBLISHED_VAE
    return _parameters(path)


@while_unchanged(answers=16)
def _parameters(path: Path) -> int:
    return sum(math.prod(entry["shape"]) for entry in check_safetensors(path).values())


# ---- configurations ----------------------------------------------------------------------------------------

#: Qwen3-4B's dimensions, for when its config.json is not here yet
QWEN3_4B = {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
}  # fmt: skip


def read_configs(
    sources: Mapping[str, str | Mapping[str, Any] | Path | None],
) -> dict[str, Mapping[str, Any]]:
    """Each part's configuration: given in the card itself, or as a path from the project's root."""
    return {role: _config(source) for role, source in sources.items()}


def _config(source: str | Mapping[str, Any] | Path | None) -> Mapping[str, Any]:
    if source is None or isinstance(source, Mapping):
        return source or QWEN3_4B
    return _config_file(ROOT / source)


@while_unchanged(answers=32)
def _config_file(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"The configuration {path} cannot be read ({error}): correct the card or the file."
        ) from error
