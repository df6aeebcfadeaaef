"""Our transformer and diffusers', with the same random weights."""

import torch
from diffusers import ZImageTransformer2DModel as Reference

from models.z_image.transformer_z_image import (
    ZImageConfig,
    ZImageTransformer2DModel,
)

SIZES = {
    "wide": dict(dim=120, n_heads=4, axes_dims=[6, 12, 12], cap_feat_dim=40),
    "odd": dict(dim=96, n_heads=3, axes_dims=[8, 12, 12], cap_feat_dim=33),
    "over_256": dict(dim=288, n_heads=6, axes_dims=[16, 16, 16], cap_feat_dim=64),  # adaLN width stays 256
}


def pair(size: str, dtype: torch.dtype = torch.float32) -> tuple[Reference, ZImageTransformer2DModel]:
    config = dict(SIZES[size], n_layers=3, n_refiner_layers=2, axes_lens=[600, 64, 64])
    torch.manual_seed(0)
    reference = Reference(**config, n_kv_heads=config["n_heads"])
    with torch.no_grad():
        for name, p in reference.named_parameters():  # so that every norm, gate and pad token matters
            if p.ndim == 1 or "pad_token" in name:
                p.add_(torch.randn_like(p) * 0.3)
    ours = ZImageTransformer2DModel(ZImageConfig.from_dict(dict(reference.config)))
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference.to(dtype).eval(), ours.to(dtype).eval()


def inputs(size: str, shapes: list[tuple[int, int, int]]) -> tuple[list, list]:
    g = torch.Generator().manual_seed(1)
    latents = [torch.randn(16, h, w, generator=g) for h, w, _ in shapes]
    captions = [torch.randn(n, SIZES[size]["cap_feat_dim"], generator=g) for *_, n in shapes]
    return latents, captions
