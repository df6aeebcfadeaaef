"""Control maps: what a ControlNet is shown of a picture, by name, in the form it was trained on.

Lines are white on black, near is bright, poses have OpenPose's colours on black. `PREPROCESSORS` is the one
table that pages and command lines read; `control_map` makes a map. Depth and pose need models of their own,
which `missing` names.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shared.errors import UserError
from shared.imaging import sources
from shared.imaging.preprocess import depth, lines, pose
from shared.settings.table import Setting

Make = Callable[
    ..., np.ndarray
]  # (RGB picture [H, W, 3] uint8, a keyword per parameter) -> map [H, W, 3] uint8


@dataclass(frozen=True)
class ModelFile:
    """A file that an extra needs, and where it is published. `path` is relative to the models' folder."""

    path: str
    url: str
    bytes: int  # rounded


@dataclass(frozen=True)
class Extra:
    """What a preprocessor needs beyond the requirements: an importable package and files."""

    package: str
    files: tuple[ModelFile, ...]
    licence: str

    @property
    def size(self) -> str:
        return f"{sum(file.bytes for file in self.files) / 1e6:.0f} MB"


@dataclass(frozen=True, kw_only=True)
class Preprocessor:
    """One way to make a control map; `make` takes the parameters by name, and `folder` with an `extra`."""

    name: str
    label: str
    help: str
    make: Make
    parameters: tuple[Setting, ...] = ()
    extra: Extra | None = None
    empty: str = "all of the control picture has one colour"  # what a map without anything in it means


_number = partial(Setting, group="control", kind=float)
_whole = partial(Setting, group="control", kind=int, step=1)
_flag = partial(Setting, group="control", kind=bool)

_HUB = "https://huggingface.co/{}/resolve/main/{}"
_DEPTH_REPO, _POSE_REPO = "depth-anything/Depth-Anything-V2-Small-hf", "yzd-v/DWPose"
_DEPTH = Extra(
    package="transformers",
    files=tuple(
        ModelFile(f"{depth.FOLDER}/{name}", _HUB.format(_DEPTH_REPO, name), size)
        for name, size in (("config.json", 1_000), ("model.safetensors", 99_200_000))
    ),
    licence="Apache-2.0",
)  # fmt: skip
_POSE = Extra(
    package="onnxruntime",
    files=tuple(
        ModelFile(f"{pose.FOLDER}/{name}", _HUB.format(_POSE_REPO, name), size)
        for name, size in ((pose.DETECTOR, 216_700_000), (pose.KEYPOINTS, 134_400_000))
    ),
    licence="Apache-2.0",
)

PREPROCESSORS: dict[str, Preprocessor] = {
    preprocessor.name: preprocessor
    for preprocessor in (
        Preprocessor(
            name="as_it_is", label="The picture is a control map", make=lines.as_it_is,
            help="Takes the picture unchanged: a map made elsewhere, or drawn by hand.",
            parameters=(
                _flag(name="invert", default=False, label="Invert",
                      help="For drawings with black lines on white: the models know white lines on black."),
            ),
        ),
        Preprocessor(
            name="canny", label="Edges (Canny)", make=lines.canny,
            empty="no edge of it is as strong as asked for; lower the strengths under its details",
            help="Thin lines wherever brightness changes. Keeps shapes and detail exactly.",
            parameters=(
                _whole(name="low", default=100, minimum=0, maximum=1000, label="Weak edges",
                       help="Edges of at least this strength are drawn where they go on from a strong one; "
                       "lower draws longer lines."),
                _whole(name="high", default=200, minimum=0, maximum=1000, label="Strong edges",
                       help="Edges of this strength are always drawn; lower draws more."),
            ),
        ),
        Preprocessor(
            name="lines", label="Straight lines (like MLSD)", make=lines.straight_lines,
            empty="no straight line was found; a shorter one may count, or take edges",
            help="Only straight lines: buildings, rooms, furniture. People and plants are left free.",
            parameters=(
                _number(name="length", default=3.0, minimum=0, maximum=50, step=0.5, label="Shortest line",
                        help="In percent of the picture's shorter side; shorter lines are left out."),
                _number(name="certainty", default=0.0, minimum=-10, maximum=200, step=1, label="Certainty",
                        help="How sure a line must be no accident; higher draws fewer lines."),
            ),
        ),
        Preprocessor(
            name="scribble", label="Scribble", make=lines.scribble,
            empty="no outline of it is as strong as asked for; lower the strength under its details",
            help="A few thick soft strokes along the main outlines; leaves the model much freedom. For "
            "ControlNet files from 2601 on.",
            parameters=(
                _number(name="coarseness", default=4.0, minimum=0.5, maximum=20, step=0.5, label="Coarseness",
                        help="Detail below this many pixels is smoothed away before strokes are drawn."),
                _whole(name="threshold", default=40, minimum=1, maximum=500, label="Strength",
                       help="Edges weaker than this are left out; lower draws more strokes."),
                _whole(name="thickness", default=5, minimum=1, maximum=31, label="Thickness",
                       help="Width of the strokes in pixels."),
            ),
        ),
        Preprocessor(
            name="gray", label="Gray", make=lines.gray,
            help="The picture without its colours: light and shapes stay, colours are free. For ControlNet "
            "files from 2602 on.",
        ),
        Preprocessor(
            name="tile", label="Tile (blurred copy)", make=lines.tile,
            help="The picture without its fine detail, which the model paints anew. For Tile files only.",
            parameters=(
                _number(name="factor", default=4.0, minimum=1, maximum=32, step=0.5, label="Blur",
                        help="How many pixels become one; more frees the model more."),
            ),
        ),
        Preprocessor(
            name="depth", label="Depth (Depth Anything V2)", make=depth.depth_map, extra=_DEPTH,
            help="How near everything is: keeps the space, frees colours and surfaces.",
            parameters=(
                _whole(name="detail", default=518, minimum=252, maximum=1036, step=14, label="Detail",
                       help="Side of the picture that the depth model sees, in pixels; 518 is what it knows "
                       "best."),
            ),
        ),
        Preprocessor(
            name="pose", label="Pose (DWPose)", make=pose.pose_map, extra=_POSE,
            empty="nobody was found in the control picture",
            help="Skeletons of the people, with hands and faces: keeps their pose, frees everything else.",
            parameters=(
                _number(name="person", default=0.3, minimum=0.05, maximum=0.95, step=0.05, label="People",
                        help="How sure a person must be; lower finds more people."),
                _number(name="confidence", default=0.3, minimum=0.05, maximum=0.95, step=0.05, label="Joints",
                        help="How sure a joint must be; lower draws more of them."),
                _flag(name="hands_and_face", default=True, label="Hands and faces",
                      help="Draws fingers and faces, too."),
                _whole(name="thickness", default=4, minimum=1, maximum=20, label="Thickness",
                       help="Half the width of a limb in pixels; OpenPose draws 4."),
            ),
        ),
    )
}  # fmt: skip


def control_map(
    name: str,
    picture: Image.Image,
    width: int,
    height: int,
    values: Mapping[str, Any] | None = None,
    *,
    how: str = "cover",
    folder: Path = Path("ckpts"),
) -> Image.Image:
    """The RGB control map `name` of `picture` (RGB), `width` x `height` pixels large.

    `values` are the preprocessor's parameters, defaults for what is not given; `how` fits the picture to the
    size (`sources.fit`); `folder` holds the extras' files. Raises UserError for a name, a value or a picture
    that cannot be used, and for an extra that is not there.
    """
    preprocessor = find(name)
    given = checked(preprocessor, values or {})
    if preprocessor.extra:
        lacking = missing(name, folder)
        if lacking:
            raise UserError(lacking)
        given["folder"] = folder
    fitted = sources.fit(picture.convert("RGB"), width, height, how).image
    return Image.fromarray(preprocessor.make(np.asarray(fitted), **given))


def empty(name: str, drawn: Image.Image) -> list[str]:
    """A note about a map that says nothing, because all of it has one colour."""
    values = np.asarray(drawn)
    if (values != values[0, 0]).any():
        return []
    return [f"The control map is empty: {find(name).empty}."]


def find(name: str) -> Preprocessor:
    """The preprocessor of that name; UserError when there is none."""
    if name not in PREPROCESSORS:
        raise UserError(
            f"There is no control preprocessor {name!r}; choose one of {', '.join(PREPROCESSORS)}"
        )
    return PREPROCESSORS[name]


def checked(preprocessor: Preprocessor, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` completed with the defaults; UserError for the first one that cannot be used."""
    known = {setting.name: setting for setting in preprocessor.parameters}
    for name in values:
        if name not in known:
            raise UserError(
                f"{preprocessor.name} has no parameter {name!r}; it has {', '.join(known) or 'none'}"
            )
    return {name: _usable(setting, values.get(name, setting.default)) for name, setting in known.items()}


def _usable(setting: Setting, value: Any) -> Any:
    if setting.kind is bool:
        if isinstance(value, bool):
            return value
        raise UserError(f"{setting.name} came as {value!r}; expected true or false")
    low, high = setting.minimum, setting.maximum
    assert low is not None and high is not None  # every number of the table has its range
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or setting.kind(value) != value:
        kind = "a whole number" if setting.kind is int else "a number"
        raise UserError(f"{setting.name} came as {value!r}; expected {kind} from {low:g} to {high:g}")
    return setting.kind(value)


def available(name: str, folder: Path = Path("ckpts")) -> bool:
    """Whether `control_map` can make this map here and now."""
    return not missing(name, folder)


def missing(name: str, folder: Path = Path("ckpts")) -> str:
    """The sentence that says what `name` still needs and how to get it; "" when it is ready."""
    preprocessor = find(name)
    extra = preprocessor.extra
    if extra is None:
        return ""
    if importlib.util.find_spec(extra.package) is None:
        return f"{preprocessor.label} needs the package {extra.package}: pip install {extra.package}"
    absent = [file for file in extra.files if not (folder / file.path).is_file()]
    if not absent:
        return ""
    wanted = " and ".join(f"{file.url} as {folder / file.path}" for file in absent)
    return f"{preprocessor.label} needs files ({extra.size} in all, {extra.licence}): save {wanted}"
