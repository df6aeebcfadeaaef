"""One job on the card that is not there: the program's own `load_model` and `generate`, on files without
data.

What stands in for it: numbers that schedules are computed from stay real, and a `Residency` from RESIDENCIES
brings the parts to the card.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import inspect
import textwrap
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from models.z_image import pipeline_inputs
from models.z_image.family import SAMPLER_SETTINGS
from models.z_image.z_image_handler import family_handler
from shared.gpu import kernels, placement
from shared.gpu.offloading import Residency
from shared.gpu.offloading_mmgp import ManagedPart, load_mmgp
from shared.gpu.placement import Placement
from shared.loras import strengths
from shared.settings.table import SETTINGS
from shared.weights import quantized
from shared.weights.files import Folders
from tests.support.fake_card import card
from tests.support.fake_card.card import CUDA, ROOT, FakeCard
from tests.support.fake_card.cases import CASES, COUNTED, MASK, PICTURE, REFUSED, Case, Mutation
from tests.support.fake_card.holes import CONTROLS, Files
from tests.support.fake_card.report import FIRST_STEP, STEP, Refused, Report

STRENGTHS = "0.5,0.8"  # of a LoRA, over the steps
_mode = FakeTensorMode(allow_non_fake_inputs=True)
_folder = Path()  # of the files
_parts: dict[Hashable, Any] = {}  # that jobs share
_on_card = WeakTensorKeyDictionary()  # a tensor in RAM -> what it is there


def begin(folder: Path) -> None:
    """In a process of its own, once: insert the card. folder: for the files."""
    global _folder
    _folder = folder
    load_mmgp()._get_tensor_ref = id  # tensors without memory have no address
    card.insert(folder)
    torch.set_num_threads(1)
    kernels.find = lambda op, device: None  # plain torch: of the kernels, their own tests tell
    pipeline_inputs.make_sigmas = _with_values(pipeline_inputs.make_sigmas)
    placement.Tensor = FakeTensor  # the type that it demands of weights
    quantized.quantize_int8 = _without_values(quantized.quantize_int8)
    quantized._reorder = lambda stored, *_: stored.reshape(-1)
    for size, name in ((side, kind) for side in (512, 1024) for kind in (PICTURE, MASK)):
        _picture(name, size).save(_picture_path(name, size))


def _with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def real(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return real


def _without_values(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def fake(*args: Any, **kwargs: Any) -> Any:
        with _mode:
            return function(*args, **kwargs)

    return fake


def _picture_path(name: str, side: int) -> Path:
    return _folder / f"{name}{side}.png"


def _picture(name: str, side: int) -> Image.Image:
    if name == PICTURE:
        return Image.new("RGB", (side, side), "grey")
    mask = Image.new("L", (side, side), "black")
    mask.paste("white", (side // 4, side // 4, side // 2, side // 2))
    return mask


def run(name: str, mutation: str = "") -> Report:
    """Drive a job of CASES, with a fault of REFUSED or COUNTED. Raises Refused, or what the program does."""
    case, watched = CASES[name], FakeCard()
    gc.freeze()  # what there is now stays, and need not be looked at by the collections of garbage
    try:
        return _run(case, watched, mutation)
    except RuntimeError as error:
        places = [f for f in traceback.extract_tb(error.__traceback__) if card.short_name(f.filename)]
        where = " < ".join(f"{card.short_name(f.filename)}:{f.lineno}" for f in places[::-1])
        raise Refused(f"{watched.phase}: {type(error).__name__}: {error} ({where})") from None


def _run(case: Case, watched: FakeCard, mutation: str) -> Report:
    with contextlib.ExitStack() as stack:
        if mutation:
            stack.enter_context(_mutated((REFUSED | COUNTED)[mutation]))
        processor = _load(case, watched)
        stack.enter_context(_mode)
        stack.enter_context(watched)
        stack.callback(processor.pipe.residency.forget)
        result = processor.generate(
            _settings(case),
            seeds=range(1, case.pictures + 1),
            on_phase=functools.partial(_on_phase, watched),
            on_step=functools.partial(_on_step, watched),
            interrupt=lambda: False,
        )
    return watched.report([image.size for image in result.images])


def _load(case: Case, watched: FakeCard) -> Any:
    files = Files(_folder, case.layers)
    chosen = [files.transformer(case.file), *([files.control(case.control)] if case.control else [])]
    model_def = {**case.model_def, "transformer_config": files.config}
    files.vae()
    residency = RESIDENCIES[case.residency](CUDA, watched)

    def share(role: str, files: Sequence[Path], config: Hashable, make: Callable[[], Any]) -> Any:
        if role == "residency":
            return residency
        key = (role, *files, config)
        if key not in _parts:
            _parts[key] = make()
        return _parts[key]

    processor, pipe = family_handler.load_model(
        chosen,
        case.model,
        model_def,
        quantizeTransformer=case.quantize,
        dtype=getattr(torch, case.dtype) if case.dtype else None,
        VAE_dtype=getattr(torch, case.vae_dtype) if case.vae_dtype else None,
        text_encoder_filename=files.text_encoder(case.int8_encoder),
        device=CUDA,
        prompt_cache=None,
        share=share,
        folders=Folders(ROOT, files.folder),
    )
    if case.control:
        assert pipe.control.layout.refiner == CONTROLS[case.control][-1]
    pipe.vae_tile = case.tile
    assert pipe.text_encoder is not None  # loaded here, before anything is watched
    names = family_handler.query_lora_names(case.model, model_def)
    loras = [files.lora()] if case.lora else []
    processor.use_loras(loras, strengths.parse(STRENGTHS if loras else "", len(loras)), names)
    return processor


def _settings(case: Case) -> dict[str, Any]:
    left_out = () if case.unified else ("sample_solver", *SAMPLER_SETTINGS)
    settings = {name: one.default for name, one in SETTINGS.items() if name not in left_out}
    settings |= {
        "prompt": "a red circle above a blue square", "resolution": f"{case.size}x{case.size}",
        "num_inference_steps": case.steps, "guidance_scale": 0.0, **case.settings,
    }  # fmt: skip
    paths = {name: str(_picture_path(name, case.size)) for name in (PICTURE, MASK)}
    return {key: paths[value] if value in (PICTURE, MASK) else value for key, value in settings.items()}


def _on_phase(watched: FakeCard, phase: str) -> None:
    watched.phase = FIRST_STEP if phase.endswith("Denoising") else phase


def _on_step(watched: FakeCard, number: int, total: int, previews: Callable[[], Any]) -> None:
    watched.phase = "preview"
    previews()
    watched.phase = f"{STEP}{number + 1}" if number < total else "end"


@contextlib.contextmanager
def _mutated(mutation: Mutation) -> Iterator[None]:
    """The program with the fault, inside."""
    module_name, _, path = mutation.place.partition(":")
    module = importlib.import_module(module_name)
    owner_path, _, name = path.rpartition(".")
    owner = functools.reduce(getattr, filter(None, owner_path.split(".")), module)
    source = textwrap.dedent(inspect.getsource(inspect.getattr_static(owner, name)))
    assert source.count(mutation.before) == 1, f"{mutation.place} was rewritten: see {mutation.before!r}"
    found: dict[str, Any] = {}
    exec(compile(source.replace(mutation.before, mutation.after), path, "exec"), vars(module), found)
    with patch.object(owner, name, found[name]):
        yield


# ---- how parts get to the card


class WholeParts:
    """A Residency that brings a part to the card as a whole while it is in use; what of it goes there is
    asked of the engine itself. As Residency, it is one for all parts."""

    def __init__(self, device: torch.device, watched: FakeCard) -> None:
        self.device, self._watched = device, watched

    def place(self, part: nn.Module, placement: Placement) -> None: ...

    def evict(self, part: nn.Module | None = None) -> None: ...

    refresh = forget = evict

    @contextlib.contextmanager
    def use(self, part: nn.Module) -> Iterator[None]:
        moving = {id(x) for tensors in placement.tensors_by_unit(part).values() for x in tensors}
        tables = [table for module in part.modules() for table in (module._parameters, module._buffers)]
        homes = [(table, name, x) for table in tables for name, x in table.items() if id(x) in moving]
        with self._watched.during(card.MOVING):
            for table, name, x in homes:
                table[name] = self._moved(x)
        try:
            yield
        finally:
            for table, name, x in homes:
                table[name] = x


    def _moved(self, x: Tensor) -> Tensor:
        if x not in _on_card:
            there = x.detach().to(self.device)
            is_parameter = isinstance(x, nn.Parameter)
            _on_card[x] = nn.Parameter(there, requires_grad=False) if is_parameter else there
        return _on_card[x]


class ByMmgp(Residency):
    """The real one, with mmgp as the engine: every block is streamed. Its copies of weights are not noted."""

    def __init__(self, device: torch.device, watched: FakeCard) -> None:
        super().__init__(device, engine="mmgp", pinned_limit=0)
        self._watched = watched

    @contextlib.contextmanager
    def use(self, part: nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            with self._watched.during(card.MOVING):
                self.place(part, Placement(0, pinned=False))
                stack.enter_context(super().use(part))
                self._quieten(self._parts[part].card)
            yield

    def _quieten(self, managed: Any) -> None:
        """Its copies in the middle of a step, too."""
        assert isinstance(managed, ManagedPart)
        copy = managed._load_blocks

        def quiet(*arguments: Any) -> None:
            with self._watched.during(card.MOVING):
                copy(*arguments)

        managed._load_blocks = quiet


#: how a case's parts get to the card: from a device and what watches it to what a pipeline's `residency` is
RESIDENCIES: dict[str, Callable[[torch.device, FakeCard], Any]] = {"whole": WholeParts, "mmgp": ByMmgp}
