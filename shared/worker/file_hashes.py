"""SHA-256 of the loaded model's files, computed beside the work and never once per image."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shared.files.hashes import sha256_of

log = logging.getLogger(__name__)

WAIT_FOR_BYTES = 1 << 30  # up to this size a file is hashed in about a second, once ever: worth waiting for


class FileHashes:
    """Starts hashing at once, small files first, in one thread of low priority."""

    def __init__(self, files: Mapping[str, Path], hash_of: Callable[[Path], str] = sha256_of):
        self._names = names_of([path for path in files.values() if path.is_file()])
        self._hash_of = hash_of
        self._known: dict[str, str | None] = {name: None for name in self._names.values()}
        self._small_done = threading.Event()
        threading.Thread(target=self._run, name="file hashes", daemon=True).start()

    def known(self) -> dict[str, str | None]:
        """File name -> hash, in the order of the files; None while a large file is still being read."""
        self._small_done.wait()
        return dict(self._known)

    def _run(self) -> None:
        if sys.platform == "linux":  # elsewhere this would slow the whole process
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        for path, name in sorted(self._names.items(), key=lambda item: item[0].stat().st_size):
            try:
                if path.stat().st_size > WAIT_FOR_BYTES:
                    self._small_done.set()
                self._known[name] = self._hash_of(path)
            except OSError as error:
                log.warning("No hash of %s for the metadata: %s", path, error)
        self._small_done.set()


def names_of(paths: Sequence[Path]) -> dict[Path, str]:
    """Each file's name, with its folder's where two of them are called the same ("vae/model.safetensors")."""
    counts = Counter(path.name for path in dict.fromkeys(paths))
    return {
        path: path.name if counts[path.name] == 1 else f"{path.parent.name}/{path.name}" for path in paths
    }
