"""What the worker process is told at its start: one JSON text on its command line. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.gpu.planner import NO_OVERRIDES, Overrides
from shared.imaging.saving import Rules
from shared.library.model_info import LoraFolders
from shared.weights.files import Folders


@dataclass(frozen=True)
class WorkerConfig:
    """gpu: "", "cpu" or "cuda:N". save_quantized: write an int8 file beside a model that is loaded.
    lora_folders: as for the catalog. verbose: 0, 1 or 2, of the log.
    """

    folders: Folders
    output_dir: Path
    database: Path
    lora_folders: LoraFolders | None = None
    gpu: str = ""
    overrides: Overrides = NO_OVERRIDES
    save_quantized: bool = False
    saving: Rules = Rules()
    verbose: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)  # paths as texts

    @classmethod
    def from_json(cls, text: str) -> WorkerConfig:
        """What `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        places, loras = fields["folders"], fields["lora_folders"]
        root, ckpts, *others = map(Path, (places["root"], places["ckpts"], *places["others"]))
        return cls(
            **fields
            | {
                "folders": Folders(root, ckpts, tuple(others)),
                "output_dir": Path(fields["output_dir"]),
                "database": Path(fields["database"]),
                "lora_folders": loras and LoraFolders(Path(loras["root"]), loras["given"]),
                "overrides": Overrides(**fields["overrides"]),
                "saving": Rules(**fields["saving"]),
            }
        )
