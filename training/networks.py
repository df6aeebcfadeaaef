"""The Mini models' dimensions, the batched forward that training uses, and the helper losses around it."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from models.z_image.transformer_z_image import (
    Attention,
    Control,
    HintsAt,
    Run,
    ZImageConfig,
    ZImageTransformer2DModel,
    padded,
    patchify,
    positions,
    unpatchify,
)
from shared.gpu.attention import sdpa
from training.grammar import SHAPES
from training.render import Batch

TRANSFORMER = ZImageConfig(
    dim=128,
    n_layers=6,
    n_refiner_layers=1,
    n_heads=4,
    cap_feat_dim=96,
    axes_dims=(8, 12, 12),
    axes_lens=(1536, 512, 512),
)
VAE = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[8, 16, 32, 64],
    layers_per_block=1,
    latent_channels=16,
    norm_num_groups=2,  # one channel per group cannot hold a flat colour
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=True,
    sample_size=128,
    force_upcast=False,
    scaling_factor=0.3611,  # the real model's numbers, so that both are exercised
    shift_factor=0.1159,
)

AnyModel = TypeVar("AnyModel", bound=nn.Module)

AUX_LAYER = 4  # the auxiliary head reads the image tokens after this many main layers
CELLS = 8  # it predicts an 8x8 coverage mask inside each 16x16 pixel token


def make_transformer(seed: int = 0) -> ZImageTransformer2DModel:
    """Random weights; every block starts with a small gate, the output starts at zero."""
    torch.manual_seed(seed)
    model = ZImageTransformer2DModel(TRANSFORMER)
    for block in (*model.noise_refiner, *model.layers):
        weight, bias = block.adaLN_modulation.parameters()
        nn.init.zeros_(weight)
        with torch.no_grad():
            bias.zero_().view(4, -1)[1::2] = 0.3
    for parameter in model.all_final_layer.parameters():
        nn.init.zeros_(parameter)
    return model


def train_in_bf16(model: AnyModel) -> AnyModel:
    """Make `model` fast under autocast on a CPU: products in bf16, norms and attention (slow there) in
    fp32.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return sdpa(q.float(), k.float(), v.float())

    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_pre_hook(lambda _, args: (args[0].float(),))
        elif isinstance(module, Attention):
            module.attend = attend
    return model


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(**VAE)


def run_blocks(
    blocks: nn.ModuleList, x: Tensor, run: Run, hints_at: HintsAt | None, scale: float
) -> list[Tensor]:
    """What each block makes of x [B, T, dim], with scale * its hint added (see `Control`).

    Without gradients a block writes into what it gets, so that only the last result is what it says.
    """
    results = []
    for number, block in enumerate(blocks):
        hints = hints_at(number, [x]) if hints_at is not None else None
        x = block(x, run.ropes[0], run.tembs[0])
        if hints is not None:
            x = x + scale * hints[0]
        results.append(x)
    return results


def forward_batch(
    model: ZImageTransformer2DModel,
    x: Tensor,
    t: Tensor | None,
    caption: Tensor,
    lengths: Tensor,
    temb: Tensor | None = None,
    control: Control | None = None,
) -> tuple[Tensor, Tensor]:
    """The transformer on a whole batch of equal shapes: x [B, 16, H, W], t [B], caption [B, L, hidden]
    features.

    temb [B, dim]: the finished time embedding, in place of `t`. control: gets the batch as one sequence.
    Captions are padded to a common multiple of 32 with the pad token. Returns the prediction [B, 16, H, W]
    and the image tokens [B, H/2 * W/2, dim] after AUX_LAYER main layers.
    """
    key, patch = model.config.key, model.config.patch_size
    rows, columns = x.shape[-2] // patch, x.shape[-1] // patch
    tokens, size, length = rows * columns, len(x), padded(caption.shape[1])
    rope = model.rope(positions(length, rows, columns), x.device)
    if temb is None:
        assert t is not None
        temb = model.t_embedder(t * model.config.t_scale)

    image = model.all_x_embedder[key](patchify(x, patch))
    image = torch.cat((image, model.x_pad_token.expand(size, padded(tokens) - tokens, -1)), 1)
    run, scale = Run([rope[:, : image.shape[1]]], [temb]), control.scale if control else 0.0
    hints_at = control.refiner(run) if control else None
    image = run_blocks(model.noise_refiner, image, run, hints_at, scale)[-1]

    text = F.pad(model.cap_embedder(caption), (0, 0, 0, length - caption.shape[1]))
    real = torch.arange(length, device=x.device) < lengths[:, None]
    text = torch.where(real[..., None], text, model.cap_pad_token.to(text.dtype))
    for block in model.context_refiner:
        text = block(text, rope[:, image.shape[1] :])

    unified, run = torch.cat((image, text.to(image.dtype)), 1), Run([rope], [temb])
    hints_at = control.layers(run) if control else None
    states = run_blocks(model.layers, unified, run, hints_at, scale)
    out = model.all_final_layer[key](states[-1][:, :tokens], temb)
    return unpatchify(out, rows, columns, patch), states[AUX_LAYER - 1][:, :tokens]


class AuxiliaryHead(nn.Module):
    """Training only: asks the image tokens where objects are and which shape is nearest.

    The shape word carries almost none of the velocity loss, so without this head shapes stay blobs for long.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, CELLS**2 + len(SHAPES) + 3))

    def loss(self, tokens: Tensor, batch: Batch, cover: Tensor, conditioned: Tensor) -> Tensor:
        """tokens [B, N, dim]; cover [B, 3, H, W] of each object; conditioned [B]: the prompt was not
        dropped.
        """
        rows, columns = cover.shape[-2] // 16, cover.shape[-1] // 16
        mask, kind, place = self.net(tokens).split((CELLS**2, len(SHAPES), 3), -1)
        cells = F.avg_pool2d(cover.amax(1), 16 // CELLS)
        cells = cells.unflatten(-1, (columns, CELLS)).unflatten(-3, (rows, CELLS))  # B, rows, 8, columns, 8
        cells = cells.transpose(2, 3).flatten(3).flatten(1, 2)
        inside = F.binary_cross_entropy_with_logits(mask.float(), cells)

        side = min(rows, columns)
        y, x = torch.meshgrid(
            (torch.arange(rows, device=cover.device) + 0.5) / side,
            (torch.arange(columns, device=cover.device) + 0.5) / side,
            indexing="ij",
        )
        px = batch.place[..., 0] * columns / side
        py = batch.place[..., 1] * rows / side
        dx, dy = px[..., None] - x.flatten(), py[..., None] - y.flatten()  # B, 3, N
        radius = batch.place[..., 2:3].expand_as(dx)
        gap = (dx.hypot(dy) - radius).masked_fill(batch.shape[..., None] < 0, 9.0)
        nearest = gap.argmin(1, keepdim=True)
        target = torch.stack([q.gather(1, nearest)[:, 0] for q in (dx * 4, dy * 4, radius * 8 - 1.6)], -1)
        shape = batch.shape[..., None].expand_as(gap).gather(1, nearest)[:, 0].clamp_min(0)
        near = (gap.amin(1) < 0.13) & conditioned[:, None]
        which = F.cross_entropy(kind.float().flatten(0, 1), shape.flatten(), reduction="none").view_as(near)
        where = (place.float() - target).square().mean(-1)
        weight = near.float() / near.sum().clamp_min(1)
        return 2 * inside + 0.3 * ((which + where) * weight).sum()
