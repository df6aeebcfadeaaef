"""The way out: a picture's settings as a workflow of ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.imaging import metadata
from shared.imaging.foreign import reader
from shared.jobs.grid import axes_from
from shared.jobs.records import ImageRecord
from shared.library.catalog import Catalog
from shared.library.comfy_export import Files, Workflow, export
from shared.library.translation import CONTROL_ROLE, OTHER_NOISE, translated
from shared.weights import hub
from shared.weights.files import Required, file_name, is_url


def settings_in(path: Path, catalog: Catalog, model_id: str) -> dict[str, Any]:
    """The settings of a picture of this program or another. UserError when it holds none.

    model_id: the model of pictures whose own is not here.
    """
    found = metadata.read(path)
    if found is not None:
        if axes_from(found):
            raise UserError(f"{path.name} is a grid of many pictures: take one of them.")
        return metadata.settings_from(found)
    other = reader.read(path)
    if other is None:
        raise UserError(f"{path.name} holds no settings: take a picture as it was saved.")
    return translated(other, catalog, model_id)[0]


def settings_of(record: ImageRecord, catalog: Catalog) -> dict[str, Any]:
    """The settings of a picture in the database; of one that was found in the folder as `settings_in`."""
    if not record.job_id:
        return settings_in(Path(record.path), catalog, catalog.default_model)
    if axes_from(record.metadata):
        raise UserError("This is a grid of many pictures: take one of them.")
    return metadata.settings_from(record.metadata)


def comfyui_workflow(values: Mapping[str, Any], catalog: Catalog) -> Workflow:
    """Settings as a workflow of ComfyUI. UserError for values that cannot be used, a model that is not here,
    or one that ComfyUI cannot sample.
    """
    settings = catalog.validate({**values, "loras_optional": True}).settings
    model = catalog.model(settings["model_type"])
    named = {one.role: _comfyui_name(one) for one in model.required}
    files = Files(
        named["transformer"], named["text_encoder"], named["vae"], control=named.get(CONTROL_ROLE, "")
    )
    made = export(settings, files)
    shown = ", ".join(filter(None, (files.transformer, files.text_encoder, files.vae, files.control)))
    lines = [OTHER_NOISE, f"It names the files {shown}: choose yours where they are called otherwise."]
    if "transformer_config" in model.card.model:
        lines.append(f"{model.name} has a size of its own: ComfyUI does not know it.")
    if settings["seed"] == -1:
        lines.append("Its seed is random here, and 0 in the workflow.")
    return Workflow(made.nodes, [*lines, *made.lines])


def _comfyui_name(needed: Required) -> str:
    """What ComfyUI's own packaging calls the file, where the card knows it, else the file's name."""
    own = [one for one in needed.alternatives if not is_url(one) and not one.startswith(hub.SCHEME)]
    return file_name((own or needed.alternatives)[0])
