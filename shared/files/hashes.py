"""Hashes of files, remembered on disk while the files stay as they are: one of 12 GB takes a minute."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from pathlib import Path
from typing import Any

from shared.files import atomic

log = logging.getLogger(__name__)

HASHES = Path(__file__).parents[2] / "ckpts" / ".hashes.json"
READ_SIZE = 1 << 20

_hashes_lock = threading.Lock()


def sha256_of(path: Path, cache: bool = True, cache_file: Path | None = None) -> str:
    """The SHA-256 of a file, in hex. With `cache`, a file whose size and time are known is not read again.

    The cache is ckpts/.hashes.json, or `cache_file`; when that is damaged or read-only, the file is read.
    """
    path, cache_file = Path(path), cache_file or HASHES
    entry = _read_hashes(cache_file).get(str(path.resolve())) if cache else None
    if isinstance(entry, list) and len(entry) == 3 and entry[:2] == _identity(path):
        return str(entry[2])
    before = _identity(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(READ_SIZE):
            digest.update(data)
    if cache and before == _identity(path):
        remember(path, digest.hexdigest(), cache_file)
    return digest.hexdigest()


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read_hashes(cache_file: Path) -> dict[str, Any]:
    try:
        table = json.loads(cache_file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read (%s); the hashes are computed anew", cache_file, error)
        return {}
    return table if isinstance(table, dict) else {}


def remember(path: Path, sha256: str, cache_file: Path | None = None) -> None:
    """Keep the hash of a file as it is now."""
    cache_file = cache_file or HASHES
    with _hashes_lock:
        table = {name: entry for name, entry in _read_hashes(cache_file).items() if Path(name).exists()}
        table[str(path.resolve())] = [*_identity(path), sha256]
        try:
            atomic.write(cache_file, json.dumps(table, indent=1))
        except OSError as error:
            log.warning("%s cannot be written (%s); hashes are computed again next time", cache_file, error)
