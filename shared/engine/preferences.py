"""What the page keeps of how the user wants ZGP: the defaults of each model, and wgp_config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from shared import config as config_file
from shared.engine.configuration import EngineConfig
from shared.errors import UserError
from shared.library import saved_defaults
from shared.library.catalog import Catalog


class Preferences:
    """Every change is a UserError while the configuration is locked.

    catalog: of the models as they are now. reload: makes saved defaults act. use: makes a configuration act.
    """

    def __init__(
        self,
        config: EngineConfig,
        catalog: Callable[[], Catalog],
        reload: Callable[[], object],
        use: Callable[[EngineConfig], object],
    ):
        self._config = config
        self._catalog = catalog
        self._reload = reload
        self._use = use
        self._saved = config.saved or config.root / "settings"
        self._folder = config.file_folder or config.root

    def save_defaults(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Keep these settings as their model's defaults: what of them differs from the factory's.

        SettingsError for settings that cannot be used, UserError when they cannot be written.
        """
        self.check_unlocked()
        catalog = self._catalog()
        model = catalog.model(settings.get("model_type") or catalog.default_model)
        kept = {name: value for name, value in settings.items() if name not in saved_defaults.NEVER}
        valid = catalog.validate({**kept, "model_type": model.id, "prompt": "-"}).settings
        saved = saved_defaults.write(self._saved, model.id, valid, model.factory)
        self._reload()
        return saved

    def prefer(self, model_id: str, name: str, value: Any) -> None:
        """Keep one setting as this model's default, beside what was saved of it before. Errors as above."""
        model = self._catalog().model(model_id)
        self.save_defaults({**model.defaults, "model_type": model_id, name: value})

    def reset_defaults(self, model_ids: Iterable[str] | None = None) -> list[Path]:
        """Set what was saved for these models (None: for all) aside; the new names of the files."""
        self.check_unlocked()
        asides = saved_defaults.reset(self._saved, model_ids or self._catalog().models)
        self._reload()
        return asides

    def change_config(self, changes: Mapping[str, Any]) -> None:
        """Write keys of wgp_config.json. UserError for a wrong value or a folder that cannot be written."""
        self.check_unlocked()
        config_file.write(self._folder, changes)
        self._use(self._config.following_file())

    def reset_config(self) -> Path | None:
        """Set wgp_config.json aside; its new name."""
        self.check_unlocked()
        aside = config_file.reset(self._folder)
        self._use(self._config.following_file())
        return aside

    def check_unlocked(self) -> None:
        if self._config.lock_config:
            raise UserError("The settings of this ZGP are locked (--lock-config).")
