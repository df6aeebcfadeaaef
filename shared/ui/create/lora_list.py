"""LoRAs as HTML: the chosen ones with their strengths, and the files of the folder to choose from.

Names and metadata come from files that anyone may have written: every text is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from shared.errors import UserError
from shared.loras.inspection import Verdict
from shared.loras.library import Entry, Library, address
from shared.loras.strengths import NUMBER, parse, words
from shared.ui.components.text import DOT, plural

WEAKEST, STRONGEST, NOTCH = -2, 2, 0.05
ROWS = 60  # that a list draws at most

Picture = Callable[[Path], str]  # the address of a small copy of a preview; "" when there is none to show


@dataclass(frozen=True)
class Chosen:
    """An entry of the list of chosen LoRAs. `verdict` is None while its file is to be fetched.

    problem: why the entry has no file at all. preview: the picture beside the file.
    """

    entry: str
    name: str
    verdict: Verdict | None
    preview: Path | None = None
    problem: str = ""


def look_up(library: Library, loras: Sequence[str], files: Sequence[Entry]) -> list[Chosen]:
    """What is known of each chosen entry."""
    previews = {file.name: file.preview for file in files}
    return [_chosen(library, entry, previews) for entry in loras]


def _chosen(library: Library, entry: str, previews: Mapping[str, Path | None]) -> Chosen:
    try:
        place, path = address(entry), library.path(entry)
    except UserError as error:
        return Chosen(entry, entry, None, problem=str(error))
    if path.is_file():
        return Chosen(entry, place.name, library.verdict(path), previews.get(place.name))
    problem = "" if place.url else f"It is not in {library.folder}: put it there or remove it here."
    return Chosen(entry, place.name, None, problem=problem)


def chosen_html(chosen: Sequence[Chosen], text: str, picture: Picture) -> str:
    """The chosen LoRAs with their sliders. text: of the strengths, right or wrong."""
    strengths = words(text)
    strengths += ["1"] * (len(chosen) - len(strengths))
    rows = "".join(_chosen_row(i, one, strengths[i], picture) for i, one in enumerate(chosen))
    return f'<ul class="zgp-loras">{rows}</ul>' if rows else ""


def _chosen_row(index: int, one: Chosen, strength: str, picture: Picture) -> str:
    name = escape(one.name)
    verdict = one.verdict
    parts = [
        f'<div class="zgp-lora-head">{_name(one.name)}<button type="button" class="zgp-close" '
        f'data-act="remove" data-index="{index}" aria-label="Remove {name}">×</button></div>',
        f'<p class="zgp-lora-line">{_state(one)}</p>',
    ]
    if verdict:
        parts += [f'<p class="zgp-lora-line">Not used: {escape(str(left))}</p>' for left in verdict.left_out]
    parts.append(_strength(index, name, strength))
    if verdict and verdict.trigger_words:
        chips = "".join(
            f'<button type="button" class="zgp-word" data-word="{escape(word)}" '
            f'title="Put it into the prompt">{escape(word)}</button>'
            for word in verdict.trigger_words
        )
        parts.append(f'<div class="zgp-words"><span>Trigger words</span>{chips}</div>')
    body = f'<div class="zgp-lora-body">{"".join(parts)}</div>'
    return f'<li class="zgp-lora">{_thumb(one.name, one.preview, picture)}{body}</li>'


def _state(one: Chosen) -> str:
    if one.verdict:
        base = one.verdict.base_model
        return _badge(one.verdict) + (f"<span>{DOT}made for {escape(base)}</span>" if base else "")
    if one.problem:
        return f'<b class="zgp-badge zgp-bad">cannot be used</b> <span>{escape(one.problem)}</span>'
    return '<b class="zgp-badge zgp-partly">not here yet</b> <span>fetched with the next picture</span>'


def _strength(index: int, name: str, strength: str) -> str:
    if not NUMBER.fullmatch(strength):
        what = "Schedule" if _reads(strength) else "Cannot be read:"
        return (
            f'<div class="zgp-strength"><span>{what} <code>{escape(strength)}</code></span>'
            f'<button type="button" class="zgp-button" data-act="set" data-index="{index}" data-value="1">'
            "Use one strength</button></div>"
        )
    common = (
        f'data-index="{index}" step="{NOTCH}" value="{float(strength):g}" aria-label="Strength of {name}"'
    )
    part = min(1, max(0, (float(strength) - WEAKEST) / (STRONGEST - WEAKEST)))
    return (
        f'<div class="zgp-strength" style="--zgp-part: {part:.4g}">'
        f'<input type="range" min="{WEAKEST}" max="{STRONGEST}" {common}>'
        f'<input type="number" {common}></div>'
    )


def _reads(strength: str) -> bool:
    try:
        parse(strength, 1)
    except UserError:
        return False
    return True


# ---------------------------------------------------------------- the files of the folder


def matches(name: str, search: str) -> bool:
    """Whether every word of `search` is somewhere in the name."""
    return all(word in name.casefold() for word in search.casefold().split())


def list_html(
    library: Library, files: Sequence[Entry], loras: Sequence[str], search: str, picture: Picture
) -> str:
    """The first ROWS files whose names match, to choose or to put back, and how many there are."""
    if not files:
        return (
            '<p class="zgp-lora-line">There are no LoRA files yet. Put .safetensors files into '
            f"<code>{escape(str(library.folder))}</code>, then press Refresh.</p>"
        )
    found = [file for file in files if matches(file.name, search)]
    shown = found[:ROWS]
    taken = {_place(entry): entry for entry in loras}
    rows = "".join(
        _file_row(file, library.verdict(file.path), taken.get(file.name), picture) for file in shown
    )
    said = _count(len(shown), len(found), len(files))
    return f'<p class="zgp-lora-line">{said}</p><ul class="zgp-files">{rows}</ul>'


def _place(entry: str) -> str:
    try:
        return address(entry).name
    except UserError:
        return entry


def _count(shown: int, found: int, there: int) -> str:
    said = plural(there, "file") if found == there else f"{found} of {plural(there, 'file')}"
    return said if shown == found else f"{said}; the first {shown} are shown, type to find others"


def _file_row(file: Entry, verdict: Verdict, taken: str | None, picture: Picture) -> str:
    inside = (
        f'{_thumb(file.name, file.preview, picture)}<span class="zgp-lora-body">{_name(file.name)}'
        f'<span class="zgp-lora-line">{_badge(verdict)}</span></span>'
    )
    if not verdict.usable and taken is None:
        return f'<li><div class="zgp-file zgp-refused">{inside}</div></li>'
    return (
        '<li><button type="button" class="zgp-file" data-act="toggle" '
        f'data-entry="{escape(taken or file.name)}" aria-pressed="{str(taken is not None).lower()}">'
        f"{inside}</button></li>"
    )


def _name(path: str) -> str:
    """The file's name without its ending, its folders before it."""
    folder, _, file = path.rpartition("/")
    stem = file.rpartition(".")[0] or file
    inside = f"<small>{escape(folder)}/</small>" if folder else ""
    return f'<span class="zgp-lora-name" title="{escape(path)}">{inside}{escape(stem)}</span>'


def _badge(verdict: Verdict) -> str:
    """The verdict's sentence, its beginning as a badge: green when all modules are used, else amber, red."""
    if not verdict.usable:
        return f'<b class="zgp-badge zgp-bad">cannot be used</b> <span>{escape(verdict.sentence)}</span>'
    count, _, rest = verdict.sentence.partition(", ")
    kind = "partly" if verdict.left_out or verdict.matched < verdict.total else "good"
    return f'<b class="zgp-badge zgp-{kind}">{escape(count)}</b> <span>{escape(rest)}</span>'


def _thumb(name: str, preview: Path | None, picture: Picture) -> str:
    """The preview; where there is none, the name's first letter."""
    source = picture(preview) if preview else ""
    letter = escape(name.rpartition("/")[2][:1].upper())
    inside = f'<img src="{escape(source)}" alt="" loading="lazy">' if source else letter
    return f'<span class="zgp-thumb" aria-hidden="true">{inside}</span>'
