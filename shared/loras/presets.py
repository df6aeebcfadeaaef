"""Presets, as they lie in the LoRA folder: which LoRAs at which strengths, with or without other settings.

    NAME.lset   {"loras": [entry, ...], "loras_mult": text, "prompt": text, "full_prompt": true or false}
    NAME.json   a settings file with "activated_loras" and "loras_multipliers"
    NAME.zip    the same as queue.json ([{"id": 1, "params": settings}]) and the media that it names

These are Wan2GP's forms. A preset may come from anywhere, so its sizes are bounded and its names are checked.
No torch.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.files import atomic
from shared.files.names import UNSAFE_NAME, is_plain
from shared.loras.library import address
from shared.loras.strengths import split_profile

SUFFIXES = (".lset", ".json", ".zip")
MAX_JSON_BYTES = 5_000_000
MAX_MEDIA = 50  # files of a .zip
MAX_MEDIA_BYTES = 200_000_000  # of all media of a .zip, unpacked
SETTINGS_NAMES = ("queue.json", "settings.json")
LSET_KEYS = {"loras": "activated_loras", "loras_mult": "loras_multipliers", "prompt": "prompt"}


@dataclass(frozen=True)
class Preset:
    """What a preset sets. `settings`: under the settings' names, without the LoRAs. `media`: bytes by name.

    full_prompt: settings["prompt"] is a whole prompt, not only the comments that introduce the LoRAs.
    """

    loras: tuple[str, ...] = ()
    multipliers: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    full_prompt: bool = True
    media: Mapping[str, bytes] = field(default_factory=dict, repr=False)


def list_presets(folder: Path) -> list[Path]:
    """The presets of a LoRA folder, not of its subfolders, ordered without regard to case."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        (path for path in found if path.suffix.lower() in SUFFIXES and path.is_file()),
        key=lambda path: path.name.lower(),
    )


def find_preset(folder: Path, name: str) -> Path:
    """The preset called `name`, with or without its ending. UserError when there is none."""
    for suffix in ("", *SUFFIXES):
        path = folder / (name + suffix)
        if path.parent == folder and path.suffix.lower() in SUFFIXES and path.is_file():
            return path
    there = ", ".join(path.name for path in list_presets(folder)) or "none"
    raise UserError(f"There is no preset '{name}' in {folder}; it has: {there}.")


def read_preset(path: Path) -> Preset:
    """The preset at `path`. UserError when it is damaged, too large, or names files outside the folder."""
    try:
        if path.suffix.lower() == ".zip":
            return _read_zip(path)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise _bad(path, f"is larger than {MAX_JSON_BYTES:,} bytes")
        return _preset(path, _parse(path, path.read_bytes()), {})
    except OSError as error:
        raise UserError(f"The preset {path.name} cannot be read ({error.strerror or error}).") from error


def check_name(name: str) -> None:
    """UserError for what is no file's name on some system, or names a hidden file."""
    if not is_plain(name):
        raise UserError(f"'{name}' is no name for a preset: use letters, digits and blanks.")


def write_preset(path: Path, preset: Preset) -> None:
    """Write a preset in the form that the name's ending tells, whole or not at all.

    Of the multipliers only the user's own are kept, and of the prompt, unless it is full, only its comments.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"'{path.name}' is no name for a preset: expected NAME{', NAME'.join(SUFFIXES)}.")
    check_name(path.stem)
    own = split_profile(preset.multipliers)[1]
    settings = {**preset.settings, "activated_loras": list(preset.loras), "loras_multipliers": own}
    try:
        with atomic.replacing(path) as new:
            if path.suffix == ".zip":
                _write_zip(new, settings, preset.media)
            else:
                content = _lset(settings, preset.full_prompt) if path.suffix == ".lset" else settings
                new.write_text(_text(content), "utf-8")
    except OSError as error:
        raise UserError(f"The preset {path} cannot be written ({error.strerror or error}).") from error


def remove_preset(path: Path) -> None:
    """Delete a preset. UserError when that cannot be."""
    try:
        path.unlink()
    except OSError as error:
        raise UserError(f"{path.name} cannot be deleted ({error.strerror or error}).") from error


def rename_preset(path: Path, name: str) -> Path:
    """Give a preset another name, and return its new path. UserError where that is taken or is no name."""
    check_name(name)
    new = path.with_name(name + path.suffix)
    if new.exists():
        raise UserError(f"There is already a preset '{new.name}': choose another name.")
    try:
        return path.rename(new)
    except OSError as error:
        raise UserError(f"{path.name} cannot be renamed ({error.strerror or error}).") from error


def _lset(settings: Mapping[str, Any], full_prompt: bool) -> dict[str, Any]:
    content = {theirs: settings.get(ours, "") for theirs, ours in LSET_KEYS.items()}
    if not full_prompt:
        lines = str(content["prompt"]).splitlines()
        content["prompt"] = "\n".join(line for line in lines if line.startswith("#"))
    return content | {"full_prompt": full_prompt}


def _preset(path: Path, content: Mapping[str, Any], media: Mapping[str, bytes]) -> Preset:
    """The preset of a JSON object, in either vocabulary, with its names checked."""
    lset = path.suffix.lower() == ".lset"
    values = {LSET_KEYS.get(key, key): value for key, value in content.items()} if lset else dict(content)
    full_prompt = bool(values.pop("full_prompt", True))
    loras, multipliers = (
        values.pop("activated_loras", None) or [],
        values.pop("loras_multipliers", None) or "",
    )
    if not isinstance(loras, list) or not all(isinstance(entry, str) for entry in loras):
        raise _bad(path, "lists its LoRAs as something other than texts")
    if not isinstance(multipliers, str):
        raise _bad(path, "has multipliers that are not a text")
    for entry in loras:
        try:
            address(entry)
        except UserError as error:
            raise UserError(f"The preset {path.name}: {error}") from error
    return Preset(tuple(loras), multipliers, values, full_prompt, media)


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    """The one object of settings in a JSON text: itself, or the only task of a queue."""
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"is not valid JSON ({error})") from error
    if isinstance(content, list) and len(content) == 1:
        content = content[0]
    if isinstance(content, dict) and isinstance(content.get("params"), dict):
        content = content["params"]
    if not isinstance(content, dict):
        raise _bad(path, "does not hold one object of settings")
    return content


def _read_zip(path: Path) -> Preset:
    try:
        with zipfile.ZipFile(path) as archive:
            files = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            name = next((name for name in SETTINGS_NAMES if name in files), None)
            if name is None:
                raise _bad(path, f"has no {' or '.join(SETTINGS_NAMES)}")
            content = _parse(path, _unpack(path, archive, files.pop(name), MAX_JSON_BYTES))
            media: dict[str, bytes] = {}
            if len(files) > MAX_MEDIA:
                raise _bad(path, f"has {len(files)} files; expected at most {MAX_MEDIA}")
            left = MAX_MEDIA_BYTES
            for member, info in files.items():
                if UNSAFE_NAME.search(member) or member.startswith("."):
                    raise _bad(path, f"holds '{member}', which is no plain file name")
                media[member] = _unpack(path, archive, info, left)
                left -= len(media[member])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise _bad(path, f"is not a whole zip file ({error})") from error
    return _preset(path, content, media)


def _unpack(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    """A member's bytes, never more than `limit` of them, whatever its header says."""
    with archive.open(info) as member:
        data = member.read(limit + 1)
    if len(data) > limit:
        raise _bad(path, f"unpacks '{info.filename}' to more than {limit:,} bytes")
    return data


def _write_zip(path: Path, settings: Mapping[str, Any], media: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("queue.json", _text([{"id": 1, "params": settings}]))
        for name, data in media.items():
            if UNSAFE_NAME.search(name) or name.startswith("."):
                raise UserError(f"'{name}' is no plain file name: a preset cannot hold it.")
            archive.writestr(name, data)


def _text(content: Any) -> str:
    return json.dumps(content, indent=4, ensure_ascii=False)


def _bad(path: Path, flaw: str) -> UserError:
    return UserError(f"The preset {path.name} {flaw}: replace or remove it.")
