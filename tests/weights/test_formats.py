"""Every format a Z-Image file comes in: recognised without its name, loaded, and equal to the weights it
stands for."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from models.z_image import loading
from models.z_image.checkpoints import weight_names
from models.z_image.text_encoder import text_encoding
from models.z_image.z_image_handler import family_handler
from shared.weights import formats
from shared.weights.files import read_header, weight_files
from shared.weights.loading import build, save_quantized
from shared.weights.quantized import QuantizedLinear
from tests.support import mini, packers
from tests.support.packers import comfy, pack_layers, write
from tests.support.tiny_formats import FORMATS, State, tiny


@pytest.fixture(scope="module")
def state() -> State:
    return packers.tiny_state()


def dense(model: torch.nn.Module) -> State:
    """The weights a model computes with, in fp32."""
    weights = {n: x.float() for n, x in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weights = {n: x for n, x in weights.items() if not n.startswith(f"{name}.")}
            weights[f"{name}.weight"] = module.dequantized()
            if module.bias is not None:
                weights[f"{name}.bias"] = module.bias.float()
    return weights


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognised_and_means_its_weights(name: str, tmp_path: Path, state: State):
    label, make = FORMATS[name]
    files, exact = make(tmp_path, state)
    found = formats.inspect(files, weight_names.TRANSFORMER)
    assert found.label == label
    model = tiny(files)
    weights = dense(model)
    assert set(weights) == set(state)
    for tensor, x in weights.items():
        torch.testing.assert_close(x, exact[tensor].float().reshape(x.shape), rtol=1e-6, atol=1e-6)
    layers = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    kept = {layer for layer in found.quantized if re.search(weight_names.TRANSFORMER.plain, f"{layer}.")}
    assert layers == set(found.quantized) - kept
    assert all(not x.is_meta for x in (*model.parameters(), *model.buffers()))


def test_the_header_tells_the_bytes_the_model_will_take(tmp_path: Path, state: State):
    for kind, make in (("int4", FORMATS["int4"][1]), ("int8", FORMATS["int8, no map"][1])):
        (tmp_path / kind).mkdir()
        files, _ = make(tmp_path / kind, state)
        found = formats.inspect(files, weight_names.TRANSFORMER)
        model = tiny(files, torch.bfloat16)

        def size(module: torch.nn.Module) -> int:
            tables = [m for m in module.modules() if hasattr(m, "code_pairs")]
            held = [*module.parameters(), *module.buffers()]
            return sum(x.nbytes for x in held) - sum(m.code_pairs.nbytes for m in tables)

        assert found.bytes_under() == size(model)
        assert found.block_bytes("layers") == tuple(size(block) for block in model.layers)
        assert found.bytes_under("cap_embedder.", float_bits=32) == 2 * found.bytes_under("cap_embedder.")


def test_nothing_is_copied_that_has_its_dtype(tmp_path: Path, state: State):
    """Views of one mapped file lie as far apart as the header says."""
    files, _ = FORMATS["ComfyUI bf16"][1](tmp_path, state)
    header = read_header(files[0]).entries
    model = tiny(files, torch.bfloat16)
    norm, q, k = (
        model.get_parameter(f"layers.0.{n}.weight") for n in ("ffn_norm1", "attention.to_q", "attention.to_k")
    )
    at = {
        n: header[f"model.diffusion_model.layers.0.{n}.weight"]["data_offsets"][0]
        for n in ("ffn_norm1", "attention.qkv")
    }
    assert q.data_ptr() - norm.data_ptr() == at["attention.qkv"] - at["ffn_norm1"]
    assert k.data_ptr() - q.data_ptr() == q.nbytes


@pytest.mark.parametrize("name", ["int4", "fp4, usual scales", "fp8 weight_scale, markers", "int8, no map"])
def test_a_quantized_transformer_draws_what_its_weights_draw(name: str, tmp_path: Path, state: State):
    """The whole pipeline on a tiny random transformer: latents as with the dequantized weights, and not as
    with the weights before they were quantized."""
    definition = mini.model_def("z_image_mini") | {"transformer_config": packers.TINY}
    (tmp_path / "q").mkdir()
    files, exact = FORMATS[name][1](tmp_path / "q", state)
    same = write(tmp_path / "exact.safetensors", {n: x.float() for n, x in exact.items()})
    other = write(tmp_path / "other.safetensors", {n: x.float() for n, x in state.items()})
    ours, theirs, before = (draw(file, definition) for file in (files[0], same, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (ours - before).norm() > 10 * (ours - theirs).norm()


def draw(file: Path, definition: dict[str, Any]) -> Tensor:
    _, pipe = family_handler.load_model(file, "z_image", definition, device="cpu", dtype=torch.float32)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    how = dict(height=64, width=64, num_inference_steps=2, latents=noise, output_type="latent")
    return pipe("a red circle on a white background", **how).images


MINI_LINEAR = re.compile(r"attention\.(qkv|out|to_\w+(\.0)?)\.weight$|w[123]\.weight$")


@pytest.mark.parametrize("name", ["int8", "fp8 scale_weight", "fp8 weight_scale", "ComfyUI", "shards"])
def test_the_mini_draws_its_picture_from_every_format(name: str, tmp_path: Path):
    definition = mini.model_def("z_image_mini")
    stored = load_file(mini.ROOT / definition["URLs"][0])
    if name == "shards":
        source, exact = packers.write_shards(tmp_path / "transformer", stored, 2), stored
    elif name == "ComfyUI":
        source, exact = write(tmp_path / "x.safetensors", comfy(stored)), stored
    else:
        pack = packers.pack_quanto if name == "int8" else packers.pack_fp8(name.split()[1])
        tensors, exact = pack_layers(stored, pack, MINI_LINEAR)
        source = write(tmp_path / "x.safetensors", tensors)
    same = write(tmp_path / "exact.safetensors", {n: x.float() for n, x in exact.items()})
    torch.testing.assert_close(draw(source, definition), draw(same, definition), rtol=1e-3, atol=1e-3)


# ---- the other parts ---------------------------------------------------------------------------------------


def test_the_second_time_embedder_is_found_in_the_header(tmp_path: Path, state: State):
    twin = {
        n.replace("t_embedder.", "extended_weights.t_embedder_2."): x
        for n, x in state.items()
        if "t_embedder" in n
    }
    files = [write(tmp_path / "x.safetensors", comfy(state, "") | twin)]
    found = formats.inspect(files, weight_names.TRANSFORMER)
    model = loading._transformer({"transformer_config": packers.TINY}, found, torch.float32)
    assert torch.equal(model.t_embedder_2.mlp[0].weight, state["t_embedder.mlp.0.weight"].float())


ENCODER = mini.ROOT / "models/z_image/mini/text_encoder"


@pytest.mark.parametrize("prefix", ["model.", "", "text_encoders.qwen3_4b.transformer.model."])
@pytest.mark.parametrize("form", ["plain", "int8", "shards"])
def test_the_text_encoder_comes_through_the_same_loader(form: str, prefix: str, tmp_path: Path):
    """Its last layer, norm and head are never read: here their shapes are absurd."""
    stored = {
        prefix + n.removeprefix("model."): x.float()
        for n, x in load_file(ENCODER / "model.safetensors").items()
    }
    exact = stored
    if form == "int8":
        stored, exact = pack_layers(
            stored, packers.pack_quanto, re.compile(r"_proj\.weight$|embed_tokens\.weight$")
        )
    last = [n for n in stored if ".layers.2." in f".{n}"]
    stored |= {n: torch.zeros(1) for n in (*last, "lm_head.weight", f"{prefix}norm.weight")}
    source = (
        write(tmp_path / "x.safetensors", stored)
        if form != "shards"
        else packers.write_shards(tmp_path, stored, 3)
    )
    model = loading._text_encoder(ENCODER, weight_files(source), torch.float32)
    weights = dense(model)
    assert len(model.layers) == 2 and type(model.embed_tokens) is torch.nn.Embedding
    for name, x in weights.items():
        torch.testing.assert_close(x, exact[prefix + name].float(), rtol=1e-6, atol=1e-6)
    ids = torch.arange(7)[None]
    reference = build(lambda: text_encoding.make_text_encoder(ENCODER / "config.json"))
    reference.load_state_dict(weights, assign=True)
    for ours, theirs in zip(model(ids), reference(ids), strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4) if isinstance(
            ours, Tensor
        ) else None


def test_an_int8_text_encoder_that_we_saved_loads(tmp_path: Path):
    model = loading._text_encoder(ENCODER, [ENCODER / "model.safetensors"], torch.bfloat16)
    save_quantized(model, tmp_path / "x.safetensors", weight_names.TEXT_ENCODER)
    again = loading._text_encoder(ENCODER, [tmp_path / "x.safetensors"], torch.bfloat16)
    assert sum(isinstance(m, QuantizedLinear) for m in again.modules()) == 2 * 7


def test_a_saved_int8_transformer_has_the_layers_of_the_published_ones(tmp_path: Path, state: State):
    save_quantized(
        tiny(FORMATS["bf16"][1](tmp_path, state)[0], torch.bfloat16),
        tmp_path / "q.safetensors",
        weight_names.TRANSFORMER,
    )
    found = formats.inspect([tmp_path / "q.safetensors"], weight_names.TRANSFORMER)
    assert found.label == "int8 (quanto)" and len(found.quantized) == 7 * 4
    assert not any("adaLN" in layer or "embedder" in layer for layer in found.quantized)
    tiny([tmp_path / "q.safetensors"])


FLUX_VAE = (
    (r"^(en|de)coder\.mid_block\.resnets\.0", r"\1coder.mid.block_1"),
    (r"^(en|de)coder\.mid_block\.resnets\.1", r"\1coder.mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
)


def test_the_original_flux_names_of_the_vae_load(tmp_path: Path):
    config = "models/z_image/mini/vae/config.json"
    stored = load_file(mini.ROOT / "models/z_image/mini/vae/model.safetensors")
    flux = {}
    for name, x in stored.items():
        for ours, theirs in FLUX_VAE:
            name = re.sub(ours, theirs, name)
        if m := re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.(.*)", name):
            level, rest = 3 - int(m[1]), f"block.{m[3]}" if m[2] == "resnets" else "upsample"
            name = f"decoder.up.{level}.{rest}.{m[4]}"
        flux[name] = x[:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) else x
    model = loading._vae(config, write(tmp_path / "ae.safetensors", flux), torch.float32)
    reference = AutoencoderKL.from_config(json.loads((mini.ROOT / config).read_text()))
    reference.load_state_dict(stored)
    for name, x in reference.state_dict().items():
        assert torch.equal(x, model.state_dict()[name]), name


def test_every_part_finds_its_own_in_an_all_in_one_file(tmp_path: Path, state: State, caplog: Any):
    folder = mini.ROOT / "models/z_image/mini"
    encoder, vae = (load_file(folder / f"{part}/model.safetensors") for part in ("text_encoder", "vae"))
    everything = comfy(state) | {f"vae.{n}": x for n, x in vae.items()}
    everything |= {f"text_encoders.qwen3_4b.transformer.{n}": x for n, x in encoder.items()}
    file = write(tmp_path / "x.safetensors", everything)
    assert len(tiny([file]).state_dict()) == len(state)
    ours = loading._text_encoder(ENCODER, [file], torch.float32)
    assert torch.equal(ours.embed_tokens.weight, encoder["model.embed_tokens.weight"].float())
    loading._vae("models/z_image/mini/vae/config.json", file, torch.float32)
    assert "does not know" not in caplog.text
    held = formats.inspect([file], weight_names.TRANSFORMER)
    assert held.bytes_under() == sum(x.nbytes for x in state.values())


def test_tensors_of_something_else_are_reported(tmp_path: Path, state: State, caplog: Any):
    files = [write(tmp_path / "x.safetensors", state | {"vae.decoder.weight": torch.zeros(1)})]
    with caplog.at_level(logging.WARNING):
        tiny(files)
    assert "1 tensors that this model does not know (first: vae.decoder.weight)" in caplog.text


def test_dtype_none_keeps_the_files_floats(tmp_path: Path, state: State):
    files, _ = FORMATS["int8, no map"][1](tmp_path, state)
    assert tiny(files, None).dtype == torch.bfloat16
