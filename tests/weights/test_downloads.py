"""Downloads against a hub that cuts, corrupts, refuses and stalls; and the cache of hashes."""

import hashlib
import json
import logging
import os
import random
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from shared.errors import Cancelled, UserError
from shared.files import hashes
from shared.files.hashes import sha256_of
from shared.settings.messages import size_text
from shared.weights import downloads
from shared.weights.downloads import DownloadProgress, ensure
from shared.weights.files import Folders, Required
from tests.support.hub_stand_in import REPOSITORY, Fault, HubStandIn, Stored, use_endpoint
from tests.support.mini import ROOT
from tests.support.safetensors_bytes import safetensors, tensor

CONTENT = random.Random(1).randbytes(50_000)
MODEL = safetensors({"a": tensor(0, len(CONTENT))}, CONTENT)
NAME = "folder/model.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        hub.files[NAME] = Stored(MODEL)
        hub.be_the_hub(monkeypatch)
        yield hub


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    monkeypatch.setattr(hashes, "HASHES", tmp_path / "ckpts" / ".hashes.json")
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.0)
    return Folders(tmp_path, tmp_path / "ckpts")


@pytest.fixture
def fetch(hub: HubStandIn, folders: Folders) -> Callable[..., Path]:
    def fetch(url: str = hub.url(NAME), target: str = "folder", **options) -> Path:
        return ensure([Required("transformer", [url], target)], folders, **options)["transformer"]

    return fetch


def leftovers(folders: Folders) -> list[str]:
    return sorted(path.name for path in folders.ckpts.rglob("*.part*"))


def test_a_missing_file_is_downloaded_whole(hub, folders, fetch):
    path = fetch()
    assert path == folders.ckpts / "folder" / "model.safetensors"
    assert path.read_bytes() == MODEL
    assert leftovers(folders) == []


def test_a_file_that_is_there_is_not_asked_for(hub, fetch):
    fetch()
    hub.asked.clear()
    fetch()
    assert hub.asked == []


def test_a_small_file_is_checked_with_the_hash_of_git(hub, fetch):
    hub.files["config.json"] = Stored(b"{}", large=False)
    assert fetch(hub.url("config.json")).read_bytes() == b"{}"
    hub.files["other.json"] = Stored(b"{}", large=False, promised_hash="a" * 40)
    with pytest.raises(UserError, match="hash it promised, twice"):
        fetch(hub.url("other.json"))


def test_the_size_of_a_redirect_is_not_taken_for_the_size_of_the_file(hub, fetch):
    hub.files[NAME].tells_size = False
    told: list[DownloadProgress] = []
    assert fetch(progress=told.append).read_bytes() == MODEL
    assert told[-1].total_bytes == len(MODEL)


def test_an_empty_file_is_a_file(hub, fetch):
    hub.files["empty.txt"] = Stored(b"", large=False)
    assert fetch(hub.url("empty.txt")).read_bytes() == b""


def test_progress_tells_bytes_of_the_whole_and_ends_at_all_of_them(fetch):
    told: list[DownloadProgress] = []
    fetch(progress=told.append)
    assert (told[0].done_bytes, told[-1].done_bytes) == (0, len(MODEL))
    assert {(one.file, one.total_bytes) for one in told} == {("model.safetensors", len(MODEL))}
    assert told[-1].speed > 0


def test_a_cut_connection_is_continued_where_it_ended(hub, folders, fetch):
    hub.get_faults = [Fault(cut_after=20_000), Fault(cut_after=10_000)]
    assert fetch().read_bytes() == MODEL
    assert hub.bytes_asked() == ["", "bytes=20000-", "bytes=30000-"]


def test_a_cut_before_each_byte_ends_after_a_bounded_number_of_tries(hub, folders, fetch):
    hub.get_faults = [Fault(cut_after=1000)] * 50
    with pytest.raises(UserError, match="could not be downloaded .* in 5 tries .*start again to continue"):
        fetch()
    assert len(hub.bytes_asked()) == downloads.TRIES
    assert leftovers(folders) == ["model.safetensors.part", "model.safetensors.part.etag"]
    hub.get_faults = []
    assert fetch().read_bytes() == MODEL
    assert hub.bytes_asked()[-1] == "bytes=5000-"


def test_a_try_that_brought_much_renews_the_count(hub, fetch, monkeypatch):
    monkeypatch.setattr(downloads, "FRESH_COURAGE", 1000)
    hub.get_faults = [Fault(cut_after=5000)] * 9
    assert fetch().read_bytes() == MODEL


def test_a_part_of_another_version_is_not_continued(hub, folders, fetch):
    hub.get_faults = [Fault(cut_after=20_000)] + [Fault(status=500)] * 4
    with pytest.raises(UserError):
        fetch()
    hub.files[NAME] = Stored(safetensors({"b": tensor(0, len(CONTENT))}, CONTENT[::-1]))
    assert fetch().read_bytes() == hub.files[NAME].data
    assert hub.bytes_asked()[-1] == ""


def test_a_part_of_unknown_origin_is_not_continued(hub, folders, fetch):
    (folders.ckpts / "folder").mkdir(parents=True)
    (folders.ckpts / "folder" / "model.safetensors.part").write_bytes(MODEL[:1000])
    assert fetch().read_bytes() == MODEL
    assert hub.bytes_asked() == [""]


def test_a_complete_part_only_needs_its_checks(hub, folders, fetch):
    (folders.ckpts / "folder").mkdir(parents=True)
    (folders.ckpts / "folder" / "model.safetensors.part").write_bytes(MODEL)
    (folders.ckpts / "folder" / "model.safetensors.part.etag").write_text(hub.files[NAME].etag)
    assert fetch().read_bytes() == MODEL
    assert hub.bytes_asked() == []


def test_a_server_without_ranges_starts_over(hub, fetch):
    hub.get_faults = [Fault(cut_after=20_000), Fault(ignore_range=True)]
    assert fetch().read_bytes() == MODEL


def test_a_flipped_byte_is_fetched_again(hub, fetch):
    hub.get_faults = [Fault(flip_byte=30_000)]
    assert fetch().read_bytes() == MODEL
    assert hub.bytes_asked() == ["", ""]


def test_a_wrong_hash_is_not_accepted(hub, folders, fetch):
    hub.files[NAME].promised_hash = "a" * 64
    with pytest.raises(UserError, match="do not have the hash it promised, twice"):
        fetch()
    assert leftovers(folders) == [] and not (folders.ckpts / "folder" / "model.safetensors").exists()


@pytest.mark.parametrize("difference", [-100, 100])
def test_a_wrong_length_is_not_accepted(hub, folders, fetch, difference):
    hub.files[NAME].promised_size = len(MODEL) + difference
    with pytest.raises(UserError, match="instead of|connection ended|answered 416"):
        fetch()
    assert not (folders.ckpts / "folder" / "model.safetensors").exists()


def test_a_page_of_html_is_not_a_model(hub, folders, fetch):
    hub.files["page.safetensors"] = Stored(b"<!doctype html>" * 10)
    with pytest.raises(
        UserError, match="does not begin like a safetensors file but like a web page.*, twice"
    ):
        fetch(hub.plain_url("page.safetensors"))
    assert leftovers(folders) == []


def test_another_server_than_the_hub(hub, folders, fetch):
    hub.get_faults = [Fault(cut_after=20_000)]
    assert fetch(hub.plain_url(NAME)).read_bytes() == MODEL
    ranges = [one.headers.get("range", "") for one in hub.asked]
    assert ranges == ["bytes=0-0", "", "bytes=20000-"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_tells_about_the_licence_and_the_token(hub, folders, fetch, status):
    hub.head_faults = [Fault(status)]
    with pytest.raises(UserError) as caught:
        fetch()
    for words in ("model.safetensors", f"({status})", "licence", "HF_TOKEN", f"{hub.endpoint}/{REPOSITORY}"):
        assert words in str(caught.value)
    assert len(hub.asked) == 1


def test_a_file_that_does_not_exist_is_named_by_its_address(hub, folders, fetch):
    with pytest.raises(UserError, match=r"absent\.safetensors does not exist \(404\).*card") as caught:
        fetch(hub.url("absent.safetensors"))
    assert str(folders.ckpts / "folder" / "absent.safetensors") in str(caught.value)


@pytest.mark.parametrize("fault", [Fault(429, {"Retry-After": "0"}), Fault(500), Fault(503), Fault(408)])
def test_a_passing_answer_is_tried_again(hub, fetch, fault):
    hub.head_faults, hub.get_faults = [fault], [fault]
    assert fetch().read_bytes() == MODEL


def test_a_lasting_error_of_the_server_is_told_in_a_sentence(hub, fetch):
    hub.head_faults = [Fault(500)] * 50
    with pytest.raises(UserError, match="in 5 tries .the server answered 500.*put the file at"):
        fetch()
    assert len(hub.asked) == downloads.TRIES


def test_the_pauses_grow_and_obey_the_server(hub, fetch, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 1.0)
    monkeypatch.setattr(downloads, "_wait", lambda seconds, cancelled: pauses.append(seconds))
    soon, late = {"Retry-After": "7"}, {"Retry-After": "9999"}
    hub.head_faults = [Fault(500), Fault(429, soon), Fault(500), Fault(503, late)]
    fetch()
    assert pauses == [1.0, 7.0, 4.0, downloads.LONGEST_PAUSE]


def test_nobody_at_home(hub, folders, fetch, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        use_endpoint(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(UserError, match="could not be downloaded from 127.0.0.1:.* put the file at"):
            fetch()


def test_cancelling_keeps_the_part_for_the_next_time(hub, folders, fetch):
    hub.get_faults = [Fault(pause=0.005)]
    done: list[int] = []
    with pytest.raises(Cancelled):
        fetch(progress=lambda told: done.append(told.done_bytes), cancelled=lambda: max(done or [0]) > 3000)
    kept = (folders.ckpts / "folder" / "model.safetensors.part").stat().st_size
    assert 3000 < kept < len(MODEL)
    assert fetch().read_bytes() == MODEL
    assert hub.bytes_asked()[-1] == f"bytes={kept}-"


def test_cancelling_ends_a_pause(hub, fetch, monkeypatch):
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 3600.0)
    monkeypatch.setattr(downloads, "LONGEST_PAUSE", 3600.0)
    hub.head_faults = [Fault(500)]
    with pytest.raises(Cancelled):
        fetch(cancelled=lambda: bool(hub.asked))


DiskUsage = namedtuple("DiskUsage", "total used free")


def test_a_full_disk_is_told_before_the_download(hub, folders, fetch, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: DiskUsage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(UserError) as caught:
        fetch()
    for words in ("model.safetensors", size_text(len(MODEL)), "has 5.0 kB free", str(folders.ckpts)):
        assert words in str(caught.value)
    assert hub.bytes_asked() == []


def test_what_is_already_here_needs_no_room(hub, folders, fetch, monkeypatch):
    hub.get_faults = [Fault(cut_after=40_000)] + [Fault(500)] * 4
    with pytest.raises(UserError):
        fetch()
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: DiskUsage(0, 0, len(MODEL) - 40_000))
    assert fetch().read_bytes() == MODEL


def test_a_disk_that_fills_up_meanwhile_is_told_in_a_sentence(hub, folders, fetch, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "_receive", refuse)
    with pytest.raises(UserError, match=r"The disk of .*ckpts is full: make room"):
        fetch()


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_the_variables_forbid_downloads(variable):
    code = "from shared.weights import hub; print(hub.is_offline())"
    told = [
        subprocess.run([sys.executable, "-c", code], env=os.environ | {variable: value}, cwd=ROOT,
                       capture_output=True, text=True, check=True).stdout.strip()
        for value in ("1", "0")
    ]  # fmt: skip
    assert told == ["True", "False"]


def test_offline_mode_says_what_is_missing_and_where_it_goes(hub, folders, fetch, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        fetch()
    assert hub.url(NAME) in str(caught.value)
    assert str(folders.ckpts / "folder" / "model.safetensors") in str(caught.value)
    assert hub.asked == []


def test_a_missing_project_file_is_named(folders):
    with pytest.raises(UserError, match="vae is missing .*vae.safetensors"):
        ensure([Required("vae", ["models/z_image/mini/vae.safetensors"])], folders)


def test_a_file_placed_by_hand_is_taken_when_it_is_whole(hub, folders, fetch):
    folders.ckpts.mkdir()
    (folders.ckpts / "model.safetensors").write_bytes(MODEL)
    assert fetch() == folders.ckpts / "model.safetensors"
    (folders.ckpts / "model.safetensors").write_bytes(MODEL[:-1])
    with pytest.raises(UserError, match=f"is {len(MODEL) - 1:,} bytes, its header says {len(MODEL):,}"):
        fetch()
    assert hub.asked == []


def test_several_files_and_the_first_of_a_role(hub, folders):
    hub.files["a.json"] = Stored(b"{}", large=False)
    hub.files["b.json"] = Stored(b"[]", large=False)
    required = [
        Required("text_encoder_folder", [hub.url("a.json")], "Qwen3"),
        Required("text_encoder_folder", [hub.url("b.json")], "Qwen3"),
        Required("transformer", ["not/there.safetensors", hub.url(NAME)]),
        Required("again", [hub.url(NAME)]),
    ]
    paths = ensure(required, folders)
    assert paths["text_encoder_folder"] == folders.ckpts / "Qwen3" / "a.json"
    assert (folders.ckpts / "Qwen3" / "b.json").read_bytes() == b"[]"
    assert paths["transformer"] == paths["again"] == folders.ckpts / "model.safetensors"


def test_the_token_goes_to_the_hub_only(hub, fetch, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    fetch()
    fetch(hub.plain_url(NAME), target="elsewhere")
    seen = {one.path.split("/")[1]: one.headers.get("authorization") for one in hub.asked}
    assert seen == {REPOSITORY.split("/")[0]: "Bearer hf_verysecret", "store": None, "plain": None}


def test_the_token_is_in_no_message(hub, fetch, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    hub.head_faults = [Fault(500), Fault(401)]
    with pytest.raises(UserError) as caught:
        fetch()
    assert "verysecret" not in str(caught.value) + caplog.text


def test_the_hash_of_a_download_is_remembered(hub, folders, fetch):
    path = fetch()
    table = json.loads((folders.ckpts / ".hashes.json").read_text())
    assert table[str(path.resolve())][2] == sha256_of(path) == hashlib.sha256(MODEL).hexdigest()


def test_a_hash_is_computed_once(folders, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert sha256_of(path) == hashlib.sha256(b"one").hexdigest()
    monkeypatch.setattr(downloads.hashlib, "sha256", None)
    assert sha256_of(path)[:8] == "7692c3ad"


def test_a_changed_file_is_hashed_again(folders, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    sha256_of(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert sha256_of(path) == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"PATH": 5}', '{"PATH": [1, 2, 3]}', "[" * 100_000, "\0"])
def test_a_damaged_cache_is_no_obstacle(folders, tmp_path, text):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    folders.ckpts.mkdir()
    cache = folders.ckpts / ".hashes.json"
    cache.write_text(text.replace("PATH", str(path)))
    assert sha256_of(path) == hashlib.sha256(b"one").hexdigest()
    assert list(json.loads(cache.read_text())) == [str(path.resolve())]


def test_a_cache_that_cannot_be_written_is_no_obstacle(folders, tmp_path, caplog):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert sha256_of(path, cache_file=path / "below-a-file") == hashlib.sha256(b"one").hexdigest()
    assert "cannot be written" in caplog.text


def test_without_the_cache_nothing_is_written(folders, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    sha256_of(path, cache=False)
    assert not folders.ckpts.exists()
