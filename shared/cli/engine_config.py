"""What wgp_config.json and the flags make of an engine; a flag that is given wins over the file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from shared import config as config_file
from shared.engine.configuration import EngineConfig, queue_of
from shared.gpu.planner import RESERVED, Overrides
from shared.imaging.saving import Rules
from shared.library.model_info import LoraFolders


def configuration(options: argparse.Namespace, root: Path, engine_options: Mapping[str, Any]) -> EngineConfig:
    """What wgp_config.json and the flags, which win, say now. UserError when a folder cannot be used."""
    folder = (options.config or root).absolute()
    found, notices = config_file.read(folder)
    given = {
        "notices": tuple(notices),
        "file_folder": folder,
        "saved": (options.settings or root / "settings").absolute(),
        "lock_config": options.lock_config,
        "lock_model": options.lock_model,
        "advanced": options.advanced,
        "reread": partial(configuration, options, root, engine_options),
        **_places(found, options, root),
        **_engine_flags(found, options),
        **engine_options,
    }
    return EngineConfig.at(root, **given)


def _places(found: config_file.Config, options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """The folders of models, LoRAs, profiles and pictures."""
    ckpts, *others = found.folders(root)
    given = {
        name: str(Path(value).absolute())
        for name, value in vars(options).items()
        if name.startswith("lora_dir_") and value
    }
    loras = root / found.loras_root if options.loras is None else options.loras
    profiles = root / found.profiles_dir if options.profiles_dir is None else options.profiles_dir
    return {
        "ckpts": ckpts,
        "others": tuple(others),
        "lora_folders": LoraFolders(loras.absolute(), given),
        "profiles": profiles.absolute(),
        "output_dir": (root / found.save_path).absolute(),
    }


def _engine_flags(found: config_file.Config, options: argparse.Namespace) -> dict[str, Any]:
    wanted = {"seed": options.seed, "num_inference_steps": options.steps}
    fmt, quality = config_file.CODECS[found.image_output_codec]
    flags = {
        "gpu": options.gpu or "",
        "overrides": _overrides(found, options),
        "save_quantized": options.save_quantized or found.save_quantized,
        "verbose": options.verbose,
        "default_settings": {name: value for name, value in wanted.items() if value is not None},
        "house_settings": {"image_format": fmt},
        "saving": Rules(found.output_filename, found.metadata_type == "metadata", fmt, quality),
        "default_model": found.default_model,
    }
    if options.output_dir is not None:
        folder = options.output_dir.absolute()  # with a queue of its own
        flags |= {"output_dir": folder, "database": queue_of(folder), "dated_folders": False}
    return flags


def _overrides(found: config_file.Config, options: argparse.Namespace) -> Overrides:
    """What the planner is to obey; a flag that is given wins over the file."""
    profile = f"{found.profile:g}" if found.profile > 0 else ""
    preload = found.preload_in_VRAM or None if options.preload is None else options.preload
    safety = options.vram_safety_coefficient
    return Overrides(
        offload=options.offload or found.offload,
        profile=options.profile or profile,
        preload=None if preload is None else preload << 20,
        dtype="bf16" if options.bf16 else "fp16" if options.fp16 else "",
        attention=options.attention or found.attention_mode,
        reserved=options.perc_reserved_mem_max or RESERVED,
        safety=found.vram_safety_coefficient if safety is None else safety,
        compile=options.compile or bool(found.compile),
    )
