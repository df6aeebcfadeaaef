"""A second ZGP on a queue that another one works on: its jobs are made by that one's worker, which was
started with other flags. What the second one asks of a worker has to be the same, or is refused.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.engine.configuration import EngineConfig
from shared.errors import UserError
from shared.files import json_file
from shared.files.lock import ProcessLock

log = logging.getLogger(__name__)

#: what is asked of a worker: names of flags -> its value in a configuration
WORKER_FLAGS: dict[tuple[str, ...], Callable[[EngineConfig], Any]] = {
    ("gpu",): lambda config: config.gpu,
    ("offload",): lambda config: config.overrides.offload,
    ("profile",): lambda config: config.overrides.profile,
    ("preload",): lambda config: config.overrides.preload,
    ("bf16", "fp16"): lambda config: config.overrides.dtype,
    ("attention",): lambda config: config.overrides.attention,
    ("compile",): lambda config: config.overrides.compile,
    ("perc_reserved_mem_max",): lambda config: config.overrides.reserved,
    ("vram_safety_coefficient",): lambda config: config.overrides.safety,
    ("save_quantized",): lambda config: config.save_quantized,
    ("config",): lambda config: [str(folder) for folder in (config.ckpts, *config.others)],
    ("loras",): lambda config: None if config.lora_folders is None else str(config.lora_folders.root),
}


def worker_values(config: EngineConfig) -> dict[str, Any]:
    """What a worker is started with, by the flags' names; those of LoRA folders by their own."""
    values = {" ".join(flags): read(config) for flags, read in WORKER_FLAGS.items()}
    return values | dict(config.lora_folders.given if config.lora_folders else {})


def note(config: EngineConfig) -> None:
    """Leave word, beside the queue, of what the worker of this process is started with."""
    try:
        json_file.write(_place(config.database), worker_values(config))
    except UserError as error:  # a worker without it is better than none
        log.warning("A second start will not know the flags of this one: %s", error)


def check(config: EngineConfig, given: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """UserError when another process works on this queue with a worker that was started otherwise than the
    flags given here say. defaults: what they are where nothing is given.
    """
    if not _is_supervised(config.database):
        return
    try:
        theirs = json_file.parse(_place(config.database))
    except (OSError, ValueError):  # it has only just begun, or is of another version
        return
    mine = json.loads(json.dumps(worker_values(config)))
    asked = {name for name, value in vars(given).items() if value != getattr(defaults, name, None)}
    differing = {key for key, value in mine.items() if theirs.get(key) != value}
    others = [name for key in mine if key in differing for name in key.split() if name in asked]
    if others:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in others)
        raise UserError(
            f"A ZGP that was started without this {flags} works on the queue {config.database}, and its "
            "worker would make these jobs: stop it first, or give this one a queue of its own with "
            "--output-dir DIR."
        )


def _place(database: Path) -> Path:
    return database.with_name(database.name + ".worker.json")


def _is_supervised(database: Path) -> bool:
    """Whether another process keeps a worker on this queue."""
    if not database.exists():
        return False
    lock = ProcessLock(database.with_name(database.name + ".lock"))
    try:
        return not lock.acquire()
    finally:
        lock.release()
