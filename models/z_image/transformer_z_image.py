"""S3-DiT, the single-stream diffusion transformer of Z-Image, under the names its checkpoints use.

Source: Tongyi-MAI/Z-Image (native code) and diffusers' `ZImageTransformer2DModel` (the tests' peer).

Three decisions shape this file:

* Everything that does not depend on time (caption embedding and refinement, RoPE tables) is computed once per
  prompt by `prepare`, not once per step.
* A batch is a list of sequences. Each layer visits every sequence before the next layer starts, so weights
  that are streamed from RAM travel once per step, no sequence is ever padded to another's length, no
  attention mask exists, and a picture is bit-identical alone and in any batch.
* Where weights are float16 (cards without bfloat16), activations would leave its range of 65504. The hidden
  states between the layers are float32 there, the feed-forward's products are computed on scaled rows, and
  the linear layers' other results end at that limit.
"""

from __future__ import annotations

import functools
import logging
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.z_image.nag import Nag, NagAttend
from shared.errors import Cancelled, UserError
from shared.gpu import attention as attention_backends
from shared.gpu import kernels
from shared.gpu.interrupt import check
from shared.loras.apply import norm_weight

log = logging.getLogger(__name__)

ADALN_EMBED_DIM = 256  # width of the time embedding, or dim where that is smaller
SEQ_MULTI_OF = 32  # caption and image are each padded to a multiple of this with a learned, attended token
T_MID_DIM = 1024  # hidden width of the time embedder
HALF_MAX = 65504  # the largest float16
ROW_MAX = 8.0  # of either factor of the feed-forward in float16


@dataclass(frozen=True)
class ZImageConfig:
    """The transformer's dimensions; the field names are those of the checkpoints' config.json."""

    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    in_channels: int = 16
    patch_size: int = 2
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1536, 512, 512)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ZImageConfig:
        """From a checkpoint's config.json. Raises UserError for a variant this file does not compute."""
        fixed = {"all_patch_size": [2], "all_f_patch_size": [1], "qk_norm": True, "siglip_feat_dim": None}
        fixed["n_kv_heads"] = config.get("n_heads", cls.n_heads)
        known = {f.name for f in fields(cls)}
        for key, value in config.items():
            if key in fixed and (list(value) if isinstance(value, tuple) else value) != fixed[key]:
                raise UserError(f"Transformer config has {key} = {value}; Z-Image has {fixed[key]}.")
            if key not in fixed and key not in known and not key.startswith("_"):
                raise UserError(f"Transformer config has the unknown key '{key}'; known: {sorted(known)}.")
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known
        }
        return cls(**values)

    @property
    def key(self) -> str:
        """The patch embedders' name in the checkpoint: patch size, frame patch size."""
        return f"{self.patch_size}-1"


@dataclass(frozen=True)
class Conditioning:
    """What one prompt at one image size contributes to every step.

    caption: [1, C, dim] refined caption tokens, C a multiple of 32; float32 where the weights are float16.
    rope: [1, N + C, 1, head_dim / 2] complex64, image rows (padded to N) first, then caption rows.
    image_tokens: N, a multiple of 32. height, width: of the latent.
    """

    caption: Tensor
    rope: Tensor
    image_tokens: int
    height: int
    width: int


@dataclass(frozen=True)
class Fused:
    """The device's kernels for formulas of a block (`shared.gpu.kernels.find`); None: the plain formula."""

    rms_rope: Callable[..., tuple[Tensor, Tensor]] | None = None
    rms_gated_residual: Callable[..., Tensor] | None = None

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype) -> Fused:
        residual = None if dtype == torch.float16 else kernels.find("rms_gated_residual", device)
        return cls(kernels.find("rms_rope", device), residual)


def in_range(x: Tensor) -> Tensor:
    """float16: infinities become its largest numbers, in place. Other dtypes: x as it is."""
    return x.clamp_(-HALF_MAX, HALF_MAX) if x.dtype == torch.float16 else x


def wide(x: Tensor) -> Tensor:
    """x in the dtype of the hidden states between the layers."""
    return x.float() if x.dtype == torch.float16 else x


def rms(norm: nn.RMSNorm, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """norm(x) * (1 + scale), in float32 where the weights are float16. scale: [B or 1, 1, dim].

    One sequence's scale goes into the norm's weight, so that x is read and written once and rounded once.
    Where gradients are recorded, norm and scale stay two operations, which the training may hook into.
    """
    half = norm.weight.dtype == torch.float16
    if scale is not None and (torch.is_grad_enabled() or len(scale) > 1):
        return rms(norm, x) * (1 + scale)
    if scale is None and not half:
        return norm(x)
    weight = norm_weight(norm)
    if scale is not None:
        weight = torch.addcmul(weight, weight, scale[0, 0])
    return F.rms_norm(wide(x), norm.normalized_shape, wide(weight), norm.eps)


def modulated(norm: nn.RMSNorm, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """norm(x) * (1 + scale), for a linear layer to read."""
    h = rms(norm, x, scale)
    return h.clamp(-HALF_MAX, HALF_MAX).half() if norm.weight.dtype == torch.float16 else h


def add_gated(x: Tensor, gate: Tensor | None, h: Tensor) -> Tensor:
    """x + gate * h; into x itself where no gradient is recorded, so that x never lives twice."""
    if torch.is_grad_enabled():
        return x + h if gate is None else x + gate * h
    return x.add_(h) if gate is None else x.addcmul_(gate, h)


def add_scaled(x: Tensor, hint: Tensor, scale: float) -> Tensor:
    """x + scale * hint; into x itself where no gradient is recorded."""
    return x + scale * hint if torch.is_grad_enabled() else x.add_(hint, alpha=scale)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x [B, T, heads, head_dim] by rope [1, T, 1, head_dim / 2], in fp32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler has no kernels for complex numbers
        (a, b), cos, sin = pairs.unbind(-1), rope.real, rope.imag
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(3).type_as(x)
    return torch.view_as_real(torch.view_as_complex(pairs) * rope).flatten(3).type_as(x)


def apply_rope_to_both(q: Tensor, k: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    """apply_rope of each, bit for bit; 16-bit ones are turned together, which takes fewer kernels."""
    if q.dtype == torch.float32 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return apply_rope(q, rope), apply_rope(k, rope)
    both = torch.empty(2, *q.shape, dtype=torch.float32, device=q.device)
    both[0], both[1] = q, k
    torch.view_as_complex(both.unflatten(-1, (-1, 2))).mul_(rope)
    q, k = both.type_as(q)
    return q, k


class TimestepEmbedder(nn.Module):
    """Sinusoid of 256 values (cosines first, period up to 10000), two linears. t: [B] -> [B, out_size]."""

    def __init__(self, out_size: int, mid_size: int = T_MID_DIM, frequency_size: int = 256) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_size, mid_size), nn.SiLU(), nn.Linear(mid_size, out_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequency_size // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(steps * (-math.log(10000.0) / half))
        sinusoid = torch.cat((angles.cos(), angles.sin()), dim=-1)
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(sinusoid.to(dtype) if dtype.is_floating_point else sinusoid)


#: puts another attention around a layer's own
Split = Callable[[attention_backends.Attend], attention_backends.Attend]


class Attention(nn.Module):
    """Full self-attention with RMS-normed, rotated queries and keys. x: [B, T, dim] -> [B, T, dim]."""

    attend: attention_backends.Attend
    fused = Fused()

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attend = attention_backends.sdpa
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-5)
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-5)
        self.to_out = nn.Sequential(nn.Linear(dim, dim, bias=False))

    def forward(self, x: Tensor, rope: Tensor, split: Split | None = None) -> Tensor:
        q, k, v = (
            in_range(to(x)).unflatten(-1, (self.heads, -1)) for to in (self.to_q, self.to_k, self.to_v)
        )
        if self.fused.rms_rope is not None:
            weights = norm_weight(self.norm_q), norm_weight(self.norm_k)
            q, k = self.fused.rms_rope(q, k, rope, *weights, self.norm_q.eps)
        else:
            q, k = self.norm_q(q), self.norm_k(k)  # a line of its own, so that the ones before are freed
            q, k = apply_rope_to_both(q, k, rope)
        attend = self.attend if split is None else split(self.attend)
        return wide(in_range(self.to_out(attend(q, k, v))))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            return self.forward_half(x)
        if torch.is_grad_enabled():
            return self.w2(F.silu(self.w1(x)) * self.w3(x))
        return self.w2(F.silu(self.w1(x), inplace=True).mul_(self.w3(x)))

    def forward_half(self, x: Tensor) -> Tensor:
        """The same from float16 to float32: each row's factors are scaled down to ROW_MAX, so that neither
        their products nor the sums of w2 leave the range, and the result is scaled back."""
        gate, value = F.silu(in_range(self.w1(x))), in_range(self.w3(x))
        a, b = (
            (ROW_MAX / factor.abs().amax(-1, keepdim=True).float()).clamp(max=1).half()
            for factor in (gate, value)
        )
        return self.w2(gate.mul_(a).mul_(value.mul_(b))).float() / (a.float() * b.float())


class ZImageTransformerBlock(nn.Module):
    """Attention and feed-forward, each normed before and after; `modulation`: scaled and gated by time."""

    fused = Fused()

    def __init__(self, dim: int, heads: int, eps: float, modulation: bool = True) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        self.feed_forward = FeedForward(dim, int(dim / 3 * 8))
        self.attention_norm1 = nn.RMSNorm(dim, eps=eps)
        self.attention_norm2 = nn.RMSNorm(dim, eps=eps)
        self.ffn_norm1 = nn.RMSNorm(dim, eps=eps)
        self.ffn_norm2 = nn.RMSNorm(dim, eps=eps)
        if modulation:
            self.adaLN_modulation = nn.Sequential(nn.Linear(min(dim, ADALN_EMBED_DIM), 4 * dim))
        self.modulation = modulation

    def forward(
        self, x: Tensor, rope: Tensor, temb: Tensor | None = None, split: Split | None = None
    ) -> Tensor:
        """x: [B, T, dim]; temb: [B or 1, 256]. Without gradients x is overwritten and returned."""
        scale_msa = gate_msa = scale_mlp = gate_mlp = None
        if self.modulation:
            scales, gates = self.adaLN_modulation(temb).unflatten(1, (2, 2, -1)).unbind(2)
            (scale_msa, scale_mlp), (gate_msa, gate_mlp) = scales.split(1, 1), gates.tanh().split(1, 1)
        h = self.attention(modulated(self.attention_norm1, x, scale_msa), rope, split)
        x = self.add_normed(x, gate_msa, self.attention_norm2, h)
        h = self.feed_forward(modulated(self.ffn_norm1, x, scale_mlp))
        return self.add_normed(x, gate_mlp, self.ffn_norm2, h)

    def add_normed(self, x: Tensor, gate: Tensor | None, norm: nn.RMSNorm, h: Tensor) -> Tensor:
        """x + gate * norm(h), without a gate x + norm(h)."""
        if gate is None:
            return add_gated(x, None, rms(norm, h))
        if self.fused.rms_gated_residual is not None:
            return self.fused.rms_gated_residual(h, norm_weight(norm), x, gate, norm.eps)
        return add_gated(x, gate, rms(norm, h))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(dim, ADALN_EMBED_DIM), dim))

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.norm_final(x) * (1 + self.adaLN_modulation(temb)).unsqueeze(1)
        return self.linear(in_range(h.to(temb.dtype)))


class RopeTable:
    """RoPE over (frame, row, column); angles in fp64, kept as complex64."""

    def __init__(self, config: ZImageConfig) -> None:
        self.axes = []
        for dim, length in zip(config.axes_dims, config.axes_lens, strict=True):
            frequencies = config.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).float()
            self.axes.append(torch.polar(torch.ones_like(angles), angles))

    def __call__(self, positions: Tensor) -> Tensor:
        """positions: [T, 3] integers -> [T, head_dim / 2] complex64 on the CPU."""
        return torch.cat([axis[positions[:, i]] for i, axis in enumerate(self.axes)], dim=-1)


def dit_time(t: Tensor) -> Tensor:
    """TwinFlow's m(t) = sign(t) * (1 - |t|), in fp64: noise level -1..1 (1 = noise) to transformer time.

    sign(0) = 0, so a target of 0 (the image) maps to 0 and not to 1: the models were trained with that.
    """
    t = t.double()
    return t.sign() * (1 - t.abs())


def padded(length: int) -> int:
    return -(-length // SEQ_MULTI_OF) * SEQ_MULTI_OF


def positions(caption_tokens: int, rows: int, columns: int) -> Tensor:
    """[N + C, 3]: image tokens at (1 + C, row, column), their pads at 0, caption token j at (1 + j, 0, 0)."""
    image = torch.zeros(padded(rows * columns), 3, dtype=torch.long)
    image[: rows * columns] = torch.cartesian_prod(
        torch.tensor([1 + caption_tokens]), torch.arange(rows), torch.arange(columns)
    )
    caption = torch.zeros(caption_tokens, 3, dtype=torch.long)
    caption[:, 0] = torch.arange(1, caption_tokens + 1)
    return torch.cat((image, caption))


def patchify(latent: Tensor, patch: int) -> Tensor:
    """[..., C, H, W] -> [..., H/p * W/p, p * p * C], channel fastest."""
    x = latent.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # ..., C, H/p, p, W/p, p
    return x.movedim(-5, -1).transpose(-4, -3).flatten(-3).flatten(-3, -2)


def unpatchify(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """The inverse of `patchify` for a grid of rows x columns tokens."""
    x = tokens.unflatten(-1, (patch, patch, -1)).unflatten(-4, (rows, columns)).transpose(-4, -3)
    return x.movedim(-1, -5).flatten(-2).flatten(-3, -2)


#: what is added to each sequence after a layer, asked for before that layer computes: (its index, sequences)
HintsAt = Callable[[int, list[Tensor]], Sequence[Tensor] | None]


class Control(Protocol):
    """What a control network adds in one forward; see control.py. scale: of every hint."""

    @property
    def scale(self) -> float: ...

    def refiner(self, run: Run) -> HintsAt:
        """For the noise refiner, whose sequences are the image tokens."""
        ...

    def layers(self, run: Run) -> HintsAt:
        """For the main layers; asked after `refiner`."""
        ...


@dataclass(frozen=True)
class Run:
    """What the layers of a stack get besides the sequences: one entry for each of these.

    ropes: in the form that the device's kernel reads. interrupt: asked before every layer; when it answers
    true, Cancelled is raised.
    """

    ropes: Sequence[Tensor]
    tembs: Sequence[Tensor]
    interrupt: Callable[[], bool] | None = None
    splits: Sequence[Split] | None = None

    def each(self) -> Iterator[tuple[int, Tensor, Tensor, Split | None]]:
        """(index, rope, time embedding, split) of the sequences, for one layer."""
        if self.interrupt is not None and self.interrupt():
            raise Cancelled
        splits: Sequence[Split | None] = self.splits or [None] * len(self.ropes)
        yield from zip(range(len(self.ropes)), self.ropes, self.tembs, splits, strict=True)


def use_attention(model: nn.Module, backend: str) -> None:
    """All of a model's attention layers compute with the backend of that name from now on."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attention_backends.BACKENDS[backend].attend


def use_fused(model: nn.Module, fused: Fused) -> None:
    for module in model.modules():
        if isinstance(module, (Attention, ZImageTransformerBlock)):
            module.fused = fused


def compile_blocks(blocks: Iterable[nn.Module], *args: Any, **options: Any) -> None:
    """torch.compile of their `forward`; see `ZImageTransformer2DModel.compile`."""
    for block in blocks:
        block.forward = torch.compile(types.MethodType(type(block).forward, block), *args, **options)


class ZImageTransformer2DModel(nn.Module):
    """The transformer. `prepare` once per prompt and size, then `forward` once per step."""

    streamed_blocks = ("context_refiner", "noise_refiner", "layers")

    def __init__(self, config: ZImageConfig | None = None, *, second_time_embedder: bool = False) -> None:
        """second_time_embedder: whether the file has TwinFlow's `t_embedder_2`."""
        super().__init__()
        self.config = c = config or ZImageConfig()
        self.in_channels = c.in_channels
        patch_values = c.patch_size**2 * c.in_channels

        def blocks(count: int, modulation: bool = True) -> nn.ModuleList:
            return nn.ModuleList(
                ZImageTransformerBlock(c.dim, c.n_heads, c.norm_eps, modulation) for _ in range(count)
            )

        self.all_x_embedder = nn.ModuleDict({c.key: nn.Linear(patch_values, c.dim)})
        self.all_final_layer = nn.ModuleDict({c.key: FinalLayer(c.dim, patch_values)})
        self.noise_refiner = blocks(c.n_refiner_layers)
        self.context_refiner = blocks(c.n_refiner_layers, modulation=False)
        self.t_embedder = TimestepEmbedder(min(c.dim, ADALN_EMBED_DIM))
        if second_time_embedder:
            self.t_embedder_2 = TimestepEmbedder(min(c.dim, ADALN_EMBED_DIM))
        self.cap_embedder = nn.Sequential(
            nn.RMSNorm(c.cap_feat_dim, eps=c.norm_eps), nn.Linear(c.cap_feat_dim, c.dim)
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, c.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, c.dim))
        self.layers = blocks(c.n_layers)
        self._rope: RopeTable | None = None  # made at first use: real even when the model is built empty
        self.compiled_with: tuple[Any, ...] | None = None
        self.attention_backend = "sdpa"
        self.fused = Fused()  # the kernels in use
        self._fused_for: tuple[torch.device, torch.dtype] | None = None  # what it was looked up for

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations (the pad token is never quantized)."""
        return self.x_pad_token.dtype

    def set_attention_backend(self, name: str) -> str | None:
        """Use the backend called `name` ("auto", "sdpa", "flash", "_flash_3", "sage").

        Where it cannot run here, sdpa is used, and the sentence that says why and what to install is returned
        and logged. Raises UserError for a name that does not exist.
        """
        name, note = attention_backends.choose(name)
        if note:
            log.warning(note)
        self.attention_backend = name
        use_attention(self, name)
        return note

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile of the repeated blocks; takes its arguments.

        One graph serves all layers and every size of picture and caption (dynamic=True), so the first picture
        compiles a few graphs and later ones none. Only `forward` is compiled: hooks that bring a block's
        weights to the card stay outside. The same call again changes nothing.
        """
        options = {"dynamic": True, "recompile_limit": 16, **kwargs}
        if self.compiled_with == (args, options):
            return
        self.compiled_with = args, options
        compile_blocks((*self.noise_refiner, *self.context_refiner, *self.layers), *args, **options)

    def _use_kernels(self, device: torch.device) -> None:
        """Give the blocks the kernels that this device has. None of them records gradients.

        Looks up those of the linear layers, too: they ask inside the blocks, which may be compiled.
        """
        wanted = None if torch.is_grad_enabled() else (device, self.dtype)
        if wanted == self._fused_for:
            return
        for op in kernels.OPS:
            kernels.find(op, device)
        self.fused, self._fused_for = Fused.on(*wanted) if wanted else Fused(), wanted
        use_fused(self, self.fused)

    def _angles(self, rope: Tensor) -> Tensor:
        """rope in the form that the device's kernel reads, where it has one."""
        return rope if self.fused.rms_rope is None else kernels.rotations(rope)

    def rope(self, ids: Tensor, device: torch.device) -> Tensor:
        if self._rope is None:
            self._rope = RopeTable(self.config)
        return self._rope(ids)[None, :, None].to(device)

    def prepare(self, cap_feats: Tensor, height: int, width: int) -> Conditioning:
        """Everything of a prompt that no step changes.

        cap_feats: [L, cap_feat_dim] text features, L >= 1. height, width: of the latent (even numbers).
        """
        p, device = self.config.patch_size, cap_feats.device
        self._use_kernels(device)
        length = padded(len(cap_feats))
        image_tokens = padded((height // p) * (width // p))
        rope = self.rope(positions(length, height // p, width // p), device)
        norm: Any = self.cap_embedder[0]
        features = cap_feats.float() if self.dtype == torch.float16 else cap_feats.to(self.dtype)
        caption = self.cap_embedder[1](modulated(norm, features))
        caption = wide(torch.cat((caption, self.cap_pad_token.expand(length - len(caption), -1))))[None]
        angles = self._angles(rope[:, image_tokens:])
        for block in self.context_refiner:
            check()
            caption = block(caption, angles)
        return Conditioning(caption, rope, image_tokens, height, width)

    def embed_time(self, t: Tensor) -> Tensor:
        """t: [B] = 1 - sigma (0 is noise, 1 the image) -> [B, 256]."""
        return self.t_embedder(t * self.config.t_scale).to(self.dtype)

    @property
    def has_second_time_embedder(self) -> bool:
        return hasattr(self, "t_embedder_2")

    def embed_twin_time(self, m_t: Tensor, m_tt: Tensor) -> Tensor:
        """TwinFlow's embedding of a time and the target time to jump to, both as `dit_time` gives them.

        m_t, m_tt: [B] in -1..1 -> [B, 256] (or [B, dim] where that is smaller), in the activations' dtype:
        E1(1000 |m_t|) + E2(1000 (m_tt - m_t)) * |m_tt - m_t|. E2 is `t_embedder_2`; a file without it uses
        E1 twice. Source: TwinFlow's Z-Image wrapper (arXiv 2512.05150).
        """
        m_t, m_tt = m_t.double(), m_tt.double()
        gap, scale = m_tt - m_t, self.config.t_scale
        second = self.t_embedder_2 if self.has_second_time_embedder else self.t_embedder
        first, step = self.t_embedder(m_t.abs() * scale), second(gap * scale)
        return (first.float() + step.float() * gap.abs().float()[:, None]).to(self.dtype)

    def forward(
        self,
        latents: list[Tensor],
        t: Tensor,
        conditionings: list[Conditioning],
        interrupt: Callable[[], bool] | None = None,
        *,
        target_t: Tensor | None = None,
        negatives: Sequence[Conditioning] | None = None,
        nag: Nag | None = None,
        control: Control | None = None,
    ) -> list[Tensor]:
        """The predicted direction x - z (image minus noise) for each latent.

        latents: n tensors [in_channels, H, W] of any sizes. t: [1] or [n], 1 - sigma.
        conditionings: n, from `prepare`.
        interrupt: asked before every layer; when it answers true, Cancelled is raised.
        target_t: like t, where a TwinFlow model is to jump to; t and target_t are then `dit_time`s.
        negatives, nag: n conditionings to move away from by normalized attention guidance, and how.
        control: what a control network adds to the layers' results.
        """
        patch = self.config.patch_size
        self._use_kernels(latents[0].device)
        temb = self.embed_time(t) if target_t is None else self.embed_twin_time(t, target_t)
        tembs = [temb[i : i + 1] for i in range(len(temb))] if len(temb) > 1 else [temb] * len(latents)
        image_ropes = [self._angles(c.rope[:, : c.image_tokens]) for c in conditionings]
        seqs = [self._embed_image(patchify(x, patch), c) for x, c in zip(latents, conditionings, strict=True)]
        run = Run(image_ropes, tembs, interrupt)
        hints_at = None if control is None else control.refiner(run)
        self._run(self.noise_refiner, seqs, run, hints_at, control)
        ropes = [c.rope for c in conditionings]
        splits = plain = None
        seqs = [torch.cat((x, c.caption), dim=1) for x, c in zip(seqs, conditionings, strict=True)]
        if negatives is not None and nag is not None:
            pairs = list(zip(conditionings, negatives, strict=True))
            seqs = [torch.cat((x, c.caption), dim=1) for x, c in zip(seqs, negatives, strict=True)]
            ropes = [torch.cat((c.rope, self._negative_rope(c, other)), dim=1) for c, other in pairs]
            splits, plain = (_nag_splits(how, conditionings) for how in (nag, Nag(alpha=0)))
        run = Run([self._angles(rope) for rope in ropes], tembs, interrupt, splits)
        if control is not None:
            hints_at = control.layers(replace(run, splits=plain))  # its own attention is not guided
        self._run(self.layers, seqs, run, hints_at, control)
        return [self._project(x, e, c) for x, e, c in zip(seqs, tembs, conditionings, strict=True)]

    def _negative_rope(self, c: Conditioning, negative: Conditioning) -> Tensor:
        """The negative caption's rows, moved to end where the image of `c` begins.

        The image stands one position after its own caption. A negative caption of another length is so seen
        at the distances that the model was trained with.
        """
        shift = c.caption.shape[1] - negative.caption.shape[1]
        turn = self.rope(torch.tensor([[abs(shift), 0, 0]]), c.rope.device)
        return negative.rope[:, negative.image_tokens :] * (turn if shift >= 0 else turn.conj())

    def _embed_image(self, patches: Tensor, c: Conditioning) -> Tensor:
        x = self.all_x_embedder[self.config.key](patches.to(self.dtype))
        if missing := c.image_tokens - len(x):
            x = torch.cat((x, self.x_pad_token.expand(missing, -1)))
        return wide(x)[None]

    def _project(self, x: Tensor, temb: Tensor, c: Conditioning) -> Tensor:
        rows, columns = c.height // self.config.patch_size, c.width // self.config.patch_size
        tokens = self.all_final_layer[self.config.key](x[:, : rows * columns], temb)
        return unpatchify(tokens[0], rows, columns, self.config.patch_size)

    @staticmethod
    def _run(
        blocks: nn.ModuleList,
        seqs: list[Tensor],
        run: Run,
        hints_at: HintsAt | None,
        control: Control | None,
    ) -> None:
        """Each block over all sequences, in place in the list; then what the control network adds there."""
        for number, block in enumerate(blocks):
            hints = hints_at and hints_at(number, seqs)
            for i, rope, temb, split in run.each():
                seqs[i] = block(seqs[i], rope, temb, split)
                if hints and control is not None:
                    seqs[i] = add_scaled(seqs[i], hints[i], control.scale)


def _nag_splits(nag: Nag, conditionings: list[Conditioning]) -> list[Split]:
    return [functools.partial(_nag_attend, nag, c.image_tokens, c.caption.shape[1]) for c in conditionings]


def _nag_attend(nag: Nag, image: int, positive: int, attend: attention_backends.Attend) -> NagAttend:
    return NagAttend(nag, attend, image, positive)
