"""What the pictures of other programs say, each program's own words under one name for all of them.

The files may be anyone's: nothing in them is trusted, and whatever has an unexpected form is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.imaging import metadata
from shared.imaging.foreign import comfy, comfy_graph


@dataclass
class Raw:
    """Values exactly as they were found: prompt, negative_prompt, seed, steps, cfg (counted from 1) or
    guidance (counted from 0), width, height, shift, sampler, model, seed_variety and its share; denoise, of
    whose way `steps` are those that were taken; control (a file), control_strength and what it follows.

    others: names of further settings; lines: sentences about what was understood.
    """

    program: str
    values: dict[str, Any]
    loras: list[tuple[Any, Any]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def raw(texts: Mapping[str, str]) -> Raw | None:
    """What the texts of a picture say (metadata.texts); None when no program is known by them."""
    return next(filter(None, (reader(texts) for reader in _READERS)), None)


def from_graph(content: Any) -> Raw | None:
    """As `raw`, from the JSON of a ComfyUI graph; None when it has no sampler."""
    form = comfy_graph.workflow_nodes if "nodes" in content else comfy_graph.nodes
    found = comfy.walk(form(content))
    return Raw("ComfyUI", found.values, loras=found.loras, lines=found.lines) if found else None


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError):
        return None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _renamed(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: given[name] for name, ours in names.items() if given.get(name) is not None}


# ---------------------------------------------------------------- A1111, Forge and what writes as they do

_SETTINGS_LINE = re.compile(r"^Steps: *\d+ *,", re.MULTILINE)
_FIELD = re.compile(r'([A-Za-z][\w .\-/]{0,60}): *("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_NEGATIVE = "\nNegative prompt:"
_JSON_FIELD = re.compile(r"(?:Civitai \w+|SDCPP): *(?=[\[{])")  # the first one ends the list of fields
_A1111_NAMES = {
    "Steps": "steps", "Sampler": "sampler", "CFG scale": "cfg", "Seed": "seed", "Shift": "shift",
    "Model": "model",
}  # fmt: skip
#: fields that describe the file or the other program, or that say nothing about a picture of these models
_A1111_SILENT = re.compile(
    r"Size|Version|Schedule type|Model hash|VAE.*|Lora hashes|TI hashes|Hashes|Module \d+|Clip skip|RNG|ENSD"
    r"|Created Date|User|Diffusion in Low Bits|Emphasis|Token merging.*|Distilled CFG Scale"
)
#: as stable-diffusion.cpp writes them: its model's file, and what Z-Image has not
_SDCPP_SILENT = ("Unet", "TE", "Guidance", "Eta")


def _from_a1111(texts: Mapping[str, str]) -> Raw | None:
    candidates = (texts.get("parameters"), texts.get(metadata.COMMENT), texts.get("ImageDescription"))
    return next(filter(None, (_parameters(text) for text in candidates if text)), None)


def _parameters(text: str) -> Raw | None:
    """The text that A1111 writes: prompt, negative prompt, and one line of "name: value" pairs."""
    starts = [match.start() for match in _SETTINGS_LINE.finditer(text)]
    if not starts:
        return None
    prompts, line = text[: starts[-1]], text[starts[-1] :]
    site = _JSON_FIELD.search(line)
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(line[: site.start()] if site else line):
        fields.setdefault(name.strip(), _unquoted(value.strip()))  # the first of a name is the program's own
    prompt, _, negative = f"\n{prompts}".partition(_NEGATIVE)
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
    silent = _SDCPP_SILENT if fields.get("Version", "").startswith("stable-diffusion.cpp") else ()
    others = [n for n in fields if n not in (*_A1111_NAMES, *silent) and not _A1111_SILENT.fullmatch(n)]
    found = Raw("stable-diffusion.cpp" if silent else "A1111 or Forge", values, others=others)
    if silent:
        values["model"] = fields.get("Model") or fields.get("Unet", "")
    if site and site[0].startswith("Civitai"):
        _add_resources(found, line[site.end() :])
    return found


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value.strip('"')


def _add_resources(found: Raw, text: str) -> None:
    """What Civitai's generator made the picture with: [{"type", "modelName", "weight"}]."""
    try:
        listed, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return
    resources = [one for one in _list(listed) if isinstance(one, dict)]
    if not any(isinstance(one.get("modelName"), str) for one in resources):
        return
    found.program = "Civitai"
    if _text(found.values.get("sampler")) == "Undefined":
        found.values["sampler"] = ""
    for one in resources:
        name, kind = _text(one.get("modelName")), _text(one.get("type"))
        if kind == "checkpoint":
            found.values["model"] = found.values.get("model") or name
        elif kind in ("lora", "locon", "lycoris", "dora"):
            found.loras.append((name, one.get("weight")))
        elif name:
            found.others.append(f"{kind} {name}")


# ---------------------------------------------------------------- ComfyUI


def _from_comfy(texts: Mapping[str, str]) -> Raw | None:
    named = dict(texts)
    for tag in ("Make", "Model", "ImageDescription"):  # as ComfyUI writes WebP files
        name, colon, rest = texts.get(tag, "").partition(":")
        if colon and name.strip().lower() in ("prompt", "workflow"):
            named.setdefault(name.strip().lower(), rest)
    graphs = [_json(named.get(name)) for name in ("prompt", "workflow")]
    return next(filter(None, (from_graph(one) for one in graphs if isinstance(one, dict))), None)


# ---------------------------------------------------------------- InvokeAI

_INVOKE_NAMES = {
    "positive_prompt": "prompt", "negative_prompt": "negative_prompt", "seed": "seed", "steps": "steps",
    "cfg_scale": "cfg", "width": "width", "height": "height", "scheduler": "sampler",
    "z_image_shift": "shift",
}  # fmt: skip
_VARIANCE = "z_image_seed_variance"


def _from_invoke(texts: Mapping[str, str]) -> Raw | None:
    meta = _json(texts.get("invokeai_metadata"))
    if not isinstance(meta, dict) or not isinstance(meta.get("positive_prompt"), str):
        return None
    values = _renamed(meta, _INVOKE_NAMES)
    values["model"] = _invoke_name(meta.get("model"))
    lines = []
    if meta.get(f"{_VARIANCE}_enabled") is True:
        values["seed_variety"] = meta.get(f"{_VARIANCE}_strength")
        values["seed_variety_share"] = meta.get(f"{_VARIANCE}_randomize_percent")
        values["seed_variety_until"] = 100  # it acts in all steps there
        lines.append("Its seed variance became seed variety, whose noise is another one.")
    loras = [
        (_invoke_name(one.get("model") or one.get("lora")), one.get("weight"))
        for one in _list(meta.get("loras"))
        if isinstance(one, dict)
    ]
    others = [name for name in ("controlnets", "ipAdapters", "strength") if meta.get(name)]
    return Raw("InvokeAI", values, loras=list(loras), others=others, lines=lines)


def _invoke_name(model: Any) -> str:
    return _text(model.get("name") or model.get("model_name")) if isinstance(model, dict) else ""


# ---------------------------------------------------------------- programs that write one JSON object

_SWARM_NAMES = {
    "prompt": "prompt", "negativeprompt": "negative_prompt", "seed": "seed", "steps": "steps",
    "cfgscale": "cfg", "width": "width", "height": "height", "sigmashift": "shift", "model": "model",
}  # fmt: skip
_SWARM_SILENT = {
    "images", "aspectratio", "sampler", "scheduler", "loras", "loraweights", "swarm_version", "batchsize",
    "automaticvae", "vae", "qwenmodel", "loratencweights", "lorasectionconfinement", "preferreddtype",
    "sidelength", "date", "generation_time", "personalnote", "modelspecificenhancements", "fluxguidancescale",
}  # fmt: skip
_MFLUX_NAMES = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "seed": "seed", "steps": "steps",
    "guidance": "guidance", "width": "width", "height": "height", "model": "model", "scheduler": "sampler",
}  # fmt: skip
_MFLUX_OTHERS = ("image_path", "image_strength", "controlnet_image_path", "masked_image_path")
_FOOOCUS_NAMES = {
    "Prompt": "prompt", "Negative": "negative_prompt", "seed": "seed", "steps": "steps", "cfg": "cfg",
    "width": "width", "height": "height", "base_model_name": "model",
}  # fmt: skip


def _from_swarm(meta: Mapping[str, Any]) -> Raw | None:
    given = meta.get("sui_image_params")
    if not isinstance(given, dict):
        return None
    values = _renamed(given, _SWARM_NAMES)
    values["sampler"] = _sampler(given.get("sampler"), given.get("scheduler"))
    others = [str(name) for name in given if name not in _SWARM_NAMES and name not in _SWARM_SILENT]
    loras = _beside(_list(given.get("loras")), _list(given.get("loraweights")))
    return Raw("SwarmUI", values, loras=loras, others=others)


def _beside(names: list[Any], strengths: list[Any]) -> list[tuple[Any, Any]]:
    """Each name with its strength; None where there are fewer of these."""
    return [(name, strengths[i] if i < len(strengths) else None) for i, name in enumerate(names)]


def _from_mflux(meta: Mapping[str, Any]) -> Raw | None:
    if "mflux_version" not in meta:
        return None
    values = _renamed(meta, _MFLUX_NAMES)
    if _text(values.get("sampler")).lower() in ("linear", "flow_match_euler_discrete"):
        values["sampler"] = ""
    loras = _beside(_list(meta.get("lora_paths")), _list(meta.get("lora_scales")))
    return Raw("mflux", values, loras=loras, others=[name for name in _MFLUX_OTHERS if meta.get(name)])


def _from_fooocus(meta: Mapping[str, Any]) -> Raw | None:
    if meta.get("software") != "RuinedFooocus":
        return None
    values = _renamed(meta, _FOOOCUS_NAMES)
    values["sampler"] = _sampler(meta.get("sampler_name"), meta.get("scheduler"))
    loras: list[tuple[Any, Any]] = []
    for one in _list(meta.get("loras")):
        if isinstance(one, dict):
            loras.append((one.get("name"), one.get("weight")))
        elif isinstance(one, list) and len(one) >= 2:  # [hash, "strength - name"] or [name, strength]
            strength, dash, name = _text(one[1]).partition(" - ")
            loras.append((name, strength) if dash else (one[0], one[1]))
    return Raw("RuinedFooocus", values, loras=loras)


def _sampler(sampler: Any, scheduler: Any) -> str:
    return " ".join(x for x in (_text(sampler), _text(scheduler)) if x not in ("", "simple", "normal"))


_OBJECTS = (_from_swarm, _from_mflux, _from_fooocus)


def _from_object(texts: Mapping[str, str]) -> Raw | None:
    candidates = (texts.get("parameters"), texts.get(metadata.COMMENT), texts.get("ImageDescription"))
    metas = [meta for text in candidates if text and isinstance(meta := _json(text), dict)]
    return next(filter(None, (reader(meta) for meta in metas for reader in _OBJECTS)), None)


_READERS: tuple[Callable[[Mapping[str, str]], Raw | None], ...] = (
    _from_comfy, _from_invoke, _from_object, _from_a1111,
)  # fmt: skip
