"""From one set of settings to the settings of every job that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.errors import UserError
from shared.prompts import choices, lines
from shared.prompts.choices import Template
from shared.prompts.wildcards import Wildcards
from shared.settings.table import TEMPLATES, random_seed

MOST_JOBS = 500  # of one submission


def expand(settings: Mapping[str, Any], wildcards: Wildcards) -> list[dict[str, Any]]:
    """The complete settings of each job, in order, with their seeds drawn.

    settings: complete and valid. Each prompt of the box is a job. A prompt in which something is drawn
    becomes one job for each image, the k-th with seed + k: so every picture shows another draw, and any of
    them can be made again alone, since a prompt is a function of its text and its own seed. `prompt` becomes
    the text that the model reads, `prompt_template` the one that it was drawn from ("" where they are the
    same); settings that name a template are not expanded again. UserError when they cannot be, or stand for
    too many jobs.
    """
    negative = _parsed(settings, "negative_prompt", settings.get("negative_prompt", ""))
    texts = _units(settings)
    prompts = [_parsed(settings, "prompt", text) for text in texts]
    counts = [_draws(settings, prompt, negative) for prompt in prompts]
    if sum(counts) > MOST_JOBS:
        raise UserError(
            f"The prompt stands for {sum(counts):,} jobs; expected at most {MOST_JOBS}: make fewer images, "
            "or queue it in parts."
        )
    jobs = []
    for text, prompt, count in zip(texts, prompts, counts, strict=True):
        seed = random_seed() if settings["seed"] == -1 else settings["seed"]
        for k in range(count):
            job = {**settings, "seed": seed + k} | ({"batch_size": 1} if count > 1 else {})
            job |= _drawn(settings, "prompt", text, prompt, seed + k, wildcards)
            if "negative_prompt" in settings:
                job |= _drawn(
                    settings, "negative_prompt", settings["negative_prompt"], negative, seed + k, wildcards
                )
            jobs.append(job)
    return jobs


def _units(settings: Mapping[str, Any]) -> list[str]:
    if settings.get("prompt_template"):
        return [settings["prompt"]]
    found = lines.units(settings["prompt"], settings["multi_prompts_gen_type"])
    if not found:
        raise UserError("The prompt has only comments and macros: write what the picture should show.")
    return found


def _parsed(settings: Mapping[str, Any], name: str, text: str) -> Template:
    return (text,) if settings.get(TEMPLATES[name]) else choices.parse(text)


def _draws(settings: Mapping[str, Any], *templates: Template) -> int:
    """How many jobs the images of one prompt are."""
    return settings["batch_size"] if any(map(choices.is_random, templates)) else 1


def _drawn(
    settings: Mapping[str, Any], name: str, text: str, template: Template, seed: int, wildcards: Wildcards
) -> dict[str, str]:
    """A text as it is painted and where it came from."""
    if settings.get(TEMPLATES[name]):
        return {}
    drawn = lines.tidy(choices.draw(template, f"{name} {seed}", wildcards))
    return {name: drawn, TEMPLATES[name]: text if drawn != lines.tidy(text) else ""}
