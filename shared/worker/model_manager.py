"""The one model that the worker keeps in memory: its files fetched, checked, loaded, and let go again."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from shared.errors import UserError
from shared.gpu import device, heap
from shared.gpu.interrupt import listening
from shared.gpu.planner import NO_OVERRIDES, Machine, Overrides, Plan
from shared.imaging.hires import LANCZOS, needs_no_model
from shared.imaging.upscale import Enlarger
from shared.library import consent
from shared.library.catalog import look_up
from shared.library.job_loras import Loras, gather
from shared.library.model_info import HandlerFor, LoraFolders, ModelInfo
from shared.library.outlook import NOTHING, Outlook, outlook
from shared.weights.downloads import DownloadProgress, ensure
from shared.weights.files import Folders, Required, describe
from shared.worker.component_cache import PartStore
from shared.worker.file_hashes import FileHashes, names_of

log = logging.getLogger(__name__)

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}  # flag -> name in torch


class Report(Protocol):
    """What loading tells its job; `Progress` is one."""

    def phase(self, name: str) -> None: ...
    def amount(self, done: int, total: int, seconds_left: float | None) -> None: ...
    def cancelled(self) -> bool: ...


class Silent:
    """The report of a model that no job waits for."""

    def phase(self, name: str) -> None: ...
    def amount(self, done: int, total: int, seconds_left: float | None) -> None: ...
    def cancelled(self) -> bool:
        return False


@dataclass(frozen=True)
class LoadedModel:
    info: ModelInfo
    processor: Any
    pipe: Any
    hashes: FileHashes
    files: dict[str, Path]
    plan: Plan | None = None
    loras: Loras = Loras()
    lora_hashes: FileHashes | None = None

    def lora_entries(self) -> list[dict[str, Any]]:
        """What the metadata says of the LoRAs: name, strength as the user writes it, hash of the file."""
        known = self.lora_hashes.known() if self.lora_hashes else {}
        called = names_of(self.loras.paths)
        return [
            {"name": name, "strength": strength, "sha256": known.get(called[path])}
            for name, strength, path in zip(
                self.loras.names, self.loras.strengths, self.loras.paths, strict=True
            )
        ]


class ModelHost:
    """Loads a model when it is first asked for and keeps it until another one is; what the two have in
    common stays.

    machine: reads what there is to compute on. save_quantized: write an int8 file beside a loaded one.
    lora_folders: as for the catalog. agreed: the downloads that somebody said yes to; None: no yes is needed.
    """

    def __init__(
        self,
        folders: Folders,
        *,
        gpu: str = "",
        overrides: Overrides = NO_OVERRIDES,
        save_quantized: bool = False,
        handler_for: HandlerFor | None = None,
        machine: Callable[[], Machine] = device.read,
        lora_folders: LoraFolders | None = None,
        agreed: Callable[[], Collection[str]] | None = None,
    ):
        self._agreed = agreed
        self._folders, self._gpu, self._overrides = folders, gpu, overrides
        self._save_quantized, self._handler_for, self._machine = save_quantized, handler_for, machine
        self._lora_folders = lora_folders
        self._loaded: LoadedModel | None = None
        self.planned: Plan | None = None  # of the job in hand, from before it is loaded
        self._residency: Any = None
        self._parts = PartStore(self._forget)

    def info(self, model_id: str) -> ModelInfo:
        """The model's card as it is on disk now; SettingsError when it is gone."""
        return look_up(model_id, self._folders, self._handler_for, self._lora_folders)

    def get(
        self,
        model_id: str,
        report: Report,
        settings: Mapping[str, Any] | None = None,
        rung: int = 0,
        careful: bool = False,
    ) -> LoadedModel:
        """The loaded model, placed as a job with `settings` needs it; downloads what is missing.

        settings: None for no job's: the model's defaults without LoRAs. rung: of the planner's ladder.
        careful: see planner.careful; on a CPU the rung says it.
        Raises UserError, which is NotAgreed where a download waits for a yes, or Cancelled.
        """
        self.planned = None
        info = self.info(model_id)
        if settings is not None and needs_no_model(settings):
            if settings["hires_upscaler"] != LANCZOS:
                self.give_way()  # an upscaler model is small, but nothing may be left of the card
            return LoadedModel(info, Enlarger(self._folders), None, FileHashes({}), {})
        loras = (
            Loras() if settings is None else gather(info, settings, download_report(report), report.cancelled)
        )
        wanted = info.defaults if settings is None else settings
        with listening(report.cancelled):
            found = self.outlook(info, wanted, rung, loras.bytes, careful)
        self.planned = plan = found.plan
        said = plan is not None and (plan.on_card or plan.warning)
        if plan is not None and said and (self._loaded is None or plan != self._loaded.plan):
            report.phase(f"Plan: {plan.report()}")
            log.info("Plan for %s: %s", info.id, plan.report())
        known = self._loaded
        if (
            known is None
            or known.info.card != info.card
            or not _serves(known.files, found.files, self._folders)
        ):
            if self._agreed is not None:
                consent.check(info, found, self._agreed())
            files = ensure(found.files, self._folders, download_report(report), report.cancelled)
            with listening(report.cancelled):
                known = None
                self._make_room(files)
                known = self._load(info, files, plan, report)
        if plan is not None and known.plan != plan:
            known.processor.apply_plan(plan)
            known = replace(known, plan=plan)
        self._loaded = known
        self._loaded = known = self._with_loras(known, loras, report)
        return known

    def _with_loras(self, known: LoadedModel, loras: Loras, report: Report) -> LoadedModel:
        """The model with these LoRAs and no others. It may share its transformer with the one before it."""
        if known.info.lora_folder is None:
            return known
        if loras.paths and loras.paths != known.loras.paths:
            report.phase("Loading LoRAs")
        names = known.info.loras().names
        changed = known.processor.use_loras(loras.paths, loras.multipliers, names)
        hashes = known.lora_hashes
        if changed or hashes is None:
            hashes = FileHashes({str(path): path for path in loras.paths})
        return replace(known, loras=loras, lora_hashes=hashes)

    def outlook(
        self,
        info: ModelInfo,
        settings: Mapping[str, Any],
        rung: int = 0,
        lora_bytes: int = 0,
        careful: bool = False,
    ) -> Outlook:
        """How a job is made here, and its files. UserError when it cannot be."""
        agreed = NOTHING if self._agreed is None else self._agreed()
        return outlook(
            info,
            self._folders,
            settings,
            self._machine,
            self._overrides,
            rung=rung,
            lora_bytes=lora_bytes,
            careful=careful,
            agreed=agreed,
        )

    def give_way(self) -> None:
        """Take everything off the card after a job that did not fit; the weights stay in RAM."""
        if self._residency is not None:
            self._residency.evict()
        _empty_caches()

    def release(self) -> None:
        """Let the model go and give its memory back."""
        self._make_room({})

    def _make_room(self, files: Mapping[str, Path]) -> None:
        """Let go of the loaded model but for its parts made of `files`."""
        residency = getattr(self._loaded.pipe, "residency", None) if self._loaded else None
        self._loaded = None
        if residency is not None and self._residency is None:
            residency.forget()  # it holds on to the weights, and to page-locked memory
        del residency
        self._parts.retain(files.values())
        _empty_caches()

    def _forget(self, part: Any) -> None:
        """A part goes: so does its memory on the card."""
        if self._residency is not None and part is not self._residency:
            self._residency.forget(part)

    def _load(
        self, info: ModelInfo, files: dict[str, Path], plan: Plan | None, report: Report
    ) -> LoadedModel:
        report.phase("Loading model")
        check_device(self._gpu)
        log.info("Loading %s from %s", info.id, files["transformer"])
        modules = [path for role, path in files.items() if role.startswith("module")]
        options: dict[str, Any] = self._dtype_argument()
        if plan is not None:
            options |= {
                "share": self._parts.share,
                "pinned_share": self._overrides.reserved,
                "offload": plan.engine,
            }
        if self._save_quantized:
            options["save_quantized"] = True
        processor, pipe = info.handler.load_model(
            [files["transformer"], *modules] if modules else files["transformer"],
            info.architecture,
            model_def=info.card.model,
            folders=self._folders,
            text_encoder_filename=files.get("text_encoder"),
            attention=self._overrides.attention,
            **options,
        )
        if plan is not None:
            self._residency = getattr(pipe, "residency", None)
        return LoadedModel(info, processor, pipe, FileHashes(files), files)

    def _dtype_argument(self) -> dict[str, Any]:
        if not self._overrides.dtype:
            return {}
        import torch

        return {"dtype": getattr(torch, DTYPES[self._overrides.dtype])}


def _serves(files: Mapping[str, Path], needed: Sequence[Required], folders: Folders) -> bool:
    """Whether the loaded files are those that are needed now."""
    wanted: dict[str, Path | None] = {}
    for one in needed:
        wanted.setdefault(one.role, describe(one, folders).path)
    return wanted == files


def _empty_caches() -> None:
    gc.collect()
    heap.trim()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_device(gpu: str) -> None:
    """UserError when a chosen card is not there, instead of computing on the CPU unasked."""
    if not gpu.startswith("cuda:"):
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"--gpu came as {gpu}, but torch finds no such device here: check the driver and the number, "
            "or choose --gpu cpu."
        )


def download_report(report: Report) -> Any:
    """Show each file's download as a phase of its own, counted in MiB."""
    current = ""

    def progress(download: DownloadProgress) -> None:
        nonlocal current
        if download.file != current:
            current = download.file
            report.phase(f"Downloading {current}")
        left = (download.total_bytes - download.done_bytes) / download.speed if download.speed else None
        report.amount(download.done_bytes >> 20, download.total_bytes >> 20, left)

    return progress
