"""The one model that the worker keeps in memory: its files fetched, checked, loaded, and let go again."""

from __future__ import annotations

import gc
import logging
import sys
from dataclasses import dataclass
from typing import Any, Protocol

from shared.engine.catalog import HandlerFor, ModelInfo, catalog
from shared.engine.hashes import FileHashes
from shared.errors import Cancelled, UserError
from shared.weights.downloads import DownloadProgress, ensure
from shared.weights.files import Folders

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


class ModelHost:
    """Loads a model when it is first asked for and keeps it until another one is."""

    def __init__(
        self,
        folders: Folders,
        *,
        gpu: str = "",
        dtype: str = "",
        attention: str = "auto",
        handler_for: HandlerFor | None = None,
    ):
        self._folders, self._gpu, self._dtype, self._attention = folders, gpu, dtype, attention
        self._handler_for = handler_for
        self._loaded: LoadedModel | None = None

    def info(self, model_id: str) -> ModelInfo:
        """The model's card as it is on disk now; SettingsError when it is gone."""
        return catalog(self._folders.root, self._folders.ckpts, self._handler_for).model(model_id)

    def get(self, model_id: str, report: Report) -> LoadedModel:
        """The loaded model; downloads what is missing. Raises UserError or Cancelled."""
        info = self.info(model_id)
        if self._loaded is None or self._loaded.info.card != info.card:
            self.release()
            self._loaded = self._load(info, report)
        return self._loaded

    def release(self) -> None:
        """Let the model go and give its memory back."""
        residency = getattr(self._loaded.pipe, "residency", None) if self._loaded else None
        self._loaded = None
        if residency is not None:
            residency.forget()  # it holds on to the weights, and to page-locked memory
            del residency
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, info: ModelInfo, report: Report) -> LoadedModel:
        files = ensure(info.required, self._folders, download_report(report), report.cancelled)
        if report.cancelled():
            raise Cancelled
        report.phase("Loading model")
        check_device(self._gpu)
        log.info("Loading %s from %s", info.id, files["transformer"])
        modules = [path for role, path in files.items() if role.startswith("module")]
        processor, pipe = info.handler.load_model(
            [files["transformer"], *modules] if modules else files["transformer"],
            info.architecture,
            model_def=info.card.model,
            text_encoder_filename=files.get("text_encoder"),
            attention=self._attention,
            **self._dtype_argument(),
        )
        return LoadedModel(info, processor, pipe, FileHashes(files))

    def _dtype_argument(self) -> dict[str, Any]:
        if not self._dtype:
            return {}
        import torch

        return {"dtype": getattr(torch, DTYPES[self._dtype])}


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
