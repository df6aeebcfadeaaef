"""How many tokens a prompt is, without torch: for the page."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from shared.errors import UserError

#: the chat template of Qwen3 around one user message, see text_encoding.tokenize
BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


@functools.lru_cache(maxsize=4)
def counter(file: Path, changed: int) -> Callable[[str], int]:
    """A function from a prompt to its number of tokens. file: a tokenizer.json; changed: when it was.
    UserError when it is damaged.
    """
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers has no class of its own for it
        raise UserError(f"{file} is damaged ({error}): delete it, and it is fetched again.") from error
    return lambda prompt: len(tokenizer.encode(f"{BEFORE}{prompt}{AFTER}").ids)
