"""Whatever a file, a program or a user sends: a result that holds later, or sentences; never a traceback.

Hypothesis makes the inputs, always the same ones. What is accepted is used at once: a header's tensors are
read, a prompt is expanded, settings are queued as jobs and read back.
"""

from __future__ import annotations

import io
import json
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from models.z_image.checkpoints import weight_names as model_files
from models.z_image.checkpoints.lora_names import model_names
from shared.engine.configuration import EngineConfig, queue_of
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.imaging import metadata
from shared.imaging.foreign import reader
from shared.library.catalog import Catalog
from shared.library.translation import translated
from shared.loras.inspection import inspect
from shared.loras.reader import read
from shared.server.errors import ApiError
from shared.server.jobs import submit_all
from shared.server.limits import is_shallow, is_text
from shared.settings.table import SETTINGS, SettingsError
from shared.settings.wan2gp import WAN2GP_SETTINGS
from shared.weights import files, formats
from tests.support.browser import ROOT
from tests.support.lora_writers import CONFIG, DIM
from tests.support.safetensors_library import library_opens

pytestmark = pytest.mark.slow
NAMES = model_names(CONFIG)
MINI, UNIFIED = "z_image_mini", "z_image_mini_twinflow"
MAX_SENTENCE, MAX_SECONDS = 300, 1.0  # of the processor, so that a busy computer changes nothing


def fuzz(examples: int) -> Callable[[Any], Any]:
    """The same inputs at every run."""
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@contextmanager
def soon() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < MAX_SECONDS


class Known:
    """The catalog, without its long form in reports of failures."""

    def __init__(self, models: Catalog) -> None:
        self.models = models


@pytest.fixture(scope="module")
def known(models: Catalog) -> Known:
    return Known(models)


def is_sentence(text: str) -> bool:
    return bool(text) and text.isprintable() and len(text) <= MAX_SENTENCE


def assert_sentences(error: UserError | ApiError) -> None:
    told = list(getattr(error, "problems", ())) or [str(error)]
    assert all(map(is_sentence, told)), told


# ---------------------------------------------------------------- what inputs are made of

ODD_TEXTS = [
    "", " ", "\n", "\x00", "\x1b[2J", "\ud800", "\u202e", "\u2028", "é", "𝔘", "x" * 400, "None", "nan", "-1",
    "1e400",
    "../../etc/passwd", "{", "}", "[]", "__", "\\", '"', "%s", "<b>", "9" * 30,
]  # fmt: skip
TEXTS = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=30))
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.integers(),
    st.floats(),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, -(2**63), 10**400]),
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def pieces(*given: str, most: int = 12) -> st.SearchStrategy[str]:
    """Texts put together from these, with odd ones between."""
    one = st.one_of(st.sampled_from(given), st.sampled_from(given), TEXTS)
    return st.lists(one, max_size=most).map("".join)


# ---------------------------------------------------------------- headers of safetensors files

PREFIXES = [
    "",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lycoris_",
    "base_model.model.",
    "lora_te_",
    "model.",
]
MODULES = [
    "layers.0.attention.to_q", "layers_0_attention_to_q", "layers.1.feed_forward.w2",
    "layers.0.attention.qkv",
    "layers.0.attention.norm_q", "all_final_layer.2-1.linear", "double_blocks.0.img_attn.qkv", "x_pad_token",
]  # fmt: skip
FACTORS = [
    ".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale",
    ".hada_w1_a",
    ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".lokr_w1", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b",
    ".oft_R.weight",
    ".oft_R.scaled_oft", ".oft_blocks", ".boft_R", ".boft_s", ".rescale", ".diff", ".diff_b", ".w_norm",
    ".set_weight",
    ".lora_A.default.weight", ".magnitude", ".weight", ".weight._data", ".weight_scale", ".qweight",
]  # fmt: skip
SIZES = [0, 1, 2, 3, 4, 8, 12, 28, 32, 64, DIM, 256, 3 * DIM]
DTYPES = [
    "F32",
    "BF16",
    "F16",
    "F64",
    "U8",
    "I8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "U16",
    "C64",
    "F4",
    "X1",
]
KEYS = st.builds("".join, st.tuples(*map(st.sampled_from, (PREFIXES, MODULES, FACTORS)))) | TEXTS
SHAPES = st.lists(st.sampled_from(SIZES), max_size=4)
MAX_DATA = 1 << 20


@st.composite
def packed(draw: st.DrawFn) -> bytes:
    """A file whose tensors lie as they should, of any names, shapes and dtypes."""
    header: dict[str, Any] = {}
    end = 0
    for key in draw(st.lists(KEYS, max_size=8, unique=True)):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(SHAPES)
        size = files.DTYPE_BITS.get(dtype, 8)
        for side in shape:
            size *= side
        if size // 8 <= MAX_DATA:
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + size // 8]}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(TEXTS, TEXTS, max_size=3))
    return _file(json.dumps(header).encode(), bytes([draw(st.sampled_from([0, 0, 60, 255]))]) * end)


PAIRS = [
    (".lora_A.weight", (4, DIM), ".lora_B.weight", (DIM, 4)), (".lora_down.weight", (2, DIM),
     ".lora_up.weight", (DIM, 2)),
    (".lokr_w1", (4, 2), ".lokr_w2", (24, 48)), (".boft_R", (2, 12, 8, 8), ".boft_s", (DIM, 1)),
    (".oft_blocks", (12, 8, 8), ".rescale", (DIM, 1)), (".oft_blocks", (2, 12, 8, 8), ".rescale", (DIM, 1)),
    (".oft_R.weight", (12, 28), ".oft_R.scaled_oft", ()), (".diff", (DIM, DIM), ".diff_b", (DIM,)),
]  # fmt: skip


@st.composite
def nearly_right(draw: st.DrawFn) -> bytes:
    """A usable adapter, with one thing changed or nothing."""
    first, shape, second, other = draw(st.sampled_from(PAIRS))
    stem = draw(st.sampled_from(PREFIXES)) + draw(st.sampled_from(MODULES))
    tensors = {stem + first: list(shape), stem + second: list(other)}
    if draw(st.booleans()):
        tensors[draw(st.sampled_from([stem + one for one in FACTORS]) | KEYS)] = draw(SHAPES)
    if draw(st.booleans()):
        tensors[draw(st.sampled_from(sorted(tensors)))] = draw(SHAPES)
    header, end = {}, 0
    dtype = draw(st.sampled_from(["F32", "F32", "BF16", "F16", "F64", "F8_E4M3", "F8_E5M2", "I8"]))
    for key, sizes in tensors.items():
        size = files.DTYPE_BITS[dtype] // 8
        for side in sizes:
            size *= side
        if size > MAX_DATA:
            return b""
        header[key] = {"dtype": dtype, "shape": sizes, "data_offsets": [end, end := end + size]}
    return _file(json.dumps(header).encode(), bytes([draw(st.sampled_from([0, 1, 61, 255]))]) * end)


def _file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


ENTRIES = st.fixed_dictionaries({}, optional={"dtype": JSON, "shape": JSON, "data_offsets": JSON, "x": JSON})
TABLES = st.dictionaries(KEYS | st.just("__metadata__"), ENTRIES | JSON, max_size=5)
HEADERS = st.one_of(
    packed(),
    nearly_right(),
    st.builds(
        lambda table, data: _file(json.dumps(table).encode(), data), TABLES | JSON, st.binary(max_size=9)
    ),
    st.builds(_file, st.binary(max_size=60), st.binary(max_size=9)),
    st.binary(max_size=40),
)


@fuzz(1500)
@given(content=HEADERS, config=st.none() | st.none() | JSON)
def test_a_header_is_refused_in_a_sentence_or_read(content: bytes, config: Any, fuzz_folder: Path) -> None:
    path, beside = fuzz_folder / "adapter_model.safetensors", fuzz_folder / "adapter_config.json"
    path.write_bytes(content)
    beside.unlink(missing_ok=True)
    if config is not None:
        beside.write_text(json.dumps(config))
    with soon():
        verdict = inspect(path, NAMES)
    assert is_sentence(verdict.sentence) or verdict.usable
    if verdict.usable:
        assert library_opens(path)
        try:
            assert read(path, NAMES).adapters
        except UserError as error:  # what the header cannot tell
            assert "values that are not numbers" in str(error)
    for look in (lambda: files.read_header(path), lambda: formats.inspect([path], model_files.TRANSFORMER)):
        try:
            with soon():
                look()
        except UserError as error:
            assert str(error).isprintable()
        else:
            assert library_opens(path)


# ---------------------------------------------------------------- settings, and bodies of requests

KNOWN = sorted({*SETTINGS, *WAN2GP_SETTINGS})
VALUES = st.one_of(
    JSON,
    st.sampled_from(["1024x1024", "64x64", "auto", "png", "euler", "unified", "FG", "PG", "z_image_mini_base",
    "1,1,1", "SDE",
                     "a=1, b=2", "1 0.5", "0.5,1;2", "balanced", 0, 1, 2, 8, 0.5, True, False]),
    st.lists(TEXTS, max_size=3),
)  # fmt: skip
SETTINGS_LIKE = st.builds(
    lambda prompt, model, more: {**prompt, **model, **more},
    st.fixed_dictionaries({}, optional={"prompt": st.just("a red circle") | TEXTS}),
    st.fixed_dictionaries(
        {}, optional={"model_type": st.sampled_from([MINI, UNIFIED, "z_image_mini_base", "z_image"])}
    ),
    st.dictionaries(st.sampled_from(KNOWN) | TEXTS, VALUES, max_size=4),
)


@fuzz(800)
@given(values=SETTINGS_LIKE | JSON)
def test_settings_are_refused_in_sentences_or_stay_valid(values: Any, known: Known) -> None:
    try:
        with soon():
            found = known.models.validate_all(values)
    except SettingsError as error:
        assert_sentences(error)
        return
    for one in found:
        assert all(map(is_sentence, (*one.notes, *one.ignored.values()))), (one.notes, one.ignored)
        assert_stays(known, one.settings)


def assert_stays(known: Known, accepted: dict[str, Any]) -> None:
    """Settings of a job are what comes out of the queue's JSON, and valid as they are."""
    kept = json.loads(json.dumps(accepted).encode())
    assert kept == accepted
    assert known.models.validate(kept).settings == accepted


@pytest.fixture(scope="module")
def engine(models: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """One that takes jobs and has no worker."""
    outputs = tmp_path_factory.mktemp("outputs")
    return Engine(EngineConfig.at(ROOT, output_dir=outputs, database=queue_of(outputs), warm=False))


@pytest.mark.parametrize("name", [*SETTINGS, "grid", "unified_sampler_config", "-"])
def test_every_setting_meets_every_odd_text(name: str, engine: Engine) -> None:
    """As a value, in a list, and as a name and a value of an object."""
    for text in ODD_TEXTS:
        for value, model in ((text, MINI), (text, UNIFIED), ([text], MINI), ({text: [text]}, UNIFIED)):
            values = {"prompt": "a red circle", "model_type": model, name: value}
            request(json.dumps(values).encode(), engine)


BODIES = st.one_of(
    (SETTINGS_LIKE | st.lists(SETTINGS_LIKE, max_size=3) | JSON).map(
        lambda value: json.dumps(value).encode()
    ),
    pieces("{", "}", "[", "]", '"prompt"', ":", '"a"', ",", "1", "NaN", "null", "{}").map(
        lambda text: text.encode("utf-8", "surrogatepass")
    ),
    st.binary(max_size=30),
)


@fuzz(200)
@given(body=BODIES)
def test_a_request_is_refused_in_sentences_or_its_jobs_are_kept(body: bytes, engine: Engine) -> None:
    request(body, engine)


def request(body: bytes, engine: Engine) -> None:
    """The body of a POST to /api/v1/jobs, and what comes of it."""
    if not (is_shallow(body) and is_text(body)):
        return
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return
    try:
        with soon():
            jobs = submit_all(engine, engine.config.inputs, values if isinstance(values, list) else [values])
    except ApiError as refused:
        assert refused.status < 500
        told = list(refused.problems) or [str(refused)]
        assert all(one.isprintable() and len(one) <= MAX_SENTENCE + 20 for one in told), told
        return
    for job_id, validated in jobs:
        assert engine.store.job(job_id).settings == validated.settings
        engine.cancel(job_id)


# ---------------------------------------------------------------- prompts

PROMPTS = pieces(
    "{", "}", "|", "$$", "2$$", "1-2$$ and $$", "3::", "${a", "${a}", "=", "=!", ":", "__mini/shapes__",
    "__mini/*__", "__*__",
    "__", "__nothing__", "\\", "#", "!", '! {A}="x","y" : {B}="z"', "{A}", "\n", "\n\n",
    "<lora:mini/sticker:0.5>",
    "<lora:nothing>", "<lora:", ">", "(a:1.2)", "[a|b]", "[a:b:0.5]", " AND ", " BREAK ", '{"a": "b|c"}',
    "[1, 2]", "a red",
    most=16,
)  # fmt: skip


@fuzz(1200)
@given(
    prompt=PROMPTS,
    negative=st.just("") | PROMPTS,
    mode=st.sampled_from(["FG", "G", "PG"]),
    images=st.sampled_from([1, 1, 3]),
    seed=st.sampled_from([-1, 0, 7]),
)
def test_a_prompt_is_refused_in_a_sentence_or_painted_as_it_stands(
    prompt: str, negative: str, mode: str, images: int, seed: int, known: Known
) -> None:
    values = {
        "model_type": "z_image_mini_base", "prompt": prompt, "negative_prompt": negative, "seed": seed,
        "multi_prompts_gen_type": mode, "batch_size": images, "num_inference_steps": 2,
    }  # fmt: skip
    try:
        with soon():
            found = known.models.validate_all(values)
    except SettingsError as error:
        assert_sentences(error)
        return
    assert found
    for one in found:
        assert one.settings["prompt"].strip() and all(map(is_sentence, one.notes)), one.notes
        assert_stays(known, one.settings)
        if seed >= 0:
            again = known.models.validate_all(one.settings)
            assert [job.settings for job in again] == [one.settings]


# ---------------------------------------------------------------- pictures of other programs

NODE_KINDS = [
    "KSampler", "KSamplerAdvanced", "CLIPTextEncode", "EmptySD3LatentImage", "UNETLoader", "LoraLoader",
    "LoraLoaderModelOnly", "ModelSamplingAuraFlow", "SamplerCustomAdvanced", "BasicGuider", "BasicScheduler",
    "CFGGuider",
    "PrimitiveInt", "PrimitiveNode", "StringConcatenate", "StringReplace", "ImpactWildcardProcessor",
    "Reroute", "Anything",
]  # fmt: skip
INPUTS = [
    "positive", "negative", "model", "latent_image", "seed", "noise_seed", "steps", "cfg", "text", "width",
    "height", "shift",
    "lora_name", "strength_model", "unet_name", "clip", "string_a", "string_b", "delimiter", "value",
    "sigmas", "guider",
]  # fmt: skip
LINKS = st.tuples(st.sampled_from("1234"), st.integers(-1, 2)).map(list)
NODES = st.fixed_dictionaries(
    {"class_type": st.sampled_from(NODE_KINDS) | JSON},
    optional={"inputs": st.dictionaries(st.sampled_from(INPUTS), LINKS | JSON, max_size=6) | JSON},
)
API_GRAPHS = st.dictionaries(st.sampled_from("1234"), NODES, min_size=1)
EDITOR_NODES = st.fixed_dictionaries(
    {"id": st.integers(1, 4), "type": st.sampled_from(NODE_KINDS)},
    optional={
        "mode": JSON,
        "widgets_values": st.lists(JSON, max_size=7) | JSON,
        "inputs": st.lists(
            st.fixed_dictionaries({"name": st.sampled_from(INPUTS), "link": st.integers(0, 5)})
        )
        | JSON,
        "outputs": JSON,
    },
)
EDITOR_GRAPHS = st.fixed_dictionaries(
    {"nodes": st.lists(EDITOR_NODES, max_size=4) | JSON},
    optional={"links": st.lists(st.lists(st.integers(-20, 5), min_size=5, max_size=6), max_size=5) | JSON,
              "definitions": JSON},
)  # fmt: skip
INFOTEXT = pieces(
    "a red circle", "\nNegative prompt: ", "\nSteps: 20, ", "Sampler: Euler, ", "CFG scale: 7.5, ",
    "Seed: 1, ",
    "Size: 832x1216, ", "Size: 0x0", "Shift: 3, ", 'Lora hashes: "a: b"', "Model: x, ", "Version: neo",
    "<lora:a:1>", ": ", ", ",
)  # fmt: skip
GRAPHS = (API_GRAPHS | EDITOR_GRAPHS).map(json.dumps)
CONTENT = st.one_of(INFOTEXT, GRAPHS, GRAPHS, SETTINGS_LIKE.map(json.dumps), JSON.map(json.dumps), TEXTS)
CHUNKS = st.sampled_from(
    ["parameters", "prompt", "workflow", "comment", "invokeai_metadata", "sui_image_params", "Comment",
    "UserComment",
     "fooocus_scheme", "generation_data"]
)  # fmt: skip


@fuzz(900)
@given(texts=st.dictionaries(CHUNKS, CONTENT, min_size=1, max_size=3))
def test_the_texts_of_a_picture_become_settings_or_nothing(texts: dict[str, str], known: Known) -> None:
    with soon():
        found = reader.from_texts(texts)
    if found is not None:
        assert_translated(found, known)


def assert_translated(found: reader.Foreign, known: Known) -> None:
    usable, lines = translated(found, known.models, MINI)
    assert all(map(is_sentence, lines)), lines
    try:
        jobs = known.models.validate_all(usable)
    except SettingsError as error:  # its prompt is empty, or meant for another syntax
        assert_sentences(error)
        return
    for one in jobs:
        assert_stays(known, one.settings)


@fuzz(250)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP"]),
    text=CONTENT,
    raw=st.none() | st.binary(max_size=40),
    damage=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), max_size=3),
)
def test_a_picture_is_refused_in_a_sentence_or_read(
    kind: str,
    text: str,
    raw: bytes | None,
    damage: list[tuple[float, bytes]],
    fuzz_folder: Path,
    known: Known,
) -> None:
    path = fuzz_folder / f"a.{kind.lower()}"
    path.write_bytes(damaged(picture(kind, text, raw), damage))
    try:
        with soon():
            ours, found = metadata.read(path), reader.read(path)
    except UserError as error:
        assert is_sentence(str(error))
        return
    if found is not None:
        assert_translated(found, known)
    if ours is not None:
        try:
            known.models.validate_all(metadata.settings_from(ours))
        except SettingsError as error:
            assert_sentences(error)


def picture(kind: str, text: str, raw: bytes | None) -> bytes:
    """A picture with a text where its kind has one: chunks, EXIF, a JPEG's comment."""
    out, more = io.BytesIO(), {}
    safe = text.encode("utf-8", "replace").decode().replace("\0", "")
    if kind == "PNG":
        more["pnginfo"] = PngInfo()
        more["pnginfo"].add_text("parameters", safe)
        more["pnginfo"].add_text("prompt", safe, zip=raw is not None)
    else:
        tags = Image.Exif()
        tags.get_ifd(0x8769)[0x9286] = raw if raw is not None else b"ASCII\0\0\0" + safe.encode()
        more["exif"] = tags
    if kind == "JPEG":
        more["comment"] = safe.encode()[:60_000]
    Image.new("RGB", (8, 8)).save(out, kind, **more)
    return out.getvalue()


def damaged(content: bytes, damage: list[tuple[float, bytes]]) -> bytes:
    for place, piece in damage:
        at = int(place * (len(content) - 1))
        content = content[:at] + piece + content[at + len(piece) :]
    return content


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")
