"""Settings out of the pictures of other programs, in our words and units.

The files may be anyone's: nothing in them is trusted, and whatever has an unexpected form is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.imaging import metadata
from shared.imaging.foreign import programs
from shared.imaging.foreign.comfy_graph import is_graph
from shared.imaging.foreign.programs import Raw
from shared.prompts.remarks import signs, without_tags

MAX_LORAS = 20
MAX_NAMES = 12  # of settings that are named as not taken over
MAX_SHOWN = 60  # characters of a text from a file in one line

PLAIN_SAMPLERS = {"", "euler", "flowmatcheuler", "flow_match_euler", "euler simple", "euler normal"}

#: setting -> the value that it has as it stands
_NUMBERS = {
    "flow_shift": "shift", "guidance_scale": "guidance", "seed_variety": "seed_variety",
    "seed_variety_share": "seed_variety_share", "seed_variety_until": "seed_variety_until",
    "control_net_weight": "control_strength",
}  # fmt: skip



@dataclass(frozen=True)
class Foreign:
    """What a picture of another program says. `settings` has names of SETTINGS, in the units of this program.

    model, control, loras: names as the other program calls them; control is the control network, loras have
    their strengths. lines: what was translated or not taken over, one sentence each.
    """

    program: str
    settings: dict[str, Any]
    model: str = ""
    control: str = ""
    loras: tuple[tuple[str, float], ...] = ()
    lines: tuple[str, ...] = ()


def read(path: Path | str) -> Foreign | None:
    """The settings in a picture of another program; None when it holds none. Errors as metadata.texts."""
    return from_texts(metadata.texts(path))


def from_texts(texts: Mapping[str, str]) -> Foreign | None:
    """As `read`, from the texts of a file."""
    short = {name: text for name, text in texts.items() if len(text) <= metadata.MAX_METADATA_BYTES}
    raw = programs.raw(short)
    return None if raw is None else _translated(raw)


def from_graph(content: Any) -> Foreign | None:
    """As `read`, from the JSON of a ComfyUI graph in either form; None when it is none, or has no sampler."""
    raw = programs.from_graph(content) if is_graph(content) else None
    return None if raw is None else _translated(raw)


def as_metadata(found: Foreign | None) -> dict[str, Any] | None:
    """The settings in the form in which pictures of our own carry them, for lists and searches."""
    if found is None:
        return None
    loras = [name for name, _ in found.loras]
    return {"type": found.program, "model_type": found.model, **found.settings, "activated_loras": loras}


# ---------------------------------------------------------------- translation


def _translated(raw: Raw) -> Foreign:
    values, lines = raw.values, list(raw.lines)
    prompt, tags = without_tags(_text(values.get("prompt")))
    prompt, loras = prompt.strip(" ,\n\t"), [*raw.loras, *tags]
    settings: dict[str, Any] = {"prompt": prompt, "negative_prompt": _text(values.get("negative_prompt"))}
    for name, source in (("num_inference_steps", "steps"), ("seed", "seed")):
        number = _number(values.get(source))
        if number is not None and number == int(number):
            settings[name] = int(number)
    settings |= _part_of_the_way(settings, _number(values.get("denoise")))
    settings |= _guidance(_number(values.get("cfg")), bool(values.get("ours")), lines)
    for name, source in _NUMBERS.items():
        if (number := _number(values.get(source))) is not None:
            settings[name] = float(number)
    if control := _text(values.get("control")):
        settings["control_preprocessor"] = _text(values.get("follows")) or "as_it_is"
    width, height = _number(values.get("width")), _number(values.get("height"))
    if width and height:
        settings["resolution"] = f"{int(width)}x{int(height)}"
    sampler = _text(values.get("sampler")).strip()
    if sampler.lower() not in PLAIN_SAMPLERS:
        lines.append(f"Its sampler {_shown(sampler)} is not here: the model's own is used.")
    lines += signs(prompt)
    if raw.others:
        more = len(raw.others) - MAX_NAMES
        named = ", ".join(map(_shown, raw.others[:MAX_NAMES])) + (f" and {more} more" if more > 0 else "")
        lines.append(f"Not taken over: {named}.")
    return Foreign(
        raw.program,
        {name: value for name, value in settings.items() if value != "" or name == "prompt"},
        model=_text(values.get("model")).strip()[:200],
        control=control.strip()[:200],
        loras=_known_loras(loras),
        lines=tuple(lines),
    )


def _part_of_the_way(settings: Mapping[str, Any], denoise: float | None) -> dict[str, Any]:
    """Other programs are told the steps that are taken; here it is those of the whole way."""
    steps = settings.get("num_inference_steps")
    if denoise is None or not 0 < denoise <= 1:
        return {}
    whole = {} if steps is None else {"num_inference_steps": int(steps / denoise)}
    return {"denoising_strength": denoise} | whole


def _guidance(scale: float | None, ours: bool, lines: list[str]) -> dict[str, Any]:
    """Other programs' scale s means neg + s (pos - neg); guidance g here means pos + g (pos - neg)."""
    if scale is None or scale < 0:
        return {}
    if ours:
        return {"guidance_scale": scale}
    guidance = max(0.0, round(scale - 1, 4))
    if guidance > 0:
        off = " It acts above 1 only." if guidance <= 1 else ""
        lines.append(f"CFG scale {scale:g} became guidance {guidance:g}: here the count begins at 0.{off}")
    return {"guidance_scale": guidance}


def _known_loras(loras: list[tuple[Any, Any]]) -> tuple[tuple[str, float], ...]:
    named = [(_text(name).strip()[:200], _number(strength)) for name, strength in loras[:MAX_LORAS]]
    return tuple((name, 1.0 if strength is None else strength) for name, strength in named if name)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    """A finite number that a double holds exactly enough; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value[:40] if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number) or abs(number) > 1e20:
        return None
    return int(value) if isinstance(value, int) else number


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"

