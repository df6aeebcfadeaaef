"""Names of pictures by a pattern: what the fields become, and that nothing leaves the folder."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path, PureWindowsPath

import pytest
from PIL import Image

from shared.imaging import metadata, saving
from shared.imaging.naming import FIELDS, TEMPLATE, Facts, output_path, template_problem

FACTS = Facts(datetime(2026, 11, 21, 14, 3, 22), 42, "a red/blue circle", "z_image", 1, 8, "64x64")


@pytest.mark.parametrize(
    "template, path",
    [
        (TEMPLATE, "2026-11-21/2026-11-21-14h03m22s_seed42_a_red_blue_circle"),
        ("{year}/{month}/{day}/{index}", "2026/11/21/2"),
        ("{model}_{steps}_{resolution}_{prompt(5)}", "z_image_8_64x64_a_red"),
        ("plain", "plain"),
        ("a\\b", "a/b"),
    ],
)
def test_fields_are_filled_in(template: str, path: str):
    assert template_problem(template) == ""
    assert str(output_path(template, FACTS)) == path


@pytest.mark.parametrize(
    "template, problem",
    [
        ("", "empty"), ("  ", "empty"), ("{sed}", "there is no {sed}; there are {date}"),
        ("{seed", "no partner"), ("seed}", "no partner"), ("{prompt(x)}", "no partner"),
        ("a" * 301, "longer"),
    ],
)  # fmt: skip
def test_a_wrong_pattern_is_named(template: str, problem: str):
    assert problem in template_problem(template)


ATTACKS = [
    "../../x", "/etc/x", "C:\\x\\y", "\\\\server\\share\\x", "a/../../../x", "~/x", "x/./y", "...", "CON",
    "nul.txt", "a/aux/b", "x\0y", "x\ny", "a:b", "{prompt}/..", ".zgp/zgp", "/".join("abcdefghij"), "x" * 300,
    "<>|?*", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("template", ATTACKS, ids=ascii)
@pytest.mark.parametrize("prompt", ["x", "../../up", "..\\..\\up", "", "\0", "圆" * 400, "CON", "."])
def test_nothing_leaves_the_folder(tmp_path: Path, template: str, prompt: str):
    path = output_path(template, Facts(FACTS.when, 42, prompt, "../m"))
    assert not path.is_absolute() and not PureWindowsPath(str(path)).drive and path.name
    for part in path.parts:
        assert part.strip(". ") == part and len(part.encode()) < 200
        assert not set(part) & set('<>:"/\\|?*\0\n') and not PureWindowsPath(part).is_reserved()
    target = (tmp_path / path).resolve()
    assert target.is_relative_to(tmp_path) and len(path.parts) <= 6


def test_each_field_is_made_of_the_facts():
    for name in FIELDS:
        assert str(output_path(f"{{{name}}}", FACTS))


def test_an_old_file_of_that_name_stays(tmp_path: Path):
    picture = Image.new("RGB", (8, 8), "red")
    paths = [saving.save_image(picture, tmp_path, "same", "png", None) for _ in range(3)]
    assert [path.name for path in paths] == ["same.png", "same_1.png", "same_2.png"]


@pytest.mark.parametrize("fmt", ["png", "jpeg", "webp"])
def test_a_file_without_metadata_tells_nothing(tmp_path: Path, fmt: str):
    meta = metadata.build(
        {"prompt": "a secret prompt", "num_inference_steps": 8, "resolution": "8x8"},
        seed=5, index=0, model_name="M", model_files={}, notes=[], extra={},
    )  # fmt: skip
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    with_it, without = (saving.save_image(picture, tmp_path, "a", fmt, given) for given in (meta, None))
    assert metadata.read(with_it) and metadata.read(without) is None
    assert b"secret" not in without.read_bytes() and b"ZGP" not in without.read_bytes()
    assert "secret" in json.dumps(metadata.read(with_it))


def test_a_lower_quality_is_a_smaller_file(tmp_path: Path):
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    large, small = (saving.save_image(picture, tmp_path, "a", "jpeg", None, quality=q) for q in (95, 85))
    assert small.stat().st_size < large.stat().st_size
