"""Saved queues: a zip with `queue.json`, a list of {"id", "params"}, and the pictures that the params name.

That is Wan2GP's format; each program reads what the other writes. A file may come from anyone: nothing is
written by the names in it, sizes are limited by what is really unpacked, and of what lies beside queue.json
only pictures that a job names are read, by the loader of uploads.
"""

from __future__ import annotations

import json
import stat
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from shared.errors import UserError
from shared.files import atomic
from shared.files.names import is_device
from shared.jobs.inputs import PICTURES
from shared.jobs.records import Job
from shared.settings.wan2gp import letters_of
from shared.version import VERSION

MANIFEST = "queue.json"
MAX_JOBS = 1000
MAX_ENTRIES = 10_000
MAX_MANIFEST = 32 << 20  # bytes, as the following
MAX_PICTURE = 128 << 20
MAX_TOTAL = 2 << 30
MAX_RATIO = 200  # unpacked to packed; pictures and settings stay far below it
SMALL = 1 << 20  # what unpacks to less may have any ratio
WRITER = f"ZGP {VERSION}"
OURS = ("type", "image_mode", "video_prompt_type")  # written for Wan2GP alone
#: what zipfile and json raise on files that are damaged, or made to be
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)


# ---------------------------------------------------------------- writing


def write_queue(jobs: Iterable[Job], path: Path) -> Path:
    """Write the jobs' settings and pictures to `path`, complete or not at all; `path`."""
    manifest, pictures = [], dict[str, Path]()
    for job in jobs:
        params, named = _params(job.settings)
        manifest.append({"id": job.id, "params": params})
        pictures |= named
    try:
        with atomic.replacing(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=2))
            for name, picture in pictures.items():
                archive.write(picture, name, zipfile.ZIP_STORED)
    except OSError as error:
        raise UserError(
            f"The queue cannot be saved as {path} ({error.strerror or error}): check the folder, the free "
            "space, and that the jobs' pictures are still there."
        ) from error
    return path


def _params(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """The settings as they stand in the file, and the pictures beside it. A kept picture is named after its
    content, so that jobs share it.
    """
    pictures = {name: Path(settings[name]) for name in PICTURES if settings.get(name)}
    params = {**settings, **{name: path.name for name, path in pictures.items()}}
    if "image_guide" in pictures:
        params["video_prompt_type"] = letters_of(settings.get("control_preprocessor", ""))
    params |= {"type": WRITER, "image_mode": 1}
    return params, {path.name: path for path in pictures.values()}


# ---------------------------------------------------------------- reading


def read_queue(path: Path, folder: Path) -> list[Any]:
    """The settings of the jobs in a saved queue, not yet validated; their pictures are now in `folder`.

    UserError when the file is not what it says, or unpacks to more than a queue has. A picture that is
    missing or damaged is its job's own problem, found when that job is submitted.
    """
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            entries = _checked(archive, path.name)
            unpacked = _Unpacked(archive, entries, path.name)
            items = json.loads(unpacked.read(MANIFEST, MAX_MANIFEST))
            if not isinstance(items, list):
                items = [items]
            if len(items) > MAX_JOBS:
                raise UserError(
                    f"{path.name} holds {len(items)} jobs; at most {MAX_JOBS} are loaded: split it."
                )
            return [_with_pictures(unwrapped(item), unpacked, folder) for item in items]
    except _DAMAGED as error:
        raise UserError(
            f"{path.name} is not a saved queue ({error}): expected an intact zip with {MANIFEST} in it."
        ) from error


def _check_directory(path: Path) -> None:
    """UserError for more entries than a saved queue has: zipfile would make an object of each one.

    As the format has it: the file ends with a record that begins with PK 5 6, has the number of entries at
    byte 10 and the size of their directory at byte 12; all ones there mean that another record has them.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16) - 22))
        tail = file.read()
    record = tail[tail.rfind(b"PK\5\6") :]
    if len(record) >= 22 and int.from_bytes(record[12:16], "little") > MAX_ENTRIES * 300:
        raise UserError(f"{path.name} is refused: it has more files than a saved queue.")


def unwrapped(item: Any) -> Any:
    """The settings of a manifest's item {"id", "params"}; anything else as it is."""
    return item["params"] if isinstance(item, dict) and isinstance(item.get("params"), dict) else item


def _checked(archive: zipfile.ZipFile, name: str) -> dict[str, zipfile.ZipInfo]:
    """The entries by their names. UserError for names, kinds and sizes that no saved queue has."""
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise UserError(f"{name} holds {len(entries)} files; a saved queue has at most {MAX_ENTRIES}.")
    for entry in entries:
        if reason := _suspicious(entry):
            raise UserError(f"{name} is refused: its entry {entry.filename[:100]!r} {reason}.")
    if sum(entry.file_size for entry in entries) > MAX_TOTAL:
        raise UserError(f"{name} is refused: it says that it unpacks to more than {MAX_TOTAL >> 30} GB.")
    found = {entry.filename: entry for entry in entries}
    if len(found) != len(entries):
        raise UserError(f"{name} is refused: two of its entries have the same name.")
    if MANIFEST not in found:
        raise UserError(f"{name} is not a saved queue: there is no {MANIFEST} in it.")
    return found


def _suspicious(entry: zipfile.ZipInfo) -> str:
    """Why an entry is refused; "" for one that a saved queue may have."""
    parts = entry.filename.replace("\\", "/").split("/")
    if parts[0] == "" or ":" in entry.filename or ".." in parts or not entry.filename.isprintable():
        return "leads out of the file"
    if any(map(is_device, parts)):
        return "has the name of a device"
    if entry.create_system == 3 and stat.S_IFMT(entry.external_attr >> 16) not in (
        0,
        stat.S_IFREG,
        stat.S_IFDIR,
    ):
        return "is a link or a device"
    if entry.flag_bits & 1:
        return "is encrypted"
    if entry.file_size > SMALL and entry.file_size > MAX_RATIO * entry.compress_size:
        return f"says that it unpacks to more than {MAX_RATIO} times its size"
    return ""


class _Unpacked:
    """Reads entries, none larger than allowed and all together no more than MAX_TOTAL, whatever they say."""

    def __init__(self, archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], name: str):
        self._archive, self.entries, self._name = archive, entries, name
        self._left = MAX_TOTAL
        self._pictures: dict[str, Path] = {}  # jobs can share one

    def read(self, entry: str, limit: int) -> bytes:
        limit = min(limit, self._left)
        with self._archive.open(self.entries[entry]) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise UserError(f"{self._name} is refused: {entry} unpacks to more than {limit >> 20} MB.")
        self._left -= len(data)
        return data

    def picture(self, entry: str, folder: Path) -> Path:
        """Where the entry's bytes are now, as they are: whoever uses them decodes them. A path without a
        file when there is no such entry.
        """
        if entry not in self.entries:
            return folder / "missing" / PurePosixPath(entry.replace("\\", "/")).name
        if entry not in self._pictures:
            place = folder / str(len(self._pictures)) / PurePosixPath(entry).name
            place.parent.mkdir(parents=True)
            place.write_bytes(self.read(entry, MAX_PICTURE))
            self._pictures[entry] = place
        return self._pictures[entry]


def _with_pictures(values: Any, unpacked: _Unpacked, folder: Path) -> Any:
    """The settings with paths in `folder` in the place of the names of entries."""
    if not isinstance(values, dict):
        return values
    own = str(values.get("type", "")).startswith("ZGP ")
    found = {name: value for name, value in values.items() if not (own and name in OURS)}
    for name in PICTURES:
        value = found.pop(name, None)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, str) and value:
            found[name] = str(unpacked.picture(value, folder))
        elif value:
            found[name] = value
    return found
