"""The labelled picture of a grid, drawn by the worker once the last cell has ended."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from shared.errors import UserError
from shared.imaging import metadata
from shared.imaging.naming import Facts
from shared.imaging.sheet import Layout, Tile, draw, layout
from shared.jobs.grid import NAMES
from shared.jobs.records import CANCELLED, DONE, ImageRecord, Job
from shared.jobs.store import JobStore
from shared.worker.progress import contact_sheet

MOST_NOTES = 5

Save = Callable[[Image.Image, Facts, str, dict[str, Any]], Path]


@dataclass(frozen=True)
class Drawn:
    """What became of a cell: its job (None: there is none), its pictures."""

    job: Job | None
    images: tuple[ImageRecord, ...]


def is_sheet(job: Job) -> bool:
    """Whether the job draws a grid, instead of making a picture."""
    return job.grid is not None and job.cell is None


def make(store: JobStore, job: Job, settings: Mapping[str, Any], save: Save) -> None:
    """Draw the grid of `job` and record it as its picture. settings: the job's, fit to stand in a picture.

    save: writes a picture and returns its path.
    """
    if store.images(job.id):  # by an attempt that was cut short
        return
    assert job.grid is not None
    axes = store.grid_axes(job.grid)
    labels = {axis["direction"]: axis["labels"] for axis in axes}
    columns, rows, panels = (labels.get(name, [""]) for name in NAMES)
    cells = _cells(store, job.grid, len(columns) * len(rows) * len(panels))
    tiles = [_tile(cell) for cell in cells]
    if not any(tile.picture for tile in tiles):
        raise UserError("No picture of this grid is left: make the grid again.")
    where = layout(tiles, columns, rows, panels)
    sheet = draw(tiles, where)
    names = [", ".join(filter(None, reversed(name))) for name in itertools.product(panels, rows, columns)]
    meta = _metadata(job, settings, axes, list(zip(names, cells, strict=True)), where)
    for note in meta["zgp"]["notes"]:
        store.note(job.id, note)
    seed = int(job.settings["seed"])
    facts = Facts(
        datetime.now(), seed, f"grid {job.settings['prompt']}", job.settings["model_type"],
        resolution=f"{sheet.width}x{sheet.height}",
    )  # fmt: skip
    path = save(sheet, facts, "png", meta)
    store.add_image(
        job.id, index=0, path=str(path), seed=seed, width=sheet.width, height=sheet.height, metadata=meta
    )


def _cells(store: JobStore, grid_id: int, count: int) -> list[Drawn]:
    """The cells by their numbers; of one that was tried again as another job, the newest."""
    jobs = {job.cell: job for job in store.grid_jobs(grid_id) if job.cell is not None}
    found = []
    for number in range(count):
        job = jobs.get(number)
        images = store.images(job.id) if job else []
        found.append(Drawn(job, tuple(image for image in images if Path(image.path).is_file())))
    return found


def _tile(cell: Drawn) -> Tile:
    if not cell.images:
        return Tile(reason=_reason(cell.job))
    paths = [Path(image.path) for image in cell.images]
    with Image.open(paths[0]) as first:
        size = contact_sheet([first] * len(paths)).size
    return Tile(size, partial(_picture, paths))


def _picture(paths: Sequence[Path]) -> Image.Image:
    """The picture of a cell; of a batch, all of them."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return contact_sheet(images)


def _reason(job: Job | None) -> str:
    if job is None or job.status == DONE:
        return "The picture is gone."
    return "Cancelled." if job.status == CANCELLED else job.error or "The job failed."


def _metadata(
    job: Job,
    settings: Mapping[str, Any],
    axes: Sequence[Mapping[str, Any]],
    cells: Sequence[tuple[str, Drawn]],
    where: Layout,
) -> dict[str, Any]:
    """The base settings, and under zgp.grid the axes as a file of settings has them, scale and cells.

    cells: with their names, which can be the same, as those of random seeds are.
    """
    images = [image for _, cell in cells for image in cell.images]
    alike = [one for one in images if one.metadata.get("model_type") == settings["model_type"]]
    notes = [f"{name}: {_reason(cell.job)}" for name, cell in cells if not cell.images]
    if len(notes) > MOST_NOTES:
        notes[MOST_NOTES:] = [f"{len(notes) - MOST_NOTES} more cells are empty."]
    if where.scale < 1:
        notes.append(f"The cells are shown at {where.scale:.0%} of their size.")
    grid = {
        "axes": {axis["direction"]: [axis["setting"], axis["typed"]] for axis in axes},
        "scale": round(where.scale, 4),
        "cells": [[Path(image.path).name for image in cell.images] for _, cell in cells],
    }
    made = alike[0].metadata["zgp"] if alike else {}
    return metadata.build(
        settings,
        seed=int(settings["seed"]),
        index=0,
        model_name=str(made.get("model_name", settings["model_type"])),
        model_files=made.get("model_files", {}),
        notes=notes,
        extra={"grid": grid},
    )
