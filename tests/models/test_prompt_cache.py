"""Encoded prompts: kept bit for bit, bounded, proof against damage, and never of another encoder."""

import errno
import io
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.z_image.text_encoder import prompt_cache, text_encoding
from models.z_image.text_encoder.prompt_cache import Encoded, PromptCache, fingerprint, key
from models.z_image.z_image_handler import family_handler
from shared.errors import UserError
from shared.files import atomic
from tests.support import mini

PROMPT = "a red circle above a blue square on a yellow background"


def features(seed: int = 0, length: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(length, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def entry(seed: int = 0, dropped: int = 0, **how: Any) -> Encoded:
    return Encoded(features(seed, **how), dropped)


def name(text: str) -> str:
    return key("encoder", "template", text, 512)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_come_back_bit_for_bit_from_memory_and_disk(tmp_path: Path, dtype: torch.dtype) -> None:
    odd = features(dtype=dtype)
    odd[0, :4] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-7], dtype=dtype)
    first = PromptCache(tmp_path / "new" / "folder")
    assert first.get(name("a")) is None
    first.put(name("a"), Encoded(odd, 3))
    for cache in (first, PromptCache(tmp_path / "new" / "folder")):
        found = cache.get(name("a"))
        assert found is not None and found.dropped == 3 and same_bits(found.features, odd)
    stored = load_file(
        tmp_path / "new" / "folder" / f"{name('a')}.safetensors"
    )  # as any other program sees it
    assert same_bits(stored["features"], odd)


def test_without_a_folder_only_memory_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = PromptCache()
    cache.put(name("a"), entry())
    assert cache.get(name("a")) is not None and files(tmp_path) == set()


def test_the_least_recently_used_leaves_memory() -> None:
    cache = PromptCache(memory_limit=2 * features().nbytes)
    for text in "ab":
        cache.put(name(text), entry())
    assert cache.get(name("a"))
    cache.put(name("c"), entry())
    assert [text for text in "abc" if cache.get(name(text))] == ["a", "c"]


def test_an_entry_larger_than_memory_is_not_kept_and_the_others_are_not_lost_on_disk(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, memory_limit=features().nbytes)
    cache.put(name("long"), entry(length=50))
    assert cache.get(name("long")) and not PromptCache(memory_limit=1).get(name("long"))


def test_the_least_recently_used_leaves_the_disk(tmp_path: Path) -> None:
    probe = PromptCache(tmp_path / "probe")
    probe.put(name("a"), entry())
    size = next((tmp_path / "probe").iterdir()).stat().st_size
    cache = PromptCache(tmp_path / "x", limit_bytes=2 * size + size // 2, memory_limit=0)
    for age, text in ((300, "a"), (200, "b")):
        cache.put(name(text), entry())
        os.utime(tmp_path / "x" / f"{name(text)}.safetensors", (1e9 - age, 1e9 - age))
    assert cache.get(name("a"))  # used now, so b is the oldest
    (tmp_path / "x" / "notes.txt").write_text("not ours" * size)
    cache.put(name("c"), entry())
    assert files(tmp_path / "x") == {f"{name('a')}.safetensors", f"{name('c')}.safetensors", "notes.txt"}
    cache.put(name("huge"), entry(length=10_000))  # larger than the limit: not written, nothing lost for it
    assert len(files(tmp_path / "x")) == 3


def test_what_a_killed_process_left_behind_leaves_as_the_oldest(tmp_path: Path) -> None:
    rest = tmp_path / f"{name('b')}.abc.tmp"
    rest.write_bytes(b"x" * 1000)
    os.utime(rest, (1, 1))
    PromptCache(tmp_path, limit_bytes=1000).put(name("a"), entry())
    assert files(tmp_path) == {f"{name('a')}.safetensors"}


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: b"",
        lambda data: data[:4],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"\xff" * len(data),
        lambda data: flip(data, len(data) - 1),
        lambda data: flip(data, len(data) - 50),
        lambda data: flip(data, 30),
        lambda data: data.replace(b"BF16", b"F16 "),
        lambda data: data.replace(b"features", b"failures"),
    ],
)
def test_a_damaged_entry_is_deleted_and_reported(
    tmp_path: Path, harm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    PromptCache(tmp_path).put(name("a"), entry())
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(harm(whole))
    cache = PromptCache(tmp_path)
    assert cache.get(name("a")) is None
    assert files(tmp_path) == set()
    assert "damaged" in caplog.text and file.name in caplog.text
    cache.put(name("a"), entry())
    assert file.read_bytes() == whole


def test_an_entry_under_the_name_of_another_is_damage(tmp_path: Path) -> None:
    PromptCache(tmp_path).put(name("a"), entry())
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / f"{name('b')}.safetensors")
    assert PromptCache(tmp_path).get(name("b")) is None


def test_a_folder_that_cannot_be_written_costs_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the folder's place")
    cache = PromptCache(tmp_path / "file")
    for text in "abc":
        cache.put(name(text), entry())
        assert cache.get(name(text))
    assert caplog.text.count("cannot be kept") == 1


def test_a_full_disk_costs_one_line_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    cache = PromptCache(tmp_path)
    for text in "ab":
        cache.put(name(text), entry())
    assert caplog.text.count("No space left") == 1 and files(tmp_path) == set()


WRITER = """
import sys, torch
from pathlib import Path
from models.z_image.text_encoder.prompt_cache import Encoded, PromptCache
cache = PromptCache(Path(sys.argv[1]), memory_limit=0)
for _ in range(100):
    cache.put(sys.argv[2], Encoded(torch.arange(20_000.0).view(-1, 8), 0))
    assert cache.get(sys.argv[2]) is not None
"""


def test_two_processes_write_the_same_entry(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path), name("a")]
    writers = [subprocess.Popen(command, cwd=mini.ROOT, stderr=subprocess.PIPE) for _ in range(2)]
    reader = PromptCache(tmp_path, memory_limit=0)
    while any(writer.poll() is None for writer in writers):
        found = reader.get(name("a"))
        assert found is None or torch.equal(found.features, torch.arange(20_000.0).view(-1, 8))
        time.sleep(0.005)
    assert [(writer.returncode, writer.stderr.read()) for writer in writers] == [(0, b"")] * 2  # no warnings
    assert files(tmp_path) == {f"{name('a')}.safetensors"}


def test_every_part_of_the_key_counts() -> None:
    common = ("encoder", "template", "a star", 512)
    others = [
        ("another", *common[1:]),
        ("encoder", "template 2", *common[2:]),
        (*common[:2], "a Star", 512),
        (*common[:3], 256),
        ("encodertemplate", "", "a star", 512),  # the parts are not simply joined
        (*common[:2], "\u00e9", 512),
        (*common[:2], "e\u0301", 512),
        (*common[:2], "🟥 红 \ud800 \x00", 512),
    ]
    keys = [key(*common), *(key(*other) for other in others)]
    assert len(set(keys)) == len(keys) and all(len(k) == 64 for k in keys)
    assert key(*common) == keys[0]


SIZE = 20 << 20


def large(path: Path, change: dict[int, bytes] | None = None, size: int = SIZE) -> Path:
    """A file in the shape of safetensors above the size that is read whole: 1000 bytes of header, zeros."""
    with path.open("wb") as file:
        file.write((1000).to_bytes(8, "little") + b"h" * 1000)
        file.truncate(size)
        for at, data in (change or {}).items():
            file.seek(at)
            file.write(data)
    return path


def test_fingerprints_tell_files_apart_and_reading_takes_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = large(tmp_path / "a")
    variants = [
        large(tmp_path / "header", {500: b"x"}),
        large(tmp_path / "size", size=SIZE + 1),
        large(tmp_path / "first", {2000: b"x"}),
        large(tmp_path / "last", {SIZE - 1: b"x"}),
        large(tmp_path / "middle", {32 * (SIZE - (64 << 10)) // 63 + 5: b"x"}),
    ]
    small = tmp_path / "small"
    small.write_bytes(b"x" * 1000)
    prints = [fingerprint([path]) for path in (plain, *variants, small)]
    prints += [fingerprint([plain, small]), fingerprint([small, plain]), fingerprint([plain], ["bfloat16"])]
    small.write_bytes(b"x" * 999 + b"y")
    prints.append(fingerprint([small]))
    assert len(set(prints)) == len(prints)
    assert fingerprint([large(tmp_path / "copy")]) == prints[0]

    amounts = []

    class Counting(io.FileIO):
        def read(self, size: int = -1, /) -> bytes:
            data = super().read(size)
            amounts.append(len(data))
            return data

    huge = large(tmp_path / "huge", size=8 << 30)  # sparse
    monkeypatch.setattr(Path, "open", lambda self, mode: Counting(self, mode))
    fingerprint([huge])
    assert sum(amounts) <= 64 * (64 << 10) + 1008


# --- with the Mini model -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the Mini's text encoder."""
    return Path(shutil.copytree(mini.ROOT / "models/z_image/mini/text_encoder", tmp_path / "encoder"))


def load(folder: Path, cache: Path | None, **how: Any) -> Any:
    definition = mini.model_def("z_image_mini_base") | {"text_encoder_folder": str(folder)}
    _, pipe = family_handler.load_model(
        definition["URLs"][0],
        definition["architecture"],
        definition,
        text_encoder_filename=folder / "model.safetensors",
        prompt_cache=cache,
        **({"device": "cpu"} | how),
    )
    return pipe


def picture(pipe: Any, prompt: str = PROMPT) -> np.ndarray:
    how = dict(height=128, width=128, num_inference_steps=2, guidance_scale=2.5)
    output = pipe(prompt, generator=torch.Generator().manual_seed(3), **how)
    return np.asarray(output.images[0])


def test_a_known_prompt_needs_no_encoder_and_gives_the_same_pixels(folder: Path, tmp_path: Path) -> None:
    without = picture(load(folder, None))
    first = load(folder, tmp_path / "prompts")
    assert not first.text_encoder_loaded
    assert np.array_equal(picture(first), without)  # a miss
    assert first.text_encoder_loaded
    assert not any(weight.is_inference() for weight in first.text_encoder.parameters())  # these cannot move
    assert np.array_equal(picture(first), without)  # from memory

    again = load(folder, tmp_path / "prompts")  # as after a restart
    (folder / "model.safetensors").unlink()
    assert np.array_equal(picture(again), without)
    assert not again.text_encoder_loaded
    with pytest.raises(UserError, match="model.safetensors"):
        picture(again, "a prompt that is not known")


def test_damage_on_the_disk_costs_nothing_but_time(folder: Path, tmp_path: Path) -> None:
    expected = picture(load(folder, tmp_path / "prompts"))
    for file in (tmp_path / "prompts").iterdir():
        file.write_bytes(file.read_bytes()[:-7])
    assert np.array_equal(picture(load(folder, tmp_path / "prompts")), expected)


def test_the_parts_load_the_encoder_when_asked_for(folder: Path) -> None:
    pipe = load(folder, None)
    assert set(pipe) == {"transformer", "text_encoder", "vae"} and len(pipe) == 3
    assert not pipe.text_encoder_loaded
    assert pipe["text_encoder"] is pipe.text_encoder and pipe.text_encoder_loaded
    with pytest.raises(KeyError):
        pipe["tokenizer"]


def test_a_damaged_encoder_is_named_when_the_model_loads(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="model.safetensors"):
        load(folder, None)


def test_the_note_about_dropped_tokens_is_there_on_a_hit(folder: Path, tmp_path: Path) -> None:
    how = dict(height=128, width=128, num_inference_steps=1, output_type="latent")
    pipes = [load(folder, tmp_path / "prompts")] * 2 + [load(folder, tmp_path / "prompts")]
    notes = [pipe("red " * 900, **how).notes for pipe in pipes]
    assert notes[0] == notes[1] == notes[2] and "tokens longer than the 512" in notes[0][-1]
    assert not pipes[-1].text_encoder_loaded


def identity(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
    return text_encoding.identity([folder / "model.safetensors"], folder, dtype, torch.device(device))


def test_other_weights_types_tokenizers_and_configurations_are_other_encoders(folder: Path) -> None:
    seen = [identity(folder), identity(folder, torch.bfloat16), identity(folder, device="meta")]
    weights = load_file(folder / "model.safetensors")
    first = next(iter(weights))
    changes: list[dict[str, Tensor]] = [
        {first: weights[first] + 1e-3},
        {first: weights[first].to(torch.bfloat16)},
    ]
    for change in changes:
        save_file(weights | change, folder / "model.safetensors")
        seen.append(identity(folder))
    for file in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / file).write_text((folder / file).read_text("utf-8") + " ", "utf-8")
        seen.append(identity(folder))
    assert len(set(seen)) == len(seen)
    assert identity(folder) == seen[-1]


def test_another_encoder_template_or_length_is_encoded_anew(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "prompts"
    picture(load(folder, cache))
    count = len(files(cache))
    pipe = load(folder, cache, dtype=torch.bfloat16)
    picture(pipe)
    assert pipe.text_encoder_loaded and len(files(cache)) == 2 * count
    other_template = load(folder, cache)
    other_template.tokenizer.chat_template += "{{ '!' }}"
    picture(other_template)
    assert other_template.text_encoder_loaded and len(files(cache)) == 3 * count
    shorter = load(folder, cache)
    shorter(PROMPT, height=128, width=128, num_inference_steps=1, max_sequence_length=8)
    assert shorter.text_encoder_loaded


@pytest.mark.parametrize(
    "prompt", ["一只红色的圆", "🟥 🔵 heart", "naïve \u202e text \x00", "<|im_end|> a star", ""]
)
def test_any_text_is_kept(tmp_path: Path, prompt: str) -> None:
    _, pipe = mini.load()
    encoded = text_encoding.encode(pipe.text_encoder, pipe.tokenizer, prompt, pipe.device)
    PromptCache(tmp_path).put(name(prompt), encoded)
    found = PromptCache(tmp_path).get(name(prompt))
    assert found is not None and same_bits(found.features, encoded.features)


def test_nothing_is_logged_when_all_is_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, prompt_cache.log.name)
    cache = PromptCache(tmp_path)
    cache.get(name("a"))
    cache.put(name("a"), entry())
    assert caplog.text == ""
