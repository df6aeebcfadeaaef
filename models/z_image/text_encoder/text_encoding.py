"""Prompts to features: Qwen3's second-to-last hidden state under its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from models.z_image.text_encoder import prompt_cache
from models.z_image.text_encoder.prompt_cache import Encoded
from shared.gpu import interrupt

#: these never influence `hidden_states[-2]`
UNUSED = ("norm.", "lm_head.")
#: what besides the weights lies in an encoder's folder and changes its features
TOKENIZER_SUFFIXES = (".json", ".txt", ".jinja")


def make_text_encoder(config_file: Path) -> Qwen3Model:
    """Qwen3 without its last decoder layer and final norm: its last hidden state is the full model's
    `hidden_states[-2]` (Tongyi-MAI/Z-Image)."""
    config = Qwen3Config.from_pretrained(config_file)
    config.num_hidden_layers -= 1
    if config.layer_types:
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    model = Qwen3Model(config)
    model.norm = nn.Identity()
    model.stays_in_ram = ("embed_tokens",)  # 778 MB of the 4B model, of which a prompt needs 512 rows
    for layer in model.layers:
        layer.register_forward_pre_hook(_heed)
    return model


def _heed(layer: nn.Module, arguments: object) -> None:
    """A long prompt takes a CPU half a minute."""
    interrupt.check()


def identity(
    files: Sequence[Path], folder: Path, dtype: torch.dtype, device: torch.device, quantized: bool = False
) -> str:
    """A name for what makes the features: equal names, equal bits. files: the weights and their
    configuration. folder: the tokenizer's. quantized: after loading.
    """
    small = sorted(path for path in folder.iterdir() if path.suffix in TOKENIZER_SUFFIXES)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts = (dtype, quantized, place, torch.__version__, transformers.__version__)
    return prompt_cache.fingerprint(list(dict.fromkeys([*files, *small])), facts)


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


def cut(tokenizer: Any, prompt: str, max_sequence_length: int, show: int = 200) -> str:
    """What of a prompt the model does not see, in quotation marks; at most `show` characters of it."""
    ids, dropped = tokenize(tokenizer, prompt, max_sequence_length)
    whole, _ = tokenize(tokenizer, prompt, max_sequence_length + dropped)
    ending = tokenizer.decode(whole[len(ids) :], skip_special_tokens=True)
    end = ending.removesuffix("assistant\n").strip()
    return f'"{end}"' if len(end) <= show else f'"{end[: show // 2]} … {end[-show // 2 :]}"'


@torch.inference_mode()
def encode(
    text_encoder: Qwen3Model,
    tokenizer: Any,
    prompt: str,
    device: torch.device,
    max_sequence_length: int = 512,
) -> Encoded:
    """Features of one prompt at its true length: a causal model needs no padding.

    The rows of the embedding table are looked up where it lies, in the dtype of its file; only they become
    the encoder's and travel to `device`. Raises Cancelled between layers.
    """
    ids, dropped = tokenize(tokenizer, prompt, max_sequence_length)
    table = text_encoder.embed_tokens
    embeds = table(torch.tensor([ids], device=table.weight.device))
    embeds = embeds.to(device, text_encoder.layers[0].input_layernorm.weight.dtype)
    output = text_encoder(inputs_embeds=embeds, use_cache=False)
    return Encoded(output.last_hidden_state[0], dropped)
