"""The groups "Image" and "Control" of the form: pictures to start from, to repaint in part, and to follow."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from PIL import Image

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.imaging import masks, sources
from shared.imaging.preprocess import PREPROCESSORS, Preprocessor, control_map, empty, find, missing
from shared.jobs.inputs import PICTURES, keep_picture, known_copy
from shared.library.model_info import ModelInfo
from shared.settings.parsing import parse_parameters, parse_resolution
from shared.settings.table import SETTINGS
from shared.ui.components.errors import QUIET, shows_errors
from shared.ui.create.controls import control
from shared.ui.create.painter import EMPTY, is_painted, mask_of, painted_over, painter_area, painter_html
from shared.weights.downloads import ensure
from shared.weights.files import Required

Updates = dict[Any, Any]

PICTURE_SETTINGS = tuple(name for name, setting in SETTINGS.items() if setting.group == "pictures")
NO_PICTURES = dict.fromkeys(PICTURES, "")
KINDS = [f".{name.lower()}" for name in (*sources.FORMATS, "JPG", "TIF")]
WHAT = {"image_start": "picture to start from", "image_mask": "mask", "image_guide": "control picture"}
STROKES = "|"  # image_guide while it is painted on: the picture's path, this, and the strokes
SIDES = ("Left", "Top", "Right", "Bottom")
MASK_SETTINGS = ("mask_expand", "mask_feather", "mask_only", "mask_margin")
STRENGTHS = ("control_net_weight", "control_start", "control_end")

# From the four sides, the setting outpaint and the strength to the last two: what is new is painted freely.
_EXTEND = """(left, top, right, bottom, before, strength) => {
  const text = [left, top, right, bottom].map((side) => side.trim() || '0').join(',');
  const now = /[^0,]/.test(text) ? text : '';
  return [now, now && !before ? 1 : strength];
}"""
_PAINTED = "() => window.zgpPainted"
_PAINTED_ON = f"(guide) => guide.split('{STROKES}')[0] + '{STROKES}' + window.zgpPainted"


class Images:
    """Lays the groups out; `add(model, name)` makes the control of a setting where it is called."""

    def __init__(self, engine: Engine, model: ModelInfo, add: Callable[..., Any]):
        self._engine = engine
        shown = {"open": False, "elem_classes": "zgp-pictures"}
        with gr.Accordion(
            "Image", elem_id="image-group", visible="image_start" in model.settings, **shown
        ) as self.image_group:
            self._lay_out_image(model, add)
        with gr.Accordion(
            "Control", elem_id="control-group", visible="image_guide" in model.settings, **shown
        ) as self.control_group:
            self._lay_out_control(model, add)

    def _lay_out_image(self, model: ModelInfo, add: Callable[..., Any]) -> None:
        self.start, self.mask = add(model, "image_start"), add(model, "image_mask")
        self.outpaint = add(model, "outpaint")
        self.image_file = _drop("image-drop")
        self.easel = painter_area("easel")
        with gr.Column(elem_classes="zgp-with-picture"):
            self.mask_file = gr.UploadButton(
                "Mask from a file", file_types=KINDS, size="sm", elem_id="mask-file"
            )
            self.strength = add(model, "denoising_strength", info=SETTINGS["denoising_strength"].help)
            with gr.Column(elem_classes="zgp-with-mask"):
                for name in MASK_SETTINGS:
                    add(model, name, info=SETTINGS[name].help)
            with gr.Accordion("Extend beyond the borders", open=False, elem_id="extend-group"):
                gr.HTML(f'<p class="zgp-lora-line">{escape(SETTINGS["outpaint"].help)}</p>')
                with gr.Row(elem_id="extend-sides"):
                    self.sides = [
                        gr.Textbox(
                            "", label=side, placeholder="0", min_width=0, elem_id=f"extend-{side.lower()}"
                        )
                        for side in SIDES
                    ]

    def _lay_out_control(self, model: ModelInfo, add: Callable[..., Any]) -> None:
        self.guide, self.details = add(model, "image_guide"), add(model, "control_parameters")
        self.guide_file = _drop("control-drop")
        self.map = painter_area("map")
        with gr.Column(elem_classes="zgp-with-picture"):
            self.what = add(
                model,
                "control_preprocessor",
                choices=[(one.label, one.name) for one in PREPROCESSORS.values()],
            )
            self.about = gr.HTML("", elem_id="preprocessor-about", apply_default_css=False)
            self.fetch = gr.Button("Fetch", visible=False, size="sm", elem_id="preprocessor-fetch")
            self._lay_out_details(model)
            for name in STRENGTHS:
                add(model, name, info=SETTINGS[name].help)

    def _lay_out_details(self, model: ModelInfo) -> None:
        chosen = model.defaults.get("control_preprocessor")
        self.parameters: dict[str, list[Any]] = {}
        self.columns: dict[str, Any] = {}
        for name, preprocessor in PREPROCESSORS.items():
            with gr.Column(visible=name == chosen) as self.columns[name]:
                self.parameters[name] = [
                    control(replace(one, name=f"{name}-{one.name}"), value=one.default, info=one.help)
                    for one in preprocessor.parameters
                ]

    def wire(self, controls: Mapping[str, Any]) -> None:
        """Connect the groups with each other and with the form's controls."""
        model_type, resolution = controls["model_type"], controls["resolution"]
        self.resolution = resolution
        last = {"trigger_mode": "always_last", **QUIET}
        self.started = [self.start, self.mask, resolution, self.image_group, self.outpaint, *self.sides]
        self.masked = [self.mask, self.image_group]
        self.image_file.upload(
            self.take_image, [self.image_file, model_type], [*self.started, self.image_file], **QUIET
        )
        self.easel.painted(None, None, self.mask, js=_PAINTED)
        self.easel.remove(lambda: ("", ""), None, [self.start, self.mask], **QUIET)
        self.mask_file.upload(self.take_mask, [self.mask_file, self.start], self.mask, **QUIET)
        gr.on(
            [self.start.change, self.mask.change], self.draw_image, [self.start, self.mask],
            [self.easel, self.image_group], **last,
        )  # fmt: skip
        for side in self.sides:
            side.change(  # not "input": pasting makes no such event
                None, [*self.sides, self.outpaint, self.strength], [self.outpaint, self.strength], js=_EXTEND
            )
        self.guide_file.upload(
            self.take_guide, [self.guide_file, model_type, self.start],
            [self.guide, self.guide_file, self.control_group, resolution], **QUIET,
        )  # fmt: skip
        self.map.painted(None, self.guide, self.guide, js=_PAINTED_ON)
        self.map.remove(lambda: "", None, self.guide, **QUIET)
        self._wire_map(resolution, last)

    def _wire_map(self, resolution: Any, last: Mapping[str, Any]) -> None:
        needed = [self.guide, self.what, self.details, resolution]
        shown = [self.map, self.about, self.fetch, self.control_group]
        self.guide.change(self.draw_unpainted_map, needed, shown, **last)
        gr.on(
            [self.what.change, self.details.change, resolution.change], self.draw_map, needed, shown, **last
        )
        self.what.input(None, None, self.details, js="() => ''")
        details = [one for each in self.parameters.values() for one in each]
        self.what.input(self.show_details, self.what, [*self.columns.values(), *details], **last)
        for name, components in self.parameters.items():
            for component in components:
                component.input(None, components, self.details, js=_pairs(PREPROCESSORS[name]))
        self.fetch.click(
            self.fetch_extra, self.what, self.fetch, api_visibility="private", concurrency_limit=1
        ).then(self.draw_map, needed, shown, **QUIET)

    def takes_from(self, area: Any) -> None:
        """Let the buttons of `area` (`pictures.picture_area`) send pictures here."""
        area.image(self.send_image, None, self.started, **QUIET)
        area.control(self.send_guide, None, [self.guide, self.control_group], **QUIET)

    def takes_masks_from(self, area: Any) -> None:
        """Let a button of `area` send pictures here as masks."""
        area.mask(self.send_mask, self.start, self.masked, **QUIET)

    # -- for the form -------------------------------------------------------------------------------------

    @property
    def outputs(self) -> list[Any]:
        """What `suit` may update."""
        details = [one for each in self.parameters.values() for one in each]
        return [self.image_group, self.control_group, *self.sides, *self.columns.values(), *details]

    def suit(self, model: ModelInfo, settings: Mapping[str, Any]) -> Updates:
        """Show the groups where they act, and the details of the preprocessor as the settings have them."""
        updates: Updates = {
            self.image_group: gr.update(visible="image_start" in model.settings),
            self.control_group: gr.update(visible="image_guide" in model.settings),
            **dict(zip(self.sides, _sides(settings.get("outpaint", "")), strict=True)),
        }
        if "image_guide" not in model.settings:
            return updates
        name, details = settings["control_preprocessor"], settings["control_parameters"]
        return {**updates, **self._details(name, parse_parameters(details))}

    def read(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings with files in the place of what was painted in the page."""
        given = dict(settings)
        if not given.get("image_start"):
            given.pop("image_mask", None)
            given.pop("outpaint", None)
        elif is_painted(given.get("image_mask", "")):
            given["image_mask"] = self._kept_mask(given["image_mask"], given["image_start"])
        path, _, strokes = given.get("image_guide", "").partition(STROKES)
        if strokes and strokes != EMPTY:
            path = self._kept_map(given, path, strokes)
            given |= {"control_preprocessor": "as_it_is", "control_parameters": ""}
        return {**given, "image_guide": path} if "image_guide" in given else given

    def present(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The settings without pictures that are not among the kept ones, and a line for each of those.

        Settings may come from anyone's file: other files of this computer are not looked at.
        """
        named = [name for name in PICTURES if settings.get(name)]
        kept = {name: known_copy(settings[name], self._engine.config.inputs) for name in named}
        given = {**settings, **{name: str(path) for name, path in kept.items()}}
        lost = [name for name, path in kept.items() if path is None]
        if "image_start" in lost and "image_mask" in given:
            given["image_mask"] = ""
        lines = [f"Its {WHAT[name]} is not here: choose it again." for name in lost]
        return {**given, **dict.fromkeys(lost, "")}, lines

    def _kept_mask(self, painted: str, start: str) -> str:
        mask = mask_of(painted)
        if mask is None:
            return ""
        return self._kept(masks.resize(mask, self._picture(start).size))

    def _kept_map(self, settings: Mapping[str, Any], guide: str, strokes: str) -> str:
        picture = self._picture(guide)
        values = parse_parameters(settings["control_parameters"])
        size = parse_resolution(settings["resolution"])
        drawn = self._map(picture, settings["control_preprocessor"], values, *size)
        return self._kept(painted_over(drawn, strokes))

    def _kept(self, picture: sources.Picture) -> str:
        """The path of its copy; the user is told what was corrected in it."""
        path, notes = keep_picture(picture, self._engine.config.inputs)
        _say(notes)
        return str(path)

    def _picture(self, path: str) -> Image.Image:
        return sources.load_picture(self._known(path)).image

    def _known(self, path: str) -> Path:
        """A kept picture. The path comes from the browser: no other file of this computer is looked at."""
        copy = known_copy(path, self._engine.config.inputs)
        if copy is None:
            raise UserError("This picture is not here any more: choose it again.")
        return copy

    # -- the picture to start from ------------------------------------------------------------------------

    @shows_errors
    def take_image(self, path: str, model_id: str) -> Updates:
        """Start from a picture. Its transparent parts, if it has any, become the mask."""
        source = sources.load_picture(Path(path))
        model = self._engine.catalog.model(model_id)
        mask = "" if source.alpha is None else self._kept(masks.from_alpha(source.alpha))
        size = "{}x{}".format(*suited_size(source.image.size, model))
        return {**self._started(self._kept(Path(path)), mask, size), self.image_file: None}

    @shows_errors
    def send_image(self, event: gr.EventData) -> Updates:
        """Start from a picture that was made."""
        record = self._engine.store.image(int(event.id))
        return self._started(self._kept(Path(record.path)), "", f"{record.width}x{record.height}")

    def _started(self, path: str, mask: str, size: str) -> Updates:
        opened = gr.update(open=True)
        started = {self.start: path, self.mask: mask, self.resolution: size, self.image_group: opened}
        return {**started, self.outpaint: "", **dict.fromkeys(self.sides, "")}

    @shows_errors
    def take_mask(self, path: str, start: str) -> str:
        """Take the mask from a file."""
        mask, notes = masks.from_upload(path, self._picture(start).size)
        _say([*notes, *masks.checked(mask)])
        return self._kept(mask)

    @shows_errors
    def send_mask(self, start: str, event: gr.EventData) -> Updates:
        """Take the mask from a picture that was made: what is bright in it is repainted."""
        if not start:
            raise UserError("Choose the picture to start from first: a mask says what of it is repainted.")
        path = self._engine.store.image(int(event.id)).path
        return {self.mask: self.take_mask(path, start), self.image_group: gr.update(open=True)}

    def draw_image(self, start: str, mask: str) -> Updates:
        """The picture with its mask. What was painted here is there already."""
        if start and is_painted(mask or ""):
            return {self.image_group: gr.update(label=_title("Image", start))}
        return {
            self.easel: self._easel(start, mask),
            self.image_group: gr.update(label=_title("Image", start)),
        }

    def _easel(self, start: str | None, mask: str | None) -> str:
        if not start:
            return ""
        try:
            picture = self._picture(start)
            painted = masks.from_upload(self._known(mask), picture.size)[0] if mask else None
        except UserError as error:
            return _problem(str(error))
        said = f"{picture.width} × {picture.height}. Paint over what is to change; unpainted, all of it may."
        return painter_html("mask", picture, painted, [said])

    # -- the control picture ------------------------------------------------------------------------------

    @shows_errors
    def take_guide(self, path: str, model_id: str, start: str) -> Updates:
        """Follow a picture, in its shape unless there is one to start from."""
        size = suited_size(sources.load_picture(path).image.size, self._engine.catalog.model(model_id))
        resolution = gr.skip() if start else "{}x{}".format(*size)
        return {**self._follow(Path(path)), self.guide_file: None, self.resolution: resolution}

    @shows_errors
    def send_guide(self, event: gr.EventData) -> Updates:
        """Follow a picture that was made."""
        return self._follow(Path(self._engine.store.image(int(event.id)).path))

    def _follow(self, picture: Path) -> Updates:
        return {self.guide: self._kept(picture), self.control_group: gr.update(open=True)}

    def show_details(self, name: str) -> Updates:
        """The details of the preprocessor just chosen, as they usually are."""
        return self._details(name, {})

    def _details(self, name: str, values: Mapping[str, Any]) -> Updates:
        updates: Updates = {column: gr.update(visible=one == name) for one, column in self.columns.items()}
        for setting, component in zip(PREPROCESSORS[name].parameters, self.parameters[name], strict=True):
            updates[component] = values.get(setting.name, setting.default)
        return updates

    def draw_unpainted_map(self, guide: str, name: str, details: str, resolution: str) -> Updates:
        """As `draw_map`, but what is being painted on is left alone."""
        if STROKES in guide:
            return {self.control_group: gr.skip()}
        return self.draw_map(guide, name, details, resolution)

    def draw_map(self, guide: str, name: str, details: str, resolution: str) -> Updates:
        """The map that will be followed, with the strokes on it, and what the preprocessor is or lacks."""
        path, _, strokes = guide.partition(STROKES)
        preprocessor, lacks = find(name), missing(name, self._engine.config.ckpts)
        updates: Updates = {
            self.map: "",
            self.control_group: gr.update(label=_title("Control", path)),
            self.about: _about(preprocessor, lacks),
            self.fetch: gr.update(
                visible=fetchable(preprocessor, lacks),
                value=preprocessor.extra
                and f"Fetch {preprocessor.extra.size} ({preprocessor.extra.licence})",
            ),
        }
        if not path:
            return updates
        try:
            picture = self._picture(path)
        except UserError as error:
            return {**updates, self.map: _problem(str(error))}
        shown = {**updates, self.map: painter_html("shown", picture, None, [])}
        if lacks:
            return shown
        try:
            width, height = parse_resolution(resolution)
            drawn = self._map(picture, name, parse_parameters(details), width, height)
        except UserError as error:
            return {**shown, self.about: _problem(str(error))}
        said = ["This is what the picture follows. White lines can be added, and any part made black."]
        said = empty(name, drawn) or said
        return {**updates, self.map: painter_html("map", drawn, None, said, strokes)}

    def _map(
        self, picture: Image.Image, name: str, values: Mapping[str, Any], width: int, height: int
    ) -> Image.Image:
        folder = self._engine.config.ckpts
        return control_map(name, picture, width, height, values, folder=folder)

    @shows_errors
    def fetch_extra(self, name: str, progress: gr.Progress = gr.Progress()) -> Updates:  # noqa: B008
        """Download what a preprocessor needs, after the user has pressed the button that names its size."""
        extra, folders = find(name).extra, self._engine.config.folders
        if extra is None:
            return {self.fetch: gr.update(visible=False)}
        needed = [Required(file.path, [file.url], Path(file.path).parent.as_posix()) for file in extra.files]
        paths = ensure(
            needed, folders, lambda one: progress((one.done_bytes, one.total_bytes or None), desc=one.file)
        )
        for wanted, path in ((folders.ckpts / file.path, paths[file.path]) for file in extra.files):
            if path != wanted:  # found in another folder
                wanted.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, wanted)
        return {self.fetch: gr.update(visible=False)}


def suited_size(size: tuple[int, int], model: ModelInfo) -> tuple[int, int]:
    """The size to paint a picture of `size` at: its own where the model is used to so many pixels, else the
    same shape with as many as the model's default.
    """
    multiple = int(model.capabilities.get("size_multiple", 16))
    usual = math.prod(parse_resolution(model.defaults["resolution"]))
    known = map(parse_resolution, model.capabilities.get("resolutions", []))
    most = max((usual, *(width * height for width, height in known)))
    if not (size[0] % multiple or size[1] % multiple) and usual / 4 <= math.prod(size) <= most:
        return size
    scale = math.sqrt(usual / math.prod(size))
    low, high = int(model.capabilities.get("min_size", 64)), int(model.capabilities.get("max_size", 8192))
    width, height = (min(max(round(side * scale / multiple) * multiple, low), high) for side in size)
    return width, height


def fetchable(preprocessor: Preprocessor, lacks: str) -> bool:
    """Whether what is missing are files, which the page can fetch."""
    extra = preprocessor.extra
    return bool(lacks) and extra is not None and importlib.util.find_spec(extra.package) is not None


def _drop(elem_id: str) -> gr.File:
    return gr.File(label="Picture", file_types=KINDS, height=64, elem_id=elem_id, elem_classes="zgp-drop")


def _about(preprocessor: Preprocessor, lacks: str) -> str:
    lines = [preprocessor.help]
    extra = preprocessor.extra
    if lacks and extra is not None and fetchable(preprocessor, lacks):
        lines.append(
            f"It needs a model of {extra.size} under the licence {extra.licence}, fetched once from "
            f"{urlsplit(extra.files[0].url).netloc} when you press the button."
        )
    said = "".join(f'<p class="zgp-lora-line">{escape(line)}</p>' for line in lines)
    return said + (_problem(lacks) if lacks and not fetchable(preprocessor, lacks) else "")


def _say(notes: Sequence[str]) -> None:
    for note in notes:
        gr.Info(escape(note, quote=False))


def _problem(sentence: str) -> str:
    return f'<p class="zgp-problem" role="alert">{escape(sentence)}</p>'


def _title(name: str, path: str | None) -> str:
    return f"{name} (in use)" if path else name


def _sides(outpaint: str) -> list[str]:
    """What the four fields of the setting show."""
    parts = [part.strip() for part in outpaint.split(",")]
    return ["" if part == "0" else part for part in parts] if len(parts) == len(SIDES) else [""] * len(SIDES)


def _pairs(preprocessor: Preprocessor) -> str:
    """JavaScript: from the values of its parameters to the text of control_parameters."""
    names = json.dumps([one.name for one in preprocessor.parameters])
    return f"(...values) => {names}.map((name, i) => name + '=' + values[i]).join(', ')"
