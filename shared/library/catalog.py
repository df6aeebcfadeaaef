"""The models a user can choose: cards, what their handlers say of them, and what is on disk. No torch."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from models import Family
from models import handler_for as registry
from shared.errors import UserError
from shared.imaging.hires import upscalers
from shared.library import job_loras as loras
from shared.library import saved_defaults
from shared.library.cards import Card, load_cards
from shared.library.model_info import HandlerFor, LoraFolders, ModelInfo
from shared.prompts.jobs import expand
from shared.prompts.remarks import remarks
from shared.prompts.wildcards import Wildcards
from shared.settings.messages import printable
from shared.settings.table import SETTINGS, SettingsError, applies
from shared.settings.validation import Validated, validate
from shared.weights.files import Folders, describe

DEFAULT_MODEL = "z_image_mini"  # built in: it runs right after the installation, without a download

@dataclass(frozen=True)
class Catalog:
    """All models by id, and one sentence for each card that could not be used.

    notices: what of the saved defaults does nothing. preferred: the model that the user wants first.
    locked: the only model that may be used; "" = all. wildcards: a folder.
    """

    models: dict[str, ModelInfo]
    errors: list[str]
    notices: list[str] = field(default_factory=list)
    preferred: str = ""
    locked: str = ""
    wildcards: Path = Path("wildcards")

    @property
    def default_model(self) -> str:
        """The preferred model, else the built-in one, else the first whose files are here, else the first; ""
        without any model.
        """
        if self.preferred in self.models:
            return self.preferred
        here = [model.id for model in self.models.values() if model.available]
        candidates = [DEFAULT_MODEL] if DEFAULT_MODEL in self.models else [*here, *self.models, ""]
        return candidates[0]

    def model(self, model_id: str) -> ModelInfo:
        """The model of that id; SettingsError that names the nearest one when there is none."""
        if isinstance(model_id, str) and model_id in self.models:
            return self.models[model_id]
        if self.locked:
            only = f"this ZGP is locked to '{self.locked}' (--lock-model)"
            raise SettingsError([f"The model '{printable(str(model_id))}' cannot be used: {only}"])
        near = get_close_matches(str(model_id), self.models, n=1, cutoff=0.0)
        hint = f"did you mean '{near[0]}'?" if near else "there is no usable card in defaults/ or finetunes/."
        raise SettingsError([f"There is no model '{printable(str(model_id))}': {hint}"])

    def validate(self, values: Mapping[str, Any]) -> Validated:
        """Complete `values` with the model's defaults; SettingsError lists every problem."""
        if not isinstance(values, Mapping):
            return validate(values, {}, {})  # says what came instead
        model = self.model(values.get("model_type") or self.default_model)
        validated = validate({**values, "model_type": model.id}, model.defaults, model.capabilities)
        problem = model.handler.validate_generative_settings(
            model.architecture, model.card.model, validated.settings
        )
        problems = [*([problem] if problem else []), *loras.problems(model, validated.settings)]
        if problems:
            raise SettingsError(problems)
        return validated

    def validate_all(self, values: Mapping[str, Any]) -> list[Validated]:
        """As `validate`, for every job that `values` stand for (see prompts.jobs.expand), seeds drawn."""
        whole = self.validate(values)
        try:
            jobs = expand(whole.settings, Wildcards(self.wildcards))
        except UserError as error:
            raise SettingsError([str(error)]) from error
        if whole.settings.get("prompt_template"):  # as it was painted
            return [replace(whole, settings=self.validate(job).settings) for job in jobs]
        model, notes = self.model(whole.settings["model_type"]), remarks(whole.settings["prompt"])
        found = []
        for job in jobs:
            tagged, said = loras.from_tags(model, job)
            settings = self.validate(tagged).settings
            found.append(replace(whole, settings=settings, notes=[*whole.notes, *notes, *said]))
        return found

    def validate_one(self, values: Mapping[str, Any]) -> Validated:
        """As `validate_all`, for values that stand for one job. SettingsError when they stand for more."""
        first, *more = self.validate_all(values)
        if more:
            sentence = (
                f"the prompt stands for {len(more) + 1} jobs: expected one; of a prompt in which something "
                "is drawn, make 1 image"
            )
            raise SettingsError([sentence])
        return first

    def time_grid(self, values: Mapping[str, Any]) -> list[float] | None:
        """The noise levels that these settings visit, for models whose sampler lets the user shape them.

        SettingsError for settings that cannot run.
        """
        model = self.model(values["model_type"])
        if not model.capabilities.get("unified"):
            return None
        settings = self.validate({**values, "prompt": "-"}).settings
        return model.handler.query_time_grid(model.architecture, model.card.model, settings)


def look_up(
    model_id: str,
    folders: Folders,
    handler_for: HandlerFor | None = None,
    lora_folders: LoraFolders | None = None,
) -> ModelInfo:
    """One model as `catalog` describes it, with the files that are here. SettingsError when it is gone."""
    cards, _ = load_cards(folders.root, SETTINGS)
    if model_id in cards:
        card, handler_for = cards[model_id], handler_for or registry
        lora_folders = lora_folders or LoraFolders(folders.root / "loras")
        return _describe(card, handler_for(card.architecture), folders, lora_folders, {})
    found = catalog(
        folders.root, folders.ckpts, handler_for, others=folders.others, lora_folders=lora_folders
    )
    return found.model(model_id)  # says what is there instead


def catalog(
    root: Path,
    ckpts: Path,
    handler_for: HandlerFor | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    others: tuple[Path, ...] = (),
    lora_folders: LoraFolders | None = None,
    drafts: Mapping[str, dict[str, Any]] | None = None,
    house: Mapping[str, Any] | None = None,
    saved: Path | None = None,
    preferred: str = "",
) -> Catalog:
    """Read all cards under `root`. Defaults, each layer over the one before it: the handler's, the card's,
    `house`, those of the folder `saved`, `overrides`.

    others: further folders with model files. lora_folders: by default `root`/loras.
    drafts: as for load_cards.
    """
    handler_for = handler_for or registry
    cards, card_errors = load_cards(root, SETTINGS, drafts)
    errors = [str(error) for error in card_errors]
    models: dict[str, ModelInfo] = {}
    notices: list[str] = []
    folders = Folders(root, ckpts, others)
    lora_folders = lora_folders or LoraFolders(root / "loras")
    for card in cards.values():
        try:
            model = _describe(card, handler_for(card.architecture), folders, lora_folders, house or {})
        except UserError as error:
            errors.append(f"{card.path.name}: {error}")
            continue
        if saved is not None:
            found, told = saved_defaults.read(saved, card.id, model.factory, model.capabilities)
            model.defaults.update(found)
            notices += told
        model.defaults.update({n: value for n, value in (overrides or {}).items() if n in model.settings})
        models[card.id] = model
    return Catalog(models, errors, notices, preferred, wildcards=root / "wildcards")


def locked(found: Catalog) -> Catalog:
    """The catalog with its default model alone."""
    only = found.default_model
    models = {only: found.models[only]} if only else {}
    return replace(found, models=models, preferred=only, locked=only)


def _describe(
    card: Card, handler: Family, folders: Folders, lora_folders: LoraFolders, house: Mapping[str, Any]
) -> ModelInfo:
    capabilities = {
        "upscalers": list(upscalers(folders)),
        "precisions": _precisions(card, handler, folders),
        **handler.query_model_def(card.architecture, card.model),
    }
    names = [setting.name for setting in SETTINGS.values() if applies(setting, capabilities)]
    required = handler.query_model_files(card.architecture, card.model)
    files = [describe(one, folders) for one in required]
    missing = [one.alternatives[0] for one, file in zip(required, files, strict=True) if not file.on_disk]
    factory = _factory(card, handler, names, house)
    return ModelInfo(
        id=card.id,
        name=card.name,
        description=card.description,
        architecture=card.architecture,
        capabilities=capabilities,
        defaults=dict(factory),
        settings=names,
        available=not missing,
        missing=missing,
        size_bytes=sum(file.size_bytes or 0 for file in files),
        required=required,
        card=card,
        handler=handler,
        lora_folder=_lora_folder(card, handler, lora_folders) if capabilities.get("loras") else None,
        factory=factory,
    )


def _precisions(card: Card, handler: Family, folders: Folders) -> list[str]:
    """Of the model's files, where there is a choice."""
    precisions = handler.query_precisions(card.architecture, card.model, folders)
    return precisions if len(precisions) > 1 else []


def _lora_folder(card: Card, handler: Family, folders: LoraFolders) -> Path:
    folder: Path = handler.get_lora_dir(card.architecture, Namespace(**folders.given), folders.root)
    return folder.absolute()


def _factory(card: Card, handler: Family, names: list[str], house: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {name: SETTINGS[name].default for name in names}
    handler.update_default_settings(card.architecture, card.model, defaults)
    defaults.update(card.defaults)
    defaults.update(house)
    return {**{name: defaults[name] for name in names}, "model_type": card.id}
