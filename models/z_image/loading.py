"""Builds a pipeline from a card's files."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import AutoTokenizer, Qwen3Model

from models.z_image import text_encoding
from models.z_image.generation import ZImageProcessor
from models.z_image.pipeline_z_image import ZImagePipeline
from models.z_image.preview import LatentRgb
from models.z_image.transformer_z_image import TimestepEmbedder, ZImageConfig, ZImageTransformer2DModel
from models.z_image.z_image_handler import (
    CONFIGS,
    ROOT,
    SCHEDULER_CONFIGS,
    TRANSFORMER_CONFIG,
    VAE_CONFIG,
    family_handler,
    find,
)
from shared import attention as attention_backends
from shared import offloading
from shared.errors import UserError
from shared.weights.files import check_safetensors

#: how some TwinFlow files spell the second time embedder
TWINFLOW_NAMES = {"extended_weights.t_embedder_2.": "t_embedder_2."}


def load(
    model_filename: str | Path | Sequence[str | Path],
    base_model_type: str,
    model_def: dict[str, Any],
    *,
    dtype: torch.dtype | None,
    vae_dtype: torch.dtype | None,
    text_encoder_filename: str | Path | None,
    attention: str,
    device: str | torch.device | None,
) -> tuple[ZImageProcessor, ZImagePipeline]:
    """See `family_handler.load_model`."""
    place = torch.device(device) if device else offloading.default_device()
    files = {
        need.role: need
        for need in family_handler.query_model_files(base_model_type, {"URLs": [], **model_def})
    }
    if text_encoder_filename is None:
        text_encoder_filename = _first_on_disk(
            files["text_encoder"].alternatives, files["text_encoder"].target
        )
    vae_file = _first_on_disk(files["vae"].alternatives, files["vae"].target)
    folder = model_def.get("text_encoder_folder")
    tokenizer_folder = ROOT / folder if folder else find(text_encoder_filename).parent

    names = [model_filename] if isinstance(model_filename, (str, Path)) else list(model_filename)
    paths = [find(name) for name in names]
    dtype = dtype or offloading.preferred_dtype(paths[0], place)
    transformer = _transformer(model_def, paths, dtype)
    vae_config = model_def.get("vae_config") or VAE_CONFIG
    pipe = ZImagePipeline(
        transformer,
        _text_encoder(tokenizer_folder, find(text_encoder_filename), dtype),
        _vae(vae_config, vae_file, vae_dtype or torch.float32),
        AutoTokenizer.from_pretrained(tokenizer_folder),
        read_config(model_def.get("scheduler_config") or SCHEDULER_CONFIGS[base_model_type]),
        place,
    )
    pipe.unified_solver = bool(model_def.get("unified_solver"))
    embedders = [m for m in transformer.modules() if isinstance(m, TimestepEmbedder)]
    pipe.residency = offloading.attach(pipe, place, keep_fp32=(transformer, *embedders))
    choose_attention = functools.partial(
        attention_backends.choose,
        otherwise=attention,
        card_rule=model_def.get("attention"),
        capability=attention_backends.capability_of(place),
    )
    transformer.set_attention_backend(choose_attention(None)[0])
    return ZImageProcessor(pipe, LatentRgb.read(_latent_rgb_file(vae_config)), choose_attention), pipe


def read_config(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """A configuration given in the card itself or as a path from the project's root."""
    if isinstance(config, Mapping):
        return dict(config)
    try:
        return json.loads((ROOT / config).read_text("utf-8"))
    except OSError as error:
        raise UserError(
            f"The configuration {config} cannot be read ({error.strerror}): correct the card."
        ) from error
    except ValueError as error:
        raise UserError(f"The configuration {config} is not JSON ({error}): correct the file.") from error


def _first_on_disk(alternatives: Sequence[str], target: str) -> Path:
    error = None
    for source in alternatives:
        try:
            return find(source, target)
        except UserError as problem:
            error = error or problem
    raise error or UserError("The model's card names no file for one of its parts: correct the card.")


def _transformer(
    model_def: Mapping[str, Any], files: list[Path], dtype: torch.dtype
) -> ZImageTransformer2DModel:
    config = ZImageConfig.from_dict(read_config(model_def.get("transformer_config") or TRANSFORMER_CONFIG))
    names = [name for file in files for name in check_safetensors(file)]
    twin = any("t_embedder_2." in name for name in names)
    model = offloading.build(lambda: ZImageTransformer2DModel(config, second_time_embedder=twin))
    offloading.load_weights(model, files, dtype=dtype, renames=TWINFLOW_NAMES)
    return model


def _text_encoder(folder: Path, file: Path, dtype: torch.dtype) -> Qwen3Model:
    model = offloading.build(functools.partial(text_encoding.make_text_encoder, folder))
    layers = model.config.num_hidden_layers
    offloading.load_weights(
        model, [file], dtype=dtype, unused=functools.partial(text_encoding.unused, layers)
    )
    return model


def _vae(config: str | Mapping[str, Any], file: Path, dtype: torch.dtype) -> AutoencoderKL:
    model = offloading.build(lambda: AutoencoderKL.from_config(read_config(config)))
    offloading.load_weights(model, [file], dtype=dtype)
    return model


def _latent_rgb_file(vae_config: str | Mapping[str, Any]) -> Path:
    """A VAE with latents of its own brings its preview colours in a file beside its configuration."""
    own = ROOT / Path(vae_config).parent / "latent_rgb.json" if isinstance(vae_config, str) else None
    return own if own and own.is_file() else ROOT / CONFIGS / "latent_rgb.json"
