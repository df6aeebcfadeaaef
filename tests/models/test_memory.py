"""The memory model against the real modules: formulas cover what is alive, by at most a quarter more."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from transformers import Qwen3Config

from models.z_image import control, memory
from models.z_image.checkpoints import checkpoint_sizes
from models.z_image.checkpoints.control_layout import OWN, PLAIN, SHARED, ControlLayout
from models.z_image.checkpoints.part_configs import Shape
from models.z_image.control import Hints, ZImageControlModel
from models.z_image.family import QWEN3_4B, VAE_CONFIG
from models.z_image.nag import Nag
from models.z_image.text_encoder import text_encoding
from models.z_image.transformer_z_image import (
    Attention,
    Conditioning,
    ZImageConfig,
    ZImageTransformer2DModel,
)
from models.z_image.z_image_handler import family_handler
from shared.errors import UserError
from shared.weights.files import Folders, Required
from tests.support.control_nets import CONFIG, saved
from tests.support.dimensions import DIT
from tests.support.live_bytes import LiveBytes, attend
from tests.support.mini import ROOT, model_def

META = torch.device("meta")
VAE = json.loads((ROOT / VAE_CONFIG).read_text())
MINI = ROOT / "models/z_image/mini"


def meta(build, dtype=torch.bfloat16):
    with META:
        return build().to(dtype).eval().requires_grad_(False)


def covers(formula, counted):
    assert counted <= formula <= 1.25 * counted, (formula / 1e6, counted / 1e6)


@pytest.fixture(scope="module")
def transformer():
    """The 6B model, on no memory at all."""
    model = meta(lambda: ZImageTransformer2DModel(ZImageConfig.from_dict(DIT)))
    model.rope = lambda ids, device: torch.empty(1, len(ids), 1, 64, dtype=torch.complex64, device=META)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = lambda q, k, v: torch.empty_like(q).flatten(2)
    return model


def conditioning(side, caption):
    tokens = side * side // 4
    rope = torch.empty(1, tokens + caption, 1, 64, dtype=torch.complex64, device=META)
    states = torch.empty(1, caption, 3840, dtype=torch.bfloat16, device=META)
    return Conditioning(states, rope, tokens, side, side)


def counted_forward(model, pixels, sequences, caption, negative=0, net=None):
    side = pixels // 8
    with torch.inference_mode(), LiveBytes() as live:
        latents = [torch.empty(16, side, side, device=META) for _ in range(sequences)]
        one = conditioning(side, caption)  # equal prompts share theirs
        others = [conditioning(side, negative)] * sequences if negative else None
        how = {"negatives": others, "nag": Nag(2.0)} if negative else {}
        if net is not None:
            context = torch.empty(net.layout.channels, side, side, device=META)
            how["control"] = Hints(net, [net.embed(context, model.x_pad_token)] * sequences, 0.75)
            del context
        model(latents, torch.empty(1, device=META), [one] * sequences, **how)
    return live.peak


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize(
    ("pixels", "negative"), [(512, 0), (1024, 0), (1536, 0), (2048, 0), (512, 64), (1024, 64)]
)
def test_the_transformers_activations(transformer, pixels, sequences, negative):
    shape = Shape.of(DIT)
    sizes = memory.Sizes(shape.image_tokens(pixels, pixels), 128, sequences, negative)
    counted = counted_forward(transformer, pixels, sequences, 128, negative)
    covers(memory.transformer_bytes(shape, sizes), counted)


LAYOUTS = {
    "v1": ControlLayout(16, tuple(range(0, 30, 5)), PLAIN),
    "2.0": ControlLayout(33, tuple(range(0, 30, 2)), SHARED),
    "2.1": ControlLayout(33, tuple(range(0, 30, 2)), OWN),
    "lite": ControlLayout(33, (0, 10, 20), OWN),
}


def control_net(generation):
    config = ZImageConfig.from_dict(DIT)
    net = meta(lambda: ZImageControlModel(config, LAYOUTS[generation]))
    for module in net.modules():
        if isinstance(module, Attention):
            module.attend = lambda q, k, v: torch.empty_like(q).flatten(2)
    return net


@pytest.mark.parametrize("generation", LAYOUTS)
@pytest.mark.parametrize(("pixels", "sequences"), [(512, 1), (1024, 2)])
def test_activations_with_control(transformer, generation, pixels, sequences):
    shape, net = Shape.of(DIT), control_net(generation)
    sizes = memory.Sizes(shape.image_tokens(pixels, pixels), 128, sequences, control=net.layout)
    covers(
        memory.transformer_bytes(shape, sizes), counted_forward(transformer, pixels, sequences, 128, net=net)
    )


@pytest.mark.parametrize("generation", LAYOUTS)
def test_a_control_networks_published_size_is_the_real_one(generation):
    net = control_net(generation)
    names = {"v1": "Union_bf16", "2.0": "Union2_bf16", "2.1": "Union2.1_bf16", "lite": "Union-2.1-lite"}
    one = Required("module0", [f"https://x.org/Z-Image-Turbo-Fun-Controlnet-{names[generation]}.safetensors"])
    nowhere = Folders(ROOT / "nowhere", ROOT / "nowhere")
    size = checkpoint_sizes.control_variants(one, DIT, nowhere)[0].size
    blocks = [*net.control_noise_refiner, *net.control_layers]
    assert size.block_bytes == tuple(sum(p.nbytes for p in block.parameters()) for block in blocks)
    assert size.total == sum(p.nbytes for p in net.parameters())
    assert checkpoint_sizes.control_layout(one, DIT, nowhere) == net.layout


@pytest.mark.parametrize("generation", ["v1", "2.0", "lite"])
def test_a_control_file_on_disk_is_measured(generation, tmp_path):
    path = saved(tmp_path, generation)
    base = {"n_layers": 12, "patch_size": 2, "dim": 96}
    one = Required("module0", [path.name])
    places = Folders(tmp_path, tmp_path)
    layout = checkpoint_sizes.control_layout(one, base, places)
    net = control.load(
        path,
        ZImageConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in CONFIG.items()}),
        torch.float32,
    )
    assert layout == net.layout
    size = checkpoint_sizes.control_variants(one, base, places, 4)[0].size
    assert size.total == sum(p.nbytes for p in net.parameters())
    assert len(size.block_bytes) == len(net.control_layers) + len(net.control_noise_refiner)


def test_a_job_with_control_needs_more_and_its_card_offers_more():
    card, plain = (model_def(name) for name in ("z_image_control2_1", "z_image"))
    card["URLs"] = plain["URLs"]
    nowhere = Folders(ROOT, ROOT / "nowhere")
    offers = [family_handler.query_offers("z_image", d, nowhere) for d in (plain, card)]
    sizes = [o.transformer[0].size for o in offers]
    assert len(sizes[1].block_bytes) == len(sizes[0].block_bytes) + 17
    assert sizes[1].block_bytes[17:] == sizes[0].block_bytes
    settings = {"resolution": "1024x1024"}
    idle, busy = (
        family_handler.query_memory("z_image_control2_1", card, settings | more, nowhere)
        for more in ({}, {"image_guide": "a.png"})
    )
    assert idle.denoise < busy.denoise and idle.linear_flops < busy.linear_flops
    assert idle == family_handler.query_memory("z_image", plain, settings, nowhere)


def test_a_prompts_preparation_needs_less_than_a_step(transformer):
    with torch.inference_mode(), LiveBytes() as live:
        transformer.prepare(torch.empty(512, 2560, dtype=torch.bfloat16, device=META), 8, 8)
    assert live.peak <= memory.transformer_bytes(Shape.of(DIT), memory.Sizes(32, 512))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vaes_activations(monkeypatch, dtype):
    vae = meta(lambda: AutoencoderKL.from_config(VAE), dtype)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    for width, height in ((256, 256), (1024, 1024), (2048, 1024)):
        with torch.inference_mode(), LiveBytes() as live:
            vae.decode(torch.empty(1, 16, height // 8, width // 8, device=META, dtype=dtype))
        covers(memory.decode_bytes(VAE, width, height, dtype.itemsize), live.peak)
        with torch.inference_mode(), LiveBytes() as live:
            vae.encode(torch.empty(1, 3, height, width, device=META, dtype=dtype))
        covers(memory.encode_bytes(VAE, width, height, dtype.itemsize), live.peak)


def test_the_text_encoders_activations_and_size(monkeypatch, tmp_path):
    Qwen3Config(**QWEN3_4B, tie_word_embeddings=True).save_pretrained(tmp_path)
    model = meta(lambda: text_encoding.make_text_encoder(tmp_path / "config.json"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    for tokens in (32, 512):
        embedded = torch.empty(1, tokens, 2560, dtype=torch.bfloat16, device=META)
        with torch.inference_mode(), LiveBytes() as live:
            model(inputs_embeds=embedded, attention_mask={"full_attention": None}, use_cache=False)
        covers(memory.text_encoder_bytes(QWEN3_4B, tokens), live.peak)
    size = checkpoint_sizes.published_size("text_encoder", "bf16", QWEN3_4B)
    assert size.block_bytes == (sum(p.nbytes for p in model.layers[0].parameters()),) * 35
    assert size.ram_bytes == model.embed_tokens.weight.nbytes


# ---- weights -----------------------------------------------------------------------------------------------


def test_the_published_transformers_size_is_the_real_one(transformer):
    size = checkpoint_sizes.published_size("transformer", "bf16", DIT)
    blocks = [*transformer.context_refiner, *transformer.noise_refiner, *transformer.layers]
    assert sorted(size.block_bytes) == sorted(sum(p.nbytes for p in b.parameters()) for b in blocks)
    assert abs(size.total - sum(p.nbytes for p in transformer.parameters())) < 1e5
    assert abs(size.total - 2 * 6_154_908_736) < 1e5


@pytest.mark.parametrize(
    ("kind", "published"),
    [("svdq-int4", 4_546_023_552), ("svdq-fp4", 4_200_039_756), ("int8", 6560 << 20)],
)
def test_the_published_quantized_sizes(kind, published):
    size = checkpoint_sizes.published_size("transformer", kind, DIT)
    assert size.total == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ZImageTurbo_bf16.safetensors", "bf16"),
        ("ZImageTurbo_quanto_bf16_int8.safetensors", "int8"),
        ("svdq-int4_r256-z-image-turbo.safetensors", "svdq-int4"),
        ("svdq-fp4_r128-z-image-turbo.safetensors", "svdq-fp4"),
        ("z_image_fp8_e4m3fn.safetensors", "fp8"),
        ("mine.safetensors", "bf16"),
    ],
)
def test_what_a_files_name_says(name, kind):
    assert checkpoint_sizes.kind_by_name(name) == kind


def test_a_quantized_file_is_measured_by_its_header(tmp_path):
    card = {**model_def("z_image_mini"), "URLs": ["models/z_image/mini/transformer.safetensors"]}
    copy = tmp_path / "mini_bf16.safetensors"
    copy.write_bytes((MINI / "transformer.safetensors").read_bytes())
    load = functools.partial(
        family_handler.load_model, base_model_type="z_image", model_def=card, device="cpu"
    )
    processor, pipe = load(copy, dtype=torch.bfloat16, save_quantized=True)
    written = tmp_path / "mini_quanto_bf16_int8.safetensors"
    kind, size = checkpoint_sizes.measure(written)
    assert kind == "int8"
    layer = pipe.transformer.layers[0]
    linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    quantized = [m for m in linears if m.out_features != 4 * 128]  # all but the modulation
    # one byte for each weight, a bf16 scale for each row, the rest in bf16
    expected = sum(m.weight.numel() + 2 * m.out_features for m in quantized)
    expected += 2 * (sum(p.numel() for p in layer.parameters()) - sum(m.weight.numel() for m in quantized))
    assert size.block_bytes[-1] == expected and len(size.block_bytes) == 8
    again, _ = load(written)  # and it can be loaded
    assert type(again.pipe.transformer.layers[0].attention.to_q).__name__ == "Int8Linear"


def test_the_text_encoders_last_layer_does_not_count():
    file = MINI / "text_encoder/model.safetensors"
    config = json.loads((MINI / "text_encoder/config.json").read_text())
    _, whole = checkpoint_sizes.measure(file, 2, "text_encoder")
    _, size = checkpoint_sizes.measure(file, 2, "text_encoder", config)
    assert len(size.block_bytes) == 2 and size.base_bytes == 0
    assert whole.block_bytes[:2] == size.block_bytes


# ---- the handler's hooks -----------------------------------------------------------------------------------


def test_what_the_turbo_card_offers_before_anything_is_downloaded(tmp_path):
    card = json.loads((ROOT / "defaults/z_image.json").read_text())["model"]
    offers = family_handler.query_offers("z_image", card, Folders(tmp_path, tmp_path))
    assert [(v.kind, v.on_disk) for v in offers.transformer] == [("bf16", False), ("int8", False)]
    assert [v.kind for v in offers.text_encoder] == ["bf16", "int8"]
    assert offers.transformer[0].size.total == pytest.approx(12.31e9, rel=0.001)
    assert offers.vae.total == 4 * 83_819_683


def test_what_the_mini_offers_is_what_is_loaded():
    offers = family_handler.query_offers("z_image", model_def("z_image_mini"), Folders(ROOT, ROOT / "ckpts"))
    [transformer], [encoder] = offers.transformer, offers.text_encoder
    assert transformer.on_disk and len(transformer.size.block_bytes) == 6 + 2
    config = ZImageConfig.from_dict(json.loads((MINI / "transformer.json").read_text()))
    real = meta(lambda: ZImageTransformer2DModel(config))
    assert transformer.size.total == sum(p.nbytes for p in real.parameters())
    real = meta(lambda: text_encoding.make_text_encoder(MINI / "text_encoder" / "config.json"))
    assert encoder.size.total + encoder.size.ram_bytes == sum(p.nbytes for p in real.parameters())


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    card = {**model_def("z_image_mini"), "URLs": ["a.safetensors"]}
    with pytest.raises(UserError, match="a.safetensors is 7 bytes"):
        family_handler.query_offers("z_image", card, Folders(tmp_path, tmp_path))


def needs(**settings):
    base = {"resolution": "1024x1024", "batch_size": 1}
    card = json.loads((ROOT / "defaults/z_image.json").read_text())["model"]
    return family_handler.query_memory("z_image", card, {**base, **settings})


def test_a_jobs_needs():
    plain = needs()
    # S = 4096 + 512 tokens: 30 layers on S, 2 refiners on 4096; 2 FLOP per weight and token
    weights = 4 * 3840**2 + 3 * 3840 * 10240
    assert plain.linear_flops == 2 * weights * (30 * 4608 + 2 * 4096)
    assert plain.attention_flops == 4 * 3840 * (30 * 4608**2 + 2 * 4096**2)
    assert list(plain.decode) == [None, 768, 512, 384, 256]
    assert plain.decode[None] == 1024**2 * (3 * 256 + 4) * 4
    guided, batch = needs(guidance_scale=4.0), needs(batch_size=2)
    assert guided.linear_flops == batch.linear_flops == 2 * plain.linear_flops
    assert plain.denoise < guided.denoise < batch.denoise < needs(batch_size=2, NAG_scale=2.0).denoise
    assert needs(image_guide="a.png").decode[None] == plain.decode[None]  # encoding needs less than decoding
