"""What the program needs to know of the Z-Image family, and how its models are loaded.

Everything but `load_model` works without torch, so that the page and the listings can ask.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.family import Fit
from models.z_image import memory
from models.z_image.checkpoints import checkpoint_sizes, lora_names, recognition, sources
from models.z_image.checkpoints.part_configs import part_configs, transformer_config
from models.z_image.family import (
    CONFIGS,
    CONTROL_TYPES,
    DEFAULT_FOLDERS,
    DEFAULTS,
    LARGEST_SIDE,
    LORA_FOLDER,
    PROMPT_CACHE,
    QUANTIZATIONS,
    RESOLUTIONS,
    ROOT,
    SAMPLER_SETTINGS,
    SIZE_MULTIPLE,
    SMALLEST_SIDE,
)
from models.z_image.unified_sampler import check_offered, resolve, time_grid
from shared.errors import UserError
from shared.gpu.footprint import Needs, Offers
from shared.gpu.interrupt import imported
from shared.imaging.hires import Hires
from shared.loras.names import ModelNames
from shared.settings.parsing import parse_outpaint, parse_parameters, parse_resolution
from shared.settings.table import ATTENTION_PACKAGES
from shared.weights.files import Folders, Required

if TYPE_CHECKING:
    import torch

    from models.z_image.job.job import ZImageProcessor
    from models.z_image.loading import PartSharing
    from models.z_image.pipeline_z_image import ZImagePipeline


class family_handler:
    """The family's entry in the registry; the method names are those of the model documents."""

    @staticmethod
    def query_supported_types() -> list[str]:
        return list(DEFAULTS)

    @staticmethod
    def query_model_family() -> str:
        return "z_image"

    @staticmethod
    def query_family_infos() -> dict[str, tuple[int, str]]:
        return {"z_image": (120, "Z-Image")}

    @staticmethod
    def query_family_maps() -> tuple[dict[str, str], dict[str, list[str]]]:
        """(equivalent architectures, compatible ones)."""
        alike = {"z_image_base": "z_image", "z_image_control2_1": "z_image_control2"}
        return alike, {"z_image": ["z_image_base", *CONTROL_TYPES]}

    @staticmethod
    def query_model_def(base_model_type: str, model_def: Mapping[str, Any]) -> dict[str, Any]:
        """What acts on this model, and the sizes it can draw."""
        unified = bool(model_def.get("unified_solver"))  # these were trained with their guidance inside
        guided = base_model_type == "z_image_base" and not unified
        return {
            "guidance": guided,
            "negative_prompt": not unified,
            "flow_shift": guided,
            "NAG": not guided and not unified,
            "seed_variety": True,
            "max_tokens": 512,  # that are read of a prompt
            "unified": unified,
            "loras": True,
            "image": True,
            "inpaint": True,
            "hires": True,
            "control": base_model_type in CONTROL_TYPES or bool(model_def.get("modules")),
            "attention": any(map(importlib.util.find_spec, ATTENTION_PACKAGES.values())),
            "size_multiple": SIZE_MULTIPLE,
            "min_size": SMALLEST_SIDE,
            "max_size": LARGEST_SIDE,
            "resolutions": list(model_def.get("resolutions") or RESOLUTIONS),
        }

    @staticmethod
    def query_model_files(base_model_type: str, model_def: Mapping[str, Any]) -> list[Required]:
        """The files to have on disk before `load_model`."""
        transformer = Required("transformer", list(model_def["URLs"]))
        return [
            transformer,
            *sources.modules(model_def),
            *sources.text_encoder(model_def),
            sources.vae(model_def),
            *sources.preloads(model_def),
        ]

    @staticmethod
    def register_lora_cli_args(parser: argparse._ActionsContainer, lora_root: str = "loras") -> None:
        """Add the flag for this family's LoRA folder."""
        parser.add_argument(
            "--lora-dir-z-image",
            metavar="DIR",
            help=f"folder of the LoRAs for Z-Image models (default: {lora_root}/{LORA_FOLDER})",
        )

    @staticmethod
    def get_lora_dir(base_model_type: str, args: Any, lora_root: str | Path = "loras") -> Path:
        """The folder of this model's LoRAs. args: has the values of the flags as attributes."""
        return Path(getattr(args, "lora_dir_z_image", None) or Path(lora_root) / LORA_FOLDER)

    @staticmethod
    def query_lora_names(base_model_type: str, model_def: Mapping[str, Any]) -> ModelNames:
        """The names by which LoRA files know this model's modules; one object for models of one shape."""
        config = transformer_config(model_def)
        return _lora_names(json.dumps(config, sort_keys=True), bool(model_def.get("unified_solver")))

    @staticmethod
    def query_memory(
        base_model_type: str,
        model_def: Mapping[str, Any],
        settings: Mapping[str, Any],
        folders: Folders | None = None,
        *,
        lora_bytes: int = 0,
    ) -> Needs:
        """What a job with these settings needs besides the weights."""
        folders = folders or DEFAULT_FOLDERS
        configs, control = part_configs(model_def, folders), None
        if modules := sources.modules(model_def):
            control = checkpoint_sizes.control_layout(modules[0], configs["transformer"], folders)
        return memory.needs(configs, settings, lora_bytes=lora_bytes, control=control)

    @staticmethod
    def query_offers(
        base_model_type: str,
        model_def: Mapping[str, Any],
        folders: Folders | None = None,
        float_bytes: int | None = 2,
    ) -> Offers:
        """The files that can serve as each part, and their sizes as loaded with floats of `float_bytes`
        (see checkpoint_sizes.offers). UserError when a part's only file is damaged.
        """
        folders = folders or DEFAULT_FOLDERS
        needed = family_handler.query_model_files(base_model_type, model_def)
        return checkpoint_sizes.offers(needed, part_configs(model_def, folders), folders, float_bytes)

    @staticmethod
    def query_precisions(
        base_model_type: str, model_def: Mapping[str, Any], folders: Folders | None = None
    ) -> list[str]:
        """How the transformer's files are stored that are here or can be fetched, by their names, the most
        precise first.
        """
        return checkpoint_sizes.precisions(list(model_def["URLs"]), folders or DEFAULT_FOLDERS)

    @staticmethod
    def query_download_bytes(
        base_model_type: str,
        model_def: Mapping[str, Any],
        required: Required,
        source: str,
        folders: Folders | None = None,
    ) -> int:
        """About how large the file `source` of a requirement is that is not on disk."""
        folders = folders or DEFAULT_FOLDERS
        return checkpoint_sizes.download_bytes(required, source, part_configs(model_def, folders), folders)

    @staticmethod
    def query_fit(
        base_model_type: str, model_def: Mapping[str, Any], file: Path, folders: Folders | None = None
    ) -> Fit:
        """What a checkpoint file would be to such a model. UserError, one sentence, when it does not fit."""
        folders = folders or DEFAULT_FOLDERS
        config, layout = transformer_config(model_def), None
        if modules := sources.modules(model_def):
            layout = checkpoint_sizes.control_layout(modules[0], config, folders)
        return recognition.fit(file, config, bool(model_def.get("unified_solver")), layout)

    @staticmethod
    def query_prompt_tokens(
        base_model_type: str, model_def: Mapping[str, Any], folders: Folders | None = None
    ) -> Callable[[str], int] | None:
        """What counts a prompt's tokens as the pipeline does, its chat template included; None while the
        tokenizer is not on disk.
        """
        from models.z_image.text_encoder import prompt_tokens

        name = sources.TOKENIZER_FILES[0]
        place = sources.tokenizer(model_def, folders or DEFAULT_FOLDERS, needed=[name])
        return prompt_tokens.counter(place / name, (place / name).stat().st_mtime_ns) if place else None

    @staticmethod
    def update_default_settings(
        base_model_type: str, model_def: Mapping[str, Any], ui_defaults: dict[str, Any]
    ) -> None:
        ui_defaults.update(DEFAULTS[base_model_type])

    @staticmethod
    def fix_settings(
        base_model_type: str,
        settings_version: float,
        model_def: Mapping[str, Any],
        ui_defaults: dict[str, Any],
    ) -> None:
        """Migrate settings of older versions; there are none yet."""

    @staticmethod
    def validate_generative_settings(
        base_model_type: str, model_def: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> str | None:
        """A sentence when these settings cannot run on this model; the common ranges are checked before."""
        try:
            family_handler.query_time_grid(base_model_type, model_def, settings)
            _check_pictures(settings)
        except UserError as error:
            return str(error)
        return None

    @staticmethod
    def query_time_grid(
        base_model_type: str, model_def: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> list[float] | None:
        """The noise levels (1 to 0) that the unified sampler visits; None for models that do not use it.

        Raises UserError for settings out of range.
        """
        if not model_def.get("unified_solver"):
            return None
        chosen = {name: settings[name] for name in SAMPLER_SETTINGS if name in settings}
        solver = settings.get("sample_solver") or "unified"
        config = resolve(solver, settings["num_inference_steps"], chosen)
        check_offered(config)
        return time_grid(config)

    @staticmethod
    def get_rgb_factors(base_model_type: str) -> tuple[Sequence[Sequence[float]], Sequence[float]]:
        """(16 x 3 factors, bias) from latent to preview colours."""
        table = json.loads((ROOT / CONFIGS / "latent_rgb.json").read_text("utf-8"))
        return table["factors"], table["bias"]

    @staticmethod
    def load_model(
        model_filename: str | Path | Sequence[str | Path],
        base_model_type: str = "z_image",
        model_def: Mapping[str, Any] | None = None,
        *,
        quantizeTransformer: bool = False,
        dtype: torch.dtype | None = None,
        VAE_dtype: torch.dtype | None = None,
        text_encoder_filename: str | Path | None = None,
        text_encoder_quantization: str | None = None,
        attention: str = "auto",
        device: str | torch.device | None = None,
        prompt_cache: Path | None = PROMPT_CACHE,
        share: PartSharing | None = None,
        save_quantized: bool = False,
        folders: Folders | None = None,
        pinned_share: float | None = None,
        offload: str = "",
    ) -> tuple[ZImageProcessor, ZImagePipeline]:
        """(processor for jobs, callable pipeline). Raises UserError naming a file that is missing or does
        not fit.

        quantizeTransformer: its linear layers become int8 once loaded; text_encoder_quantization "int8":
        those of the text encoder. Files that are quantized stay as they are.
        dtype: of transformer and text encoder; default bfloat16 on a card, float32 on a CPU (bfloat16 is
        slow there). VAE_dtype: default float32; float16 overflows in this VAE. prompt_cache: the folder that
        encoded prompts are kept in; None keeps them in memory only. share: gives parts that another model has
        already loaded (see loading.PartSharing); the processor's `apply_plan` then says what goes where.
        save_quantized: write an int8 file beside an unquantized transformer. folders: where files are looked
        for, by default in the project and its ckpts/. pinned_share: of the RAM, to page-lock at most; default
        what the system bears. offload: what moves the weights to the card, "mmgp" (the default where it is
        installed) or "stream".
        """
        imported("models.z_image.loading")
        from models.z_image.loading import LoadOptions, load

        if text_encoder_quantization not in QUANTIZATIONS:
            raise UserError(
                f"text_encoder_quantization came as {text_encoder_quantization!r}; expected int8 or bf16."
            )
        options = LoadOptions(
            quantize=quantizeTransformer,
            quantize_text_encoder=text_encoder_quantization == "int8",
            dtype=dtype,
            vae_dtype=VAE_dtype,
            text_encoder_filename=text_encoder_filename,
            attention=attention,
            device=device,
            prompt_cache=prompt_cache,
            share=share,
            save_quantized=save_quantized,
            folders=folders or DEFAULT_FOLDERS,
            pinned_share=pinned_share,
            offload=offload,
        )
        return load(model_filename, base_model_type, model_def or {}, options)


def _check_pictures(settings: Mapping[str, Any]) -> None:
    """UserError for settings of pictures that do not go together."""
    if settings.get("image_mask") and not settings.get("image_start"):
        raise UserError(
            "image_mask came without image_start: give the picture that is repainted, or leave the mask out."
        )
    if parse_outpaint(settings.get("outpaint", ""), 1000, 1000) != (0, 0, 0, 0) and not settings.get(
        "image_start"
    ):
        raise UserError(
            "outpaint came without image_start: give the picture that is extended, or leave it out."
        )
    hires = Hires.of(settings)
    if hires is not None and not settings.get("image_start"):
        hires.size(parse_resolution(settings["resolution"]))  # of a picture, the job asks it
    if settings.get("hires_tile", 0) % 16 or 0 < settings.get("hires_tile", 0) < 64:
        raise UserError(
            f"hires_tile came as {settings['hires_tile']}; expected 0, or a multiple of 16 from 64 on."
        )
    if settings.get("control_start", 0) > settings.get("control_end", 100):
        raise UserError(
            f"control_start is {settings['control_start']:g} and control_end {settings['control_end']:g}; "
            "expected the start not to be after the end."
        )
    if settings.get("image_guide"):
        from shared.imaging import preprocess  # OpenCV: only where it is used

        chosen = preprocess.find(settings["control_preprocessor"])
        preprocess.checked(chosen, parse_parameters(settings["control_parameters"]))


@functools.cache
def _lora_names(config: str, second_time_embedder: bool) -> ModelNames:
    return lora_names.model_names(json.loads(config), second_time_embedder)
