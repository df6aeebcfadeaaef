"""The program's own settings file, `wgp_config.json`: where things lie on this computer, and what is usual.

Wan2GP's file of the same name can be used as it is; its other keys are left alone. The file is replaced whole
or not at all, and the one before it stays as `wgp_config.json.bak`. A file that cannot be read is set aside
under another name, never overwritten.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.files import json_file
from shared.gpu.offload_engines import SLOTS
from shared.imaging.naming import TEMPLATE, template_problem
from shared.settings.table import ATTENTION_PACKAGES

log = logging.getLogger(__name__)

FILE = "wgp_config.json"
LAST_USED = "last"
#: image_output_codec -> (setting image_format, quality)
CODECS = {
    "png": ("png", 95),
    "jpeg_95": ("jpeg", 95),
    "jpeg_85": ("jpeg", 85),
    "webp_95": ("webp", 95),
    "webp_85": ("webp", 85),
}
#: Wan2GP's names of attention methods that are ours under another name
OTHER_NAMES = {"sage2": "sage"}


@dataclass(frozen=True)
class Config:
    """checkpoints_paths: folders with model files, searched in this order; downloads go into the first.
    loras_root: the folder of all LoRA folders. profiles_dir: of the profiles, with a folder for each family.
    save_path: of the pictures. Relative paths start from the project's root.

    default_model: the model at the start; "" the built-in one, "last" the one used last, else a model's id.
    offload: what moves the weights, "" the default. profile: -1 leaves the plan to ZGP. preload_in_VRAM: MB;
    0 leaves it to the plan.
    """

    checkpoints_paths: tuple[str, ...] = ("ckpts", ".")
    loras_root: str = "loras"
    profiles_dir: str = "profiles"
    save_path: str = "outputs"
    default_model: str = ""
    image_output_codec: str = "png"
    output_filename: str = TEMPLATE
    metadata_type: str = "metadata"
    offload: str = ""
    profile: float = -1
    preload_in_VRAM: int = 0
    vram_safety_coefficient: float = 0.8
    attention_mode: str = "auto"
    compile: str = ""
    save_quantized: bool = False

    def folders(self, root: Path) -> list[Path]:
        """`checkpoints_paths` as absolute paths."""
        return [root / path for path in self.checkpoints_paths]


def _is_paths(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_path(x) for x in value)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _is_number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    )


def _is_one_of(*choices: Any) -> Callable[[Any], bool]:
    return lambda value: not isinstance(value, bool | list | dict) and value in choices


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 200


def _is_template(value: Any) -> bool:
    return isinstance(value, str) and not template_problem(value)


def _attention(value: str) -> str:
    return OTHER_NAMES.get(value, value)


PROFILES = (-1, 1, 2, 3, 3.5, 4, 4.5, 5)
ATTENTION = ("auto", "sdpa", *ATTENTION_PACKAGES)

#: key -> (what its value must be, in words, the same as a test, how the value is kept)
KEYS: dict[str, tuple[str, Callable[[Any], bool], Callable[[Any], Any]]] = {
    "checkpoints_paths": ("a list of folders", _is_paths, tuple),
    "loras_root": ("a folder", _is_path, str),
    "profiles_dir": ("a folder", _is_path, str),
    "save_path": ("a folder", _is_path, str),
    "default_model": (f"a model's id, '{LAST_USED}' or nothing", _is_id, str),
    "image_output_codec": (f"one of {', '.join(CODECS)}", _is_one_of(*CODECS), str),
    "output_filename": (f"a pattern such as {TEMPLATE}", _is_template, str),
    "metadata_type": ("metadata or none", _is_one_of("metadata", "none"), str),
    "offload": (f"{' or '.join(SLOTS)}, or nothing", _is_one_of("", *SLOTS), str),
    "profile": (f"one of {', '.join(map(str, PROFILES))}", _is_one_of(*PROFILES), float),
    "preload_in_VRAM": ("a number of MB from 0 to 1000000", _is_number(0, 1_000_000), int),
    "vram_safety_coefficient": ("a number from 0.1 to 1", _is_number(0.1, 1), float),
    "attention_mode": (f"one of {', '.join(ATTENTION)}", _is_one_of(*ATTENTION, *OTHER_NAMES), _attention),
    "compile": ("'transformer' or nothing", _is_one_of("", "transformer"), str),
    "save_quantized": ("true or false", lambda value: isinstance(value, bool), bool),
}  # fmt: skip


def read(folder: Path) -> tuple[Config, list[str]]:
    """The configuration in `folder`, and what the user must be told of it.

    A damaged file is renamed and the backup takes its place; a wrong value is replaced by the default.
    UserError when the file may not be read.
    """
    path = folder / FILE
    if not path.exists():
        return Config(), []
    try:
        return _checked(json_file.parse(path), path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): check its permissions."
        ) from error
    except ValueError as error:
        aside = json_file.set_aside(path, "damaged")
        notice = f"{path} cannot be read ({error}); it is now {aside.name}"
    backup = json_file.backup_of(path)
    try:
        config, notices = _checked(json_file.parse(backup), backup)
    except (OSError, ValueError):
        return Config(), [f"{notice}, and the defaults apply."]
    shutil.copyfile(backup, path)
    return config, [f"{notice}, and the version before it applies.", *notices]


def write(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change these keys of the file and keep the rest. Raises UserError for a wrong value or a full disk."""
    path = folder / FILE
    for key, value in changes.items():
        if problem := _problem(key, value):
            raise UserError(f"{problem}.")
    read(folder)  # sets a damaged file aside
    old = json_file.parse(path) if path.exists() else {}
    json_file.write(path, {**old, **changes})


def create(folder: Path) -> None:
    """A file with the defaults, where there is none, in a folder that need not exist."""
    if not (folder / FILE).exists():
        json_file.write(folder / FILE, asdict(Config()))


def reset(folder: Path) -> Path | None:
    """Set the file aside, so that the defaults apply; Wan2GP's other keys stay. The old one's new name."""
    path = folder / FILE
    if not path.exists():
        return None
    others = {name: value for name, value in json_file.parse(path).items() if name not in KEYS}
    try:
        aside = json_file.set_aside(path, "before")
    except OSError as error:
        raise json_file.not_written(path, error) from error
    if others:
        json_file.write(path, others)
    return aside


def _problem(key: str, value: Any) -> str | None:
    if key not in KEYS:
        return f"{FILE} has no key '{key}'; it has: {', '.join(KEYS)}"
    words, fits, _ = KEYS[key]
    if fits(value):
        return None
    reason = template_problem(value) if key == "output_filename" and isinstance(value, str) else ""
    came = f"'{key}' in {FILE} came as {json.dumps(value)[:80]}; expected {words}"
    return f"{came} ({reason})" if reason else came


def _checked(content: Mapping[str, Any], path: Path) -> tuple[Config, list[str]]:
    config, notices = Config(), []
    for key, value in content.items():
        if key not in KEYS:
            log.debug("%s: the key %s means nothing here.", path, key)
        elif problem := _problem(key, value):
            notices.append(f"{problem}; the default applies.")
        else:
            config = replace(config, **{key: KEYS[key][2](value)})
    return config, notices
