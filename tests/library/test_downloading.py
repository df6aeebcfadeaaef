"""Downloads of models from the page, against a hub that misbehaves: each ends complete or with a sentence,
and never with a wrong file under its final name.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import namedtuple

import pytest
from huggingface_hub import constants

from shared.errors import UserError
from shared.files import hashes
from shared.library.catalog import catalog
from shared.library.download_queue import FAILED, PAUSED, RUNNING, WAITING, Downloads
from shared.library.outlook import unplanned
from shared.weights import downloads
from shared.weights.downloads import DownloadProgress, ensure
from shared.weights.files import Folders, Required
from tests.support import fake_family
from tests.support.browser import ROOT
from tests.support.hub_stand_in import REPOSITORY, Fault, HubStandIn, Stored
from tests.support.safetensors_bytes import safetensors, tensor
from tests.support.waiting import until

CONTENT = random.Random(1).randbytes(200_000)
MODEL = safetensors({"a": tensor(0, len(CONTENT))}, CONTENT)
OTHER = safetensors({"b": tensor(0, len(CONTENT))}, CONTENT[::-1])
ENCODER = safetensors({"e": tensor(0, 100_000)}, CONTENT[:100_000])
WAIT_SECONDS = 30
DiskUsage = namedtuple("DiskUsage", "total used free")


class Handler(fake_family.Handler):
    """Models of a transformer and a text encoder."""

    @staticmethod
    def query_model_files(base_type, model_def):
        return [
            Required("transformer", model_def["URLs"]),
            Required("text_encoder", model_def["text_encoder_URLs"], "encoder"),
        ]


@pytest.fixture
def hub(monkeypatch):
    with HubStandIn() as hub:
        hub.files |= {"one": Stored(MODEL), "two": Stored(OTHER), "encoder": Stored(ENCODER)}
        hub.files = {f"{name}.safetensors": stored for name, stored in hub.files.items()}
        hub.be_the_hub(monkeypatch)
        yield hub


@pytest.fixture
def ckpts(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "HASHES", tmp_path / "ckpts" / ".hashes.json")
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.0)
    return tmp_path / "ckpts"


@pytest.fixture
def page(hub, ckpts, tmp_path):
    """The downloads of a project with the models "one" and "two", which share a text encoder."""
    for name in ("one", "two"):
        model = {"name": name, "architecture": "fake", "URLs": [hub.url(f"{name}.safetensors")]}
        model["text_encoder_URLs"] = [hub.url("encoder.safetensors")]
        path = tmp_path / "defaults" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"model": model}))
    made = Downloads(
        lambda: catalog(tmp_path, ckpts, lambda architecture: Handler),
        Folders(tmp_path, ckpts),
        lambda info, machine: unplanned(info, Folders(tmp_path, ckpts)),
        lambda: None,
    )
    yield made
    made.stop()
    until(lambda: made._thread is None)


def rests(page: Downloads) -> bool:
    """Nothing runs and nothing waits."""
    return not any(one.status in (WAITING, RUNNING) for one in page.look().values())


def fetched(page, model_id="one"):
    """Start the download and wait until it rests; its last state, None when it is complete."""
    page.start(model_id)
    until(lambda: rests(page))
    return page.look().get(model_id)


def slow() -> Fault:
    return Fault(pause=0.006)


def size(path) -> int:
    return path.stat().st_size if path.exists() else 0


# ---- what a hub can do wrong -------------------------------------------------------------------------------

PAST = {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}
PASSING = {
    "cut": [Fault(cut_after=50_000), Fault(cut_after=1)],
    "cut at once": [Fault(cut_after=0)],
    "no ranges": [Fault(cut_after=50_000), Fault(ignore_range=True)],
    "one wrong byte": [Fault(flip_byte=30_000)],
    "429": [Fault(429, {"Retry-After": "0"})],
    "429 until a date": [Fault(429, PAST)],
    "429 with nonsense": [Fault(429, {"Retry-After": "soon"})],
    "500": [Fault(500)],
    "503 in the middle": [Fault(cut_after=50_000), Fault(503)],
    "slow": [Fault(pause=0.0005)],
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_ends_with_the_whole_file(page, hub, ckpts, name):
    hub.get_faults = list(PASSING[name])
    assert fetched(page) is None
    assert (ckpts / "one.safetensors").read_bytes() == MODEL
    assert (ckpts / "encoder" / "encoder.safetensors").read_bytes() == ENCODER
    assert not list(ckpts.rglob("*.part*")) and not list(ckpts.rglob("*.lock"))


#: what lasts -> (what goes wrong, what the sentence says)
LASTING = {
    "401": (lambda hub: setattr(hub, "head_faults", [Fault(401)]), r"\(401\).*HF_TOKEN"),
    "403": (lambda hub: setattr(hub, "head_faults", [Fault(403)]), r"\(403\).*licence"),
    "404": (lambda hub: setattr(hub, "head_faults", [Fault(404)]), r"does not exist \(404\)"),
    "500": (lambda hub: setattr(hub, "head_faults", [Fault(500)] * 5), "in 5 tries .the server answered 500"),
    "429": (lambda hub: setattr(hub, "get_faults", [Fault(429, PAST)] * 5), "in 5 tries .the server .* 429"),
    "longer": (lambda hub: promise(hub, promised_size=len(MODEL) - 9), "instead of"),
    "shorter": (lambda hub: promise(hub, promised_size=len(MODEL) + 9), "connection ended|416"),
    "another hash": (lambda hub: promise(hub, promised_hash="a" * 64), "hash it promised, twice"),
    "a web page": (lambda hub: promise(hub, data=b"<html>" * 99), "like a web page.*, twice"),
}


def promise(hub, **changes) -> None:
    hub.files["one.safetensors"] = Stored(**{"data": MODEL, **changes})


@pytest.mark.parametrize("name", LASTING)
def test_what_lasts_ends_with_a_sentence_and_goes_on_once_it_is_mended(page, hub, ckpts, name):
    break_it, said = LASTING[name]
    break_it(hub)
    found = fetched(page)
    assert found.status == FAILED
    with pytest.raises(UserError, match=said):
        raise UserError(found.note)
    assert not (ckpts / "one.safetensors").exists()
    hub.head_faults, hub.get_faults = [], []
    promise(hub)
    assert fetched(page) is None and (ckpts / "one.safetensors").read_bytes() == MODEL


def test_the_reason_of_a_wait_is_told(page, hub, monkeypatch):
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 3600.0)
    hub.head_faults = [Fault(503)]
    page.start("one")
    until(lambda: "answered 503; trying again in 60 s" in page.look()["one"].note)
    page.pause("one")
    until(lambda: page._thread is None)
    assert page.look()["one"].status == PAUSED and page.look()["one"].note == ""


def test_offline_and_a_mirror_and_a_token(page, hub, ckpts, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in fetched(page).note and hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    assert fetched(page) is None  # HF_ENDPOINT is the stand-in
    seen = {one.path.split("/")[1]: one.headers.get("authorization") for one in hub.asked}
    assert seen == {REPOSITORY.split("/")[0]: "Bearer hf_verysecret", "store": None}


# ---- pause, resume, cancel ---------------------------------------------------------------------------------


def begin_slowly(page, hub, ckpts):
    """Start a download and return when some of its first file is here."""
    hub.get_faults = [slow()]
    page.start("one")
    part = ckpts / "one.safetensors.part"
    until(lambda: size(part) >= 5000 and page.look()["one"].done)
    return part


def test_a_pause_keeps_what_has_come(page, hub, ckpts):
    part = begin_slowly(page, hub, ckpts)
    going = page.look()["one"]
    assert (going.status, going.file) == (RUNNING, "one.safetensors")
    assert going.total == len(MODEL) + len(ENCODER) and 0 < going.done < going.total
    page.pause("one")
    until(lambda: page._thread is None)
    kept = size(part)
    assert page.look()["one"].status == PAUSED and 0 < kept < len(MODEL)
    assert fetched(page) is None and (ckpts / "one.safetensors").read_bytes() == MODEL
    assert hub.bytes_asked()[1] == f"bytes={kept}-"


def test_a_pause_does_not_change_which_file_is_fetched(page, hub, ckpts, tmp_path):
    card = tmp_path / "defaults" / "one.json"
    content = json.loads(card.read_text())
    content["model"]["URLs"] = [hub.url("two.safetensors"), hub.url("one.safetensors")]
    card.write_text(json.dumps(content))
    ckpts.mkdir()
    (ckpts / "one.safetensors.part").write_bytes(MODEL[:1000])
    (ckpts / "one.safetensors.part.etag").write_text(hub.files["one.safetensors"].etag)
    assert fetched(page) is None
    assert (ckpts / "one.safetensors").exists() and not (ckpts / "two.safetensors").exists()
    assert hub.bytes_asked()[0] == "bytes=1000-"


def test_a_file_that_changed_meanwhile_begins_anew(page, hub, ckpts):
    begin_slowly(page, hub, ckpts)
    page.pause("one")
    until(lambda: page._thread is None)
    hub.files["one.safetensors"] = Stored(OTHER)
    assert fetched(page) is None and (ckpts / "one.safetensors").read_bytes() == OTHER
    assert hub.bytes_asked()[1] == ""


def test_cancelling_leaves_nothing(page, hub, ckpts):
    part = begin_slowly(page, hub, ckpts)
    page.cancel("one")
    until(lambda: page._thread is None)
    assert page.look() == {} and not part.exists() and not (ckpts / "one.safetensors").exists()
    assert fetched(page) is None


def test_what_an_earlier_run_left_can_be_cancelled(page, ckpts):
    ckpts.mkdir()
    (ckpts / "one.safetensors.part").write_bytes(MODEL[:1000])
    (ckpts / "one.safetensors.part.etag").write_text("e")
    page.cancel("one")
    assert list(ckpts.iterdir()) == []


def test_pause_and_start_at_once_and_twice(page, hub, ckpts):
    begin_slowly(page, hub, ckpts)
    for _ in range(20):
        page.pause("one")
        page.start("one")
        page.start("one")
    until(lambda: rests(page))
    assert (ckpts / "one.safetensors").read_bytes() == MODEL
    with pytest.raises(UserError, match="on this computer already"):
        page.start("one")


# ---- files that are shared ---------------------------------------------------------------------------------


def test_models_wait_for_each_other_and_share_what_they_share(page, hub, ckpts):
    begin_slowly(page, hub, ckpts)
    page.start("two")
    assert page.look()["two"].status == WAITING
    until(lambda: rests(page))
    assert page.look() == {}
    asked = [one.path for one in hub.asked if one.method == "GET" and "/store/encoder" in one.path]
    assert len(asked) == 1 and (ckpts / "two.safetensors").read_bytes() == OTHER


def test_cancelling_one_keeps_what_the_other_waits_for(page, hub, ckpts):
    hub.get_faults = [Fault(), slow()]
    page.start("one")
    shared = ckpts / "encoder" / "encoder.safetensors.part"
    until(lambda: size(shared) >= 3000)
    page.start("two")
    page.cancel("one")
    until(lambda: rests(page))
    ranges = [one.headers.get("range", "") for one in hub.asked if "/store/encoder" in one.path]
    gets = [r for r in ranges if r]
    assert gets and gets[-1].startswith("bytes=") and page.look() == {}
    assert (ckpts / "encoder" / "encoder.safetensors").read_bytes() == ENCODER


# ---- other processes ---------------------------------------------------------------------------------------

_ENSURE = """
import sys
from pathlib import Path
from shared.weights.downloads import ensure
from shared.weights.files import Folders, Required
root = Path(sys.argv[1])
ensure([Required("transformer", [sys.argv[2]])], Folders(root, root / "ckpts"))
"""


@pytest.fixture
def another_process(hub, ckpts, tmp_path):
    """A ZGP process that downloads model "one" slowly."""
    hub.get_faults = [slow()]
    url = hub.url("one.safetensors")
    process = subprocess.Popen([sys.executable, "-c", _ENSURE, str(tmp_path), url], cwd=ROOT)
    until(lambda: size(ckpts / "one.safetensors.part") >= 3000)
    yield process
    process.kill()
    process.wait()


def test_a_killed_process_leaves_a_part_that_goes_on(another_process, page, hub, ckpts):
    os.kill(another_process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    another_process.wait()
    kept = size(ckpts / "one.safetensors.part")
    assert 0 < kept < len(MODEL) and not (ckpts / "one.safetensors").exists()
    assert fetched(page) is None and (ckpts / "one.safetensors").read_bytes() == MODEL
    assert f"bytes={kept}-" in hub.bytes_asked()


def test_two_processes_do_not_write_the_same_part(another_process, page, hub, ckpts):
    page.start("one")
    until(lambda: "another ZGP process is downloading it" in page.look()["one"].note)
    assert page.look()["one"].done > 0 and len(hub.bytes_asked()) == 1
    page.cancel("one")  # the other one's part stays
    until(lambda: page._thread is None)
    assert size(ckpts / "one.safetensors.part") >= 3000
    page.start("one")
    until(lambda: "another ZGP process is downloading it" in page.look()["one"].note)
    another_process.kill()  # then this one takes over
    until(lambda: rests(page))
    assert page.look() == {} and (ckpts / "one.safetensors").read_bytes() == MODEL
    assert any(asked.startswith("bytes=") for asked in hub.bytes_asked())


def test_who_waited_takes_the_file_that_the_other_one_finished(hub, ckpts, tmp_path):
    hub.get_faults = [Fault(pause=0.002)]
    required, folders = [Required("transformer", [hub.url("one.safetensors")])], Folders(tmp_path, ckpts)
    first = threading.Thread(target=ensure, args=(required, folders))
    first.start()
    until(lambda: size(ckpts / "one.safetensors.part") > 0)
    told: list[DownloadProgress] = []
    assert ensure(required, folders, told.append)["transformer"].read_bytes() == MODEL
    first.join()
    assert any("another ZGP process" in one.note for one in told) and len(hub.bytes_asked()) == 1
    assert hashlib.sha256((ckpts / "one.safetensors").read_bytes()).digest() == hashlib.sha256(MODEL).digest()


# ---- the disk ----------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_told_before(page, hub, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: DiskUsage(10**6, 0, 5000))
    assert "has 5.0 kB free: make room" in fetched(page).note and hub.bytes_asked() == []


def test_a_disk_that_others_fill_stops_the_download_before_it_is_full(page, hub, ckpts, monkeypatch):
    free = iter([10**9] + [7000] * 99)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: DiskUsage(10**9, 0, next(free)))
    hub.get_faults = [slow()]
    assert "one.safetensors still takes" in fetched(page).note
    kept = size(ckpts / "one.safetensors.part")
    monkeypatch.undo()
    hub.be_the_hub(monkeypatch)
    monkeypatch.setattr(hashes, "HASHES", ckpts / ".hashes.json")
    assert 0 < kept < len(MODEL) and fetched(page) is None
    assert (ckpts / "one.safetensors").read_bytes() == MODEL and f"bytes={kept}-" in hub.bytes_asked()


def test_a_full_disk_keeps_what_was_written(page, hub, ckpts, monkeypatch):
    written, real = [], downloads._write_all

    def write(file, chunk):
        if sum(written) > 50_000:
            raise OSError(28, "No space left on device")
        written.append(len(chunk))
        real(file, chunk)

    monkeypatch.setattr(downloads, "_write_all", write)
    hub.get_faults = [Fault(pause=0.0001)]
    assert "is full: make room there" in fetched(page).note
    kept = size(ckpts / "one.safetensors.part")
    assert kept == sum(written) < len(MODEL)
    monkeypatch.setattr(downloads, "_write_all", real)
    assert fetched(page) is None and (ckpts / "one.safetensors").read_bytes() == MODEL


def test_a_write_that_takes_only_some_bytes_is_completed():
    class Narrow:
        held = b""

        def write(self, data):
            self.held += bytes(data[:7])
            return min(7, len(data))

    file = Narrow()
    downloads._write_all(file, CONTENT[:100])
    assert file.held == CONTENT[:100]
