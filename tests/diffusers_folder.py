"""The Mini in the layout of Tongyi-MAI's repositories, written by diffusers and transformers themselves:
transformer and text encoder in shards with an index, the VAE in one file, the tokenizer in its own folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import ZImagePipeline as ReferencePipeline
from diffusers import ZImageTransformer2DModel as ReferenceTransformer
from transformers import AutoTokenizer, Qwen3ForCausalLM

from tests import mini

ENCODER = mini.ROOT / "models/z_image/mini/text_encoder"
SHIFTS = {"z_image_mini": 3.0, "z_image_mini_base": 6.0}


def reference(card: str = "z_image_mini", dtype: torch.dtype = torch.float32) -> ReferencePipeline:
    """diffusers' pipeline with the weights of a Mini card."""
    _, pipe = mini.load(card)
    config = dict(pipe.transformer.config.__dict__)
    del config["patch_size"]
    transformer = ReferenceTransformer(**config, n_kv_heads=config["n_heads"]).eval()
    transformer.load_state_dict(pipe.transformer.state_dict())
    encoder = Qwen3ForCausalLM.from_pretrained(ENCODER, dtype=torch.float32).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFTS[card])
    tokenizer = AutoTokenizer.from_pretrained(ENCODER)
    made = ReferencePipeline(scheduler, pipe.vae, encoder, tokenizer, transformer)
    made.set_progress_bar_config(disable=True)
    return made


def write(folder: Path, card: str = "z_image_mini") -> Path:
    """The repository of a Mini card. Its files are named as those of the official ones."""
    pipe = reference(card)
    pipe.transformer.save_pretrained(folder / "transformer", max_shard_size="2MB")
    pipe.text_encoder.save_pretrained(folder / "text_encoder", max_shard_size="400KB")
    pipe.vae.save_pretrained(folder / "vae")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    tokenizer = json.loads((ENCODER / "tokenizer.json").read_text("utf-8"))
    settings = json.loads((ENCODER / "tokenizer_config.json").read_text("utf-8"))
    settings["chat_template"] = (ENCODER / "chat_template.jinja").read_text("utf-8")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]), "utf-8")
    merges = "\n".join(" ".join(pair) for pair in tokenizer["model"]["merges"])
    (folder / "tokenizer" / "merges.txt").write_text(f"{merges}\n", "utf-8")
    shutil.copy(ENCODER / "tokenizer.json", folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2), "utf-8")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n", "utf-8")
    return folder


MODEL_INDEX = {
    "_class_name": "ZImagePipeline",
    "_diffusers_version": "0.36.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
