"""ComfyUI's graphs, as its pictures carry them: from the sampler to what it was given."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.imaging.foreign.comfy_graph import MAX_DEPTH, Graph, Link, Node
from shared.imaging.foreign.comfy_text import TEXTS, Reader
from shared.settings.messages import printable

MAX_UNKNOWN = 3  # nodes that a line names
MAX_SAMPLERS = 100
MAX_PARTS = 20  # nodes that one part of a sampler is put together from

MODELS = ("unet_name", "ckpt_name", "model_name", "gguf_name", "checkpoint")
#: inputs of samplers that are put together from nodes, the most telling first
HELPERS = ("guider", "noise", "sigmas", "sampler", "basic_pipe", "pipe")
CONDITIONS = ("positive", "conditioning", "cond1")
#: of what is not in the file
PICTURE = "Its {} '{}' is not in the file: choose it again."
LATENTS = ("latent_image", "samples", "latent", "optional_latent")
#: what only a node that samples is given beside its conditions
_SAMPLING = ("steps", "sigmas", "sampler", "sampler_name", "noise_seed", "noise")
#: what a helper is not made of
_ASIDE = {"model", "clip", "vae", "image", "pixels", "mask", *CONDITIONS, "negative", *LATENTS}
#: where nodes that give a number have it, best first
_NUMBERS = ("value", "seed", "noise_seed", "int", "float", "number", "source")


@dataclass
class Walked:
    """As programs.Raw."""

    values: dict[str, Any]
    loras: list[tuple[Any, Any]]
    lines: list[str] = field(default_factory=list)


def walk(graph: Graph) -> Walked | None:
    """What the first pass of the picture was made with; None when there is no sampler."""
    samplers = list(_samplers(graph))
    if not samplers:
        return None
    given = _together(graph, samplers[-1])
    lines: list[str] = []
    if len(samplers) > 1:
        lines.append(f"It was made in {len(samplers)} passes: the settings are those of the first.")
    values = {
        "seed": _first(graph, given, "seed", "noise_seed"),
        "steps": _steps(graph, given),
        "cfg": _first(graph, given, "cfg"),
        "prompt": _text(graph, _any(given, CONDITIONS), 0, "prompt", lines),
        "negative_prompt": _text(graph, _any(given, ("negative", "cond2")), 1, "negative prompt", lines),
        "sampler": _sampler_name(_first(graph, given, "sampler_name"), _first(graph, given, "scheduler")),
    }
    latents = list(_chain(graph, _any(given, LATENTS)))
    sized = (node.inputs for node in latents if {"width", "height"} <= set(node.inputs))
    if inputs := next(sized, None):
        values["width"], values["height"] = (_first(graph, inputs, x) for x in ("width", "height"))
    if file := _loaded(latents):
        values["denoise"] = _first(graph, given, "denoise")
        lines.append(PICTURE.format("picture", printable(file)))
    loras: list[tuple[Any, Any]] = []
    for node in _chain(graph, given.get("model")):
        if values.get("shift") is None:
            values["shift"] = _first(graph, node.inputs, "shift")
        if isinstance(node.inputs.get("model_patch"), Link) and "control" not in values:
            values |= _control(graph, node, lines)
        loras = [*_loras(graph, node), *loras]  # the one nearest to the sampler is applied last
        named = (_first(graph, node.inputs, name) for name in MODELS)
        values["model"] = next((x for x in named if isinstance(x, str)), values.get("model"))
    said = {"seed": "seed", "steps": "steps", "cfg": "CFG scale", "width": "size", "shift": "shift"}
    lost = [word for name, word in said.items() if name in values and values[name] is _UNKNOWN]
    if lost:
        lines.append(f"Its {' and '.join(lost)} came through nodes whose results are not in the file.")
    return Walked({name: None if x is _UNKNOWN else x for name, x in values.items()}, loras, lines)


def _loaded(nodes: Iterable[Node]) -> str:
    """The file that one of these loads a picture from; "" when none does."""
    files = (node.inputs["image"] for node in nodes if node.kind.startswith("LoadImage") and node.inputs)
    return next((file for file in files if isinstance(file, str)), "")


def _control(graph: Graph, node: Node, lines: list[str]) -> dict[str, Any]:
    """The control network that a node puts into the model, and what it follows."""
    patch = graph.get(node.inputs["model_patch"].node)
    pictured = list(_chain(graph, node.inputs.get("image")))
    if file := _loaded(pictured):
        lines.append(PICTURE.format("control picture", printable(file)))
    return {
        "control": _first(graph, patch.inputs, "name") if patch else None,
        "control_strength": _first(graph, node.inputs, "strength"),
        "follows": "canny" if any(one.kind == "Canny" for one in pictured) else "as_it_is",
    }


def _any(given: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((given[name] for name in names if name in given), None)


def _samplers(graph: Graph) -> Iterator[Node]:
    """The samplers that a saved picture depends on, the last pass first; without saving nodes, all."""
    saving = [name for name, node in graph.items() if re.search("(?i)save|preview(?!any)", node.kind)]
    seen: set[str] = set()
    waiting = deque(saving or graph)
    left = MAX_SAMPLERS
    while waiting and left:
        name = waiting.popleft()
        if name in seen or name not in graph:
            continue
        seen.add(name)
        node = graph[name]
        if any(x in node.inputs for x in _SAMPLING):
            left -= 1
            if _any(_together(graph, node), CONDITIONS) is not None:
                yield node
        waiting += [x.node for x in node.inputs.values() if isinstance(x, Link)]


def _together(graph: Graph, node: Node) -> dict[str, Any]:
    """A sampler's inputs, with those of the nodes that it is put together from, the nearest first."""
    merged = dict(node.inputs)
    for name in HELPERS:
        seen: set[str] = set()
        waiting = deque([x.node] if isinstance(x := node.inputs.get(name), Link) else [])
        while waiting and len(seen) < MAX_PARTS:
            part = graph.get(at := waiting.popleft())
            if part is None or at in seen:
                continue
            seen.add(at)
            merged = {**part.inputs, **merged}
            links = {key: x for key, x in part.inputs.items() if isinstance(x, Link)}
            waiting += [x.node for key, x in links.items() if key.lower() not in _ASIDE]
    return merged


def _chain(graph: Graph, link: Any) -> Iterator[Node]:
    """The nodes that a model or a latent picture came through, backwards."""
    seen: set[str] = set()
    while isinstance(link, Link) and link.node in graph and link.node not in seen and len(seen) < MAX_DEPTH:
        seen.add(link.node)
        node = graph[link.node]
        yield node
        links = {name: x for name, x in node.inputs.items() if isinstance(x, Link)}
        usual = [links[name] for name in ("model", *LATENTS) if name in links]
        link = usual[0] if usual else next(iter(links.values()), None)


# ---------------------------------------------------------------- one value

_UNKNOWN = object()  # a value that a node computed


def _first(graph: Graph, inputs: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these inputs that is there, fetched from the node that it is linked to."""
    unknown = None
    for name in names:
        value = inputs.get(name)
        for _ in range(MAX_DEPTH):
            if not isinstance(value, Link):
                break
            source = graph.get(value.node)
            value = _value(source, name) if source else None
        if isinstance(value, (str, int, float)):
            return value
        unknown = unknown or (_UNKNOWN if value is _UNKNOWN else None)
    return unknown


def _value(node: Node, name: str) -> Any:
    """What a node gives for an input `name`: its own of that name, the usual ones, or the only one."""
    inputs = node.inputs
    if node.kind == "ComfySwitchNode":
        return inputs.get("on_true" if inputs.get("switch") is True else "on_false")
    usual = [inputs[x] for x in (name, *_NUMBERS, *TEXTS) if x in inputs]
    alone = [x for key, x in inputs.items() if key != "control_after_generate"]
    if usual or len(alone) == 1:
        return (usual or alone)[0]
    return _UNKNOWN if alone else None


def _steps(graph: Graph, given: Mapping[str, Any]) -> Any:
    """As given, or as many as a list of noise levels has: one less than its numbers."""
    steps, sigmas = _first(graph, given, "steps"), _first(graph, given, "sigmas")
    if steps is not None or "sigmas" not in given:
        return steps
    levels = re.findall(r"\d[\d.e+-]*", sigmas[:10_000]) if isinstance(sigmas, str) else []
    return len(levels) - 1 if len(levels) > 1 else _UNKNOWN


def _text(graph: Graph, link: Any, slot: int, word: str, lines: list[str]) -> str:
    reader = Reader(graph)
    text = reader.text(link, slot)
    if reader.unknown:
        kinds = [kind[:60] for kind in dict.fromkeys(reader.unknown)][:MAX_UNKNOWN]
        lines.append(f"Its {word} went through {', '.join(kinds)}, not computed here: compare the text.")
    return text


def _sampler_name(sampler: Any, scheduler: Any) -> str:
    """ "euler" alone when the schedule is one of the plain ones."""
    names = [name for name in (sampler, scheduler) if isinstance(name, str)]
    return " ".join(name for name in names if name not in ("simple", "normal"))


def _loras(graph: Graph, node: Node) -> list[tuple[Any, Any]]:
    """(file, strength) of a node that applies LoRAs, one or several."""
    found = []
    if isinstance(node.inputs.get("lora_name"), str):
        found.append((node.inputs["lora_name"], _first(graph, node.inputs, "strength_model", "strength")))
    for value in node.inputs.values():
        if isinstance(value, dict) and value.get("on", True) and isinstance(value.get("lora"), str):
            found.append((value["lora"], value.get("strength")))
    return found
