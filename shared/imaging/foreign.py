"""Settings out of the pictures of other programs: A1111 and Forge, ComfyUI, InvokeAI.

The files may be anyone's: nothing in them is trusted, and whatever has an unexpected form is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.imaging import comfy, comfy_graph, metadata

MAX_LORAS = 20
MAX_NAMES = 12  # of settings that are named as not taken over
MAX_SHOWN = 60  # characters of a text from a file in one line

PLAIN_SAMPLERS = {"", "euler", "flowmatcheuler", "flow_match_euler", "euler simple", "euler normal"}

_LORA_TAG = re.compile(r"[ ,]{0,4}<lora:([^:<>]{1,200}):([-+.\d]{1,20})[^<>]{0,200}>")
_WEIGHT = re.compile(r"\([^()]{1,200}:\d*\.?\d+\)")


@dataclass(frozen=True)
class Foreign:
    """What a picture of another program says. `settings` has names of SETTINGS, in the units of this program.

    model, loras: names as the other program calls them; loras with their strengths. lines: what was
    translated or not taken over, one sentence each.
    """

    program: str
    settings: dict[str, Any]
    model: str = ""
    loras: tuple[tuple[str, float], ...] = ()
    lines: tuple[str, ...] = ()


@dataclass
class Raw:
    """Values under one name for all programs, exactly as they were found; `others` names further ones."""

    program: str
    values: dict[str, Any]
    loras: list[tuple[Any, Any]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def read(path: Path | str) -> Foreign | None:
    """The settings in a picture of another program; None when it holds none. Errors as metadata.texts."""
    return from_texts(metadata.texts(path))


def from_texts(texts: Mapping[str, str]) -> Foreign | None:
    """As `read`, from the texts of a file."""
    short = {name: text for name, text in texts.items() if len(text) <= metadata.MAX_METADATA_BYTES}
    raw = next(filter(None, (reader(short) for reader in _READERS)), None)
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
    prompt, tags = _without_tags(_text(values.get("prompt")))
    loras = [*raw.loras, *tags]
    settings: dict[str, Any] = {"prompt": prompt, "negative_prompt": _text(values.get("negative_prompt"))}
    for name, source in (("num_inference_steps", "steps"), ("seed", "seed")):
        number = _number(values.get(source))
        if number is not None and number == int(number):
            settings[name] = int(number)
    settings |= _guidance(_number(values.get("cfg")), bool(values.get("ours")), lines)
    if (shift := _number(values.get("shift"))) is not None:
        settings["flow_shift"] = shift
    width, height = _number(values.get("width")), _number(values.get("height"))
    if width and height:
        settings["resolution"] = f"{int(width)}x{int(height)}"
    sampler = _text(values.get("sampler")).strip()
    if sampler.lower() not in PLAIN_SAMPLERS:
        lines.append(f"Its sampler {_shown(sampler)} is not here: the model's own is used.")
    if _WEIGHT.search(prompt):
        lines.append("Weights such as (word:1.2) mean nothing here: they stay in the prompt as plain text.")
    if raw.others:
        more = len(raw.others) - MAX_NAMES
        named = ", ".join(map(_shown, raw.others[:MAX_NAMES])) + (f" and {more} more" if more > 0 else "")
        lines.append(f"Not taken over: {named}.")
    return Foreign(
        raw.program,
        {name: value for name, value in settings.items() if value != "" or name == "prompt"},
        model=_text(values.get("model")).strip()[:200],
        loras=_known_loras(loras),
        lines=tuple(lines),
    )


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


def _without_tags(prompt: str) -> tuple[str, list[tuple[str, str]]]:
    tags = _LORA_TAG.findall(prompt)
    return re.sub(r"[ \t]{2,}", " ", _LORA_TAG.sub("", prompt)).strip(" ,\n\t"), tags


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


# ---------------------------------------------------------------- A1111, Forge and what writes as they do

_SETTINGS_LINE = re.compile(r"^Steps: *\d+ *,", re.MULTILINE)
_FIELD = re.compile(r'([A-Za-z][\w .\-/]{0,60}): *("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_NEGATIVE = "\nNegative prompt:"
_SITES = re.compile(r"Civitai \w+:.*", re.DOTALL)  # JSON that is no list of fields
_A1111_NAMES = {
    "Steps": "steps", "Sampler": "sampler", "CFG scale": "cfg", "Seed": "seed", "Shift": "shift",
    "Model": "model",
}  # fmt: skip
#: fields that describe the file or the other program, or that say nothing about a picture of these models
_A1111_SILENT = re.compile(
    r"Size|Version|Schedule type|Model hash|VAE.*|Lora hashes|TI hashes|Hashes|Module \d+|Clip skip|RNG|ENSD"
    r"|Created Date|User|Diffusion in Low Bits|Emphasis|Token merging.*|Distilled CFG Scale"
)


def _from_a1111(texts: Mapping[str, str]) -> Raw | None:
    candidates = (texts.get("parameters"), texts.get(metadata.COMMENT), texts.get("ImageDescription"))
    return next(filter(None, (_parameters(text) for text in candidates if text)), None)


def _parameters(text: str) -> Raw | None:
    """The text that A1111 writes: prompt, negative prompt, and one line of "name: value" pairs."""
    starts = [match.start() for match in _SETTINGS_LINE.finditer(text)]
    if not starts:
        return None
    prompts, line = text[: starts[-1]], _SITES.sub("", text[starts[-1] :])
    prompt, _, negative = f"\n{prompts}".partition(_NEGATIVE)
    fields = {name.strip(): _unquoted(value.strip()) for name, value in _FIELD.findall(line)}
    values: dict[str, Any] = {ours: fields[name] for name, ours in _A1111_NAMES.items() if name in fields}
    values |= {"prompt": prompt.strip(), "negative_prompt": negative.strip()}
    schedule = fields.get("Schedule type", "")
    if schedule.lower() not in ("", "automatic", "simple", "normal"):
        values["sampler"] = f"{fields.get('Sampler', '')} {schedule}"
    if size := re.fullmatch(r"(\d{1,6})x(\d{1,6})", fields.get("Size", "")):
        values |= {"width": size[1], "height": size[2]}
    values["ours"] = fields.get("Version", "").startswith("ZGP ")
    if "Seed" in fields and fields["Seed"].isdecimal():
        values["seed"] = int(fields["Seed"][:25])
    others = [name for name in fields if name not in _A1111_NAMES and not _A1111_SILENT.fullmatch(name)]
    return Raw("A1111 or Forge", values, others=others)


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value.strip('"')


# ---------------------------------------------------------------- ComfyUI


def _from_comfy(texts: Mapping[str, str]) -> Raw | None:
    named = dict(texts)
    for tag in ("Make", "Model", "ImageDescription"):  # as ComfyUI writes WebP files
        name, colon, rest = texts.get(tag, "").partition(":")
        if colon and name.strip().lower() in ("prompt", "workflow"):
            named.setdefault(name.strip().lower(), rest)
    graphs = [(comfy_graph.nodes, named.get("prompt")), (comfy_graph.workflow_nodes, named.get("workflow"))]
    for graph_of, text in graphs:
        found = comfy.walk(graph_of(_json(text))) if text else None
        if found:
            return Raw("ComfyUI", found.values, loras=found.loras, lines=found.lines)
    return None


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError):
        return None


# ---------------------------------------------------------------- InvokeAI

_INVOKE_NAMES = {
    "positive_prompt": "prompt", "negative_prompt": "negative_prompt", "seed": "seed", "steps": "steps",
    "cfg_scale": "cfg", "width": "width", "height": "height", "scheduler": "sampler",
}  # fmt: skip


def _from_invoke(texts: Mapping[str, str]) -> Raw | None:
    meta = _json(texts.get("invokeai_metadata"))
    if not isinstance(meta, dict) or not isinstance(meta.get("positive_prompt"), str):
        return None
    values = {ours: meta[name] for name, ours in _INVOKE_NAMES.items() if name in meta}
    values["model"] = _invoke_name(meta.get("model"))
    loras = meta.get("loras")
    found = [
        (_invoke_name(one.get("model") or one.get("lora")), one.get("weight"))
        for one in (loras if isinstance(loras, list) else ())
        if isinstance(one, dict)
    ]
    others = [name for name in ("controlnets", "ipAdapters", "strength") if meta.get(name)]
    return Raw("InvokeAI", values, loras=list(found), others=others)


def _invoke_name(model: Any) -> str:
    return _text(model.get("name") or model.get("model_name")) if isinstance(model, dict) else ""


_READERS: tuple[Callable[[Mapping[str, str]], Raw | None], ...] = (_from_comfy, _from_invoke, _from_a1111)
