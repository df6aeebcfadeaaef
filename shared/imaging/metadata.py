"""What a picture's file says about its making: written by every save, read back to make the picture again.

The metadata is one flat JSON object, itself a settings file: its settings make this very picture (own seed,
one image), and everything else stands under "zgp". Wan2GP keeps its settings in the same places: the PNG text
chunk `comment` and EXIF UserComment in JPEG and WebP.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shared.errors import UserError
from shared.version import VERSION

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_METADATA_BYTES = 1_000_000  # ours are a few thousand; Pillow stops zTXt bombs at about the same size
COMMENT = "UserComment"
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_EXIF_TEXTS = {0x010E: "ImageDescription", 0x010F: "Make", 0x0110: "Model"}
_TYPE_LONG, _TYPE_UNDEFINED, _DIRECTORY_BYTES = 4, 7, 18
_ENVELOPE = ("type", "zgp")  # metadata keys that are no settings


def build(
    settings: Mapping[str, Any],
    *,
    seed: int,
    index: int,
    model_name: str,
    model_files: Mapping[str, str | None],
    notes: list[str],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """The metadata of image `index` (from 0) of a batch made with `settings`; `seed` is this image's own.

    `model_files` maps file names to SHA-256 (None = not known), the transformer first. `notes` says what was
    substituted or dropped. `extra` is whatever else the pipeline reports; its "sampler" names the sampler,
    its "loras" are [{"name", "strength", "sha256"}].
    """
    return {
        "type": f"ZGP {VERSION} - {model_name}",
        **settings,
        "seed": seed,
        "batch_size": 1,
        "zgp": {
            **extra,
            "version": VERSION,
            "model_name": model_name,
            "model_files": dict(model_files),
            "index": index,
            "batch_size": settings.get("batch_size", 1),
            "batch_seed": seed - index,
            "notes": list(notes),
        },
    }


def settings_from(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that can be submitted again and give the same picture: its own seed, one image."""
    settings = {name: value for name, value in meta.items() if name not in _ENVELOPE}
    return {**settings, "batch_size": 1}


def to_parameters_text(meta: Mapping[str, Any]) -> str:
    """The metadata as A1111's `parameters` text, which other programs and sites read.

    "CFG scale" is `guidance_scale` as set here, 1 where the model has none. LoRAs stand behind the prompt.
    """
    made = meta.get("zgp", {})
    loras = [
        (PurePosixPath(one["name"]).stem, one["strength"], one["sha256"]) for one in made.get("loras", [])
    ]
    transformer_hash = next(iter(made.get("model_files", {}).values()), None)
    negative = meta.get("negative_prompt")
    fields = {
        "Steps": meta.get("num_inference_steps"),
        "Sampler": made.get("sampler", "Euler"),
        "CFG scale": meta.get("guidance_scale", 1),
        "Shift": meta.get("flow_shift"),
        "Seed": meta.get("seed"),
        "Size": meta.get("resolution"),
        "Model hash": str(transformer_hash)[:10] if transformer_hash else None,
        "Model": made.get("model_name", meta.get("model_type")),
        "Lora hashes": ", ".join(f"{name}: {sha[:12]}" for name, _, sha in loras if sha) or None,
        "Version": f"ZGP {made['version']}" if "version" in made else meta.get("type"),
    }
    shown = [f"{name}: {_quoted(value)}" for name, value in fields.items() if value is not None]
    prompt = " ".join([meta["prompt"], *(f"<lora:{name}:{strength}>" for name, strength, _ in loras)])
    lines = [prompt, *([f"Negative prompt: {negative}"] if negative else []), ", ".join(shown)]
    return _encodable("\n".join(lines)).replace("\0", "")


def _quoted(value: Any) -> str:
    """A1111 puts values that hold its separators between double quotes, escaped as in JSON."""
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


# ---------------------------------------------------------------- writing


def png_chunks(meta: Mapping[str, Any]) -> PngInfo:
    """The text chunks `parameters` (A1111) and `comment` (everything, as JSON)."""
    chunks = PngInfo()
    chunks.add_text("parameters", to_parameters_text(meta))
    chunks.add_text("comment", _to_json(meta))
    return chunks


def exif(meta: Mapping[str, Any]) -> bytes:
    """An EXIF block with one tag, UserComment: the metadata as JSON, in ASCII if possible, else in UTF-16.

    Made by hand because Pillow writes this tag with the type BYTE, where EXIF 2.32 demands UNDEFINED.
    """
    text = _to_json(meta)
    if text.isascii():
        comment = b"ASCII\0\0\0" + text.encode("ascii")
    else:
        comment = b"UNICODE\0" + text.encode("utf-16-be")  # big-endian like the block: most readers expect it
    header = b"Exif\0\0" + b"MM\0*" + struct.pack(">I", 8)
    main = _directory(_EXIF_IFD, _TYPE_LONG, 1, 8 + _DIRECTORY_BYTES)
    tags = _directory(_USER_COMMENT, _TYPE_UNDEFINED, len(comment), 8 + 2 * _DIRECTORY_BYTES)
    return header + main + tags + comment


def _directory(tag: int, kind: int, count: int, value: int) -> bytes:
    """A TIFF directory of one entry; `value` is the value itself or its offset from the header's "MM"."""
    return struct.pack(">HHHIII", 1, tag, kind, count, value, 0)


def _to_json(meta: Mapping[str, Any]) -> str:
    return _encodable(json.dumps(meta, ensure_ascii=False, default=str))


def _encodable(text: str) -> str:
    """`text` with "?" for what no encoding can hold: better a mark in the metadata than no picture."""
    return text.encode("utf-8", "replace").decode()


# ---------------------------------------------------------------- reading


def read(path: Path | str) -> dict[str, Any] | None:
    """The metadata in an image file of ZGP or Wan2GP; None when it holds none.

    Reads headers only, never pixels. Raises UserError for a file that is no intact PNG, JPEG or WebP.
    """
    found = texts(path)
    candidates = [text for name, text in found.items() if name == "comment" or name.startswith(COMMENT)]
    return next(filter(None, map(_from_json, candidates)), None)


def texts(path: Path | str) -> dict[str, str]:
    """The texts in an image file by name: a PNG's chunks; EXIF's UserComment (in two places), and its
    ImageDescription, Make and Model, where ComfyUI writes. mflux writes EXIF into PNG. Errors as for `read`.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            return dict(_texts(image))
    except FileNotFoundError:
        raise UserError(f"{path.name} does not exist; choose another file") from None
    except Exception as error:  # Pillow raises anything on damaged files: SyntaxError, struct.error …
        raise UserError(
            f"{path.name} cannot be read; expected an intact PNG, JPEG or WebP image, choose another file"
        ) from error


def _texts(image: Image.Image) -> Iterator[tuple[str, str]]:
    if image.format == "PNG":
        yield from ((str(name), text) for name, text in image.info.items() if isinstance(text, str))
        tags = Image.Exif()
        tags.load(image.info.get("exif") or b"")  # image.getexif() would read the pixels
    else:
        tags = image.getexif()
    for tag, name in _EXIF_TEXTS.items():
        if isinstance(tags.get(tag), str):
            yield name, tags[tag]
    comments = (tags.get_ifd(_EXIF_IFD).get(_USER_COMMENT), tags.get(_USER_COMMENT))
    for place, comment in zip((COMMENT, f"{COMMENT} (outside)"), comments, strict=True):
        if isinstance(comment, bytes):
            yield place, _decoded(comment)
        elif isinstance(comment, str):
            yield place, comment


def _decoded(comment: bytes) -> str:
    """The text of an EXIF UserComment, whose first eight bytes name its encoding."""
    charset, body = comment[:8], comment[8:]
    if charset == b"UNICODE\0":
        # Programs disagree about the byte order here; the high bytes of names and digits are zero.
        is_big = body[0::2].count(0) >= body[1::2].count(0)
        return body.decode("utf-16-be" if is_big else "utf-16-le", "replace")
    if charset in (b"ASCII\0\0\0", bytes(8)):
        return body.decode("utf-8", "replace")
    return comment.decode("utf-8", "replace")


def _from_json(text: str) -> dict[str, Any] | None:
    """The metadata in `text`; None when it is something else, such as another program's remark."""
    if len(text) > MAX_METADATA_BYTES:
        return None
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return meta if _is_metadata(meta) else None


def _is_metadata(meta: Any) -> bool:
    if not isinstance(meta, dict) or not isinstance(meta.get("prompt"), str) or "mflux_version" in meta:
        return False
    made = meta.get("zgp", {})
    return isinstance(made, dict) and isinstance(made.get("model_files", {}), dict)
