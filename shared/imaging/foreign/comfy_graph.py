"""The two forms of ComfyUI's graphs, as one table of nodes and links.

"prompt", which its API takes, is {id: {"class_type", "inputs": {name: value or [id, slot]}}}. "workflow" is
what the editor saves: {"nodes": [...], "links": [[link, from id, from slot, to id, to slot, type], ...]},
where values stand in the order of a node's fields; {"definitions": {"subgraphs": [...]}} has nodes that are
made of nodes, whose links are objects, with the ports -10 (what comes in) and -20 (what goes out).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_NODES = 5000
MAX_DEPTH = 200  # nodes on the way from a sampler to its text
MAX_NESTED = 20  # subgraphs within each other
MAX_WORK = 10 * MAX_NODES  # nodes and links that are looked at to lay subgraphs open

SEED_MODES = ("fixed", "increment", "decrement", "randomize")
_MUTED, _BYPASSED = 2, 4
_IN, _OUT = -10, -20

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
    "StringConcatenate": ("string_a", "string_b", "delimiter"),
    "StringReplace": ("string", "find", "replace"),
    "StringTrim": ("string", "mode"),
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


def is_graph(content: Any) -> bool:
    """Whether the JSON of a file is one of the two forms."""
    if not isinstance(content, dict):
        return False
    if isinstance(content.get("nodes"), list) and isinstance(content.get("links"), list):
        return True
    return bool(content) and all(isinstance(one, dict) and "class_type" in one for one in content.values())


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


# ---------------------------------------------------------------- the editor's form


def workflow_nodes(workflow: Any) -> Graph:
    """The graph of a "workflow", subgraphs laid open; nodes that are switched off let what comes in pass."""
    if not isinstance(workflow, dict):
        return {}
    definitions = workflow.get("definitions")
    listed = definitions.get("subgraphs") if isinstance(definitions, dict) else None
    subgraphs = {
        one["id"]: one
        for one in (listed if isinstance(listed, list) else ())
        if isinstance(one, dict) and isinstance(one.get("id"), str)
    }
    opened = _Opened(subgraphs)
    if not opened.lay_open(workflow, "", 0, {}):
        return {}
    return opened.joined()


@dataclass
class _Opened:
    """`ports`: node -> slot -> what it passes on. They are no nodes of the graph that comes of it."""

    subgraphs: Mapping[str, Mapping[str, Any]]
    graph: Graph = field(default_factory=dict)
    ports: dict[str, dict[int, Any]] = field(default_factory=dict)
    work: int = 0

    def lay_open(self, level: Mapping[str, Any], prefix: str, depth: int, set_inside: _Set) -> bool:
        """Add the nodes of a graph, their names behind `prefix`; False when there are too many."""
        listed, lines = level.get("nodes"), level.get("links")
        if not isinstance(listed, list) or not isinstance(lines, list) or depth > MAX_NESTED:
            return False
        self.work += len(listed) + len(lines)
        if len(listed) + len(self.graph) > MAX_NODES or self.work > MAX_WORK:
            return False
        links = list(_links(lines))
        sources = {link: Link(f"{prefix}{origin}", slot) for link, origin, slot, *_ in links}
        named: dict[str, Link] = {}
        wanted: list[tuple[str, str]] = []
        for one in listed:
            if not isinstance(one, dict) or not isinstance(one.get("type"), str) or one.get("mode") == _MUTED:
                continue
            name = f"{prefix}{one.get('id')}"
            node = _workflow_node(one, sources, set_inside.get(str(one.get("id")), {}))
            if one["type"] in ("SetNode", "GetNode"):
                # A link that has a name instead of a line, as KJNodes make them.
                link, key = next(filter(_is_link, node.inputs.values()), None), _first_value(one)
                self.ports[name] = {0: link}
                wanted += [] if link else [(name, key)]
                named |= {key: link} if link else {}
            elif one["type"] in self.subgraphs and node.kind:
                if not self._instance(one, name, node, depth):
                    return False
            else:
                self.graph[name] = node
        for _, origin, slot, target, port in links:
            if target == _OUT and prefix:
                self.ports[prefix[:-1]][port] = Link(f"{prefix}{origin}", slot)
        self.ports |= {name: {0: named.get(key)} for name, key in wanted}
        return True

    def _instance(self, one: Mapping[str, Any], name: str, node: Node, depth: int) -> bool:
        """A node that stands for a subgraph."""
        inner = self.subgraphs[one["type"]]
        listed = inner.get("inputs")
        names = [
            str(port.get("name")) if isinstance(port, dict) else ""
            for port in (listed if isinstance(listed, list) else ())
        ]
        values, set_inside = _proxies(one)
        given = {**node.inputs, **values, **{n: x for n, x in node.inputs.items() if isinstance(x, Link)}}
        self.ports[name] = {}
        self.ports[f"{name}:{_IN}"] = {i: given[port] for i, port in enumerate(names) if port in given}
        return self.lay_open(inner, f"{name}:", depth + 1, set_inside)

    def joined(self) -> Graph:
        """The graph without ports."""
        return {
            name: Node(node.kind, {key: self._end(x) for key, x in node.inputs.items()})
            for name, node in self.graph.items()
        }

    def _end(self, value: Any) -> Any:
        for _ in range(MAX_DEPTH):
            if not isinstance(value, Link) or value.node not in self.ports:
                break
            value = self.ports[value.node].get(value.slot)
        return value


_Set = Mapping[str, Mapping[str, Any]]  # node -> field -> the value that an instance gives it


def _is_link(value: Any) -> bool:
    return isinstance(value, Link)


def _first_value(one: Mapping[str, Any]) -> str:
    values = one.get("widgets_values")
    return str(values[0])[:200] if isinstance(values, list) and values else ""


def _links(listed: list[Any]) -> Iterator[tuple[int, Any, int, Any, int]]:
    """(link, from, slot, to, slot) of both spellings."""
    for link in listed:
        if isinstance(link, dict):
            link = [link.get(x) for x in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
        if isinstance(link, list) and len(link) >= 3 and type(link[0]) is int and type(link[2]) is int:
            target, slot = (*link[3:5], None, None)[:2]
            yield link[0], link[1], link[2], target, slot if type(slot) is int else 0


def _proxies(one: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The values of an instance's own fields: for its ports ("-1"), and for single nodes inside."""
    properties, values = one.get("properties"), one.get("widgets_values")
    listed = properties.get("proxyWidgets") if isinstance(properties, dict) else None
    ports: dict[str, Any] = {}
    inside: dict[str, dict[str, Any]] = {}
    if isinstance(listed, list) and isinstance(values, list):
        for proxy, value in zip(listed, values, strict=False):
            if isinstance(proxy, list) and len(proxy) >= 2 and all(isinstance(x, str) for x in proxy[:2]):
                (ports if proxy[0] == "-1" else inside.setdefault(proxy[0], {}))[proxy[1]] = value
    return ports, inside


def _workflow_node(one: Mapping[str, Any], sources: Mapping[int, Link], given: Mapping[str, Any]) -> Node:
    slots = one.get("inputs")
    slots = [slot for slot in slots if isinstance(slot, dict)] if isinstance(slots, list) else []
    links = {
        str(slot.get("name")): sources[slot["link"]]
        for slot in slots
        if type(slot.get("link")) is int and slot["link"] in sources
    }
    if one.get("mode") == _BYPASSED:
        return Node("", links)
    return Node(one["type"], {**_fields(one, slots), **given, **links})


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
