"""The LoRA folder: listing, verdicts, entries, fetching; presets; conversion."""

import json
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.z_image.checkpoints.lora_names import model_names
from shared.errors import Cancelled, UserError
from shared.loras import library as library_module
from shared.loras.convert import convert
from shared.loras.inspection import inspect
from shared.loras.library import Library, address
from shared.loras.presets import Preset, find_preset, list_presets, read_preset, write_preset
from shared.loras.reader import read
from shared.settings.validation import _to_texts
from shared.weights import downloads
from tests.support.lora_deltas import FAMILIES, changes, distance, weights
from tests.support.lora_web import Web
from tests.support.lora_writers import (
    CONFIG,
    DIM,
    OTHERS,
    SHAPES,
    WRITERS,
    Style,
    deltas,
    dora,
    factors,
    loha,
    lokr,
    save,
    underscored,
)

NAMES = model_names(CONFIG)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    (tmp_path / "loras").mkdir()
    return Library(tmp_path / "loras", NAMES)


def put(library: Library, name: str, flavour: str = "musubi") -> Path:
    path = library.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(path, WRITERS[flavour][0](factors()))


# ---------------------------------------------------------------- the folder


def test_files_are_listed_with_their_pictures(library: Library) -> None:
    for name in (
        "b.safetensors",
        "A.sft",
        "sub/deep/C.SAFETENSORS",
        ".hidden.sft",
        ".incoming/x.sft",
        "d.ckpt",
    ):
        put(library, name)
    (library.folder / "b.png").write_bytes(b"picture")
    (library.folder / "sub/deep/C.preview.webp").write_bytes(b"picture")
    (library.folder / "broken.sft").symlink_to("nowhere.sft")
    (library.folder / "sub" / "round").symlink_to(library.folder)
    found = library.entries()
    assert [entry.name for entry in found] == ["A.sft", "b.safetensors", "sub/deep/C.SAFETENSORS"]
    assert [entry.preview and entry.preview.name for entry in found] == [None, "b.png", "C.preview.webp"]
    assert found[0].size == found[0].path.stat().st_size
    assert Library(library.folder / "nowhere", NAMES).entries() == []


def test_a_verdict_is_kept_until_the_file_changes(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(library, "a.safetensors")
    asked = []
    monkeypatch.setattr(library_module, "inspect", lambda *args: asked.append(1) or inspect(*args))
    assert library.verdict(path) == library.verdict(path) and library.verdict(path).usable
    assert len(asked) == 1
    os.utime(path, ns=(1, 1))
    library.verdict(path)
    path.write_bytes(b"short")
    assert not library.verdict(path).usable and len(asked) == 3
    assert not library.verdict(library.folder / "missing.sft").usable


@pytest.mark.parametrize(
    ("entry", "url", "name"),
    [
        ("a.safetensors", "", "a.safetensors"),
        (r"sub\a.sft", "", "sub/a.sft"),
        ("https://h.org/x/a.safetensors?d=1", "https://h.org/x/a.safetensors?d=1", "a.safetensors"),
        ("https://h.org/a.safetensors|people/old", "https://h.org/a.safetensors", "people/old/a.safetensors"),
        ("https://h.org/api/models/123?token=x", "https://h.org/api/models/123?token=x", "123.safetensors"),
        ("https://h.org/..%2F..%2Fevil.sft", "https://h.org/..%2F..%2Fevil.sft", "evil.sft"),
        ("https://h.org/con.sft", "https://h.org/con.sft", "_con.sft"),
        ("https://h.org/.a.b%20.sft", "https://h.org/.a.b%20.sft", "a.b.sft"),
        (f"https://h.org/{'x' * 300}.sft", f"https://h.org/{'x' * 300}.sft", "x" * 150 + ".sft"),
    ],
)
def test_entries(entry: str, url: str, name: str) -> None:
    found = address(entry)
    assert (found.url, found.name) == (url, name)


@pytest.mark.parametrize(
    "entry",
    [
        "../a.sft",
        "/etc/passwd",
        "C:\\a.sft",
        "~/a.sft",
        "a/../../b.sft",
        "",
        "http://h.org/a.sft",
        "ftp://h/a.sft",
        "file:///etc/passwd",
        "https://h.org/a.sft|../up",
        "https://h.org/a.sft|/etc",
        "a.sft|sub",
        "https://h.org/",
        "https://h.org/a.sft|https://h.org/b",
        "a\0.sft",
        "https:///a.sft",
        "https://h.org/a%00b.sft",
    ],
)
def test_entries_that_lead_elsewhere_are_refused(entry: str, library: Library) -> None:
    with pytest.raises(UserError):
        library.path(entry)


def test_a_link_out_of_the_folder_is_no_entry(library: Library, tmp_path: Path) -> None:
    (library.folder / "out").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads out of"):
        library.path("out/a.sft")


# ---------------------------------------------------------------- fetching


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(downloads, "check_request", lambda request: None)  # it is on this computer
    with Web() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def lora_bytes(tmp_path: Path) -> bytes:
    return save(tmp_path / "made.safetensors", WRITERS["musubi"][0](factors())).read_bytes()


def files(library: Library) -> list[str]:
    return sorted(p.relative_to(library.folder).as_posix() for p in library.folder.rglob("*") if p.is_file())


def test_an_address_is_fetched_once_into_its_subfolder(library: Library, web: Web, tmp_path: Path) -> None:
    web.files["a.safetensors"] = lora_bytes(tmp_path)
    web.files["models/7"] = lora_bytes(tmp_path)
    seen = []
    path = library.ensure(web.url("a.safetensors") + "|people", seen.append)
    assert path == library.folder / "people/a.safetensors" and library.verdict(path).usable and seen
    count = len(web.asked)
    assert library.ensure(web.url("a.safetensors") + "|people") == path and len(web.asked) == count
    assert library.ensure(web.url("models/7?token=secret")).name == "7.safetensors"
    assert files(library) == ["7.safetensors", "people/a.safetensors"]
    assert library.ensure("people/a.safetensors") == path


def test_what_is_no_lora_of_this_family_is_not_kept(library: Library, web: Web, tmp_path: Path) -> None:
    web.files["models/8"] = b"<!DOCTYPE html><html>Log in</html>"
    with pytest.raises(UserError, match="was fetched and not kept: .* is a web page, perhaps the login page"):
        library.ensure(web.url("models/8"))
    web.files["flux.safetensors"] = save(tmp_path / "f.safetensors", (FAMILIES["Flux"], {})).read_bytes()
    with pytest.raises(UserError, match="was fetched and not kept: .* made for Flux"):
        library.ensure(web.url("flux.safetensors"))
    assert files(library) == [] and library.entries() == []


def test_a_missing_file_without_address_and_a_stopped_download(
    library: Library, web: Web, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="'gone.sft' is not in"):
        library.ensure("gone.sft")
    web.files["a.safetensors"] = lora_bytes(tmp_path)
    with pytest.raises(Cancelled):
        library.ensure(web.url("a.safetensors"), cancelled=lambda: True)
    assert library.entries() == []


# ---------------------------------------------------------------- presets

PRESET = Preset(
    loras=("a.safetensors", "https://h.org/b.sft|sub"),
    multipliers="1|0.5 0.7,0.2",
    settings={"prompt": "# a comment\na cat", "num_inference_steps": 9},
)


def test_an_lset_of_wan2gp(tmp_path: Path) -> None:
    content = {
        "loras": ["x/a.safetensors"],
        "loras_mult": "0.8",
        "prompt": "# use: zgp man",
        "full_prompt": False,
    }
    (tmp_path / "p.lset").write_text(json.dumps(content))
    found = read_preset(tmp_path / "p.lset")
    assert found == Preset(("x/a.safetensors",), "0.8", {"prompt": "# use: zgp man"}, False)


@pytest.mark.parametrize("suffix", [".lset", ".json", ".zip"])
def test_presets_come_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine{suffix}"
    media = {"guide.png": b"picture"} if suffix == ".zip" else {}
    write_preset(path, Preset(PRESET.loras, PRESET.multipliers, PRESET.settings, True, media))
    found = read_preset(path)
    assert found.loras == PRESET.loras and found.multipliers == "0.5 0.7,0.2"  # the user's own alone
    assert found.media == media and found.settings["prompt"] == "# a comment\na cat"
    assert ("num_inference_steps" in found.settings) == (suffix != ".lset")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_without_the_full_prompt_only_comments_are_kept(tmp_path: Path) -> None:
    write_preset(tmp_path / "a.lset", Preset(PRESET.loras, "", PRESET.settings, full_prompt=False))
    assert json.loads((tmp_path / "a.lset").read_text()) == {
        "loras": list(PRESET.loras),
        "loras_mult": "",
        "prompt": "# a comment",
        "full_prompt": False,
    }


def test_presets_are_found_by_name(tmp_path: Path) -> None:
    for name in ("b.lset", "A.json", "c.zip", "d.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "e.lset").write_text("{}")
    assert [p.name for p in list_presets(tmp_path)] == ["A.json", "b.lset", "c.zip"]
    assert find_preset(tmp_path, "b").name == find_preset(tmp_path, "b.lset").name == "b.lset"
    for name in ("e", "sub/e", "../" + tmp_path.name + "/b", "d.txt"):
        with pytest.raises(UserError, match="it has: A.json, b.lset, c.zip"):
            find_preset(tmp_path, name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not valid JSON"),
        ("[1, 2]", "does not hold one object"),
        ('{"loras": "a"}', "lists its LoRAs as something other"),
        ('{"loras": [1]}', "lists its LoRAs as something other"),
        ('{"loras": [], "loras_mult": [1]}', "multipliers that are not a text"),
        ('{"loras": ["../../etc/passwd"]}', "cannot be used"),
        ('{"loras": ["http://h.org/a.sft"]}', "cannot be used"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"a": "' + "x" * 5_000_000 + '"}', "is larger than"),
        ("\udcff", "is not valid JSON"),
    ],
)
def test_bad_presets(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.lset"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=f"The preset bad.lset.*{words}"):
        read_preset(path)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"x.json": "{}"}, "has no queue.json or settings.json"),
        ({"queue.json": "{}", "../evil.png": "x"}, "which is no plain file name"),
        ({"queue.json": "{}", "/etc/evil": "x"}, "which is no plain file name"),
        ({"queue.json": "{}", "a\\b": "x"}, "which is no plain file name"),
        ({"queue.json": "{}", ".bashrc": "x"}, "which is no plain file name"),
        ({"queue.json": " " * 5_000_001}, "unpacks 'queue.json' to more than"),
        ({"queue.json": "{}"} | {f"{i}.png": "" for i in range(51)}, "has 51 files"),
        ({"queue.json": '[{"params": {"activated_loras": ["/etc/passwd"]}}]'}, "cannot be used"),
    ],
)
def test_bad_zips(members: dict[str, str], words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match=f"The preset bad.zip.*{words}"):
        read_preset(path)


def test_media_that_unpack_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.loras.presets.MAX_MEDIA_BYTES", 1000)
    sizes, real = [], zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda file, n=-1: sizes.append(n) or real(file, n))
    for i, members in enumerate(({"a.png": "x" * 1001}, {"a.png": "x" * 600, "b.png": "x" * 600})):
        path = tmp_path / f"bomb{i}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("queue.json", "{}")
            for name, data in members.items():
                archive.writestr(name, data)
        with pytest.raises(UserError, match="to more than"):
            read_preset(path)
    assert all(size > 0 for size in sizes) and 401 in sizes  # never without a limit, and what is left of it


def test_a_damaged_zip_and_names_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(UserError, match="is not a whole zip file"):
        read_preset(tmp_path / "a.zip")
    with pytest.raises(UserError, match="cannot be read"):
        read_preset(tmp_path / "missing.lset")
    for name in ("a.txt", "a:b.lset", "noend"):
        with pytest.raises(UserError, match="is no name for a preset"):
            write_preset(tmp_path / name, PRESET)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_preset(tmp_path / "file" / "a.lset", PRESET)


# ---------------------------------------------------------------- conversion


@pytest.mark.parametrize("flavour", WRITERS)
def test_every_flavour_converts_to_diffusers_keys(flavour: str, tmp_path: Path) -> None:
    source = save(tmp_path / "a.safetensors", WRITERS[flavour][0](factors()))
    convert(source, tmp_path / "b.safetensors", NAMES)
    verdict = inspect(tmp_path / "b.safetensors", NAMES)
    assert verdict.flavour == ("ai-toolkit" if flavour == "ai-toolkit" else "diffusers")  # by its metadata
    assert (verdict.alphas, verdict.matched, verdict.total) == ((), 14, 14)
    ours = changes(read(tmp_path / "b.safetensors", NAMES), weights())
    assert distance(ours, changes(read(source, NAMES), weights())) < 1e-6
    assert distance(ours, deltas(factors())) < (8e-3 if flavour == "bf16" else 1e-6)


@pytest.mark.parametrize("flavour", OTHERS)
def test_other_algorithms_convert_to_the_same_change(flavour: str, tmp_path: Path) -> None:
    other, base = OTHERS[flavour][0](), weights()
    source = save(tmp_path / "a.safetensors", (other.tensors, other.metadata))
    convert(source, tmp_path / "b.safetensors", NAMES, base.__getitem__)
    ours = changes(read(tmp_path / "b.safetensors", NAMES), base)
    assert distance(ours, {name: change(base[name]) for name, change in other.change.items()}) < 1e-5


def test_what_can_stay_small_does(tmp_path: Path) -> None:
    for make, algorithms in (
        (loha, ("LoRA",)),
        (lambda: lokr(True), ("LoKr",)),
        (lokr, ("LoKr",)),
        (dora, ("DoRA",)),
    ):
        source = save(tmp_path / "a.safetensors", (make().tensors, {}))
        convert(source, tmp_path / "b.safetensors", NAMES)
        assert inspect(tmp_path / "b.safetensors", NAMES).algorithms == algorithms


def test_a_converted_lokr_is_what_diffusers_and_comfyui_know_as_one(tmp_path: Path) -> None:
    """diffusers takes a LoKr without alphas, all of whose keys are a LoKr's, behind diffusion_model. only."""
    for low_rank in (False, True):
        source = save(tmp_path / "a.safetensors", (lokr(low_rank).tensors, {}))
        convert(source, tmp_path / "b.safetensors", NAMES)
        made = load_file(tmp_path / "b.safetensors")
        ends = ("lokr_w1", "lokr_w2_a", "lokr_w2_b") if low_rank else ("lokr_w1", "lokr_w2")
        assert set(made) == {f"diffusion_model.{name}.{end}" for name in SHAPES for end in ends}
        for name, change in lokr(low_rank).change.items():
            w1, *w2 = (made[f"diffusion_model.{name}.{end}"] for end in ends)
            torch.testing.assert_close(torch.kron(w1, w2[0] @ w2[1] if low_rank else w2[0]), change(w1))


def test_a_lokr_with_magnitudes_stays_one(tmp_path: Path) -> None:
    source = lokr()
    tensors = source.tensors | {
        f"lycoris_{underscored(name)}.dora_scale": torch.rand(rows, 1) + 0.5
        for name, (rows, _) in SHAPES.items()
    }
    base = weights()
    a = save(tmp_path / "a.safetensors", (tensors, {}))
    convert(a, tmp_path / "b.safetensors", NAMES)
    assert "diffusion_model.layers.0.attention.to_q.dora_scale" in load_file(tmp_path / "b.safetensors")
    again = changes(read(tmp_path / "b.safetensors", NAMES), base)
    assert distance(again, changes(read(a, NAMES), base)) < 1e-6


def test_beside_other_adapters_a_lokr_becomes_one_of_them(tmp_path: Path) -> None:
    plain = Style("transformer.")(factors({"context_refiner.0.attention.to_q": (DIM, DIM)}))[0]
    content = lokr().tensors | plain
    source = save(tmp_path / "a.safetensors", (content, {}))
    convert(source, tmp_path / "b.safetensors", NAMES)
    assert set(inspect(tmp_path / "b.safetensors", NAMES).algorithms) == {"diff", "LoRA"}


def test_a_name_may_begin_with_a_blank(tmp_path: Path) -> None:
    for name in (" lead.safetensors", "plain.safetensors"):
        save(tmp_path / name, WRITERS["musubi"][0](factors()))
    library = Library(tmp_path, NAMES)
    assert [library.path(entry.name).name for entry in library.entries()] == [
        " lead.safetensors",
        "plain.safetensors",
    ]
    assert library.path("  plain.safetensors ").name == "plain.safetensors"
    assert _to_texts([" lead.safetensors", " "]) == [" lead.safetensors"]


def test_conversion_keeps_exact_factors_in_their_precision(tmp_path: Path) -> None:
    given = {name: (a.bfloat16(), b.bfloat16(), alpha) for name, (a, b, alpha) in factors().items()}
    tensors = {}
    for name, (a, b, _) in given.items():
        tensors |= {
            f"{name}.lora_A.weight": a,
            f"{name}.lora_B.weight": b,
            f"{name}.alpha": torch.tensor(2.0),
        }
    source = save(tmp_path / "a.safetensors", (tensors, {}))
    convert(source, tmp_path / "b.safetensors", NAMES)  # by 2 / 4: exact
    assert (tmp_path / "b.safetensors").stat().st_size < 1.1 * source.stat().st_size


def test_conversions_that_cannot_be(tmp_path: Path) -> None:
    source = save(tmp_path / "a.safetensors", (OTHERS["OFT, PEFT"][0]().tensors, {}))
    with pytest.raises(UserError, match="is turned .OFT."):
        convert(source, tmp_path / "b.safetensors", NAMES)
    for out in (source, tmp_path / "b.ckpt"):
        with pytest.raises(UserError, match="name another"):
            convert(source, out, NAMES)
    plain = save(tmp_path / "c.safetensors", WRITERS["musubi"][0](factors()))
    with pytest.raises(UserError, match="cannot be written"):
        convert(plain, plain / "b.safetensors", NAMES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "c.safetensors"]
