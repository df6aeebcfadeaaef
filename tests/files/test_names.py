"""Names that some system would not take, by every place that makes or takes one."""

from __future__ import annotations

from datetime import datetime

import pytest

from shared.errors import UserError
from shared.files.names import is_device, is_plain, without_device
from shared.imaging.naming import Facts, output_path
from shared.loras.library import _safe_name
from shared.loras.presets import check_name
from shared.server.file_access import _is_plain

# learn.microsoft.com/windows/win32/fileio/naming-a-file, and what Python's pathlib reserves
DEVICES = ["con", "CON", "nul", "NUL.txt", "aux.tar.gz", "com1", "LPT9.png", "COM¹", "nul .json", "conin$"]
FILES = ["console", "null", "com", "com10", "acon", "lpt", "con_", "my nul", "nulls.txt"]


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_is_no_file(name: str) -> None:
    assert is_device(name) and not is_plain(name)
    assert without_device(name) == f"_{name}"
    assert not _is_plain(f"/pictures/{name}")
    with pytest.raises(UserError):
        check_name(name)


@pytest.mark.parametrize("name", FILES)
def test_what_only_looks_like_one_is(name: str) -> None:
    assert not is_device(name) and is_plain(name) and without_device(name) == name


@pytest.mark.parametrize("name", ["", " ", ".hidden", "a/b", "a\\b", "a:b", "what?", "a\0b", "a\nb"])
def test_names_that_mean_something_else(name: str) -> None:
    assert not is_plain(name)


@pytest.mark.parametrize("name", ["nul", "com1", "conin$"])
def test_what_is_made_of_a_text_is_no_device(name: str) -> None:
    assert _safe_name(f"{name}.safetensors") == f"_{name}.safetensors"
    assert not is_device(output_path("{prompt}", Facts(datetime(2026, 1, 1), 1, name)).name)
