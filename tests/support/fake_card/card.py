"""The card: tensors have shape, dtype and device only, and what a real card refuses is refused.

torch's FakeTensorMode refuses operators that mix devices. `FakeCard` lies above it: it refuses mixed dtypes
where a card's kernels do, answers what Python asks of values, and notes every kernel, every copy between RAM
and card, and every answer that Python waits for. Not covered: values, memory, streams.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves, tree_leaves

from tests.support.fake_card.report import Note, Report

ROOT = Path(__file__).resolve().parents[3]
CUDA = torch.device("cuda", 0)
MEMORY = 24 << 30
LARGE = 1 << 20  # values of a tensor that the processor should not compute on while a step waits
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>); }
"""
MOVING = "moving"  # the phase in which weights get to the card: its copies are not noted
aten = torch.ops.aten
#: operators that launch nothing although no schema says so
NO_KERNEL = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::empty_like", "aten::new_empty",
    "aten::new_empty_strided", "aten::_unsafe_view",
}  # fmt: skip
#: parts of the names of operators whose kernels take one floating dtype
ONE_DTYPE = ("::mm", "::addmm", "::bmm", "::baddbmm", "::convolution", "::native_group_norm", "::embedding")


class _Stream:
    """A stream or an event: every method does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def insert(folder: Path, capability: tuple[int, int] = (8, 6)) -> None:
    """From now on this process has a card. folder: for a library that a torch without CUDA needs."""
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "current_device": 0, "device_count": 1,
        "get_device_capability": capability, "get_device_name": "Fake", "mem_get_info": (MEMORY, MEMORY),
        "empty_cache": None, "_lazy_init": None, "current_stream": _Stream(), "default_stream": _Stream(),
        "get_device_properties": types.SimpleNamespace(total_memory=MEMORY, name="Fake"),
        "synchronize": None, "memory_reserved": 0, "memory_allocated": 0,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    torch.cuda.Stream = torch.cuda.Event = _Stream
    torch.cuda.stream = contextlib.nullcontext
    FakeTensorMode.avoid_device_init = True  # torch.tensor(..., device="cuda") is made in RAM, then moved
    torch.Tensor.numpy = _numpy
    if not torch.version.cuda:
        _register_guard(folder)


def _register_guard(folder: Path) -> None:
    """A torch without CUDA refuses even to index a tensor that claims to be on a card: teach it a device
    guard that does nothing. It stays for the life of the process."""
    base, library = Path(torch.__file__).parent, folder / "guard.so"
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{base}/include", f"-L{base}/lib"]
    command = ["g++", *flags, "-xc++", "-", "-lc10", "-o", str(library)]
    subprocess.run(command, input=GUARD, text=True, check=True)
    ctypes.CDLL(str(library))


_real_numpy = torch.Tensor.numpy


def _numpy(x: Tensor, **options: Any) -> np.ndarray:
    """Zeros for a tensor without values, which has to be in RAM as any other."""
    if not isinstance(x, FakeTensor):
        return _real_numpy(x, **options)
    if x.device.type != "cpu":
        raise TypeError(f"can't convert {x.device} device type tensor to numpy.")
    return np.zeros(tuple(x.shape), str(x.dtype).removeprefix("torch."))


class FakeCard(TorchDispatchMode):
    """Enter it inside a FakeTensorMode. `phase`: what the notes and counts are of, until it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.kernels: Counter[str] = Counter()
        self.notes: Counter[Note] = Counter()

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def report(self, sizes: list[tuple[int, int]]) -> Report:
        return Report(sizes, dict(self.kernels), dict(self.notes))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in arg_tree_leaves(*args, **kwargs) if isinstance(x, Tensor)]
        if func in ANSWERS:
            return ANSWERS[func](self, func, args, tensors)
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if _is_composite(func):
            with self:  # inference mode hands composites over whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if _wants_one_dtype(func):
            _one_dtype(func, tensors)
        out = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            source, target = (args[0], out) if func is aten._to_copy.default else (args[1], args[0])
            if source.device.type != target.device.type:
                if self.phase != MOVING:
                    self._copied(source, target)
                return out
        if _is_kernel(func):
            self._computed(func, out, tensors)
        return out

    def _copied(self, source: Tensor, target: Tensor) -> None:
        shape, dtype = tuple(source.shape), str(source.dtype).removeprefix("torch.")
        self._note("down" if target.device.type == "cpu" else "up", f"{shape} {dtype}")

    def _computed(self, func: Any, out: Any, tensors: list[Tensor]) -> None:
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.device.type == "cuda" for x in results):
            self.kernels[self.phase] += 1
        elif any(x.numel() >= LARGE for x in (*tensors, *results)):
            self._note("host", str(func))

    def _note(self, kind: str, what: str) -> None:
        self.notes[Note(self.phase, kind, what, _where())] += 1


def _where() -> str:
    """The lines of the program that are being run, the innermost first."""
    places: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(places) < 3:
        name = short_name(frame.f_code.co_filename)
        place = f"{name}:{frame.f_lineno}"
        if name and place not in places:
            places.append(place)
        frame = frame.f_back
    return " < ".join(places)


@functools.cache
def short_name(file: str) -> str:
    """Of a file of the program; "" for any other."""
    path = Path(file)
    own = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("models", "shared")
    return path.name if own else ""


@functools.cache
def _is_composite(func: Any) -> bool:
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


@functools.cache
def _wants_one_dtype(func: Any) -> bool:
    return any(part in func.name() for part in ONE_DTYPE)


@functools.cache
def _is_kernel(func: Any) -> bool:
    return not func.is_view and func.name() not in NO_KERNEL


def _one_dtype(func: Any, tensors: list[Tensor]) -> None:
    dtypes = {x.dtype for x in tensors if x.is_floating_point() and x.dim()}
    if len(dtypes) > 1:
        raise RuntimeError(f"{func} of {' and '.join(sorted(map(str, dtypes)))}")


# ---- what the card answers itself


def _value(card: FakeCard, func: Any, args: Any, tensors: list[Tensor]) -> Any:
    """Python asks for a value, and waits when it is on the card."""
    if any(x.device.type == "cuda" for x in tensors):
        card._note("wait", str(func))
    return {torch.bool: True, torch.int64: 1}.get(tensors[0].dtype, 1.0)


def _equal(card: FakeCard, func: Any, args: Any, tensors: list[Tensor]) -> bool:
    _value(card, func, args, tensors)
    return True


def _attention(card: FakeCard, func: Any, args: Any, tensors: list[Tensor]) -> Tensor:
    """One kernel, whose answer lies as flash attention's: a torch without CUDA cannot choose it."""
    _same_place(func, tensors)
    card.kernels[card.phase] += 1
    return torch.empty_like(args[0].transpose(1, 2)).transpose(1, 2)


def _rms_norm(card: FakeCard, func: Any, args: Any, tensors: list[Tensor]) -> Tensor:
    """One kernel, for one dtype only: of several, torch makes six."""
    _same_place(func, tensors)
    card.kernels[card.phase] += 1
    return torch.empty_like(args[0])


def _same_place(func: Any, tensors: list[Tensor]) -> None:
    _one_dtype(func, tensors)
    if len({x.device for x in tensors}) > 1:
        raise RuntimeError(f"{func} of tensors on {' and '.join(sorted(str(x.device) for x in tensors))}")


ANSWERS: dict[Any, Callable[[FakeCard, Any, Any, list[Tensor]], Any]] = {
    aten._local_scalar_dense.default: _value,
    aten.is_nonzero.default: _value,
    aten.item.default: _value,
    aten.equal.default: _equal,
    aten.scaled_dot_product_attention.default: _attention,
    aten.rms_norm.default: _rms_norm,
}
