"""Fetch missing model files into ckpts/: resumed, verified, cancellable.

A file grows as NAME.part and gets its name only after its length, its hash (where the hub tells one) and its
safetensors header have been checked, so a file under its own name is whole. One process at a time writes a
part; another one that wants the file waits and takes over where the first one stops. huggingface_hub says
what an address means, how large a file is and what its hash is, with the user's login and environment
(HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE). The transfer is ours, because it keeps what has come when it is
cancelled: hf_hub_download can be stopped, through its tqdm_class, but throws its unfinished file away.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from shared.errors import Cancelled, UserError
from shared.files import hashes
from shared.files.lock import ProcessLock
from shared.files.public_urls import check_request
from shared.settings.messages import size_text
from shared.version import VERSION
from shared.weights import hub
from shared.weights.files import (
    PART_SUFFIX,
    SAFETENSORS,
    Folders,
    RefusedFile,
    Required,
    check_safetensors,
    describe,
    destination,
    is_url,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

TIMEOUT = httpx.Timeout(20.0, connect=10.0)
TRIES = 5
FIRST_PAUSE = 1.0  # seconds; doubles with every try
LONGEST_PAUSE = 60.0
FRESH_COURAGE = 1 << 20  # bytes: a try that got this far makes the count of tries start again
READ_SIZE = 1 << 20
REPORT_EVERY = 0.1  # seconds
SPEED_WINDOW = 5.0  # seconds
LOOK_EVERY = 0.2  # seconds between looks at what another process downloads

HUB_REFUSAL = (
    "Hugging Face refused {name} ({status}): accept the licence at {page} if there is one and set "
    "HF_TOKEN to your access token, or put the file at {path}."
)
NOT_THERE = "{url} does not exist ({status}): correct it in the model's card, or put the file at {path}."
OTHER_ANSWER = "{host} answered {status} for {name}: start again later, or put the file at {path}."
SENTENCES = {
    (True, 401): HUB_REFUSAL,
    (True, 403): HUB_REFUSAL,
    (True, 404): NOT_THERE,
    (False, 404): NOT_THERE,
    (True, 410): NOT_THERE,
    (False, 410): NOT_THERE,
    (False, 401): "{host} wants a login for {name} (401): download it in your browser and put it at {path}.",
    (False, 403): "{host} refused {name} (403): download it in your browser and put it at {path}.",
}


@dataclass(frozen=True)
class DownloadProgress:
    """How far one file is. total_bytes is 0 while unknown; speed is in bytes per second.

    before_bytes, after_bytes: of the files of the same call that were done before it and that come after it.
    note: why nothing comes at the moment.
    """

    file: str
    done_bytes: int
    total_bytes: int
    speed: float
    before_bytes: int = 0
    after_bytes: int = 0
    note: str = ""


@dataclass(frozen=True)
class _Remote:
    """One file to fetch: the card's address, the address to ask, its place; then the server's word on it."""

    source: str
    path: Path
    url: str = ""
    page: str = ""  # the repository's page when the address is the hub's
    headers: dict[str, str] = field(default_factory=dict, repr=False)  # may hold the user's token
    size: int | None = None
    etag: str = ""
    before: int = 0  # bytes of the files that come first, and of those that follow
    after: int = 0

    def sentence(self, template: str, status: int) -> str:
        host = urlsplit(self.url).netloc
        return template.format(
            name=self.path.name, url=self.source, page=self.page, path=self.path, host=host, status=status
        )


class _Passing(Exception):
    """A failure that may be gone next time. `pause`: the seconds that the server asked to wait, if it did."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


def ensure(
    required: Iterable[Required],
    folders: Folders,
    progress: Callable[[DownloadProgress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    public_only: bool = False,
) -> dict[str, Path]:
    """Have every required file on disk and return role -> path (the first file of a role that has several).

    What is there is used after a look at its header; of what is missing, the first alternative that is a URL
    is downloaded. Raises UserError or Cancelled; what had come by then is kept and continued next time.
    public_only: for addresses that others wrote; see shared.files.public_urls.
    """
    required = list(required)
    missing = [item for item in required if not describe(item, folders).on_disk]
    _fetch_all([_wanted(item, folders) for item in missing], folders.ckpts, progress, cancelled, public_only)
    paths: dict[str, Path] = {}
    for item in required:
        path = describe(item, folders).path
        if path is None:
            raise UserError(f"{item.alternatives[0]} disappeared from {folders.ckpts}: start again.")
        if path.suffix in SAFETENSORS:
            check_safetensors(path)
        paths.setdefault(item.role, path)
    return paths


def download(
    addresses: Mapping[Path, str],
    folder: Path,
    progress: Callable[[DownloadProgress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> None:
    """Have every one of these files, which are in `folder`, from its address; as by `ensure`."""
    missing = [(source, path) for path, source in addresses.items() if not path.exists()]
    _fetch_all([_addressed(*one) for one in missing], folder, progress, cancelled)


def _fetch_all(
    missing: Iterable[_Remote],
    folder: Path,
    progress: Callable[[DownloadProgress], None] | None,
    cancelled: Callable[[], bool] | None,
    public_only: bool = False,
) -> None:
    wanted = {remote.path: remote for remote in missing}
    # the hub is the user's choice
    checks = public_only and not any(remote.page for remote in wanted.values())
    try:
        if wanted:
            _fetch_each(
                wanted.values(), folder, progress or (lambda _: None), cancelled or (lambda: False), checks
            )
    except OSError as error:
        raise UserError(_unwritable(folder, error)) from error


def _fetch_each(
    wanted: Iterable[_Remote],
    folder: Path,
    progress: Callable[[DownloadProgress], None],
    cancelled: Callable[[], bool],
    checks: bool,
) -> None:
    hooks = {"request": [check_request]} if checks else {}
    with httpx.Client(timeout=TIMEOUT, follow_redirects=True, event_hooks=hooks) as client:
        remotes = []
        for remote in wanted:
            meter = _Meter(remote, progress)
            remotes.append(_persist(partial(_ask, client, remote), meter, cancelled))
        _check_space(remotes, folder)
        sizes = [remote.size or 0 for remote in remotes]
        for i, remote in enumerate(remotes):
            remote = replace(remote, before=sum(sizes[:i]), after=sum(sizes[i + 1 :]))
            _fetch(client, remote, progress, cancelled)


def discard(required: Iterable[Required], folders: Folders) -> None:
    """Delete what has come of these files, but for what another process is downloading now."""
    for part in map(_Part, _places(required, folders)):
        if part.path.exists():
            with _locked(part.remote) as mine:
                if mine:
                    part.clear()


def parts(required: Iterable[Required], folders: Folders) -> dict[Path, int]:
    """The unfinished files of `required` and how many bytes of each have come."""
    found = {part.path: part.path for part in map(_Part, _places(required, folders))}
    return {path: path.stat().st_size for path in found if path.is_file()}


def _places(required: Iterable[Required], folders: Folders) -> list[_Remote]:
    """Every address among the alternatives and where its file would go."""
    return [
        _Remote(source, destination(source, folders, item.target))
        for item in required
        for source in item.alternatives
        if is_url(source)
    ]


def _wanted(item: Required, folders: Folders) -> _Remote:
    """The alternative of a missing file to download. UserError when there is none, or in offline mode."""
    source = next((source for source in item.alternatives if is_url(source)), None)
    if source is None:
        names = " or ".join(str(folders.root / source) for source in item.alternatives) or "(no file named)"
        raise UserError(f"The {item.role} is missing and its card gives no address: put the file at {names}.")
    path = destination(source, folders, item.target)
    return _addressed(source, path)


def _addressed(source: str, path: Path) -> _Remote:
    """What to fetch `source` from, and how: only the hub sees the token. UserError in offline mode."""
    if hub.is_offline():
        raise UserError(
            f"{path.name} is missing and HF_HUB_OFFLINE is set: download {source} elsewhere and "
            f"put it at {path}, or unset HF_HUB_OFFLINE."
        )
    headers = {"Accept-Encoding": "identity"}  # a compressed answer would have another length
    uri = hub.address(source)
    if uri is None or not uri.path_in_repo:
        return _Remote(source, path, source, "", headers | {"User-Agent": f"zgp/{VERSION}"})
    return _Remote(source, path, hub.url(uri), hub.page(uri), headers | hub.headers())


def _ask(client: httpx.Client, remote: _Remote) -> _Remote:
    """`remote` with the size and the etag that the server tells, before any of the file is received.

    Other servers than the hub often refuse a HEAD, so they are asked for one byte.
    """
    if remote.page:
        remote = _ask_hub(remote)
    if remote.size is not None:
        return remote
    extra = {"Range": "bytes=0-0"}
    with client.stream("GET", remote.url, headers=remote.headers | extra) as answer:
        _check_answer(answer, remote)
    etag = remote.etag or answer.headers.get("etag", "").removeprefix("W/").strip('"')
    return replace(remote, size=_size_in(answer), etag=etag)


def _ask_hub(remote: _Remote) -> _Remote:
    try:
        told = hub.metadata(remote.url)
    except hub.network_error() as error:
        answer = getattr(error, "response", None)
        if answer is not None:
            _check_answer(answer, remote)
        raise _Passing(str(error) or type(error).__name__) from error
    return replace(remote, size=told.size, etag=told.etag or "")


def _size_in(answer: httpx.Response) -> int | None:
    """The length of the whole file, from an answer that has it or a range of it."""
    whole = ""
    if answer.status_code == 206:
        whole = answer.headers.get("content-range", "").rpartition("/")[2]
    elif answer.status_code == 200:
        whole = answer.headers.get("content-length", "")
    return int(whole) if whole.isascii() and whole.isdigit() else None


def _check_answer(answer: Any, remote: _Remote) -> None:
    """Nothing for an answer with the file; _Passing when another try may help; else UserError.

    answer: a response of httpx, or of the client that huggingface_hub brings.
    """
    status = answer.status_code
    if status < 400:
        return
    if status >= 500 or status in (408, 416, 425, 429):
        raise _Passing(f"the server answered {status}", _pause_in(answer.headers.get("retry-after", "")))
    raise UserError(remote.sentence(SENTENCES.get((bool(remote.page), status), OTHER_ANSWER), status))


def _pause_in(retry_after: str) -> float | None:
    """The seconds of a Retry-After header, which has seconds or a date."""
    if retry_after.isascii() and retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None


def _persist(
    action: Callable[[], T],
    meter: "_Meter",
    cancelled: Callable[[], bool],
    got: Callable[[], int] = lambda: 0,
) -> T:
    """action(), again after a passing failure; UserError after TRIES in a row that got next to nothing."""
    failures, remote = 0, meter.remote
    while True:
        _stop_if(cancelled)
        before = got()
        try:
            return action()
        except (_Passing, httpx.RequestError) as error:
            failures = 1 if got() - before >= FRESH_COURAGE else failures + 1
            reason = str(error) or type(error).__name__
            if failures >= TRIES:
                raise UserError(_gave_up(remote, reason)) from error
            asked = error.pause if isinstance(error, _Passing) else None
            pause = min(FIRST_PAUSE * 2 ** (failures - 1) if asked is None else asked, LONGEST_PAUSE)
            log.warning("%s: %s; trying again in %.0f s", remote.path.name, reason, pause)
            meter.report(got(), f"{reason}; trying again in {pause:.0f} s")
            _wait(pause, cancelled)
        except httpx.InvalidURL as error:
            raise UserError(f"'{remote.url}' is no web address ({error}): correct it in the card.") from error


def _gave_up(remote: _Remote, reason: str) -> str:
    host = urlsplit(remote.url).netloc
    return (
        f"{remote.path.name} could not be downloaded from {host} in {TRIES} tries ({reason}): check the "
        f"connection and start again to continue, or put the file at {remote.path}."
    )


def _wait(seconds: float, cancelled: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        _stop_if(cancelled)
        time.sleep(min(left, 0.05))


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled("The download was stopped; it continues from here next time.")


@contextlib.contextmanager
def _locked(remote: _Remote) -> Iterator[bool]:
    """Whether this process alone may write the file's part. The lock's file goes with the part."""
    remote.path.parent.mkdir(parents=True, exist_ok=True)
    lock = ProcessLock(remote.path.with_name(f".{remote.path.name}.lock"))
    try:
        mine = lock.acquire()
    except sqlite3.Error as error:  # a file system without locks is no reason not to download
        log.warning("%s cannot be locked (%s); do not download it twice at once", remote.path, error)
        mine = True
    try:
        yield mine
    finally:
        if mine:
            lock.release()
        if remote.path.exists() or mine and not _Part(remote).path.exists():
            with contextlib.suppress(OSError):  # Windows: another process still looks at it
                lock.path.unlink(missing_ok=True)


def _check_room(remote: _Remote, done: int) -> None:
    """UserError when others have filled the disk meanwhile, before it is full to the last byte."""
    left, free = (remote.size or 0) - done, shutil.disk_usage(remote.path.parent).free
    if left > free:
        raise UserError(
            f"{remote.path.name} still takes {size_text(left)}, {remote.path.parent} has {size_text(free)} "
            "free: make room there and start again to continue the download."
        )


def _check_space(remotes: list[_Remote], folder: Path) -> None:
    """UserError when what is still to come does not fit on the disk that `folder` is on."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(max(0, (remote.size or 0) - _Part(remote).size) for remote in remotes)
    free = shutil.disk_usage(folder).free
    if needed > free:
        names = ", ".join(remote.path.name for remote in remotes)
        raise UserError(
            f"To download {names} takes {size_text(needed)}, {folder} has {size_text(free)} free: make room "
            "there."
        )


def _unwritable(folder: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk of {folder} is full: make room there and start again to continue the download."
    return f"{folder} cannot be written ({error}): allow it or free it, and start again."


class _Part:
    """The unfinished file beside its place: NAME.part, and NAME.part.etag that tells what it is a part of."""

    def __init__(self, remote: _Remote) -> None:
        self.remote = remote
        self.path = remote.path.with_name(remote.path.name + PART_SUFFIX)
        self.etag_path = remote.path.with_name(f"{self.path.name}.etag")
        self.rejected = 0

    @property
    def size(self) -> int:
        """Bytes that are here and can be continued."""
        try:
            known = self.etag_path.read_text("utf-8")
            size = self.path.stat().st_size
        except (OSError, UnicodeDecodeError):
            return 0
        whole = size if self.remote.size is None else self.remote.size
        return size if known and known == self.remote.etag and size <= whole else 0

    def open(self, start: int) -> Any:
        """The file, open to be written from byte `start` on; without its earlier bytes when start is 0."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if start == 0:
            self.path.write_bytes(b"")
            self.etag_path.write_text(self.remote.etag, "utf-8")
        return self.path.open("ab", buffering=0)

    def clear(self) -> None:
        """Forget what has come."""
        self.path.unlink(missing_ok=True)
        self.etag_path.unlink(missing_ok=True)

    def reject(self, flaw: str) -> Exception:
        """The error for a complete but wrong file: once may be the line's fault, twice is not."""
        self.clear()
        self.rejected += 1
        if self.rejected == 1:
            return _Passing(flaw)
        return UserError(f"{self.remote.url} {flaw}, twice: try later, or give the card another address.")

    def accept(self) -> None:
        """Give the finished file its name."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        self.path.replace(self.remote.path)
        self.etag_path.unlink(missing_ok=True)


class _Meter:
    """Calls `progress` with bytes and recent speed, not more often than a person can read."""

    def __init__(self, remote: _Remote, progress: Callable[[DownloadProgress], None]) -> None:
        self.remote, self.progress = remote, progress
        self.samples: deque[tuple[float, int]] = deque()
        self.reported = -REPORT_EVERY

    def due(self) -> bool:
        """Whether it is time to report again."""
        return time.monotonic() - self.reported >= REPORT_EVERY

    def report(self, done: int, note: str = "") -> None:
        now = self.reported = time.monotonic()
        self.samples.append((now, done))
        while now - self.samples[0][0] > SPEED_WINDOW:
            self.samples.popleft()
        (then, before), remote = self.samples[0], self.remote
        speed = max(0, done - before) / (now - then) if now > then else 0.0
        name, total = remote.path.name, remote.size or 0
        self.progress(DownloadProgress(name, done, total, speed, remote.before, remote.after, note))


def _fetch(
    client: httpx.Client,
    remote: _Remote,
    progress: Callable[[DownloadProgress], None],
    cancelled: Callable[[], bool],
) -> None:
    """Download one file to its place, whatever it takes; or see another process do it."""
    part, meter = _Part(remote), _Meter(remote, progress)
    while True:
        with _locked(remote) as mine:
            if remote.path.exists():
                return
            if mine:
                action = partial(_try_once, client, part, meter, cancelled)
                _persist(action, meter, cancelled, lambda: part.size)
                part.accept()
                log.info("Downloaded %s", remote.path)
                if len(remote.etag) == 64 and remote.page:
                    hashes.remember(remote.path, remote.etag)
                return
        meter.report(part.size, "another ZGP process is downloading it")
        _wait(LOOK_EVERY, cancelled)


def _try_once(client: httpx.Client, part: _Part, meter: _Meter, cancelled: Callable[[], bool]) -> None:
    """Receive what the part lacks, then check the whole. _Passing when it is not complete or not right."""
    start = part.size
    digest = _Digest(part.remote)
    digest.add_file(part.path, start, cancelled)
    meter.report(start)
    if start == 0 or start != part.remote.size:
        _receive(client, part, start, digest, meter, cancelled)
    _check_whole(part, digest)
    meter.report(part.path.stat().st_size)


def _receive(
    client: httpx.Client,
    part: _Part,
    start: int,
    digest: "_Digest",
    meter: _Meter,
    cancelled: Callable[[], bool],
) -> None:
    """Append to the part what the server sends from byte `start` on, or from 0 when it does not do ranges."""
    remote = part.remote
    extra = {"Range": f"bytes={start}-"} if start else {}
    with client.stream("GET", remote.url, headers=remote.headers | extra) as answer:
        if answer.status_code == 416:
            part.clear()
        _check_answer(answer, remote)
        if start and not _continues(answer, start):
            start = 0
            digest.restart()
        with part.open(start) as file:
            for chunk in answer.iter_raw():
                _stop_if(cancelled)
                _write_all(file, chunk)
                digest.add(chunk)
                start += len(chunk)
                if meter.due():
                    meter.report(start)
                    _check_room(remote, start)
                if remote.size is not None and start > remote.size:
                    break  # never fill the disk with what is not the file


def _write_all(file: Any, chunk: bytes) -> None:
    """An unbuffered file takes what the disk has room for; only the next write then is an error."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]


def _continues(answer: httpx.Response, start: int) -> bool:
    """Whether the answer goes on at byte `start` rather than beginning anew."""
    return answer.status_code == 206 and answer.headers.get("content-range", "").startswith(f"bytes {start}-")


def _check_whole(part: _Part, digest: "_Digest") -> None:
    """The three tests a file must pass to get its name: length, hash, safetensors header."""
    size, expected = part.path.stat().st_size, part.remote.size
    if expected is not None and size < expected:
        raise _Passing(f"the connection ended at {size:,} of {expected:,} bytes")
    if expected is not None and size > expected:
        raise part.reject(f"sent {size:,} bytes instead of {expected:,}")
    if not digest.matches():
        raise part.reject("sent bytes that do not have the hash it promised")
    if part.remote.path.suffix in SAFETENSORS:
        try:
            check_safetensors(part.path)
        except RefusedFile as error:
            raise part.reject(f"sent a file that {error.flaw}") from error


class _Digest:
    """The hash that the hub's etag is: SHA-256 of a large file, git's SHA-1 of a small one; none elsewhere.

    Git's hash of a blob is sha1("blob <length>\\0" + content).
    """

    def __init__(self, remote: _Remote) -> None:
        self.remote = remote
        self.restart()

    def restart(self) -> None:
        etag, size = self.remote.etag, self.remote.size
        self.hash = None
        if self.remote.page and re.fullmatch(r"[0-9a-f]{64}", etag):
            self.hash = hashlib.sha256()
        elif self.remote.page and re.fullmatch(r"[0-9a-f]{40}", etag) and size is not None:
            self.hash = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    def add(self, data: bytes) -> None:
        if self.hash is not None:
            self.hash.update(data)

    def add_file(self, path: Path, length: int, cancelled: Callable[[], bool]) -> None:
        """Add the first `length` bytes of a file: what an earlier try left."""
        if self.hash is None or length == 0:
            return
        with path.open("rb") as file:
            while length > 0 and (data := file.read(min(READ_SIZE, length))):
                _stop_if(cancelled)
                self.hash.update(data)
                length -= len(data)

    def matches(self) -> bool:
        return self.hash is None or self.hash.hexdigest() == self.remote.etag
