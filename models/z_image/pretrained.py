"""The pipeline as the Quick Start of the official model uses diffusers': loaded from a folder or a repository
of the hub in diffusers' layout, and moved by its methods.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from models.z_image import loading, unified_sampler
from models.z_image.checkpoints.part_configs import read_config
from models.z_image.family import DEFAULT_FOLDERS, SCHEDULER_CONFIGS
from models.z_image.loading import LoadOptions
from models.z_image.pipeline_z_image import ZImageOutput
from models.z_image.pipeline_z_image import ZImagePipeline as Pipeline
from models.z_image.text_encoder.prompt_cache import PromptCache
from shared.errors import UserError
from shared.gpu.offload_engines import default_engine
from shared.gpu.offloading import Placement, Residency
from shared.gpu.transport import default_device
from shared.weights import hub, snapshot
from shared.weights.downloads import DownloadProgress
from shared.weights.files import Folders, is_whole

log = logging.getLogger(__name__)

INDEX = "model_index.json"
#: part -> its class, as the index names it, among those that this program computes
CLASSES = {
    "transformer": ("ZImageTransformer2DModel",),
    "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    "vae": ("AutoencoderKL",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
}
KINDS = ("z_image", "z_image_base")  # Turbo, Base
SHARDED = ("transformer", "text_encoder")
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
CONFIGS = {
    "transformer_config": "transformer/config.json",
    "vae_config": "vae/config.json",
    "scheduler_config": "scheduler/scheduler_config.json",
}
SINGLE = (INDEX, VAE_FILE, *CONFIGS.values(), "text_encoder/config.json", "tokenizer/tokenizer_config.json")
#: what of a repository is loaded
NEEDED = (
    INDEX,
    *(
        f"{part}/*.{ending}"
        for part in (*CLASSES, "tokenizer")
        for ending in ("json", "txt", "jinja", "safetensors")
    ),
)


class ZImagePipeline(Pipeline):
    """As its base class, but for what a step is: the Quick Start counts noise levels, the last of which is 0,
    as diffusers did when it was written. So its 9 steps are 8 forwards of the transformer.
    """

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        low_cpu_mem_usage: bool = True,
        local_files_only: bool = False,
        base_model_type: str | None = None,
        folders: Folders | None = None,
    ) -> ZImagePipeline:
        """source: a folder in diffusers' layout, or OWNER/NAME of a repository of the hub. A repository is
        used where it lies (in one of `folders` under its name, or in the hub's cache), else fetched into
        ckpts/NAME; what has come stays when that fails or is interrupted, and is continued by the next call.

        torch_dtype, dtype: of transformer and text encoder, by default the device's best one; the VAE stays
        in float32. low_cpu_mem_usage: either way the weights are mapped, never copied. The configurations are
        the folder's own. base_model_type: z_image (Turbo) or z_image_base, whose usual steps and guidance a
        call then takes; by default what the folder says (see `kind_of`). Raises UserError for what is
        missing, or computed in another way.
        """
        folders = folders or DEFAULT_FOLDERS
        folder = _folder(source, folders, local_files_only)
        _check_index(folder)
        if base_model_type not in (None, *KINDS):
            raise UserError(
                f"base_model_type came as {base_model_type!r}; expected {' or '.join(KINDS)}, or nothing."
            )
        definition: dict[str, Any] = {key: str(folder / name) for key, name in CONFIGS.items()}
        options = LoadOptions(
            dtype=dtype or torch_dtype, text_encoder_filename=folder / "text_encoder", folders=folders
        )
        definition["VAE_URLs"] = [str(folder / VAE_FILE)]
        kind = base_model_type or kind_of(folder, str(source))
        _, pipe = loading.load(folder / "transformer", kind, definition, options, cls)
        return pipe

    def __call__(
        self, *args: Any, num_inference_steps: int | None = None, **arguments: Any
    ) -> ZImageOutput:
        """See the base class. num_inference_steps: noise levels, the last of which is 0; with the unified
        sampler the forwards, as in the base class.
        """
        solver = arguments.get("sample_solver") or ("unified" if self.unified_solver else "")
        forwards = num_inference_steps
        if forwards is not None and forwards > 1 and not unified_sampler.is_unified(solver):
            forwards -= 1
        return super().__call__(*args, num_inference_steps=forwards, **arguments)

    def to(self, device: str | torch.device) -> ZImagePipeline:
        """Compute there, with every part staying there whole once it was used. UserError for a device that is
        not there.
        """
        self._move(device, Placement(keep=True, pinned=False))
        return self

    def enable_model_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """From now on the parts take turns on the device, so that only the largest has to fit."""
        self._move(device, Placement())

    def enable_sequential_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """From now on the layers of each part are streamed to the device: the least memory, and slower."""
        self._move(device, Placement(resident_blocks=0))

    def _move(self, device: str | torch.device, placement: Placement) -> None:
        place = device_of(device)
        if place != self.device:
            self.residency.forget()
            self.device, self.prompt_cache = place, PromptCache()
            self.residency = Residency(place, engine=default_engine())
        self.placements = dict.fromkeys(self, placement)
        for part in self.placements:
            if part != "text_encoder" or self.text_encoder_loaded:
                self.residency.place(self[part], placement)


def device_of(wanted: str | torch.device) -> torch.device:
    """The device of that name. UserError when it is not here, or not one that this program computes on."""
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"The device came as {wanted!r}; expected cuda, cuda:1 or cpu.") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UserError(f"The device came as {wanted!r}; expected cuda, cuda:1 or cpu.")
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"PyTorch finds no graphics card {str(wanted)!r} here: check the driver and that PyTorch is the "
            "build for cards, or compute on the CPU with pipe.to('cpu') or without this line."
        )
    return default_device() if device.index is None else device


# ---- the folder --------------------------------------------------------------------------------------------


def _folder(source: str | Path, folders: Folders, local_files_only: bool) -> Path:
    """The folder of the whole model; fetched when it is nowhere."""
    path = Path(source).expanduser()
    if path.is_dir():
        if lacks := _lacking(path):
            raise UserError(f"{path} has no {lacks[0]}: expected a model in diffusers' layout.")
        return path
    repository = str(source)
    if hub.address(f"{hub.SCHEME}{repository}/{INDEX}") is None or repository.count("/") != 1:
        raise UserError(
            f"'{source}' is neither a folder here nor the name of a repository: expected a path, or a name "
            "such as Tongyi-MAI/Z-Image-Turbo."
        )
    for copy in snapshot.copies(repository, folders, INDEX):
        if not _lacking(copy):
            return copy
    if local_files_only:
        raise UserError(
            f"{repository} is not on this computer, or not all of it: run hf download {repository}, or leave "
            "out local_files_only."
        )
    target = folders.ckpts / repository.partition("/")[2]
    log.info("%s is fetched into %s", repository, target)
    snapshot.fetch(repository, target, NEEDED, _progress_bar())
    if lacks := _lacking(target):
        raise UserError(f"{repository} has no {lacks[0]}: expected a model in diffusers' layout.")
    return target


def _lacking(folder: Path) -> list[str]:
    """What a folder needs to be loaded and does not have."""
    missing = [name for name in SINGLE if not (folder / name).is_file()]
    for part in SHARDED:
        if not is_whole(folder / part) or not any((folder / part).glob("*.safetensors")):
            missing.append(f"complete weights in {part}")
    return missing


def _check_index(folder: Path) -> None:
    """UserError when the folder's parts are not those of Z-Image."""
    index = read_config(folder / INDEX)
    for part, known in CLASSES.items():
        named = index.get(part)
        name = named[-1] if isinstance(named, list) and named else named
        if name not in known:
            raise UserError(f"{folder / INDEX} names {name} as {part}; expected {' or '.join(known)}.")


# ---- Turbo or Base -----------------------------------------------------------------------------------------


def kind_of(folder: Path, source: str = "") -> str:
    """One of KINDS: what the names say that the model has or had, else the shift of its schedule, else Turbo,
    with a warning.

    The weights do not tell: both have the same shapes.
    """
    for name in _names(folder, source):
        words = {word.lower() for word in re.findall("[A-Z]?[a-z]+", name)}
        if "turbo" in words:
            return KINDS[0]
        if "base" in words or re.sub("[^a-z]", "", name.lower()) == "zimage":
            return KINDS[1]
    shift = read_config(folder / CONFIGS["scheduler_config"]).get("shift")
    official = {read_config(SCHEDULER_CONFIGS[kind])["shift"]: kind for kind in KINDS}
    if shift not in official:
        log.warning(
            "%s does not say whether it is Turbo or Base: without a word in the call it paints as Turbo, in "
            "8 steps without guidance; base_model_type='z_image_base' makes it 30 steps with guidance 4.",
            folder,
        )
    return official.get(shift, KINDS[0])


def _names(folder: Path, source: str) -> Iterator[str]:
    """Of the repository, of its folder in the hub's cache (models--OWNER--NAME/snapshots/COMMIT) or of any
    other folder, and of what the model was saved from.
    """
    place = folder.resolve()
    if place.parent.name == "snapshots":
        yield place.parents[1].name.rpartition("--")[2]
    for name in (source, str(place)):
        yield name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    for config in (INDEX, CONFIGS["transformer_config"]):
        origin = read_config(folder / config).get("_name_or_path")
        if isinstance(origin, str):
            yield origin.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _progress_bar() -> Callable[[DownloadProgress], None]:
    """Shows how much of all files has come, as the hub's own downloads do."""
    from huggingface_hub.utils import tqdm

    bar = tqdm(unit="B", unit_scale=True, desc="Downloading")

    def show(progress: DownloadProgress) -> None:
        bar.total = progress.before_bytes + progress.total_bytes + progress.after_bytes
        bar.set_postfix_str(progress.note or progress.file, refresh=False)
        bar.update(progress.before_bytes + progress.done_bytes - bar.n)

    return show
