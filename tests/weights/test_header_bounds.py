"""Headers made to cost time, and header text made to harm whoever shows it: refused cheaply, shown cleaned.

The verdict on any header is compared with the safetensors library's own: what it refuses, we refuse, with a
reason in one sentence.
"""

import json
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from models.z_image.checkpoints import weight_names as model_files
from models.z_image.checkpoints.lora_names import model_names
from shared.errors import UserError
from shared.loras import parser
from shared.loras.inspection import inspect
from shared.loras.reader import read
from shared.settings.messages import printable
from shared.weights import files, formats
from tests.support.lora_writers import CONFIG, DIM
from tests.support.safetensors_library import library_opens

NAMES = model_names(CONFIG)
Q = "diffusion_model.layers.0.attention.to_q"
GOOD = save({f"{Q}.lora_A.weight": torch.ones(2, DIM), f"{Q}.lora_B.weight": torch.ones(DIM, 2)}, {"a": "b"})
OPERATIONS = 200_000  # lines of Python and calls for one file: some milliseconds


def write(path: Path, header: object, data: int = 0) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def entry(begin: int = 0, end: int = 0, shape: Any = (0,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def operations(work: Callable[[], object]) -> int:
    """Lines of Python run and calls made (C functions too) while `work` runs."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += 1

    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.settrace(None)
        sys.setprofile(None)
    return count


COSTLY = {
    "300,000 dimensions": ({"a": entry(shape=[2**62] * 300_000)}, "numbers than tensors need"),
    "1,000 dimensions": ({"a": entry(shape=[2**62] * 1000)}, "numbers than tensors need"),
    "17 dimensions": ({"a": entry(0, 4, [1] * 17)}, "gives .* 17 dimensions, at most 16"),
    "200,000 dots": ({f"{Q}{'.' * 200_000}lora_A.weight": entry()}, "a name of 200,052 characters"),
    "100,000 prefixes": ({f"{'transformer.' * 100_000}a.lora_A.weight": entry()}, "a name of 1,200,015"),
    "100,000 tensors": ({f"layers.{i}.lora_A.weight": entry() for i in range(100_000)}, "20,000 tensors"),
    "a million lists": (b'{"a":' + b"[]," * 1_000_000 + b"[]}", "numbers than tensors need"),
    "nesting": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, "nested too deeply"),
    "nested lists": ({"a": entry(shape=[[[[1]]]])}, "nested too deeply"),
    "never closed": (b'{"a":[', "nested too deeply, or not closed"),
    "thousands of digits": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 900 + b'],"data_offsets":[0,4]}}',
                            "a number that no file needs"),
    "a long header": (b'{"__metadata__":{"a":"' + b"x" * (20 << 20) + b'"}}', "at most 16,777,216 are read"),
}  # fmt: skip


@pytest.mark.parametrize("case", COSTLY)
def test_a_header_made_to_cost_time_is_refused_before_it_does(case: str, tmp_path: Path) -> None:
    header, words = COSTLY[case]
    path = write(tmp_path / "a.safetensors", header)
    found = []
    assert operations(lambda: found.append(inspect(path, NAMES).refused)) < OPERATIONS
    (sentence,) = found
    with pytest.raises(UserError, match=words):
        files.read_header(path)
    assert sentence and len(sentence) <= 300 and sentence.endswith(".") and sentence.isprintable()


def test_a_lora_has_fewer_tensors_than_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parser, "MAX_KEYS", 2)
    path = write(tmp_path / "a.safetensors", {f"{Q}.{n}.lora_A.weight": entry() for n in range(3)})
    assert "is no LoRA: it has 3 tensors, at most 2 are read" in inspect(path, NAMES).sentence


def test_what_the_bounds_allow_costs_little_too(tmp_path: Path) -> None:
    """The longest names, all prefixes and dots: work grows with their number, and not faster."""
    for i, stem in enumerate(("transformer." * 18, "." * 220)):
        costs = []
        for count in (100, 200):
            header = {f"{stem}{n:05}.lora_A.weight": entry() for n in range(count)}
            path = write(tmp_path / f"{i}-{count}.safetensors", header)
            costs.append(operations(lambda path=path: inspect(path, NAMES)))
            with pytest.raises(UserError, match="is not a Z-Image transformer but a LoRA"):
                formats.inspect([path], model_files.TRANSFORMER)
        assert costs[1] < 2.2 * costs[0] and costs[0] < 100 * 1000


HARMFUL = {
    "escape": "a\x1b[2J\x1b]0;title\x07b",
    "line breaks": "a\nb\r\nc\u2028d",
    "right to left": "a\u202egpj.b\u2066c",
    "control": "a\x00\x08\x7f\x9bb",
    "long": "x" * 250,
}


@pytest.mark.parametrize("case", HARMFUL)
def test_names_and_metadata_of_a_file_are_shown_cleaned(case: str, tmp_path: Path) -> None:
    text = HARMFUL[case]
    tensors = {f"{Q}.lora_A.weight": torch.ones(2, DIM), f"{Q}.lora_B.weight": torch.ones(DIM, 2)}
    said = {"ss_base_model_version": text * 4000, "modelspec.trigger_phrase": f"{text * 4000}, ok"}
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(tensors | {text: torch.ones(1)}, said))
    verdict = inspect(path, NAMES)
    shown = [verdict.sentence, verdict.base_model, *verdict.trigger_words, *map(str, verdict.left_out)]
    assert verdict.usable and verdict.left_out and verdict.trigger_words[-1] == "ok"
    assert all(line.isprintable() and len(line) <= 300 for line in shown)
    for bad in ({text: torch.ones(1)}, {f"{text[:200]}.lora_A.weight": torch.ones(1)}):
        path.write_bytes(save(bad))
        sentence = inspect(path, NAMES).sentence
        assert sentence.isprintable() and len(sentence) <= 300 and sentence.endswith(".")
        with pytest.raises(UserError) as error:
            formats.inspect([path], model_files.TRANSFORMER)
        assert str(error.value).isprintable()


def test_a_files_own_name_is_shown_cleaned(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 150 + "\x1b[2J\u202e.safetensors")
    path.write_bytes(b"")
    sentence = inspect(path, NAMES).sentence
    assert sentence.isprintable() and len(sentence) <= 300


def test_printable_keeps_what_people_write() -> None:
    assert printable("風格 — ünïcode 🎨") == "風格 — ünïcode 🎨"
    assert printable("a\nb\ud800\u202e") == "a\\nb\\ud800\\u202e"
    assert printable("x" * 61) == "x" * 59 + "…" and len(printable("\u202e" * 50)) == 60


# ---------------------------------------------------------------- our verdict and the library's

E = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
LIBRARY_REFUSES = {
    "BOM": f'\ufeff{{"a":{E}}}',
    "surrogate in a name": f'{{"a\\ud800":{E}}}',
    "surrogate in metadata": f'{{"__metadata__":{{"a":"\\udc00"}},"a":{E}}}',
    "metadata of numbers": f'{{"__metadata__":{{"a":1}},"a":{E}}}',
    "metadata as a list": f'{{"__metadata__":[],"a":{E}}}',
    "metadata that is false": f'{{"__metadata__":false,"a":{E}}}',
    "metadata that is 0": f'{{"__metadata__":0,"a":{E}}}',
    "metadata twice": f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{E}}}',
    "field twice": f'{{"a":{E.replace("{", """{"dtype":"F32",""")}}}',
    "NaN": f'{{"a":{E.replace("[1]", "[NaN]")}}}',
    "NaN beside": f'{{"a":{E.replace("{", """{"x":NaN,""")}}}',
    "negative zero": f'{{"a":{E.replace("[0,", "[-0,")}}}',
    "fraction": f'{{"a":{E.replace("[1]", "[1.0]")}}}',
    "true": f'{{"a":{E.replace("[1]", "[true]")}}}',
    "overflow before a zero": f'{{"a":{E},"b":{{"dtype":"F32","shape":[{2**62},{2**62},0],'
                              '"data_offsets":[4,4]}}',
    "number of 65 bits": f'{{"a":{E},"b":{{"dtype":"F32","shape":[{2**64},0],"data_offsets":[4,4]}}}}',
    "three offsets": f'{{"a":{E.replace("4]", "4,4]")}}}',
    "offsets as text": f'{{"a":{E.replace("[0,4]", """ "04" """)}}}',
    "shape as text": f'{{"a":{E.replace("[1]", """ "" """)}}}',
    "unknown dtype": f'{{"a":{E.replace("F32", "F33")}}}',
    "UTF-16": f'{{"a":{E}}}'.encode("utf-16-le"),
    "half a UTF-8 character": f'{{"a":{E}}}'.encode().replace(b'"a"', b'"\xc3"'),
}  # fmt: skip


@pytest.mark.parametrize("case", LIBRARY_REFUSES)
def test_what_the_library_refuses_is_refused_here(case: str, tmp_path: Path) -> None:
    text = LIBRARY_REFUSES[case]
    raw = text if isinstance(text, bytes) else text.encode()
    path = write(tmp_path / "a.safetensors", raw, 4)
    assert not library_opens(path)
    with pytest.raises(UserError) as error:
        files.read_header(path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("first", b"<{\x80")
def test_a_headers_length_is_not_taken_for_the_beginning_of_another_kind(first: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", b"{}".ljust(first), 4)
    assert path.read_bytes()[0] == first
    assert "its header says" in inspect(path, NAMES).sentence


TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"-", b"0", b"1e9", b"NaN", b"null", b"true", b"\\ud800",
    b"\xff", b"\xef\xbb\xbf", b"\x1b", b"\n", b" ", b"F16", b"F4", b"U8", b'"a":1,', b'"__metadata__":{},',
    b'"__metadata__":{"a":"b"},', b'"dtype":"F32",', b"99999999999999999999", b"\\u202e", b".alpha",
]  # fmt: skip


def mutated(rng: random.Random) -> bytes:
    """A good LoRA file after one to three changes of its header, whose length is mostly set right again."""
    (size,) = struct.unpack("<Q", GOOD[:8])
    header, data = GOOD[8 : 8 + size].rstrip(), GOOD[8 + size :]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, length = rng.randrange(len(header)), rng.choice((0, 0, 1, 3, 12))
        kind = rng.randrange(5)
        if kind == 0:
            header = header[:at] + rng.choice(TOKENS) + header[at + length :]
        elif kind == 1:
            header = header[:at] + bytes([rng.randrange(256)]) + header[at + 1 :]
        elif kind == 2:  # a piece of it again somewhere else
            piece = header[at : at + rng.choice((1, 8, 60, 120))]
            at = rng.randrange(len(header))
            header = header[:at] + piece + header[at:]
        elif kind == 3:  # often harmless
            at = rng.choice([i for i, c in enumerate(header) if c in b"{}[]:,"])
            header = header[:at] + rng.choice((b" ", b"\n", b"\t ", b"\r", b"\f")) + header[at:]
        else:
            old = rng.choice([b"F32", b"[2,", b"96", b"lora_A", b"diffusion_model", b'"a"', b"0", b","])
            header = header.replace(old, rng.choice(TOKENS), 1)
    data = data[: len(data) - rng.choice((0, 0, 0, 0, 0, 0, 1, 4))]
    length = len(header) + rng.choice((0, 0, 0, 0, 0, 0, 0, 1, -1))
    return struct.pack("<Q", length) + header + data


def test_no_mutated_header_is_accepted_and_fails_later(tmp_path: Path) -> None:
    """2,000 headers: one sentence, or a file that the library opens and whose adapters are read."""
    rng, path = random.Random(13), tmp_path / "a.safetensors"
    opened = usable = 0
    for _ in range(2000):
        path.write_bytes(mutated(rng))
        verdict, opens = inspect(path, NAMES), library_opens(path)
        opened += opens
        if verdict.usable:
            assert opens and read(path, NAMES).adapters
            usable += 1
        else:
            assert verdict.sentence.isprintable() and len(verdict.sentence) <= 300
            with pytest.raises(UserError):
                read(path, NAMES)
        try:
            files.read_header(path)
        except UserError as error:
            assert str(error).isprintable()
        else:
            assert opens
    assert opened > 100 and usable > 20
