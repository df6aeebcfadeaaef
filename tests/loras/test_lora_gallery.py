"""--check-loras over some 200 files, against what their makers know of them (data/lora_gallery.json)."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.support import lora_gallery
from tests.support.browser import ROOT
from tests.support.waiting import LIMIT

EXPECTED = json.loads(lora_gallery.EXPECTATIONS.read_text("utf-8"))


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the command says about each file; it ends with 1, as some are refused."""
    folder = tmp_path_factory.mktemp("loras")
    lora_gallery.write(folder)
    command = [sys.executable, "wgp.py", "--check-loras", "--lora-dir-z-image", str(folder)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert said.returncode == 1 and said.stderr == ""
    found: dict[str, list[str]] = {}
    for line in said.stdout.splitlines():
        name, _, words = line.partition(": ")
        found.setdefault(name, []).append(words)
    return found


def test_the_expectations_are_those_of_the_files() -> None:
    assert lora_gallery.EXPECTATIONS.read_text("utf-8") == lora_gallery.expectations()
    assert len(EXPECTED) >= 200


def test_every_file_is_judged_once(lines: dict[str, list[str]]) -> None:
    assert lines.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_is_judged_as_it_was_made(name: str, lines: dict[str, list[str]]) -> None:
    expected, (verdict, *left_out) = EXPECTED[name], lines[name]
    refused = verdict.startswith("refused: ")
    assert refused == expected.get("refused", False), verdict
    if not refused:
        used = re.match(r"(\d+) of (\d+) modules", verdict)
        assert used and [int(n) for n in used.groups()] == [expected["used"], expected["of"]], verdict
        assert bool(left_out) == (expected["used"] < expected["of"]), left_out
    said = "\n".join((verdict, *left_out))
    assert all(words in said for words in expected["words"]), (said, expected["words"])
