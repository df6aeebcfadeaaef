"""The tab Gallery: every picture, found by words and filters, looked at, compared, used again, deleted.

The page keeps what is searched and selected (gallery.js); the functions here answer one question each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.gallery.archive import pack
from shared.gallery.collection import HERE, TRASH, Collection, Found, Moved, Tile, Wanted
from shared.gallery.thumbnails import forget_thumbnail, ready_thumbnail, thumbnail
from shared.jobs.records import ImageRecord
from shared.ui import static_files
from shared.ui.api import uploads
from shared.ui.components.errors import QUIET
from shared.ui.components.text import plural
from shared.ui.components.viewer import THUMBNAILS, file_url, model_name
from shared.ui.create.queue.viewer_actions import workflow_of
from shared.ui.create.tab import Generate, Updates
from shared.ui.gallery.html import ANY, compare_html, detail_html, options_html, tile_html

_FRAME = static_files.read("gallery.html")
_SCRIPT = static_files.read("gallery.js")
ANSWERS = (
    "look", "choices", "thumbs", "detail", "compare", "favour", "discard", "restore", "purge", "find",
    "found", "pack", "comfyui",
)  # fmt: skip
MAX_AT_ONCE = 900  # pictures of one request; older SQLites take 999 values
PAGE = 60
TEXT_FIELDS = ("words", "model", "lora", "since", "until", "size")

Answer = dict[str, Any]


class Gallery:
    """Lays the tab out. `create` is where settings and pictures are sent."""

    def __init__(self, engine: Engine, page: gr.Blocks, tabs: gr.Tabs, create: Generate):
        self._engine = engine
        self._collection = Collection(engine.store, *engine.config.picture_folders)
        self._thumbnails = engine.config.output_dir / THUMBNAILS
        self._create, self._tabs = create, tabs
        self.area = gr.HTML(
            _FRAME,
            js_on_load=_SCRIPT,
            elem_id="gallery",
            apply_default_css=False,
            server_functions=[_answering(getattr(self, name)) for name in ANSWERS],
        )
        self.area.use(self.use, create.form.inputs, [tabs, *create.filled], **QUIET)
        create.form.images.takes_from(self.area)
        create.form.images.takes_masks_from(self.area)
        create.upscale.opens_from(self.area)
        for sent in (self.area.image, self.area.control, self.area.mask, self.area.upscale):
            sent(lambda: gr.Tabs(selected="create"), None, tabs, **QUIET)
        for area in (create.recent, create.viewer):
            area.all(lambda: gr.Tabs(selected="gallery"), None, tabs, **QUIET)

    def use(self, event: gr.EventData, *values: Any) -> Updates | tuple[Any, ...]:
        """Fill the form from a picture, and go there."""
        filled = self._create.use_settings(event, *values)
        return {**filled, self._tabs: gr.Tabs(selected="create")}

    # -- answers to the page ------------------------------------------------------------------------------

    def look(self, asked: Answer) -> Answer:
        """A part of the list: its tiles, where the next part begins; with the first, how many there are."""
        wanted, after = _wanted(asked), _place(asked)
        page = self._collection.page(wanted, after, PAGE)
        answer: Answer = {"html": "".join(map(self._tile, page.tiles)), "after": page.after}
        if after is None:
            count = self._collection.count(wanted)
            answer |= {"count": plural(count, "picture"), "empty": "" if count else self._empty(wanted)}
        return answer

    def choices(self, asked: Answer) -> Answer:
        """The lists of the filters, and how many pictures are in the trash."""
        found = self._collection.choices()
        catalog = self._engine.catalog
        models = [(model_name({"model_type": name}, catalog), name, count) for name, count in found.models]
        loras = [(Path(name).stem, name, count) for name, count in found.loras]
        sizes = [(name.replace("x", " × "), name, count) for name, count in found.sizes]
        lists = {"model": models, "lora": loras, "size": sizes}
        return {
            "trash": found.trash,
            **{name: options_html(ANY[name], options) for name, options in lists.items()},
        }

    def thumbs(self, asked: Answer) -> Answer:
        """The addresses of small copies, made now where they are missing, by the pictures' numbers."""
        records = self._collection.records(_ids(asked)[:PAGE])
        return {
            str(one.id): file_url(thumbnail(Path(one.path), self._thumbnails))
            for one in records
            if self._collection.is_here(one.path)
        }

    def detail(self, asked: Answer) -> Answer:
        """One picture large, with everything that is known of it."""
        return {"html": detail_html(self._one(asked), self._engine.catalog)}

    def compare(self, asked: Answer) -> Answer:
        """Two pictures over each other, and the settings in which they differ."""
        records = [one for one in self._collection.records(_ids(asked)) if self._collection.is_here(one.path)]
        if len(records) != 2:
            raise UserError("Choose two pictures to compare.")
        return {"html": compare_html(records[0], records[1], self._engine.catalog)}

    def favour(self, asked: Answer) -> Answer:
        """Make pictures favourites, or none."""
        self._collection.favour(_ids(asked), bool(asked.get("favourite")))
        return {}

    def discard(self, asked: Answer) -> Answer:
        """Move pictures into the trash."""
        return _moved(self._collection.discard(_ids(asked)), "deleted")

    def restore(self, asked: Answer) -> Answer:
        """Take pictures out of the trash."""
        return _moved(self._collection.restore(_ids(asked)), "brought back")

    def purge(self, asked: Answer) -> Answer:
        """Delete what is in the trash for good."""
        for file in self._collection.trash_files():
            forget_thumbnail(file, self._thumbnails)
        return {"said": f"{plural(self._collection.empty_trash(), 'picture')} deleted for good."}

    def find(self, asked: Answer) -> Answer:
        """Begin to look for pictures in the folder that are not known here."""
        self._collection.find_in_background()
        return self.found(asked)

    def found(self, asked: Answer) -> Answer:
        """How far the search of the folder is."""
        found = self._collection.found
        return {"said": found_text(found), "running": found.running} if found else {}

    def pack(self, asked: Answer) -> Answer:
        """The address of a zip of pictures, which is kept for an hour."""
        records = [one for one in self._collection.records(_ids(asked)) if self._collection.is_here(one.path)]
        return {"url": file_url(pack([Path(one.path) for one in records], uploads() / "zips"))}

    def comfyui(self, asked: Answer) -> Answer:
        """The address of a picture's workflow for ComfyUI, and what differs there."""
        file, lines = workflow_of(self._engine, self._one(asked).id)
        return {"url": file_url(file), "said": " ".join(lines)}

    def _one(self, asked: Answer) -> ImageRecord:
        record = next(iter(self._collection.records(_ids(asked)[:1])), None)
        if record is None or not self._collection.is_here(record.path):
            raise UserError("This picture is not there any more.")
        return record

    def _tile(self, tile: Tile) -> str:
        small = ready_thumbnail(tile.path, self._thumbnails)
        return tile_html(tile, file_url(small) if small else "")

    def _empty(self, wanted: Wanted) -> str:
        if wanted.place == TRASH:
            return "The trash is empty."
        if wanted != Wanted(oldest_first=wanted.oldest_first):
            return "No picture is like that: try fewer words or filters."
        return (
            "No pictures yet. What you make in Create is kept here; those of before are found in the folder."
        )


def _answering(function: Callable[[Answer], Answer]) -> Callable[[Any], Answer]:
    """A function that the page may call: what the user can mend comes back as a sentence."""

    @functools.wraps(function)
    def answer(asked: Any) -> Answer:
        try:
            return function(asked if isinstance(asked, dict) else {})
        except UserError as error:
            return {"error": str(error)}

    return answer


def _wanted(asked: Answer) -> Wanted:
    texts = {name: str(asked.get(name) or "")[:500].replace("\0", "") for name in TEXT_FIELDS}
    return Wanted(
        **texts,
        favourites=bool(asked.get("favourites")),
        oldest_first=asked.get("order") == "oldest",
        place=TRASH if asked.get("trash") else HERE,
    )


def _place(asked: Answer) -> tuple[float, int] | None:
    """Where the list goes on; None for its beginning."""
    match asked.get("after"):
        case None:
            return None
        case [int() | float() as created, int() as number] if abs(created) < 2**53 > abs(number):
            return float(created), int(number)
    raise UserError("The place in the list did not arrive whole: reload the page.")


def _ids(asked: Answer) -> list[int]:
    ids = asked.get("ids")
    if not isinstance(ids, list) or not all(type(one) is int and abs(one) < 2**62 for one in ids):
        raise UserError("The pictures' numbers did not arrive whole: reload the page.")
    return ids[:MAX_AT_ONCE]


def _moved(moved: Moved, what: str) -> Answer:
    said = [f"{plural(len(moved.ids), 'picture')} {what}."] if moved.ids else []
    return {"ids": moved.ids, "said": " ".join([*said, *moved.problems]) or "Nothing to do."}


def found_text(found: Found) -> str:
    """How far a search of the folder is, or what it has brought."""
    if found.running:
        return f"Looking through the folder: {plural(found.seen, 'picture')} so far …"
    parts = [f"{plural(found.added, 'picture')} added"]
    parts += [f"{found.again} found again"] if found.again else []
    parts += [f"{found.gone} not there any more"] if found.gone > 0 else []
    parts += [f"{found.left_out} without settings left out"] if found.left_out else []
    return ", ".join(parts) + f". {found.problem}".rstrip()
