"""What a prompt has that comes from another program: LoRA tags, which act here, and signs that do not."""

from __future__ import annotations

import re

from shared.prompts.lines import comments
from shared.settings.messages import printable

MAX_SHOWN = 40  # characters of a comment in its note
MAX_TAGS = 20

LORA_TAG = re.compile(r"[ ,]{0,4}<lora:([^:<>\n]{1,200})(?::([-+.\d]{1,20})(?::[^<>\n]{0,200})?)?>")
#: what A1111, ComfyUI and SwarmUI read as signs, and an example of it
_SIGNS = {
    "(word:1.2)": re.compile(r"\([^()]{1,200}:(?:\d{0,2}\.\d{1,4}|[0-3])\)"),
    "BREAK": re.compile(r"\bBREAK\b"),
    "AND": re.compile(r"\bAND\b(?=[^a-z]{0,3}\s[a-z])"),
    "[a|b]": re.compile(r"\[[^\[\]|{}\"]{1,100}\|[^\[\]{}\"]{1,100}\]"),
    "[a:b:0.5]": re.compile(r"\[[^\[\]{}:\"]{0,100}:[^\[\]{}:\"]{0,100}:\d{0,3}\.?\d{1,4}\]"),
    "<wildcard:a> (here: __a__)": re.compile(r"<wildcard:[^<>]{1,100}>"),
    "<random:a,b> (here: {a|b})": re.compile(r"<random:[^<>]{1,200}>"),
    "2#__a__ (here: {2$$__a__})": re.compile(r"\d#__"),
    "embedding:name": re.compile(r"\bembedding:\w"),
}


def without_tags(prompt: str) -> tuple[str, list[tuple[str, str]]]:
    """The prompt without its <lora:name:strength>, and (name, strength) of each; "" without a strength."""
    tags = LORA_TAG.findall(prompt)
    if not tags:
        return prompt, []
    return re.sub(r"[ \t]{2,}", " ", LORA_TAG.sub("", prompt)).strip(" ,\n\t"), tags[:MAX_TAGS]


def signs(prompt: str) -> list[str]:
    """One sentence that names the signs of other programs in a prompt; none without them."""
    found = [example for example, pattern in _SIGNS.items() if pattern.search(prompt)]
    return [f"Means nothing here and stays in the prompt as plain text: {', '.join(found)}."] if found else []


def remarks(text: str) -> list[str]:
    """What to know about the text of a prompt box."""
    lines = comments(text)
    said = []
    if lines:
        first = printable(lines[0], MAX_SHOWN)
        many = "1 line that begins" if len(lines) == 1 else f"{len(lines)} lines that begin"
        said.append(f"Taken for a comment: {many} with # ({first}). Write \\# to have it painted.")
    return said + signs("\n".join(line for line in text.split("\n") if line.strip() not in lines))
