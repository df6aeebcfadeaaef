"""The group "Presets": the profiles that come with ZGP, and the user's own from the LoRA folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.library import profiles
from shared.library.model_info import ModelInfo
from shared.loras.presets import (
    Preset,
    check_name,
    find_preset,
    list_presets,
    read_preset,
    remove_preset,
    rename_preset,
    write_preset,
)
from shared.loras.strengths import merge_profile, split_profile, words
from shared.settings.table import SETTINGS
from shared.ui.components.errors import QUIET, shows_errors
from shared.ui.components.notice import notice_html
from shared.ui.components.text import plural
from shared.ui.create.import_settings import Recalled, complete

Updates = dict[Any, Any]
Settings = Mapping[str, Any]

PROFILE, PRESET = "profile/", "preset/"  # what a value of the select begins with
LEFT_OUT = ("model_type", "seed")  # of the settings, in a preset


# The buttons of HTML; script.js asks before those with `data-ask`. 'keep' and 'factory' are the defaults'.
_CLICKS = """element.addEventListener('click', (event) => {
  const act = event.target.closest('button')?.dataset.act;
  if (act === 'replace') trigger('replace');
  else if (act === 'keep' || act === 'factory') trigger('defaults', {name: act});
  else if (act) trigger('preset', {name: act});
});"""

_ACTS = (
    ("rename", "Rename the chosen one", ""),
    ("remove", "Delete the chosen one", "Really delete it?"),
    ("keep", "Save as default for this model", ""),
    ("factory", "Factory defaults", "Forget the saved defaults?"),
)


class Presets:
    """The components; `wire_form` lets them read and fill the whole form."""

    def __init__(self, engine: Engine, model: ModelInfo):
        self._engine = engine
        with gr.Accordion("Presets", open=False, elem_id="presets") as self.group:
            with gr.Row(elem_classes="zgp-one-line"):
                self.choice = gr.Dropdown(
                    self._choices(model), value=None, label="Preset", filterable=True, min_width=0, scale=1,
                    elem_id="preset",
                )  # fmt: skip
                self.apply = gr.Button("Apply", size="sm", min_width=0, scale=0, elem_id="apply-preset")
            self.about = gr.HTML("", js_on_load=_CLICKS, elem_id="preset-about", apply_default_css=False)
            with gr.Row(elem_classes="zgp-one-line"):
                self.name = gr.Textbox(
                    label="Save as", placeholder="Name", max_lines=1, min_width=0, scale=1,
                    elem_id="preset-name",
                )  # fmt: skip
                self.save = gr.Button("Save", size="sm", min_width=0, scale=0, elem_id="save-preset")
            self.whole = gr.Checkbox(
                False, label="With the prompt and all settings", container=False, elem_id="preset-whole"
            )
            self.acts = gr.HTML(
                _acts_html(engine.config.lock_config), js_on_load=_CLICKS, elem_id="preset-acts",
                apply_default_css=False,
            )  # fmt: skip

    def wire(self, model_type: Any) -> None:
        """Connect what only this group knows."""
        self.choice.input(self.describe, [self.choice, model_type], self.about, **QUIET)
        self.group.expand(self.look, [self.choice, model_type], [self.choice, self.about], **QUIET)
        shown = [self.name, self.choice, self.about]
        self.acts.preset(self.change, [self.choice, self.name, model_type], shown, **QUIET)
        model_type.change(self.offer, [self.choice, model_type], [self.choice, self.about], **QUIET)

    def wire_form(
        self,
        inputs: Sequence[Any],
        read: Callable[[tuple[Any, ...]], dict[str, Any]],
        filled: Sequence[Any],
        fill: Callable[[Recalled, tuple[Any, ...]], Updates],
        notice: Any,
    ) -> None:
        """inputs, read: the form's controls, and what makes settings of their values. filled, fill: what
        shows settings in the form, and what it updates.
        """
        self._read, self._fill, self._notice = read, fill, notice
        self.apply.click(self.use, [self.choice, *inputs], [*filled, self.about], **QUIET)
        named, saved = [self.name, self.whole, *inputs], [self.name, self.choice, self.about, notice]
        self.save.click(self.keep, named, saved, **QUIET)
        self.about.replace(self.keep_instead, named, saved, **QUIET)

    @shows_errors
    def use(self, choice: str | None, *values: Any) -> Updates:
        """Fill the form from a profile or preset."""
        found = self.applied(choice, self._read(values))
        return {**self._fill(found, values), self._notice: "", self.about: lines_html(found.report)}

    @shows_errors
    def keep(self, name: str, whole: bool, *values: Any) -> Updates:
        """Keep what the form says under a name."""
        return self._keep(name, whole, values)

    @shows_errors
    def keep_instead(self, name: str, whole: bool, *values: Any) -> Updates:
        """The same in the place of the preset that has the name."""
        return self._keep(name, whole, values, replace=True)

    def _keep(self, name: str, whole: bool, values: tuple[Any, ...], replace: bool = False) -> Updates:
        path, updates = self.saved(name, whole, self._read(values), replace)
        return updates if path is None else {**updates, self._notice: notice_html([f"Saved as {path}."])}

    @shows_errors
    def look(self, choice: str | None, model_id: str) -> Updates:
        """The presets as they are on disk now, and which profiles cannot be read."""
        broken = self._profiles(self._engine.catalog.model(model_id))[1]
        about = self.describe(choice, model_id) + "".join(map(_problem, broken))
        return {**self.offer(choice, model_id), self.about: about}

    @shows_errors
    def offer(self, choice: str | None, model_id: str) -> Updates:
        """The presets for a model; what was chosen stays where it is among them."""
        choices = self._choices(self._engine.catalog.model(model_id))
        if not choice or choice in dict(choices).values():
            return {self.choice: gr.update(choices=choices)}
        return {self.choice: gr.update(choices=choices, value=None), self.about: ""}

    @shows_errors
    def describe(self, choice: str | None, model_id: str) -> str:
        """What the chosen one is for, or why it cannot be read."""
        if not choice:
            return ""
        try:
            said = self._about(choice, self._engine.catalog.model(model_id))
        except UserError as error:
            return _problem(str(error))
        return lines_html([said])

    @shows_errors
    def change(self, event: gr.EventData, choice: str | None, name: str | None, model_id: str) -> Updates:
        """Rename or delete the chosen preset."""
        model = self._engine.catalog.model(model_id)
        path = self._own(choice, model)
        return self._remove(path, model) if event.name == "remove" else self._rename(path, name, model)

    def _rename(self, path: Path, name: str | None, model: ModelInfo) -> Updates:
        if not (name or "").strip():
            raise UserError("There is no new name: write it beside Save.")
        new = rename_preset(path, str(name).strip())
        about = lines_html([f"'{path.stem}' is now '{new.stem}'."])
        return {self.name: "", **self._listed(model, PRESET + new.name), self.about: about}

    def _remove(self, path: Path, model: ModelInfo) -> Updates:
        remove_preset(path)
        return {**self._listed(model, None), self.about: lines_html([f"Deleted '{path.stem}'."])}

    def _own(self, choice: str | None, model: ModelInfo) -> Path:
        if not choice or choice.startswith(PROFILE):
            raise UserError("No preset of yours is chosen: the others come with ZGP and stay.")
        return find_preset(self._folder(model), choice.removeprefix(PRESET))

    def _listed(self, model: ModelInfo, value: str | None) -> Updates:
        return {self.choice: gr.update(choices=self._choices(model), value=value)}

    def applied(self, choice: str | None, settings: Settings) -> Recalled:
        """The form's settings with the preset's, and what that changes. UserError when it cannot be used."""
        if not choice:
            raise UserError("No preset is chosen: choose one, then press Apply.")
        model = self._engine.catalog.model(settings["model_type"])
        if choice.startswith(PROFILE):
            profile = self._profile(choice, model)
            name, new = profile.name, profiles.apply(profile, settings)
            said = [f"Ignored {key}: a profile does not set it." for key in profile.ignored]
        else:
            preset = self._preset(choice, model)
            name, new = choice.removeprefix(PRESET), {**settings, **with_preset(preset, settings)}
            said = [f"Its {plural(len(preset.media), 'picture')} were not used."] if preset.media else []
            if new["model_type"] not in self._engine.catalog.models:
                said.append(f"Its model '{new['model_type']}' is not here: {model.name} stays.")
                new["model_type"] = model.id
        found = complete(new, said, self._engine.catalog)
        return Recalled(
            found.settings, [f"Applied '{name}'.", *changes(settings, found.settings), *found.report]
        )

    def saved(
        self, name: str | None, whole: bool, settings: Settings, replace: bool = False
    ) -> tuple[Path | None, Updates]:
        """Write the form's LoRAs, or all of it, as a preset: (its path, what the group then shows).

        Where the name is taken, and without `replace`, nothing is written and the user is asked.
        """
        model, name = self._engine.catalog.model(settings["model_type"]), (name or "").strip()
        if not name:
            raise UserError("The preset has no name: write one beside Save.")
        check_name(name)
        path = self._folder(model) / f"{name}{'.json' if whole else '.lset'}"
        if path.exists() and not replace:
            return None, {self.about: _taken_html(path.name)}
        write_preset(path, preset_of(settings, whole))
        return path, {self.name: "", self.about: "", **self._listed(model, PRESET + path.name)}

    # -- what there is ------------------------------------------------------------------------------------

    def _choices(self, model: ModelInfo) -> list[tuple[str, str]]:
        own = [] if model.lora_folder is None else list_presets(model.lora_folder)
        return [
            *((profile.name, PROFILE + profile.name) for profile in self._profiles(model)[0]),
            *((f"{path.stem} (yours)", PRESET + path.name) for path in own),
        ]

    def _profiles(self, model: ModelInfo) -> tuple[list[profiles.Profile], list[str]]:
        folder = self._engine.config.profiles_folder / model.handler.query_model_family()
        found, broken = profiles.list_profiles(folder, model.architecture)
        if "transformer_config" in model.card.model:  # the LoRAs are for the published models' size
            found = [profile for profile in found if not profile.loras]
        return found, broken

    def _profile(self, choice: str, model: ModelInfo) -> profiles.Profile:
        name = choice.removeprefix(PROFILE)
        found = next((profile for profile in self._profiles(model)[0] if profile.name == name), None)
        if found is None:
            raise UserError(f"There is no profile '{name}' for {model.name}: choose another one.")
        return found

    def _preset(self, choice: str, model: ModelInfo) -> Preset:
        return read_preset(find_preset(self._folder(model), choice.removeprefix(PRESET)))

    def _folder(self, model: ModelInfo) -> Path:
        if model.lora_folder is None:
            raise UserError(f"{model.name} takes no LoRAs, so it has no presets: choose another model.")
        return model.lora_folder

    def _about(self, choice: str, model: ModelInfo) -> str:
        if choice.startswith(PROFILE):
            return self._profile(choice, model).help
        loras = self._preset(choice, model).loras
        return "LoRAs: " + (", ".join(loras) or "none")


def with_preset(preset: Preset, settings: Settings) -> dict[str, Any]:
    """What a preset sets. LoRAs of a profile stay in front; a prompt that is only comments changes none."""
    before = split_profile(str(settings.get("loras_multipliers") or ""))[0]
    kept = list(settings.get("activated_loras") or [])[: len(words(before))]
    found = dict(preset.settings)
    if not preset.full_prompt:
        found.pop("prompt", None)
    found["activated_loras"] = kept + [entry for entry in preset.loras if entry not in kept]
    found["loras_multipliers"] = merge_profile(split_profile(preset.multipliers)[1], before)
    return found


def preset_of(settings: Settings, whole: bool) -> Preset:
    """The user's own LoRAs of the form, without those of a profile; `whole`: with everything else."""
    text = str(settings.get("loras_multipliers") or "")
    before, own = split_profile(text)
    loras = tuple(settings.get("activated_loras") or ())[len(words(before)) :]
    others = {
        name: value
        for name, value in settings.items()
        if whole and name not in (*LEFT_OUT, "activated_loras", "loras_multipliers")
    }
    return Preset(loras, own, others, full_prompt=whole)


def changes(before: Settings, after: Settings) -> list[str]:
    """One line for each setting that differs: "Steps: 8 → 4"."""
    lines = [
        f"{SETTINGS[name].label}: {_show(before.get(name))} → {_show(after[name])}"
        for name in SETTINGS
        if name in after and (before.get(name) or "") != (after[name] or "")
    ]
    return lines or ["It changes nothing: the form says all of it already."]


def lines_html(lines: Sequence[str]) -> str:
    """In the place between the select and the name: what a preset is for, or what it changed."""
    return "".join(f'<p class="zgp-lora-line">{escape(line)}</p>' for line in lines)


def _acts_html(locked: bool) -> str:
    """The buttons for presets and defaults."""
    shown = [one for one in _ACTS if not (locked and one[0] in ("keep", "factory"))]
    return f'<div class="zgp-actions">{"".join(button_html(*one) for one in shown)}</div>'


def button_html(act: str, words: str, ask: str = "") -> str:
    """A button for HTML. ask: what it says before it acts on a second press."""
    asks = f' data-ask="{ask}"' if ask else ""
    return f'<button type="button" class="zgp-button" data-act="{act}"{asks}>{words}</button>'


def _taken_html(name: str) -> str:
    return (
        f'<p class="zgp-lora-line">There is already a preset {escape(name)}. '
        '<button type="button" class="zgp-button" data-act="replace">Replace it</button></p>'
    )


def _problem(sentence: str) -> str:
    return f'<p class="zgp-problem" role="alert">{escape(sentence)}</p>'


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value if value not in (None, "") else "none")
