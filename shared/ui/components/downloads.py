"""What the tab Create says of downloads: the line below the model, the choice of precision, and the question
before a large one. Names and addresses come from cards that anyone may have written: every text is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.engine.questions import Question
from shared.errors import UserError
from shared.gpu.machine import survey
from shared.gpu.planner import Machine
from shared.library.consent import amount
from shared.library.model_info import ModelInfo
from shared.library.outlook import Outlook, unplanned
from shared.settings.table import ANY_PRECISION
from shared.ui.components.errors import QUIET, shows_errors
from shared.ui.components.queue_state import Sight
from shared.ui.components.text import DOT, plural, size_text

SMALL_FILES = (".json", ".txt")  # configurations and vocabularies: counted, not named

# 'answer' carries the button's act and which question it was. "Not now", Escape and a press beside it leave
# the question in the page, where it can still be answered.
_CLICKS = """const aside = () => {
  const question = element.querySelector('.zgp-question');
  if (!question) return;
  question.className = 'zgp-asks';
  question.firstElementChild.setAttribute('role', 'group');
  question.firstElementChild.removeAttribute('aria-modal');
};
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-act]');
  if (button?.dataset.act === 'later' || event.target.classList.contains('zgp-question')) return aside();
  if (button) trigger('answer', {act: button.dataset.act, mark: button.dataset.mark});
});
element.addEventListener('keydown', (event) => { if (event.key === 'Escape') aside(); });
new MutationObserver(() => {
  const question = element.querySelector('.zgp-question');
  if (question && !question.contains(document.activeElement)) {
    question.querySelector('[data-act="later"]').focus();
  }
}).observe(element, {childList: true, subtree: true});"""


class DownloadQuestion:
    """The question of the jobs that wait for a large download. Whoever follows the queue shows `html`."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.area = gr.HTML("", js_on_load=_CLICKS, elem_id="download-question", apply_default_css=False)
        self.area.answer(self.answer, None, self.area, **QUIET)

    def html(self, sight: Sight, tab: str) -> str:
        """The open question; before all else in a tab that submitted one of its jobs, else in its place."""
        if not any(job.asks for job in sight.queue):
            return ""
        question = self._engine.questions.open()
        mine = question is not None and any(tab and job.client == tab for job in question.jobs)
        return self._html(question, mine)

    @shows_errors
    def answer(self, event: gr.EventData) -> str:
        """Fetch the files, or cancel the jobs; then the next question, if there is one."""
        questions = self._engine.questions
        try:
            questions.answer(str(event.mark), str(event.act) == "yes")
        finally:
            question = questions.open()
        return self._html(question, True)

    def _html(self, question: Question | None, mine: bool) -> str:
        downloads = self._engine.downloads
        folder = str(self._engine.config.ckpts)
        return question_html(question, mine, downloads.free_bytes(), folder) if question else ""


def question_html(question: Question, mine: bool, free: int, folder: str) -> str:
    """What would be fetched and for which jobs, with the buttons. mine: it stands before all else."""
    ask, count = question.ask, len(question.jobs)
    names = escape(" and ".join(ask.models))
    files = "".join(
        f"<li>{escape(one.name)} <span>{size_text(one.left)}</span></li>" for one in ask.files if one.left
    )
    waits = f"{plural(count, 'job')} {'waits' if count == 1 else 'wait'} for it."
    title, size = f"Download {names}?", size_text(ask.size)
    buttons = (("yes", f"Download {size}"), ("later", "Not now"), ("no", f"Cancel the {_jobs(count)}"))
    return (
        f'<div class="{"zgp-question" if mine else "zgp-asks"}">'
        f'<div role="{"alertdialog" if mine else "group"}"{" aria-modal=true" if mine else ""} '
        f'aria-label="{title}"><h3>{title}</h3><p>About {escape(ask.amount)} come once, and stay on this '
        f"computer; {size_text(free)} are free in <code>{escape(folder)}</code>. {waits}</p>"
        f'<ul>{files}</ul><p class="zgp-actions">'
        + "".join(_button(act, words, ask.mark) for act, words in buttons)
        + "</p></div></div>"
    )


def _jobs(count: int) -> str:
    return "job" if count == 1 else f"{count} jobs"


def _button(act: str, words: str, mark: str) -> str:
    return f'<button type="button" class="zgp-button" data-act="{act}" data-mark="{mark}">{words}</button>'


# ---- below the model ---------------------------------------------------------------------------------------


def outlook_of(engine: Engine, model: ModelInfo, settings: Mapping[str, Any]) -> Outlook:
    """Of a job with these settings; the model's first files where it cannot be made here."""
    found = _outlook(engine, model, settings, None)
    return found or unplanned(model, engine.config.folders, engine.agreed.given())


def about_html(model: ModelInfo, slow: bool = False, found: Outlook | None = None) -> str:
    """The description, and what the first picture brings. slow: a picture takes very long here."""
    text = escape(model.description)
    if slow:
        text += "<br>No graphics card was found: one picture of this model takes many minutes."
    return text if found is None or not found.missing else f"{text}<br>{first_picture(found)}"


def first_picture(found: Outlook) -> str:
    """ "The first picture downloads 11.6 GB (int8)."; names where nobody knows the size."""
    if found.left:
        return f"The first picture downloads {escape(amount(found.left, found.kind))}."
    names = [one.name for one in found.missing]
    weights = [name for name in names if not name.endswith(SMALL_FILES)]
    small = len(names) - len(weights)
    parts = [*map(escape, weights), *([plural(small, "small file")] if small else [])]
    return f"The first picture downloads {', '.join(parts)}."


def precision_choices(
    engine: Engine, model: ModelInfo, settings: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """(words, value) of each precision that the model can be had in: what it downloads or that it is here."""
    kinds = model.capabilities.get("precisions", ())
    here = survey(engine.config.gpu) if kinds else None
    found = [(kind, _outlook(engine, model, {**settings, "precision": kind}, here)) for kind in kinds]
    chosen = _outlook(engine, model, {**settings, "precision": ANY_PRECISION}, here) if kinds else None
    kind = chosen.plan.transformer.kind if chosen and chosen.plan else ""
    auto = f"{ANY_PRECISION} ({kind})" if kind else ANY_PRECISION
    return [(auto, ANY_PRECISION), *((f"{kind}{DOT}{_had(one)}", kind) for kind, one in found)]


def _outlook(
    engine: Engine, model: ModelInfo, settings: Mapping[str, Any], machine: Machine | None
) -> Outlook | None:
    """None where it cannot be made here."""
    try:
        return engine.outlook(model, settings, machine)
    except (UserError, OSError):
        return None


def _had(found: Outlook | None) -> str:
    if found is None:
        return "does not fit on this computer"
    return f"{size_text(found.left)} to download" if found.left else "on this computer"
