"""Features of prompts that were encoded before: in memory, and on disk so that they outlive the program.

A known prompt needs no text encoder, which is the second-largest part of the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from shared.files import atomic

log = logging.getLogger(__name__)

MEMORY_BYTES = 64 << 20
DISK_BYTES = 512 << 20
READ_WHOLE_BYTES = 16 << 20  # up to this size every byte of a file counts for its fingerprint
SAMPLES = 64
SAMPLE_BYTES = 64 << 10
ENTRIES = "[0-9a-f]" * 64 + ".*"  # our files, the temporary ones that a killed process left included


@dataclass(frozen=True)
class Encoded:
    """features: [L, hidden]. dropped: tokens cut off because the prompt was longer than allowed."""

    features: Tensor
    dropped: int

    @property
    def bytes(self) -> int:
        return self.features.nbytes


def fingerprint(files: Sequence[Path], facts: Iterable[object] = ()) -> str:
    """A name (64 hex digits) for what computes the features: its files in their order, and further facts.

    Of a file above 16 MB only its size, its safetensors header and 64 evenly spaced pieces of 64 KB are read,
    so that 8 GB cost milliseconds. Raises OSError.
    """
    whole = hashlib.sha256(json.dumps([str(fact) for fact in facts]).encode())
    for file in files:
        whole.update(_file_digest(file))
    return whole.hexdigest()


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        file.seek(0)
        if size <= READ_WHOLE_BYTES:
            digest.update(file.read())
            return digest.digest()
        header_bytes = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header_bytes, READ_WHOLE_BYTES)))  # it may be no safetensors
        for i in range(SAMPLES):
            file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
        return digest.digest()


def key(encoder: str, template: str, prompt: str, max_sequence_length: int) -> str:
    """The name of an entry. encoder: see `fingerprint`; template: the chat template's text."""
    return hashlib.sha256(json.dumps([encoder, template, prompt, max_sequence_length]).encode()).hexdigest()


class PromptCache:
    """Least recently used entries go first, in memory (bytes of features) and on disk (bytes of files).

    A disk that cannot be read or written costs one line in the log, never a job.
    """

    def __init__(
        self, folder: Path | None = None, limit_bytes: int = DISK_BYTES, memory_limit: int = MEMORY_BYTES
    ) -> None:
        """folder: made when first needed; None keeps entries in memory only."""
        self.folder, self.limit_bytes, self.memory_limit = folder, limit_bytes, memory_limit
        self._memory: OrderedDict[str, Encoded] = OrderedDict()
        self._complained = False

    def get(self, key: str) -> Encoded | None:
        """The entry, its features on the CPU, bit for bit as they were put; None when there is none."""
        entry = self._memory.get(key) or self._read(key)
        if entry is not None:
            self._remember(key, entry)
            if self.folder is not None:
                with contextlib.suppress(OSError):  # not on disk, or a disk that cannot be written
                    os.utime(self._path(self.folder, key))
        return entry

    def put(self, key: str, encoded: Encoded) -> None:
        entry = Encoded(encoded.features.detach().cpu().contiguous(), encoded.dropped)
        self._remember(key, entry)
        if self.folder is None:
            return
        try:
            self._write(self.folder, key, _to_bytes(key, entry))
            self._trim(self.folder)
        except OSError as error:
            if not self._complained:
                log.warning("Encoded prompts cannot be kept in %s: %s", self.folder, error)
            self._complained = True

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / f"{key}.safetensors"

    def _remember(self, key: str, entry: Encoded) -> None:
        self._memory[key] = entry
        self._memory.move_to_end(key)
        used = sum(e.bytes for e in self._memory.values())
        while used > self.memory_limit:
            _, oldest = self._memory.popitem(last=False)
            used -= oldest.bytes

    def _read(self, key: str) -> Encoded | None:
        if self.folder is None:
            return None
        path = self._path(self.folder, key)
        try:
            return _from_bytes(key, path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("The encoded prompt %s cannot be read and is encoded again: %s", path, error)
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            log.warning("The encoded prompt %s is damaged and is encoded again: %s", path, error)
            with contextlib.suppress(OSError):  # overwritten in a moment in any case
                path.unlink()
        return None

    def _write(self, folder: Path, key: str, data: bytes) -> None:
        """Under a name of its own first: readers and other writers of the same entry never see half of it."""
        if len(data) > self.limit_bytes:
            return
        atomic.write(self._path(folder, key), data)

    def _trim(self, folder: Path) -> None:
        entries = []
        for path in folder.glob(ENTRIES):
            with contextlib.suppress(FileNotFoundError):  # another process trims, too
                stat = path.stat()
                entries.append((stat.st_mtime_ns, stat.st_size, path))
        used = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if used <= self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            used -= size


def _to_bytes(key: str, entry: Encoded) -> bytes:
    return safetensors.torch.save(
        {
            "features": entry.features,
            "dropped": torch.tensor(entry.dropped),
            "sha256": _checksum(key, entry),
        }
    )


def _from_bytes(key: str, data: bytes) -> Encoded:
    """The entry in a file's bytes. Raises one of several errors when they are not what was written."""
    tensors = safetensors.torch.load(data)
    entry = Encoded(tensors["features"], int(tensors["dropped"]))
    if not torch.equal(tensors["sha256"], _checksum(key, entry)):
        raise ValueError("its content does not match its checksum")
    return entry


def _checksum(key: str, entry: Encoded) -> Tensor:
    x = entry.features
    digest = hashlib.sha256(f"{key} {x.dtype} {tuple(x.shape)} {entry.dropped} ".encode())
    digest.update(x.view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
