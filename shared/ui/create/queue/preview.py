"""The stage: the live preview of the running batch, its progress and the queue."""

from __future__ import annotations

import base64
from html import escape

import gradio as gr

from shared.jobs.records import Job
from shared.settings.parsing import parse_resolution
from shared.ui.components.queue_state import Sight
from shared.ui.components.text import DOT, duration_text, plural, size_text

# A browser opens six connections to a server and no more, over all of its tabs: one that is not seen gives
# its follower's stream back. While it has a job, it glances at the queue instead, so that it can give a sign
# when the queue is done.
_LOOK_AGAIN = """const look = () => {
  if (!document.hidden) return trigger('focus');
  trigger('hide');
  const glancing = setInterval(() => {
    if (!document.hidden || !element.querySelector('.zgp-stage')) return clearInterval(glancing);
    trigger('glance');
  }, 3000);
};
document.addEventListener('visibilitychange', look);
if (document.hidden) setTimeout(look, 3000);

// Gradio's client can lose an event that begins while another one ends, as at a page's start: begin again.
const begin = (left) => setTimeout(() => {
  if (!left || document.hidden || element.querySelector('.zgp-followed')) return;
  trigger('hide');
  setTimeout(() => trigger('focus'), 500);
  begin(left - 1);
}, 6000);
begin(5);"""
#: what the follower shows while there is nothing to show
_FOLLOWED = '<i class="zgp-followed" hidden></i>'


def stage_area() -> gr.HTML:
    """The component; its value comes from `stage_html`, "" while nothing runs."""
    return gr.HTML("", js_on_load=_LOOK_AGAIN, elem_id="stage", apply_default_css=False)


def stage_html(sight: Sight) -> str:
    """The stage while a job runs or is about to, else nothing that is seen. The page patches it into the DOM:
    no flicker.
    """
    job = sight.current
    if job is None:
        return _FOLLOWED
    return (
        _FOLLOWED
        + '<div class="zgp-stage">'
        + _canvas(job, sight.preview)
        + _progress_bar(job)
        + f'<div class="zgp-status" role="status"><span>{escape(status_text(job))}</span>'
        + f"<span>{escape(_time_left(job))}</span></div>"
        + f'<div class="zgp-queue">{escape(queue_text(sight))}</div></div>'
    )


def status_text(job: Job) -> str:
    """ "Denoising · step 3 of 8"."""
    if job.status == "queued":
        return "Waiting for its turn"
    if not job.steps:
        return job.phase or "Starting"
    if job.phase.startswith("Downloading"):
        return f"{job.phase}{DOT}{size_text(job.step)} of {size_text(job.steps)}"
    return f"{job.phase}{DOT}step {job.step} of {job.steps}"


def queue_text(sight: Sight) -> str:
    """How many jobs wait behind the current one, and whether they are paused; "" when none does."""
    waiting = [plural(sight.total - 1, "more job") + " in the queue"] if sight.total > 1 else []
    return DOT.join([*waiting, *(["Paused after this one"] if sight.paused else [])])


def _time_left(job: Job) -> str:
    return "" if job.seconds_left is None else f"about {duration_text(job.seconds_left)} left"


def _canvas(job: Job, preview: bytes | None) -> str:
    """The preview in the shape of the finished batch, so that the page does not jump when it comes."""
    if preview is None:
        width, height = parse_resolution(job.settings["resolution"])
        return f'<div class="zgp-canvas" style="aspect-ratio: {width} / {height}"></div>'
    source = "data:image/jpeg;base64," + base64.b64encode(preview).decode("ascii")
    return f'<div class="zgp-canvas"><img src="{source}" alt="Live preview"></div>'


def _progress_bar(job: Job) -> str:
    percent = round(100 * job.step / job.steps) if job.steps else 0
    kind = "zgp-bar" if job.steps else "zgp-bar zgp-busy"
    return (
        f'<div class="{kind}" role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent}"><span style="width: {percent}%"></span></div>'
    )
