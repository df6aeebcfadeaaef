"""Many pictures as one, with labels: columns, rows, and panels side by side."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from PIL import Image, ImageDraw, ImageFont

MAX_PIXELS = 40_000_000  # of all cells together; larger ones are made smaller
MAX_SIDE = 16_000  # what browsers show
SMALLEST_TEXT = 13
MOST_LINES = 4
MOST_LETTERS = 500
PAPER, INK, FAINT, EMPTY = (244, 244, 246), (32, 32, 32), (110, 110, 110), (228, 228, 232)

#: fonts with the letters that Pillow's own lacks; the first that has all of a text draws it
FALLBACKS = (
    "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc",
    "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "msyh.ttc", "simsun.ttc", "seguisym.ttf", "PingFang.ttc",
    "Arial Unicode.ttf",
)  # fmt: skip

Size = tuple[int, int]
Font = ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Tile:
    """One cell. size: of its picture in pixels; picture: loads it. Without a picture, why there is none."""

    size: Size = (0, 0)
    picture: Callable[[], Image.Image] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Layout:
    """Where everything goes, in pixels of the sheet.

    columns, rows, panels: their labels, at least one each. cell: its size, `scale` times the pictures'.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    panels: tuple[str, ...]
    cell: Size
    scale: float

    @cached_property
    def text_size(self) -> int:
        return max(SMALLEST_TEXT, min(self.cell) // 24)

    @cached_property
    def gap(self) -> int:
        return max(2, self.text_size // 4)

    @cached_property
    def row_labels(self) -> list[str]:
        return [wrapped(row, self.text_size, max(8 * self.text_size, self.cell[0] // 2)) for row in self.rows]

    @cached_property
    def column_labels(self) -> list[str]:
        return [wrapped(column, self.text_size, self.cell[0]) for column in self.columns]

    @cached_property
    def panel_labels(self) -> list[str]:
        return [wrapped(panel, self.text_size, self.panel_width) for panel in self.panels]

    @property
    def panel_width(self) -> int:
        return len(self.columns) * (self.cell[0] + self.gap) - self.gap

    @cached_property
    def left(self) -> int:
        """Where the first panel begins."""
        widest = max(text_extent(label, self.text_size)[0] for label in self.row_labels)
        return self.text_size + (widest + self.text_size // 2 if widest else 0)

    @cached_property
    def panel_label_height(self) -> int:
        return self._height(self.panel_labels)

    @cached_property
    def top(self) -> int:
        """Where the first row begins."""
        return self.text_size + self.panel_label_height + self._height(self.column_labels)

    def _height(self, labels: Sequence[str]) -> int:
        tallest = max(text_extent(label, self.text_size)[1] for label in labels)
        return tallest + self.text_size * 2 // 3 if tallest else 0

    @property
    def size(self) -> Size:
        panels = len(self.panels) * (self.panel_width + self.text_size)
        return self.left + panels, self.top + len(self.rows) * (self.cell[1] + self.gap) + self.text_size

    def place(self, number: int) -> tuple[int, int]:
        """The upper left corner of a cell; they are counted along columns, then rows, then panels."""
        rest, column = divmod(number, len(self.columns))
        panel, row = divmod(rest, len(self.rows))
        x = self.left + panel * (self.panel_width + self.text_size) + column * (self.cell[0] + self.gap)
        return x, self.top + row * (self.cell[1] + self.gap)


def layout(
    tiles: Sequence[Tile], columns: Sequence[str], rows: Sequence[str], panels: Sequence[str]
) -> Layout:
    """The layout of these tiles; "" as the only label of a direction means that there is none."""
    width = max(tile.size[0] for tile in tiles) or 64
    height = max(tile.size[1] for tile in tiles) or 64
    across, down = len(columns) * len(panels), len(rows)
    scale = min(
        1.0,
        math.sqrt(MAX_PIXELS / (width * height * across * down)),
        MAX_SIDE / (width * across),
        MAX_SIDE / (height * down),
    )
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Layout(tuple(columns), tuple(rows), tuple(panels), cell, scale)


def draw(tiles: Sequence[Tile], where: Layout) -> Image.Image:
    """The sheet. Each picture stands in the middle of its cell, unchanged where the scale is 1."""
    sheet = Image.new("RGB", where.size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, tile in enumerate(tiles):
        x, y = where.place(number)
        if tile.picture is None:
            pen.rectangle((x, y, x + where.cell[0] - 1, y + where.cell[1] - 1), fill=EMPTY)
            said = wrapped(tile.reason, where.text_size, where.cell[0] - 2 * where.gap, where.cell[1])
            _write(pen, (x + where.cell[0] / 2, y + where.cell[1] / 2), said, where.text_size, "mm", FAINT)
            continue
        picture = tile.picture().convert("RGB")
        if where.scale < 1:
            picture = picture.resize(
                [max(1, round(side * where.scale)) for side in picture.size], Image.Resampling.LANCZOS
            )
        sheet.paste(
            picture, (x + (where.cell[0] - picture.width) // 2, y + (where.cell[1] - picture.height) // 2)
        )
    _draw_labels(pen, where)
    return sheet


def _draw_labels(pen: ImageDraw.ImageDraw, where: Layout) -> None:
    cells_of_panel = len(where.columns) * len(where.rows)
    for panel, label in enumerate(where.panel_labels):
        x, _ = where.place(panel * cells_of_panel)
        _write(pen, (x + where.panel_width / 2, where.text_size), label, where.text_size, "ma")
        for column, text in enumerate(where.column_labels):
            x, y = where.place(panel * cells_of_panel + column)
            _write(pen, (x + where.cell[0] / 2, y - where.text_size // 2), text, where.text_size, "md")
    for row, text in enumerate(where.row_labels):
        x, y = where.place(row * len(where.columns))
        _write(pen, (x - where.text_size // 2, y + where.cell[1] / 2), text, where.text_size, "rm")


def _write(
    pen: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    anchor: str,
    fill: tuple[int, int, int] = INK,
) -> None:
    if text:
        align = "right" if anchor[0] == "r" else "center"
        pen.multiline_text(at, text, fill, font_for(text, size), anchor=anchor, align=align)


# ---------------------------------------------------------------- text


def wrapped(text: str, size: int, width: int, height: int = 0) -> str:
    """`text` in lines of at most `width` pixels, MOST_LINES of them or as many as `height` holds."""
    letters = text[:MOST_LETTERS]
    text = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in letters)
    font = font_for(text, size)
    most = max(1, height // (size + size // 2)) if height else MOST_LINES
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        parts = _pieces(word, font, width)
        lines += parts if lines[-1] else []
        lines = lines if lines[-1] else parts
    if len(lines) <= most:
        return "\n".join(lines)
    last = lines[most - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return "\n".join([*lines[: most - 1], f"{last}…"])


def _pieces(word: str, font: Font, width: int) -> list[str]:
    """A word in pieces that fit: a long one, or Chinese, which has no blanks."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def text_extent(text: str, size: int) -> Size:
    """Width and height in pixels of a text as it is drawn."""
    if not text:
        return 0, 0
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left, top, right, bottom = pen.multiline_textbbox((0, 0), text, font_for(text, size), anchor="la")
    return math.ceil(right - left), math.ceil(bottom - top)


def font_for(text: str, size: int) -> Font:
    """Pillow's own font, or the first font of this computer that has what it lacks; boxes where none has."""
    own = _own(size)
    if not _lacks(own, text):
        return own
    return next((font for font in _fallbacks(size) if not _lacks(font, text)), own)


@cache
def _own(size: int) -> Font:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


@cache
def _fallbacks(size: int) -> tuple[Font, ...]:
    found = []
    for name in FALLBACKS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:  # not on this computer
            continue
    return tuple(found)


def _lacks(font: Font, text: str) -> bool:
    """Whether a letter of `text` would be drawn as the box that stands for missing ones."""
    box = bytes(font.getmask("\uffff"))
    return any(bytes(font.getmask(letter)) == box for letter in set(text) if not letter.isspace())
