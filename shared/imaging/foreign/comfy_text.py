"""The text that ComfyUI's nodes make of other texts, where what a node does is known from its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.imaging.foreign.comfy_graph import MAX_DEPTH, Graph, Link, Node

MAX_TEXT = 100_000  # characters; a short graph can double its text at every node

#: where a node has the text that it passes on, best first
TEXTS = (
    "text", "prompt", "positive_prompt", "string", "value", "source", "t5xxl", "clip_l", "text_g",
    "user_prompt",
)  # fmt: skip
NOT_TEXT = {
    "clip", "model", "vae", "image", "images", "pixels", "mask", "control_net", "latent", "samples",
    "opt_model", "opt_clip", "clip_vision", "control_after_generate",
}  # fmt: skip
_SEPARATORS = ("delimiter", "separator")
_JOINERS = re.compile(r"(?i)concat|join|combine")
_PARTS = re.compile(r"(?i)(?:text|string|prompt|str)_?(?:[a-z]|\d{1,3})")

Texts = Mapping[str, str]


def _replaced(of: str, find: str, by: str) -> Callable[[Texts], str | None]:
    return lambda texts: _replace(texts.get(of, ""), texts.get(find, ""), texts.get(by, ""))


def _replace(text: str, find: str, by: str) -> str | None:
    if not find:
        return text
    grown = len(text) + text.count(find) * (len(by) - len(find))
    return text.replace(find, by) if grown <= MAX_TEXT else None


def _trimmed(texts: Texts) -> str:
    sides = {"Left": str.lstrip, "Right": str.rstrip}
    return sides.get(texts.get("mode", ""), str.strip)(texts.get("string", ""))


def _cased(texts: Texts) -> str | None:
    ways = {
        "UPPERCASE": str.upper, "lowercase": str.lower, "Capitalize": str.capitalize, "Title Case": str.title,
    }  # fmt: skip
    way = ways.get(texts.get("mode", ""))
    return way(texts.get("string", "")) if way else None


def _joined(texts: Texts) -> str:
    """Of all nodes that put numbered or lettered parts together; WAS leaves out what is empty."""
    separator = next((texts[name] for name in _SEPARATORS if name in texts), "").replace("\\n", "\n")
    parts = [text for name, text in texts.items() if _PARTS.fullmatch(name)]
    if texts.get("clean_whitespace") == "true":
        parts = list(filter(None, map(str.strip, parts)))
    return separator.join(parts)


def _function(texts: Texts) -> str | None:
    parts = [texts.get(f"text_{letter}", "") for letter in "abc"]
    if texts.get("action") == "replace":
        return _replace(*parts)
    tidy = texts.get("tidy_tags") == "yes"
    return (", " if tidy else "").join(filter(None, parts) if tidy else parts)


def _one_of(*names: str) -> Callable[[Texts], str | None]:
    return lambda texts: next((texts[name] for name in names if name in texts), None)


#: class of a node -> what it makes of its texts; None where that cannot be told
_KNOWN: dict[str, Callable[[Texts], str | None]] = {
    "StringReplace": _replaced("string", "find", "replace"),
    "StringTrim": _trimmed,
    "CaseConverter": _cased,
    "Text Find and Replace": _replaced("text", "find", "replace"),
    "CR Text Replace": _replaced("text", "find1", "replace1"),
    "StringFunction|pysssssss": _function,
    "ShowText|pysssssss": _one_of("text_0", "text"),
    "ImpactWildcardProcessor": _one_of("populated_text"),
    "ImpactWildcardEncode": _one_of("populated_text"),
    "CLIPTextEncodeLumina2": _one_of("user_prompt"),
    "easy positive": _one_of("positive"),
    "easy negative": _one_of("negative"),
}


@dataclass
class Reader:
    """unknown: the nodes whose work was guessed, as what they take in."""

    graph: Graph
    unknown: list[str] = field(default_factory=list)
    _known: dict[tuple[Any, int], str] = field(default_factory=dict)

    def text(self, link: Any, slot: int = 0, depth: int = 0) -> str:
        """The text behind a link or value. slot: 0 positive, 1 negative, where a node passes both on."""
        if isinstance(link, str):
            return link
        if isinstance(link, (int, float)) and not isinstance(link, bool):
            return str(link)
        if not isinstance(link, Link) or link.node not in self.graph or depth > MAX_DEPTH:
            return ""
        key = (link, slot)
        if key not in self._known:
            self._known[key] = ""  # what a circle gives
            text = self._of(self.graph[link.node], slot, depth + 1)
            self._known[key] = text if len(text) <= MAX_TEXT else ""
        return self._known[key]

    def _of(self, node: Node, slot: int, depth: int) -> str:
        inputs = node.inputs
        if "ZeroOut" in node.kind:
            return ""
        if node.kind == "ComfySwitchNode":
            taken = inputs.get("on_true" if inputs.get("switch") is True else "on_false")
            return self.text(taken, slot, depth)
        work = _KNOWN.get(node.kind)
        texts = [name for name, x in inputs.items() if _is_text(name, x)]
        parts = sum(bool(_PARTS.fullmatch(name)) for name in texts)
        if work is None and "clip" not in inputs and parts > 1 and _joins(node):
            work = _joined
        if work is not None:
            made = work({name: self.text(inputs[name], 0, depth) for name in texts})
            if made is not None:
                return made
        if {"positive", "negative"} <= set(inputs):
            inner = inputs["negative" if slot else "positive"]
            return self.text(inner, inner.slot if isinstance(inner, Link) else slot, depth)
        return self._guess(node, texts, slot, depth)

    def _guess(self, node: Node, texts: list[str], slot: int, depth: int) -> str:
        """The text that a node most likely passes on; noted where there are others."""
        inputs = node.inputs
        ways = [name for name in TEXTS if name in texts]
        ways += [name for name in texts if name not in ways and isinstance(inputs[name], Link)]
        passes = "clip" in inputs or isinstance(inputs.get("conditioning"), Link)
        if not (passes or len(texts) <= 1) or re.search("Combine|Concat|Average", node.kind):
            self.unknown.append(node.kind)
        return next(filter(None, (self.text(inputs[name], slot, depth) for name in ways)), "")


def _joins(node: Node) -> bool:
    return bool(_JOINERS.search(node.kind)) or any(name in node.inputs for name in _SEPARATORS)


def _is_text(name: str, value: Any) -> bool:
    return isinstance(value, (str, Link)) and name.lower() not in NOT_TEXT
