"""Other programs' settings as this catalog has them: its models, its LoRAs, its ranges."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shared.errors import UserError
from shared.imaging.foreign.reader import Foreign
from shared.library.catalog import Catalog
from shared.library.job_loras import bare
from shared.library.model_info import ModelInfo
from shared.settings.parsing import parse_resolution

OTHER_NOISE = "Other programs compute differently: expect a similar picture, not the same one."


def translated(found: Foreign, catalog: Catalog, model_id: str) -> tuple[dict[str, Any], list[str]]:
    """The settings, with `model_id` where the model is not here, and a line for all that differs or is left
    out.
    """
    report = [OTHER_NOISE]
    model = _model_named(found.model, catalog, found.control)
    if model is None and found.control:
        report.append(f"Its control network '{found.control}' was left out: no model here has both.")
        model = _model_named(found.model, catalog)
    if model is None:
        model = catalog.model(model_id)
        named = f"Its model '{found.model}' is not here" if found.model else "It names no model"
        report.append(f"{named}: {model.name} stays.")
    settings = _fitting(found.settings, model, report)
    if found.control and "image_guide" not in model.settings:
        settings = {name: value for name, value in settings.items() if not name.startswith("control_")}
    settings |= _loras_here(found.loras, model, report)
    usable = {}
    for one, value in settings.items():
        try:
            catalog.validate({"prompt": "-", "model_type": model.id, "loras_optional": True, one: value})
            usable[one] = value
        except UserError as error:
            report.append(f"Not taken over: {error}.")
    return {**usable, "model_type": model.id}, [*report, *found.lines]


def as_task(values: Any, catalog: Catalog, model_id: str) -> tuple[Any, list[str]]:
    """The settings of a task's values, and lines about them where they came from another program.

    model_id: the model of settings that name none.
    """
    if isinstance(values, Foreign):
        return translated(values, catalog, model_id)
    if isinstance(values, dict):
        return {**values, "model_type": values.get("model_type") or model_id}, []
    return values, []


def _model_named(name: str, catalog: Catalog, control: str = "") -> ModelInfo | None:
    """The model whose file or name is called so, whatever the case, signs, extension and number format.
    control: its control network's file, for a model that has one.
    """
    wanted, network = _plain(name), _plain(control)
    if not wanted:
        return None
    for model in catalog.models.values():
        if network and network not in _names_of(model, CONTROL_ROLE):
            continue
        if wanted in (bare(model.name), *_names_of(model, TRANSFORMER_ROLE)):
            return model
    return None


def _names_of(model: ModelInfo, role: str) -> list[str]:
    return [_plain(source) for one in model.required if one.role == role for source in one.alternatives]


def _plain(file: str) -> str:
    return bare(_FORMAT.sub("", file.lower()))


TRANSFORMER_ROLE, CONTROL_ROLE = "transformer", "module0"
_FORMAT = re.compile(r"[-_.](bf16|fp16|fp32|fp8|e4m3fn|e5m2|scaled|int8|quanto|nvfp4|q\d\w*)(?=[-_.]|$)")


# ---- what fits here ----------------------------------------------------------------------------------------


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
    by_name = {bare(entry.name): entry.name for entry in reversed(model.loras().entries())}
    here = [(by_name[bare(name)], strength) for name, strength in loras if bare(name) in by_name]
    for name, _ in loras:
        if bare(name) not in by_name:
            report.append(f"Its LoRA '{name}' was left out: it is not in the LoRA folder.")
    names, strengths = [name for name, _ in here], [f"{strength:g}" for _, strength in here]
    return {"activated_loras": names, "loras_multipliers": " ".join(strengths)} if here else {}
