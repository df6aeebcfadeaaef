"""The settings form as HTML: one field per key of wgp_config.json, from one table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from shared.config import ATTENTION, CODECS, LAST_USED, PROFILES
from shared.errors import UserError
from shared.imaging.naming import FIELDS as NAME_FIELDS
from shared.ui.create.presets import button_html

Choices = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Field:
    """One key. kind: "text", "lines", "number", "check" or "choice". parse: from what the browser sends."""

    group: str
    label: str
    help: str
    kind: str = "text"
    choices: Choices = ()
    parse: Callable[[str], Any] = str
    step: str = "1"


#: group -> (what a change waits for, words under its title)
GROUPS = {
    "Start": ("start", "This counts when ZGP is started again."),
    "Pictures": ("worker", "This counts when the worker is restarted."),
    "Memory": (
        "worker",
        "ZGP plans every job for this card by itself; this is for those who know better, and counts when the "
        "worker is restarted. Flags of the start win over it.",
    ),
}


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _number(text: str) -> Any:
    """A number, or the text itself, which is then refused by name."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


_PROFILE_WORDS = {-1: "ZGP's own plan", 1: "1: models whole on the card, RAM page-locked",
    2: "2: weights streamed, RAM page-locked", 3: "3: as 1, only the transformer page-locked",
    3.5: "3.5: as 3, nothing page-locked", 4: "4: as 2, only the transformer page-locked",
    4.5: "4.5: as 4, one layer on the card at a time", 5: "5: as 2, nothing page-locked",
}  # fmt: skip
_CODEC_WORDS = {"png": "PNG, every pixel exact", "jpeg_95": "JPEG, high quality", "jpeg_85": "JPEG, smaller",
    "webp_95": "WebP, high quality", "webp_85": "WebP, smaller",
}  # fmt: skip

FIELDS: dict[str, Field] = {
    "default_model": Field("Start", "Model at the start", "", "choice"),
    "checkpoints_paths": Field(
        "Start", "Folders of models", "One per line, searched in this order; downloads go into the first.",
        "lines", parse=_lines,
    ),
    "loras_root": Field("Start", "Folder of LoRAs", "It has a folder for each family of models."),
    "profiles_dir": Field("Start", "Folder of profiles", "The presets that every model of a family can use."),
    "save_path": Field("Start", "Folder of pictures", ""),
    "image_output_codec": Field(
        "Pictures", "File format", "The usual one; the form can choose another.", "choice",
        [(name, _CODEC_WORDS[name]) for name in CODECS],
    ),
    "output_filename": Field(
        "Pictures", "File names",
        f"/ makes subfolders. {' '.join(f'{{{name}}}' for name in NAME_FIELDS)}; {{prompt(40)}} is shorter.",
    ),
    "metadata_type": Field(
        "Pictures", "Settings in the files",
        "Without them a file tells nobody how it was made, and cannot be dropped on the page.", "choice",
        [("metadata", "written into every picture"), ("none", "left out")],
    ),
    "offload": Field(
        "Memory", "What moves the weights",
        "Between RAM and card, while they compute. mmgp is Wan2GP's; the other one is ZGP's own.", "choice",
        [("", "mmgp, where it is installed"), ("mmgp", "mmgp"), ("stream", "ZGP's own streamer")],
    ),
    "profile": Field(
        "Memory", "What lies where", "", "choice",
        [(f"{number:g}", _PROFILE_WORDS[number]) for number in PROFILES], _number,
    ),
    "preload_in_VRAM": Field(
        "Memory", "MB of the transformer kept on the card", "0 leaves it to the plan.", "number",
        parse=_number,
    ),
    "vram_safety_coefficient": Field(
        "Memory", "Share of the card's memory that may be used", "Lower it when other programs use the card.",
        "number", parse=_number, step="0.05",
    ),
    "attention_mode": Field(
        "Memory", "Attention method", "One that is not installed is replaced by sdpa.", "choice",
        [(name, name) for name in ATTENTION],
    ),
    "compile": Field(
        "Memory", "Compile the transformer", "A slow start, faster steps.", "check",
        parse=lambda text: "transformer" if text else "",
    ),
    "save_quantized": Field(
        "Memory", "Keep an int8 copy of 16-bit models", "Half the size, for later starts.", "check",
        parse=bool,
    ),
}  # fmt: skip

#: of this browser, kept in it and not in the file: (name, label, choices)
_BROWSER: tuple[tuple[str, str, Choices], ...] = (
    ("theme", "Colours", (("system", "as the system"), ("light", "light"), ("dark", "dark"))),
    ("done", "When the queue is done", (
        ("nothing", "nothing"), ("sound", "a sound"), ("notice", "a message of the browser"))),
    ("keep", "Model and prompt after a reload", (("yes", "as they were"), ("no", "empty"))),
)  # fmt: skip


def form_html(values: Mapping[str, Any], models: Iterable[tuple[str, str]], locked: bool) -> str:
    """The whole form. values: by key. models: (id, name) of each that can be the one at the start."""
    groups: dict[str, list[str]] = {}
    for name, field in FIELDS.items():
        choices = field.choices
        if name == "default_model":
            choices = [("", "the built-in one"), (LAST_USED, "the one used last"), *models]
        groups.setdefault(field.group, []).append(_field_html(name, field, values[name], choices))
    cards = "".join(_card(title, "".join(fields)) for title, fields in groups.items())
    acts = (
        button_html("save", "Save") + button_html("restart", "Restart worker")
        + button_html("defaults", "Factory defaults of all models", "Forget all saved defaults?")
        + button_html("everything", "Reset everything", "Really reset everything?")
    )  # fmt: skip
    state = " disabled" if locked else ""
    return (
        f'{_browser_html()}<form><fieldset class="zgp-cards"{state}>{cards}</fieldset>'
        f'<fieldset{state}><div class="zgp-actions">{acts}</div></fieldset></form>'
    )


def read_form(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the browser sends, by key. UserError for something that is no form."""
    if not isinstance(values, dict):
        raise UserError("The settings came as no form: reload the page.")
    return {
        name: FIELDS[name].parse(value if isinstance(value, str) else "")
        for name, value in values.items()
        if name in FIELDS
    }


def _card(title: str, inner: str) -> str:
    words = f"<p>{GROUPS[title][1]}</p>" if title in GROUPS else ""
    return f'<section class="zgp-card"><h2>{title}</h2>{words}{inner}</section>'


def _browser_html() -> str:
    fields = "".join(
        f'<label class="zgp-field"><span>{label}</span>{_select(f"zgp-{name}", choices, "")}</label>'
        for name, label, choices in _BROWSER
    )
    return f'<div class="zgp-browser">{_card("This browser", fields)}</div>'


def _field_html(name: str, field: Field, value: Any, choices: Choices) -> str:
    said = f"<small>{escape(field.help)}</small>" if field.help else ""
    label = f"<span>{escape(field.label)}</span>"
    control = _CONTROLS[field.kind](name, field, value, choices)
    order = control + label if field.kind == "check" else label + control
    return f'<label class="zgp-field zgp-{field.kind}">{order}{said}</label>'


def _select(name: str, choices: Choices, value: str) -> str:
    known = [choice for choice, _ in choices]
    shown = choices if value in known else [*choices, (value, value)]
    options = "".join(
        f'<option value="{escape(choice)}"{" selected" if choice == value else ""}>{escape(words)}</option>'
        for choice, words in shown
    )
    return f'<select name="{name}">{options}</select>'


def _choice(name: str, field: Field, value: Any, choices: Choices) -> str:
    return _select(name, choices, f"{value:g}" if isinstance(value, float) else str(value))


def _check(name: str, field: Field, value: Any, choices: Choices) -> str:
    return f'<input type="checkbox" name="{name}"{" checked" if value else ""}>'


def _text(name: str, field: Field, value: Any, choices: Choices) -> str:
    return f'<input type="text" name="{name}" value="{escape(str(value))}" spellcheck="false">'


def _numeric(name: str, field: Field, value: Any, choices: Choices) -> str:
    return f'<input type="number" name="{name}" value="{value:g}" step="{field.step}" min="0">'


def _area(name: str, field: Field, value: Any, choices: Choices) -> str:
    lines = escape("\n".join(value))
    return f'<textarea name="{name}" rows="{max(2, len(value))}" spellcheck="false">\n{lines}</textarea>'


_CONTROLS: dict[str, Callable[[str, Field, Any, Choices], str]] = {
    "choice": _choice,
    "check": _check,
    "text": _text,
    "number": _numeric,
    "lines": _area,
}
