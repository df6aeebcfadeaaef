"""Settings out of a picture and into the form, with what could not be taken over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.engine.catalog import Catalog
from shared.engine.loras import problems
from shared.errors import UserError
from shared.imaging import metadata


@dataclass(frozen=True)
class Recalled:
    """Complete, valid settings and one line for everything that differs from the picture."""

    settings: dict[str, Any]
    report: list[str]


def from_file(path: Path, name: str, catalog: Catalog, model_id: str) -> Recalled:
    """Read a picture made by ZGP or Wan2GP; `name` is what the user calls it, `model_id` the chosen model."""
    found = metadata.read(path)
    if found is None:
        raise UserError(f"{name} holds no settings: drop a picture made by ZGP or Wan2GP, as it was saved.")
    return from_metadata(found, name, catalog, model_id)


def from_metadata(found: Mapping[str, Any], name: str, catalog: Catalog, model_id: str) -> Recalled:
    """As `from_file`, from metadata already read. SettingsError when a value cannot be used."""
    settings = dict(metadata.settings_from(dict(found)))
    report = [f"The form now has the settings of {name}."]
    wanted = settings.get("model_type")
    if wanted not in catalog.models:
        settings["model_type"] = model_id
        report.append(f"Its model '{wanted}' is not here: {catalog.model(model_id).name} stays.")
    return complete(settings, report, catalog)


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
