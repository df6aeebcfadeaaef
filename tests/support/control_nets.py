"""Control networks with random weights, and their files."""

from pathlib import Path

import torch
from diffusers import ZImageControlNetModel as ReferenceControl
from diffusers import ZImageTransformer2DModel as Reference
from safetensors.torch import save_file
from torch import nn

CONFIG = dict(
    dim=96, n_heads=3, axes_dims=[8, 12, 12], axes_lens=[256, 64, 64], n_layers=12, n_refiner_layers=2,
    cap_feat_dim=40,
)  # fmt: skip
#: name -> (channels, hinted layers, diffusers' name of the refiner's kind)
GENERATIONS = {
    "v1": (16, [0, 4, 8], None),
    "2.0": (33, [0, 2, 4, 6, 8, 10], "control_layers"),
    "2.1": (33, [0, 2, 4, 6, 8, 10], "control_noise_refiner"),
    "lite": (33, [0, 6], "control_noise_refiner"),
}


def spread(model: nn.Module, seed: int) -> None:
    """Random weights for all that a new model has as zeros or ones."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or "pad_token" in name or "_proj" in name:
                p.add_(torch.randn(p.shape, generator=g) * (0.05 if p.ndim == 2 else 0.3))


def networks(generation: str) -> tuple[Reference, ReferenceControl]:
    channels, places, refiner = GENERATIONS[generation]
    torch.manual_seed(0)
    base = Reference(**CONFIG, n_kv_heads=3)
    names = ("dim", "n_refiner_layers", "n_heads")
    net = ReferenceControl(
        control_layers_places=places,
        control_refiner_layers_places=[0, 1] if refiner else None,
        control_in_dim=channels,
        add_control_noise_refiner=refiner,
        n_kv_heads=3,
        **{name: CONFIG[name] for name in names},
    )
    spread(base, 1)
    spread(net, 2)
    return base.eval(), net.eval()


def saved(folder: Path, generation: str, change=lambda state: state) -> Path:
    _, net = networks(generation)
    state = {name: x.contiguous() for name, x in net.state_dict().items()}
    if generation == "2.0":  # the published file has blocks that were never trained
        _, other = networks("2.1")
        state |= {
            name: torch.zeros_like(x) if "_proj" in name else x
            for name, x in other.state_dict().items()
            if name.startswith("control_noise_refiner.")
        }
    path = folder / "weights.safetensors"  # a name that tells nothing
    save_file(change(state), path)
    return path
