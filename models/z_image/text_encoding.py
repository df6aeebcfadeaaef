"""Prompts to features: Qwen3's second-to-last hidden state under its chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

#: these never influence `hidden_states[-2]`
UNUSED = ("norm.", "lm_head.")


@dataclass(frozen=True)
class Encoded:
    """features: [L, hidden]. dropped: tokens cut off because the prompt was longer than allowed."""

    features: Tensor
    dropped: int


def make_text_encoder(folder: Path) -> Qwen3Model:
    """Qwen3 without its last decoder layer and final norm: its last hidden state is the full model's
    `hidden_states[-2]` (Tongyi-MAI/Z-Image)."""
    config = Qwen3Config.from_pretrained(folder)
    config.num_hidden_layers -= 1
    if config.layer_types:
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    model = Qwen3Model(config)
    model.norm = nn.Identity()
    return model


def unused(layers: int, name: str) -> bool:
    """Is this tensor of a Qwen3 checkpoint one that `make_text_encoder` leaves out?"""
    short = name.removeprefix("model.")
    return short.startswith(UNUSED) or short.startswith(f"layers.{layers}.")


def tokenize(tokenizer: Any, prompt: str, max_sequence_length: int) -> tuple[list[int], int]:
    """(ids, how many were dropped): the chat template around one user message, thinking allowed."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=True,
    )
    ids = tokenizer(text)["input_ids"]
    return ids[:max_sequence_length], max(0, len(ids) - max_sequence_length)


@torch.inference_mode()
def encode(
    text_encoder: nn.Module, tokenizer: Any, prompt: str, device: torch.device, max_sequence_length: int = 512
) -> Encoded:
    """Features of one prompt at its true length: a causal model needs no padding."""
    ids, dropped = tokenize(tokenizer, prompt, max_sequence_length)
    output = text_encoder(input_ids=torch.tensor([ids], device=device), use_cache=False)
    return Encoded(output.last_hidden_state[0], dropped)
