"""Weights into models, and models onto the device: the only file that imports mmgp.

mmgp 3.8.2 is used for what it does well (lazy reading of safetensors, quantized layers, streaming weights
through a small card). Its traps that matter here are worked around in this file, each with the reason beside
it.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mmgp  # noqa: F401
import safetensors
import safetensors.torch
import torch
import transformers.modeling_utils
from accelerate import init_empty_weights
from accelerate.utils import modeling as accelerate_modeling
from mmgp import offload, safetensors2
from torch import Tensor, nn

from shared.errors import UserError
from shared.weights.files import check_safetensors

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)

ACTIVATION_BYTES = 3 << 30  # VRAM kept free for activations and the VAE
STREAMED_MB = 3000  # resident share of a text encoder that does not fit


def _restore_safetensors() -> None:
    """Importing mmgp replaces these functions with its own, which transformers 5 calls with an argument they
    lack.
    """
    safetensors.safe_open = safetensors2._old_safe_open  # type: ignore[misc]
    safetensors.torch.load_file = safetensors2._old_torch_load_file
    accelerate_modeling.safe_open = safetensors2._old_safe_open
    accelerate_modeling.safe_load_file = safetensors2._old_torch_load_file
    transformers.modeling_utils.safe_open = safetensors2._old_safe_open


_restore_safetensors()


def default_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def preferred_dtype(file: Path, device: torch.device) -> torch.dtype:
    """bfloat16 on a card. On a CPU float32, unless the file is bfloat16 and the processor multiplies that:
    twice as fast there (AVX512_BF16, AMX) and half the memory."""
    if device.type != "cpu":
        return torch.bfloat16
    stored = {entry["dtype"] for entry in check_safetensors(file).values()}
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if "BF16" in stored and fast else torch.float32


def build(make: Callable[[], M]) -> M:
    """A model without memory: its weights come from `load_weights`."""
    with init_empty_weights():
        return make().eval().requires_grad_(False)


def common_prefix(names: Sequence[str], wanted: Sequence[str]) -> str:
    """What stands before the model's own names in a file ("model.", "model.diffusion_model.", ...), or ""."""
    known = set(wanted)
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in known:
                return "".join(f"{p}." for p in parts[:i])
    return ""


def load_weights(
    model: nn.Module,
    files: Sequence[Path],
    *,
    dtype: torch.dtype | None,
    unused: Callable[[str], bool] = lambda name: False,
    renames: Mapping[str, str] | None = None,
) -> None:
    """Fill `model` (made by `build`) from safetensors files; floats become `dtype` (None keeps the file's).

    `renames`: parts of the file's names, and what the model calls them. `unused(name)` tells which tensors of
    the file the model does not need by design. Raises UserError when a file is missing or damaged, lacks
    tensors or has others in their place.
    """
    names: list[str] = []
    for file in files:
        if not file.is_file():  # mmgp would try to download it
            raise UserError(f"{file} does not exist: download it or correct the path in the model's card.")
        names += [_renamed(name, renames) for name in check_safetensors(file)]
    wanted = list(model.state_dict())
    prefix = common_prefix(names, wanted)
    label = ", ".join(file.name for file in files)

    def rename(weights: dict[str, Tensor], quantization: Any, tied: Any) -> tuple[Any, Any, Any]:
        tables = (weights, quantization, tied)
        return tuple(_short(prefix, unused, renames, table) for table in tables)  # type: ignore[return-value]

    try:
        offload.load_model_data(
            model,
            [_source(file) for file in files],
            default_dtype=dtype,
            writable_tensors=False,  # a private mapping of the whole file would count against RAM on Windows
            preprocess_sd=rename,
            ignore_missing_keys=True,  # named below, in one sentence
            verboseLevel=0,
        )
    except Exception as error:  # mmgp raises bare Exceptions
        if problem := _problem(model, label, error):
            raise UserError(problem) from error
        raise
    _report_extra(label, names, prefix, set(model.state_dict()), unused)


def _problem(model: nn.Module, label: str, error: Exception) -> str | None:
    """What was wrong with the files, in one sentence; None when it is not the files."""
    if "size mismatch for " in str(error):
        detail = str(error).split("size mismatch for ", 1)[1].split("\n")[0]
        return f"{label} is of another size than its card says ({detail}): check the card."
    state = model.state_dict()
    missing = [name for name, x in state.items() if x.is_meta]
    if not missing:
        return None
    return (
        f"{label} lacks {len(missing)} of the {len(state)} tensors of {type(model).__name__} "
        f"(first: {missing[0]}): it is a file of another model, or incomplete."
    )


def _renamed(name: str, renames: Mapping[str, str] | None) -> str:
    for part, own in (renames or {}).items():
        name = name.replace(part, own)
    return name


def _short(
    prefix: str,
    unused: Callable[[str], bool],
    renames: Mapping[str, str] | None,
    table: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """The table under the model's own names."""
    if table is None:
        return None
    short = {_renamed(name, renames).removeprefix(prefix): value for name, value in table.items()}
    return {name: value for name, value in short.items() if not unused(name)}


def _source(file: Path) -> Any:
    """A name with '-of-' in it would be taken for one of several shards: such files are handed over
    opened.
    """
    if "-of-" not in file.name:
        return str(file)
    weights, metadata = safetensors2.torch_load_file(str(file), writable_tensors=False), None
    with contextlib.suppress(KeyError, TypeError):
        metadata = json.loads(safetensors2._old_safe_open(str(file), "pt").metadata()["quantization_map"])
    return (weights, metadata)


def _report_extra(
    label: str, names: Sequence[str], prefix: str, known: set[str], unused: Callable[[str], bool]
) -> None:
    modules = {name.rpartition(".")[0] for name in known}
    short = [name.removeprefix(prefix) for name in names]
    extra = [n for n in short if n not in known and not unused(n) and n.rpartition(".")[0] not in modules]
    extra = [
        n for n in extra if not any(n.startswith(f"{m}.") for m in modules if m)
    ]  # parts of quantized weights
    if extra:
        log.warning(
            "%s has %d tensors that this model does not know (first: %s).", label, len(extra), extra[0]
        )


def bytes_of(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


class Residency:
    """Keeps a pipeline's parts where they can compute. On a CPU they simply stay."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def use(self, part: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Inside, `part` computes on the device."""
        return contextlib.nullcontext()

    def release(self) -> None:
        """Give the device's memory back."""


class MmgpResidency(Residency):
    """mmgp moves each part to the card when it is called: whole where it fits, else block by block."""

    def __init__(self, parts: Mapping[str, nn.Module], device: torch.device) -> None:
        super().__init__(device)
        free, _ = torch.cuda.mem_get_info(device)
        room = free - ACTIVATION_BYTES
        sizes = {name: bytes_of(part) for name, part in parts.items()}
        largest = max(sizes.values())
        before = torch.get_default_device()
        options: dict[str, Any] = {"pinnedMemory": False}
        if largest > room:
            budget = max(400, room // 2**20)
            options |= {
                "pinnedMemory": "transformer",
                "budgets": {
                    "transformer": budget,
                    "text_encoder": min(STREAMED_MB, budget),
                    "*": STREAMED_MB,
                },
            }
        self._offload = offload.profile(
            dict(parts),
            profile_no=3,
            quantizeTransformer=False,
            extraModelsToQuantize=None,
            convertWeightsFloatTo=None,
            verboseLevel=1,  # 0 would also switch off the check that a budget fits the card
            **options,
        )
        torch.set_default_device(before)  # mmgp leaves it on the card for this thread
        # mmgp compares full names with short ones here, so every prefetched block was loaded a second time
        names = self._offload.prev_blocks_names
        self._offload.prev_blocks_names = {k: v.split("/", 1)[1] if v else v for k, v in names.items()}
        log.info(
            "%s, %.1f GiB free: %s",
            torch.cuda.get_device_name(device),
            free / 2**30,
            "parts on the card whole, one at a time"
            if largest <= room
            else f"weights streamed, {options['budgets']}",
        )

    def release(self) -> None:
        self._offload.unload_all()
        self._offload.release()
        offload.flush_torch_caches()


def attach(
    parts: Mapping[str, nn.Module], device: torch.device, keep_fp32: Sequence[nn.Module] = ()
) -> Residency:
    """Make `parts` ready to compute on `device`. `keep_fp32`: modules whose fp32 arguments must not be
    cast.
    """
    for module in keep_fp32:
        module._lock_dtype = None  # type: ignore[assignment]
    return MmgpResidency(parts, device) if device.type == "cuda" else Residency(device)
