"""The LoRAs of a job: which files at which strengths, and whether they can be used. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from shared.errors import UserError
from shared.loras.library import Library, address
from shared.loras.strengths import Multipliers, merge_profile, parse, split_profile, words
from shared.prompts.remarks import without_tags
from shared.settings.messages import printable
from shared.settings.table import SettingsError

if TYPE_CHECKING:
    from shared.library.model_info import ModelInfo
    from shared.weights.downloads import DownloadProgress

MAX_NAMED, MAX_NAME = 5, 40  # LoRAs in a note, and characters of each


@dataclass(frozen=True)
class Loras:
    """What a job uses, in the order of application: the card's own LoRAs, then the user's.

    names: as in Library.Entry. strengths: as the user wrote them, one for each. notes: what was left out.
    """

    names: tuple[str, ...] = ()
    paths: tuple[Path, ...] = ()
    multipliers: Multipliers = Multipliers(())
    strengths: tuple[str, ...] = ()
    bytes: int = 0
    notes: tuple[str, ...] = ()


def chosen(info: ModelInfo, settings: Mapping[str, Any]) -> tuple[list[str], Multipliers]:
    """(entries, strengths): the card's, then the user's. UserError for strengths that cannot be read."""
    own = list(info.card.model.get("loras") or ())
    users = list(settings.get("activated_loras") or ())
    cards = parse(" ".join(map(str, info.card.model.get("loras_multipliers") or ())), len(own))
    if not users:  # strengths that wait for a LoRA do no harm
        return own, replace(cards, surplus=0)
    given = parse(settings.get("loras_multipliers") or "", len(users))
    return [*own, *users], Multipliers(cards.tokens + given.tokens, surplus=given.surplus)


def problems(info: ModelInfo, settings: Mapping[str, Any]) -> list[str]:
    """Why a job with these settings must be refused: one sentence for each reason. Reads headers only."""
    if info.lora_folder is None:
        return []
    try:
        entries, _ = chosen(info, settings)
    except UserError as error:
        return [str(error)]
    if settings.get("loras_optional"):
        return []
    library = info.loras()
    return [problem for entry in entries if (problem := _problem(info, library, entry))]


def bare(name: str) -> str:
    """Letters and digits of a file's name without its folders and extension."""
    stem = re.sub(r"\.(safetensors|gguf|ckpt|pt|sft)$", "", PurePosixPath(name.replace("\\", "/")).name)
    return re.sub(r"[^a-z0-9]", "", stem.lower())


def from_tags(info: ModelInfo, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings with the <lora:name:strength> tags of their prompt among the LoRAs, and a line for each
    that is not here. Tags never stay in the prompt.
    """
    prompt, tags = without_tags(settings["prompt"])
    if not tags:
        return dict(settings), []
    entries = [] if info.lora_folder is None else info.loras().entries()
    by_name = {bare(entry.name): entry.name for entry in reversed(entries)}
    found = [(by_name[bare(name)], strength) for name, strength in tags if bare(name) in by_name]
    lost = [name for name, _ in tags if bare(name) not in by_name]
    notes = [f"LoRA tags of the prompt left out, as no file is called so: {_listed(lost)}."] if lost else []
    changed = {**settings, "prompt": prompt or settings["prompt"]}
    if found:
        users = list(settings.get("activated_loras") or ())
        profile, own = split_profile(settings.get("loras_multipliers") or "")
        before = len(words(profile))
        given = words(own)[: max(0, len(users) - before)]
        padding = ["1"] * (len(users) - before - len(given))
        strengths = [*given, *padding, *(strength or "1" for _, strength in found)]
        changed["activated_loras"] = [*users, *(name for name, _ in found)]
        changed["loras_multipliers"] = merge_profile(" ".join(strengths), profile)
        notes.append(f"LoRA tags of the prompt act: {_listed([name for name, _ in found])}.")
    return changed, notes


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - MAX_NAMED
    shown = ", ".join(printable(name, MAX_NAME) for name in names[:MAX_NAMED])
    return f"{shown} and {more} more" if more > 0 else shown


def check_addresses(settings: Mapping[str, Any]) -> None:
    """SettingsError for LoRAs at addresses inside this network."""
    from shared.files.public_urls import check_public  # with the network's libraries: lists do without

    problems = []
    for entry in settings.get("activated_loras") or ():
        try:
            if url := address(entry).url:
                check_public(url, resolve=False)
        except UserError as error:
            problems.append(f"activated_loras: {error}")
    if problems:
        raise SettingsError(problems)


def bytes_here(info: ModelInfo, settings: Mapping[str, Any]) -> int:
    """Of the job's LoRA files that are on disk: what a plan counts before anything is fetched."""
    if info.lora_folder is None:
        return 0
    library = info.loras()
    places = (_with_the_card(info, entry) or library.path(entry) for entry in chosen(info, settings)[0])
    return sum(library.verdict(path).bytes for path in places if path.is_file())


def gather(
    info: ModelInfo,
    settings: Mapping[str, Any],
    progress: Callable[[DownloadProgress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Loras:
    """The job's LoRAs on disk, fetched where they are missing. UserError or Cancelled.

    Those that cannot be used are left out with a note where the settings say so.
    """
    if info.lora_folder is None:
        return Loras()
    entries, multipliers = chosen(info, settings)
    if not entries:
        return Loras()
    library, notes = info.loras(), []
    used: list[tuple[int, str, Path]] = []
    for index, entry in enumerate(entries):
        try:
            used.append((index, entry, _usable(info, library, entry, progress, cancelled)))
        except UserError as error:
            if not settings.get("loras_optional"):
                raise
            notes.append(f"Made without the LoRA '{printable(entry)}': {error}")
    if multipliers.surplus:
        notes.append(
            f"There are {multipliers.surplus} LoRA strengths more than LoRAs; the last ones were not used."
        )
    verdicts = [library.verdict(path) for _, _, path in used]
    notes += [
        f"{path.name} is used in part. Left out: {left_out}."
        for (_, _, path), verdict in zip(used, verdicts, strict=True)
        for left_out in verdict.left_out
    ]
    tokens = tuple(multipliers.tokens[index] for index, _, _ in used)
    return Loras(
        names=tuple(address(entry).name for _, entry, _ in used),
        paths=tuple(path for _, _, path in used),
        multipliers=Multipliers(tokens),
        strengths=tuple(";".join(",".join(f"{x:g}" for x in part) for part in token) for token in tokens),
        bytes=sum(verdict.bytes for verdict in verdicts),
        notes=tuple(notes),
    )


def _usable(
    info: ModelInfo,
    library: Library,
    entry: str,
    progress: Callable[[DownloadProgress], None] | None,
    cancelled: Callable[[], bool] | None,
) -> Path:
    """The entry's file, known to be a LoRA for this model. UserError or Cancelled."""
    path = _with_the_card(info, entry) or library.ensure(entry, progress, cancelled)
    verdict = library.verdict(path)
    if verdict.refused is not None:
        raise UserError(verdict.refused)
    return path


def _problem(info: ModelInfo, library: Library, entry: str) -> str:
    """Why this entry cannot be used; "" when it can, or has yet to be fetched."""
    try:
        path = _with_the_card(info, entry) or library.path(entry)
        if path.is_file() or not address(entry).url:
            _usable(info, library, entry, None, None)
    except UserError as error:
        return str(error)
    return ""


def _with_the_card(info: ModelInfo, entry: str) -> Path | None:
    """The file of an entry that the card names as a path from the project's root."""
    if entry not in (info.card.model.get("loras") or ()) or address(entry).url:
        return None
    path = info.card.path.parents[1] / entry
    return path if path.is_file() else None
