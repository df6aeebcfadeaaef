"""One model as everybody sees it: its card, what its handler says, and which of its files are here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models import Family
from shared.library.cards import Card
from shared.loras.library import Library
from shared.loras.names import ModelNames
from shared.settings.table import SettingsError
from shared.weights.files import Required

HandlerFor = Callable[[str], Family]


@dataclass(frozen=True)
class LoraFolders:
    """root: has a folder for each family. given: folders of the command line, by their flags' names."""

    root: Path
    given: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelInfo:
    """One model. `settings` names what acts on it, in page order; `defaults` has a value for each of them.

    factory: the defaults without what the user saved and without the flags' own.
    lora_folder: where its LoRAs are, None where the family has none.
    """

    id: str
    name: str
    description: str
    architecture: str
    capabilities: dict[str, Any]
    defaults: dict[str, Any]
    settings: list[str]
    available: bool
    missing: list[str]
    size_bytes: int
    required: list[Required]
    card: Card
    handler: Family
    lora_folder: Path | None = None
    factory: dict[str, Any] = field(default_factory=dict)

    def loras(self) -> Library:
        """The LoRAs for this model; one object for models of one shape. SettingsError when it has none."""
        if self.lora_folder is None:
            raise SettingsError([f"The model '{self.id}' has no LoRAs: choose another model."])
        return _library(self.lora_folder, self.handler.query_lora_names(self.architecture, self.card.model))


@functools.cache
def _library(folder: Path, names: ModelNames) -> Library:
    """Kept, because it remembers its verdicts."""
    return Library(folder, names)
