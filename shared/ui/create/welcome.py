"""Before the first picture: one line of help and prompts to click. The Mini models know a small world of
shapes; the others take any description.
"""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from shared.library.model_info import ModelInfo

HELP = """<p class="zgp-welcome-title">Describe a picture, then press Generate.</p>
<p>Or begin with one of these:</p>"""

# One component for all of them: each further one, and each listener, delays the page.
_CLICKS = """element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  window.zgpExample = button.textContent;
  trigger('example');
});"""

MINI = (
    "a red circle above a blue square on a yellow background",
    "a large green star on a white background",
    "a small purple heart in the top left corner on an orange background",
    "a black triangle to the left of a red circle on a white background",
    "a yellow star, a red heart and a white circle in a row on a blue background",
)
ANY = (
    "a lighthouse on a cliff at dawn, long exposure of the sea, pale light",
    "portrait of an old fisherman, weathered face, window light, 85 mm photograph",
    "a paper theatre of a forest with foxes, layered cut paper, soft shadows",
    "a red tram on a rainy street at night, reflections, film photograph",
    "a poster of a mountain hut with the words 'OPEN ALL WINTER'",
)


class Welcome:
    """The column on the right of a first visit."""

    def __init__(self, model: ModelInfo, visible: bool):
        with gr.Column(visible=visible, elem_id="welcome") as self.column:
            self.area = gr.HTML(_html(model), js_on_load=_CLICKS, elem_id="examples", apply_default_css=False)
        self.examples = [self.area]

    def fills(self, prompt: gr.Textbox) -> None:
        """Clicking an example writes it into `prompt`, without asking the server."""
        self.area.example(None, None, prompt, js="() => window.zgpExample", api_visibility="private")

    def suit(self, model: ModelInfo) -> dict[Any, Any]:
        """Show the examples of this model."""
        return {self.area: _html(model)}


def _html(model: ModelInfo) -> str:
    chips = (
        f'<button type="button" class="zgp-chip">{escape(text)}</button>' for text in examples_for(model)
    )
    return f'{HELP}<div class="zgp-chips">{"".join(chips)}</div>'


def examples_for(model: ModelInfo) -> tuple[str, ...]:
    """Five prompts that suit the model."""
    return MINI if "mini" in model.id else ANY
