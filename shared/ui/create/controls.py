"""From an entry of SETTINGS to its control: ranges, defaults and labels stand there, never here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from shared.settings.table import ALL_ONE, LINES, PARAGRAPHS, Setting

Builder = Callable[..., Any]


def control(setting: Setting, **options: Any) -> Any:
    """The component that edits `setting`. `options` (value, visible, info, choices) go to the component."""
    builder = _BY_NAME.get(setting.name) or _usual(setting)
    return builder(setting, label=setting.label, elem_id=setting.name, **options)


def _usual(setting: Setting) -> Builder:
    if setting.choices:
        return _choice
    if setting.picture or setting.pairs:
        return _data
    return _numbers if setting.numbers else _BY_KIND[setting.kind]


def _text(setting: Setting, **options: Any) -> Any:
    return gr.Textbox(**options)


def _prompt(setting: Setting, **options: Any) -> Any:
    return gr.Textbox(
        lines=3, max_lines=12, autofocus=True, placeholder="What should the picture show?", **options
    )


def _negative_prompt(setting: Setting, **options: Any) -> Any:
    return gr.Textbox(lines=1, max_lines=6, placeholder="What should it not show?", **options)


def _slider(setting: Setting, **options: Any) -> Any:
    assert setting.minimum is not None and setting.maximum is not None
    return gr.Slider(setting.minimum, setting.maximum, step=setting.step, buttons=[], **options)


def _seed(setting: Setting, **options: Any) -> Any:
    return gr.Number(precision=0, **options)


def _choice(setting: Setting, **options: Any) -> Any:
    return gr.Radio(list(setting.choices), **options)


def _style(setting: Setting, **options: Any) -> Any:
    return gr.Radio([(choice or "preset", choice) for choice in setting.choices], **options)


def _solver(setting: Setting, **options: Any) -> Any:
    """twinflow, and no name, mean unified: they are for files and programs."""
    return gr.Radio([name for name in setting.choices if name.startswith("unified")], **options)


def _prompt_mode(setting: Setting, **options: Any) -> Any:
    words = {ALL_ONE: "one prompt", LINES: "a prompt per line", PARAGRAPHS: "a prompt per paragraph"}
    return gr.Radio([(words[choice], choice) for choice in setting.choices], **options)


def _numbers(setting: Setting, **options: Any) -> Any:
    return gr.Textbox(max_lines=1, placeholder="preset" if not setting.default else None, **options)


def _data(setting: Setting, **options: Any) -> Any:
    """Holds a text that nobody types; what it stands for is drawn beside it."""
    return gr.Textbox(**options, elem_classes="zgp-data")


def _checkbox(setting: Setting, **options: Any) -> Any:
    return gr.Checkbox(**options)


def _names(setting: Setting, **options: Any) -> Any:
    """Holds the list; what is seen of it is drawn beside it."""
    return gr.JSON(**options)


def _strengths(setting: Setting, **options: Any) -> Any:
    return gr.Textbox(lines=1, max_lines=6, placeholder="1 0.8 1,0.5,0", **options)


def _model(setting: Setting, **options: Any) -> Any:
    return gr.Dropdown(filterable=False, **options)


def _precision(setting: Setting, **options: Any) -> Any:
    return gr.Dropdown(filterable=False, **options)


def _preprocessor(setting: Setting, **options: Any) -> Any:
    return gr.Dropdown(filterable=False, **options)


def _upscaler(setting: Setting, **options: Any) -> Any:
    return gr.Dropdown(filterable=False, **{"choices": list(setting.choices), **options})


def _resolution(setting: Setting, **options: Any) -> Any:
    return gr.Dropdown(allow_custom_value=True, **options)


_BY_NAME: dict[str, Builder] = {
    "model_type": _model,
    "prompt": _prompt,
    "negative_prompt": _negative_prompt,
    "precision": _precision,
    "resolution": _resolution,
    "seed": _seed,
    "loras_multipliers": _strengths,
    "control_preprocessor": _preprocessor,
    "multi_prompts_gen_type": _prompt_mode,
    "outpaint": _data,
    "hires_upscaler": _upscaler,
    "sample_solver": _solver,
    "sampling_style": _style,
}
_BY_KIND: dict[type, Builder] = {
    str: _text,
    int: _slider,
    float: _slider,
    bool: _checkbox,
    list: _names,
}
