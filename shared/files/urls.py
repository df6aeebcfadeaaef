"""Where a file may come from: which addresses and paths are taken. Standard library only."""

from __future__ import annotations

import re
from urllib.parse import urlsplit


def source_problem(source: str) -> str:
    """Why `source` may not be fetched or opened; "" for an https URL or a path that stays in the project."""
    if not source.strip() or not source.isprintable():
        return "expected the text of a URL or path"
    if "://" in source:
        return _url_problem(source)
    if ":" in source or source[0] in "/\\~" or ".." in re.split(r"[/\\]", source):
        return "expected a path inside the project: relative, without drive letter and without '..'"
    return ""


def _url_problem(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return "expected a valid URL"
    local = parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1")
    if parts.hostname and (parts.scheme == "https" or local):
        return ""
    return "expected an https:// URL (http:// only for localhost)"
