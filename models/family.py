"""What a family of models offers to the program: a handler with these methods."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shared.gpu.footprint import Needs, Offers
from shared.loras.names import ModelNames
from shared.weights.files import Folders, Required

ModelDef = Mapping[str, Any]  # a card's "model" object


@dataclass(frozen=True)
class Fit:
    """role: "transformer" or "module0", the control network. kind: for people. label: the file's format."""

    role: str
    kind: str
    label: str


class Family(Protocol):
    """A handler, which is asked as a class. base_model_type: an architecture of `query_supported_types`.
    model_def: a card's "model" object. folders: where files are looked for; None: in the project.

    Methods with a body here say what a family without an answer of its own says.
    """

    @staticmethod
    def query_supported_types() -> list[str]:
        """The architectures that cards may name."""
        ...

    @staticmethod
    def query_model_family() -> str:
        """The family's name, which is also that of its folder of profiles."""
        ...

    @staticmethod
    def query_model_def(base_model_type: str, model_def: ModelDef) -> dict[str, Any]:
        """Capabilities: what acts on this model, and the sizes it can draw."""
        ...

    @staticmethod
    def query_model_files(base_model_type: str, model_def: ModelDef) -> list[Required]:
        """The files to have on disk before `load_model`."""
        ...

    @staticmethod
    def update_default_settings(
        base_model_type: str, model_def: ModelDef, ui_defaults: dict[str, Any]
    ) -> None:
        """Write the architecture's defaults over the settings' own."""
        ...

    @staticmethod
    def validate_generative_settings(
        base_model_type: str, model_def: ModelDef, settings: Mapping[str, Any]
    ) -> str | None:
        """A sentence when these settings, each in its range, cannot run on this model."""
        ...

    @staticmethod
    def load_model(*arguments: Any, **options: Any) -> tuple[Any, Any]:
        """(processor, pipeline) of files on disk. UserError naming a file that is missing or does not fit."""
        ...

    @staticmethod
    def register_lora_cli_args(parser: argparse._ActionsContainer, lora_root: str = "loras") -> None:
        """Add the flag for the family's folder of LoRAs."""

    @staticmethod
    def get_lora_dir(base_model_type: str, args: Any, lora_root: str | Path = "loras") -> Path:
        """The folder of this model's LoRAs. args: has the values of the flags as attributes."""
        return Path(lora_root)

    @staticmethod
    def query_lora_names(base_model_type: str, model_def: ModelDef) -> ModelNames:
        """The names by which LoRA files know this model's modules; asked where `loras` is a capability."""
        raise NotImplementedError

    @staticmethod
    def query_memory(
        base_model_type: str,
        model_def: ModelDef,
        settings: Mapping[str, Any],
        folders: Folders | None = None,
        *,
        lora_bytes: int = 0,
    ) -> Needs | None:
        """What a job needs besides the weights; None: nobody knows, and nothing is planned."""
        return None

    @staticmethod
    def query_offers(
        base_model_type: str,
        model_def: ModelDef,
        folders: Folders | None = None,
        float_bytes: int | None = 2,
    ) -> Offers:
        """The files that can serve as each part; asked where `query_memory` answers. UserError when a part's
        only file is damaged.
        """
        return Offers(())

    @staticmethod
    def query_precisions(
        base_model_type: str, model_def: ModelDef, folders: Folders | None = None
    ) -> list[str]:
        """How the transformer's files are stored that are here or can be fetched, the most precise first."""
        return []

    @staticmethod
    def query_download_bytes(
        base_model_type: str,
        model_def: ModelDef,
        required: Required,
        source: str,
        folders: Folders | None = None,
    ) -> int:
        """About how large the file `source` of a requirement is that is not on disk; 0 where nobody knows."""
        return 0

    @staticmethod
    def query_fit(
        base_model_type: str, model_def: ModelDef, file: Path, folders: Folders | None = None
    ) -> Fit | None:
        """What a checkpoint file would be to such a model; None where the family cannot tell. UserError, one
        sentence, when it does not fit.
        """
        return None

    @staticmethod
    def query_prompt_tokens(
        base_model_type: str, model_def: ModelDef, folders: Folders | None = None
    ) -> Callable[[str], int] | None:
        """What counts a prompt's tokens; None while it cannot be."""
        return None

    @staticmethod
    def query_time_grid(
        base_model_type: str, model_def: ModelDef, settings: Mapping[str, Any]
    ) -> list[float] | None:
        """The noise levels (1 to 0) of a run, where the settings choose them. UserError for settings out of
        range.
        """
        return None
