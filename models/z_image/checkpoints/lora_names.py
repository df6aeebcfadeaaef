"""The names by which LoRA files know Z-Image's modules. No torch: the page judges files with them.

Source of the aliases: the original code's fused and shorter names, as ComfyUI keeps them, and Nunchaku's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.loras.names import Alias, ModelNames

ADALN_WIDTH = 256  # of the time embedding, or dim where that is smaller
TIME_WIDTHS = (256, 1024)  # of the time embedder: its sinusoid, its hidden layer

ALIASES = (
    Alias("attention.qkv", ("attention.to_q", "attention.to_k", "attention.to_v")),
    Alias("attention.to_qkv", ("attention.to_q", "attention.to_k", "attention.to_v")),
    Alias("attention.out", ("attention.to_out.0",)),
    Alias("attention.to_out", ("attention.to_out.0",)),
    Alias("attention.q_norm", ("attention.norm_q",)),
    Alias("attention.k_norm", ("attention.norm_k",)),
    Alias("feed_forward.net.0.proj", ("feed_forward.w3", "feed_forward.w1")),
    Alias("feed_forward.net.2", ("feed_forward.w2",)),
    Alias("x_embedder", ("all_x_embedder.2-1",)),
    Alias("final_layer.linear", ("all_final_layer.2-1.linear",)),
    Alias("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",)),
)


def model_names(config: Mapping[str, Any], second_time_embedder: bool = False) -> ModelNames:
    """The table of names for a transformer with this config.json."""
    return ModelNames.of(module_shapes(config, second_time_embedder), ALIASES, "Z-Image")


def module_shapes(
    config: Mapping[str, Any], second_time_embedder: bool = False
) -> dict[str, tuple[int, ...]]:
    """The shape of the weight of every linear and norm of the transformer, by module name."""
    dim, refiners = config["dim"], config["n_refiner_layers"]
    patch, adaln = 4 * config["in_channels"], min(dim, ADALN_WIDTH)
    shapes: dict[str, tuple[int, ...]] = {
        "all_x_embedder.2-1": (dim, patch),
        "all_final_layer.2-1.linear": (patch, dim),
        "all_final_layer.2-1.adaLN_modulation.1": (dim, adaln),
        "cap_embedder.0": (config["cap_feat_dim"],),
        "cap_embedder.1": (dim, config["cap_feat_dim"]),
    }
    for embedder in ("t_embedder", "t_embedder_2")[: 2 if second_time_embedder else 1]:
        sinusoid, hidden = TIME_WIDTHS
        shapes |= {f"{embedder}.mlp.0": (hidden, sinusoid), f"{embedder}.mlp.2": (adaln, hidden)}
    for stack, count in (
        ("noise_refiner", refiners),
        ("context_refiner", refiners),
        ("layers", config["n_layers"]),
    ):
        block = _block(dim, dim // config["n_heads"], stack != "context_refiner")
        shapes |= {f"{stack}.{i}.{name}": shape for i in range(count) for name, shape in block.items()}
    return shapes


def _block(dim: int, head: int, modulated: bool) -> dict[str, tuple[int, ...]]:
    hidden = int(dim / 3 * 8)
    shapes: dict[str, tuple[int, ...]] = {
        **{f"attention.{name}": (dim, dim) for name in ("to_q", "to_k", "to_v", "to_out.0")},
        **{f"attention.{name}": (head,) for name in ("norm_q", "norm_k")},
        **{name: (dim,) for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")},
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
    }
    return shapes | ({"adaLN_modulation.0": (4 * dim, min(dim, ADALN_WIDTH))} if modulated else {})
