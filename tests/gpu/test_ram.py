"""What a model holds of the computer's memory: nothing twice, nothing unneeded, nothing after it has gone."""

from __future__ import annotations

import errno
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.z_image import loading as z_image_loading
from models.z_image.checkpoints import checkpoint_sizes, weight_names
from models.z_image.family import QWEN3_4B
from models.z_image.text_encoder import text_encoding
from models.z_image.transformer_z_image import ZImageTransformer2DModel
from shared.gpu import machine
from shared.gpu.offloading_stream import Segment
from shared.loras import apply
from shared.loras.adapters import Dora, LowRank
from shared.loras.inspection import Verdict
from shared.loras.reader import LoraFile
from shared.weights import formats, loading, quantized
from shared.weights.files import Folders
from shared.weights.formats import inspect
from shared.weights.loading import save_quantized
from shared.worker import failures
from shared.worker.model_manager import ModelHost, Silent
from tests.support import mini, packers
from tests.support.tiny_formats import FORMATS, tiny

LINUX = sys.platform == "linux"
CPU = torch.device("cpu")
ENCODER = mini.ROOT / "models/z_image/mini/text_encoder"
QUANTIZED = ("int8, map in the header", "fp8 scale_weight", "int4", "fp4, usual scales")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return packers.tiny_state()


# ---- quantized weights are packed into other memory --------------------------------------------------------


@pytest.mark.parametrize("form", QUANTIZED)
def test_no_buffer_of_a_quantized_model_is_a_view(
    form: str, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    model = tiny(FORMATS[form][1](tmp_path, state)[0])
    buffers = {name: x for name, x in model.named_buffers() if not name.endswith("code_pairs")}
    assert buffers and not [name for name, x in buffers.items() if x._base is not None]


def test_packing_lets_the_old_memory_go() -> None:
    array = np.arange(24 * 4, dtype=np.int8).reshape(24, 4)
    gone, rows = weakref.ref(array), torch.from_numpy(array)
    layers = [  # as a fused layer's rows become three layers
        quantized.make("int8", {"weight": rows[i : i + 8], "weight_scale": torch.ones(8, 1)})
        for i in (0, 8, 16)
    ]
    del array, rows
    segment = Segment([layer.weight for layer in layers])
    assert gone() is not None
    segment.pack(torch.empty(segment.nbytes, dtype=torch.uint8))
    assert gone() is None
    assert torch.equal(torch.cat([layer.weight for layer in layers]).flatten(), torch.arange(96).char())


@pytest.mark.skipif(not LINUX, reason="reads /proc")
@pytest.mark.parametrize("form", ["int8, map in the header", "bf16"])
def test_the_file_is_mapped_no_longer_once_its_weights_are_packed(
    form: str, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    (file,) = FORMATS[form][1](tmp_path, state)[0]
    model = tiny([file], None)
    segment = Segment([*model.parameters(), *model.buffers()])
    assert str(file) in Path("/proc/self/maps").read_text()
    segment.pack(torch.empty(segment.nbytes, dtype=torch.uint8))
    assert str(file) not in Path("/proc/self/maps").read_text()


# ---- freed memory goes back --------------------------------------------------------------------------------


@pytest.mark.skipif(not LINUX, reason="only glibc keeps what was freed")
def test_what_a_model_held_goes_back_to_the_system() -> None:
    """Many arrays below the mmap threshold, and one above them all that keeps the heap from shrinking."""
    held = [np.ones(60_000, np.uint8) for _ in range(4000)]
    top = held[-1]
    full = psutil.Process().memory_info().rss
    held.clear()
    ModelHost(Folders(mini.ROOT, mini.ROOT / "ckpts")).release()
    assert top.any() and full - psutil.Process().memory_info().rss > 100e6


# ---- the text encoder --------------------------------------------------------------------------------------


def test_asking_for_a_parts_name_does_not_load_it() -> None:
    definition = mini.model_def("z_image_mini")
    _, pipe = mini.family_handler.load_model(
        definition["URLs"][0], definition["architecture"], definition, device="cpu", prompt_cache=None
    )
    assert "text_encoder" in pipe and "control" not in pipe and 7 not in pipe
    assert not pipe.text_encoder_loaded


def test_a_job_with_a_known_prompt_never_loads_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the worker's way: the host plans, loads and places the model before each job."""
    monkeypatch.setattr(z_image_loading, "default_device", lambda: CPU)
    settings = {"prompt": "a red circle that was drawn before", "resolution": "64x64", "seed": 1}
    settings = host().info("z_image_mini").defaults | settings | {"num_inference_steps": 1}

    def draw() -> Any:
        model = host().get("z_image_mini", Silent(), settings)
        quiet: dict[str, Any] = dict(on_phase=lambda x: None, on_step=lambda *x: None)
        model.processor.generate(settings, seeds=[1], interrupt=lambda: False, **quiet)
        return model

    draw()
    assert draw().pipe.text_encoder_loaded is False


def host() -> ModelHost:
    folders = Folders(mini.ROOT, mini.ROOT / "ckpts")
    return ModelHost(folders, machine=lambda: machine.survey("cpu"))


def encoder(file: Path, dtype: torch.dtype) -> Any:
    return z_image_loading._text_encoder(ENCODER, [file], dtype)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_embedding_are_cast_and_not_the_table(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    tensors = encoder_state(ENCODER / "model.safetensors", stored)
    model = encoder(packers.write(tmp_path / "x.safetensors", tensors), dtype)
    assert model.embed_tokens.weight.dtype == stored
    tokenizer = mini.load()[1].tokenizer
    made = text_encoding.encode(model, tokenizer, "a red circle", CPU).features
    model.embed_tokens.weight = nn.Parameter(model.embed_tokens.weight.to(dtype), False)
    expected = text_encoding.encode(model, tokenizer, "a red circle", CPU).features
    assert made.dtype == dtype and torch.equal(made, expected)


def encoder_state(file: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) for name, x in load_file(file).items()}


# ---- 16-bit weights of large models ------------------------------------------------------------------------


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LARGE", 1)


def halves(model: nn.Module) -> list[str]:
    return [name for name, x in model.named_modules() if isinstance(x, quantized.HalfLinear)]


def step(model: ZImageTransformer2DModel) -> Tensor:
    g = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        prompt = model.prepare(torch.randn(5, 96, generator=g), 8, 8)
        return model([torch.randn(16, 8, 8, generator=g)], torch.tensor([0.3]), [prompt])[0]


@pytest.mark.parametrize(
    "form", ["bf16", "fp16", "ComfyUI bf16", "shards with index", "int4, refiners plain"]
)
def test_a_large_file_in_16_bits_draws_the_same_bits_from_half_the_memory(
    form: str, tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = FORMATS[form][1](tmp_path, state)[0]
    small = tiny(files)
    monkeypatch.setattr(formats, "LARGE", 1)
    large = tiny(files)
    assert not halves(small) and halves(large) and small.dtype == large.dtype == torch.float32
    assert torch.equal(step(small), step(large))
    size, halved = (sum(x.nbytes for x in (*m.parameters(), *m.buffers())) for m in (small, large))
    assert halved < (0.6 if "int4" not in form else 1.0) * size


def test_small_models_and_16_bit_computing_keep_their_plain_layers(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = FORMATS["bf16"][1](tmp_path, state)[0]
    assert not halves(tiny(files))
    monkeypatch.setattr(formats, "LARGE", 1)
    assert not halves(tiny(files, torch.bfloat16)) and not halves(tiny(files, None))
    assert not halves(tiny(FORMATS["fp32"][1](tmp_path, state)[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_text_encoder_gives_the_same_features(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = encoder_state(ENCODER / "model.safetensors", dtype)
    file = packers.write(tmp_path / "x.safetensors", tensors)
    tokenizer = mini.load()[1].tokenizer
    small = text_encoding.encode(encoder(file, torch.float32), tokenizer, "a red circle", CPU).features
    monkeypatch.setattr(formats, "LARGE", 1)
    model = encoder(file, torch.float32)
    assert len(halves(model)) == 2 * 7
    assert torch.equal(text_encoding.encode(model, tokenizer, "a red circle", CPU).features, small)


@pytest.mark.usefixtures("all_large")
def test_quantizing_a_large_model_gives_the_small_ones_bits(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = FORMATS["bf16"][1](tmp_path, state)[0]
    large = tiny(files)
    saved = [tmp_path / f"{name}.safetensors" for name in ("large", "small")]
    save_quantized(large, saved[0], weight_names.TRANSFORMER)
    loading.quantize(large, weight_names.TRANSFORMER)
    monkeypatch.setattr(formats, "LARGE", 1 << 60)
    small = tiny(files)
    save_quantized(small, saved[1], weight_names.TRANSFORMER)
    loading.quantize(small, weight_names.TRANSFORMER)
    assert torch.equal(step(large), step(small))
    one, other = (tiny([file]) for file in saved)
    assert torch.equal(step(one), step(other))
    assert inspect([saved[0]], weight_names.TRANSFORMER).label == "int8 (quanto)"


@pytest.mark.usefixtures("all_large")
def test_loras_on_a_large_model_are_those_of_a_small_one(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(3)
    plain = LowRank(torch.randn(4, 384, generator=g), torch.randn(384, 4, generator=g), 0.5)
    dora = Dora(plain, torch.rand(384, 1, generator=g) + 1, "out")
    changes = {"layers.0.attention.to_q": (plain,), "layers.1.attention.to_k": (dora,)}
    lora = [(LoraFile(tmp_path, Verdict(), changes, {}), 0.7)]
    files = FORMATS["bf16"][1](tmp_path, state)[0]
    models = [tiny(files)]
    monkeypatch.setattr(formats, "LARGE", 1 << 60)
    models.append(tiny(files))
    before = step(models[0])
    for model in models:
        apply.attach(model, lora)
    made = [step(model) for model in models]
    assert torch.equal(*made) and not torch.equal(made[0], before)


@pytest.mark.usefixtures("all_large")
def test_the_planner_counts_what_a_large_model_holds(tmp_path: Path, state: dict[str, Tensor]) -> None:
    (file,) = FORMATS["bf16"][1](tmp_path, state)[0]
    model = tiny([file])
    held = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert checkpoint_sizes.measure(file, 4)[1].total == pytest.approx(held, rel=0.15)
    # as published, 12.3 GB of weights and 7.3 GB, not twice that
    config = packers.TINY | {"dim": 3840, "n_heads": 30, "n_layers": 30, "n_refiner_layers": 2}
    config |= {"cap_feat_dim": 2560}
    assert checkpoint_sizes.published_size("transformer", "bf16", config, 4).total < 13e9
    assert checkpoint_sizes.published_size("transformer", "int8", config, 4).total < 7.2e9
    assert checkpoint_sizes.published_size("transformer", "fp32", config, 4).total > 24e9
    assert checkpoint_sizes.published_size("text_encoder", "bf16", QWEN3_4B, 4).total < 8e9
    assert checkpoint_sizes.published_size("text_encoder", "int8", QWEN3_4B, 4).ram_bytes < 0.8e9


# ---- a system that has no room to map a file ---------------------------------------------------------------

LIMITED = """
import json, resource, struct, sys
from pathlib import Path

import psutil

from shared.worker import failures
from shared.weights import loading

file, size = Path(sys.argv[1]), 8 << 30
header = json.dumps({"w": {"dtype": "I8", "shape": [size], "data_offsets": [0, size]}}).encode()
header += b" " * (-len(header) % 8)
with file.open("wb") as out:
    out.write(struct.pack("<Q", len(header)) + header)
    out.truncate(8 + len(header) + size)
room = float(sys.argv[2]) * size
limit = int(psutil.Process().memory_info().vms + room)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    loading._open(file).get_tensor("w")
except Exception as error:
    print(type(error).__name__, failures.is_expected(error), failures.sentence(error, "the log"))
"""


@pytest.mark.skipif(not LINUX, reason="limits the address space")
@pytest.mark.parametrize(("room", "raised"), [(0.5, "MemoryError"), (1.5, "RuntimeError")])
def test_a_file_that_cannot_be_mapped_is_a_lack_of_memory(tmp_path: Path, room: float, raised: str) -> None:
    """safetensors maps it, then torch: either may fail."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "x.safetensors"), str(room)]
    done = subprocess.run(command, cwd=mini.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{raised} True {failures.OUT_OF_RAM}"


class WindowsError(OSError):
    winerror = 1455


@pytest.mark.parametrize(
    ("error", "card"),
    [
        (RuntimeError("unable to mmap 12309878552 bytes from file <x>: Cannot allocate memory (12)"), False),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), False),
        (RuntimeError("couldn't open file mapping: <x>, error code: <1455>"), False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), False),
        (WindowsError(22, "Die Auslagerungsdatei ist zu klein, um diesen Vorgang durchzuführen"), False),
        (SafetensorError("The paging file is too small for this operation. (os error 1455)"), False),
        (SafetensorError("Die Auslagerungsdatei ist zu klein (os error 1455)"), False),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
    ],
)
def test_every_way_to_say_that_memory_is_short(error: Exception, card: bool) -> None:
    expected = failures.OUT_OF_MEMORY if card else failures.OUT_OF_RAM
    assert failures.is_out_of_memory(error) and failures.sentence(error, "") == expected


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOENT, "No such file"),
        RuntimeError("size mismatch: 1455 and 12"),
        SafetensorError("header too large"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not failures.is_out_of_memory(error)


def test_a_file_that_safetensors_cannot_map_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise SafetensorError("The paging file is too small for this operation to complete. (os error 1455)")

    monkeypatch.setattr(loading, "safe_open", refuse)
    with pytest.raises(SafetensorError):
        loading._open(tmp_path / "x.safetensors")
