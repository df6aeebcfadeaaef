"""What the page tells of each model: its files here and those to come, what it takes to run it on this
computer, and what would go if it were removed. Reads headers at most; no torch.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.files.unchanged import while_unchanged
from shared.gpu.machine import survey
from shared.gpu.planner import Machine
from shared.jobs.records import DONE, Job
from shared.library import plan_table
from shared.library.catalog import Catalog
from shared.library.model_info import ModelInfo
from shared.library.plan_table import Row
from shared.weights import formats
from shared.weights.downloads import parts
from shared.weights.files import SAFETENSORS, Folders, Required, destination, is_url, locate

log = logging.getLogger(__name__)

MEASURED = 20  # jobs of a kind, the newest ones, that a median is taken of
HISTORY = 500  # finished jobs that are looked through for them


@dataclass(frozen=True)
class Item:
    """One file of a model. path: None while it is to come, its `size` then is an estimate, 0 for unknown.

    format: "bf16", "int8 (quanto)", … of weights. problem: why the file cannot be used.
    """

    role: str
    name: str
    path: Path | None
    size: int
    format: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Forecast:
    """What a picture with the model's defaults takes here.

    memory: the plan in the words of plan_table; problem: why there is none. seconds: per picture, None when
    nobody knows; measured: of how many jobs it is the median, 0 for the planner's estimate.
    """

    memory: str = ""
    problem: str = ""
    seconds: float | None = None
    measured: int = 0


@dataclass(frozen=True)
class Stock:
    """One model as it stands. built_in: its files come with the program. own: its card is the user's.

    arrived: bytes of unfinished downloads. elsewhere: the plan for a card that was asked about, "" for none.
    """

    info: ModelInfo
    items: tuple[Item, ...]
    forecast: Forecast
    built_in: bool
    own: bool
    arrived: int
    elsewhere: str = ""

    @property
    def here(self) -> list[Item]:
        return [item for item in self.items if item.path is not None]

    @property
    def missing(self) -> list[Item]:
        return [item for item in self.items if item.path is None]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum({item.path: item.size for item in self.here}.values())

    @property
    def missing_size(self) -> int:
        """Bytes to come, by estimate, without what has already arrived."""
        return max(0, sum(item.size for item in self.missing) - self.arrived)


def take_stock(engine: Engine, vram: float = 0) -> list[Stock]:
    """Every visible model: the built-in ones, then what is here, then the rest, each in the cards' order.

    vram: GB of a card to plan for besides; 0 for none.
    """
    machine = survey(engine.config.gpu)
    done = engine.store.jobs([DONE], limit=HISTORY)
    models = [model for model in engine.catalog.models.values() if model.card.visible]
    card = plan_table.pretended(vram, machine) if vram else None
    stocks = [_stock(engine, model, machine, done, card) for model in models]
    return sorted(stocks, key=lambda stock: (not stock.built_in, not stock.info.available))


def _stock(
    engine: Engine, info: ModelInfo, machine: Machine, done: Sequence[Job], card: Machine | None
) -> Stock:
    config, agreed = engine.config, engine.agreed.given()
    row = plan_table.row(info, machine, config.folders, config.overrides, agreed)
    missing = [Item(one.role, one.name, None, one.size) for one in row.found.missing]
    items = [item for one in info.required for item in _here_of(one, config.folders)] + missing
    mine = (config.root / "models").resolve()
    return Stock(
        info,
        tuple(items),
        forecast(row, done),
        built_in=all(item.path is not None and item.path.resolve().is_relative_to(mine) for item in items),
        own=is_own(info),
        arrived=sum(one.arrived for one in row.found.missing),
        elsewhere=plan_table.row(info, card, config.folders, config.overrides, agreed).line(True)
        if card
        else "",
    )


def is_own(info: ModelInfo) -> bool:
    """Whether the model's card is the user's."""
    return info.card.path.parent.name == "finetunes"


def _here_of(one: Required, folders: Folders) -> list[Item]:
    """The files of one requirement that are on this computer."""
    found = [locate(source, folders, one.target) for source in one.alternatives]
    return [_here(one.role, path) for path in dict.fromkeys(filter(None, found))]


def _here(role: str, path: Path) -> Item:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files)
    if path.is_file() and path.suffix not in SAFETENSORS:
        return Item(role, path.name, path, size)
    try:
        return Item(role, path.name, path, size, format_of(path))
    except UserError as error:
        return Item(role, path.name, path, size, problem=str(error))
    except OSError as error:
        return Item(role, path.name, path, size, problem=f"{path} cannot be read ({error.strerror}).")


@while_unchanged(answers=256)
def format_of(path: Path) -> str:
    """The format of a checkpoint file or folder, from its header. UserError when it cannot be used."""
    return formats.inspect([path]).label


# ---- what it takes -----------------------------------------------------------------------------------------


def forecast(row: Row, done: Iterable[Job]) -> Forecast:
    """Of one picture with the model's defaults."""
    defaults, plan = row.model.defaults, row.found.plan
    times = measured_seconds(done, defaults)
    seconds = statistics.median(times) if times else None
    if plan is None:
        return Forecast(problem=row.problem, seconds=seconds, measured=len(times))
    if seconds is None and plan.on_card:
        seconds = plan.seconds * defaults.get("num_inference_steps", 1)
    return Forecast(row.line(), "", seconds, len(times))


def measured_seconds(done: Iterable[Job], defaults: Mapping[str, Any]) -> list[float]:
    """Seconds per picture of the newest finished jobs that had these settings' model, size and steps."""
    kind = [defaults.get(name) for name in ("model_type", "resolution", "num_inference_steps")]
    found: list[float] = []
    for job in done:
        settings = job.settings
        same = kind == [settings.get(n) for n in ("model_type", "resolution", "num_inference_steps")]
        if same and job.started and job.finished and len(found) < MEASURED:
            found.append((job.finished - job.started) / settings.get("batch_size", 1))
    return found


# ---- removal -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """goes: files and their bytes. stays: files and why."""

    info: ModelInfo
    goes: tuple[tuple[Path, int], ...]
    stays: tuple[tuple[Path, str], ...]

    @property
    def size(self) -> int:
        return sum(size for _, size in self.goes)

    @property
    def mark(self) -> str:
        """Tells this list of files from any other one."""
        return hashlib.sha256(repr(self.goes).encode()).hexdigest()[:16]


def removal(engine: Engine, model_id: str) -> Removal:
    """What would be deleted: downloads of this model in the folder of downloads that no other model needs."""
    info, folders = engine.catalog.model(model_id), engine.config.folders
    needed = _needed_by_others(engine.catalog, model_id, engine.downloads.look(), folders)
    goes: dict[Path, int] = {}
    stays: dict[Path, str] = {}
    for one in info.required:
        own = {destination(source, folders, one.target) for source in one.alternatives if is_url(source)}
        found = [locate(source, folders, one.target) for source in one.alternatives]
        for path in dict.fromkeys([*filter(None, found), *(path for path in own if path.exists())]):
            reason = _why_it_stays(path, own, needed, folders)
            if reason:
                stays[path] = reason
            else:
                goes[path] = path.stat().st_size
    goes |= {part: size for part, size in parts(info.required, folders).items() if part not in needed}
    return Removal(info, tuple(goes.items()), tuple(stays.items()))


def remove(engine: Engine, model_id: str, mark: str) -> int:
    """Delete what the user has been shown and return its bytes. mark: of the list that was shown.

    UserError when the list is another one now, while jobs wait for the files, or when a file is in use.
    """
    engine.preferences.check_unlocked()
    planned = removal(engine, model_id)
    if planned.mark != mark:
        raise UserError("The files have changed meanwhile; nothing was deleted. Look at the new list.")
    _check_unused(engine, planned)
    engine.downloads.cancel(model_id)
    freed = 0
    for path, size in planned.goes:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{path} cannot be deleted ({error.strerror or error}): it may be in use. Make a picture "
                "with another model, or restart ZGP, then try again."
            ) from error
        freed += size
        log.info("Deleted %s", path)
    engine.reload_catalog()
    return freed


def _needed_by_others(
    catalog: Catalog, model_id: str, downloads: Iterable[str], folders: Folders
) -> dict[Path, str]:
    """Files of models that are complete or being downloaded, and the names of these models."""
    names: dict[Path, list[str]] = {}
    for other in catalog.models.values():
        if other.id != model_id and (other.available or other.id in downloads):
            for one in other.required:
                places = [locate(source, folders, one.target) for source in one.alternatives]
                for path in {*filter(None, places), *parts([one], folders)}:
                    names.setdefault(path, []).append(other.name)
    return {path: ", ".join(dict.fromkeys(found)) for path, found in names.items()}


def _why_it_stays(path: Path, own: set[Path], needed: Mapping[Path, str], folders: Folders) -> str:
    if path in needed:
        return f"needed by {needed[path]}"
    inside = path.resolve().is_relative_to(folders.ckpts.resolve())
    if path not in own or not inside or path.is_symlink() or not path.is_file():
        return "not downloaded by ZGP"
    return ""


def _check_unused(engine: Engine, planned: Removal) -> None:
    going = {path for path, _ in planned.goes}
    for job in engine.store.queue():
        info = engine.catalog.models.get(str(job.settings.get("model_type")))
        folders = engine.config.folders
        if info and any(
            locate(source, folders, one.target) in going
            for one in info.required
            for source in one.alternatives
        ):
            raise UserError(
                f"Job {job.id} in the queue needs these files: wait for it or cancel it, then remove them."
            )
