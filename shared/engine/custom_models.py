"""The user's own models: cards in finetunes/ for checkpoint files in the folders of models. No torch.

A file is recognised by its tensors. What works like it is one of the models that the program brings, and the
new card takes its parts and defaults from there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.family import Fit
from shared.engine.engine import Engine
from shared.engine.inventory import is_own
from shared.errors import UserError
from shared.files import atomic
from shared.files.names import without_device
from shared.library.cards import FOLDERS, read_json
from shared.library.model_info import ModelInfo
from shared.weights import formats
from shared.weights.files import SAFETENSORS, SHARD, Folders, locate, read_header

DEPTH = 4  # folders below a folder of models that are looked into
LIMIT = 2000  # files that are listed
#: parts that a card takes from the model it works like, by reference and as they are
BORROWED = ("text_encoder_URLs", "VAE_URLs")
COPIED = (
    "text_encoder_folder", "transformer_config", "vae_config", "scheduler_config", "attention",
    "unified_solver", "resolutions",
)  # fmt: skip
EDITABLE = ("num_inference_steps", "guidance_scale")  # defaults that the page asks for
LORA = (
    "{name} is a LoRA: it changes a model instead of being one. Put it into {folder}; it is then in the list "
    "of LoRAs under Create."
)


@dataclass(frozen=True)
class Recognised:
    """What a file is. role: its place in a model. kind, label: for people, label is the format.

    like: the models that the program brings and that work as this file might; the user has to say which.
    """

    path: Path
    role: str
    kind: str
    label: str
    like: tuple[ModelInfo, ...]


# ---- which files there are ---------------------------------------------------------------------------------


def found_files(engine: Engine) -> dict[str, Path]:
    """The checkpoint files in the folders of models: what the page calls them -> where they are."""
    root, folders = engine.config.root, engine.config.folders
    files = [path for place in (folders.ckpts, *folders.others) for path in _files(place, root)]
    return {_called(path, root): path for path in list(dict.fromkeys(files))[:LIMIT]}


def _called(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _files(place: Path, root: Path) -> Iterator[Path]:
    """Below `place`, but not below the program's own folder, which has much else."""
    for folder, names, files in os.walk(place, followlinks=True):  # DEPTH ends a loop of links
        deep = len(Path(folder).relative_to(place).parts) >= DEPTH or Path(folder).resolve() == root.resolve()
        names[:] = [] if deep else sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            shard = SHARD.fullmatch(name)
            if name.endswith(SAFETENSORS) and (shard is None or int(shard[2]) == 1):
                yield Path(folder) / name


def find_file(engine: Engine, called: str) -> Path:
    """The file of that name in the list. UserError when the list has none."""
    files = found_files(engine)
    if called not in files:
        raise UserError(
            f"'{called}' is not among the files in the folders of models: choose one of the list."
        )
    return files[called]


# ---- what a file is ----------------------------------------------------------------------------------------


def recognise(engine: Engine, path: Path) -> Recognised:
    """UserError when no model of this program can use the file: what it is instead."""
    header = read_header(path)
    if any(formats.ADAPTER.search(name) for name in header.entries):
        raise UserError(LORA.format(name=path.name, folder=_lora_folder(engine)))
    fits: list[tuple[ModelInfo, Fit]] = []
    refusal: UserError | None = None
    for info in engine.catalog.models.values():
        if is_own(info):
            continue
        try:
            fit = info.handler.query_fit(info.architecture, info.card.model, path, engine.config.folders)
        except UserError as error:
            refusal = refusal or error
            continue
        if fit is not None and (fit.role != "transformer" or not info.card.model.get("modules")):
            fits.append((info, fit))
    if not fits:
        raise refusal or UserError(f"There is no model here that {path.name} could belong to.")
    first = fits[0][1]
    alike = {_traits(info): info for info, fit in reversed(fits) if fit.role == first.role}
    like = tuple(reversed(alike.values()))
    return Recognised(path, first.role, first.kind, first.label, like)


def _traits(info: ModelInfo) -> str:
    """Models with the same of these would make the same card."""
    copied = {key: info.card.model.get(key) for key in ("VAE_URLs", *COPIED)}
    return json.dumps([info.architecture, copied, info.card.defaults], sort_keys=True)


def _lora_folder(engine: Engine) -> Path | str:
    folders = (model.lora_folder for model in engine.catalog.models.values())
    return next((folder for folder in folders if folder is not None), "the folder of LoRAs")


# ---- the card ----------------------------------------------------------------------------------------------


def add(
    engine: Engine, called: str, like: str, name: str, description: str, defaults: Mapping[str, Any]
) -> ModelInfo:
    """Write the card and return the model. called: as in `found_files`. like: the id of one of
    Recognised.like. defaults: of EDITABLE. UserError when anything is wrong; then nothing is written.
    """
    found = recognise(engine, find_file(engine, called))
    base = next((info for info in found.like if info.id == like), None)
    if base is None:
        raise UserError(f"Say which model {found.path.name} works like: choose one of the list.")
    source = _source(found.path, engine.config.folders)
    model: dict[str, Any] = {
        "name": _checked_name(engine, name),
        "architecture": base.architecture,
        "description": description.strip(),
        "URLs": [source] if found.role == "transformer" else base.id,
        **({} if found.role == "transformer" else {"modules": [[source]]}),
        **{key: base.id for key in BORROWED if key in base.card.model},
        **{key: base.card.model[key] for key in COPIED if key in base.card.model},
    }
    settings = {**base.card.defaults, **_acting(base, defaults)}
    return _write(engine, _free_id(engine, name), {"model": model, **settings})


def change(
    engine: Engine, card_id: str, name: str, description: str, defaults: Mapping[str, Any]
) -> ModelInfo:
    """Give the user's own card another name, description or defaults; the rest of its file stays."""
    info = _own(engine, card_id)
    content = read_json(info.card.path, f"{FOLDERS[-1]}/{info.card.path.name}")
    own_model = content.get("model", {})
    model = {**own_model, "name": _checked_name(engine, name, card_id), "description": description.strip()}
    return _write(engine, card_id, {**content, "model": model, **_acting(info, defaults)})


def forget(engine: Engine, card_id: str) -> None:
    """Delete the user's own card; the model's files stay."""
    engine.preferences.check_unlocked()
    info = _own(engine, card_id)
    if card_id in engine.downloads.look():
        raise UserError(f"{info.name} is being downloaded: cancel that first.")
    waiting = [job.id for job in engine.store.queue() if job.settings.get("model_type") == card_id]
    if waiting:
        raise UserError(f"Job {waiting[0]} in the queue needs {info.name}: wait for it or cancel it.")
    try:
        info.card.path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{info.card.path} cannot be deleted ({error.strerror}): allow it.") from error
    engine.reload_catalog()


def _own(engine: Engine, card_id: str) -> ModelInfo:
    info = engine.catalog.model(card_id)
    if not is_own(info):
        raise UserError(
            f"{info.name} comes with the program: only cards in {FOLDERS[-1]}/ can be changed here."
        )
    return info


def _checked_name(engine: Engine, name: str, card_id: str = "") -> str:
    name = " ".join(name.split())
    if not name or len(name) > 100:
        raise UserError("Give the model a name of 1 to 100 characters.")
    taken = [other.id for other in engine.catalog.models.values() if other.name.casefold() == name.casefold()]
    if taken and taken != [card_id]:
        raise UserError(f"There is a model called {name} already: give this one another name.")
    return name


def _acting(base: ModelInfo, defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in defaults.items()
        if key in EDITABLE and key in base.settings and value is not None
    }


def _free_id(engine: Engine, name: str) -> str:
    """A file name made of the model's name, which no card has."""
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:60] or "model"
    plain = without_device(plain, "my_")
    taken = {
        *engine.catalog.models,
        *(path.stem for f in FOLDERS for path in (engine.config.root / f).glob("*")),
    }
    numbered = (plain if number == 1 else f"{plain}_{number}" for number in range(1, len(taken) + 2))
    return next(one for one in numbered if one not in taken)


def _source(path: Path, folders: Folders) -> str:
    """How a card names this file: relative to the folder of models that it is in."""
    for place in (folders.ckpts, *folders.others, folders.root):
        if path.is_relative_to(place):
            source = path.relative_to(place).as_posix()
            found = locate(source, folders)
            if found is not None and found.resolve() == path.resolve():
                return source
    raise UserError(
        f"Another folder of models has a file called {path.name}, which would be taken instead: rename this "
        "one."
    )


def _write(engine: Engine, card_id: str, content: dict[str, Any]) -> ModelInfo:
    """Check what would become of the card, then write its file whole or not at all."""
    engine.preferences.check_unlocked()
    drafted = engine.draft({card_id: content})
    if card_id not in drafted.models:
        said = [error for error in drafted.errors if f"{card_id}.json" in error]
        raise UserError(said[0] if said else "The card cannot be used; the log has the details.")
    drafted.validate({"model_type": card_id, "prompt": "-"})
    path = engine.config.root / FOLDERS[-1] / f"{card_id}.json"
    try:
        atomic.write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", durable=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): check its folder.") from error
    return engine.reload_catalog().model(card_id)
