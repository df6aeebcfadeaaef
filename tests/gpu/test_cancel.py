"""A wish to stop is heard while files are loaded and prompts are encoded, within a layer's time."""

from __future__ import annotations

import builtins
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.z_image import loading as z_image_loading
from models.z_image.checkpoints import weight_names
from models.z_image.transformer_z_image import ZImageTransformer2DModel
from shared.errors import Cancelled
from shared.gpu import interrupt, machine
from shared.weights import loading
from shared.weights.files import Folders
from shared.weights.loading import build
from shared.worker.model_manager import ModelHost, Silent
from tests.support import mini, packers
from tests.support.tiny_formats import CONFIG, FORMATS

CPU = torch.device("cpu")


class Wish:
    """Answers no so many times, then yes; `asked` counts."""

    def __init__(self, after: int) -> None:
        self.after, self.asked = after, 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked > self.after


class Report(Silent):
    def __init__(self, wish: Callable[[], bool]) -> None:
        self.cancelled = wish  # type: ignore[method-assign]


def whole_model() -> ZImageTransformer2DModel:
    return build(lambda: ZImageTransformer2DModel(CONFIG))


def test_nobody_asks_without_a_listener_and_an_inner_one_takes_over() -> None:
    interrupt.check()
    outer, inner = Wish(100), Wish(2)
    with interrupt.listening(outer):
        with interrupt.listening(None):
            interrupt.check()
        assert outer.asked == 3
        with pytest.raises(Cancelled), interrupt.listening(inner):
            interrupt.check()
            interrupt.check()
        interrupt.check()
    assert (outer.asked, inner.asked) == (4, 3)
    interrupt.check()
    with pytest.raises(Cancelled), interrupt.listening(lambda: True):
        raise AssertionError("not reached")


def test_a_slow_import_goes_on_alone_when_its_job_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    go_on, begun = threading.Event(), threading.Event()
    monkeypatch.setattr(builtins, "the_tests_events", (begun, go_on), raising=False)
    (tmp_path / "slow_to_import.py").write_text(
        "import builtins\nbegun, go_on = builtins.the_tests_events\n"
        "begun.set()\ngo_on.wait(60)\ndone = True\n"
    )
    with pytest.raises(Cancelled), interrupt.listening(begun.is_set):
        interrupt.imported("slow_to_import")
    go_on.set()
    with interrupt.listening(lambda: False):
        assert interrupt.imported("slow_to_import").done
    with pytest.raises(ModuleNotFoundError), interrupt.listening(lambda: False):
        interrupt.imported("no_such_module_as_this")


@pytest.mark.parametrize("form", ["bf16", "int8, map in the header", "int4"])
def test_loading_asks_before_every_tensor(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-way it stops, and no further tensor is read."""
    files, _ = FORMATS[form][1](tmp_path, packers.tiny_state())
    reads: list[str] = []
    real = loading._Reader._stored
    monkeypatch.setattr(
        loading._Reader, "_stored", lambda self, entry: reads.append(entry.source) or real(self, entry)
    )

    def load(wish: Wish) -> None:
        with interrupt.listening(wish):
            loading.load_weights(whole_model(), files, dtype=torch.float32, names=weight_names.TRANSFORMER)

    whole = Wish(10_000)
    load(whole)
    modules = {name.rpartition(".")[0] for name, _ in whole_model().named_parameters()}
    assert whole.asked >= len(modules)
    every, reads[:] = len(reads), []
    with pytest.raises(Cancelled):
        load(Wish(whole.asked // 2))
    assert 0 < len(reads) < 0.75 * every


def test_quantizing_asks_before_every_layer(tmp_path: Path) -> None:
    files, _ = FORMATS["bf16"][1](tmp_path, packers.tiny_state())
    model = whole_model()
    loading.load_weights(model, files, dtype=torch.float32, names=weight_names.TRANSFORMER)
    with pytest.raises(Cancelled), interrupt.listening(Wish(4)):
        loading.quantize(model, weight_names.TRANSFORMER)
    assert sum(type(m).__name__ == "Int8Linear" for m in model.modules()) == 3


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> ModelHost:
    monkeypatch.setattr(z_image_loading, "default_device", lambda: CPU)
    return ModelHost(Folders(mini.ROOT, mini.ROOT / "ckpts"), machine=lambda: machine.survey("cpu"))


def test_a_job_cancelled_while_its_model_loads_stops_there_and_the_next_one_runs(host: ModelHost) -> None:
    whole = Wish(10_000)
    host.get("z_image_mini", Report(whole))
    host.release()
    for after in (0, 3, whole.asked // 2, whole.asked - 1):
        with pytest.raises(Cancelled):
            host.get("z_image_mini", Report(Wish(after)))
        host.release()  # the parts that were there already
    assert host.get("z_image_mini", Silent()).pipe.transformer.layers[0].feed_forward.w1.weight.device == CPU


def test_encoding_asks_before_every_layer_of_the_encoder() -> None:
    """Nothing of a prompt that was not encoded to its end is kept."""
    definition = mini.model_def("z_image_mini")
    _, pipe = mini.family_handler.load_model(
        definition["URLs"][0], definition["architecture"], definition, device="cpu", prompt_cache=None
    )
    layers = pipe.text_encoder.layers
    run: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))

    def draw(wish: Callable[[], bool]) -> Any:
        return pipe("a red circle", height=64, width=64, num_inference_steps=1, interrupt=wish)

    for after in range(1 + len(layers)):
        run.clear()
        with pytest.raises(Cancelled):
            draw(Wish(after))
        assert run == list(range(max(0, after - 1)))
    assert draw(lambda: False).images


def test_the_refiner_of_captions_asks_too() -> None:
    _, pipe = mini.load()
    features = torch.randn(5, 96)
    blocks = len(pipe.transformer.context_refiner)
    with torch.inference_mode(), pytest.raises(Cancelled), interrupt.listening(Wish(blocks)):
        pipe.transformer.prepare(features, 8, 8)
