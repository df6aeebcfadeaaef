"""A picture to paint on: as HTML with a canvas over it, and what was painted back as a picture.

painter.js draws. What it sends is a PNG as a data: address with transparency where nothing was painted; it is
kept in the page, so that Generate, pressed right after a stroke, already sends the stroke.
"""

from __future__ import annotations

import base64
import binascii
import io
import itertools
from collections.abc import Sequence
from html import escape

import gradio as gr
from PIL import Image

from shared.errors import UserError
from shared.imaging import masks
from shared.imaging.sources import load_picture
from shared.ui import static_files

SHOWN = 1024  # pixels of the longer side of the canvas at most: what is painted is scaled to the picture
FINE = 512  # and at least, or strokes on a small picture would be of steps
DATA = "data:image/png;base64,"
EMPTY = "data:,"  # everything painted was taken away again
_INK = (225, 29, 72)  # of a mask that is shown again; strokes have the same, see painter.js
_SCRIPT = static_files.read("painter.js")
_numbers = itertools.count()

_TOOLS = {
    "mask": (("paint", "Paint"), ("erase", "Erase")),
    "map": (("white", "White"), ("black", "Black"), ("erase", "Erase")),
    "shown": (),
}
_DEEDS = {
    "mask": (("undo", "Undo"), ("invert", "Invert"), ("clear", "Clear")),
    "map": (("undo", "Undo"), ("clear", "Clear")),
    "shown": (),
}


def painter_area(elem_id: str) -> gr.HTML:
    """An empty component for `painter_html`. Its events: `painted` (window.zgpPainted has it), `remove`."""
    return gr.HTML("", js_on_load=_SCRIPT, elem_id=elem_id, apply_default_css=False)


def painter_html(
    kind: str, picture: Image.Image, mask: Image.Image | None, lines: Sequence[str], strokes: str = ""
) -> str:
    """kind: "mask" or "map", the tools, or "shown", without any. mask: (L) what is already painted.

    lines: what stands below. strokes: what `painted` brought, to lie on the picture again.
    """
    width, height = _canvas_size(picture.size)
    layer = "" if mask is None else _address(_inked(mask.resize((width, height))), "PNG")
    if strokes not in ("", EMPTY):
        layer = _address(_layer(strokes), "PNG")
    caption = "".join(f'<p class="zgp-lora-line">{escape(line)}</p>' for line in lines)
    # The number makes each one new to the page, so that strokes on the last one do not stay on this.
    return (
        f'<div class="zgp-painter" data-kind="{kind}" data-layer="{layer}" data-number="{next(_numbers)}" '
        f'data-painted="{int(bool(layer))}">'
        f'<div class="zgp-easel" style="--zgp-shape: {width / height:.4f}">'
        f'<img src="{_address(_copy(picture), "WEBP")}" alt="" draggable="false">'
        f'<canvas width="{width}" height="{height}" aria-label="{_LABELS[kind]}"></canvas></div>'
        f'<div class="zgp-tools">{_tools(kind)}</div>{caption}</div>'
    )


_LABELS = {
    "mask": "Paint over what is to change",
    "map": "Paint on the control map",
    "shown": "The control picture",
}


def _tools(kind: str) -> str:
    tools = "".join(
        f'<button type="button" class="zgp-button" data-tool="{name}" aria-pressed="{str(not i).lower()}">'
        f"{label}</button>"
        for i, (name, label) in enumerate(_TOOLS[kind])
    )
    size = (
        '<label class="zgp-brush" style="--zgp-part: 0.23"><span>Brush</span>'
        '<input type="range" min="1" max="40" value="10" aria-label="Size of the brush"></label>'
    )
    deeds = "".join(
        f'<button type="button" class="zgp-button" data-deed="{name}">{label}</button>'
        for name, label in (*_DEEDS[kind], ("remove", "Remove"))
    )
    deeds = f'<span class="zgp-deeds">{deeds}</span>'
    return f'<span class="zgp-choice">{tools}</span>{size}{deeds}' if tools else deeds


def is_painted(value: str) -> bool:
    """Whether a setting's value is what painter.js sends, rather than a path."""
    return value.startswith("data:")


def mask_of(data: str) -> Image.Image | None:
    """The mask (L, white where something was painted) that `painted` brought; None when nothing is."""
    if data == EMPTY:
        return None
    return masks.from_layer(_layer(data))


def painted_over(picture: Image.Image, data: str) -> Image.Image:
    """`picture` (RGB) with the strokes that `painted` brought on it."""
    if data == EMPTY:
        return picture
    over = picture.convert("RGBA")
    over.alpha_composite(_layer(data).resize(picture.size, Image.Resampling.BILINEAR))
    return over.convert("RGB")


def _layer(data: str) -> Image.Image:
    """RGBA."""
    try:
        png = base64.b64decode(data.removeprefix(DATA), validate=True)
    except binascii.Error:
        raise UserError("What was painted did not arrive whole; paint it again") from None
    load_picture(png)  # refuses what is no picture, damaged, or too large
    with Image.open(io.BytesIO(png)) as image:
        return image.convert("RGBA")


def _canvas_size(size: tuple[int, int]) -> tuple[int, int]:
    longer = max(size)
    scale = min(max(longer, FINE), SHOWN) / longer
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _copy(picture: Image.Image) -> Image.Image:
    copy = picture.convert("RGB")
    copy.thumbnail((SHOWN, SHOWN))
    return copy


def _inked(mask: Image.Image) -> Image.Image:
    layer = Image.new("RGBA", mask.size, _INK)
    layer.putalpha(mask)
    return layer


def _address(image: Image.Image, file_format: str) -> str:
    file = io.BytesIO()
    image.save(file, file_format, **({"quality": 90} if file_format == "WEBP" else {}))
    return f"data:image/{file_format.lower()};base64," + base64.b64encode(file.getvalue()).decode("ascii")
