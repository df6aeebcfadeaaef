"""The page's group Grid, and controls that rest while they do nothing."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from shared.imaging import metadata

PROMPT = "a red circle on a white background"


@pytest.fixture(scope="module")
def server(shared_server):
    return shared_server


def vary(page, axis, setting, values):
    page.tab.locator(f"#grid-{axis} input").click()
    page.tab.locator(f"#grid-{axis}").get_by_role("option", name=setting, exact=True).click()
    page.tab.locator(f"#grid-{axis}-values textarea, #grid-{axis}-values input").fill(values)


def says(page, text):
    page.tab.wait_for_function(
        "(text) => document.querySelector('#grid-about').innerText.includes(text)", arg=text
    )


@pytest.mark.browser
def test_two_by_two_through_the_page(visit, server):
    page = visit()
    page.tab.locator("#prompt textarea").fill(PROMPT)
    page.tab.locator("#grid-group button").first.click()
    says(page, "Choose what varies")
    vary(page, "x", "Steps", "2, 0")
    says(page, "num_inference_steps came as 0")
    vary(page, "x", "Steps", "2, 4")
    vary(page, "y", "Prompt", "circle, star")
    says(page, "Makes 4 pictures")  # and how long that takes, where the server has made some
    says(page, "and one that shows them all.")
    assert not page.scrolls_sideways()
    page.tab.locator("#generate-grid").click()
    page.tab.wait_for_selector(f'#viewer img[width]:not([width="128"])[alt="{PROMPT}"]')
    page.wait_until_idle()
    (sheet,) = [path for path in server.pictures() if "_grid_" in path.name]
    made = metadata.read(sheet)["zgp"]["grid"]
    assert made["axes"] == {"x": ["num_inference_steps", "2, 4"], "y": ["prompt", "circle, star"]}
    files = [sheet.parent / name for (name,) in made["cells"]]
    assert [metadata.read(file)["num_inference_steps"] for file in files] == [2, 4, 2, 4]
    assert ["star" in metadata.read(file)["prompt"] for file in files] == [False, False, True, True]
    assert len({metadata.read(file)["seed"] for file in files}) == 1
    with Image.open(sheet) as image:
        assert image.width > 2 * 128 and image.height > 2 * 128
    vary(page, "x", "Steps", "2, 8")  # now the time is known from the pictures made
    page.tab.wait_for_function(
        "document.querySelector('#grid-about').innerText.match(/Makes 4 pictures, in about \\d+ s/)"
    )


@pytest.mark.browser
def test_controls_rest_while_they_do_nothing(visit):
    page = visit()
    page.tab.locator("#advanced button").first.click()

    def rests(name):
        box = page.tab.locator(f"#{name} input").first
        box.wait_for(state="visible")
        return box.is_disabled()

    def becomes(name, resting):
        page.tab.wait_for_function(
            "([name, resting]) => document.querySelector(`#${name} input`).disabled === resting",
            arg=[name, resting],
        )

    assert rests("NAG_tau") and rests("NAG_alpha") and not rests("NAG_scale")
    page.tab.locator("#negative_prompt textarea").fill("blue")
    page.tab.wait_for_selector("#negative_prompt:has-text('Acts while NAG scale is above 1')")
    page.set_number("NAG_scale", 4)
    becomes("NAG_tau", False)
    assert not rests("NAG_alpha")
    assert not re.search("Acts while", page.tab.locator("#negative_prompt").inner_text())
    page.choose_model("Z-Image Mini TwinFlow")
    page.tab.locator("#sample_solver").wait_for(state="visible")
    becomes("extrapol_ratio", True)
    page.set_number("num_inference_steps", 4)
    becomes("extrapol_ratio", False)
    page.tab.locator("#sample_solver").get_by_text("unified_4s", exact=True).click()
    becomes("num_inference_steps", True)
    page.choose_model("Z-Image Mini")
    becomes("num_inference_steps", False)
