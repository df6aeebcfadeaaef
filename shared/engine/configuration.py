"""How one engine is set up: where things are, how the worker computes, and the worker's command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.gpu.planner import Overrides
from shared.imaging.saving import Rules
from shared.library.catalog import Catalog, catalog, locked
from shared.library.model_info import HandlerFor, LoraFolders
from shared.weights.files import Folders
from shared.worker.config import WorkerConfig

WORKER = (sys.executable, "-m", "shared.worker.worker")


def queue_of(outputs: Path) -> Path:
    """The file of the queue whose pictures go into this folder."""
    return outputs / ".zgp" / "zgp.sqlite3"


@dataclass(frozen=True)
class EngineConfig:
    """Where things are and how the worker computes; `EngineConfig.at(root)` has the usual places.

    gpu: "", "cpu" or "cuda:N". overrides: what the planner is to obey. save_quantized: write an int8 file
    beside a model that is loaded.
    dated_folders: images go into subfolders of output_dir, as `saving` names them, else straight into it.
    saving: what files are called and what is in them.
    default_settings: defaults that win over the models' own. house_settings: defaults that win over the
    cards' alone. saved: folder of the defaults that the user saved. warm: load the default model at the
    start. default_model: as in shared.config.
    lock_config: nobody changes the program's settings over the page. lock_model: only the default model is
    used. advanced: the page opens with its group of that name unfolded.
    file_folder: of wgp_config.json. reread: this configuration as the file and the flags say it now.
    others: further folders with model files. lora_folders: by default `root`/loras.
    profiles: has a folder for each family; by default `root`/profiles.
    notices: what the log is to say at the start.
    """

    root: Path
    ckpts: Path
    output_dir: Path
    database: Path
    gpu: str = ""
    overrides: Overrides = Overrides()
    save_quantized: bool = False
    verbose: int = 0
    dated_folders: bool = True
    saving: Rules = Rules()
    default_settings: Mapping[str, Any] = field(default_factory=dict)
    house_settings: Mapping[str, Any] = field(default_factory=dict)
    saved: Path | None = None
    default_model: str = ""
    lock_config: bool = False
    lock_model: bool = False
    advanced: bool = False
    file_folder: Path | None = None
    reread: Callable[[], EngineConfig] | None = None
    warm: bool = True
    others: tuple[Path, ...] = ()
    lora_folders: LoraFolders | None = None
    profiles: Path | None = None
    notices: tuple[str, ...] = ()
    worker_command: tuple[str, ...] = WORKER
    restart_seconds: float = 0.5

    @classmethod
    def at(cls, root: Path, **others: Any) -> EngineConfig:
        """The configuration with the usual places under `root`; `others` are fields that differ."""
        outputs = root / "outputs"
        places = {"ckpts": root / "ckpts", "output_dir": outputs, "database": queue_of(outputs)}
        return cls(root=root, **{**places, **others})

    @property
    def folders(self) -> Folders:
        """Where model files are."""
        return Folders(self.root, self.ckpts, self.others)

    @property
    def profiles_folder(self) -> Path:
        return self.profiles or self.root / "profiles"

    @property
    def inputs(self) -> Path:
        """Where copies of the jobs' pictures are."""
        return self.database.with_name("inputs")

    @property
    def picture_folders(self) -> tuple[Path, ...]:
        """Where pictures are: the outputs, and the folder beside the queue, where those lie that were made
        before the outputs got another folder.
        """
        return (self.output_dir, self.database.parents[1])

    @property
    def log_file(self) -> Path:
        return self.database.with_name("zgp.log")

    def following_file(self) -> EngineConfig:
        """With what the file and the flags now say of defaults and of the worker; folders wait for a new
        start.
        """
        if self.reread is None:
            return self
        new = self.reread()
        return replace(
            self,
            house_settings=new.house_settings,
            overrides=new.overrides,
            saving=new.saving,
            save_quantized=new.save_quantized,
        )


def read_catalog(
    config: EngineConfig,
    handler_for: HandlerFor | None = None,
    drafts: Mapping[str, dict[str, Any]] | None = None,
) -> Catalog:
    """The models as they are on disk now. drafts: as for load_cards."""
    found = catalog(
        config.root,
        config.ckpts,
        handler_for,
        config.default_settings,
        others=config.others,
        lora_folders=config.lora_folders,
        drafts=drafts,
        house=config.house_settings,
        saved=config.saved,
        preferred=config.default_model,
    )
    return locked(found) if config.lock_model else found


def worker_config(config: EngineConfig) -> WorkerConfig:
    """What the worker process is told."""
    return WorkerConfig(
        folders=config.folders,
        output_dir=config.output_dir,
        database=config.database,
        lora_folders=config.lora_folders,
        gpu=config.gpu,
        overrides=config.overrides,
        save_quantized=config.save_quantized,
        saving=config.saving,
        verbose=config.verbose,
    )


def worker_environment(gpu: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables of the worker process. UserError when `gpu` is not one of the visible devices."""
    # By default OpenMP's threads spin while they wait for each other: on a CPU that does anything else
    # besides, a small model then takes ten times as long.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **inherited}
    if gpu:
        # Only the chosen device is shown to the worker, so that no library of it can pick another one.
        environment["CUDA_VISIBLE_DEVICES"] = "" if gpu == "cpu" else _device_name(gpu, inherited)
    return environment


def _device_name(gpu: str, inherited: Mapping[str, str]) -> str:
    """What CUDA calls device N of those that this process sees."""
    number = int(gpu.removeprefix("cuda:"))
    visible = inherited.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(number)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if number >= len(names):
        raise UserError(
            f"--gpu came as {gpu}, but CUDA_VISIBLE_DEVICES shows {len(names)} devices: choose a lower one."
        )
    return names[number]
