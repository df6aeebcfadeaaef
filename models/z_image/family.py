"""The Z-Image family's facts: its architectures, what they begin with, and where the program's own files lie.
No torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.weights.files import Folders

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_FOLDERS = Folders(ROOT, ROOT / "ckpts")
PROMPT_CACHE = ROOT / "ckpts" / ".prompts"
LORA_FOLDER = "z_image"  # in the folder of all LoRAs
CONFIGS = "models/z_image/configs"
TRANSFORMER_CONFIG = f"{CONFIGS}/transformer.json"
VAE_CONFIG = f"{CONFIGS}/vae.json"
CONTROL_TYPES = ("z_image_control", "z_image_control2", "z_image_control2_1")  # of Turbo
SCHEDULER_CONFIGS = {
    **dict.fromkeys(("z_image", *CONTROL_TYPES), f"{CONFIGS}/scheduler_turbo.json"),
    "z_image_base": f"{CONFIGS}/scheduler_base.json",
}
#: Qwen3-4B's dimensions, for when its config.json is not here yet
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
RESOLUTIONS = (
    "1024x1024",
    "1024x768",
    "768x1024",
    "1280x768",
    "768x1280",
    "1152x896",
    "896x1152",
    "1920x1088",
    "1088x1920",
    "1536x1536",
    "2048x2048",
    "768x768",
    "512x512",
)
#: pixels of a side: 8 by the VAE times 2 by the patches, and what was tried
SIZE_MULTIPLE, SMALLEST_SIDE, LARGEST_SIDE = 16, 64, 8192
QUANTIZATIONS = (None, "", "bf16", "int8")
#: settings that are keys of unified_sampler_config
SAMPLER_SETTINGS = (
    "sampling_style",
    "stochast_ratio",
    "extrapol_ratio",
    "sampling_order",
    "time_dist_ctrl",
    "rfba_gap_steps",
)
DEFAULTS: dict[str, dict[str, Any]] = {  # documents 001 (Turbo) and 003 (Base)
    "z_image": {"num_inference_steps": 8, "resolution": "1024x1024"},
    "z_image_base": {
        "num_inference_steps": 30,
        "resolution": "1024x1024",
        "guidance_scale": 4.0,
        "flow_shift": 6.0,
    },
    "z_image_control": {"num_inference_steps": 8, "control_net_weight": 0.75},
    "z_image_control2": {"num_inference_steps": 25, "control_net_weight": 0.75},
    "z_image_control2_1": {
        "num_inference_steps": 25,
        "control_net_weight": 0.65,
        "resolution": "1920x1088",
    },
}
