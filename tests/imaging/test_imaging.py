"""Saved pictures and their metadata, read back with Pillow alone and, for the tags' bytes, by hand."""

import errno
import json
import multiprocessing
import os
import random
import stat
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shared.errors import UserError
from shared.imaging import metadata, saving
from shared.imaging.naming import TEMPLATE, Facts, output_path
from shared.settings.validation import validate

SETTINGS = {
    "model_type": "z_image_base", "prompt": "a red circle", "negative_prompt": "blue", "resolution": "32x16",
    "num_inference_steps": 30, "seed": -1, "batch_size": 4, "guidance_scale": 4.0, "flow_shift": 6.0,
    "cfg_normalization": 0.0, "cfg_truncation": 1.0, "image_format": "png",
}  # fmt: skip
FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
PROMPTS = ["a red circle", 'quotes " and \\ back', "一个红色的圆 🔴", "two\nlines, comma: colon", "é" * 40]


def make_meta(**settings):
    return metadata.build(
        {**SETTINGS, **settings},
        seed=43,
        index=1,
        model_name="Z-Image Base 6B",
        model_files={"base_bf16.safetensors": "0123456789abcdef" * 4, "vae.safetensors": None},
        notes=["12 tokens of the prompt were dropped"],
        extra={"sampler": "Euler", "seconds": 1.5},
    )


def picture(mode="RGB"):
    random_pixels = random.Random(0).randbytes(32 * 16 * len(mode))
    return Image.frombytes(mode, (32, 16), random_pixels)


def save(folder, fmt="png", stem="picture", **settings):
    return saving.save_image(picture(), folder, stem, fmt, make_meta(**settings))


def user_comment(path):
    """The UserComment of a JPEG or WebP file as its raw eight-byte code and body, with Pillow alone."""
    with Image.open(path) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    return comment[:8], comment[8:]


# ---------------------------------------------------------------- metadata


def test_the_metadata_holds_everything():
    meta = make_meta()
    assert meta["seed"] == 43 and meta["batch_size"] == 1 and meta["type"].startswith("ZGP ")
    assert {**meta, "seed": -1, "batch_size": 4}.items() >= SETTINGS.items()
    assert meta["zgp"] == {
        "version": "0.1.0",
        "model_name": "Z-Image Base 6B",
        "model_files": {"base_bf16.safetensors": "0123456789abcdef" * 4, "vae.safetensors": None},
        "index": 1,
        "batch_size": 4,
        "batch_seed": 42,
        "notes": ["12 tokens of the prompt were dropped"],
        "sampler": "Euler",
        "seconds": 1.5,
    }


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_what_is_saved_is_read_back(tmp_path, fmt, prompt):
    path = save(tmp_path, fmt, prompt=prompt)
    assert path == tmp_path / f"picture{FORMATS[fmt]}"
    assert metadata.read(path) == make_meta(prompt=prompt)
    assert metadata.read(str(path))["prompt"] == prompt


def test_settings_from_metadata_validate_and_make_this_one_picture(tmp_path):
    settings = metadata.settings_from(metadata.read(save(tmp_path)))
    assert settings == {**SETTINGS, "seed": 43, "batch_size": 1}
    again = validate(settings, {}, {"guidance": True, "flow_shift": True, "negative_prompt": True,
                                    "min_size": 16})  # fmt: skip
    assert again.settings == {**again.settings, **settings} and again.ignored == {}


def test_a_png_holds_both_chunks_and_the_exact_pixels(tmp_path):
    path = save(tmp_path, prompt="一个红色的圆")
    with Image.open(path) as image:
        assert image.tobytes() == picture().tobytes()
        assert json.loads(image.info["comment"])["prompt"] == "一个红色的圆"
        assert image.info["parameters"].split("\n")[0] == "一个红色的圆"


def test_the_a1111_text():
    assert metadata.to_parameters_text(make_meta()) == (
        "a red circle\n"
        "Negative prompt: blue\n"
        "Steps: 30, Sampler: Euler, CFG scale: 4, Shift: 6, Seed: 43, Size: 32x16, Model hash: 0123456789, "
        "Model: Z-Image Base 6B, Version: ZGP 0.1.0"
    )


def test_the_a1111_text_of_a_model_without_guidance():
    settings = {"model_type": "m", "prompt": "x\0y", "resolution": "64x64", "num_inference_steps": 8}
    meta = metadata.build(
        settings,
        seed=5,
        index=0,
        model_name="Mine, 2: new",
        model_files={"a": None, "b": "f" * 64},
        notes=[],
        extra={},
    )
    assert metadata.to_parameters_text(meta) == (
        "xy\n"
        "Steps: 8, Sampler: Euler, CFG scale: 1, Seed: 5, Size: 64x64, "
        'Model: "Mine, 2: new", Version: ZGP 0.1.0'
    )


@pytest.mark.parametrize("fmt", ["jpeg", "webp"])
def test_the_user_comment_is_encoded_as_exif_says(tmp_path, fmt):
    code, body = user_comment(save(tmp_path, fmt, "ascii"))
    assert code == b"ASCII\0\0\0" and json.loads(body.decode("ascii"))["prompt"] == "a red circle"
    code, body = user_comment(save(tmp_path, fmt, "unicode", prompt="圆 🔴"))
    assert code == b"UNICODE\0" and json.loads(body.decode("utf-16-be"))["prompt"] == "圆 🔴"


def test_the_exif_block_and_its_unicode_comment_have_the_same_byte_order():
    block = metadata.exif(make_meta(prompt="圆")).removeprefix(b"Exif\0\0")
    assert block[:4] == b"MM\0*"
    main = dict(ifd_entries(block, struct.unpack_from(">I", block, 4)[0]))
    kind, count, offset = dict(ifd_entries(block, main[0x8769][2]))[0x9286]
    assert kind == 7 and block[offset : offset + 8] == b"UNICODE\0"  # 7: UNDEFINED, as EXIF wants it
    assert json.loads(block[offset + 8 : offset + count].decode("utf-16-be"))["prompt"] == "圆"


def ifd_entries(block, offset):
    for number in range(struct.unpack_from(">H", block, offset)[0]):
        tag, kind, count, value = struct.unpack_from(">HHII", block, offset + 2 + 12 * number)
        yield tag, (kind, count, value)


def test_jpeg_keeps_full_colour_resolution_and_drops_transparency(tmp_path):
    path = saving.save_image(picture("RGBA"), tmp_path, "a", "jpeg", make_meta())
    with Image.open(path) as image:
        assert image.mode == "RGB"
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3
        assert max(max(table) for table in image.quantization.values()) < 15  # quality 95 or better


def test_metadata_too_long_for_a_jpeg_keep_the_picture_and_themselves(tmp_path):
    path = save(tmp_path, "jpeg", prompt="🔴" * 10_000, negative_prompt="🔵" * 10_000)
    assert path.name == "picture.png"
    assert metadata.read(path)["prompt"] == "🔴" * 10_000


def test_no_text_can_cost_the_picture(tmp_path):
    for fmt in FORMATS:
        assert metadata.read(save(tmp_path, fmt, prompt="half \ud83d", odd=Path("a")))["prompt"] == "half ?"


# ---------------------------------------------------------------- reading other files


def write_png(path, name, text, zip=False):
    chunks = PngInfo()
    chunks.add_text(name, text, zip=zip)
    picture().save(path, pnginfo=chunks)
    return path


WAN2GP = {
    "type": "WanGP v12.60 - Z-Image",
    "model_type": "z_image",
    "prompt": "圆",
    "seed": 3,
    "batch_size": 4,
}


def test_metadata_of_wan2gp_are_read(tmp_path):
    path = write_png(tmp_path / "a.png", "comment", json.dumps(WAN2GP))
    assert metadata.read(path) == WAN2GP
    assert metadata.settings_from(WAN2GP) == {
        "model_type": "z_image", "prompt": "圆", "seed": 3, "batch_size": 1,
    }  # fmt: skip
    assert metadata.to_parameters_text(WAN2GP) == (
        "圆\nSampler: Euler, CFG scale: 1, Seed: 3, Model: z_image, Version: WanGP v12.60 - Z-Image"
    )


def test_the_a1111_text_of_odd_metadata_is_still_a_text():
    odd = {"prompt": "x", "seed": [1], "zgp": {"version": 3, "model_files": {"a": 5, "b": "f" * 64}}}
    assert "Model hash: 5, Version: ZGP 3" in metadata.to_parameters_text(odd)


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + json.dumps(WAN2GP).encode("utf-16-be"),
        b"UNICODE\0" + json.dumps(WAN2GP).encode("utf-16-le"),
        b"ASCII\0\0\0" + json.dumps(WAN2GP).encode(),
        bytes(8) + json.dumps(WAN2GP, ensure_ascii=False).encode(),
        json.dumps(WAN2GP, ensure_ascii=False).encode(),
    ],
    ids=["utf-16-be", "utf-16-le", "ascii", "undefined", "bare"],
)
@pytest.mark.parametrize("in_exif_ifd", [True, False])
def test_every_usual_spelling_of_the_user_comment_is_read(tmp_path, comment, in_exif_ifd):
    tags = Image.Exif()
    (tags.get_ifd(0x8769) if in_exif_ifd else tags)[0x9286] = comment
    picture().save(tmp_path / "a.jpg", exif=tags)
    assert metadata.read(tmp_path / "a.jpg") == WAN2GP


@pytest.mark.parametrize("fmt", FORMATS)
def test_an_image_without_metadata_has_none(tmp_path, fmt):
    path = tmp_path / f"plain{FORMATS[fmt]}"
    picture().save(path)
    assert metadata.read(path) is None


@pytest.mark.parametrize(
    "text",
    [
        "Created with GIMP", "", "[]", "3", "{", '{"a": 1}', '{"prompt": 3}', '{"prompt": "x", "zgp": 3}',
        '{"prompt": "x", "zgp": {"model_files": []}}', "[" * 200_000, '{"a": ' * 100_000, "9" * 10_000,
    ],
    ids=range(12),
)  # fmt: skip
def test_other_programs_comments_are_no_metadata(tmp_path, text):
    assert metadata.read(write_png(tmp_path / "a.png", "comment", text)) is None


def test_a_compressed_text_bomb_is_refused_without_unpacking_it(tmp_path):
    path = write_png(tmp_path / "bomb.png", "comment", "x")
    body = b"comment\0\0" + zlib.compress(bytes(50_000_000), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    data = path.read_bytes()
    path.write_bytes(data[:33] + chunk + data[33:])  # after the signature and IHDR
    with pytest.raises(UserError, match="bomb.png cannot be read"):
        metadata.read(path)


def test_a_plain_text_of_unusual_length_is_no_metadata(tmp_path):
    text = json.dumps({"prompt": "x" * 2_000_000})
    assert metadata.read(write_png(tmp_path / "a.png", "comment", text)) is None
    assert (
        metadata.read(write_png(tmp_path / "a.png", "comment", text[:900_000] + '"}', zip=True)) is not None
    )


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"GIF89a" + bytes(50), b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe1"]
)
def test_files_that_are_no_image_get_one_sentence(tmp_path, content):
    path = tmp_path / "file.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match="file.png cannot be read; expected an intact PNG, JPEG or WebP"):
        metadata.read(path)


def test_missing_files_and_folders_get_one_sentence(tmp_path):
    with pytest.raises(UserError, match="gone.png does not exist"):
        metadata.read(tmp_path / "gone.png")
    with pytest.raises(UserError, match="cannot be read"):
        metadata.read(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on damaged EXIF
@pytest.mark.parametrize("fmt", FORMATS)
def test_damaged_files_raise_nothing_but_user_errors(tmp_path, fmt):
    good = save(tmp_path, fmt, prompt="圆").read_bytes()
    chance = random.Random(1)
    path = tmp_path / "damaged"
    for _ in range(150):
        damaged = bytearray(good[: chance.randrange(1, len(good))] if chance.random() < 0.3 else good)
        for _ in range(chance.randrange(1, 8)):
            damaged[chance.randrange(min(len(damaged), 700))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            meta = metadata.read(path)
        except UserError:
            continue
        assert meta is None or isinstance(metadata.to_parameters_text(meta), str)


# ---------------------------------------------------------------- saving


def test_a_taken_name_gets_a_number_and_the_old_file_stays(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"mine")
    assert save(tmp_path).name == "picture_1.png"
    assert save(tmp_path).name == "picture_2.png"
    assert save(tmp_path, "jpeg").name == "picture.jpg"
    assert (tmp_path / "picture.png").read_bytes() == b"mine"
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]


def test_folders_are_made(tmp_path):
    assert save(tmp_path / "a" / "b").parent == tmp_path / "a" / "b"


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_files_have_the_users_usual_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    assert stat.S_IMODE(save(tmp_path).stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def save_some(folder, worker):
    return [str(save(folder, prompt=f"{worker}-{number}")) for number in range(10)]


def assert_all_kept(folder, names):
    assert len(names) == len(set(names)) == 40 == len(os.listdir(folder))
    prompts = {metadata.read(name)["prompt"] for name in names}
    assert prompts == {f"{worker}-{number}" for worker in range(4) for number in range(10)}


def test_threads_that_save_the_same_name_keep_every_picture(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(save_some, tmp_path, worker) for worker in range(4)]
    assert_all_kept(tmp_path, [name for result in results for name in result.result()])


def test_processes_that_save_the_same_name_keep_every_picture(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap(save_some, [(tmp_path, worker) for worker in range(4)], chunksize=1)
    assert_all_kept(tmp_path, [name for result in results for name in result])


def test_disks_without_hard_links_keep_every_picture_too(tmp_path, monkeypatch):
    def no_links(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links, raising=False)
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(save_some, tmp_path, worker) for worker in range(4)]
    assert_all_kept(tmp_path, [name for result in results for name in result.result()])


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "The disk is full"),
        (errno.EIO, "could not be written"),
        (errno.EROFS, "could not be written"),
    ],
)
def test_a_failed_write_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, number, said):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=said) as caught:
        save(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="os.link is not used on Windows")
def test_a_disk_that_fails_at_the_last_moment_leaves_nothing(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="The disk is full"):
        save(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "outputs").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        save(tmp_path / "outputs")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a red circle", "_a_red_circle"),
        ("  A/red\\..:circle?*\n<b>|\"' ", "_A_red_circle_b"),
        ("一个红色的圆", "_一个红色的圆"),
        ("हिन्दी", "_हिन्दी"),
        ("🔴🔴", ""),
        ("", ""),
        ("\ud83d half", "_half"),
        ("CON", "_CON"),
        ("x" * 500, "_" + "x" * 80),
        ("圆" * 500, "_" + "圆" * 26),
        ("cafe\u0301", "_café"),
    ],
)
def test_names_are_safe_everywhere(tmp_path, prompt, words):
    path = output_path(TEMPLATE, Facts(datetime(2026, 11, 21, 14, 3, 22), 42, prompt))
    assert path.parent.name == "2026-11-21"
    stem = path.name
    assert stem == "2026-11-21-14h03m22s_seed42" + words
    assert save(tmp_path, stem=stem, prompt="x").exists()
