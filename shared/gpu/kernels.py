"""Fused and quantized kernels by name, where the card has them; everywhere else plain torch.

The only file that imports comfy_kitchen (Apache-2.0, on PyPI) and nunchaku (its own wheels; PyPI's package of
that name is another one). Both are optional. A kernel is tried once on the device before it is used: one that
fails, or computes something else than its formula, is reported once and plain torch stays.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.gpu.kernel_packages import QUANTIZED, Capability, Reach

log = logging.getLogger(__name__)

Function = Callable[..., Any]

INT4_GROUP, FP4_GROUP = 64, 16  # weights that share one scale
#: the values of fp4's codes: three bits of magnitude, the fourth is the sign
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


_found: dict[tuple[str, torch.device], Function | None] = {}  # a plain dictionary: torch.compile reads it


def find(op: str, device: torch.device) -> Function | None:
    """The kernel for `op` (a key of OPS) on `device`; None: compute with plain torch.

    int8_linear(x, weight [N, K] int8, weight_scale [N, 1], bias) -> [..., N]; x is quantized per row, too.
    svdq_int4_linear, svdq_fp4_linear(x, qweight [N, K / 2], wscales [N, K / group], smooth [K], down [R, K],
    up [N, R], channel_scale [N] or None, bias) -> [..., N]; x is quantized to 4 bits per group, too.
    rms_rope(q, k [B, T, heads, D], freqs [1, T, 1, D / 2] complex or what `rotations` makes of them,
    q_weight, k_weight, eps) -> (q, k) normed and rotated.
    rms_gated_residual(x, weight, residual, gate, eps) -> residual + gate * rms_norm(x) * weight.
    No kernel records gradients.
    """
    if (op, device) not in _found:
        _look_up(op, device)
    return _found[op, device]


@torch.compiler.disable
def _look_up(op: str, device: torch.device) -> None:
    if device.type != "cuda":
        _found[op, device] = None
        return
    capability = None if torch.version.hip else torch.cuda.get_device_capability(device)
    _found[op, device] = choose(op, device, capability)


def choose(op: str, device: torch.device, capability: Capability | None) -> Function | None:
    """The first kernel of OPS[op] that is installed, made for this card and right on it; None: there is none.

    capability: of an NVIDIA card; None: an AMD card.
    """
    for kernel in OPS[op].kernels:
        if not kernel.reach.suits(capability):
            continue
        try:
            function = kernel.load()
        except (ImportError, OSError) as error:
            log.info("%s: no kernel of %s here (%s).", op, kernel.reach.package, error)
            continue
        problem = _trial(OPS[op], function, device, capability)
        if problem is None:
            log.info("%s: computed by %s on %s.", op, kernel.reach.package, device)
            return function
        log.warning("%s of %s is not used on %s: %s.", op, kernel.reach.package, device, problem)
    return None


# ---------------------------------------------------------------- comfy_kitchen


def _comfy(op: str) -> Function:
    """The operator as torch knows it (torch.compile can trace that). ImportError where only its reference in
    plain torch would run."""
    import comfy_kitchen

    backends = comfy_kitchen.list_backends().items()
    if not any(b["available"] and op in b["capabilities"] for name, b in backends if name != "eager"):
        raise ImportError(f"comfy_kitchen has no {op} for this card and build of torch")
    return getattr(torch.ops.comfy_kitchen, op, None) or getattr(comfy_kitchen, op)


def _comfy_int8_linear() -> Function:
    multiply = _comfy("int8_linear")
    from comfy_kitchen import DTYPE_TO_CODE

    def int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
        return multiply(x, weight, weight_scale.float().reshape(-1), bias, DTYPE_TO_CODE[x.dtype])

    return int8_linear


def _comfy_svdq_int4_linear() -> Function:
    quantize, multiply = _comfy("quantize_svdquant_w4a4"), _comfy("scaled_mm_svdquant_w4a4")

    def svdq_int4_linear(
        x: Tensor,
        qweight: Tensor,
        wscales: Tensor,
        smooth: Tensor,
        down: Tensor,
        up: Tensor,
        channel_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        rows = _half_rows(x)
        if channel_scale is not None:
            wscales = wscales * channel_scale[:, None]
        scales, to_rank = (t.t().to(rows.dtype).contiguous() for t in (wscales, down))
        codes, row_scales, low = quantize(rows, smooth.to(rows.dtype), to_rank)
        bias = None if bias is None else bias.to(rows.dtype)
        out = multiply(codes, qweight.view(torch.int8), row_scales, scales, low, up.to(rows.dtype), bias)
        return out[: len(rows)].reshape(*x.shape[:-1], -1).to(x.dtype)

    return svdq_int4_linear


def _comfy_rms_rope() -> Function:
    turn = _comfy("rms_rope")

    def rms_rope(
        q: Tensor, k: Tensor, freqs: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return turn(q, k, rotations(freqs) if freqs.is_complex() else freqs, q_weight, k_weight, eps)

    return rms_rope


def _comfy_rms_gated_residual() -> Function:
    return torch.compiler.disable(_comfy("rms_gated_residual"))  # no operator of torch


def rotations(freqs: Tensor) -> Tensor:
    """Complex [..., D / 2] of length one -> rotation matrices [..., D / 2, 2, 2], fp32."""
    cos, sin = freqs.real, freqs.imag
    return torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))


def _half_rows(x: Tensor) -> Tensor:
    """x as contiguous rows [M, K] in a dtype that 4-bit kernels take."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return rows if rows.dtype in (torch.float16, torch.bfloat16) else rows.bfloat16()


# ---------------------------------------------------------------- nunchaku


def _nunchaku_svdq_linear(fp4: bool) -> Function:
    """nunchaku reads weights in the order of its tiles: they are reordered at each call, because a streamed
    weight has no lasting place on the card. That moves a few bytes for every hundred multiplications."""
    from nunchaku.ops.gemm import svdq_gemm_w4a4_cuda
    from nunchaku.ops.quantize import svdq_quantize_w4a4_act_fuse_lora_cuda

    def svdq_linear(
        x: Tensor,
        qweight: Tensor,
        wscales: Tensor,
        smooth: Tensor,
        down: Tensor,
        up: Tensor,
        channel_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        rows = _half_rows(x)
        codes, row_scales, low = svdq_quantize_w4a4_act_fuse_lora_cuda(
            rows, lora_down=tiled_down(down.to(rows.dtype)), smooth=tiled_vector(smooth.to(rows.dtype)),
            fp4=fp4, pad_size=256,
        )  # fmt: skip
        out = rows.new_empty(len(codes), len(qweight))
        svdq_gemm_w4a4_cuda(
            act=codes, wgt=tiled_codes(qweight), out=out, ascales=row_scales,
            wscales=tiled_fp4_scales(wscales) if fp4 else tiled_int4_scales(wscales.to(rows.dtype)),
            lora_act_in=low, lora_up=tiled_up(up.to(rows.dtype)), fp4=fp4, alpha=1.0, act_unsigned=False,
            wcscales=None if channel_scale is None else tiled_vector(channel_scale.to(rows.dtype)),
            bias=None if bias is None else tiled_vector(bias.to(rows.dtype)),
        )  # fmt: skip
        return out[: len(rows)].reshape(*x.shape[:-1], -1).to(x.dtype)

    return torch.compiler.disable(svdq_linear)  # the package's functions are no operators of torch


def tiled_codes(qweight: Tensor) -> Tensor:
    """Row-major codes [N, K / 2] (low nibble first) -> the order in which a warp's lanes load them."""
    n, half = qweight.shape
    nibbles = torch.stack((qweight.view(torch.uint8) & 15, qweight.view(torch.uint8) >> 4), dim=-1)
    tiles = nibbles.reshape(n // 128, 8, 2, 8, half // 32, 2, 4, 4, 2).permute(0, 4, 1, 3, 6, 2, 5, 7, 8)
    return (tiles[..., 0] | tiles[..., 1] << 4).contiguous().view(torch.int8).reshape(n, half)


def tiled_int4_scales(scales: Tensor) -> Tensor:
    """[N, K / 64] -> [K / 64, N]."""
    n, groups = scales.shape
    return scales.reshape(n // 128, 8, 2, 4, 2, groups).permute(0, 5, 1, 3, 2, 4).reshape(groups, n)


def tiled_fp4_scales(scales: Tensor) -> Tensor:
    """[N, K / 16] float8 -> [K / 16, N]."""
    n, groups = scales.shape
    tiles = scales.view(torch.uint8).reshape(n // 128, 4, 4, 8, groups // 4, 4).permute(0, 4, 3, 2, 1, 5)
    return tiles.reshape(groups, n).view(scales.dtype)


def tiled_vector(vector: Tensor) -> Tensor:
    return vector.reshape(-1, 8, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1)


def tiled_up(up: Tensor) -> Tensor:
    """[N, R] -> [N, R] in tiles of 16 x 16."""
    n, rank = up.shape
    return up.reshape(n // 16, 2, 8, rank // 16, 2, 4, 2).permute(0, 3, 2, 5, 1, 4, 6).reshape(n, rank)


def tiled_down(down: Tensor) -> Tensor:
    """[R, K] -> [K, R] in tiles of 16 x 16."""
    rank, k = down.shape
    return down.reshape(rank // 16, 2, 8, k // 16, 2, 4, 2).permute(3, 0, 2, 5, 1, 4, 6).reshape(k, rank)


# ---------------------------------------------------------------- the formulas, on examples


@dataclass(frozen=True)
class Example:
    """Arguments of one call, what exact arithmetic answers, and how far a right kernel may be from that
    (relative to its norm)."""

    arguments: tuple[Any, ...]
    expected: Tensor
    tolerance: float


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _int8_example(half: torch.dtype) -> Example:
    x, weight = _random(32, 512).to(half), (_random(256, 512, seed=1) * 40).clamp(-127, 127).to(torch.int8)
    scale = _random(256, 1, seed=2).abs() / 1000
    return Example((x, weight, scale, None), F.linear(x.float(), weight * scale), 0.03)


def _svdq_example(half: torch.dtype, fp4: bool) -> Example:
    n, k, rank = 256, 512, 16
    x = _random(32, k).to(half)
    codes = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    smooth = (0.5 + _random(k, seed=2).abs()).to(half)
    down, up = ((_random(*shape, seed=3) / 20).to(half) for shape in ((rank, k), (n, rank)))
    if fp4:
        scales = (_random(n, k // FP4_GROUP, seed=4).abs() / 10).to(torch.float8_e4m3fn)
        values = torch.tensor(E2M1)[codes.long()]
    else:
        scales = (_random(n, k // INT4_GROUP, seed=4).abs() / 10).to(half)
        values = torch.where(codes < 8, codes.float(), codes.float() - 16)
    weight = values * scales.float().repeat_interleave(k // scales.shape[1], dim=1)
    weight = weight / smooth.float() + up.float() @ down.float()
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    return Example((x, packed, scales, smooth, down, up, None, None), F.linear(x.float(), weight), 0.3)


def _rms_rope_example(half: torch.dtype) -> Example:
    q, k = (_random(1, 32, 2, 128, seed=seed).to(half) for seed in (0, 1))
    weight = (1 + _random(128, seed=2) / 4).to(half)
    freqs = torch.polar(torch.ones(1, 32, 1, 64), _random(1, 32, 1, 64, seed=3))
    normed = F.rms_norm(torch.stack((q, k)).float(), (128,), weight.float(), 1e-5)
    turned = torch.view_as_complex(normed.unflatten(-1, (-1, 2))) * freqs
    return Example((q, k, freqs, weight, weight, 1e-5), torch.view_as_real(turned).flatten(-2), 0.01)


def _gated_residual_example(half: torch.dtype) -> Example:
    x, residual = (_random(1, 32, 512, seed=seed).to(half) for seed in (0, 1))
    weight, gate = _random(512, seed=2).to(half), _random(1, 1, 512, seed=3).to(half)
    normed = F.rms_norm(x.float(), (512,), weight.float(), 1e-5)
    return Example((x, weight, residual, gate, 1e-5), residual.float() + gate.float() * normed, 0.01)


@torch.no_grad()
def _trial(op: Op, function: Function, device: torch.device, capability: Capability | None) -> str | None:
    """What is wrong with the kernel on this device; None when it answers as its formula."""
    half = torch.float16 if capability is not None and capability < (8, 0) else torch.bfloat16
    example = op.example(half)
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in example.arguments]
    try:
        result = function(*moved)
        result = (torch.stack(result) if isinstance(result, tuple) else result).float().cpu()
    except Exception as error:  # whatever foreign code raises: plain torch computes instead
        return f"it fails with {type(error).__name__}: {error}"
    distance = float((result - example.expected).norm() / example.expected.norm())
    if distance <= example.tolerance:  # false for NaN, too
        return None
    return f"its result is off by {distance:.1%}, more than {example.tolerance:.0%}"


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Kernel:
    """reach: the package and the cards. load: imports it, or raises ImportError."""

    reach: Reach
    load: Callable[[], Function]


@dataclass(frozen=True)
class Op:
    """kernels: the best first. example: one call, in the card's 16-bit dtype."""

    example: Callable[[torch.dtype], Example]
    kernels: tuple[Kernel, ...]


def _kernels(kind: str, *loads: Callable[[], Function]) -> tuple[Kernel, ...]:
    """Of quantized weights, in the order of kernel_packages.QUANTIZED."""
    return tuple(Kernel(reach, load) for reach, load in zip(QUANTIZED[kind], loads, strict=True))


_int4_example = functools.partial(_svdq_example, fp4=False)
_fp4_example = functools.partial(_svdq_example, fp4=True)
_nunchaku_int4 = functools.partial(_nunchaku_svdq_linear, False)
_nunchaku_fp4 = functools.partial(_nunchaku_svdq_linear, True)

# The gated residual exists for AMD cards only: on NVIDIA cards the package has no more than plain torch.
# Its rms_adaln is left out: the norm's weight would have to go into its bfloat16 scale, as
# w * (1 + scale) - 1, and that is off by 2 % where the product is about 0.05 (plain bfloat16: 0.3 %).
OPS: dict[str, Op] = {
    "int8_linear": Op(_int8_example, _kernels("int8", _comfy_int8_linear)),
    "svdq_int4_linear": Op(_int4_example, _kernels("svdq-int4", _comfy_svdq_int4_linear, _nunchaku_int4)),
    "svdq_fp4_linear": Op(_fp4_example, _kernels("svdq-fp4", _nunchaku_fp4)),
    "rms_rope": Op(_rms_rope_example, (Kernel(Reach("comfy_kitchen", amd=True), _comfy_rms_rope),)),
    "rms_gated_residual": Op(
        _gated_residual_example,
        (Kernel(Reach("comfy_kitchen", (99, 0), amd=True), _comfy_rms_gated_residual),),
    ),
}
