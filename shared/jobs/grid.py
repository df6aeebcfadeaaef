"""Grids: one picture for each combination of the values of up to three settings. No torch.

What is typed becomes axes, the axes cells, each cell the complete settings of an ordinary job.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from shared.errors import UserError
from shared.jobs.records import Job
from shared.library.catalog import Catalog
from shared.library.model_info import ModelInfo
from shared.settings.messages import nearest
from shared.settings.table import OF_THE_USER, SETTINGS, TEMPLATES, Setting, SettingsError, idle, random_seed
from shared.settings.validation import Validated

MAX_CELLS = 200
NAMES = ("x", "y", "z")
#: they choose files or what becomes of a picture, not how it looks
_NO_AXES = (
    "batch_size", "image_format", "loras_optional", "multi_prompts_gen_type", *TEMPLATES.values()
)  # fmt: skip
_NUMBER = r"([-+]?\d{1,15}(?:\.\d{1,15})?)"
_RANGE = re.compile(rf"{_NUMBER}\s*-\s*{_NUMBER}\s*(?:\(\s*{_NUMBER}\s*\)|\[\s*(\d{{1,9}})\s*\])?")
_WORDS = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
_AGAIN = ", for example 4, 8, 12 or 0.1-0.9 [5] or 1-9 (+2)"


@dataclass(frozen=True)
class Axis:
    """A setting and its values as they are typed and shown. Of a prompt, the first value is searched for and
    replaced by each in turn. direction: "x", "y" or "z"; labels: of the cells; typed: what the user wrote.
    """

    direction: str
    setting: str
    values: tuple[Any, ...]
    labels: tuple[str, ...]
    typed: str = ""


@dataclass(frozen=True)
class Cell:
    """One picture (or batch) of a grid: its place on each axis, and its settings."""

    number: int
    name: str
    place: tuple[int, ...]
    validated: Validated


@dataclass(frozen=True)
class Grid:
    """Axes in the order x (columns), y (rows), z (sheets); cells in the order in which they are made."""

    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]

    @property
    def base(self) -> Validated:
        """The settings of the first cell; the others differ from it in what their labels say."""
        return next(cell for cell in self.cells if cell.number == 0).validated

    def record(self) -> list[dict[str, Any]]:
        """The axes as the database and the picture's metadata keep them."""
        return [asdict(axis) for axis in self.axes]


def axes_from(meta: Mapping[str, Any]) -> dict[str, list[str]]:
    """The axes of a grid's picture from its metadata, as `plan` takes them; {} for any other picture."""
    made = meta.get("zgp")
    grid = made.get("grid") if isinstance(made, dict) else None
    axes = grid.get("axes") if isinstance(grid, dict) else None
    if not isinstance(axes, dict):
        return {}
    return {name: axes[name] for name in NAMES if _is_axis(axes.get(name))}


def _is_axis(value: Any) -> bool:  # anyone may have written it
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(one, str) for one in value)
        and value[0] in SETTINGS
    )


def axes_for(model: ModelInfo) -> list[Setting]:
    """The settings of which a grid can show several values."""
    return [SETTINGS[name] for name in model.settings if _varies(SETTINGS[name])]


def _varies(setting: Setting) -> bool:
    return not setting.picture and setting.kind is not list and setting.name not in _NO_AXES


def example(setting: Setting, model: ModelInfo, models: Sequence[ModelInfo] = ()) -> str:
    """Values to type, as a placeholder shows them."""
    if setting.name in _EXAMPLES:
        return _EXAMPLES[setting.name]
    if setting.name == "model_type":
        return ", ".join(one.name for one in models[:2])
    if setting.choices:
        return ", ".join([choice for choice in setting.choices if choice][:3])
    if setting.kind is bool:
        return "off, on"
    if setting.kind is str:
        return '"one", "two, and more"'
    return _example_range(setting, model.defaults.get(setting.name, setting.default))


_EXAMPLES = {
    "prompt": "cat, dog, fox: the first is replaced by the others",
    "negative_prompt": '"", "blurry, dark"',
    "resolution": "512x512, 768x512",
    "num_inference_steps": "4, 8, 12 or 4-12 (+4)",
    "seed": "1-5 or -1, -1, -1",
    "loras_multipliers": "0.5, 0.8, 1",
    "stochast_ratio": "0, 0.5, 1, SDE",
    "time_dist_ctrl": '"1,1,1", "1.5,1,1"',
    "rfba_gap_steps": '"0.001,0.5", "0.001,0.6"',
    "hires_tile": "0, 512, 1024",
    "outpaint": '"0,0,64,0", "25%,0,25%,0"',
    "control_parameters": '"low=50, high=150", "low=100, high=200"',
}


def _example_range(setting: Setting, default: Any) -> str:
    low, high = setting.minimum or 0, setting.maximum or 1
    first = max(low, float(default or 0) / 2)
    last = min(high, max(float(default or 0) * 1.5, first + 4 * (setting.step or 1)))
    places = 0 if setting.kind is int else 1 if last > 2 else 2
    return f"{first:.{places}f}-{last:.{places}f} [4]"


# ---------------------------------------------------------------- from what is typed to values


def parse_axis(direction: str, name: Any, typed: Any, catalog: Catalog) -> Axis:
    """The axis of a setting (its name or label) from text such as "4, 8" or a list. UserError."""
    setting = _setting(name)
    texts = _texts(setting, typed)
    values: list[Any] = []
    for text in texts:
        values += _range(setting, text) or [_value(setting, text, catalog)]
        _check_count(len(values))
    if setting.name == "prompt" and len(values) < 2:
        raise UserError(
            f'Prompt: "{values[0]}" came alone; expected what is searched for, then its replacements, for '
            "example cat, dog, fox."
        )
    doubled = next((value for value in values if values.count(value) > 1), None)
    if doubled is not None and (setting.name, doubled) != ("seed", -1):
        raise UserError(f"{setting.label}: {_shown(doubled)} came twice; expected each value once.")
    written = typed if isinstance(typed, str) else ", ".join(map(_quoted, texts))
    labels = tuple(_label(setting, value, catalog) for value in values)
    return Axis(direction, setting.name, tuple(values), labels, written)


def _setting(name: Any) -> Setting:
    labels = {setting.label.lower(): setting for setting in SETTINGS.values()}
    found = SETTINGS.get(str(name)) or labels.get(str(name).lower())
    if found is None:
        near = nearest(str(name), [*SETTINGS, *labels])
        hint = f"did you mean {near}?" if near else "there is no such setting."
        raise UserError(f"A grid cannot vary '{name}': {hint}")
    if not _varies(found):
        raise UserError(f"A grid cannot vary {found.name}: choose a setting that changes the picture.")
    return found


def _texts(setting: Setting, typed: Any) -> list[str]:
    """The single values, without the quotes around those that hold commas."""
    if isinstance(typed, (list, tuple)):
        texts = [",".join(map(str, x)) if isinstance(x, (list, tuple)) else str(x) for x in typed]
    elif isinstance(typed, str):
        rows = list(csv.reader(typed.splitlines(), skipinitialspace=True))
        texts = [text.strip() for row in rows for text in row]
        if texts and texts[-1] == "" and typed.rstrip().endswith(","):
            texts.pop()
    else:
        texts = [str(typed)]
    if not any(texts):
        raise UserError(f"{setting.label}: no values came; expected some{_AGAIN}.")
    return texts


def _range(setting: Setting, text: str) -> list[Any]:
    """The numbers of "1-5", "0.1-0.9 [5]" or "0.1-0.9 (+0.2)"; [] when the text is something else."""
    match = _RANGE.fullmatch(text.strip())
    if setting.kind not in (int, float) or match is None:
        return []
    first, last = Decimal(match[1]), Decimal(match[2])
    if match[4]:
        numbers = _spread(first, last, int(match[4]))
    else:
        step = Decimal(match[3] or 1)
        if step == 0 or (match[3] is None and (last - first) % 1):
            raise UserError(
                f"{setting.label}: {text} names no step; expected {text.split(' ')[0]} [5] or (+0.1)."
            )
        count = int(abs(last - first) / abs(step)) + 1
        _check_count(count)
        step = abs(step) if last >= first else -abs(step)
        numbers = [first + step * i for i in range(count)]
    kind = round if setting.kind is int else float
    return list(dict.fromkeys(kind(number) for number in numbers))


def _spread(first: Decimal, last: Decimal, count: int) -> list[Decimal]:
    _check_count(count)
    return [first + (last - first) * i / max(count - 1, 1) for i in range(count)]


def _value(setting: Setting, text: str, catalog: Catalog) -> Any:
    """What `text` means; what means nothing stays as it is, for the checks of the cell to say so."""
    if setting.name == "model_type":
        return _model(text, catalog)
    if setting.kind is bool:
        return _WORDS.get(text.lower(), text)
    if setting.kind in (int, float):
        try:
            number = float(text)
        except ValueError:
            return text
        return int(number) if setting.kind is int and number.is_integer() else number
    return text


def _model(text: str, catalog: Catalog) -> str:
    if text in catalog.models:
        return text
    names = {model.name.lower(): model.id for model in catalog.models.values()}
    return names.get(text.lower()) or catalog.model(text).id


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_CELLS:
        raise UserError(f"An axis came with {count:,} values; expected 1 to {MAX_CELLS}.")


def _label(setting: Setting, value: Any, catalog: Catalog) -> str:
    if setting.name == "prompt":
        return str(value) or "(nothing)"
    if setting.name == "model_type":
        return catalog.models[value].name
    if (setting.name, value) == ("seed", -1):
        return f"{setting.label}: random"
    return f"{setting.label}: {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.6g}" if isinstance(value, float) else str(value) or "none"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\n') or not text else text


# ---------------------------------------------------------------- from axes to cells


def plan(values: Mapping[str, Any], axes: Mapping[str, Sequence[Any]], catalog: Catalog) -> Grid:
    """The cells of a grid, all of them valid. SettingsError lists every problem.

    axes: "x" (columns), "y" (rows), "z" (sheets) -> (setting, its values), as a file of settings has them.
    """
    read = _axes(axes, catalog)
    count = math.prod(len(axis.values) for axis in read)
    if count > MAX_CELLS:
        raise SettingsError(
            [f"The grid has {count:,} cells; expected at most {MAX_CELLS}, leave values out."]
        )
    values = _with_a_seed(values, read)
    if any(axis.setting == "model_type" for axis in read):
        values = _own_values(values, catalog)
    cells, problems = list[Cell](), dict[str, list[str]]()
    for cell in _cells(values, read, catalog):
        if isinstance(cell, Cell):
            cells.append(cell)
            continue
        name, sentences = cell
        for sentence in sentences:
            problems.setdefault(sentence, []).append(name)
    if problems:
        raise SettingsError([_cell_problem(*problem) for problem in problems.items()])
    _check_that_they_act(read, cells)
    return Grid(read, tuple(cells))


def _axes(axes: Any, catalog: Catalog) -> tuple[Axis, ...]:
    if not isinstance(axes, Mapping) or not axes or not set(axes) <= set(NAMES):
        raise SettingsError(
            ['grid came without axes; expected "x", "y" or "z", each with a setting and its values, for '
             'example {"x": ["num_inference_steps", "4, 8"]}']
        )  # fmt: skip
    read, problems = list[Axis](), list[str]()
    for name in (name for name in NAMES if name in axes):
        pair = axes[name]
        try:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise UserError(
                    'it came in another form; expected a setting and its values, ["seed", "1, 2"].'
                )
            read.append(parse_axis(name, pair[0], pair[1], catalog))
        except UserError as error:
            problems.append(f"Grid, axis {name}: {error}")
    doubled = {axis.setting for axis in read if [one.setting for one in read].count(axis.setting) > 1}
    problems += [
        f"{SETTINGS[name].label} is on two axes; expected another setting." for name in doubled - {"prompt"}
    ]
    if problems:
        raise SettingsError(problems)
    return tuple(read)


def _with_a_seed(values: Mapping[str, Any], axes: Sequence[Axis]) -> dict[str, Any]:
    """One random seed for all cells, unless the seed is what varies."""
    seeds = any(axis.setting == "seed" for axis in axes)
    given = values.get("seed")
    return {**values, "seed": random_seed()} if not seeds and given in (None, -1) else dict(values)


def _own_values(values: Mapping[str, Any], catalog: Catalog) -> dict[str, Any]:
    """Without what is the model's default anyway: each model of a grid then takes its own."""
    model = catalog.model(values.get("model_type") or catalog.default_model)
    return {
        name: value
        for name, value in values.items()
        if name in OF_THE_USER or name not in model.defaults or value != model.defaults[name]
    }


def _cells(
    values: Mapping[str, Any], axes: Sequence[Axis], catalog: Catalog
) -> Iterator[Cell | tuple[str, list[str]]]:
    """The cells in the order in which they are made, for each wrong one its name and what is wrong."""
    for place in sorted(itertools.product(*(range(len(axis.values)) for axis in axes)), key=_order(axes)):
        name = ", ".join(axis.labels[i] for axis, i in zip(axes, place, strict=True))
        number = 0
        for axis, i in reversed(list(zip(axes, place, strict=True))):
            number = number * len(axis.values) + i
        try:
            yield Cell(number, name, place, _validated(values, axes, place, catalog))
        except SettingsError as error:
            yield name, error.problems


def _order(axes: Sequence[Axis]) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """Row by row, sheet by sheet; but models first, because another one takes long to load."""
    models = [i for i, axis in enumerate(axes) if axis.setting == "model_type"]
    return lambda place: (*(place[i] for i in models), *reversed(place))


def _validated(
    values: Mapping[str, Any], axes: Sequence[Axis], place: Sequence[int], catalog: Catalog
) -> Validated:
    given, problems = dict(values), list[str]()
    for axis, i in zip(axes, place, strict=True):
        value = axis.values[i]
        if axis.setting == "prompt":
            prompt, old = str(given.get("prompt") or ""), str(axis.values[0])
            if not old or old not in prompt:
                problems.append(
                    f'the prompt has no "{old}": expected some of its words first, as they stand there'
                )
            value = prompt.replace(old, str(value)) if old else prompt
        elif axis.setting == "seed" and value == -1:
            value = random_seed()
        given[axis.setting] = value
    try:
        validated = catalog.validate_one(given)
    except SettingsError as error:
        raise SettingsError([*problems, *error.problems]) from None
    name = catalog.models[validated.settings["model_type"]].name
    problems += [
        f"{SETTINGS[axis.setting].label} does not act on {name}: leave it out"
        for axis in axes
        if axis.setting not in validated.settings
    ]
    if problems:
        raise SettingsError(problems)
    return validated


def _cell_problem(sentence: str, names: Sequence[str]) -> str:
    more = f" (and {len(names) - 1} more cell{'s' if len(names) > 2 else ''})" if len(names) > 1 else ""
    return f"Cell {names[0]}{more}: {sentence}"


def _check_that_they_act(axes: Sequence[Axis], cells: Sequence[Cell]) -> None:
    """SettingsError for an axis along which all pictures would be the same."""
    found = [idle(cell.validated.settings) for cell in cells]
    problems = [
        f"All pictures would be the same. {SETTINGS[axis.setting].label}: {found[0][axis.setting]}"
        for axis in axes
        if all(axis.setting in reasons for reasons in found)
    ]
    if problems:
        raise SettingsError(problems)


# ---------------------------------------------------------------- how long it takes


def seconds(grid: Grid, done: Sequence[Job]) -> float | None:
    """What the grid may take, from jobs of the same models and sizes; None where there were none.

    Their time counts as in proportion to the steps and the pictures; loading a model is not counted.
    """
    rates: dict[tuple[Any, ...], list[float]] = {}
    for job in done:
        if job.started and job.finished and (job.grid is None or job.cell is not None):
            rates.setdefault(_like(job.settings), []).append(
                (job.finished - job.started) / _work(job.settings)
            )
    total = 0.0
    for settings in (cell.validated.settings for cell in grid.cells):
        known = rates.get(_like(settings))
        if not known:
            return None
        total += statistics.median(known) * _work(settings)
    return total


def _like(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    return settings.get("model_type"), settings.get("resolution"), settings.get("guidance_scale", 0) > 1


def _work(settings: Mapping[str, Any]) -> int:
    return int(settings.get("num_inference_steps", 1)) * int(settings.get("batch_size", 1))
