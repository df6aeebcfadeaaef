"""Profiles: settings under a name, such as an accelerator LoRA with the steps and the guidance it wants.

profiles/FAMILY/NAME.json is Wan2GP's form: {"activated_loras": [...], "loras_multipliers": text, any other
settings, "help": text}; of our own is "architectures", the models' architectures that it is for (all without
it). The LoRAs of a profile stand in front of the user's, and their strengths before the "|". No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.loras.library import address
from shared.loras.strengths import merge_profile, split_profile
from shared.settings.table import SETTINGS

MAX_BYTES = 1_000_000
LORA_KEYS = ("activated_loras", "loras_multipliers")
MEDIA_FREE = frozenset(SETTINGS) - {"model_type", "prompt", "seed", *LORA_KEYS}


@dataclass(frozen=True)
class Profile:
    """settings: without the LoRAs. architectures: () for all. ignored: keys that do nothing here."""

    name: str
    loras: tuple[str, ...] = ()
    multipliers: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    help: str = ""
    architectures: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def list_profiles(folder: Path, architecture: str = "") -> tuple[list[Profile], list[str]]:
    """(the profiles for models of `architecture`, in the order of their names; one sentence for each broken
    file).
    """
    found, broken = [], []
    for path in sorted(folder.glob("*.json"), key=lambda path: path.name.lower()):
        try:
            profile = read_profile(path)
        except UserError as error:
            broken.append(str(error))
        else:
            if not architecture or not profile.architectures or architecture in profile.architectures:
                found.append(profile)
    return found, broken


def read_profile(path: Path) -> Profile:
    """The profile at `path`. UserError when it is damaged."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _bad(path, f"is larger than {MAX_BYTES:,} bytes")
        content = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise _bad(path, f"cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _bad(path, "is not one object of settings")
    values = dict(content)
    loras, architectures = (values.pop(name, None) or [] for name in ("activated_loras", "architectures"))
    multipliers, words = (values.pop(name, None) or "" for name in ("loras_multipliers", "help"))
    for texts in (loras, architectures):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise _bad(path, "lists something other than texts")
    if not isinstance(multipliers, str) or not isinstance(words, str):
        raise _bad(path, "has strengths or a help that is no text")
    for entry in loras:
        try:
            address(entry)
        except UserError as error:
            raise UserError(f"The profile {path.name}: {error}") from error
    settings = {name: value for name, value in values.items() if name in MEDIA_FREE}
    ignored = tuple(name for name in values if name not in settings)
    return Profile(
        path.stem, tuple(loras), multipliers.strip(), settings, words, tuple(architectures), ignored
    )


def apply(profile: Profile | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the profile's (None: with no profile's) in the place of another profile's."""
    text = str(settings.get("loras_multipliers") or "")
    before, own = split_profile(text)
    users = list(settings.get("activated_loras") or [])[_count(before) :]
    if profile is None or not profile.loras:
        loras = {"activated_loras": users, "loras_multipliers": own}
    else:
        missing = len(profile.loras) - _count(profile.multipliers)
        strengths = " ".join([profile.multipliers, *["1"] * missing]).strip()
        loras = {
            "activated_loras": [*profile.loras, *users],
            "loras_multipliers": merge_profile(text, strengths),
        }
    return {**settings, **(profile.settings if profile else {}), **loras}


def _count(multipliers: str) -> int:
    """Tokens of a text of strengths, without its comments."""
    return sum(len(line.partition("#")[0].split()) for line in multipliers.splitlines())


def _bad(path: Path, flaw: str) -> UserError:
    return UserError(f"The profile {path.name} {flaw}: replace or remove it.")
