"""mmgp as the engine: what its import leaves of other packages, and the internals that our cures touch.

A new version of mmgp that fails here is to be read before it is used (shared/gpu/offloading_mmgp.py).
"""

from __future__ import annotations

import gc
import importlib.metadata
import inspect
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.gpu.offloading import Residency
from shared.gpu.offloading_mmgp import VERSION, load_mmgp
from shared.gpu.placement import Placement
from tests.support.fake_cuda import FakeCuda
from tests.support.mini import ROOT
from tests.support.streamed import Model, equal, inputs

CUDA = torch.device("cuda")

ORIGINALS = """
import safetensors, safetensors.torch, transformers.modeling_utils, accelerate.utils.modeling as accelerate
places = [(m, n) for m in (safetensors, safetensors.torch, transformers.modeling_utils, accelerate)
          for n in ("safe_open", "load_file", "safe_load_file") if hasattr(m, n)]
before = [getattr(*place) for place in places]
from shared.gpu.offloading_mmgp import load_mmgp
load_mmgp()
assert len(places) >= 5 and before == [getattr(*place) for place in places]
"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    side = FakeCuda()
    side.install(monkeypatch)
    return side


def managed(model: nn.Module, placement: Placement) -> tuple[Residency, object]:
    residency = Residency(CUDA, engine="mmgp", pinned_limit=1 << 30)
    residency.place(model, placement)
    with residency.use(model):
        pass
    return residency, residency._parts[model].card


def test_its_import_leaves_other_packages_as_they_are() -> None:
    """In a process of its own, where nothing has been imported before."""
    code = "import sys" + ORIGINALS
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_version_is_the_one_that_is_known() -> None:
    assert importlib.metadata.version("mmgp") == VERSION
    assert f"mmgp=={VERSION}" in (ROOT / "requirements.txt").read_text("utf-8").split()


def test_the_internals_that_are_touched_are_there() -> None:
    mmgp = load_mmgp()
    manager = mmgp.offload
    assert list(inspect.signature(manager.gpu_load_blocks).parameters) == [
        "self", "model_id", "blocks_name", "preload",
    ]  # fmt: skip
    assert {"quantizeTransformer", "convertWeightsFloatTo", "budgets", "pinnedMemory", "partialPinning",
            "perc_reserved_mem_max", "asyncTransfers", "compile", "coTenantsMap", "verboseLevel",
            } <= set(inspect.signature(mmgp.all).parameters)  # fmt: skip
    for name in ("ensure_model_loaded", "release"):
        assert callable(getattr(manager, name))
    assert isinstance(mmgp.total_pinned_bytes, int) and isinstance(mmgp.max_pinnable_bytes, int)


def test_the_names_that_it_compares_still_differ() -> None:
    """The defect that `_follows` repairs: a key with the model's name, compared with one without it."""
    source = inspect.getsource(load_mmgp().offload.add_module_to_blocks)
    assert 'model_id + "/" + prev_block_name' in source
    assert "prev != loaded_block" in inspect.getsource(load_mmgp().offload.gpu_load_blocks)


def test_each_block_travels_once_per_step_and_no_more_than_two_are_there(fake: FakeCuda) -> None:
    """Two lists in turn, as a step goes over the refiner and the layers."""
    model = Model(first=2, layers=8, tied=False)
    residency, card = managed(model, Placement(4))
    sizes = card._manager.blocks_of_modules_sizes
    streamed = sum(sizes[entry] for entry in card._passes)
    largest = max(sizes[entry] for entry in card._passes)
    with torch.inference_mode(), residency.use(model):
        for _ in range(2):  # the order is learned, and the first block is fetched ahead, too
            model(inputs())
        stays, before = fake.live, fake.moved
        fake.peak = fake.live
        for _ in range(6):
            model(inputs())
        assert fake.moved - before == 6 * streamed
        assert fake.peak <= stays + largest
        assert card._manager.next_blocks_names[card._passes[-1]] == card._passes[0]  # ahead of the next pass
        for order in ([9, 4, 0, 7, 2], [1, 1, 8, 3]):  # what was fetched in vain makes room
            fake.peak = fake.live
            model(inputs(), order)
            assert fake.peak <= sum(sizes.values()) - streamed + 2 * largest
    assert fake.live == residency.status().on_card["Model"]
    assert fake.live == sum(sizes.values()) - streamed


def test_one_wait_for_each_block_and_none_for_what_stays(fake: FakeCuda) -> None:
    model = Model(first=0, layers=6, tied=False)
    residency, _ = managed(model, Placement(4))
    with torch.inference_mode(), residency.use(model):
        model(inputs())
        before = fake.waits
        model(inputs())
    assert fake.waits - before == 2


def test_fp32_arguments_keep_their_dtype(fake: FakeCuda) -> None:
    """mmgp's own hooks would cast a timestep of 314.1 to 314 in bfloat16."""

    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedder = nn.Linear(1, 4).bfloat16()
            self.layers = nn.ModuleList(nn.Linear(4, 4).bfloat16() for _ in range(6))
            self.seen: list[torch.dtype] = []

        def forward(self, t: Tensor) -> Tensor:
            self.seen.append(t.dtype)
            x = self.embedder(t.bfloat16())
            for layer in self.layers:
                x = layer(x)
            return x

    model = Timed()
    residency, _ = managed(model, Placement(0))
    with torch.inference_mode(), residency.use(model):
        model(torch.tensor([[314.1]]))
    assert model.seen == [torch.float32]


def test_buffers_that_are_not_saved_stay_so(fake: FakeCuda) -> None:
    model = Model(tied=False)
    before = list(model.state_dict())
    residency, _ = managed(model, Placement(0))
    with torch.inference_mode(), residency.use(model):
        model(inputs())
    residency.evict()
    assert list(model.state_dict()) == before


def test_page_locked_memory_goes_with_the_part(fake: FakeCuda) -> None:
    model = Model(tied=False)
    residency = managed(model, Placement(0))[0]
    assert residency.status().pinned == fake.pinned > 0
    residency.forget()
    assert residency.status().pinned == 0
    del model
    gc.collect()
    assert fake.pinned == fake.live == 0


@pytest.mark.parametrize("pinnable", [0, 1 << 27, None])
@torch.inference_mode()
def test_ram_that_cannot_be_locked(pinnable: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """mmgp asks for blocks of 64 MiB at least; what the system refuses goes from ordinary RAM."""
    side = FakeCuda(pinnable=pinnable)
    side.install(monkeypatch)
    model = Model(tied=False)
    plain = model(inputs())
    residency, _ = managed(model, Placement(0))
    with residency.use(model):
        assert equal(model(inputs()), plain)
    assert (side.pinned >= 1 << 26) == (pinnable is None)


def test_compiled_by_its_own_parameter(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile()` of the blocks becomes mmgp's: the blocks' forward alone, with the loading before it."""
    compiled: list[str] = []

    def compile_(function: object, **options: object) -> object:
        assert options == {"backend": "inductor", "mode": "default"}
        compiled.append(type(function.__self__).__name__)  # type: ignore[attr-defined]
        return function

    model = Model(first=2, layers=6, tied=False)
    with torch.inference_mode():
        plain = model(inputs())
    for block in model.blocks():
        block.compile(backend=lambda graph, _: pytest.fail("this one is not to run"))
    monkeypatch.setattr(torch, "compile", compile_)
    calls = [block._compiled_call_impl for block in model.blocks()]
    fake.watch(model.blocks())
    residency, _ = managed(model, Placement(3))
    assert compiled == ["Block"] * 8
    with torch.inference_mode(), residency.use(model):
        for _ in range(2):
            assert equal(model(inputs()), plain)
    residency.evict()
    assert fake.live == 0
    assert [block._compiled_call_impl for block in model.blocks()] == calls
    assert not any(block._forward_pre_hooks for block in model.blocks())


def test_without_it_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mmgp", None)
    load_mmgp.cache_clear()
    try:
        with pytest.raises(UserError, match=r"--offload stream"):
            load_mmgp()
    finally:
        load_mmgp.cache_clear()
