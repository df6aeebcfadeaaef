"""Settings out of a picture and into the form, with what could not be taken over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.imaging import metadata
from shared.imaging.foreign import pasted, reader
from shared.imaging.foreign.reader import Foreign
from shared.imaging.metadata import MAX_METADATA_BYTES
from shared.jobs.grid import axes_from
from shared.library.catalog import Catalog
from shared.library.job_loras import problems
from shared.library.translation import translated
from shared.settings.aliases import OTHER_WORDS
from shared.settings.table import SETTINGS
from shared.ui.components.text import DOT

PROGRAMS = (
    "A1111, Forge, ComfyUI, SwarmUI, InvokeAI, mflux, RuinedFooocus, Civitai or stable-diffusion.cpp"
)
TEXT_FILES = (".json", ".txt")
TEXTS = "expected a workflow of ComfyUI, settings as JSON, or the text that A1111 shows below a picture"
LONG = 24  # characters of a value that a line about differences shows


@dataclass(frozen=True)
class Recalled:
    """Complete, valid settings and one line for everything that differs from the picture.

    axes: of a grid's picture, as `grid.axes_from` has them.
    """

    settings: dict[str, Any]
    report: list[str]
    axes: dict[str, list[str]] = field(default_factory=dict)


def from_file(path: Path, name: str, catalog: Catalog, model_id: str) -> Recalled:
    """Read a picture made by ZGP, Wan2GP or one of PROGRAMS, or such settings as text.

    `name` is what the user calls it, `model_id` the chosen model.
    """
    if path.suffix.lower() in TEXT_FILES:
        return _from_text_file(path, name, catalog, model_id)
    found = metadata.read(path)
    if found is not None:
        return from_metadata(found, name, catalog, model_id)
    other = reader.read(path)
    if other is not None:
        return from_foreign(other, name, catalog, model_id)
    raise UserError(
        f"{name} holds no settings: drop a picture made by ZGP, Wan2GP, {PROGRAMS}, as it was saved."
    )


def from_text(text: str, name: str, catalog: Catalog, model_id: str) -> Recalled:
    """As `from_file`, from the data of a picture as text: see `pasted`."""
    found = pasted.read(text)
    if not found:
        raise UserError(f"{name} holds no settings: {TEXTS}.")
    if len(found) > 1:
        raise UserError(f"{name} holds the data of {len(found)} pictures: take those of one.")
    [one] = found
    if isinstance(one, Foreign):
        return from_foreign(one, name, catalog, model_id)
    return from_metadata({"model_type": model_id, **one}, name, catalog, model_id)


def _from_text_file(path: Path, name: str, catalog: Catalog, model_id: str) -> Recalled:
    try:
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise ValueError("it is too large")
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix.lower() == ".json" else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} cannot be read ({error}): {TEXTS}.") from error
    if isinstance(content, dict) and not pasted.from_json(content) and {*SETTINGS, *OTHER_WORDS} & {*content}:
        catalog.validate({"model_type": model_id, **content})  # names what other programs call a prompt
        return from_metadata({"model_type": model_id, **content}, name, catalog, model_id)
    return from_text(text, name, catalog, model_id)


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
    report = [f"The form now has the settings of {name}, made by {found.program}."]
    settings, lines = translated(found, catalog, model_id)
    return complete(settings, [*report, *lines], catalog)


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
