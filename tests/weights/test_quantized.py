"""Quantized layers: the stored orders against index formulas, the layers against their formats' weights, and
int8 files against optimum-quanto."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from models.z_image.checkpoints.weight_names import TRANSFORMER
from shared.errors import UserError
from shared.weights import quantized
from shared.weights.formats import Names
from shared.weights.loading import build, load_weights, save_quantized
from tests.support import packers
from tests.support.small_models import Small, random

N, K, R = 256, 128, 32


def grid(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return n, k


# ---- orders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [True, False])
def test_codes_lie_where_the_kernels_lanes_load_them(aligned: bool):
    stored = torch.randint(-128, 128, (N * K // 2 + 1,), dtype=torch.int8)[0 if aligned else 1 :][
        : N * K // 2
    ]
    stored = stored.reshape(N, K // 2)
    rows = quantized.unpack_qweight(stored)
    nibbles = torch.stack((rows & 15, rows >> 4), dim=2).flatten(1)
    assert torch.equal(nibbles, packers.nibble_at(stored, *grid(N, K), K))
    assert torch.equal(packers.pack_qweight(nibbles), stored)


@pytest.mark.parametrize("codes", ["int4", "fp4"])
def test_scales_lie_where_the_kernels_lanes_load_them(codes: str):
    groups = K // 16
    n, g = grid(N, groups)
    if codes == "int4":
        stored = random(groups, N).bfloat16()
        index = packers.int4_scale_index(n, g, groups)
        assert torch.equal(quantized.unpack_int4_scales(stored), stored.flatten()[index])
        assert torch.equal(packers.pack_int4_scales(quantized.unpack_int4_scales(stored)), stored)
    else:
        stored = random(groups, N).abs().to(torch.float8_e4m3fn)
        index = packers.fp4_scale_index(n, g, groups)
        ours = quantized.unpack_fp4_scales(stored)
        assert torch.equal(ours.float(), stored.float().flatten()[index])
        assert torch.equal(packers.pack_fp4_scales(ours).float(), stored.float())


def test_low_rank_matrices_and_vectors_lie_where_the_kernels_lanes_load_them():
    up, down, vector = random(N, R), random(K, R), random(N)
    ours = quantized.unpack_up(up)
    assert torch.equal(ours, up.flatten()[packers.low_rank_index(*grid(N, R), R, down=False)])
    assert torch.equal(packers.pack_up(ours), up)
    r, k = grid(R, K)
    ours = quantized.unpack_down(down)
    assert torch.equal(ours, down.flatten()[packers.low_rank_index(k, r, R, down=True)])
    assert torch.equal(packers.pack_down(ours), down)
    order = torch.tensor(
        [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    )  # where each stored one is from
    expected = torch.empty_like(vector)
    expected[(torch.arange(0, N, 16)[:, None] + order).flatten()] = vector
    assert torch.equal(quantized.unpack_vector(vector), expected)


# ---- layers ------------------------------------------------------------------------------------------------


def svdq(codes: str, scales: str = "usual") -> tuple[quantized.QuantizedLinear, torch.Tensor]:
    stored, exact = packers.pack_svdq(codes, scales)(random(N, K) / K**0.5, 1)
    names = {"smooth_factor": "smooth", "proj_down": "down", "proj_up": "up"}
    unpack = quantized.UNPACK[f"svdq-{codes}"]
    tensors = {}
    for name, x in stored.items():
        if name != "smooth_factor_orig":
            own = names.get(name, name)
            tensors[own] = unpack[own](x) if own in unpack else x
    return quantized.make(f"svdq-{codes}", tensors), exact


def scaled(kind: str) -> tuple[quantized.QuantizedLinear, torch.Tensor]:
    pack = packers.pack_quanto if kind == "int8" else packers.pack_fp8("weight_scale", "column")
    stored, exact = pack(random(N, K) / K**0.5)
    tensors = {"weight": stored.get("weight._data", stored.get("weight")), "bias": random(N, seed=3)}
    tensors["weight_scale"] = stored.get("weight._scale", stored.get("weight_scale"))
    return quantized.make(kind, tensors), exact


LAYERS = {
    "int8": lambda: scaled("int8"),
    "fp8": lambda: scaled("fp8"),
    "int4": lambda: svdq("int4"),
    **{f"fp4 {s}": lambda s=s: svdq("fp4", s) for s in ("scalar", "channel", "both", "neither")},
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_formats_exact_weights(name: str):
    layer, exact = LAYERS[name]()
    torch.testing.assert_close(layer.dequantized(), exact, rtol=1e-6, atol=1e-6)
    x = random(2, 5, K, seed=1)
    bias = None if layer.bias is None else layer.bias
    torch.testing.assert_close(layer(x), F.linear(x, exact, bias), rtol=1e-4, atol=1e-5)
    assert not list(layer.parameters()) and (layer.in_features, layer.out_features) == (K, N)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_costs_no_more_than_its_own_rounding(name: str, dtype: torch.dtype, limit: float):
    layer, exact = LAYERS[name]()
    x = (30 * random(64, K, seed=1)).to(dtype)  # unscaled 8-bit sums of these would overflow fp16
    expected = F.linear(x.float(), exact, None if layer.bias is None else layer.bias.float())
    y = layer(x)
    assert y.dtype == dtype
    assert (y.float() - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_scale_on_the_weights_is_as_exact_as_one_on_the_result(name: str):
    """bf16, as a card computes int8: against the exact weights and the order that a CPU takes."""
    layer, exact = LAYERS[name]()
    x = random(64, K, seed=1).bfloat16()
    expected = F.linear(x.double(), exact.double(), layer.bias.double())
    first, last = ((y.double() - expected).norm() for y in (layer.scaled_first(x), layer(x)))
    assert first <= 1.1 * last


def test_a_kernel_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def find(op, device):
        asked.append(op)
        return lambda x, *tensors: x.new_full((*x.shape[:-1], len(tensors[0])), 7)

    monkeypatch.setattr(quantized.kernels, "find", find)
    ops = {"int8": "int8_linear", "int4": "svdq_int4_linear", "fp4 scalar": "svdq_fp4_linear"}
    for name, op in ops.items():
        layer, _ = LAYERS[name]()
        assert (layer(random(3, K)) == 7).all() and asked.pop() == op


# ---- int8 files --------------------------------------------------------------------------------------------

SMALL = Names(family="a small model", quantizable=r"^body\.\d+$")


def small() -> Small:
    torch.manual_seed(0)
    return Small().bfloat16().eval().requires_grad_(False)


def loaded(path: Path, dtype: torch.dtype = torch.bfloat16) -> Small:
    model = build(Small)
    load_weights(model, [path], dtype=dtype, names=SMALL)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_bits_of_int8(dtype: torch.dtype, rows: int):
    """The rule of the files that were written so far: ties go to even, zeros stay zeros."""
    weight = random(rows, 257, seed=2).to(dtype)
    weight[0, :9] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 0.0])  # its scale is 1
    weight[1:2] = 0
    weight[2:3] *= torch.finfo(dtype).tiny  # a scale that is nearly or wholly lost
    weight[3:4, ::2] = 0
    weight[4:5, 3] = torch.finfo(dtype).max
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = torch.round(weight / scale).nan_to_num(0).clamp(-128, 127).to(torch.int8)
    made, theirs = quantized.quantize_int8(weight)
    assert made.dtype == torch.int8 and theirs.dtype == dtype and theirs.shape == (rows, 1)
    assert torch.equal(theirs, scale) and torch.equal(made, codes)
    assert made[0, :9].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, 0]


def test_optimum_quanto_leaves_the_others_functions_alone_and_compiles_nothing():
    """In a process of its own. What mmgp replaces when it is imported, quanto does not."""
    code = (
        "import sys, torch, safetensors, safetensors.torch, transformers, accelerate\n"
        "def state(): return [safetensors.safe_open, safetensors.torch.load_file, torch.load,\n"
        "    accelerate.init_empty_weights, transformers.PreTrainedModel.from_pretrained.__func__,\n"
        "    torch.nn.Linear.forward,\n"
        "    torch.nn.functional.linear, torch.nn.Module.__call__, torch.get_default_device()]\n"
        "before = state()\n"
        "from shared.weights import quantized\n"
        "assert 'optimum' not in sys.modules\n"
        "quantized.quantize_int8(torch.randn(64, 64))\n"
        "assert before == state() and 'optimum.quanto' in sys.modules\n"
        "from optimum.quanto.library.extensions.cpp import ext\n"
        "assert ext._lib is None\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_saved_int8_is_what_optimum_quanto_computes(tmp_path: Path):
    """Same codes, same scales, same result as quanto's own quantize and freeze."""
    from optimum import quanto

    model, reference = small(), small()
    save_quantized(model, tmp_path / "int8.safetensors", SMALL, config={"kind": "small"})
    quanto.quantize(reference, weights=quanto.qint8, include="body.*")
    quanto.freeze(reference)
    stored = load_file(tmp_path / "int8.safetensors")
    expected = reference.state_dict()
    assert set(stored) == set(expected)
    for name, tensor in expected.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(
            stored[name].reshape(tensor.shape), tensor
        ), name


def test_optimum_quanto_loads_what_we_save(tmp_path: Path):
    from optimum import quanto

    file, x = tmp_path / "int8.safetensors", random(3, 7).bfloat16()
    save_quantized(small(), file, SMALL)
    theirs = small()
    quanto.requantize(
        theirs, load_file(file), {f"body.{i}": {"weights": "qint8", "activations": "none"} for i in (0, 1)}
    )
    ours = loaded(file)
    assert {type(layer) for layer in ours.body} == {quantized.Int8Linear} and type(ours.embed) is nn.Linear
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.02, atol=0.02)


def test_mmgp_loads_what_we_save(tmp_path: Path):
    """In a process of its own: importing mmgp replaces safetensors' functions."""
    pytest.importorskip("mmgp")
    file = tmp_path / "int8.safetensors"
    save_quantized(small(), file, SMALL, config={"kind": "small"})
    script = (
        "import sys, torch; from mmgp import offload; from accelerate import init_empty_weights\n"
        "from tests.support.small_models import Small, random\n"
        "with init_empty_weights(): model = Small()\n"
        "offload.load_model_data(model, sys.argv[1], default_dtype=torch.bfloat16, verboseLevel=0)\n"
        "assert type(model.body[0]).__name__.startswith('QLinear'), type(model.body[0])\n"
        "torch.save(model(random(3, 7).bfloat16()), sys.argv[2])\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, file, tmp_path / "y.pt"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "y.pt")
    torch.testing.assert_close(loaded(file)(random(3, 7).bfloat16()), theirs, rtol=0.02, atol=0.02)


def test_saving_a_loaded_int8_model_again_changes_nothing(tmp_path: Path):
    first, again = tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    save_quantized(small(), first, SMALL)
    save_quantized(loaded(first), again, SMALL)
    assert first.read_bytes() == again.read_bytes()
    with safe_open(again, "pt") as file:
        assert file.metadata()["quantization_format"] == "quanto"


def test_another_quantization_is_not_saved_as_int8(tmp_path: Path):
    model = small()
    model.body[0] = quantized.Fp8Linear(torch.zeros(33, 33).to(torch.float8_e4m3fn), torch.ones(1))
    with pytest.raises(UserError, match=r"body\.0 is fp8 already"):
        save_quantized(model, tmp_path / "x.safetensors", SMALL)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shared.files.atomic.os.replace", full)
    with pytest.raises(UserError, match=r"x\.safetensors cannot be written \(No space left on device\)"):
        save_quantized(small(), tmp_path / "x.safetensors", SMALL)
    assert not list(tmp_path.iterdir())


def test_quantized_while_loading_equals_the_int8_file(tmp_path: Path):
    """Through load_model: quantizeTransformer and text_encoder_quantization, and a card's auto_quantize."""
    from models.z_image.z_image_handler import family_handler
    from tests.support import mini

    card = mini.model_def("z_image_mini")
    (source,) = (mini.ROOT / url for url in card["URLs"])

    def load(file=source, card=card, **how):
        return family_handler.load_model(
            file, "z_image", card, device="cpu", dtype=torch.bfloat16, prompt_cache=None, **how
        )[1]

    def latents(pipe):
        start = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
        how = dict(height=128, width=128, num_inference_steps=2, latents=start, output_type="latent")
        return pipe("a red circle", **how).images

    quick = load(quantizeTransformer=True)
    save_quantized(load().transformer, tmp_path / "int8.safetensors", TRANSFORMER)
    assert torch.equal(latents(quick), latents(load(tmp_path / "int8.safetensors")))
    assert torch.equal(latents(quick), latents(load(card=card | {"auto_quantize": True})))
    assert not torch.equal(latents(quick), latents(load()))
    encoder = load(text_encoder_quantization="int8").text_encoder
    assert {type(layer.mlp.up_proj) for layer in encoder.layers} == {quantized.Int8Linear}
    with pytest.raises(UserError, match="text_encoder_quantization came as 'int3'"):
        load(text_encoder_quantization="int3")
