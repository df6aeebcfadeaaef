"""Where model files are looked for, and which safetensors files are whole."""

from pathlib import Path

import pytest

from models.z_image.checkpoints import sources
from shared.errors import UserError
from shared.weights.files import (
    DamagedFile,
    Folders,
    RefusedFile,
    Required,
    check_safetensors,
    describe,
    destination,
    file_name,
    locate,
)
from tests.support.safetensors_bytes import safetensors, tensor

URL = "https://huggingface.co/someone/some-model/resolve/main/Qwen3/qwen3%20bf16.safetensors?download=true"


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    (tmp_path / "ckpts" / "Qwen3").mkdir(parents=True)
    return Folders(tmp_path, tmp_path / "ckpts")


def test_a_url_has_the_name_of_its_last_part():
    assert file_name(URL) == "qwen3 bf16.safetensors"
    assert file_name("models/z_image/mini/vae.safetensors") == "vae.safetensors"
    assert file_name("text_encoder\\folder\\") == "folder"


@pytest.mark.parametrize("source", ["", "https://host", "https://host/%2e%2e", "https://host/a%5Cb", "../.."])
def test_an_address_without_a_safe_file_name_is_refused(source: str):
    with pytest.raises(UserError, match="does not end in a file name"):
        file_name(source)


def test_a_download_goes_to_the_target_folder_in_ckpts(folders: Folders):
    assert destination(URL, folders, "Qwen3") == folders.ckpts / "Qwen3" / "qwen3 bf16.safetensors"
    with pytest.raises(UserError, match="leads out of"):
        destination(URL, folders, "../elsewhere")


@pytest.mark.parametrize("place", ["Qwen3/qwen3 bf16.safetensors", "qwen3 bf16.safetensors"])
def test_a_download_is_found_in_its_folder_and_in_a_flat_layout(folders: Folders, place: str):
    assert locate(URL, folders, "Qwen3") is None
    (folders.ckpts / place).write_bytes(b"x")
    assert locate(URL, folders, "Qwen3") == folders.ckpts / place


@pytest.mark.parametrize(
    "place",
    ["unet", "diffusion_models/ZImage", "DiffusionModels", "Stable-diffusion", "clip", "TextEncoders", "VAE",
     "vae/FLUX1", "text_encoder"],
)  # fmt: skip
def test_a_file_is_found_in_the_folders_of_other_programs(folders: Folders, tmp_path: Path, place: str):
    models = tmp_path / "models"
    both = Folders(folders.root, folders.ckpts, (models,))
    inside = models / place
    inside.mkdir(parents=True)
    for name in ("one.safetensors", "model.safetensors", "config.json"):
        (inside / name).write_bytes(b"x")
    for source in ("one.safetensors", "vae/one.safetensors", "https://host/one.safetensors"):
        assert locate(source, both) == inside / "one.safetensors"
    assert locate("model.safetensors", both) is None and locate("https://host/config.json", both) is None
    (folders.ckpts / "one.safetensors").write_bytes(b"x")
    assert locate("one.safetensors", both) == folders.ckpts / "one.safetensors"


def test_a_folder_of_another_kind_is_not_looked_into(folders: Folders, tmp_path: Path):
    for place in ("loras", "unet/a/b"):
        (tmp_path / "models" / place).mkdir(parents=True)
        (tmp_path / "models" / place / "one.safetensors").write_bytes(b"x")
    assert locate("one.safetensors", Folders(folders.root, folders.ckpts, (tmp_path / "models",))) is None


def test_the_target_folder_comes_before_the_flat_layout(folders: Folders):
    for place in ("qwen3 bf16.safetensors", "Qwen3/qwen3 bf16.safetensors"):
        (folders.ckpts / place).write_bytes(b"x")
    assert locate(URL, folders, "Qwen3") == folders.ckpts / "Qwen3" / "qwen3 bf16.safetensors"


def test_paths_start_from_the_project_and_then_from_ckpts(folders: Folders):
    (folders.ckpts / "turbo.safetensors").write_bytes(b"x")
    assert locate("turbo.safetensors", folders) == folders.ckpts / "turbo.safetensors"
    (folders.root / "turbo.safetensors").write_bytes(b"x")
    assert locate("turbo.safetensors", folders) == folders.root / "turbo.safetensors"
    assert locate(str(folders.root / "turbo.safetensors"), folders) == folders.root / "turbo.safetensors"
    assert locate("ckpts/Qwen3/", folders) == folders.ckpts / "Qwen3"


def test_an_unfinished_download_is_not_the_file(folders: Folders):
    (folders.ckpts / "Qwen3" / "qwen3 bf16.safetensors.part").write_bytes(b"x")
    assert not describe(Required("text_encoder", [URL], "Qwen3"), folders).on_disk


def test_describe_tells_the_first_alternative_on_disk_and_its_size(folders: Folders):
    (folders.ckpts / "b.safetensors").write_bytes(b"12345")
    urls = ["https://host/a.safetensors", "https://host/b.safetensors"]
    found = describe(Required("transformer", urls), folders)
    assert (found.on_disk, found.path, found.size_bytes) == (True, folders.ckpts / "b.safetensors", 5)
    absent = describe(Required("transformer", ["https://host/c.safetensors"]), folders)
    assert (absent.on_disk, absent.path, absent.size_bytes) == (False, None, None)


def test_describe_adds_up_a_folder(folders: Folders):
    (folders.ckpts / "Qwen3" / "a").write_bytes(b"123")
    (folders.ckpts / "Qwen3" / "b").write_bytes(b"4567")
    assert describe(Required("text_encoder_folder", ["ckpts/Qwen3"]), folders).size_bytes == 7


WHOLE = {
    "one tensor": safetensors({"a": tensor(0, 4)}, b"1234"),
    "metadata": safetensors({"__metadata__": {"k": "v"}, "a": tensor(0, 4)}, b"1234"),
    "padding": safetensors(b"{}      "),
    "no tensor": safetensors({}),
    "empty and scalar tensors": safetensors({"a": tensor(0, 0), "b": tensor(0, 4, "F32", [])}, b"1234"),
    "four-bit": safetensors({"a": tensor(0, 2, "F4", [4])}, b"12"),
}  # fmt: skip
DAMAGED = {
    "empty": (b"", "too short"),
    "no header length": (b"1234567", "too short"),
    "text": (b"<!doctype html><html>not found</html>", "does not begin like"),
    "header cut off": (safetensors({"a": tensor(0, 4)}, b"1234")[:30], "its header alone"),
    "data cut off": (safetensors({"a": tensor(0, 4)}, b"123"), "its header says"),
    "data too long": (safetensors({"a": tensor(0, 4)}, b"12345"), "its header says"),
    "not JSON": (safetensors(b"{nonsense}"), "cannot be read"),
    "not UTF-8": (safetensors(b'{"\xff\xfe": 1}'), "cannot be read"),
    "nested deeply": (safetensors(b"[" * 200_000), "cannot be read"),
    "a list": (safetensors([]), "not a table"),
    "same name twice": (safetensors(b'{"a":1,"a":2}'), "twice"),
    "no offsets": (safetensors({"a": {"dtype": "U8", "shape": [1]}}, b"1"), "without dtype"),
    "entry is a number": (safetensors({"a": 1}, b"1"), "without dtype"),
    "negative offset": (safetensors({"a": tensor(-1, 1)}, b"1"), "impossible"),
    "backward offsets": (safetensors({"a": tensor(2, 1, shape=[1])}, b"1"), "impossible"),
    "a fraction": (safetensors({"a": tensor(0, 1, shape=[1.0])}, b"1"), "impossible"),  # type: ignore[list-item]
    "bytes not like the shape": (safetensors({"a": tensor(0, 4, "F32", [2])}, b"1234"), "needs others"),
    "overlap": (safetensors({"a": tensor(0, 4), "b": tensor(2, 6)}, b"123456"), "same bytes"),
}


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE.keys())
def test_a_whole_file_passes(tmp_path: Path, data: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    check_safetensors(path)


@pytest.mark.parametrize(("data", "words"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_named_with_its_flaw(tmp_path: Path, data: bytes, words: str):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match=words) as caught:
        check_safetensors(path)
    assert str(path) in str(caught.value) and "delete it and start again" in str(caught.value)


def test_a_dtype_that_nothing_here_reads_is_named(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({"a": tensor(0, 3, "F3_E1M1", [8])}, b"123"))
    with pytest.raises(RefusedFile, match=r"is quantized as F3_E1M1 \('a'\), which is not supported"):
        check_safetensors(path)


def test_the_sentence_compares_the_two_lengths(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({"a": tensor(0, 5000)}, bytes(4000)))
    header = path.stat().st_size - 4000
    with pytest.raises(UserError, match=rf"is {header + 4000:,} bytes, its header says {header + 5000:,}"):
        check_safetensors(path)


def test_what_the_safetensors_library_writes_passes(tmp_path: Path):
    numpy = pytest.importorskip("numpy")
    library = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "model.safetensors"
    arrays = {"b": numpy.ones((3, 5), "float16"), "a": numpy.zeros((0, 2), "int64")}
    library.save_file(arrays, path, {"format": "pt"})
    check_safetensors(path)


def test_files_are_found_in_the_users_other_folders(folders, tmp_path):
    mine = tmp_path / "mine"
    searched = Folders(folders.root, folders.ckpts, (tmp_path / "absent", mine))
    (mine / "Qwen3").mkdir(parents=True)
    for name in ("a.safetensors", "Qwen3/b.safetensors"):
        (mine / name).write_bytes(b"x")
    (mine / "Z-Image-Turbo" / "transformer").mkdir(parents=True)
    assert locate("https://example.org/x/a.safetensors", searched) == mine / "a.safetensors"
    assert locate("https://example.org/b.safetensors", searched, "Qwen3") == mine / "Qwen3/b.safetensors"
    assert locate("Z-Image-Turbo/transformer", searched) == mine / "Z-Image-Turbo/transformer"
    assert locate("https://example.org/x/a.safetensors", folders) is None


def test_a_file_in_the_hubs_cache_is_not_fetched_again(folders, tmp_path, monkeypatch):
    from huggingface_hub import constants, try_to_load_from_cache

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--o--n" / "snapshots" / ("a" * 40)
    (snapshot / "text encoder").mkdir(parents=True)
    (snapshot / "text encoder" / "f.bin").write_bytes(b"x")
    (cache / "models--o--n" / "refs").mkdir()
    (cache / "models--o--n" / "refs" / "main").write_text("a" * 40)
    expected = try_to_load_from_cache("o/n", "text encoder/f.bin", cache_dir=cache)
    url = "https://huggingface.co/o/n/resolve/main/text%20encoder/f.bin"
    assert str(locate(url, folders)) == expected
    assert locate(url.replace("f.bin", "g.bin"), folders) is None
    assert locate(url.replace("/o/", "/p/"), folders) is None


@pytest.mark.parametrize("name", ["ae.safetensors", "ae.sft", "flux_vae.safetensors"])
def test_the_vae_is_found_under_other_programs_names(tmp_path: Path, name: str) -> None:
    """They are one file: the VAE of FLUX.1, which Z-Image has too."""
    (tmp_path / "models" / "VAE").mkdir(parents=True)
    file = tmp_path / "models" / "VAE" / name
    file.write_bytes(b"x")
    folders = Folders(tmp_path, tmp_path / "ckpts", (tmp_path / "models",))
    assert describe(sources.vae({}), folders).path == file
