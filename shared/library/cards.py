"""Model cards: one JSON file per model in defaults/, the user's own in finetunes/.

The file name is the model's id, "model" describes it, every other key is a default setting. A file in
finetunes/ with the same name overrides the default card property by property. A broken file is reported and
left out; the other cards still load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.files.unchanged import Identity, identity, remembered
from shared.files.urls import source_problem
from shared.settings.messages import nearest
from shared.settings.wan2gp import WAN2GP_SETTINGS, why_idle

FOLDERS = ("defaults", "finetunes")  # later folders override earlier ones
MAX_DEPTH = 10  # cards that one reference may pass through


class CardError(UserError):
    """One problem of one card: the sentence names the file, the key and what was expected."""


@dataclass(frozen=True)
class Card:
    """A model as its files describe it, with every reference to another card resolved."""

    id: str
    name: str
    architecture: str
    description: str
    model: dict[str, Any]
    defaults: dict[str, Any]
    path: Path  # the file read last: the finetune where there is one
    visible: bool = True
    ignored: dict[str, str] = field(default_factory=dict)  # keys of Wan2GP that do nothing here, and why


# ---------------------------------------------------------------- what a card may hold


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_list_of(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list)
        and all(isinstance(item, kinds) and not isinstance(item, bool) for item in value)
    )


_is_texts = _is_list_of(str)


def _is_module(item: Any) -> bool:
    alternatives = item.get("URLs") if isinstance(item, dict) else item
    return _is_text(alternatives) or (_is_texts(alternatives) and bool(alternatives))


@dataclass(frozen=True)
class _Kind:
    """What the value of a "model" key must be; `reference`: a text is the id of the card to take it from."""

    words: str
    fits: Callable[[Any], bool]
    reference: bool = False
    holds_sources: bool = False


_TEXT = _Kind("a text", _is_text)
_FLAG = _Kind("true or false", _is_flag)
_SOURCE = _Kind("a URL or a path inside the project", _is_text, holds_sources=True)
_SOURCES = _Kind(
    "a list of URLs or project paths, or the id of another card",
    lambda value: _is_text(value) or _is_texts(value),
    reference=True,
    holds_sources=True,
)
_FILES = _Kind(_SOURCES.words, lambda value: bool(value) and _SOURCES.fits(value), True, True)
_MODULES = _Kind(
    "a list of modules (each a list of alternative files, or the id of another card)",
    lambda value: _is_text(value) or (isinstance(value, list) and all(map(_is_module, value))),
    reference=True,
    holds_sources=True,
)
_MULTIPLIERS = _Kind(
    "a list of numbers or texts, or the id of another card",
    lambda value: _is_text(value) or _is_list_of(str, int, float)(value),
    reference=True,
)
_CONFIG = _Kind(
    "an object, or the path of a JSON file inside the project",
    lambda value: isinstance(value, (str, dict)),
    holds_sources=True,
)

MODEL_KEYS: dict[str, _Kind] = {
    "name": _TEXT,
    "architecture": _TEXT,
    "description": _TEXT,
    "license": _TEXT,
    "license_page": _Kind(
        "the https:// address of the page that states the licence", _is_text, holds_sources=True
    ),
    "URLs": _FILES,
    "modules": _MODULES,
    "text_encoder_URLs": _FILES,
    "text_encoder_folder": _SOURCE,
    "VAE_URLs": _FILES,
    "transformer_config": _CONFIG,
    "vae_config": _CONFIG,
    "scheduler_config": _CONFIG,
    "loras": _SOURCES,
    "loras_multipliers": _MULTIPLIERS,
    "preload_URLs": _SOURCES,
    "attention": _Kind(
        'a text, or an object such as {"<89": "sdpa"}',
        lambda value: _is_text(value) or (isinstance(value, dict) and all(map(_is_text, value.values()))),
    ),
    "unified_solver": _Kind("true, false or a solver's name", lambda value: isinstance(value, (bool, str))),
    "visible": _FLAG,
    "auto_quantize": _FLAG,
    "resolutions": _Kind(
        'a list of sizes such as "1024x1024"',
        lambda value: isinstance(value, list) and all(_is_text(item) or _is_texts(item) for item in value),
    ),
}
REQUIRED_KEYS = ("name", "architecture", "URLs")

# "model" keys that Wan2GP's cards may hold and that change nothing here.
WAN2GP_MODEL_KEYS = frozenset(
    """
    infos group prompt_infos source module_source parent_model_type profile_type dtype
    resolutions_categories URLs2 modules2 image_outputs image_batch_size_max vae_block_size
    guidance_max_phases sample_solvers flow_shift
    NAG inpaint_support guide_preprocessing mask_preprocessing control_net_weight_name control_net_weight_size
    vae_upsamplers excluded_spatial_upsamplers configs finetune_source_model custom_settings
    text_prompt_enhancer_instructions image_prompt_enhancer_instructions video_prompt_enhancer_instructions
    text_prompt_enhancer_max_tokens image_prompt_enhancer_max_tokens video_prompt_enhancer_max_tokens
    """.split()
)


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Raw:
    """A card's files merged, before references are resolved; `origin`: the file that set each "model" key."""

    model: dict[str, Any]
    settings: dict[str, Any]
    origin: dict[str, str]
    path: Path


def load_cards(
    root: Path, known_settings: Collection[str], drafts: Mapping[str, dict[str, Any]] | None = None
) -> tuple[dict[str, Card], list[CardError]]:
    """Every usable card of the project at `root` by id, and what is wrong with the others.

    drafts: id -> content of cards for finetunes/ that are not written yet, to know what would become of them.
    """
    paths = tuple(path for folder in FOLDERS for path in sorted((root / folder).glob("*.json")))
    try:
        state = identity(paths)
    except OSError:  # one has gone since, or is a link to nowhere: reading says so
        state = ()
    if drafts or not state:
        return _read_cards(root, paths, known_settings, drafts or {})
    cards, errors = _cards_as_they_are(root, paths, state, tuple(known_settings))
    return dict(cards), list(errors)


@remembered(answers=4)
def _cards_as_they_are(
    root: Path, paths: tuple[Path, ...], state: Identity, known_settings: tuple[str, ...]
) -> tuple[dict[str, Card], list[CardError]]:
    """Read again only when one of the files has changed, come or gone."""
    return _read_cards(root, paths, known_settings, {})


def _read_cards(
    root: Path,
    paths: Iterable[Path],
    known_settings: Collection[str],
    drafts: Mapping[str, dict[str, Any]],
) -> tuple[dict[str, Card], list[CardError]]:
    raws: dict[str, _Raw] = {}
    errors: list[CardError] = []
    own = {root / FOLDERS[-1] / f"{card_id}.json": content for card_id, content in drafts.items()}
    for path in [*(path for path in paths if path not in own), *own]:
        file = f"{path.parent.name}/{path.name}"
        try:
            content = own[path] if path in own else read_json(path, file)
        except CardError as error:
            errors.append(error)
            continue
        raw = _merged(raws.get(path.stem), content, path, file)
        problems = list(_problems(content, raw, known_settings))
        errors += [CardError(f"{file}: {problem}") for problem in problems]
        if not problems:
            raws[path.stem] = raw
    cards = {}
    for card_id in raws:
        try:
            cards[card_id] = _card(card_id, raws, known_settings)
        except CardError as error:
            errors.append(error)
    return cards, errors


def read_json(path: Path, file: str) -> dict[str, Any]:
    """The object in a card's file. file: what sentences call it. CardError when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors write a byte-order mark
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise CardError(f"{file}: not valid JSON at {place}: {error.msg}") from None
    except UnicodeDecodeError:
        raise CardError(f"{file}: not UTF-8 text; save it as UTF-8") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CardError(f"{file}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CardError(f'{file}: expected one object with the key "model", came {_json_type(content)}')
    return content


def _merged(below: _Raw | None, content: dict[str, Any], path: Path, file: str) -> _Raw:
    model = content.get("model")
    model = model if isinstance(model, dict) else {}
    settings = {key: value for key, value in content.items() if key != "model"}
    origin = dict.fromkeys(model, file)
    if below is None:
        return _Raw(model, settings, origin, path)
    return _Raw({**below.model, **model}, {**below.settings, **settings}, {**below.origin, **origin}, path)


def _card(card_id: str, raws: dict[str, _Raw], known_settings: Collection[str]) -> Card:
    raw = raws[card_id]
    model: dict[str, Any] = {
        key: _resolve(key, (card_id,), raws) if MODEL_KEYS[key].reference else value
        for key, value in raw.model.items()
        if key in MODEL_KEYS
    }
    known = {key: value for key, value in raw.settings.items() if key in known_settings}
    ignored = {f"model.{key}": "a key of Wan2GP's cards without effect" for key in raw.model.keys() - model}
    ignored |= {key: why_idle(key) for key in raw.settings.keys() - known}
    return Card(
        id=card_id,
        name=model["name"],
        architecture=model["architecture"],
        description=model.get("description", ""),
        model=model,
        defaults=known,
        path=raw.path,
        visible=model.get("visible", True),
        ignored=dict(sorted(ignored.items())),
    )


# ---------------------------------------------------------------- checking one file


def _problems(content: dict[str, Any], raw: _Raw, known_settings: Collection[str]) -> Iterator[str]:
    """What is wrong with this file by itself, and with the card that it completes."""
    model = content.get("model", {})
    if not isinstance(model, dict):
        yield f'"model" came as {_json_type(model)}; expected an object'
        return
    for key in content:
        if key != "model" and key not in known_settings and key not in WAN2GP_SETTINGS:
            yield _unknown(key, known_settings, MODEL_KEYS, 'belongs inside "model"')
    for key, value in model.items():
        if key in MODEL_KEYS:
            yield from _value_problems(key, value)
        elif key not in WAN2GP_MODEL_KEYS:
            yield _unknown(f"model.{key}", MODEL_KEYS, known_settings, 'belongs beside "model"')
    for key in REQUIRED_KEYS:
        if key not in raw.model:
            yield f'"model.{key}" is missing; expected {MODEL_KEYS[key].words}'


def _unknown(key: str, known: Collection[str], elsewhere: Collection[str], belongs: str) -> str:
    name = key.removeprefix("model.")
    if name in elsewhere:
        return f'"{key}" {belongs}'
    like = nearest(name, known)
    return f'unknown key "{key}"' + (f'; the nearest known key is "{like}"' if like else "; remove it")


def _value_problems(key: str, value: Any) -> Iterator[str]:
    kind = MODEL_KEYS[key]
    if not kind.fits(value):
        yield f'"model.{key}" came as {_json_type(value)}; expected {kind.words}'
    elif kind.holds_sources:
        for source in _sources(key, value):
            if problem := _card_source_problem(source):
                yield f'"model.{key}" holds "{source}"; {problem}'


def _sources(key: str, value: Any) -> Iterator[str]:
    """Every URL or path in the value of a "model" key; ids of other cards are none."""
    if isinstance(value, str):
        if not MODEL_KEYS[key].reference:
            yield value
    elif isinstance(value, list):
        for item in value:
            alternatives = item["URLs"] if isinstance(item, dict) else item
            if isinstance(alternatives, list):
                yield from alternatives
            elif key != "modules" or _is_address(alternatives):
                yield from filter(None, alternatives.split("|"))  # preload_URLs may name "url|folder"


def _is_address(text: str) -> bool:
    """Whether an item of "modules" is a file rather than the id of a card."""
    return bool(re.search(r"[/\\:]|\.(safetensors|sft|gguf)$", text))


def _card_source_problem(source: str) -> str:
    """As `source_problem`, for a card, which may also name a place in a repository of the hub."""
    if not source.startswith("hf://"):
        return source_problem(source)
    parts = source.removeprefix("hf://").split("/")
    whole = len(parts) >= 3 and all(re.fullmatch(r"[\w.-]*\w[\w.-]*", part) for part in parts)
    return "" if whole else "expected hf://OWNER/NAME/PATH, a file or folder of a repository"


def _json_type(value: Any) -> str:
    if value is None or value == []:
        return "null" if value is None else "an empty list"
    return _JSON_TYPES[type(value)]


_JSON_TYPES: dict[type, str] = {
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


# ---------------------------------------------------------------- references


def _resolve(key: str, trail: tuple[str, ...], raws: dict[str, _Raw]) -> list[Any]:
    """The list that `key` of the last card of `trail` stands for; the others are the cards that led there."""
    value = raws[trail[-1]].model[key]
    if isinstance(value, str):
        return _follow(value, key, trail, raws)
    if key == "modules":
        return [module for item in value for module in _modules(item, trail, raws)]
    return list(value)


def _modules(item: Any, trail: tuple[str, ...], raws: dict[str, _Raw]) -> list[list[str]]:
    """One item of "modules" as lists of alternative files."""
    if isinstance(item, dict):
        files = item["URLs"]
        return [_follow(files, "URLs", trail, raws) if isinstance(files, str) else list(files)]
    if isinstance(item, list):
        return [list(item)]
    return [[item]] if _is_address(item) else _follow(item, "modules", trail, raws)


def _follow(target: str, key: str, trail: tuple[str, ...], raws: dict[str, _Raw]) -> list[Any]:
    if target in raws and key in raws[target].model and target not in trail and len(trail) <= MAX_DEPTH:
        return _resolve(key, (*trail, target), raws)
    first, path = raws[trail[0]], " -> ".join((*trail, target))
    if target in trail:
        problem = f"is a reference loop: {path}; let one of these cards list its files"
    elif len(trail) > MAX_DEPTH:
        problem = f"passes through more than {MAX_DEPTH} cards: {path}; refer to the last one"
    elif target in raws:
        problem = f'refers to "{target}" ({path}), which has no "{key}"; add it there or list the files here'
    elif _is_address(target):
        problem = f'came as the text "{target}"; a text is the id of a card, put an address in a list'
    else:
        like = nearest(target, raws)
        problem = f'refers to "{target}" ({path}), which is not the id of a card'
        problem += f'; the nearest one is "{like}"' if like else ""
    raise CardError(f'{first.origin.get(key, first.path.name)}: "model.{key}" {problem}')
