"""Z-Image's transformer and VAE with random weights, in this project and in diffusers, on the same numbers.

Speed and memory do not depend on what the weights are, so nothing has to be downloaded. The text encoder is
left out on both sides: it runs once per prompt, and both get the same random text features.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.z_image.pipeline_z_image import ZImagePipeline
from models.z_image.transformer_z_image import ZImageConfig, ZImageTransformer2DModel

ROOT = Path(__file__).resolve().parents[1]
SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0}
FULL = ZImageConfig()
TINY = ZImageConfig(
    dim=384, n_layers=3, n_refiner_layers=1, n_heads=3, cap_feat_dim=64, axes_lens=(600, 64, 64)
)


@dataclass(frozen=True)
class Work:
    """One picture: size pixels a side, caption tokens, steps; on which model and device."""

    size: int
    caption: int
    steps: int
    device: torch.device
    config: ZImageConfig
    dtype: torch.dtype = torch.bfloat16

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """(noise [1, 16, h, w] fp32, text features [L, cap_feat_dim])."""
        g = torch.Generator().manual_seed(0)
        noise = torch.randn(1, 16, self.size // 8, self.size // 8, generator=g)
        features = torch.randn(self.caption, self.config.cap_feat_dim, generator=g)
        return noise.to(self.device), features.to(self.device, self.dtype)


def transformer(work: Work, device: torch.device) -> ZImageTransformer2DModel:
    """Random weights of a size that keeps activations alive through all layers."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = ZImageTransformer2DModel(work.config)
    model = model.to(work.dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim == 1 and "norm" in name:
            p.fill_(1)
        else:
            p.normal_(std=0.02)
    return model


def diffusers_transformer(model: ZImageTransformer2DModel) -> Any:
    """diffusers' model around the same tensors."""
    from diffusers import ZImageTransformer2DModel as Peer

    config = {k: v for k, v in asdict(model.config).items() if k != "patch_size"}
    with torch.device("meta"):
        peer = Peer(**config, n_kv_heads=config["n_heads"])
    peer.load_state_dict(model.state_dict(), assign=True)
    peer.rope_embedder.freqs_cis = None  # made at first use
    return peer.eval().requires_grad_(False)


def twin(model: ZImageTransformer2DModel) -> ZImageTransformer2DModel:
    """Another model around the same tensors."""
    return copy.deepcopy(model, {id(t): t for t in model.state_dict(keep_vars=True).values()})


def quantized(
    model: ZImageTransformer2DModel, layer: Callable[[nn.Linear], nn.Module]
) -> ZImageTransformer2DModel:
    """A model with `layer(linear)` in the place of each linear layer of attention and feed-forward."""
    result = twin(model)
    for name, module in list(result.named_modules()):
        if isinstance(module, nn.Linear) and (".attention." in name or ".feed_forward." in name):
            parent, _, child = name.rpartition(".")
            setattr(result.get_submodule(parent), child, layer(module))
    return result


def int8(linear: nn.Linear) -> nn.Module:
    from shared.weights.quantized import Int8Linear, quantize_int8

    return Int8Linear(*quantize_int8(linear.weight.data))


def int4(linear: nn.Linear) -> nn.Module:
    """Nunchaku's int4 layout of rank 128 with random codes: for speed and memory only."""
    from shared.weights.quantized import SvdqLinear

    n, k = linear.out_features, linear.in_features
    random: dict[str, Any] = dict(device=linear.weight.device, dtype=linear.weight.dtype)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=linear.weight.device)
    scales, smooth = torch.full((n, k // 64), 0.004, **random), torch.ones(k, **random)
    down, up = (torch.randn(shape, **random) * 0.01 for shape in ((128, k), (n, 128)))
    return SvdqLinear("int4", codes, scales, smooth, down, up).to(linear.weight.device)


def vae(work: Work) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    config = json.loads((ROOT / "models/z_image/configs/vae.json").read_text("utf-8"))
    if work.config is TINY:
        config |= {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
    with work.device:
        return AutoencoderKL.from_config(config).eval().requires_grad_(False)


def our_pipeline(work: Work, model: nn.Module, decoder: Any, output_type: str = "pt") -> Callable[[], Tensor]:
    """A function that makes the picture, [1, 3, H, W] in 0..1 (or its latents)."""
    pipe = ZImagePipeline(model, nn.Identity(), decoder, None, SCHEDULER, work.device)  # type: ignore[arg-type]
    noise, features = work.inputs
    arguments: dict[str, Any] = dict(height=work.size, width=work.size, num_inference_steps=work.steps)
    arguments |= dict(prompt_embeds=[features], output_type=output_type)
    return lambda: pipe(latents=noise.clone(), **arguments).images


def diffusers_pipeline(work: Work, model: Any, decoder: Any) -> tuple[Any, Callable[[], Tensor]]:
    """(diffusers' pipeline, a function that makes the picture)."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers import ZImagePipeline as Peer

    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    pipe = Peer(scheduler, decoder, None, None, model)
    pipe.set_progress_bar_config(disable=True)
    noise, features = work.inputs
    arguments: dict[str, Any] = dict(height=work.size, width=work.size, num_inference_steps=work.steps)
    arguments |= dict(guidance_scale=0.0, output_type="pt")
    return pipe, lambda: pipe(prompt_embeds=[features], latents=noise.clone(), **arguments).images


def our_forward(work: Work, model: ZImageTransformer2DModel) -> Callable[[], Any]:
    noise, features = work.inputs
    side, t = work.size // 8, torch.tensor([0.4], device=work.device)
    conditioning = model.prepare(features, side, side)
    return lambda: model([noise[0]], t, [conditioning])


def diffusers_forward(work: Work, model: Any) -> Callable[[], Any]:
    noise, features = work.inputs
    x, t = noise.to(work.dtype).transpose(0, 1), torch.tensor([0.4], device=work.device)
    return lambda: model([x], t, [features], return_dict=False)
