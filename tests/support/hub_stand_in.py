"""A loopback server that speaks enough of the Hugging Face hub for tests, and fails when told to."""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

REPOSITORY = "someone/some-model"
COMMIT = "c" * 40


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@dataclass
class Fault:
    """What goes wrong with one answer about the bytes of a file."""

    status: int | None = None  # answer with this status and no file
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # close the connection after this many bytes
    flip_byte: int | None = None  # send another byte at this place
    ignore_range: bool = False  # send the whole file although a range was asked for
    pause: float = 0.0  # seconds between pieces of 1000 bytes


@dataclass
class Stored:
    """A file of the repository: a `large` one is in the store (redirect, SHA-256), others in git (SHA-1)."""

    data: bytes
    large: bool = True
    promised_size: int | None = None  # the length told by the hub, when it is not the true one
    promised_hash: str | None = None
    tells_size: bool = True  # whether the redirect to the store has X-Linked-Size

    @property
    def etag(self) -> str:
        if self.promised_hash:
            return self.promised_hash
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Asked:
    """One request as the server saw it."""

    method: str
    path: str
    headers: dict[str, str]


class HubStandIn:
    """`with HubStandIn() as hub:` serves hub.files at hub.endpoint; hub.asked lists the requests. It answers
    what `hf download` and the hub's API ask of a repository: its commit and its tree.

    hub.head_faults and hub.get_faults are used up from the front: one per HEAD of the hub, or per answer
    with bytes. A request for a file of the store is redirected to another host, as by the hub.
    """

    def __init__(self, repository: str = REPOSITORY) -> None:
        self.repository = repository
        self.files: dict[str, Stored] = {}
        self.head_faults: list[Fault] = []
        self.get_faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.hub = self  # type: ignore[attr-defined]
        self.server.daemon_threads = True

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, name: str) -> str:
        """The address that a card would have for a file of the repository."""
        return f"https://huggingface.co/{self.repository}/resolve/main/{name}"

    def plain_url(self, name: str) -> str:
        """The address of the same file on a server that is no hub."""
        return f"{self.endpoint}/plain/{name}"

    def be_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For this process, which may have read its variables already, and for those that it starts."""
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        use_endpoint(monkeypatch, self.endpoint)

    def bytes_asked(self) -> list[str]:
        """The Range header ("" for none) of every request that was answered with bytes of a file."""
        gets = (one for one in self.asked if one.method == "GET" and "/store/" in one.path)
        return [one.headers.get("range", "") for one in gets]

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()


def _entry(name: str, stored: Stored) -> dict[str, object]:
    """A file of the tree as the hub's API has it."""
    size = len(stored.data)
    entry: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": stored.etag[:40]}
    if stored.large:
        entry["lfs"] = {"oid": stored.etag, "size": size, "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubStandIn:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the tests look at hub.asked."""

    def do_HEAD(self) -> None:
        self._note()
        self._resolve(send_body=False)

    def do_GET(self) -> None:
        self._note()
        self._resolve(send_body=True)

    def _note(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.asked.append(Asked(self.command, self.path, headers))

    def _resolve(self, send_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        repository = self.hub.repository
        if path.startswith(f"/api/models/{repository}"):
            return self._tell(path)
        name = re.sub(rf"^/({re.escape(repository)}/resolve/[^/]+|store|plain)/", "", path)
        stored = self.hub.files.get(name)
        hub_itself = path.startswith(f"/{repository}/")
        if hub_itself and not send_body and self.hub.head_faults:
            return self._fail(self.hub.head_faults.pop(0))
        if stored is None:
            return self._fail(Fault(404))
        if hub_itself and stored.large:
            return self._redirect(name, stored)
        self._send(stored, send_body, COMMIT if hub_itself else "")

    def _tell(self, path: str) -> None:
        """The repository, or the files of its tree."""
        files = self.hub.files
        if "/tree/" in path:
            answer: object = [_entry(name, stored) for name, stored in sorted(files.items())]
        else:
            siblings = [{"rfilename": name} for name in sorted(files)]
            answer = {"id": self.hub.repository, "sha": COMMIT, "private": False, "siblings": siblings}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _fail(self, fault: Fault) -> None:
        self.send_response(fault.status or 500)
        for header, value in fault.headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _redirect(self, name: str, stored: Stored) -> None:
        self.send_response(302)
        size = len(stored.data) if stored.promised_size is None else stored.promised_size
        self.send_header("Location", f"http://localhost:{self.hub.port}/store/{name}?signature=secret")
        self.send_header("X-Repo-Commit", COMMIT)
        if stored.tells_size:
            self.send_header("X-Linked-Size", str(size))
        self.send_header("X-Linked-Etag", f'"{stored.etag}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, stored: Stored, send_body: bool, commit: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        probe = bool(wanted and wanted[2])
        fault = self.hub.get_faults.pop(0) if send_body and not probe and self.hub.get_faults else Fault()
        if fault.status:
            return self._fail(fault)
        begin, end = 0, len(stored.data)
        if wanted and not fault.ignore_range:
            begin, end = int(wanted[1]), min(end, int(wanted[2] or end) + 1)
        if begin >= max(1, len(stored.data)):
            return self._fail(Fault(416))
        self.send_response(206 if end - begin < len(stored.data) else 200)
        if end - begin < len(stored.data):
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(stored.data)}")
        self.send_header("Accept-Ranges", "bytes")
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{stored.etag}"')
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if send_body:
            self._send_bytes(stored.data[begin:end], begin, fault)

    def _send_bytes(self, body: bytes, begin: int, fault: Fault) -> None:
        data = bytearray(body)
        if fault.flip_byte is not None and 0 <= fault.flip_byte - begin < len(data):
            data[fault.flip_byte - begin] ^= 0xFF
        if fault.cut_after is not None:
            data = data[: fault.cut_after]
            self.close_connection = True
        step = 1000 if fault.pause else max(1, len(data))
        try:
            for place in range(0, len(data), step):
                self.wfile.write(data[place : place + step])
                time.sleep(fault.pause)
        except OSError:
            self.close_connection = True  # the client went away, as it may
