"""The Mini models' tokenizer and text encoder: a small byte-level BPE with Qwen3's chat template, and a
random, frozen, three-layer Qwen3. A linear probe reads every word of the grammar off its features; training
it did not pay (the transformer learns faster from fixed features)."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from models.z_image.pipeline_inputs import DEFAULT_NEGATIVE_PROMPT
from training.grammar import sample

VOCABULARY = 640
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


def train_tokenizer(folder: Path) -> None:
    """Learn the vocabulary from the grammar's sentences and write a folder that AutoTokenizer loads."""
    rng = random.Random(0)
    sentences = [sample(rng).caption for _ in range(20_000)] + [DEFAULT_NEGATIVE_PROMPT] * 200
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*sentences, "user\nassistant\n"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="right"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def make_encoder(vocabulary: int, seed: int = 1) -> Qwen3Model:
    """The frozen random Qwen3. Features are `hidden_states[-2]`, as in the real model."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return Qwen3Model(config).requires_grad_(False).eval()


def tokenize(tokenizer: AutoTokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """ids [n, longest] right-padded with 0, and the true lengths [n]."""
    frame = tokenizer.apply_chat_template(
        [{"role": "user", "content": "{}"}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    rows = tokenizer([frame.replace("{}", caption) for caption in captions])["input_ids"]
    lengths = torch.tensor([len(r) for r in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, lengths


def features(encoder: Qwen3Model, ids: Tensor) -> Tensor:
    """[B, L] ids -> [B, L, hidden]. A causal model: padding on the right changes nothing before it."""
    return encoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-2]
