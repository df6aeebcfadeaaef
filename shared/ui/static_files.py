"""The page's scripts, styles and pictures, as they lie in static/."""

from pathlib import Path

FOLDER = Path(__file__).parent / "static"


def read(name: str) -> str:
    """The text of a file in static/."""
    return (FOLDER / name).read_text(encoding="utf-8")
