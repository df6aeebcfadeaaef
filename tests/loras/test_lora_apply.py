"""LoRAs beside an untouched base against weights with the deltas merged in, on a small real transformer."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.z_image.checkpoints.lora_names import model_names
from models.z_image.transformer_z_image import (
    Fused,
    ZImageConfig,
    ZImageTransformer2DModel,
    use_fused,
)
from shared.errors import UserError
from shared.gpu import kernels
from shared.loras import apply
from shared.loras.apply import attach, detach, norm_weight, set_multipliers
from shared.loras.reader import LoraFile, read
from tests.support.lora_writers import (
    CONFIG,
    DIM,
    EVERYWHERE,
    OTHERS,
    SHAPES,
    WRITERS,
    Style,
    deltas,
    dora,
    factors,
    loha,
    save,
)

NAMES = model_names(CONFIG)
TOLERANCE = 1e-5  # relative, float32: the sums are the same in another order
Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def base() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(ZImageConfig.from_dict(CONFIG)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or "pad_token" in name:
                p.add_(torch.randn_like(p) * 0.3)
    return model


@pytest.fixture
def model(base: ZImageTransformer2DModel) -> ZImageTransformer2DModel:
    return copy.deepcopy(base)


@torch.no_grad()
def run(model: ZImageTransformer2DModel, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(1)
    latent, caption = torch.randn(16, 8, 6, generator=g), torch.randn(9, 40, generator=g)
    prepared = model.prepare(caption.to(dtype), 8, 6)
    return model([latent.to(dtype)], torch.tensor([0.4]), [prepared])[0].float()


@torch.no_grad()
def merged(model: ZImageTransformer2DModel, changes: Sequence[tuple[Mapping[str, Tensor | Change], float]]):
    """A copy whose weights are W + sum of strength * change(W), every change from the untouched W."""
    out = copy.deepcopy(model)
    detach(out)
    for changed, strength in changes:
        for name, change in changed.items():
            weight = model.get_submodule(name).weight
            delta = change if isinstance(change, Tensor) else change(weight)
            out.get_submodule(name).weight += strength * delta
    return out


def far(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def lora(path: Path, flavour: str = "ai-toolkit", **options: object) -> LoraFile:
    return read(save(path, WRITERS[flavour][0](factors(**options))), NAMES)  # type: ignore[arg-type]


@pytest.mark.parametrize("flavour", ["ai-toolkit", "musubi", "ComfyUI, down and up", "Nunchaku", "Anime-Z"])
@pytest.mark.parametrize("strength", [1.0, -0.6])
def test_plain_loras_equal_merged_weights(model, flavour: str, strength: float, tmp_path: Path) -> None:
    attach(model, [(lora(tmp_path / "a.safetensors", flavour), strength)])
    expected = run(merged(model, [(deltas(factors()), strength)]))
    assert far(run(model), expected) < TOLERANCE
    detach(model)
    assert far(run(model), expected) > 0.05  # or there was nothing to see


def test_every_linear_can_have_one(model, tmp_path: Path) -> None:
    attach(model, [(lora(tmp_path / "a.safetensors", "OneTrainer legacy", shapes=EVERYWHERE), 0.8)])
    assert far(run(model), run(merged(model, [(deltas(factors(EVERYWHERE)), 0.8)]))) < TOLERANCE


@pytest.mark.parametrize("flavour", OTHERS)
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_other_algorithms_equal_merged_weights(model, flavour: str, strength: float, tmp_path: Path) -> None:
    other = OTHERS[flavour][0]()
    path = save(tmp_path / "a.safetensors", (other.tensors, other.metadata))
    attach(model, [(read(path, NAMES), strength)])
    expected = run(merged(model, [(other.change, strength)]))
    assert far(run(model), expected) < TOLERANCE
    detach(model)
    assert far(run(model), expected) > 0.01


def test_a_dropped_magnitude_or_swapped_halves_are_seen(model, tmp_path: Path) -> None:
    """The comparison must fail where the reader's classic mistakes are made."""
    other = dora()
    tensors = {key: value for key, value in other.tensors.items() if "dora" not in key}
    attach(model, [(read(save(tmp_path / "a.safetensors", (tensors, {})), NAMES), 1.0)])
    assert far(run(model), run(merged(model, [(other.change, 1.0)]))) > 0.01
    given = factors()
    swapped = {
        name.replace("w1", "w0").replace("w3", "w1").replace("w0", "w3"): one for name, one in given.items()
    }
    attach(model, [(read(save(tmp_path / "b.safetensors", Style("transformer.")(swapped)), NAMES), 1.0)])
    assert far(run(model), run(merged(model, [(deltas(given), 1.0)]))) > 0.01


def test_twelve_loras_are_one_pair_of_matrices(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flavours = ("ai-toolkit", "musubi", "DiffSynth", "VideoX-Fun")
    files = [lora(tmp_path / f"{i}.safetensors", flavours[i % 4], seed=i, rank=1 + i % 3) for i in range(12)]
    strengths = [0.1 * (i - 5) for i in range(12)]
    attach(model, list(zip(files, strengths, strict=True)))
    references = [(deltas(factors(seed=i, rank=1 + i % 3)), strengths[i]) for i in range(12)]
    assert far(run(model), run(merged(model, references))) < TOLERANCE
    (side,) = model.layers[0].attention.to_q.lora
    assert side.down.shape == (24, DIM) and side.up.shape == (DIM, 24)
    calls: list[int] = []
    real = F.linear
    monkeypatch.setattr(apply.F, "linear", lambda *args: calls.append(1) or real(*args))
    with torch.no_grad():
        side(torch.ones(1, DIM), torch.zeros(1, DIM))
    assert len(calls) == 1  # the second product is made in place


def test_rank_256(model, tmp_path: Path) -> None:
    attach(model, [(lora(tmp_path / "a.safetensors", rank=256, alpha=16.0), 1.0)])
    assert far(run(model), run(merged(model, [(deltas(factors(rank=256, alpha=16.0)), 1.0)]))) < TOLERANCE


def test_all_kinds_together(model, tmp_path: Path) -> None:
    """Each change is of the untouched weight, so the order of the files is of no account."""
    files, changes = [], []
    for i, flavour in enumerate(OTHERS):
        other = OTHERS[flavour][0]()
        files.append((read(save(tmp_path / f"{i}.safetensors", (other.tensors, {})), NAMES), 0.1))
        changes.append((other.change, 0.1))
    expected = run(merged(model, changes))
    attach(model, files)
    assert far(run(model), expected) < TOLERANCE
    attach(model, files[::-1])
    assert far(run(model), expected) < TOLERANCE


def test_norms_and_biases_are_changed_without_touching_them(model, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(2)
    norms = {"layers.0.attention.norm_q": 32, "layers.1.ffn_norm1": DIM, "cap_embedder.0": 40}
    biases = {
        "layers.0.adaLN_modulation.0": 4 * DIM,
        "t_embedder.mlp.0": 1024,
        "layers.0.attention.to_q": DIM,
    }
    given = {name: torch.randn(size, generator=g) * 0.3 for name, size in (norms | biases).items()}
    tensors = {
        f"diffusion_model.{name}.{'diff' if name in norms else 'diff_b'}": d for name, d in given.items()
    }
    file = read(save(tmp_path / "a.safetensors", (tensors, {})), NAMES)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, delta in given.items():
            layer = expected.get_submodule(name)
            if name in norms:
                layer.weight += 0.7 * delta
            elif layer.bias is None:
                layer.bias = nn.Parameter(0.7 * delta)
            else:
                layer.bias += 0.7 * delta
    before = {name: p.clone() for name, p in model.named_parameters()}
    attach(model, [(file, 0.7)])
    assert far(run(model), run(expected)) < TOLERANCE
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for name in norms:
        assert torch.allclose(norm_weight(model.get_submodule(name)), expected.get_submodule(name).weight)
    assert norm_weight(model.layers[0].ffn_norm2) is model.layers[0].ffn_norm2.weight


def test_kernels_that_norm_by_themselves_see_what_loras_add(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logic: stand-ins for the card's kernels get the changed weights."""

    def rms_rope(q, k, turns, q_weight, k_weight, eps):
        def turned(x, weight):
            pairs = F.rms_norm(x, weight.shape, weight, eps).unflatten(-1, (-1, 2))
            return torch.einsum("...ij,...j->...i", turns, pairs).flatten(-2)

        return turned(q, q_weight), turned(k, k_weight)

    def rms_gated_residual(h, weight, x, gate, eps):
        return x + gate * F.rms_norm(h, weight.shape, weight, eps)

    ops = {"rms_rope": rms_rope, "rms_gated_residual": rms_gated_residual}
    norms = {"layers.0.attention.norm_q": 32, "layers.1.attention.norm_k": 32, "layers.0.ffn_norm2": DIM}
    g = torch.Generator().manual_seed(2)
    tensors = {f"diffusion_model.{name}.diff": torch.randn(n, generator=g) for name, n in norms.items()}
    attach(model, [(read(save(tmp_path / "a.safetensors", (tensors, {})), NAMES), 0.7)])
    plain = run(model)
    set_multipliers(model, [0.0])
    without = run(model)
    monkeypatch.setattr(kernels, "find", lambda op, device: ops.get(op))
    model.fused = Fused(**ops)
    use_fused(model, model.fused)
    monkeypatch.setattr(model, "_use_kernels", lambda device: None)
    assert far(run(model), without) < TOLERANCE
    set_multipliers(model, [0.7])
    assert far(run(model), plain) < TOLERANCE < far(plain, without)


def test_strength_0_and_detach_are_bit_identical(model, base, tmp_path: Path) -> None:
    plain, other = run(base), OTHERS["DoRA, LyCORIS"][0]()
    files = [
        lora(tmp_path / "a.safetensors"),
        read(save(tmp_path / "b.safetensors", (other.tensors, {})), NAMES),
    ]
    attach(model, [(file, 0.0) for file in files])
    assert torch.equal(run(model), plain)
    set_multipliers(model, [1.0, 0.5])
    assert not torch.equal(run(model), plain)
    set_multipliers(model, [0, 0])
    assert torch.equal(run(model), plain)
    set_multipliers(model, [1, 1])
    detach(model)
    assert torch.equal(run(model), plain)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in base.named_modules()]
    for (_, ours), (_, theirs) in zip(model.named_modules(), base.named_modules(), strict=True):
        assert type(ours) is type(theirs) and vars(ours).keys() == vars(theirs).keys()
    detach(model)  # of nothing
    set_multipliers(model, [])
    attach(model, [])
    assert torch.equal(run(model), plain)


def test_what_has_strength_0_is_not_even_computed(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = OTHERS["LoKr, dotted"][0]()
    files = [
        lora(tmp_path / "a.safetensors"),
        read(save(tmp_path / "b.safetensors", (other.tensors, {})), NAMES),
    ]
    attach(model, [(file, 0.0) for file in files])
    for side in (apply.LowRankSide, apply.Side):
        monkeypatch.setattr(side, "forward", None)
    run(model)
    set_multipliers(model, [0.0, 0.1])
    with pytest.raises(TypeError):
        run(model)


def test_strengths_change_without_packing_anything(model, tmp_path: Path) -> None:
    files = [(lora(tmp_path / f"{i}.safetensors", seed=i), 1.0) for i in range(2)]
    attach(model, files)
    places = {name: b.data_ptr() for name, b in model.named_buffers()}
    gains = {id(strength.values) for strength in model.lora_strengths.known.values()}
    assert len(gains) == 1  # all layers share one small tensor
    for strengths in ([0.2, 0.0], [-1.0, 0.7]):
        set_multipliers(model, strengths)
        expected = merged(model, [(deltas(factors(seed=i)), strengths[i]) for i in range(2)])
        assert far(run(model), run(expected)) < TOLERANCE
    assert places == {name: b.data_ptr() for name, b in model.named_buffers()}
    assert gains == {id(strength.values) for strength in model.lora_strengths.known.values()}
    with pytest.raises(ValueError, match="1 strengths for 2 LoRAs"):
        set_multipliers(model, [1.0])
    with torch.inference_mode():
        run(model)
    set_multipliers(model, [0.0, 0.0])


def test_the_factors_are_buffers_of_the_blocks_and_in_no_state_dict(model, base, tmp_path: Path) -> None:
    """So a streamer that moves a block's parameters and buffers moves its LoRAs along."""
    keys = base.state_dict().keys()
    attach(model, [(lora(tmp_path / "a.safetensors"), 1.0)])
    names = [name for name, _ in model.layers[0].named_buffers()]
    assert "attention.to_q.lora.0.down" in names and len(names) == 2 * len(SHAPES) // 2
    assert model.state_dict().keys() == keys
    expected = run(model)
    for block in model.layers:  # what a streamer does: new storage for everything that is registered
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.data = tensor.data.clone()
    assert torch.equal(run(model), expected)


class Quantized(nn.Module):
    """A linear that stores its weight in 8 bits, as the program's own do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight = linear.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("weight_scale", scale)

    def dequantized(self) -> Tensor:
        return self.weight.float() * self.weight_scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)


@pytest.mark.parametrize(
    "flavour", ["DoRA, OneTrainer", "DoRA, LyCORIS", "OFT, PEFT", "LoKr, dotted", "LoHa, musubi"]
)
def test_quantized_linears(model, flavour: str, tmp_path: Path) -> None:
    whole = copy.deepcopy(model)
    for name in SHAPES:
        parent, _, last = name.rpartition(".")
        small = Quantized(model.get_submodule(name))
        setattr(model.get_submodule(parent), last, small)
        whole.get_submodule(name).weight.data = small.dequantized()
    other, given = OTHERS[flavour][0](), factors(seed=3)
    files = [
        (read(save(tmp_path / "a.safetensors", (other.tensors, {})), NAMES), 0.8),
        (lora(tmp_path / "b.safetensors", seed=3), 1.0),
    ]
    attach(model, files)
    assert far(run(model), run(merged(whole, [(other.change, 0.8), (deltas(given), 1.0)]))) < TOLERANCE
    plain = run(whole)
    detach(model)
    assert torch.equal(run(model), plain) and type(model.layers[0].attention.to_q) is Quantized


def test_bf16_is_as_close_as_bf16_allows(model, tmp_path: Path) -> None:
    """Beside the base, bfloat16 is no further from float32 than with weights merged and then rounded."""
    exact = merged(model, [(deltas(factors()), 0.7)])
    expected, rounded = run(exact), run(exact.to(torch.bfloat16), torch.bfloat16)
    model.to(torch.bfloat16)
    attach(model, [(lora(tmp_path / "a.safetensors", "musubi"), 0.7)])
    assert model.layers[0].attention.to_q.lora[0].down.dtype == torch.bfloat16
    assert far(run(model, torch.bfloat16), expected) < 1.5 * far(rounded, expected)


def test_a_wide_loha_is_made_on_the_fly(model, tmp_path: Path) -> None:
    other = loha(12)
    attach(model, [(read(save(tmp_path / "a.safetensors", (other.tensors, {})), NAMES), 1.0)])
    (side,) = model.layers[0].attention.to_q.lora
    assert isinstance(side.change, apply.LoHaChange)
    assert sum(b.numel() for b in side.buffers()) == 4 * 12 * DIM


def test_compiled_blocks_see_loras_that_come_and_go(model, base, tmp_path: Path) -> None:
    given = deltas(factors())
    expected = {s: run(merged(base, [(given, s)])) for s in (1.0, 0.3)}
    torch._dynamo.reset()
    model.compile(backend="eager", fullgraph=True)
    plain = run(model)
    attach(model, [(lora(tmp_path / "a.safetensors"), 1.0)])
    assert far(run(model), expected[1.0]) < TOLERANCE
    set_multipliers(model, [0.3])
    assert far(run(model), expected[0.3]) < TOLERANCE
    detach(model)
    assert far(run(model), plain) < TOLERANCE


def test_a_strength_that_changes_compiles_nothing_anew(model, tmp_path: Path) -> None:
    torch._dynamo.reset()
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        compiled.append(graph)
        return graph.forward

    model.compile(backend=backend)
    attach(model, [(lora(tmp_path / "a.safetensors"), 1.0)])
    run(model)
    before = len(compiled)
    for strength in (0.9, 0.5, -1.0):
        set_multipliers(model, [strength])
        run(model)
    assert len(compiled) == before


def test_a_module_that_the_model_lacks_is_named_and_nothing_is_attached(model, base, tmp_path: Path) -> None:
    names = model_names(CONFIG | {"n_layers": 3})
    given = factors({"layers.0.attention.to_q": (DIM, DIM), "layers.2.attention.to_q": (DIM, DIM)})
    file = read(save(tmp_path / "a.safetensors", Style("")(given)), names)
    with pytest.raises(UserError, match="a.safetensors changes layers.2.attention.to_q"):
        attach(model, [(file, 1.0)])
    assert torch.equal(run(model), run(base))
