"""How many tokens a prompt is, without torch: for the page."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

#: the chat template of Qwen3 around one user message, see text_encoding.tokenize
BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


@functools.lru_cache(maxsize=4)
def counter(file: Path, changed: int) -> Callable[[str], int]:
    """A function from a prompt to its number of tokens. file: a tokenizer.json; changed: when it was."""
    tokenizer = Tokenizer.from_file(str(file))
    return lambda prompt: len(tokenizer.encode(f"{BEFORE}{prompt}{AFTER}").ids)
