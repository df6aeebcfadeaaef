"""The group "Grid" of the form: up to three settings whose values make one labelled picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.jobs.grid import NAMES, Grid, axes_for, example, seconds
from shared.jobs.records import DONE
from shared.library.model_info import ModelInfo
from shared.settings.table import SETTINGS, SettingsError
from shared.ui.components.errors import QUIET
from shared.ui.components.text import duration_text, plural

Updates = dict[Any, Any]

AXES = dict(zip(NAMES, ("Columns", "Rows", "Sheets"), strict=True))
MOST_PROBLEMS = 3
REMEMBERED = 200  # jobs that the time is estimated from
HELP = "Choose what varies, and write its values: 4, 8, 12 or 0.1-0.9 [5] or 1-9 (+2)."


class GridGroup:
    """Lays the group out; Generate submits, because only it knows the whole form."""

    def __init__(self, engine: Engine, model: ModelInfo):
        self._engine = engine
        self.settings: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        with gr.Accordion("Grid", open=False, elem_id="grid-group") as self.group:
            for name, label in AXES.items():
                with gr.Row(elem_classes="zgp-one-line"):
                    self.settings[name] = gr.Dropdown(
                        self._choices(model), value="", label=label, min_width=0, scale=1,
                        elem_id=f"grid-{name}",
                    )  # fmt: skip
                    self.values[name] = gr.Textbox(
                        label="Values", max_lines=3, min_width=0, scale=1, elem_id=f"grid-{name}-values"
                    )
            self.about = gr.HTML(_line(HELP), elem_id="grid-about", apply_default_css=False)
            self.generate = gr.Button("Generate grid", size="sm", elem_id="generate-grid")

    @property
    def inputs(self) -> list[Any]:
        """What `axes` reads."""
        return [*self.settings.values(), *self.values.values()]

    def wire(self, model_type: Any, form_inputs: list[Any], read: Any) -> None:
        """Connect the group. read: from the values of `form_inputs` to settings."""
        last = {"trigger_mode": "always_last", **QUIET}
        for name, chosen in self.settings.items():
            chosen.change(self.suggest, [chosen, model_type], self.values[name], **last)
        gr.on(
            [*(one.change for one in self.inputs), self.group.expand],
            lambda *values: self.describe(values, read), [*self.inputs, *form_inputs], self.about, **last,
        )  # fmt: skip

    def suit(self, model: ModelInfo) -> Updates:
        """Offer what acts on the model; an axis of something else is forgotten."""
        choices = self._choices(model)
        return {one: gr.update(choices=choices) for one in self.settings.values()}

    @property
    def outputs(self) -> list[Any]:
        """What `suit` and `fill` may update."""
        return [self.group, *self.inputs]

    def fill(self, model: ModelInfo, axes: Mapping[str, Sequence[str]]) -> tuple[Updates, list[str]]:
        """Show the axes of a grid that was made, and a line for each that does nothing here."""
        if not axes:
            return {}, []
        here = {setting.name for setting in axes_for(model)}
        updates: Updates = {self.group: gr.update(open=True)}
        lines = []
        for axis in AXES:
            name, typed = axes.get(axis, ("", ""))
            if name and name not in here:
                lines.append(
                    f"{AXES[axis]} of its grid, {SETTINGS[name].label}, were left out: {model.name} has none."
                )
                name, typed = "", ""
            updates[self.settings[axis]] = gr.update(choices=self._choices(model), value=name)
            updates[self.values[axis]] = typed
        return updates, lines

    def suggest(self, name: str, model_id: str) -> Any:
        """An example of the values, in the colour of what is not there."""
        if not name:
            return gr.update(placeholder="")
        models = list(self._engine.catalog.models.values())
        model = self._engine.catalog.model(model_id)
        here = [one for one in models if one.available]
        return gr.update(placeholder=example(SETTINGS[name], model, here))

    def axes(self, values: tuple[Any, ...]) -> tuple[dict[str, list[str]], tuple[Any, ...]]:
        """The axes that are chosen, as plan_grid takes them; and the values of the form behind them."""
        settings, typed = values[: len(AXES)], values[len(AXES) : 2 * len(AXES)]
        pairs = zip(AXES, settings, typed, strict=True)
        return {axis: [name, text or ""] for axis, name, text in pairs if name}, values[2 * len(AXES) :]

    def describe(self, values: tuple[Any, ...], read: Any) -> str:
        """What the grid would make and how long that may take, or what is wrong with it."""
        axes, of_form = self.axes(values)
        written = {axis: pair for axis, pair in axes.items() if pair[1].strip()}
        if not written:
            return _line(HELP)
        try:
            return _line(self._made(self._engine.plan_grid({"prompt": "-", **read(of_form)}, written)))
        except SettingsError as error:
            return "".join(map(_problem, error.problems[:MOST_PROBLEMS]))
        except UserError as error:
            return _problem(str(error))

    def _made(self, grid: Grid) -> str:
        pictures = sum(cell.validated.settings["batch_size"] for cell in grid.cells)
        takes = seconds(grid, self._engine.store.jobs([DONE], REMEMBERED))
        about = "" if takes is None else f", in about {duration_text(max(1, takes))}"
        return f"Makes {plural(pictures, 'picture')}{about}, and one that shows them all."

    def _choices(self, model: ModelInfo) -> list[tuple[str, str]]:
        return [("none", ""), *((setting.label, setting.name) for setting in axes_for(model))]


def _line(text: str) -> str:
    return f'<p class="zgp-lora-line" role="status">{escape(text)}</p>'


def _problem(sentence: str) -> str:
    return f'<p class="zgp-problem" role="alert">{escape(sentence)}</p>'
