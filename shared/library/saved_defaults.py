"""What the user saved as a model's defaults: settings/MODEL_settings.json, as in Wan2GP.

Only what differs from the factory values is kept, so that a card's later improvements reach the user. Files
of Wan2GP, which hold everything, are read too. No torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shared.files import json_file
from shared.settings.messages import nearest
from shared.settings.table import SETTINGS, SettingsError
from shared.settings.validation import validate
from shared.settings.wan2gp import WAN2GP_SETTINGS

log = logging.getLogger(__name__)

#: of one picture, not of a model
NEVER = {"model_type", "prompt", *(name for name, setting in SETTINGS.items() if setting.picture)}


def path_of(folder: Path, model_id: str) -> Path:
    """The file of one model."""
    return folder / f"{model_id}_settings.json"


def read(
    folder: Path, model_id: str, factory: Mapping[str, Any], capabilities: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """(what wins over `factory`, what the user must be told); a damaged file is set aside."""
    path = path_of(folder, model_id)
    if not path.exists():
        return {}, []
    try:
        content = json_file.parse(path)
    except OSError as error:
        return {}, [f"{path} cannot be read ({error.strerror or error}): the factory defaults apply."]
    except ValueError as error:
        aside = json_file.set_aside(path, "damaged")
        told = f"{path} cannot be read ({error}); it is now {aside.name}, and the factory defaults apply."
        log.warning("%s", told)
        return {}, [told]
    found: dict[str, Any] = {}
    notices = []
    for name, value in content.items():
        if value is None or name in NEVER or name in WAN2GP_SETTINGS:
            continue
        if name not in SETTINGS:
            notices.append(f"{path.name} has '{name}', which is no setting{_hint(name)}; it does nothing.")
        elif name not in factory:
            log.debug("%s: %s does not act on this model.", path, name)
        else:
            try:
                checked = validate({"prompt": "-", name: value}, factory, capabilities)
            except SettingsError as error:
                notices.append(f"{path.name}: {error}; the factory default applies.")
            else:
                found[name] = checked.settings[name]
    return found, notices


def _hint(name: str) -> str:
    known = nearest(name, SETTINGS)
    return f" (the nearest one is '{known}')" if known else ""


def write(
    folder: Path, model_id: str, settings: Mapping[str, Any], factory: Mapping[str, Any]
) -> dict[str, Any]:
    """Keep what of `settings` differs from `factory`, which is returned. UserError when it cannot be."""
    changed = {
        name: settings[name]
        for name in factory
        if name not in NEVER and name in settings and settings[name] != factory[name]
    }
    if changed:
        json_file.write(path_of(folder, model_id), changed)
        log.info("Saved defaults of %s: %s", model_id, json.dumps(changed))
    else:
        reset(folder, [model_id])
    return changed


def reset(folder: Path, model_ids: Iterable[str]) -> list[Path]:
    """Set the saved defaults of these models aside; the new names of their files."""
    asides = []
    for path in (path_of(folder, model_id) for model_id in model_ids):
        if path.exists():
            try:
                asides.append(json_file.set_aside(path, "before"))
            except OSError as error:
                raise json_file.not_written(path, error) from error
    return asides
