"""How large the files are that can serve as a card's parts: by their headers where they are on disk, else by
their names and the published models. No torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.z_image.checkpoints import control_layout as layouts
from models.z_image.checkpoints import weight_names
from models.z_image.checkpoints.control_layout import OWN, PLAIN, SHARED, ControlLayout
from models.z_image.checkpoints.part_configs import ACTIVATION, VAE_VALUE, Shape
from shared.errors import UserError
from shared.files.unchanged import while_unchanged
from shared.gpu.footprint import Offers, PartSize, Variant
from shared.weights import formats
from shared.weights.files import (
    Folders,
    Required,
    check_safetensors,
    describe,
    file_name,
    is_url,
    locate,
)

STACKS = ("context_refiner", "noise_refiner", "layers")  # blocks that can be streamed, as a pass meets them
CONTROL_STACKS = ("control_noise_refiner", "control_layers")
NAMES = {"transformer": weight_names.TRANSFORMER, "text_encoder": weight_names.TEXT_ENCODER}
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
#: kind -> bytes of a quantized weight with its group scales
WEIGHT_BYTES = {"int8": 1.0, "fp8": 1.0, "svdq-int4": 0.5 + 2 / 64, "svdq-fp4": 0.5 + 1 / 16}
#: kind -> rank of the 16-bit part, of the published files
RANKS = {"svdq-int4": 256, "svdq-fp4": 128}


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

    def variants(role: str) -> tuple[Variant, ...]:
        return tuple(
            variant
            for required in needed
            if required.role == role
            for variant in _variants(required, configs, folders, float_bytes)
        )

    transformers = variants("transformer")
    if net := next((required for required in needed if required.role.startswith("module")), None):
        nets = control_variants(net, configs["transformer"], folders, float_bytes)
        transformers = tuple(_beside(variant, net) for variant in transformers for net in nets)
    vae = next((required for required in needed if required.role == "vae"), None)
    return Offers(
        transformers, variants("text_encoder"), PartSize(_vae_parameters(vae, folders) * VAE_VALUE)
    )


def _beside(transformer: Variant, net: Variant) -> Variant:
    """A transformer with its control network, whose blocks are the first to be streamed. They pass through
    two places of their own.
    """
    size, control = transformer.size, net.size
    base = size.base_bytes + control.base_bytes + 2 * max(control.block_bytes)
    both = PartSize(base, control.block_bytes + size.block_bytes, size.ram_bytes)
    return replace(transformer, size=both, on_disk=transformer.on_disk and net.on_disk, module=net)


def control_layout(required: Required, base: Mapping[str, Any], folders: Folders) -> ControlLayout:
    """The layout of a card's control network: from its file, else what its name says is published. UserError
    when the file is damaged.
    """
    path = describe(required, folders).path
    if path is not None:
        return layouts.read(path, Shape.of(base))[1]
    name = file_name(required.alternatives[0]).lower()
    _, channels, step, refiner = next(row for row in LAYOUTS_BY_NAME if re.search(row[0], name))
    return ControlLayout(channels, tuple(range(0, Shape.of(base).n_layers, step)), refiner)


def control_variants(
    required: Required, base: Mapping[str, Any], folders: Folders, float_bytes: int | None = ACTIVATION
) -> list[Variant]:
    """The files that can serve as a card's control network; sizes as of `measure` and `published_size`.
    UserError when the only one is damaged.
    """
    layout, value = control_layout(required, base, folders), float_bytes or ACTIVATION

    def published(kind: str) -> PartSize:
        return _large_or_cast(lambda count: _control_size(base, layout, kind, count), kind, value)

    def measured(path: Path) -> tuple[str, PartSize]:
        checkpoint, layout = layouts.read(path, Shape.of(base))
        bits = 8 * (min(value, 2) if checkpoint.is_large else value)
        stacks = ("control_layers",) if layout.refiner == SHARED else CONTROL_STACKS
        blocks = tuple(n for stack in stacks for n in checkpoint.block_bytes(stack, bits))
        everything = checkpoint.bytes_under("", bits)
        rest = everything - sum(sum(checkpoint.block_bytes(s, bits)) for s in CONTROL_STACKS)
        return _kind_of(checkpoint), PartSize(rest, blocks)

    return _alternatives(required, folders, measured, published)


def _control_size(base: Mapping[str, Any], layout: ControlLayout, kind: str, float_bytes: int) -> PartSize:
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
    required: Required, configs: Mapping[str, Mapping[str, Any]], folders: Folders, float_bytes: int | None
) -> list[Variant]:
    config = configs[required.role]
    return _alternatives(
        required,
        folders,
        lambda path: measure(path, float_bytes, required.role, config),
        lambda kind: published_size(required.role, kind, config, float_bytes or ACTIVATION),
    )


def _alternatives(
    required: Required,
    folders: Folders,
    measured: Callable[[Path], tuple[str, PartSize]],
    published: Callable[[str], PartSize],
) -> list[Variant]:
    """measured: (kind, size) of a file. published: the size of a file of a kind that is not here."""
    variants, problem = [], None
    for source in required.alternatives:
        path = locate(source, folders, required.target)
        if path is None and not is_url(source):
            continue  # a place where some users have the file
        if path is None:
            kind = kind_by_name(file_name(source))
            variants.append(Variant(source, kind, published(kind), on_disk=False))
            continue
        try:
            kind, size = measured(path)
        except UserError as error:
            problem = problem or error
        else:
            variants.append(Variant(source, kind, size))
    if problem and not variants:
        raise problem
    return variants


def _kind_of(checkpoint: formats.Checkpoint) -> str:
    return next((kind for kind, _ in Counter(checkpoint.quantized.values()).most_common(1)), checkpoint.label)


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
    checkpoint = formats.inspect([path], NAMES[role])
    kind = _kind_of(checkpoint)
    bits = 8 * (float_bytes or (4 if kind in ("fp16", "fp32") else 2))
    if checkpoint.is_large:
        bits = min(bits, 16)  # the layers' weights, which are nearly all of it
    blocks = [checkpoint.block_bytes(stack, bits) for stack in STACKS]
    ram, unused = checkpoint.bytes_under("embed_tokens."), 0
    if role == "text_encoder":
        blocks = [counts[: layers - 1] if layers else counts for counts in blocks]
        unused = checkpoint.bytes_under("norm.", bits) + checkpoint.bytes_under("lm_head.", bits)
    stacked = sum(sum(checkpoint.block_bytes(stack, bits)) for stack in STACKS)
    everything = checkpoint.bytes_under("", bits) - stacked - checkpoint.bytes_under("embed_tokens.", bits)
    return kind, PartSize(everything - unused, tuple(n for counts in blocks for n in counts), ram)


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
    required: Required, source: str, configs: Mapping[str, Mapping[str, Any]], folders: Folders
) -> int:
    """Of a file that is not here, as far as its name and the published models tell; 0 for small files."""
    kind = kind_by_name(file_name(source))
    if required.role == "vae":
        return PUBLISHED_VAE * ACTIVATION
    if required.role.startswith("module"):
        layout = control_layout(required, configs["transformer"], folders)
        if layout.refiner == SHARED:
            layout = replace(layout, refiner=OWN)  # the file has such blocks, though nothing uses them
        return _control_size(configs["transformer"], layout, kind, ACTIVATION).total
    if required.role not in NAMES:
        return 0
    size = published_size(required.role, kind, configs[required.role])
    last_layer = size.block_bytes[-1] if required.role == "text_encoder" else 0  # which is not loaded
    return size.total + size.ram_bytes + last_layer


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


def _vae_parameters(required: Required | None, folders: Folders) -> int:
    paths = (locate(source, folders, required.target) for source in required.alternatives) if required else ()
    path = next((path for path in paths if path is not None), None)
    if path is None or path.is_dir():
        return PUBLISHED_VAE
    return _parameters(path)


@while_unchanged(answers=16)
def _parameters(path: Path) -> int:
    return sum(math.prod(entry["shape"]) for entry in check_safetensors(path).values())
