"""The one list of settings as JSON schemas, for OpenAPI and for /models."""

from __future__ import annotations

from typing import Any

from shared.settings.table import SETTINGS, Setting

TYPES: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array"}
LIMITS = {
    str: ("minLength", "maxLength"),
    list: ("minItems", "maxItems"),
    int: ("minimum", "maximum"),
    float: ("minimum", "maximum"),
}
PROBLEM = {
    "type": "object",
    "description": "What went wrong, as RFC 9457 has it.",
    "required": ["title", "status", "detail", "problems"],
    "properties": {
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "One sentence."},
        "problems": {"type": "array", "items": {"type": "string"}, "description": "Every single problem."},
    },
}


def setting_schema(setting: Setting) -> dict[str, Any]:
    """One setting; without its default, which depends on the model."""
    schema: dict[str, Any] = {
        "type": TYPES[setting.kind],
        "title": setting.label,
        "description": setting.help,
    }
    for word, limit in zip(LIMITS.get(setting.kind, ()), (setting.minimum, setting.maximum), strict=False):
        if limit is not None:
            schema[word] = int(limit) if float(limit).is_integer() else limit
    if setting.choices:
        schema["enum"] = list(setting.choices)
    if setting.kind is list:
        schema["items"] = {"type": "string"}
    return schema


def settings_schema() -> dict[str, Any]:
    """What POST /jobs takes. Further names are allowed: those of Wan2GP are reported back, not refused."""
    return {
        "type": "object",
        "description": "Settings of one job. Which of them act on a model is told by /api/v1/models.",
        "required": ["prompt"],
        "properties": {name: setting_schema(setting) for name, setting in SETTINGS.items()},
        "additionalProperties": True,
    }
