"""Builds a pipeline from a card's files."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from transformers import AutoTokenizer, Qwen3Model

from models.z_image import control
from models.z_image.checkpoints import checkpoint_sizes, control_layout, sources
from models.z_image.checkpoints import weight_names as names
from models.z_image.checkpoints.part_configs import read_config, transformer_config
from models.z_image.family import (
    CONFIGS,
    CONTROL_TYPES,
    DEFAULT_FOLDERS,
    DEFAULTS,
    ROOT,
    SCHEDULER_CONFIGS,
    TRANSFORMER_CONFIG,
    VAE_CONFIG,
)
from models.z_image.job.job import ZImageProcessor
from models.z_image.job.latent_preview import LatentRgb
from models.z_image.pipeline_inputs import Usual
from models.z_image.pipeline_z_image import ZImagePipeline
from models.z_image.text_encoder import text_encoding
from models.z_image.text_encoder.prompt_cache import PromptCache
from models.z_image.transformer_z_image import ZImageConfig, ZImageTransformer2DModel
from models.z_image.unified_sampler import UnifiedConfig
from shared.errors import UserError
from shared.gpu import attention as attention_backends
from shared.gpu.offload_engines import default_engine
from shared.gpu.offloading import Residency
from shared.gpu.transport import default_device, pinned_bytes
from shared.weights import formats
from shared.weights import loading as weights
from shared.weights.files import Folders, Required, check_safetensors, file_name, is_url, weight_files
from shared.weights.loading import build, load_weights, preferred_dtype

log = logging.getLogger(__name__)

P = TypeVar("P", bound=ZImagePipeline)
#: part -> its class in diffusers, and what of its configuration changes pictures without changing any shape
UNSEEN = {
    "transformer": ("ZImageTransformer2DModel", ("axes_dims", "norm_eps", "rope_theta", "t_scale")),
    "vae": ("AutoencoderKL", ("norm_num_groups", "scaling_factor", "shift_factor")),
}
#: (role, files, whatever else the part depends on, how to make it) -> the part, which others may have, too
PartSharing = Callable[[str, Sequence[Path], Hashable, Callable[[], Any]], Any]


def _alone(role: str, files: Sequence[Path], config: Hashable, make: Callable[[], Any]) -> Any:
    """Nothing is shared."""
    return make()


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded: see `family_handler.load_model`, whose arguments these are.

    prompt_cache: folder of encoded prompts; None keeps them in memory. pinned_share: of the RAM, to page-lock
    at most. offload: one of offload_engines.SLOTS, "" the default.
    """

    quantize: bool = False
    quantize_text_encoder: bool = False
    dtype: torch.dtype | None = None
    vae_dtype: torch.dtype | None = None
    text_encoder_filename: str | Path | None = None
    attention: str = "auto"
    device: str | torch.device | None = None
    prompt_cache: Path | None = None
    share: PartSharing | None = None
    save_quantized: bool = False
    folders: Folders = DEFAULT_FOLDERS
    pinned_share: float | None = None
    offload: str = ""


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of a model lie on disk. control: the file of its control network, if it has one."""

    transformer: formats.Checkpoint
    control: Path | None
    vae: Path
    text_encoder: Sequence[Path]
    encoder_config: Path
    tokenizer: Path


def load(
    model_filename: str | Path | Sequence[str | Path],
    base_model_type: str,
    model_def: Mapping[str, Any],
    options: LoadOptions,
    pipeline: type[P] = ZImagePipeline,  # type: ignore[assignment]
) -> tuple[ZImageProcessor, P]:
    """See `family_handler.load_model`. pipeline: the class to make."""
    files = _find_files(model_filename, base_model_type, model_def, options)
    device = torch.device(options.device) if options.device else default_device()
    pipe = _build(files, base_model_type, model_def, options, device, pipeline)
    choose_attention = functools.partial(
        attention_backends.choose,
        otherwise=options.attention,
        card_rule=model_def.get("attention"),
        capability=attention_backends.capability_of(device),
    )
    rgb = LatentRgb.read(_latent_rgb_file(model_def.get("vae_config") or VAE_CONFIG))
    return ZImageProcessor(pipe, rgb, choose_attention, options.folders), pipe


def _find_files(
    model_filename: str | Path | Sequence[str | Path],
    base_model_type: str,
    model_def: Mapping[str, Any],
    options: LoadOptions,
) -> ModelFiles:
    """UserError for files that are missing, damaged, or made for another model."""
    folders, encoder = options.folders, options.text_encoder_filename
    if encoder is None:
        encoder = _first_on_disk(sources.text_encoder(model_def)[0], folders)
    vae = _first_on_disk(sources.vae(model_def), folders)
    encoder = sources.find(encoder, "", folders)
    encoder_config, tokenizer = _beside(model_def, encoder, folders)
    named = [model_filename] if isinstance(model_filename, (str, Path)) else list(model_filename)
    files = [sources.find(source, "", folders) for source in named]
    nets = [file for file in files if control_layout.is_control(file)]
    _check_control(nets, alone=nets == files, wanted=base_model_type in CONTROL_TYPES)
    transformer = formats.inspect([file for file in files if file not in nets], names.TRANSFORMER)
    _check_beside("transformer", transformer.files[0], transformer_config(model_def))
    _check_beside("vae", vae, read_config(model_def.get("vae_config") or VAE_CONFIG))
    encoder_files = weight_files(encoder, names.TEXT_ENCODER.folder)
    for file in encoder_files:
        check_safetensors(file)  # it is read when a prompt needs it; damage is better known now
    return ModelFiles(transformer, nets[0] if nets else None, vae, encoder_files, encoder_config, tokenizer)


def _build(
    files: ModelFiles,
    base_model_type: str,
    model_def: Mapping[str, Any],
    options: LoadOptions,
    device: torch.device,
    pipeline: type[P],
) -> P:
    """The pipeline of these files. Its text encoder is loaded when a prompt needs it."""
    share, quantize_encoder = options.share or _alone, options.quantize_text_encoder
    dtype = options.dtype or preferred_dtype(files.transformer, device)
    vae_dtype = options.vae_dtype or torch.float32
    encoder_dtype = torch.bfloat16 if dtype == torch.float16 else dtype  # Qwen3 can overflow float16
    config = model_def.get("transformer_config") or TRANSFORMER_CONFIG
    vae_config = model_def.get("vae_config") or VAE_CONFIG
    transformer = _shared_transformer(files.transformer, model_def, options, dtype, share)
    pipe = pipeline(
        transformer,
        lambda: share(
            "text_encoder",
            files.text_encoder,
            f"{files.encoder_config} {encoder_dtype} {quantize_encoder}",
            lambda: _text_encoder(files.encoder_config, files.text_encoder, encoder_dtype, quantize_encoder),
        ),
        share(
            "vae", [files.vae], f"{vae_config} {vae_dtype}", lambda: _vae(vae_config, files.vae, vae_dtype)
        ),
        AutoTokenizer.from_pretrained(files.tokenizer),
        read_config(model_def.get("scheduler_config") or SCHEDULER_CONFIGS[base_model_type]),
        device,
        prompt_cache=PromptCache(options.prompt_cache),
        encoder_id=text_encoding.identity(
            [*files.text_encoder, files.encoder_config],
            files.tokenizer,
            encoder_dtype,
            device,
            quantize_encoder,
        ),
    )
    if net := files.control:
        pipe.control = share(
            "control", [net], f"{config} {dtype}", lambda: control.load(net, transformer.config, dtype)
        )
    pipe.unified_solver = _is_unified(model_def, transformer)
    pipe.usual = _usual(base_model_type, pipe.unified_solver)
    pipe.residency = _shared_residency(options, device, share)
    return pipe


def _shared_residency(options: LoadOptions, device: torch.device, share: PartSharing) -> Residency:
    engine = options.offload or default_engine()
    return share(
        "residency",
        [],
        f"{device} {engine}",
        lambda: Residency(device, engine=engine, pinned_limit=pinned_bytes(options.pinned_share)),
    )


def _shared_transformer(
    checkpoint: formats.Checkpoint,
    model_def: Mapping[str, Any],
    options: LoadOptions,
    dtype: torch.dtype,
    share: PartSharing,
) -> ZImageTransformer2DModel:
    """In int8 and written to disk as such, where the options say so."""
    config = model_def.get("transformer_config") or TRANSFORMER_CONFIG
    quantize = options.quantize or bool(model_def.get("auto_quantize"))
    transformer = share(
        "transformer",
        checkpoint.files,
        f"{config} {dtype} {quantize}",
        lambda: _transformer(model_def, checkpoint, dtype, quantize),
    )
    if options.save_quantized and not checkpoint.quantized:
        _save_quantized(transformer, _int8_file(checkpoint.files, model_def, options.folders))
    return transformer


def _is_unified(model_def: Mapping[str, Any], transformer: ZImageTransformer2DModel) -> bool:
    """Whether to sample as TwinFlow does: the card says it, and of a file without a card its second time
    embedder.
    """
    has_card = "unified_solver" in model_def or "URLs" in model_def
    return bool(model_def.get("unified_solver")) if has_card else transformer.has_second_time_embedder


def _usual(base_model_type: str, unified: bool) -> Usual:
    if unified:
        return Usual(UnifiedConfig.sampling_steps)
    defaults = DEFAULTS[base_model_type]
    return Usual(
        defaults["num_inference_steps"],
        defaults.get("guidance_scale", Usual.guidance_scale),
        defaults.get("control_net_weight", Usual.control_context_scale),
    )


def _check_control(nets: Sequence[Path], *, alone: bool, wanted: bool) -> None:
    """UserError for too many or too few control networks."""
    if len(nets) > 1:
        raise UserError(f"{nets[0].name} and {nets[1].name} are two control networks: choose one of them.")
    if alone:
        raise UserError(f"{nets[0].name} is a control network alone: name the transformer's file, too.")
    if wanted and not nets:
        raise UserError(
            "This model needs a control network's file: name it in its card's modules, or beside the "
            "transformer's file."
        )


def _check_beside(part: str, weights_file: Path, config: Mapping[str, Any]) -> None:
    """UserError when the config.json beside a part's weights says that they are computed in another way."""
    file = weights_file.parent / "config.json"
    class_name, keys = UNSEEN[part]
    beside = read_config(file) if file.is_file() else {}
    if beside.get("_class_name") != class_name:
        return
    for key in keys:
        if key in beside and beside[key] != config.get(key, beside[key]):
            raise UserError(
                f"{file} has {key} = {beside[key]}, and this model is computed with {config[key]}: take the "
                f"model's own weights, or give the card a {part}_config."
            )


def _first_on_disk(needed: Required, folders: Folders) -> Path:
    error = None
    for source in needed.alternatives:
        try:
            return sources.find(source, needed.target, folders)
        except UserError as problem:
            error = error or problem
    raise error or UserError("The model's card names no file for one of its parts: correct the card.")


def _beside(model_def: Mapping[str, Any], encoder: Path, folders: Folders) -> tuple[Path, Path]:
    """(the text encoder's configuration, the folder of its tokenizer). UserError when one is missing."""
    config = sources.encoder_config(model_def, folders, encoder)
    tokenizer = sources.tokenizer(model_def, folders, encoder)
    if config is None or tokenizer is None:
        names = [sources.ENCODER_CONFIG] if config is None else sources.TOKENIZER_FILES
        raise UserError(
            f"The text encoder {encoder} has no {' and '.join(names)} beside it, and neither have the other "
            f"folders of models: put them there, or into {folders.ckpts / sources.TEXT_ENCODER_FOLDER}."
        )
    return config, tokenizer


def _transformer(
    model_def: Mapping[str, Any], checkpoint: formats.Checkpoint, dtype: torch.dtype, quantize: bool = False
) -> ZImageTransformer2DModel:
    config = ZImageConfig.from_dict(transformer_config(model_def))
    twin = any(name.startswith("t_embedder_2.") for name in checkpoint.entries)
    model = build(lambda: ZImageTransformer2DModel(config, second_time_embedder=twin))
    load_weights(model, checkpoint.files, dtype=dtype, names=names.TRANSFORMER)
    if quantize:
        weights.quantize(model, names.TRANSFORMER)
    return model


def _int8_file(files: Sequence[Path], model_def: Mapping[str, Any], folders: Folders) -> Path:
    """Where another start looks for the int8 form of these files: beside a single one; for shards, which lie
    in another program's folder, in ckpts/ under the name that the card has for it.
    """
    if len(files) == 1:
        stem = files[0].stem.replace("bf16", "quanto_bf16_int8")  # what the published int8 files are called
        known = stem if stem != files[0].stem else f"{stem}_quanto_int8"
        return files[0].with_name(f"{known}.safetensors")
    published = [file_name(source) for source in model_def.get("URLs") or [] if is_url(source)]
    int8 = [name for name in published if checkpoint_sizes.kind_by_name(name) == "int8"]
    own = f"{files[0].parent.parent.name}_quanto_bf16_int8.safetensors"
    return folders.ckpts / (int8[0] if int8 else own)


def _save_quantized(transformer: ZImageTransformer2DModel, target: Path) -> None:
    """Unless it is there already."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        weights.save_quantized(transformer, target, names.TRANSFORMER)
        log.warning("The int8 file %s was written; the next start can use it.", target)


def _text_encoder(
    config: Path, files: Sequence[Path], dtype: torch.dtype, quantize: bool = False
) -> Qwen3Model:
    model = build(functools.partial(text_encoding.make_text_encoder, config))
    unused = functools.partial(text_encoding.unused, model.config.num_hidden_layers)
    load_weights(model, files, dtype=dtype, names=names.TEXT_ENCODER, unused=unused)
    if quantize:
        weights.quantize(model, names.TEXT_ENCODER)
    return model


def _vae(config: str | Mapping[str, Any], file: Path, dtype: torch.dtype) -> AutoencoderKL:
    model = build(lambda: AutoencoderKL.from_config(dict(read_config(config))))
    load_weights(model, [file], dtype=dtype, names=names.VAE)
    return model


def _latent_rgb_file(vae_config: str | Mapping[str, Any]) -> Path:
    """A VAE with latents of its own brings its preview colours in a file beside its configuration."""
    own = ROOT / Path(vae_config).parent / "latent_rgb.json" if isinstance(vae_config, str) else None
    return own if own and own.is_file() else ROOT / CONFIGS / "latent_rgb.json"
