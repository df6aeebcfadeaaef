"""The folder of a family's LoRAs: what lies in it, what each file is, and files fetched into it. No torch.

An entry of a LoRA list is a path inside the folder, "https://.../file.safetensors", or such an address, "|"
and the subfolder that its file belongs in.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from shared.errors import UserError
from shared.files.names import without_device
from shared.files.urls import source_problem
from shared.loras.inspection import Verdict, inspect
from shared.loras.names import ModelNames
from shared.loras.parser import LORA_SUFFIXES
from shared.settings.messages import printable
from shared.weights.files import Folders, Required, file_name, is_url

if TYPE_CHECKING:
    from shared.weights.downloads import DownloadProgress

PREVIEW_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".preview.png", ".preview.jpg", ".preview.webp")
INCOMING = ".incoming"  # downloads that have not been judged yet
MAX_NAME = 150  # characters of a fetched file's name
SECRET = re.compile(r"(?i)token|key|secret|signature|password|credential|auth")  # in a parameter's name
MAX_PART, MAX_PATH = 255, 2000  # bytes of a name


@dataclass(frozen=True)
class Entry:
    """A LoRA file of the folder. `name`: its path inside, with "/". `preview`: a picture beside it."""

    name: str
    path: Path
    size: int
    preview: Path | None


@dataclass(frozen=True)
class Address:
    """An entry taken apart. `url` is "" for a file that can only be in the folder; `name` as in Entry."""

    url: str
    name: str


class Library:
    """One folder of LoRAs, seen with the names of one model family."""

    def __init__(self, folder: Path, names: ModelNames) -> None:
        self.folder = folder
        self.names = names
        self._verdicts: dict[tuple[Path, int, int], Verdict] = {}

    def entries(self) -> list[Entry]:
        """Every LoRA file below the folder, ordered without regard to case. Opens no file."""
        found = [_entry(self.folder, path) for path in _files(self.folder)]
        return sorted(found, key=lambda entry: (entry.name.lower(), entry.name))

    def verdict(self, path: Path) -> Verdict:
        """What the file is; judged anew only when its size or time has changed."""
        try:
            status = path.stat()
        except OSError:
            return inspect(path, self.names)
        key = (path, status.st_size, status.st_mtime_ns)
        if key not in self._verdicts:
            self._verdicts[key] = inspect(path, self.names)
        return self._verdicts[key]

    def path(self, entry: str) -> Path:
        """Where the file of an entry is, or will be once it is fetched. UserError when that is not inside."""
        name = address(entry).name
        if len(os.fsencode(name)) > MAX_PATH or any(len(os.fsencode(x)) > MAX_PART for x in name.split("/")):
            raise UserError(
                f"The LoRA '{printable(entry)}' has a name longer than files have (a part of {MAX_PART}, in "
                f"all {MAX_PATH} bytes): give it a shorter one."
            )
        path = self.folder / name
        if name != name.strip() and not path.is_file():  # blanks of a list, not of the file's name
            path = self.folder / name.strip()
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise UserError(
                f"The LoRA '{printable(entry)}' leads out of {self.folder}: name a file inside it."
            )
        return path

    def ensure(
        self,
        entry: str,
        progress: Callable[[DownloadProgress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Path:
        """The file of an entry, fetched when it is missing and kept only if it is a LoRA of this family.

        UserError when it is neither here nor at an address, or turns out to be something else.
        """
        path = self.path(entry)
        if path.is_file():
            return path
        url = address(entry).url
        if not url:
            raise UserError(
                f"The LoRA '{printable(entry)}' is not in {self.folder}: put it there or take it off the "
                "list."
            )
        arrived = self._fetch(url, progress, cancelled)
        verdict = inspect(arrived, self.names)
        if not verdict.usable:
            shutil.rmtree(arrived.parent)
            raise UserError(f"{url} was fetched and not kept: {verdict.sentence}")
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(arrived, path)
        shutil.rmtree(arrived.parent)
        return path

    def _fetch(
        self,
        url: str,
        progress: Callable[[DownloadProgress], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> Path:
        """The download under a LoRA's name in a folder of its own, where no list shows it."""
        from shared.weights.downloads import ensure  # with the network's libraries: lists do without

        folders = Folders(self.folder, self.folder / INCOMING)
        target = hashlib.sha256(url.encode()).hexdigest()[:16]  # two addresses may end in the same name
        required = [Required("lora", [url], target)]
        path = ensure(required, folders, progress, cancelled, public_only=True)["lora"]
        return path.replace(path.with_name(_safe_name(path.name)))


def address(entry: str) -> Address:
    """The address and the place of an entry; a file's name may begin with a blank.

    UserError when it is neither a https URL nor a path inside.
    """
    name, _, subfolder = entry.partition("|")
    source, subfolder = name.strip(), subfolder.strip()
    asked = (source, name, subfolder or source)
    problem = next((found for text in asked if (found := source_problem(text))), "")
    if problem or is_url(subfolder):
        raise UserError(
            f"The LoRA '{printable(entry)}' cannot be used; {problem or 'expected a subfolder after the |'}."
        )
    if not is_url(source):
        if subfolder:
            raise UserError(
                f"The LoRA '{printable(entry)}' has a subfolder but no address: write the path with its "
                "folders."
            )
        return Address("", PurePosixPath(name.replace("\\", "/")).as_posix())
    folder = PurePosixPath(subfolder.replace("\\", "/"))
    return Address(source, (folder / _safe_name(file_name(source))).as_posix())


def without_secrets(entry: str) -> str:
    """The entry without the tokens in its address: it goes into pictures, which people pass on."""
    source, bar, subfolder = entry.partition("|")
    parts = urlsplit(source)
    if not is_url(source) or not (parts.query or parts.username):
        return entry
    public = urlencode([pair for pair in parse_qsl(parts.query) if not SECRET.search(pair[0])])
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host, query=public)) + bar + subfolder


def _safe_name(name: str) -> str:
    """A fetched file's name: short, of a LoRA's type, and none that Windows reserves or a list would hide."""
    path = PurePosixPath(name)
    stem, suffix = (
        (path.stem, path.suffix) if path.suffix.lower() in LORA_SUFFIXES else (name, LORA_SUFFIXES[0])
    )
    stem = stem.strip(". ")[:MAX_NAME].rstrip(". ") or "lora"
    return without_device(f"{stem}{suffix}")


def _files(folder: Path) -> Iterator[Path]:
    """LoRA files below `folder`, without hidden folders and files."""
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if os.path.realpath(root) in map(os.path.realpath, Path(root).parents):
            folders.clear()  # a link to a folder above would lead round and round
            continue
        for name in names:
            path = Path(root, name)
            if name.lower().endswith(LORA_SUFFIXES) and not name.startswith(".") and path.is_file():
                yield path


def _entry(folder: Path, path: Path) -> Entry:
    previews = (path.with_name(path.stem + suffix) for suffix in PREVIEW_SUFFIXES)
    preview = next((preview for preview in previews if preview.is_file()), None)
    return Entry(path.relative_to(folder).as_posix(), path, path.stat().st_size, preview)
