"""The Mini in the layout of Tongyi-MAI's repositories, written by diffusers and transformers themselves:
transformer and text encoder in shards with an index, the VAE in one file, the tokenizer in its own folder.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers import ZImagePipeline as ReferencePipeline
from diffusers import ZImageTransformer2DModel as ReferenceTransformer
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from models.z_image.family import QWEN3_4B
from tests.support import mini

ENCODER = mini.ROOT / "models/z_image/mini/text_encoder"
CONFIGS = mini.ROOT / "models/z_image/configs"
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


# ---- the real sizes ----------------------------------------------------------------------------------------


def write_holes(folder: Path) -> Path:
    """The official repository with its tensors' names, shapes and dtype, and no bytes in them."""
    with init_empty_weights():
        transformer = ReferenceTransformer()
        encoder = Qwen3ForCausalLM(Qwen3Config(**QWEN3_4B, tie_word_embeddings=True))
        vae = AutoencoderKL.from_config(json.loads((CONFIGS / "vae.json").read_text("utf-8")))
    _holes(folder / "transformer", "diffusion_pytorch_model", transformer.state_dict(), 3)
    names = {name: x for name, x in encoder.state_dict().items() if name != "lm_head.weight"}  # tied
    _holes(folder / "text_encoder", "model", names, 3)
    _holes(folder / "vae", "diffusion_pytorch_model", vae.state_dict(), 1)
    transformer.save_config(folder / "transformer")
    vae.save_config(folder / "vae")
    encoder.config.save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ENCODER / name, folder / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX), "utf-8")
    return folder


def _holes(folder: Path, stem: str, tensors: Mapping[str, torch.Tensor], count: int) -> None:
    folder.mkdir(parents=True)
    names = list(tensors)
    shards = [names[i * len(names) // count : (i + 1) * len(names) // count] for i in range(count)]
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{count:05}.safetensors" if count > 1 else f"{stem}.safetensors"
        header, end = {}, 0
        for name in shard:
            begin, end = end, end + 2 * tensors[name].numel()
            shape = list(tensors[name].shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as hole:
            hole.write(struct.pack("<Q", len(text)) + text)
            hole.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(shard, file)
    if count > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), "utf-8")
