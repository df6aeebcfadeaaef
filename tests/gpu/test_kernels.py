"""Kernels against formulas written out here; comfy_kitchen's references stand in for its CUDA code."""

import copy
import logging
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from models.z_image.nag import Nag
from models.z_image.transformer_z_image import Attention, Fused, ZImageTransformerBlock
from shared.gpu import kernels
from shared.gpu.kernel_packages import Reach
from tests.support import mini
from tests.support.transformers import inputs, pair

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """comfy_kitchen as if its plain-torch references were a card's kernels."""
    comfy_kitchen = pytest.importorskip("comfy_kitchen")

    def reference(op: str):
        return getattr(torch.ops.comfy_kitchen, op, None) or getattr(comfy_kitchen, op)

    monkeypatch.setattr(kernels, "_comfy", reference)


# ---------------------------------------------------------------- int8


def int8_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """quanto's form: one scale for each row."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


def mini_weight() -> torch.Tensor:
    return mini.load()[1].transformer.layers[0].feed_forward.w2.weight.float()


WEIGHTS = {
    "512 rows of the 6B's to_q": lambda: noise(512, 3840, seed=1) / 62,
    "256 rows of the 6B's w2": lambda: noise(256, 10240, seed=1) / 101,
    "w2 of the Mini": mini_weight,
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_linear(eager: None, name: str, dtype: torch.dtype) -> None:
    """It is x rounded to 255 steps per row, times the weight; nothing else is inexact."""
    weight, scale = int8_weight(WEIGHTS[name]())
    x, bias = noise(3, 4, weight.shape[1]).to(dtype), noise(len(weight), seed=2).to(dtype)
    kernel = kernels.OPS["int8_linear"].kernels[0].load()
    out = kernel(x, weight, scale.bfloat16(), bias)
    assert out.shape == (3, 4, len(weight)) and out.dtype == dtype
    exact = F.linear(x.double(), weight.double() * scale.bfloat16().double(), bias.double())
    step = x.double().abs().amax(-1, keepdim=True) / 127
    rounded = F.linear(
        (x.double() / step).round() * step, weight.double() * scale.bfloat16().double(), bias.double()
    )
    assert relative(out, rounded) < (1e-3 if dtype == torch.float32 else 8e-3)  # bf16 rounds steps and ties
    # rounding errors are uniform: the standard deviation of a step is its width / sqrt(12)
    predicted = float((step / 12**0.5).square().mean().sqrt() / x.double().square().mean().sqrt())
    assert relative(out - bias, exact - bias.double()) < 1.3 * predicted + (
        0 if dtype == torch.float32 else 4e-3
    )
    assert predicted < 0.012


# ---------------------------------------------------------------- 4 bits


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def svdq(n: int, k: int, rank: int, fp4: bool) -> dict[str, torch.Tensor | None]:
    group = 16 if fp4 else 64
    scales = noise(n, k // group, seed=4).abs() / 20
    codes = torch.randint(0, 256, (n, k // 2), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return dict(
        qweight=codes,
        wscales=scales.to(torch.float8_e4m3fn) if fp4 else scales.bfloat16(),
        smooth=(0.5 + noise(k, seed=5).abs()).bfloat16(),
        down=(noise(rank, k, seed=6) / 30).bfloat16(),
        up=(noise(n, rank, seed=7) / 4).bfloat16(),
        channel_scale=(0.5 + noise(n, seed=8).abs()).bfloat16() if fp4 else None,
        bias=noise(n, seed=9).bfloat16(),
    )


def svdq_exact(x: torch.Tensor, w: dict, fp4: bool) -> torch.Tensor:
    """W[n, k] = code * scale of its group * channel scale / smooth[k] + sum of up[n, r] * down[r, k]."""
    low, high = (w["qweight"] & 15).long(), (w["qweight"] >> 4).long()
    codes = torch.stack((low, high), -1).flatten(1)
    values = torch.tensor(E2M1)[codes] if fp4 else torch.where(codes > 7, codes - 16, codes)
    n, k = codes.shape
    weight = values.double().view(n, -1, 16 if fp4 else 64) * w["wscales"].double()[:, :, None]
    weight = weight.view(n, k) * (1 if w["channel_scale"] is None else w["channel_scale"].double()[:, None])
    weight = weight / w["smooth"].double() + w["up"].double() @ w["down"].double()
    return F.linear(x.double(), weight, w["bias"].double())


@pytest.mark.parametrize(("n", "k", "rank"), [(256, 3840, 256), (256, 10240, 32), (128, 128, 16)])
def test_svdq_int4_linear(eager: None, n: int, k: int, rank: int) -> None:
    """x / smooth is rounded to 15 steps for each group of 64: as far from exact as that, and no farther."""
    w, x = svdq(n, k, rank, False), noise(2, 3, k).bfloat16()
    out = kernels.OPS["svdq_int4_linear"].kernels[0].load()(x, **w)
    assert out.shape == (2, 3, n) and out.dtype == torch.bfloat16
    groups = (x / w["smooth"]).view(-1, k // 64, 64)  # in bf16, and so are the steps
    step = groups.abs().amax(-1, keepdim=True) / 7
    rounded = ((groups / step).round().double() * step).view(x.shape) * w["smooth"].double()
    only_low_rank = {**w, "qweight": w["qweight"] * 0}
    expected = svdq_exact(rounded, w, False)
    expected += svdq_exact(x - rounded, only_low_rank, False) - w["bias"].double()
    assert relative(out, expected) < 0.02
    assert 0.02 < relative(out, svdq_exact(x, w, False)) < 0.17
    scaled = (
        kernels.OPS["svdq_int4_linear"]
        .kernels[0]
        .load()(x, **{**w, "channel_scale": torch.full((n,), 2.0).bfloat16()})
    )
    assert relative(scaled, expected + (expected - svdq_exact(x, only_low_rank, False))) < 0.02


def word_of(n: int, k: int, width: int) -> tuple[int, int]:
    """(32-bit word, nibble in it) of code [n, k] in nunchaku's tiles, by its format's description."""
    nt, p, h, g = n // 128, (n % 128) // 16, (n % 16) // 8, n % 8
    kt, kp, c, r = k // 64, (k % 64) // 32, (k % 32) // 8, k % 8
    return ((((nt * (width // 64) + kt) * 8 + p) * 8 + g) * 4 + c) * 4 + h * 2 + kp, r


def scale_of(n: int, group: int, groups: int, fp4: bool) -> int:
    if fp4:
        s, q, lane = (n % 128) // 32, (n % 32) // 8, n % 8
        tile = (n // 128 * (groups // 4) + group // 4) * 8 + lane
        return ((tile * 4 + q) * 4 + s) * 4 + group % 4
    a, b, c, e = (n % 128) // 16, (n % 16) // 8, (n % 8) // 2, n % 2
    return ((((n // 128 * groups + group) * 8 + a) * 4 + c) * 2 + b) * 2 + e


def low_rank_of(outer: int, inner: int, tile: int) -> int:
    nh, nl = (outer % 16) // 8, outer % 8
    kh, kl, e = (inner % 16) // 8, (inner % 8) // 2, inner % 2
    return ((((tile * 8 + nl) * 4 + kl) * 2 + nh) * 2 + kh) * 2 + e


def untiled(wgt, wscales, smooth, down, up, wcscales, bias, fp4: bool) -> dict:
    """What nunchaku reads from tiles, element by element."""
    n, k, rank = wgt.shape[0], wgt.shape[1] * 2, up.shape[1]
    words = wgt.contiguous().view(torch.int32).flatten().tolist()
    places = [[word_of(i, j, k) for j in range(k)] for i in range(n)]
    codes = torch.tensor([[words[w] >> 4 * r & 15 for w, r in row] for row in places], dtype=torch.uint8)
    groups, flat = wscales.shape[0], wscales.float().flatten()
    vector = [scale_of(i, 0, 1, False) for i in range(max(n, k))]
    return dict(
        qweight=codes[:, ::2] | codes[:, 1::2] << 4,
        wscales=flat[[[scale_of(i, g, groups, fp4) for g in range(groups)] for i in range(n)]],
        smooth=smooth[vector[:k]],
        down=down.flatten()[
            [[low_rank_of(r, j, j // 16 * (rank // 16) + r // 16) for j in range(k)] for r in range(rank)]
        ],
        up=up.flatten()[
            [[low_rank_of(i, r, i // 16 * (rank // 16) + r // 16) for r in range(rank)] for i in range(n)]
        ],
        channel_scale=None if wcscales is None else wcscales[vector[:n]],
        bias=bias[vector[:n]],
    )


@pytest.mark.parametrize("fp4", [False, True])
def test_nunchaku_reads_its_tile_order(monkeypatch: pytest.MonkeyPatch, fp4: bool) -> None:
    """The package's two functions, replaced by exact ones that read tiles as its format describes them."""

    def quantize(x, lora_down, smooth, fp4, pad_size):
        padded = F.pad(x, (0, 0, 0, -len(x) % pad_size))
        return padded, smooth, lora_down

    def gemm(act, wgt, out, ascales, wscales, lora_act_in, lora_up, bias, fp4, alpha, wcscales, act_unsigned):
        assert alpha == 1.0 and not act_unsigned
        weights = untiled(wgt, wscales, ascales, lora_act_in, lora_up, wcscales, bias, fp4)
        out.copy_(svdq_exact(act, weights, fp4))

    package = types.ModuleType("nunchaku")
    package.ops = types.ModuleType("nunchaku.ops")
    package.ops.gemm = types.SimpleNamespace(svdq_gemm_w4a4_cuda=gemm)
    package.ops.quantize = types.SimpleNamespace(svdq_quantize_w4a4_act_fuse_lora_cuda=quantize)
    for name, module in [("", package), (".ops", package.ops)]:
        monkeypatch.setitem(sys.modules, f"nunchaku{name}", module)
    for name in ("gemm", "quantize"):
        monkeypatch.setitem(sys.modules, f"nunchaku.ops.{name}", getattr(package.ops, name))

    w, x = svdq(256, 128, 32, fp4), noise(2, 3, 128).bfloat16()
    op = kernels.OPS["svdq_fp4_linear" if fp4 else "svdq_int4_linear"]
    out = next(kernel for kernel in op.kernels if kernel.reach.package == "nunchaku").load()(x, **w)
    assert relative(out, svdq_exact(x, w, fp4)) < 0.005


def test_another_package_called_nunchaku_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nunchaku", types.ModuleType("nunchaku"))
    assert kernels.choose("svdq_fp4_linear", CPU, (12, 0)) is None


# ---------------------------------------------------------------- fused formulas


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_rms_rope(eager: None, dtype: torch.dtype, limit: float) -> None:
    q, k = (noise(1, 40, 3, 128, seed=seed).to(dtype) for seed in (1, 2))
    weights = [(1 + noise(128, seed=seed) / 3).to(dtype) for seed in (3, 4)]
    angles = noise(1, 40, 1, 64, seed=5).double() * 9
    turned = (
        kernels.OPS["rms_rope"]
        .kernels[0]
        .load()(q, k, torch.polar(torch.ones_like(angles), angles).to(torch.complex64), *weights, 1e-5)
    )
    for x, weight, out in zip((q, k), weights, turned, strict=True):
        normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        even, odd = normed[..., ::2], normed[..., 1::2]
        expected = torch.stack(
            (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()), -1
        )
        assert out.dtype == dtype and relative(out, expected.flatten(-2)) < limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_rms_gated_residual(eager: None, dtype: torch.dtype, limit: float) -> None:
    x, residual = (noise(1, 40, 96, seed=seed).to(dtype) for seed in (1, 2))
    weight, gate = noise(96, seed=3).to(dtype), noise(1, 1, 96, seed=4).to(dtype)
    out = kernels.OPS["rms_gated_residual"].kernels[0].load()(x, weight, residual, gate, 1e-5)
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert relative(out, residual.double() + gate.double() * normed) < limit


@torch.no_grad()
@pytest.mark.parametrize("size", ["wide", "over_256"])
def test_the_transformer_computes_the_same_with_kernels(
    eager: None, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    _, plain = pair(size)
    fused = copy.deepcopy(plain)
    loaded = {op: kernels.OPS[op].kernels[0].load() for op in ("rms_rope", "rms_gated_residual")}
    found = []
    monkeypatch.setattr(kernels, "find", lambda op, device: found.append(op) or loaded.get(op))
    latents, captions = inputs(size, [(14, 22, 45), (8, 8, 3)])
    outs = []
    for model in (plain, fused):
        if model is plain:
            monkeypatch.setattr(model, "_use_kernels", lambda device: None)
        prepared = [model.prepare(c, x.shape[1], x.shape[2]) for x, c in zip(latents, captions, strict=True)]
        for _ in range(2):
            out = model(latents, torch.tensor([0.3]), prepared)
        outs.append(out + model(latents, torch.tensor([0.3]), prepared, negatives=prepared, nag=Nag(3.0)))
    assert len(found) == len(kernels.OPS) + 2  # once, not once for each call
    for a, b in zip(*outs, strict=True):
        assert 0 < relative(b, a) < 1e-5


def test_training_takes_the_plain_path(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find", lambda op, device: lambda *args: pytest.fail("no gradients"))
    _, model = pair("odd")
    (latent,), (caption,) = inputs("odd", [(8, 8, 3)])
    model([latent], torch.tensor([0.3]), [model.prepare(caption, 8, 8)])[0].sum().backward()
    blocks = [m for m in model.modules() if isinstance(m, (Attention, ZImageTransformerBlock))]
    assert all(block.fused == Fused() for block in blocks)


# ---------------------------------------------------------------- choosing


def test_a_cpu_computes_with_plain_torch() -> None:
    assert all(kernels.find(op, CPU) is None for op in kernels.OPS)


def test_a_working_kernel_is_chosen(eager: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for op in ("int8_linear", "svdq_int4_linear", "rms_rope"):
        assert kernels.choose(op, CPU, (8, 6)) is not None
        assert f"{op}: computed by comfy_kitchen" in caplog.text


@pytest.mark.parametrize(
    ("op", "capability"),
    [("int8_linear", (7, 0)), ("svdq_int4_linear", (9, 0)), ("svdq_fp4_linear", (8, 9)),
     ("rms_gated_residual", (8, 6)), ("svdq_int4_linear", None)],
)  # fmt: skip
def test_a_card_on_which_it_does_not_win_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, op: str, capability: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(kernels, "_comfy", lambda op: pytest.fail("asked"))
    assert kernels.choose(op, CPU, capability) is None


def failing(*arguments: object) -> torch.Tensor:
    raise RuntimeError("no such launch")


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (lambda: failing, "fails with RuntimeError: no such launch"),
        (lambda: lambda x, weight, scale, bias: F.linear(x, -weight.to(x.dtype)), "off by"),
        (lambda: lambda x, weight, scale, bias: F.linear(x, weight.to(x.dtype)) * torch.nan, "off by nan"),
        (lambda: pytest.importorskip("a_package_nobody_has", exc_type=ImportError), None),
    ],
)
def test_a_kernel_that_does_not_work_is_reported_once_and_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, load, said: str | None
) -> None:
    caplog.set_level(logging.INFO)

    def missing():
        raise ImportError("No module named 'comfy_kitchen'")

    op = kernels.OPS["int8_linear"]
    broken = kernels.Kernel(Reach("comfy_kitchen"), load if said else missing)
    monkeypatch.setitem(kernels.OPS, "int8_linear", kernels.Op(op.example, (broken,)))
    assert kernels.choose("int8_linear", CPU, (8, 6)) is None
    assert len(caplog.records) == 1 and (said or "No module named") in caplog.text


def test_without_the_package_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    assert kernels.choose("rms_rope", CPU, (8, 6)) is None


def test_only_references_are_no_kernel() -> None:
    """On a machine without a card comfy_kitchen has nothing faster than plain torch."""
    pytest.importorskip("comfy_kitchen")
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    with pytest.raises(ImportError, match="comfy_kitchen has no int8_linear"):
        kernels._comfy("int8_linear")


@torch.no_grad()
@pytest.mark.parametrize(("kernel", "expected"), [(None, 2.0), (lambda x: -x, -1.0)])
def test_find_may_stand_in_compiled_code(
    monkeypatch: pytest.MonkeyPatch, kernel: object, expected: float
) -> None:
    monkeypatch.setitem(kernels._found, ("int8_linear", CPU), kernel)
    torch._dynamo.reset()

    def linear(x: torch.Tensor) -> torch.Tensor:
        kernel = kernels.find("int8_linear", x.device)
        return x * 2 if kernel is None else kernel(x)

    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    assert compiled(torch.ones(3)).tolist() == [expected] * 3


@torch.no_grad()
def test_kernels_are_part_of_compiled_graphs(eager: None) -> None:
    """Without a break in the graph, which would cost a synchronization of Python with each layer."""
    linear, turn = (kernels.OPS[op].kernels[0].load() for op in ("int8_linear", "rms_rope"))
    weight, scale = int8_weight(noise(64, 64, seed=1))
    freqs = torch.polar(torch.ones(1, 5, 1, 16), noise(1, 5, 1, 16))

    def layer(x: torch.Tensor) -> torch.Tensor:
        q = linear(x, weight, scale, None).unflatten(-1, (2, 32))
        return turn(q, q * 2, kernels.rotations(freqs), torch.ones(32), torch.ones(32), 1e-5)[1]

    torch._dynamo.reset()
    x = noise(1, 5, 64, seed=2)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


# ---------------------------------------------------------------- float16 and compilation


def wild(dtype: torch.dtype) -> tuple:
    """The reference and ours with weights that drive hidden states and products beyond float16's range."""
    reference, ours = pair("wide")
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "layers.1." in name and name.endswith(("w1.weight", "w3.weight")):
                p.mul_(200)
            if "layers.1.ffn_norm2" in name:
                p.mul_(4e4).clamp_(-6e4, 6e4)
    reference.load_state_dict(ours.state_dict())
    return reference.to(dtype), ours.to(dtype)


@torch.no_grad()
def test_float16_stays_finite_and_close_beyond_its_range() -> None:
    reference, exact = wild(torch.float32)
    largest: dict[str, float] = {}
    for name, module in exact.layers[1].named_modules():
        module.register_forward_hook(
            lambda m, args, out, name=name: largest.update({name or "layer": out.abs().max().item()})
        )
        if name == "feed_forward.w2":
            module.register_forward_pre_hook(
                lambda m, args: largest.update({"product": args[0].abs().max().item()})
            )
    (latent,), (caption,) = inputs("wide", [(14, 22, 45)])
    t = torch.tensor([0.4])
    expected = exact([latent], t, [exact.prepare(caption, 14, 22)])[0]
    assert largest["product"] > 65504 and largest["layer"] > 65504

    naive, half = wild(torch.float16)
    broken = naive([latent.half()[:, None]], t, [caption.half()], return_dict=False)[0][0]
    assert not broken.isfinite().all()  # what plain float16 makes of it
    out = half([latent.half()], t, [half.prepare(caption.half(), 14, 22)])[0]
    assert out.dtype == torch.float16 and out.isfinite().all()
    assert relative(out, expected) < 0.01


@torch.no_grad()
def test_float16_of_a_tame_model_is_closer_than_bfloat16() -> None:
    _, exact = pair("odd")
    latents, captions = inputs("odd", [(8, 8, 3), (12, 6, 40)])
    results = []
    for model in (exact, copy.deepcopy(exact).half(), copy.deepcopy(exact).bfloat16()):
        xs, cs = ([x.to(model.dtype) for x in side] for side in (latents, captions))
        prepared = [model.prepare(c, x.shape[1], x.shape[2]) for x, c in zip(xs, cs, strict=True)]
        results.append(torch.cat([y.flatten() for y in model(xs, torch.tensor([0.3]), prepared)]))
    assert relative(results[1], results[0]) < relative(results[2], results[0]) / 3


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks_compute_the_same(backend: str) -> None:
    _, plain = pair("odd")
    compiled = copy.deepcopy(plain)
    compiled.compile(backend=backend)
    first = compiled.layers[0].forward
    compiled.compile(backend=backend)
    assert compiled.layers[0].forward is first
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for shape in [(8, 8, 3), (12, 6, 40)]:
        latents, captions = inputs("odd", [shape])
        outs = [
            m(latents, torch.tensor([0.3]), [m.prepare(captions[0], *shape[:2])])[0]
            for m in (plain, compiled)
        ]
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_new_sizes_and_captions_compile_nothing_new() -> None:
    _, model = pair("odd")
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.compile(backend=counting)
    seen = []
    for shape in [(8, 8, 3), (12, 6, 40), (16, 16, 100), (10, 14, 70)]:
        latents, captions = inputs("odd", [shape])
        model(latents, torch.tensor([0.3]), [model.prepare(captions[0], *shape[:2])])
        seen.append(len(graphs))
    assert seen == [3, 3, 3, 3]  # the caption's blocks, the image's, the main ones; not one for each layer
