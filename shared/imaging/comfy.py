"""ComfyUI's graphs, as its pictures carry them: from the sampler to what it was given.

Two forms exist. "prompt" is {id: {"class_type", "inputs": {name: value or [id, slot]}}}; "workflow" is what
the editor saves: {"nodes": [...], "links": [[link, from id, from slot, to id, to slot, type], ...]}, where
values stand in the order of a node's fields.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_NODES = 5000
MAX_DEPTH = 200  # nodes on the way from a sampler to its text

TEXTS = ("text", "prompt", "positive_prompt", "string", "value", "t5xxl", "clip_l", "text_g", "user_prompt")
MODELS = ("unet_name", "ckpt_name", "model_name", "gguf_name", "checkpoint")
NOT_TEXT = {"clip", "model", "vae", "image", "images", "pixels", "mask", "control_net", "latent", "samples"}
HELPERS = ("guider", "noise", "sigmas", "sampler")  # of samplers that are put together from nodes
SEED_MODES = ("fixed", "increment", "decrement", "randomize")

#: the order of the fields in the editor's form, for files whose nodes do not name them
_FIELDS = {
    "KSampler": ("seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": (
        "add_noise", "noise_seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler",
        "start_at_step", "end_at_step", "return_with_leftover_noise",
    ),
    "CLIPTextEncode": ("text",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "EmptySD3LatentImage": ("width", "height", "batch_size"),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "UnetLoaderGGUF": ("unet_name",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "ModelSamplingAuraFlow": ("shift",),
    "ModelSamplingSD3": ("shift",),
    "RandomNoise": ("noise_seed", "control_after_generate"),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "KSamplerSelect": ("sampler_name",),
    "CFGGuider": ("cfg",),
    "PrimitiveNode": ("value", "control_after_generate"),
    "PrimitiveString": ("value",),
    "PrimitiveStringMultiline": ("value",),
    "PrimitiveInt": ("value", "control_after_generate"),
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """`inputs`: a Link, or the value itself."""

    kind: str
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Link:
    node: str
    slot: int


Graph = dict[str, Node]


@dataclass
class Walked:
    """As foreign.Raw."""

    values: dict[str, Any]
    loras: list[tuple[Any, Any]]
    lines: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- the two forms


def nodes(prompt: Any) -> Graph:
    """The graph of a "prompt"; what has another form is left out."""
    if not isinstance(prompt, dict) or len(prompt) > MAX_NODES:
        return {}
    return {
        str(name): Node(one["class_type"], {str(key): _linked(x) for key, x in one["inputs"].items()})
        for name, one in prompt.items()
        if isinstance(one, dict)
        and isinstance(one.get("class_type"), str)
        and isinstance(one.get("inputs"), dict)
    }


def _linked(value: Any) -> Any:
    is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int))
    if is_link and type(value[1]) is int:
        return Link(str(value[0]), value[1])
    return value


def workflow_nodes(workflow: Any) -> Graph:
    """The graph of a "workflow"; nodes that are switched off let what comes in pass."""
    if not isinstance(workflow, dict):
        return {}
    listed, links = workflow.get("nodes"), workflow.get("links")
    if not isinstance(listed, list) or not isinstance(links, list) or len(listed) > MAX_NODES:
        return {}
    sources = {
        link[0]: Link(str(link[1]), link[2])
        for link in links
        if isinstance(link, list) and len(link) >= 3 and type(link[0]) is int and type(link[2]) is int
    }
    graph = {}
    for one in listed:
        if isinstance(one, dict) and isinstance(one.get("type"), str) and one.get("mode") != _MUTED:
            graph[str(one.get("id"))] = _workflow_node(one, sources)
    return graph


_MUTED, _BYPASSED = 2, 4


def _workflow_node(one: Mapping[str, Any], sources: Mapping[int, Link]) -> Node:
    slots = one.get("inputs")
    slots = [slot for slot in slots if isinstance(slot, dict)] if isinstance(slots, list) else []
    links = {
        str(slot.get("name")): sources[slot["link"]]
        for slot in slots
        if type(slot.get("link")) is int and slot["link"] in sources
    }
    if one.get("mode") == _BYPASSED:
        return Node("", links)
    return Node(one["type"], {**_fields(one, slots), **links})


def _fields(one: Mapping[str, Any], slots: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    values = one.get("widgets_values")
    if isinstance(values, dict):
        return {str(name): value for name, value in values.items()}
    if not isinstance(values, list):
        return {}
    if one["type"] in _FIELDS:
        return dict(zip(_FIELDS[one["type"]], values, strict=False))
    fields = {f"field {number}": value for number, value in enumerate(values) if isinstance(value, dict)}
    names = iter([str(slot.get("name")) for slot in slots if isinstance(slot.get("widget"), dict)])
    for value in values:
        if isinstance(value, str) and value in SEED_MODES:
            continue  # a field that the editor adds behind a seed
        name = next(names, None)
        if name is None:
            break
        fields[name] = value
    return fields


# ---------------------------------------------------------------- from the sampler to what it was given


def walk(graph: Graph) -> Walked | None:
    """What the first pass of the picture was made with; None when there is no sampler."""
    samplers = list(_samplers(graph))
    if not samplers:
        return None
    given = _together(graph, samplers[-1])
    values = {
        "seed": _first(graph, given, "seed", "noise_seed"),
        "steps": _first(graph, given, "steps"),
        "cfg": _first(graph, given, "cfg"),
        "prompt": _prompt(graph, given.get("positive", given.get("conditioning"))),
        "negative_prompt": _prompt(graph, given.get("negative"), slot=1),
        "sampler": _sampler_name(_first(graph, given, "sampler_name"), _first(graph, given, "scheduler")),
    }
    for node in _chain(graph, given.get("latent_image", given.get("samples", given.get("latent")))):
        if "width" in node.inputs and "height" in node.inputs:
            values["width"], values["height"] = (_first(graph, node.inputs, x) for x in ("width", "height"))
            break
    loras: list[tuple[Any, Any]] = []
    for node in _chain(graph, given.get("model")):
        if values.get("shift") is None:
            values["shift"] = _first(graph, node.inputs, "shift")
        loras = [*_loras(graph, node), *loras]  # the one nearest to the sampler is applied last
        model = next((x for name in MODELS if isinstance(x := node.inputs.get(name), str)), None)
        if model:
            values["model"] = model
    passes = [f"It was made in {len(samplers)} passes: the settings are those of the first."]
    return Walked(values, loras, passes if len(samplers) > 1 else [])


def _samplers(graph: Graph) -> Iterator[Node]:
    """The samplers that a saved picture depends on, the last pass first; without saving nodes, all."""
    saving = [name for name, node in graph.items() if re.search("(?i)save|preview", node.kind)]
    seen: set[str] = set()
    waiting = deque(saving or graph)
    while waiting:
        name = waiting.popleft()
        if name in seen or name not in graph:
            continue
        seen.add(name)
        node = graph[name]
        given = _together(graph, node)
        if "positive" in given or "conditioning" in given:
            if _first(graph, given, "steps") is not None:
                yield node
        waiting += [x.node for x in node.inputs.values() if isinstance(x, Link)]


def _together(graph: Graph, node: Node) -> dict[str, Any]:
    """A sampler's inputs, with those of the nodes that it is put together from."""
    parts = [graph.get(x.node) for name in HELPERS if isinstance(x := node.inputs.get(name), Link)]
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= part.inputs if part else {}
    return {**merged, **node.inputs}


def _chain(graph: Graph, link: Any) -> Iterator[Node]:
    """The nodes that a model or a latent picture came through, backwards."""
    seen: set[str] = set()
    while isinstance(link, Link) and link.node in graph and link.node not in seen:
        seen.add(link.node)
        node = graph[link.node]
        yield node
        links = {name: x for name, x in node.inputs.items() if isinstance(x, Link)}
        usual = [links[name] for name in ("model", "samples", "latent_image", "latent") if name in links]
        link = usual[0] if usual else next(iter(links.values()), None)


def _first(graph: Graph, inputs: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these inputs that is there, fetched from the node that it is linked to."""
    for name in names:
        value = inputs.get(name)
        for _ in range(MAX_DEPTH):
            if not isinstance(value, Link):
                break
            source = graph.get(value.node)
            value = next(iter(_values(source)), None) if source else None
        if isinstance(value, (str, int, float)):
            return value
    return None


def _values(node: Node) -> list[Any]:
    """A source's value, or what it is linked to: usual names first."""
    usual = [node.inputs[name] for name in ("value", "seed", "noise_seed", *TEXTS) if name in node.inputs]
    return usual or list(node.inputs.values())


def _prompt(graph: Graph, link: Any, slot: int = 0, depth: int = 0, seen: set[str] | None = None) -> str:
    """The text behind a conditioning. slot: 0 positive, 1 negative, where a node passes both on."""
    seen = set() if seen is None else seen
    if isinstance(link, str):
        return link
    if not isinstance(link, Link) or link.node in seen or link.node not in graph or depth > MAX_DEPTH:
        return ""
    seen.add(link.node)
    node = graph[link.node]
    if "ZeroOut" in node.kind:
        return ""
    if {"string_a", "string_b"} <= set(node.inputs):
        parts = [_prompt(graph, node.inputs[x], slot, depth + 1, seen) for x in ("string_a", "string_b")]
        delimiter = node.inputs.get("delimiter")
        return (delimiter if isinstance(delimiter, str) else "").join(parts)
    if "positive" in node.inputs and "negative" in node.inputs:
        inner = node.inputs["negative" if slot else "positive"]
        return _prompt(graph, inner, link.slot if isinstance(inner, Link) else slot, depth + 1, seen)
    ways = [node.inputs[name] for name in TEXTS if name in node.inputs]
    ways += [x for name, x in node.inputs.items() if isinstance(x, Link) and name.lower() not in NOT_TEXT]
    return next(filter(None, (_prompt(graph, way, slot, depth + 1, seen) for way in ways)), "")


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
