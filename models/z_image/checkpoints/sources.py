"""Where the parts of a model lie that its card does not name: the hub's files, and the same weights in the
folders of people who have them for other programs. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.z_image.family import ROOT
from shared.errors import UserError
from shared.weights.files import Folders, Required, locate

REPOSITORY = "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main"
#: the official repositories, as `hf download` brings them; their text encoders, tokenizers and VAEs are alike
OFFICIAL = ("hf://Tongyi-MAI/Z-Image-Turbo", "hf://Tongyi-MAI/Z-Image")
TEXT_ENCODER_FOLDER = "Qwen3"
TEXT_ENCODERS = ("qwen3_bf16.safetensors", "qwen3_quanto_bf16_int8.safetensors")
ENCODER_CONFIG = "config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")  # without these there is none
MORE_TOKENIZER_FILES = ("vocab.json", "merges.txt")
#: for ComfyUI and diffusers
OWN_TEXT_ENCODERS = (
    *(f"{repository}/text_encoder" for repository in OFFICIAL),
    "qwen_3_4b.safetensors",
    "text_encoders/qwen_3_4b.safetensors",
    "qwen_3_4b_fp8_mixed.safetensors",
)
OWN_VAES = (
    *(f"{repository}/vae/diffusion_pytorch_model.safetensors" for repository in OFFICIAL),
    "vae/ae.safetensors",
    "vae/ae.sft",
    "vae/flux_vae.safetensors",
)


def text_encoder(model_def: Mapping[str, Any]) -> list[Required]:
    """The text encoder's weights, and its tokenizer and configuration unless these come with the program."""
    folder = model_def.get("text_encoder_folder") or TEXT_ENCODER_FOLDER
    inside = in_project(folder)
    encoders = model_def.get("text_encoder_URLs")
    if encoders:
        needed = [Required("text_encoder", list(encoders), "" if inside else folder)]
    else:
        urls = [f"{REPOSITORY}/{TEXT_ENCODER_FOLDER}/{name}" for name in TEXT_ENCODERS]
        needed = [Required("text_encoder", [*urls, *OWN_TEXT_ENCODERS], folder)]
    return needed if inside else [*needed, *_small_files(folder)]


def _small_files(folder: str) -> Iterator[Required]:
    places = {ENCODER_CONFIG: "text_encoder"}
    for name in (*TOKENIZER_FILES, *MORE_TOKENIZER_FILES, ENCODER_CONFIG):
        own = [f"{repository}/{places.get(name, 'tokenizer')}/{name}" for repository in OFFICIAL]
        yield Required(name, [f"{REPOSITORY}/{TEXT_ENCODER_FOLDER}/{name}", *own], folder)


def vae(model_def: Mapping[str, Any]) -> Required:
    urls = model_def.get("VAE_URLs") or [f"{REPOSITORY}/ZImageTurbo_VAE_bf16.safetensors", *OWN_VAES]
    return Required("vae", list(urls))


def modules(model_def: Mapping[str, Any]) -> list[Required]:
    """The control network's file, where the card has one."""
    return [Required(f"module{i}", list(files)) for i, files in enumerate(model_def.get("modules") or [])]


def preloads(model_def: Mapping[str, Any]) -> list[Required]:
    """Files that the card wants to be here beside its parts: "URL", or "URL|folder" below the models' one."""
    pairs = (source.partition("|") for source in model_def.get("preload_URLs") or [])
    return [Required(f"preload{i}", [url], folder) for i, (url, _, folder) in enumerate(pairs)]


def in_project(folder: str) -> bool:
    return (ROOT / folder).is_dir()


# ---- what is on disk ---------------------------------------------------------------------------------------


def tokenizer(
    model_def: Mapping[str, Any],
    folders: Folders,
    encoder: Path | None = None,
    needed: Sequence[str] = TOKENIZER_FILES,
) -> Path | None:
    """The folder with this model's tokenizer: in the project, beside the text encoder, in the folder
    tokenizer next to its own (as diffusers has it), or where the small files are looked for.

    encoder: its file or folder where that is known. needed: the files that must be in one folder.
    """
    for place in _places(model_def, folders, encoder):
        for folder in (place, place.parent / "tokenizer"):
            if all((folder / name).is_file() for name in needed):
                return folder
    return None


def encoder_config(
    model_def: Mapping[str, Any], folders: Folders, encoder: Path | None = None
) -> Path | None:
    """The text encoder's config.json, looked for in the same places."""
    files = (place / ENCODER_CONFIG for place in _places(model_def, folders, encoder))
    return next((file for file in files if file.is_file()), None)


def _places(model_def: Mapping[str, Any], folders: Folders, encoder: Path | None) -> Iterator[Path]:
    folder = model_def.get("text_encoder_folder") or TEXT_ENCODER_FOLDER
    if in_project(folder):
        yield ROOT / folder
    weights, *small = text_encoder(model_def)
    for required in (weights, *small):
        located = (locate(source, folders, required.target) for source in required.alternatives)
        paths = [encoder] if encoder and required is weights else located
        yield from (path if path.is_dir() else path.parent for path in paths if path is not None)


def find(source: str | Path, target: str, folders: Folders) -> Path:
    """The file that a card or a caller names, on disk. Raises UserError when it is not there."""
    path = Path(source)
    located = path if path.is_absolute() and path.exists() else locate(str(source), folders, target)
    if located is None:
        raise UserError(
            f"The file {source} is not on disk: put it into {folders.ckpts} or start its download."
        )
    return located
