"""What the worker is told arrives as it was sent."""

import dataclasses
from pathlib import Path

from shared.gpu.planner import Overrides
from shared.imaging.saving import Rules
from shared.library.model_info import LoraFolders
from shared.weights.files import Folders
from shared.worker.config import WorkerConfig

PLAIN = WorkerConfig(Folders(Path("/zgp"), Path("/zgp/ckpts")), Path("/zgp/out"), Path("/zgp/q.sqlite3"))
FULL = WorkerConfig(
    Folders(Path("/zgp"), Path("/ckpts"), (Path("/мои модели"), Path("/two"))),
    Path("/pictures\udce9"),  # a name that is no UTF-8
    Path("/zgp/q.sqlite3"),
    LoraFolders(Path("/loras"), {"lora_dir_z_image": "/mine"}),
    "cuda:1",
    Overrides(offload="stream", profile="3.5", preload=5, dtype="bf16", attention="sage", reserved=0.1),
    True,
    Rules(template="{seed}", metadata=False, format="jpeg", quality=85),
    2,
)


def test_it_arrives_as_it_was_sent() -> None:
    for config in (PLAIN, FULL):
        assert WorkerConfig.from_json(config.to_json()) == config
    assert all(getattr(FULL, field.name) != getattr(PLAIN, field.name) or field.name == "database"
               for field in dataclasses.fields(WorkerConfig))  # fmt: skip


def test_it_fits_any_command_line() -> None:
    assert FULL.to_json().isascii()
