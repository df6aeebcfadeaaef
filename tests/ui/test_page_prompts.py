"""The prompt box in a real browser: counter, earlier prompts, several prompts, and Generate forever."""

from __future__ import annotations

import json

import pytest

from shared.imaging import metadata
from tests.support.browser import Visit
from tests.support.waiting import until

pytestmark = pytest.mark.browser
TEMPLATE = "a {red|blue|green} __mini/shape__ on a white background"


@pytest.fixture(scope="module")
def server(shared_server):
    return shared_server


class Prompting(Visit):
    def type(self, text):
        self.tab.locator("#prompt textarea").fill(text)

    def wait_for_line(self, text):
        said = "(text) => document.querySelector('#prompt-count').innerText.includes(text)"
        self.tab.wait_for_function(said, arg=text)

    def wait_for_prompt(self, text):
        self.tab.wait_for_function(f"document.querySelector('#prompt textarea').value === {json.dumps(text)}")

    def open_tools(self):
        self.tab.locator("#prompt-tools button").first.click()
        self.tab.wait_for_selector("#wildcards .zgp-word")

    def wait_for_forever(self, word):
        self.tab.wait_for_function(f"document.querySelector('#forever')?.innerText.trim() === '{word}'")


VISIT = Prompting


def test_the_counter_follows_the_prompt(visit):
    page = visit(viewport={"width": 390, "height": 844})
    page.type("a red circle")
    page.wait_for_line("of 512 tokens")
    page.type("word " * 700)
    page.wait_for_line("the end is not seen")
    page.type("a {red|blue circle")
    page.wait_for_line("is not closed")
    page.type("")
    page.tab.wait_for_selector("#prompt-count", state="hidden")
    page.open_tools()
    assert not page.scrolls_sideways()


def test_each_image_of_a_template_is_drawn_and_its_template_comes_back(visit, server):
    page, before = visit(), len(server.pictures())
    page.open_tools()
    page.type("a {red|blue|green} on a white background")
    page.tab.locator("#prompt textarea").evaluate("box => box.setSelectionRange(18, 18)")
    page.tab.get_by_role("button", name="mini/shape").click()
    page.wait_for_prompt(TEMPLATE)
    page.set_number("batch_size", 3)
    page.set_number("seed", 20)
    page.wait_for_line("makes 3 jobs")
    page.tab.locator("#generate").click()
    page.tab.wait_for_function("document.querySelector('#viewer .zgp-line')?.innerText.includes('seed 22')")
    page.wait_until_idle()
    found = [metadata.read(path) for path in server.pictures()[before:]]
    assert sorted(meta["seed"] for meta in found) == [20, 21, 22]
    assert {meta["prompt_template"] for meta in found} == {TEMPLATE}
    assert not any(mark in meta["prompt"] for meta in found for mark in "{|}_")
    page.tab.get_by_role("button", name="Use these settings").click()
    [last] = [meta["prompt"] for meta in found if meta["seed"] == 22]
    page.wait_for_prompt(last)
    page.tab.get_by_role("button", name="Use this template").click()
    page.wait_for_prompt(TEMPLATE)
    page.tab.wait_for_selector("#prompt-offer", state="hidden")


def test_lines_make_jobs_and_earlier_prompts_come_back_by_the_arrow_keys(visit, server):
    page, before = visit(), len(server.pictures())
    page.open_tools()
    page.tab.get_by_label("a prompt per line").check()
    page.type("a red star on a white background\n# not this one\na blue heart on a white background")
    page.wait_for_line("makes 2 jobs")
    page.tab.locator("#generate").click()
    page.tab.locator("#viewer").get_by_text("a blue heart on a white background", exact=True).wait_for()
    page.wait_until_idle()
    assert len(server.pictures()) == before + 2
    page.tab.reload()
    page.complaints.clear()  # Gradio writes that the stream it was reading has ended
    page.open_tools()
    box = page.tab.locator("#earlier-prompts input")
    box.click()
    page.tab.get_by_role("option", name="a blue heart").wait_for()
    box.press_sequentially("red star")
    box.press("ArrowDown")
    box.press("Enter")
    page.wait_for_prompt("a red star on a white background")


def test_forever_goes_on_without_its_page_and_stops(visit, server):
    page = visit()
    page.type("a {red|blue} star on a white background")
    page.tab.locator("#forever").click()
    page.wait_for_forever("Stop")
    page.tab.wait_for_selector("#viewer img")
    page.context.close()
    left = len(server.pictures())
    until(lambda: len(server.pictures()) >= left + 3)
    page = visit()
    page.wait_for_forever("Stop")
    page.tab.locator("#forever").click()
    page.wait_until_idle()
    page.wait_for_forever("Forever")
    made = len(server.pictures())
    page.tab.wait_for_timeout(1000)
    assert len(server.pictures()) == made
    assert page.tab.locator("#notice").get_by_text("What waits is still made").is_visible()
