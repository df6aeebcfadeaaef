"""Settings out of a picture and into the form, with what could not be taken over."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from shared.engine.catalog import Catalog, ModelInfo
from shared.engine.grid import axes_from
from shared.engine.loras import problems
from shared.errors import UserError
from shared.imaging import foreign, metadata
from shared.imaging.foreign import Foreign
from shared.settings import SETTINGS
from shared.settings_texts import parse_resolution
from shared.ui.text import DOT

LONG = 24  # characters of a value that a line about differences shows
OTHER_NOISE = "Other programs compute differently: expect a similar picture, not the same one."


@dataclass(frozen=True)
class Recalled:
    """Complete, valid settings and one line for everything that differs from the picture.

    axes: of a grid's picture, as `grid.axes_from` has them.
    """

    settings: dict[str, Any]
    report: list[str]
    axes: dict[str, list[str]] = field(default_factory=dict)


def from_file(path: Path, name: str, catalog: Catalog, model_id: str) -> Recalled:
    """Read a picture made by ZGP, Wan2GP, A1111, Forge, ComfyUI or InvokeAI.

    `name` is what the user calls it, `model_id` the chosen model.
    """
    found = metadata.read(path)
    if found is not None:
        return from_metadata(found, name, catalog, model_id)
    other = foreign.read(path)
    if other is not None:
        return from_foreign(other, name, catalog, model_id)
    raise UserError(
        f"{name} holds no settings: drop a picture made by ZGP, Wan2GP, A1111, Forge, ComfyUI or InvokeAI, "
        "as it was saved."
    )


def from_metadata(found: Mapping[str, Any], name: str, catalog: Catalog, model_id: str) -> Recalled:
    """As `from_file`, from metadata already read. SettingsError when a value cannot be used."""
    settings = dict(metadata.settings_from(dict(found)))
    report = [f"The form now has the settings of {name}."]
    wanted = settings.get("model_type")
    if wanted not in catalog.models:
        settings["model_type"] = model_id
        report.append(f"Its model '{wanted}' is not here: {catalog.model(model_id).name} stays.")
    return replace(complete(settings, report, catalog), axes=axes_from(found))


def from_foreign(found: Foreign, name: str, catalog: Catalog, model_id: str) -> Recalled:
    """As `from_file`, from another program's settings. What cannot be used is left out and named."""
    report = [f"The form now has the settings of {name}, made by {found.program}.", OTHER_NOISE]
    model = _model_named(found.model, catalog)
    if model is None:
        model = catalog.model(model_id)
        named = f"Its model '{found.model}' is not here" if found.model else "It names no model"
        report.append(f"{named}: {model.name} stays.")
    settings = _fitting(found.settings, model, report)
    settings |= _loras_here(found.loras, model, report)
    usable = {}
    for one, value in settings.items():
        try:
            catalog.validate({"prompt": "-", "model_type": model.id, "loras_optional": True, one: value})
            usable[one] = value
        except UserError as error:
            report.append(f"Not taken over: {error}.")
    return complete({**usable, "model_type": model.id}, [*report, *found.lines], catalog)


def complete(settings: Mapping[str, Any], report: list[str], catalog: Catalog) -> Recalled:
    """The settings made whole, and `report` with what could not be taken over. SettingsError as above.

    The prompt may be empty.
    """
    prompt = settings.get("prompt") or ""
    # LoRAs that are not here do not keep the rest of the settings from coming back: the form marks them.
    validated = catalog.validate({**settings, "prompt": prompt or "-", "loras_optional": True})
    validated.settings["loras_optional"] = bool(settings.get("loras_optional"))
    validated.settings["prompt"] = prompt
    report = [*report, *validated.notes]
    report += problems(catalog.model(settings["model_type"]), validated.settings)
    report += [f"Ignored {key}: {reason}." for key, reason in validated.ignored.items()]
    return Recalled(validated.settings, report)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """One line that names the settings whose values changed; none when nothing did."""
    changes = [
        _change(SETTINGS[name].label, before[name], after[name])
        for name in SETTINGS
        if name in before and name in after and before[name] != after[name]
    ]
    return [f"Changed: {DOT.join(changes)}."] if changes else []


def _change(label: str, before: Any, after: Any) -> str:
    old, new = map(_shown, (before, after))
    return label if max(len(old), len(new)) > LONG else f"{label} {old} → {new}"


def _shown(value: Any) -> str:
    if value in ("", []):
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- other programs' names


def _model_named(name: str, catalog: Catalog) -> ModelInfo | None:
    """The model whose file or name is called so, whatever the case, signs, extension and number format."""
    wanted = _bare(_FORMAT.sub("", name.lower()))
    if not wanted:
        return None
    for model in catalog.models.values():
        files = [source.lower() for one in model.required[:1] for source in one.alternatives]
        if wanted in (_bare(model.name), *(_bare(_FORMAT.sub("", file)) for file in files)):
            return model
    return None


_FORMAT = re.compile(r"[-_.](bf16|fp16|fp32|fp8|e4m3fn|e5m2|scaled|int8|quanto|nvfp4|q\d\w*)(?=[-_.]|$)")


def _bare(name: str) -> str:
    """Letters and digits of a file's name without its folders and extension."""
    stem = re.sub(r"\.(safetensors|gguf|ckpt|pt|sft)$", "", PurePosixPath(name.replace("\\", "/")).name)
    return re.sub(r"[^a-z0-9]", "", stem.lower())


def _fitting(settings: Mapping[str, Any], model: ModelInfo, report: list[str]) -> dict[str, Any]:
    """The settings without what is merely off, and the size as the model paints it."""
    fitting = dict(settings)
    if fitting.get("guidance_scale") == 0 and "guidance_scale" not in model.settings:
        del fitting["guidance_scale"]
    if "resolution" in fitting:
        multiple = int(model.capabilities.get("size_multiple", 16))
        given = parse_resolution(fitting["resolution"])
        width, height = (max(multiple, round(side / multiple) * multiple) for side in given)
        if (width, height) != given:
            was, fitting["resolution"] = fitting["resolution"], f"{width}x{height}"
            report.append(f"Its size {was} became {width}x{height}: sizes are multiples of {multiple} here.")
    return fitting


def _loras_here(loras: tuple[tuple[str, float], ...], model: ModelInfo, report: list[str]) -> dict[str, Any]:
    """The settings for those LoRAs whose files are in the model's folder under that name."""
    if not loras:
        return {}
    if model.lora_folder is None:
        report.append(f"Its LoRAs were left out: {model.name} has none.")
        return {}
    by_name = {_bare(entry.name): entry.name for entry in reversed(model.loras().entries())}
    here = [(by_name[_bare(name)], strength) for name, strength in loras if _bare(name) in by_name]
    for name, _ in loras:
        if _bare(name) not in by_name:
            report.append(f"Its LoRA '{name}' was left out: it is not in the LoRA folder.")
    names, strengths = [name for name, _ in here], [f"{strength:g}" for _, strength in here]
    return {"activated_loras": names, "loras_multipliers": " ".join(strengths)} if here else {}
