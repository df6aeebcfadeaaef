"""Around the prompt box: its tokens and jobs, earlier prompts, wildcards, and the grammar in four lines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.imaging.foreign import pasted
from shared.imaging.foreign.reader import Foreign
from shared.jobs.records import LIVE
from shared.library.job_loras import from_tags
from shared.library.model_info import ModelInfo
from shared.prompts import choices
from shared.prompts.jobs import expand
from shared.prompts.lines import tidy
from shared.prompts.remarks import remarks
from shared.prompts.wildcards import Wildcards
from shared.settings.table import ALL_ONE, SETTINGS, TEMPLATES
from shared.ui.components.errors import QUIET
from shared.ui.components.text import DOT, plural

Updates = dict[Any, Any]

PAUSE_SECONDS = 0.3  # of the typing, before it is counted
EARLIER = 200
LABEL = 90  # characters of an earlier prompt in the list
WORDS = 300  # wildcards that are shown
SHAPES = ("prompt", "negative_prompt", "multi_prompts_gen_type", "batch_size", "seed", "model_type")

_CLICK = """element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  window.zgpWildcard = button.dataset.word;
  trigger('take');
});"""
_READ = """element.addEventListener('click', (event) => {
  if (event.target.closest('[data-read]')) trigger('read');
});"""
_INSERT = """(text) => {
  const box = document.querySelector('#prompt textarea'), word = window.zgpWildcard;
  const at = box && box.value === text ? box.selectionStart : text.length;
  const gap = at && !/\\s$/.test(text.slice(0, at)) ? ' ' : '';
  return text.slice(0, at) + gap + word + text.slice(at);
}"""
_TAKE = "(text, shown) => text === null ? [shown, null] : [text, null]"
_TAKE_TEMPLATES = "(...texts) => [texts[2] || texts[0], texts[3] || texts[1], '']"

GRAMMAR = """<p><code>{red|blue}</code> draws one of them, <code>{3::red|blue}</code> red more often: another
draw for each picture, the same one for the same seed.</p>
<p><code>__animals/birds__</code> draws a line of the file <code>wildcards/animals/birds.txt</code>,
<code>{1-2$$red|blue}</code> one or two, <code>${a=!{red|blue}} ${a}</code> once for all uses.</p>
<p><code>! {A}="cat","dog"</code> repeats the lines below it with cat, then dog, in the place of
<code>{A}</code>.</p>
<p><code>#</code> begins a comment line; <code>\\{</code> and <code>\\__</code> are plain characters.</p>"""


class Prompts:
    """The line below the prompt box is laid out at once, the folded tools by `lay_out`."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.count = gr.HTML("", js_on_load=_READ, elem_id="prompt-count", apply_default_css=False)
        self.offer = gr.HTML("", js_on_load=_CLICK, elem_id="prompt-offer", apply_default_css=False)

    def lay_out(self, model: ModelInfo, add: Callable[..., Any]) -> None:
        """The tools. add: makes the control of a setting."""
        with gr.Accordion("Prompt tools", open=False, elem_id="prompt-tools") as self.tools:
            self.earlier = {
                "prompt": _history("Earlier prompts", True),
                "negative_prompt": _history("Earlier negative prompts", "negative_prompt" in model.settings),
            }
            add(model, "multi_prompts_gen_type")
            self.words = gr.HTML("", js_on_load=_CLICK, elem_id="wildcards", apply_default_css=False)
            gr.HTML(GRAMMAR, elem_id="prompt-grammar")
            for name in TEMPLATES.values():
                add(model, name, elem_classes="zgp-data")

    def wire(self, controls: Mapping[str, Any]) -> None:
        """Connect them to the form's controls."""
        gr.on(
            [controls[name].change for name in SHAPES], self.say, [controls[name] for name in SHAPES],
            self.count, trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        self.tools.expand(self.refresh, None, [*self.earlier.values(), self.words], **QUIET)
        for name, earlier in self.earlier.items():
            box = controls[name]
            earlier.input(None, [earlier, box], [box, earlier], js=_TAKE)
        self.words.take(None, controls["prompt"], controls["prompt"], js=_INSERT)
        boxes = [controls[name] for name in TEMPLATES]
        kept = [controls[name] for name in TEMPLATES.values()]
        self.offer.take(None, [*boxes, *kept], [*boxes, self.offer], js=_TAKE_TEMPLATES)

    @property
    def outputs(self) -> list[Any]:
        """What `suit` may update."""
        return [self.earlier["negative_prompt"], self.offer]

    def suit(self, model: ModelInfo, settings: Mapping[str, Any]) -> Updates:
        """For this model, and offer the template that a prompt was drawn from."""
        return {
            self.earlier["negative_prompt"]: gr.update(visible="negative_prompt" in model.settings),
            self.offer: offer_html([settings.get(name) or "" for name in TEMPLATES.values()]),
        }

    def refresh(self) -> list[Any]:
        """Earlier prompts and wildcard files, as they are now."""
        lists = [
            gr.update(
                choices=[(shortened(text), text) for text in self._engine.store.texts(name, EARLIER, LIVE)]
            )
            for name in self.earlier
        ]
        return [*lists, words_html(Wildcards(self._engine.catalog.wildcards).names())]

    async def say(self, *values: Any) -> str:
        """The line below the box, once the typing has paused."""
        await asyncio.sleep(PAUSE_SECONDS)
        given = dict(zip(SHAPES, values, strict=True))
        return await asyncio.to_thread(self._said, given) if given["prompt"].strip() else ""

    def _said(self, given: dict[str, Any]) -> str:
        if found := pasted.read(given["prompt"]):
            return data_html(found)
        model = self._engine.catalog.model(given["model_type"])
        settings = {name: SETTINGS[name].default if value is None else value for name, value in given.items()}
        if "negative_prompt" not in model.settings:
            del settings["negative_prompt"]
        if settings["seed"] == -1:
            settings["seed"] = 0  # the example stays while one types on
        try:
            jobs = expand(settings, Wildcards(self._engine.catalog.wildcards))
            made = [from_tags(model, job) for job in jobs]
            prompts = [job["prompt"] for job, _ in made]
            tokens = self._tokens(model, prompts)
        except UserError as error:
            return line_html([], problem=str(error))
        limit = model.capabilities.get("max_tokens")
        said = [tokens_text(tokens, limit)] if limit else []
        if len(prompts) > 1:
            said.append(f"makes {plural(len(prompts), 'job')}")
        elif "\n!" in f"\n{given['prompt']}" and settings["multi_prompts_gen_type"] == ALL_ONE:
            said.append("one prompt of all lines")
        said += remarks(given["prompt"]) + list(dict.fromkeys(note for _, notes in made for note in notes))
        example = prompts[0] if prompts[0] != tidy(given["prompt"]) else ""
        return line_html(said, example, too_long=bool(tokens and limit and tokens > limit))

    def _tokens(self, model: ModelInfo, prompts: list[str]) -> int | None:
        """Of the longest one; None where they cannot be counted."""
        if not model.capabilities.get("max_tokens"):
            return None
        folders = self._engine.config.folders
        count = model.handler.query_prompt_tokens(model.architecture, model.card.model, folders)
        return max(map(count, prompts)) if count else None


def as_typed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with drawn texts as they have to stand in the boxes to mean just themselves."""
    drawn = [name for name, template in TEMPLATES.items() if settings.get(template)]
    return {**settings, **{name: choices.escape(settings[name]) for name in drawn}}


def tokens_text(tokens: int | None, limit: int) -> str:
    """ "23 of 512 tokens", and what it means when there are more."""
    if tokens is None:
        return "Tokens are counted once the model is on disk"
    return f"{tokens} of {limit} tokens" + (": the end is not seen" if tokens > limit else "")


def line_html(said: list[str], example: str = "", problem: str = "", too_long: bool = False) -> str:
    """The line below the prompt box."""
    if problem:
        return f'<p class="zgp-problem" role="alert">{escape(problem)}</p>'
    kind = "zgp-problem" if too_long else "zgp-count"
    line = f'<p class="{kind}" role="status">{escape(DOT.join(said))}</p>'
    return line + (
        f'<p class="zgp-example" title="{escape(example)}">{escape(example)}</p>' if example else ""
    )


def data_html(found: Sequence[pasted.Found]) -> str:
    """What is said below a text that is the data of pictures, with the button that reads it."""
    program = found[0].program if isinstance(found[0], Foreign) else "this program"
    if len(found) > 1:
        return line_html([f"This is the data of {len(found)} pictures: keep that of one"])
    return (
        f'<p class="zgp-count" role="status">These are settings of {escape(program)} '
        '<button type="button" class="zgp-word" data-read>Use them</button></p>'
    )


def offer_html(templates: list[str]) -> str:
    """What a prompt was drawn from; "" when it was written as it stands."""
    shown = " / ".join(filter(None, templates))
    if not shown:
        return ""
    return (
        f'<p class="zgp-count">Drawn from <q title="{escape(shown)}">{escape(shortened(shown))}</q> '
        '<button type="button" class="zgp-word">Use this template</button></p>'
    )


def words_html(names: list[str]) -> str:
    """Buttons for the wildcard files."""
    buttons = [
        f'<button type="button" class="zgp-word" data-word="__{escape(name)}__">{escape(name)}</button>'
        for name in names[:WORDS]
    ]
    more = f"<span>and {len(names) - WORDS} more</span>" if len(names) > WORDS else ""
    return f'<p class="zgp-words"><span>Wildcards:</span>{"".join(buttons)}{more}</p>' if names else ""


def shortened(text: str) -> str:
    """One line of a prompt."""
    line = " ".join(text.split())
    return line if len(line) <= LABEL else f"{line[: LABEL - 1]}…"


def _history(label: str, visible: bool) -> gr.Dropdown:
    return gr.Dropdown(
        [], value=None, label=label, visible=visible, filterable=True, elem_id=label.lower().replace(" ", "-")
    )
