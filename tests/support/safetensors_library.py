"""What the safetensors library says of a file."""

from pathlib import Path

from safetensors import SafetensorError, safe_open


def library_opens(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                file.get_slice(key).get_shape()
    except SafetensorError:
        return False
    return True
