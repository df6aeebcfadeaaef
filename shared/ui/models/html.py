"""Models as HTML: each with its files, its size, what it takes here, its download and its buttons.

Names and descriptions come from cards that anyone may have written: every text is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from shared.engine.inventory import Forecast, Item, Removal, Stock
from shared.files.urls import source_problem
from shared.jobs.records import Job
from shared.library.download_queue import ACTIVE, FAILED, PAUSED, RUNNING, WAITING, Download
from shared.settings.table import ANY_PRECISION
from shared.ui.components.text import DOT, duration_text, plural, size_text
from shared.weights.files import is_url

ROLES = {"transformer": "model", "text_encoder": "text encoder", "vae": "VAE"}
#: state -> (words of the badge, its colour)
BADGES = {
    "ready": ("ready", "zgp-good"),
    "absent": ("to download", "zgp-plain"),
    "begun": ("begun", "zgp-partly"),
    "lost": ("file missing", "zgp-bad"),
    "damaged": ("damaged", "zgp-bad"),
    WAITING: ("waiting", "zgp-partly"),
    RUNNING: ("downloading", "zgp-partly"),
    PAUSED: ("paused", "zgp-partly"),
    FAILED: ("stopped", "zgp-bad"),
}


@dataclass(frozen=True)
class Shelf:
    """What the tab shows: every model, the downloads by model, and the job that runs, if one does."""

    stocks: Sequence[Stock]
    downloads: Mapping[str, Download]
    free: int
    folder: str
    running: Job | None = None
    broken: Sequence[str] = ()  # why some cards are left out
    vram: float = 0  # GB of the card that is planned for besides this computer


def shelf_html(shelf: Shelf) -> str:
    """The whole list, with what is free on the disk above it."""
    groups = groupby(shelf.stocks, key=_heading)
    broken = "".join(f'<p class="zgp-problem">{escape(line)}</p>' for line in shelf.broken)
    return (
        _summary(shelf) + broken + "".join(_section(heading, list(found), shelf) for heading, found in groups)
    )


def _heading(stock: Stock) -> str:
    if stock.built_in:
        return "Built in"
    return "On this computer" if stock.info.available else "Not here yet"


def _section(heading: str, stocks: list[Stock], shelf: Shelf) -> str:
    rows = "".join(_row(stock, shelf) for stock in stocks)
    count = plural(len(stocks), "model")
    return f'<h2 class="zgp-heading">{heading} <span>{count}</span></h2><ul class="zgp-models">{rows}</ul>'


def _summary(shelf: Shelf) -> str:
    files = {item.path: item.size for stock in shelf.stocks for item in stock.here if not stock.built_in}
    words = [
        f"{size_text(shelf.free)} free in <code>{escape(shelf.folder)}</code>",
        f"models on disk: {size_text(sum(files.values()))}",
    ]
    if shelf.downloads:
        count = plural(len(shelf.downloads), "download")
        words.append(f"{count}, about {size_text(to_come(shelf))} to go")
    return f'<p class="zgp-models-summary" role="status">{DOT.join(words)}</p>'


def to_come(shelf: Shelf) -> int:
    """Bytes that the downloads still bring; a file that several models share counts once."""
    files: dict[tuple[str, str], int] = {}
    arrived = 0
    for stock in shelf.stocks:
        download = shelf.downloads.get(stock.info.id)
        if download is None:
            continue
        files |= {(item.role, item.name): item.size for item in stock.missing}
        arrived += download.done
    return max(0, sum(files.values()) - arrived)


# ---- one model ---------------------------------------------------------------------------------------------


def state_of(stock: Stock, download: Download | None) -> str:
    """A key of BADGES."""
    if download is not None:
        return download.status
    if any(item.problem for item in stock.here):
        return "damaged"
    if not stock.missing:
        return "ready"
    if not _can_download(stock):
        return "lost"
    return "begun" if stock.arrived else "absent"


def _can_download(stock: Stock) -> bool:
    """Whether every file that is missing has an address."""
    here = {item.role for item in stock.here}
    return all(any(map(is_url, one.alternatives)) for one in stock.info.required if one.role not in here)


def _row(stock: Stock, shelf: Shelf) -> str:
    info, download = stock.info, shelf.downloads.get(stock.info.id)
    state = state_of(stock, download)
    words, colour = BADGES[state]
    own = '<b class="zgp-badge zgp-plain">yours</b>' if stock.own else ""
    return (
        f'<li class="zgp-model" data-model="{escape(info.id)}"><div class="zgp-model-head">'
        f'<h3>{escape(info.name)}</h3><b class="zgp-badge {colour}">{words}</b>{own}</div>'
        f"<p>{escape(info.description)}</p>"
        + "".join(f'<p class="zgp-line">{line}</p>' for line in _lines(stock, shelf.vram))
        + "".join(f'<p class="zgp-problem">{escape(line)}</p>' for line in _problems(stock, download, state))
        + _progress(stock, download, shelf.running)
        + _files(stock)
        + _precision(stock, state)
        + _buttons(stock, state)
        + "</li>"
    )


def _lines(stock: Stock, vram: float) -> Iterable[str]:
    """What it has, what it lacks, what it takes and on which terms."""
    if stock.here and not stock.built_in:
        formats = dict.fromkeys(i.format for i in stock.here if i.role == "transformer" and i.format)
        yield f"On disk: {escape(DOT.join([*formats, size_text(stock.size)]))}"
    if stock.missing and stock.missing_size:
        named = ", ".join(dict.fromkeys(_role(item) for item in stock.missing if item.size))
        yield f"To download: about {size_text(stock.missing_size)} ({escape(named)})"
    yield escape(forecast_text(stock.forecast))
    if stock.elsewhere:
        yield escape(f"On a card of {vram:g} GB (planned, not measured): {stock.elsewhere}")
    if terms := _terms(stock):
        yield terms


def forecast_text(found: Forecast) -> str:
    """ "Here: int8, all on the card: about 6.2 of 8 GB · 7 s per picture, the median of 5"."""
    if found.seconds is None:
        time = "no picture was timed here yet"
    elif found.measured:
        time = f"{_seconds(found.seconds)} per picture, the median of {found.measured} made here"
    else:
        time = f"about {_seconds(found.seconds)} per picture, an estimate"
    parts = [found.memory, time] if found.memory else [time]
    return "" if found.problem else f"Here: {DOT.join(parts)}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration_text(seconds)


def _terms(stock: Stock) -> str:
    model = stock.info.card.model
    licence, page = escape(model.get("license", "")), model.get("license_page", "")
    if page and not source_problem(page):
        said = licence or "see its page"
        link = f'<a href="{escape(page)}" target="_blank" rel="noopener noreferrer">{said}</a>'
        return f"Licence: {link}"
    return f"Licence: {licence}" if licence else ""


def _problems(stock: Stock, download: Download | None, state: str) -> Iterable[str]:
    yield from (item.problem for item in stock.here if item.problem)
    if stock.forecast.problem and state != "lost":
        yield stock.forecast.problem
    if download is not None and state == FAILED:
        yield download.note
    if state == "lost":
        names = ", ".join(item.name for item in stock.missing)
        yield f"{names} is in none of the folders of models: put it there or remove this model."


def _progress(stock: Stock, download: Download | None, running: Job | None) -> str:
    if download is None:
        return _job_progress(stock, running)
    if not download.total:
        note = download.note or ("Asking for the sizes" if download.status == RUNNING else "")
        return f'<div class="zgp-status"><span>{escape(note)}</span></div>' if note else ""
    words = [f"{size_text(download.done)} of {size_text(download.total)}"]
    if download.status == RUNNING:
        words = [download.file, *words, download.note or f"{size_text(download.speed)}/s"]
    left = download.seconds_left
    right = f"about {duration_text(left)} left" if left is not None and not download.note else ""
    return _bar(100 * download.done // download.total, stock.info.name) + (
        f'<div class="zgp-status"><span>{escape(DOT.join(words))}</span><span>{right}</span></div>'
    )


def _job_progress(stock: Stock, running: Job | None) -> str:
    """A job that fetches one of the model's missing files."""
    phase = "" if running is None else running.phase
    name = phase.removeprefix("Downloading ")
    if running is None or name == phase or name not in {item.name for item in stock.missing}:
        return ""
    words = f"Job {running.id} is downloading {name}"
    bar = _bar(100 * running.step // running.steps, stock.info.name) if running.steps else ""
    return bar + f'<div class="zgp-status"><span>{escape(words)}</span></div>'


def _bar(percent: int, name: str) -> str:
    return (
        f'<div class="zgp-bar" role="progressbar" aria-label="Download of {escape(name)}" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{percent}"><span style="width: {percent}%"></span></div>'
    )


def _role(item: Item) -> str:
    if item.role.startswith("module"):
        return "control network"
    return ROLES.get(item.role, "tokenizer")


def _files(stock: Stock) -> str:
    rows = "".join(_file(item) for item in stock.items)
    count = plural(len(stock.items), "file")
    return (
        f'<details class="zgp-model-files"><summary>{count}</summary><div><table><tbody>{rows}</tbody>'
        "</table></div></details>"
    )


def _file(item: Item) -> str:
    size = size_text(item.size) if item.size else ""
    if item.path is None:
        size = f"about {size}" if size else "small"
    where = escape(str(item.path)) if item.path else "to download"
    cells = (_role(item), escape(item.name), escape(item.format), size, where)
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _precision(stock: Stock, state: str) -> str:
    """The choice between the model's files, where there is one; it becomes the model's default."""
    kinds = stock.info.capabilities.get("precisions", ())
    if not kinds or state in ACTIVE:
        return ""
    chosen = stock.info.defaults.get("precision", ANY_PRECISION)
    options = "".join(
        f'<option value="{escape(kind)}"{" selected" if kind == chosen else ""}>{escape(kind)}</option>'
        for kind in (ANY_PRECISION, *kinds)
    )
    return (
        f'<label class="zgp-line">Precision <select data-act="precision" data-id="{escape(stock.info.id)}" '
        f'aria-label="Precision: {escape(stock.info.name)}">{options}</select></label>'
    )


# ---- what can be done --------------------------------------------------------------------------------------

#: state -> (act, words) of the buttons; what a press of each does stands in models.py
BUTTONS: dict[str, tuple[tuple[str, str], ...]] = {
    "ready": (("use", "Use"),),
    "absent": (("start", "Download"),),
    "begun": (("start", "Resume"), ("cancel", "Cancel")),
    "lost": (),
    "damaged": (),
    WAITING: (("pause", "Pause"), ("cancel", "Cancel")),
    RUNNING: (("pause", "Pause"), ("cancel", "Cancel")),
    PAUSED: (("start", "Resume"), ("cancel", "Cancel")),
    FAILED: (("start", "Try again"), ("cancel", "Cancel")),
}


def _buttons(stock: Stock, state: str) -> str:
    acts = list(BUTTONS[state])
    if stock.here and not stock.built_in and state in ("ready", "absent", "damaged"):
        acts.append(("remove", "Remove files"))
    if stock.own:
        acts += [("edit", "Edit"), ("forget", "Remove from the list")]
    return f'<p class="zgp-actions">{"".join(_button(stock, *act) for act in acts)}</p>' if acts else ""


def _button(stock: Stock, act: str, words: str) -> str:
    name = escape(stock.info.name)
    return (
        f'<button type="button" class="zgp-button" data-act="{act}" data-id="{escape(stock.info.id)}" '
        f'aria-label="{words}: {name}">{words}</button>'
    )


# ---- questions ---------------------------------------------------------------------------------------------


def removal_html(planned: Removal) -> str:
    """Which files would go, which stay and why, and the button that does it."""
    name = escape(planned.info.name)
    goes = "".join(f"<li>{escape(str(p))} <span>{size_text(size)}</span></li>" for p, size in planned.goes)
    stays = "".join(f"<li>{escape(str(p))} <span>{escape(why)}</span></li>" for p, why in planned.stays)
    if not goes:
        title, said = f"No file of {name} can be deleted here", ""
        button = ""
    else:
        title = f"Delete the files of {name}?"
        said = f"<p>These files are deleted for good:</p><ul>{goes}</ul>"
        words = f"Delete {size_text(planned.size)}"
        button = _answer("delete", planned.info.id, words, planned.mark)
    kept = f"<p>These stay:</p><ul>{stays}</ul>" if stays else ""
    return _question(title, said + kept, button)


def forget_html(model_id: str, name: str) -> str:
    """Whether the user's own card is to go."""
    said = "<p>Only its entry in the list goes; the model's files stay where they are.</p>"
    return _question(
        f"Remove {escape(name)} from the list?", said, _answer("forgotten", model_id, "Remove", "")
    )


def _answer(act: str, model_id: str, words: str, mark: str) -> str:
    return (
        f'<button type="button" class="zgp-button zgp-danger" data-act="{act}" data-id="{escape(model_id)}" '
        f'data-mark="{mark}">{words}</button>'
    )


def _question(title: str, body: str, button: str) -> str:
    keep = '<button type="button" class="zgp-button" data-act="close">' + ("Keep" if button else "Close")
    return (
        '<div class="zgp-question"><div role="alertdialog" aria-modal="true" aria-label="'
        f'{title}"><h3>{title}</h3>{body}<p class="zgp-actions">{button}{keep}</button></p></div></div>'
    )
