"""The form: one control per entry of SETTINGS, shown only where it acts on the chosen model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.gpu import machine
from shared.library.catalog import Catalog
from shared.library.model_info import ModelInfo
from shared.settings.table import ANY_PRECISION, OF_THE_USER, SETTINGS, TEMPLATES, idle
from shared.ui.components.downloads import about_html, outlook_of, precision_choices
from shared.ui.components.errors import QUIET
from shared.ui.create.controls import control
from shared.ui.create.grid import GridGroup
from shared.ui.create.images import NO_PICTURES, PICTURE_SETTINGS, Images
from shared.ui.create.loras import Loras
from shared.ui.create.presets import Presets
from shared.ui.create.prompt import Prompts, as_typed
from shared.ui.create.schedule_plot import problem_html, time_grid_html
from shared.ui.create.upscale import Enlarging, upscaler_names

Updates = dict[Any, Any]

LAST_OF_SAMPLER = [name for name, setting in SETTINGS.items() if setting.group == "sampler"][-1]

# Controls that cannot be moved while they do nothing; the groups of pictures and LoRAs hide theirs.
RESTING = (
    "num_inference_steps",
    *(name for name, one in SETTINGS.items() if one.companions and one.group in ("guidance", "sampler")),
)
KEPT_LORAS = ("activated_loras", "loras_multipliers")  # where the user has chosen some


class Form:
    """Controls, model description and buttons, laid out top to bottom."""

    def __init__(self, engine: Engine):
        self._engine = engine
        catalog = engine.catalog
        self.controls: dict[str, Any] = {}
        model = self.first = catalog.model(catalog.default_model)  # shown by every new page
        self._add(model, "model_type", choices=self._models(), value=model.id)
        self.about = gr.HTML(self._about(model, model.defaults), elem_id="about")
        self._add(model, "precision", choices=precision_choices(engine, model, model.defaults))
        self._add(model, "prompt")
        self.prompts = Prompts(engine)
        self.live = gr.Checkbox(
            False, label="Redraw while typing", visible=redraws(model), elem_id="live", container=False
        )
        self._add(model, "negative_prompt")
        self.prompts.lay_out(model, self._add)
        with gr.Row():
            self._add(model, "resolution", choices=sizes(model))
            self._add(model, "batch_size")
        self._add(model, "num_inference_steps")
        with gr.Row(elem_id="seed-row"):
            self._add(model, "seed")
            self.random_seed = gr.Button("Random", size="sm", elem_id="random-seed", min_width=0, scale=0)
            self.last_seed = gr.Button("Reuse last", size="sm", elem_id="last-seed", min_width=0, scale=0)
        self.loras = Loras(engine, model, lambda name: self._add(model, name))
        self.images = Images(engine, model, self._add)
        self.enlarging = Enlarging(model, self._add)
        with gr.Accordion("Advanced", open=engine.config.advanced, elem_id="advanced"):
            for name in SETTINGS:
                if name not in self.controls:
                    self._add(model, name, info=SETTINGS[name].help)
                if name == LAST_OF_SAMPLER:
                    self.time_grid = gr.HTML(
                        self._grid({**model.defaults, "model_type": model.id}), elem_id="time-grid"
                    )
        self.grid = GridGroup(engine, model)
        self.presets = Presets(engine, model)  # last, as it keeps all of the above
        with gr.Row(elem_id="actions"):
            self.generate = gr.Button("Generate", variant="primary", size="lg", elem_id="generate", scale=3)
            self.cancel = gr.Button(
                "Cancel", size="lg", elem_id="cancel", visible=False, scale=1, min_width=96
            )
            self.forever = gr.Button("Forever", size="lg", elem_id="forever", scale=1, min_width=96)
        self.random_seed.click(None, None, self.controls["seed"], js="() => -1")
        self.prompts.wire(self.controls)
        self.loras.wire(self.controls["model_type"], self.controls["prompt"])
        self.presets.wire(self.controls["model_type"])
        self.images.wire(self.controls)
        wakers = {companion for name in RESTING for companion in SETTINGS[name].companions}
        gr.on(
            [self.controls[name].change for name in ("sample_solver", "negative_prompt", *sorted(wakers))],
            self.rest, self.inputs, [self.controls[name] for name in ("negative_prompt", *RESTING)],
            trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        self.grid.wire(self.controls["model_type"], self.inputs, self.read)
        self.stock = gr.State("")  # another value makes `tell` look again: what is on this computer
        planned = [self.controls[name].change for name in ("precision", "resolution", "batch_size")]
        told = [self.about, self.controls["precision"]]
        gr.on(
            [*planned, self.stock.change], self.tell, self.inputs, told, trigger_mode="always_last", **QUIET
        )

    @property
    def inputs(self) -> list[Any]:
        """The controls in the order in which `read` expects their values."""
        return list(self.controls.values())

    @property
    def outputs(self) -> list[Any]:
        """Everything that `fill` may update."""
        return [
            *self.inputs,
            self.about,
            self.live,
            self.time_grid,
            *self.prompts.outputs,
            *self.loras.outputs,
            *self.images.outputs,
            *self.grid.outputs,
            *self.enlarging.outputs,
        ]

    @property
    def shapers(self) -> list[Any]:
        """The controls that the time grid depends on."""
        names = [name for name, setting in SETTINGS.items() if setting.group == "sampler"]
        return [self.controls[name] for name in ("num_inference_steps", *names)]

    def read(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """The settings to submit: those that act on the chosen model; an emptied field means the default."""
        return self.images.read(self._acting(values))

    def _acting(self, values: tuple[Any, ...]) -> dict[str, Any]:
        given = dict(zip(self.controls, values, strict=True))
        acting = self._engine.catalog.model(given["model_type"]).settings
        told = set(TEMPLATES.values())  # what is in the boxes now may be something else
        return {name: given[name] for name in acting if given[name] is not None and name not in told}

    def rest(self, *values: Any) -> Updates:
        """Hold the controls that do nothing beside the others; say of a negative prompt when it does."""
        settings = self._acting(values)
        reasons = idle(settings)
        updates: Updates = {
            self.controls[name]: gr.update(interactive=name not in reasons)
            for name in RESTING
            if name in settings
        }
        unheard = reasons.get("negative_prompt", "") if settings.get("negative_prompt") else ""
        return {**updates, self.controls["negative_prompt"]: gr.update(info=unheard)}

    def draw_grid(self, *values: Any) -> str:
        """The plot of the time grid, or what is wrong with the settings that shape it."""
        return self._grid(self._acting(values))

    def _grid(self, settings: Mapping[str, Any]) -> str:
        try:
            levels = self._engine.catalog.time_grid(
                {**settings, "activated_loras": [], "outpaint": "", **NO_PICTURES}  # they do not bend it
            )
        except UserError as error:
            return problem_html(str(error))
        return time_grid_html(levels) if levels else ""

    def change_model(self, values: tuple[Any, ...]) -> Updates:
        """Show the controls and defaults of the model just chosen, keeping what the user typed."""
        given = dict(zip(self.controls, values, strict=True))
        kept = OF_THE_USER + (KEPT_LORAS if given["activated_loras"] else ())
        kept += PICTURE_SETTINGS if any(given[name] for name in NO_PICTURES) else ()
        updates = self.fill({name: given[name] for name in ("model_type", *kept)})
        acting = self._engine.catalog.model(given["model_type"]).settings
        for name in (
            "model_type",
            *OF_THE_USER,
        ):  # meanwhile they may say something newer, so no value is sent
            updates[self.controls[name]] = gr.update(visible=name in acting)
        return updates

    def fill(self, settings: Mapping[str, Any]) -> Updates:
        """Show these settings; what they leave out takes the default of their model."""
        model = self._engine.catalog.model(settings["model_type"])
        values = {**model.defaults, **as_typed(settings)}
        updates: Updates = {
            self.about: self._about(model, values),
            self.live: gr.update(visible=redraws(model)),
            self.time_grid: self._grid({**values, "model_type": model.id}),
            **self.prompts.suit(model, values),
            **self.loras.suit(model),
            **self.images.suit(model, values),
            **self.grid.suit(model),
            **self.enlarging.suit(model, values),
        }
        for name, component in self.controls.items():
            if name not in model.settings:
                updates[component] = gr.update(visible=False)
            elif name == "precision":
                choices = precision_choices(self._engine, model, values)
                updates[component] = gr.update(visible=True, value=values[name], choices=choices)
            elif name in CHOICES:
                updates[component] = gr.update(visible=True, value=values[name], choices=CHOICES[name](model))
            else:
                updates[component] = gr.update(visible=True, value=values[name])
        return updates

    def refresh(self) -> Updates:
        """The models as they are now: after a download or an edited card."""
        return {self.controls["model_type"]: gr.update(choices=self._models())}

    @staticmethod
    def stock_of(catalog: Catalog) -> str:
        """What `stock` holds: the models that the line below the model may say something of."""
        found = ((one, one.defaults.get("precision", ANY_PRECISION)) for one in catalog.models.values())
        return " ".join(
            f"{one.id} {kind}" for one, kind in found if not one.available or kind != ANY_PRECISION
        )

    def tell(self, *values: Any) -> Updates:
        """What a job with these settings downloads, if anything."""
        settings = self._acting(values)
        model = self._engine.catalog.model(settings["model_type"])
        precision = gr.skip()
        if "precision" in settings:
            precision = gr.update(choices=precision_choices(self._engine, model, settings))
        return {self.about: self._about(model, settings), self.controls["precision"]: precision}

    def _about(self, model: ModelInfo, settings: Mapping[str, Any]) -> str:
        whole = model.available and "precision" not in model.settings
        found = None if whole else outlook_of(self._engine, model, settings)
        return about_html(model, is_slow(model, self._engine.config.gpu), found)

    def _add(self, model: ModelInfo, name: str, **options: Any) -> Any:
        setting = SETTINGS[name]
        value = model.defaults.get(name, setting.default)
        shown = {"value": value, "visible": name in model.settings}
        if name in RESTING:
            shown["interactive"] = name not in idle(model.defaults)
        self.controls[name] = control(setting, **{**shown, **options})
        return self.controls[name]

    def _models(self) -> list[tuple[str, str]]:
        return [
            (label(model), model.id) for model in self._engine.catalog.models.values() if model.card.visible
        ]


def sizes(model: ModelInfo) -> list[str]:
    """The model's usual sizes, its default always among them; any other can be typed."""
    usual = list(model.capabilities.get("resolutions", []))
    return usual if model.defaults["resolution"] in usual else [model.defaults["resolution"], *usual]


#: settings whose choices are the model's
CHOICES: dict[str, Callable[[ModelInfo], list[str]]] = {
    "resolution": sizes,
    "hires_upscaler": upscaler_names,
}


def redraws(model: ModelInfo) -> bool:
    """Whether the model is made for so few steps that it can follow typing."""
    return bool(model.capabilities.get("unified"))


def label(model: ModelInfo) -> str:
    """The name; a model that is not on disk says so."""
    return model.name if model.available else f"{model.name} (to download)"


def is_slow(model: ModelInfo, gpu: str) -> bool:
    """Whether the model is too large for this computer, which has no graphics card."""
    return "transformer_config" not in model.card.model and not machine.has_card(gpu)
