"""Generation data as text: what A1111 and its like show below a picture and sites offer to copy, ComfyUI's
graphs, other programs' metadata as JSON, and settings of this program.
"""

from __future__ import annotations

import json
import re
from typing import Any

from shared.imaging.foreign import reader
from shared.imaging.foreign.reader import Foreign
from shared.imaging.metadata import MAX_METADATA_BYTES
from shared.settings.table import SETTINGS

Found = Foreign | dict[str, Any]  # another program's settings, or ours

#: the line that ends the data of one picture, as A1111 writes it
_LAST_LINE = re.compile(r"^Steps: *\d+ *,.*$", re.MULTILINE)
#: where ComfyUI's own answers and files have a graph
_GRAPHS = ("prompt", "workflow")
_INVOKE_MARKS = ("generation_mode", "app_version")


def read(text: str) -> list[Found]:
    """The data of each picture that a text tells of; [] when it is a plain text."""
    text = text.replace("\r\n", "\n").strip().removeprefix("\ufeff")
    if len(text) > MAX_METADATA_BYTES:
        return []
    if text.startswith("{"):
        try:
            found = from_json(json.loads(text))
        except (ValueError, RecursionError):
            found = None  # as a prompt may be that has choices in it
        return [] if found is None else [found]
    return [found for one in _blocks(text) if (found := reader.from_texts({"parameters": one}))]


def _blocks(text: str) -> list[str]:
    ends = [match.end() for match in _LAST_LINE.finditer(text)]
    return [text[start:end].strip() for start, end in zip([0, *ends], ends, strict=False)]


def from_json(content: Any) -> Found | None:
    """The data in one JSON object; None when it is something else, such as a prompt that is JSON."""
    if not isinstance(content, dict):
        return None
    inner = (content[name] for name in _GRAPHS if isinstance(content.get(name), dict))
    for graph in (content, *inner):
        if found := reader.from_graph(graph):
            return found
    text = json.dumps(content)
    invoke = {"invokeai_metadata": text} if any(mark in content for mark in _INVOKE_MARKS) else {}
    return reader.from_texts({"parameters": text, **invoke}) or _ours(content)


def _ours(content: dict[str, Any]) -> dict[str, Any] | None:
    """Settings have a prompt and something else that is a setting here."""
    known = [name for name in content if name in SETTINGS and name != "prompt"]
    return content if isinstance(content.get("prompt"), str) and known else None
