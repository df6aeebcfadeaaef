"""PEFT's configuration of a LoRA: in the file's header, or in adapter_config.json beside it. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.wording import printable

MAX_CONFIG_BYTES = 1_000_000


@dataclass(frozen=True)
class PeftConfig:
    """What of a LoraConfig changes an adapter whose file has no alpha: the scale, alpha / rank."""

    alpha: float | None
    alphas: dict[str, float] = field(default_factory=dict)
    root_rank: bool = False  # "rslora": alpha / sqrt(rank)
    neumann: bool = True  # OFT: rotations by the truncated series, not by the inverse

    def scale(self, module: str, rank: int) -> float:
        pattern = next((p for p in self.alphas if module == p or module.endswith("." + p)), None)
        alpha = self.alpha if pattern is None else self.alphas[pattern]
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.root_rank else rank)


def read_config(path: Path, metadata: Mapping[str, str], prefixes: Iterable[str]) -> PeftConfig | None:
    """PEFT's configuration: from the header, or from adapter_config.json beside a file that PEFT saved.

    Sources: diffusers packs a LoraConfig as JSON into "lora_adapter_metadata", each key behind the name of
    its model and a dot; PEFT writes it to adapter_config.json.
    """
    if "lora_adapter_metadata" in metadata:
        text, name = metadata["lora_adapter_metadata"], printable(path.name, 100)
        if len(text) > MAX_CONFIG_BYTES:
            raise UserError(f"The lora_adapter_metadata of {name} is longer than a configuration.")
        config = _object(text, f"the lora_adapter_metadata of {name}")
        names = ("transformer.", "diffusion_model.", "")
        config = {
            key.removeprefix(prefix): value
            for prefix in reversed(names)
            for key, value in config.items()
            if key.startswith(prefix)
        }
        return _config(config)
    beside = path.with_name("adapter_config.json")
    saved_by_peft = path.stem == "adapter_model" or any(p.startswith("base_model.model.") for p in prefixes)
    if not saved_by_peft or not beside.is_file():
        return None
    if beside.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"{printable(str(beside), 200)} is larger than a configuration: put the right one there or remove it.")
    return _config(_object(beside.read_bytes(), printable(str(beside), 200)))


def _object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}): mend it or remove it.") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object: mend it or remove it.")
    return value


def _config(config: Mapping[str, Any]) -> PeftConfig:
    patterns = config.get("alpha_pattern")
    alphas = {
        # PEFT reads these as regular expressions; in practice they are names, anchored or escaped.
        str(pattern).lstrip("^").rstrip("$").replace("\\", ""): float(alpha)
        for pattern, alpha in (patterns.items() if isinstance(patterns, dict) else ())
        if _is_number(alpha)
    }
    alpha = config.get("lora_alpha")
    return PeftConfig(
        None if alpha is None or not _is_number(alpha) else float(alpha),
        alphas,
        bool(config.get("use_rslora")),
        bool(config.get("use_cayley_neumann", True)),
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
