"""The tab "Settings": wgp_config.json, the worker, this browser's own choices, and what to tell of a bug.

It is one HTML form, drawn when the tab is opened: the page waits for none of it at the start.
"""

from __future__ import annotations

from dataclasses import asdict
from html import escape
from typing import Any

import gradio as gr

from shared import config as config_file
from shared.config import Config
from shared.engine.engine import Engine
from shared.gpu import machine
from shared.gpu.planner import engine_of
from shared.report import report, tail
from shared.ui import static_files
from shared.ui.components.errors import QUIET, shows_errors
from shared.ui.components.notice import notice_html
from shared.ui.create.presets import button_html
from shared.ui.settings.form import FIELDS, GROUPS, form_html, read_form
from shared.version import VERSION

FORM = static_files.read("preferences.js")
BROWSER = static_files.read("browser.js")

#: of the form, what this browser keeps over a reload
KEPT = ("model_type", "prompt", "negative_prompt")
KEEP = """(...values) => {
  if (window.zgpKeep) window.zgpKeep(values);
}"""


def header_area(html: str) -> gr.HTML:
    """The page's header. Its script does what this browser has chosen: colours, sounds, the kept prompt."""
    return gr.HTML(html, js_on_load=BROWSER, elem_id="header")


class Preferences:
    """Lays the tab out and connects it. `create` is the tab with the form, `header` made by header_area."""

    def __init__(self, engine: Engine, page: gr.Blocks, tabs: gr.Tabs, create: Any, header: gr.HTML):
        self._engine, self._create = engine, create
        with gr.Tab("Settings", id="settings", elem_id="settings-tab") as tab:
            self.area = gr.HTML("", js_on_load=FORM, elem_id="preferences", apply_default_css=False)
        tab.select(self.show, None, self.area, **QUIET)
        self.area.act(self.act, None, self.area, **QUIET)
        self._keep_the_form(header)

    def _keep_the_form(self, header: gr.HTML) -> None:
        form = self._create.form
        controls = [form.controls[name] for name in KEPT]
        gr.on([control.change for control in controls], None, controls, None, js=KEEP)
        texts = [form.controls[name] for name in KEPT[1:]]
        # A listener costs the page as much as it has outputs: the whole form only where it must change.
        wanted = gr.State(None)
        header.restore(self.restore, controls, [*texts, wanted], **QUIET)
        filled = [*form.outputs, *self._create.welcome.examples]
        wanted.change(self.fill, wanted, filled, **QUIET)

    @shows_errors
    def restore(self, event: gr.EventData, model_id: str, prompt: str, negative: str) -> Any:
        """A new page: (prompt, negative prompt, settings that the whole form is to show or None), of what was
        on this browser's form before and of the defaults as they are saved by now.
        """
        form, models = self._create.form, self._engine.catalog.models
        kept = dict(zip(KEPT, event.kept or (), strict=False))
        kept = {name: text for name, text in kept.items() if text and isinstance(text, str)}
        kept |= {"prompt": prompt} if prompt else {}  # somebody was quicker
        model = models.get(kept.pop("model_type", model_id)) or models[self._engine.catalog.default_model]
        texts = {name: text for name, text in kept.items() if name in model.settings}
        if (model.id, model.defaults) == (form.first.id, form.first.defaults):
            return *(texts.get(name, gr.skip()) for name in KEPT[1:]), None
        return gr.skip(), gr.skip(), {"model_type": model.id, **texts}

    @shows_errors
    def fill(self, settings: dict[str, Any] | None) -> Any:
        """Show these settings."""
        if settings is None:
            return gr.skip()
        model = self._engine.catalog.model(settings["model_type"])
        return {**self._create.form.fill(settings), **self._create.welcome.suit(model)}

    # -- what the user does -------------------------------------------------------------------------------

    @shows_errors
    def show(self) -> str:
        """The form as the file has it now."""
        return self._page([])

    @shows_errors
    def act(self, event: gr.EventData) -> str:
        """What a button of the form says; `values` are the form's."""
        acts = {
            "save": self.save,
            "restart": self.restart,
            "defaults": self.forget_defaults,
            "everything": self.forget_everything,
        }
        return acts[event.name](event.values)

    def save(self, values: Any) -> str:
        """Write what was changed."""
        old = asdict(self._read()[0])
        new = read_form(values)
        changed = {name: value for name, value in new.items() if value != _plain(old[name])}
        self._engine.preferences.change_config(changed)
        if not changed:
            return self._page(["Nothing is different from what is saved."])
        waits = {GROUPS[FIELDS[name].group][0] for name in changed}
        lines = ["Saved."]
        if "worker" in waits:
            lines.append("Restart the worker for it to take the new values.")
        if "start" in waits:
            lines.append("Folders and the model at the start count when ZGP is started again.")
        return self._page(lines)

    def restart(self, _: Any) -> str:
        """A new worker process, after the job in hand."""
        self._engine.restart_worker()
        return self._page(["The worker starts again, after the job that it has in hand."])

    def forget_defaults(self, _: Any) -> str:
        """Factory defaults for all models."""
        asides = self._engine.preferences.reset_defaults()
        said = [f"What was saved is now in {path}." for path in asides]
        return self._page(["All models have their factory defaults.", *said])

    def forget_everything(self, _: Any) -> str:
        """Factory defaults for the program and all models."""
        asides = [
            *self._engine.preferences.reset_defaults(),
            *filter(None, [self._engine.preferences.reset_config()]),
        ]
        said = [f"What was saved is now in {path}." for path in asides]
        return self._page(["Everything is as at the first start.", *said])

    # -- what is seen -------------------------------------------------------------------------------------

    def _read(self) -> tuple[Config, list[str]]:
        return config_file.read(self._engine.config.file_folder or self._engine.config.root)

    def _page(self, lines: list[str]) -> str:
        config, told = self._read()
        engine = self._engine
        locked = engine.config.lock_config
        if locked:
            lines = [*lines, "These settings are locked (--lock-config)."]
        notice = notice_html([*lines, *told]) if lines or told else ""
        models = [(model.id, model.name) for model in engine.catalog.models.values()]
        return notice + form_html(asdict(config), models, locked) + self._about(config)

    def _about(self, config: Config) -> str:
        engine = self._engine.config
        card = machine_text(machine.survey(engine.gpu), engine.overrides.offload)
        different = {name: value for name, value in asdict(config).items() if value != asdict(Config())[name]}
        places = {
            "Pictures": engine.output_dir,
            "Models": ", ".join(map(str, (engine.ckpts, *engine.others))),
            "LoRAs": engine.lora_folders.root if engine.lora_folders else engine.root / "loras",
            "Settings": engine.file_folder or engine.root,
            "Log": engine.log_file,
        }
        rows = "".join(f"<dt>{name}</dt><dd>{escape(str(place))}</dd>" for name, place in places.items())
        log = "\n".join(tail(engine.log_file)) or "It is empty."
        text = report(card, different, engine.log_file)
        return (
            f'<section class="zgp-card"><h2>About</h2><p>ZGP {VERSION}. {escape(card)}</p><dl>{rows}</dl>'
            f"<details><summary>The log's last lines</summary><pre>{escape(log)}</pre></details>"
            f"<details><summary>A report for bugs</summary><pre>{escape(text)}</pre></details>"
            f"{button_html('copy', 'Copy report')}</section>"
        )


def machine_text(found: machine.Machine, offload: str = "") -> str:
    """What ZGP computes on; on a card, what moves the weights there. offload: the user's choice."""
    ram = f"{found.ram_total / 2**30:.0f} GB of RAM"
    if found.capability is None:
        return f"It computes on the CPU, with {ram}: no graphics card that it can use was found."
    card = f"{found.name}, {found.vram_total / 2**30:.0f} GB"
    return f"It computes on {card}, with {ram}. {engine_of(found, offload)} moves the weights there."


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
