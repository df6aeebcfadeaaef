"""What of Gradio is open, and which files may be read through it.

Gradio brings more addresses than the page uses: proxies, recordings, an editor of its own code, and whatever
the next version adds. What is not named here does not exist.
"""

from __future__ import annotations

import re
from pathlib import Path

from shared.engine.engine import Engine
from shared.files.names import is_device
from shared.gallery.collection import TRASH_FOLDER
from shared.server.errors import ApiError

GRADIO = "/gradio_api/"
FILE = f"{GRADIO}file="
READ = {
    "/", "/config", "/config/", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt",
    *(GRADIO + name for name in (
        "info", "info/", "app_id", "startup-events", "theme.css", "queue/data", "queue/status",
        "upload_progress",
    )),
}  # fmt: skip
READ_BELOW = ("/static/", "/assets/", "/svelte/", f"{GRADIO}heartbeat/", f"{GRADIO}call/", FILE)
WRITE = {
    GRADIO + name
    for name in ("queue/join", "upload", "cancel", "reset", "reset/", "component_server", "component_server/")
}
WRITE_BELOW = (f"{GRADIO}call/",)
OURS = ("/api/v1/", "/v1/")

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
THUMBNAILS = ".thumbnails"
DRIVE = re.compile(r"[a-z]:(?=[/\\])", re.IGNORECASE)
LONGEST = 4096  # characters of an address
NOT_SERVED = "There is nothing here by that name."


def check_address(method: str, path: str) -> None:
    """ApiError for an address that is neither the page's nor ours."""
    if len(path) > LONGEST:
        raise ApiError(414, "The address is too long; shorten it.")
    if any(ord(character) < 32 for character in path):
        raise ApiError(400, "The address has characters that cannot be written; check it.")
    if path.startswith(OURS):
        return
    names, below = (READ, READ_BELOW) if method in ("GET", "HEAD") else (WRITE, WRITE_BELOW)
    if path not in names and not path.startswith(below):
        raise ApiError(404, NOT_SERVED)
    if not path.startswith(FILE) and (".." in path.split("/") or "\\" in path):
        raise ApiError(404, NOT_SERVED)


class FileAccess:
    """The files that the page may show: what was uploaded, and the pictures that the database knows."""

    def __init__(self, engine: Engine, uploads: Path) -> None:
        self._store = engine.store
        self._folders = engine.config.picture_folders
        self._uploads = uploads.resolve()

    def check(self, path: str) -> None:
        """ApiError for the address of any other file, whether it exists or not."""
        if not self._may_read(path.removeprefix(FILE)):
            raise ApiError(403, "This file is not one of the pictures here.")

    def picture(self, path: str) -> Path | None:
        """The file of a picture in the outputs; None for everything else, and when it is gone."""
        file = Path(path).resolve()
        if file.suffix.lower() not in PICTURES or not file.is_file():
            return None
        hidden = [
            part.startswith(".") and part != TRASH_FOLDER
            for _, inside in self._inside(file)
            for part in inside.parts
        ]
        return file if hidden and not any(hidden) else None

    def _may_read(self, text: str) -> bool:
        if not _is_plain(text):
            return False
        file = Path(text).resolve()
        if file.is_relative_to(self._uploads):
            return file.is_file()
        places = self._inside(file)
        if any(inside.parts[:1] == (THUMBNAILS,) for _, inside in places):
            return file.suffix == ".webp"
        # the database has paths as they were when it was written: the folder may be a link
        known = {
            str(file),
            *(str(one / inside) for root, inside in places for one in (root, root.absolute())),
        }
        return self.picture(text) is not None and self._store.has_image(known)

    def _inside(self, file: Path) -> list[tuple[Path, Path]]:
        """The folders of pictures that have the file, and its path in each."""
        found = ((folder, folder.resolve()) for folder in self._folders)
        return [(one, file.relative_to(root)) for one, root in found if file.is_relative_to(root)]


def _is_plain(text: str) -> bool:
    """A whole path that means one file on every system: no streams, devices, shares or ways up."""
    drive = DRIVE.match(text)
    if not (text.startswith("/") or drive) or text.startswith(("//", "/\\")):
        return False
    parts = re.split(r"[/\\]", text[2:] if drive else text)[1:]
    return all(
        part not in ("", ".", "..")
        and ":" not in part
        and part == part.rstrip(". ")
        and not is_device(part)
        for part in parts
    )
