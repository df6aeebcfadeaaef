"""Pictures of every kind through `wgp.py --process` to finished pictures, or to one sentence each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.cli import main
from tests.support.bad_pictures import bad_pictures
from tests.support.mini import ROOT

MINI, CONTROL = "z_image_mini", "z_image_mini_control2_1"
START, MASK, GUIDE = "image_start", "image_mask", "image_guide"
CORRECTED: list[tuple[dict[str, Any], str]] = [
    ({START: "alpha"}, "transparent parts were laid on white"),
    ({START: "deep"}, "16-bit values were scaled to 8 bits"),
    ({START: "palette"}, ""),
    ({START: "cmyk"}, "CMYK without a colour profile"),
    ({START: "turned"}, "turned upright"),
    ({START: "moving"}, "holds 3 frames; the first one is used"),
    ({START: "pixel"}, "It was enlarged"),
    ({START: "large"}, "scaled down from 8000x5000"),
    ({START: "plain", MASK: "white"}, "The mask is all white"),
    ({START: "pixel", "denoising_strength": 0, "hires_scale": 4}, ""),
    ({START: "turned", "outpaint": "0,50%,0,0"}, "turned upright"),
    ({"model_type": CONTROL, GUIDE: "black"}, "The control map is empty"),
    ({"model_type": CONTROL, GUIDE: "alpha"}, "transparent parts were laid on white"),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({START: "plain", MASK: "black"}, "The mask is all black: nothing would be repainted"),
    ({START: "plain", MASK: "black", "mask_only": True}, "The mask is all black"),
    ({START: "plain", MASK: "other"}, "The mask is 30x60, its picture 60x40"),
    ({START: "broken"}, "broken.png cannot be read; expected an intact PNG"),
    ({GUIDE: "broken", "model_type": CONTROL}, "broken.png cannot be read"),
]


@pytest.mark.slow
def test_each_is_a_stated_correction_or_one_sentence(tmp_path: Path, capsys: Any) -> None:
    paths = bad_pictures(tmp_path)

    def task(values: dict[str, Any]) -> dict[str, Any]:
        named = {name: str(paths[values[name]]) for name in (START, MASK, GUIDE) if name in values}
        usual = {"model_type": MINI, "prompt": "x", "num_inference_steps": 1, "resolution": "128x128"}
        return {**usual, **values, **named}

    told = [*CORRECTED, *REFUSED]
    tasks = tmp_path / "tasks.json"
    tasks.write_text(json.dumps([task(values) for values, _ in told]))
    outputs = tmp_path / "outputs"
    places = {"output_dir": outputs, "database": outputs / ".zgp" / "zgp.sqlite3", "root": ROOT}
    assert main.main(["--process", str(tasks), "--json"], **places) == 1
    results = {one["item"]: one for one in map(json.loads, capsys.readouterr().out.splitlines())}
    for number, (values, said) in enumerate(told, 1):
        result = results[number]
        if (values, said) in REFUSED:
            assert said in result["error"] and "\n" not in result["error"], (values, result)
        else:
            assert result["status"] == "done" and len(result["images"]) == 1, (values, result)
            assert any(said in note for note in [*result["notes"], ""]), (values, result)
