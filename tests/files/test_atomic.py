"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.files import atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic.replacing(path) as part:
        part.write_text("half")
        assert not path.exists() and part.parent == path.parent
    assert path.read_text() == "half" and names(path.parent) == ["a.txt"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), atomic.replacing(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "before" and names(tmp_path) == ["a.txt"]


def test_text_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    atomic.write(tmp_path / "a", "雪")
    atomic.write(tmp_path / "b", b"\0")
    assert (tmp_path / "a").read_bytes() == b"\xe9\x9b\xaa" and (tmp_path / "b").read_bytes() == b"\0"


def test_what_would_be_missed_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("flushed"))
    monkeypatch.setattr(os, "replace", lambda source, target: calls.append("named"))
    atomic.write(tmp_path / "a", "x", durable=True)
    atomic.write(tmp_path / "a", "x")
    assert calls == ["flushed", "named", "named"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic.replacing(path) as first:
        first.write_text("first")
        atomic.write(path, "second")
    assert path.read_text() == "first" and names(tmp_path) == ["a"]


def test_what_a_killed_process_left_is_overwritten_where_its_name_is_known(tmp_path: Path) -> None:
    known = tmp_path / "a.part"
    known.write_text("left behind, and longer")
    with atomic.replacing(tmp_path / "a", part=known) as part:
        part.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole" and names(tmp_path) == ["a"]
