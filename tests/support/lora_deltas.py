"""What a LoRA changes, computed by the book."""

import torch
from torch import Tensor

from models.z_image.checkpoints.lora_names import model_names
from shared.loras.reader import LoraFile
from tests.support.lora_writers import (
    CONFIG,
    DIM,
    Style,
    factors,
)

NAMES = model_names(CONFIG)


def weights(seed: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=g) * 0.2 for name, shape in NAMES.shapes.items() if len(shape) == 2
    }


def changes(lora: LoraFile, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum of the deltas of each module, in fp32."""
    return {
        name: sum(
            (one.delta(base[name]) for one in found if hasattr(one, "delta")), torch.zeros(base[name].shape)
        )
        for name, found in lora.adapters.items()
    }


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative difference of a module; infinite when other modules are changed."""
    if ours.keys() != theirs.keys():
        return float("inf")
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in ours)


def one(**tensors: Tensor) -> dict[str, Tensor]:
    """A sound module, and factors of another with keys of two underscores for each dot."""
    stem = "diffusion_model.layers.1.attention.to_q."
    sound = Style("diffusion_model.")(factors({"layers.0.attention.to_q": (DIM, DIM)}))[0]
    return sound | {stem + key.replace("__", "."): tensor for key, tensor in tensors.items()}


def other_family(names: list[str], width: int = 3072) -> dict[str, Tensor]:
    return {
        f"{name}.{factor}.weight": torch.zeros(shape)
        for name in names
        for factor, shape in (("lora_A", (4, width)), ("lora_B", (width, 4)))
    }


FAMILIES = {
    "Flux": other_family(["transformer.single_transformer_blocks.0.attn.to_q", "transformer.x_embedder"]),
    "Flux (kohya)": other_family(["lora_unet_double_blocks_0_img_attn_qkv"]),
    "Stable Diffusion XL": other_family(
        [
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
            "lora_te1_text_model_encoder_layers_0",
        ],
        2048,
    ),
    "Stable Diffusion 1.5": other_family(
        ["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"], 768
    ),
    "Qwen-Image": other_family(["transformer.transformer_blocks.3.img_mlp.net.2"]),
    "Wan": other_family(["diffusion_model.blocks.0.self_attn.q"], 5120),
    "another diffusion transformer": other_family(["transformer.transformer_blocks.0.attn1.to_q"]),
}
