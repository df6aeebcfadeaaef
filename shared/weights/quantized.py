"""Linear layers whose weights are not in the dtype they compute in: how each format's are laid out, and what
they compute.

Every layer computes its format's exact weights in plain torch; where `kernels` has a faster operator for the
device, that is used instead. State lies in buffers only, so that moving and saving see it and training
cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.gpu import kernels
from shared.gpu.kernels import E2M1

INT4 = (0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)
CODES = {"int4": INT4, "fp4": E2M1}


class QuantizedLinear(nn.Module):
    """y = x @ W.T + bias. x [..., in_features] -> [..., out_features] in x's dtype."""

    kind: str
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", bias)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Without its past as a view: a view's `_base` keeps the file's memory after the values have moved
        elsewhere."""
        view = tensor is not None and tensor._base is not None
        super().register_buffer(name, tensor.data if view and tensor is not None else tensor, persistent)

    def dequantized(self) -> Tensor:
        """W [out_features, in_features] in fp32, exact by the format's formula."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


class HalfLinear(QuantizedLinear):
    """W in bfloat16 or float16, cast at each use: exact in float32, at half of its memory."""

    kind = "16 bits"
    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.register_buffer("weight", weight)

    def dequantized(self) -> Tensor:
        return self.weight.float()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), _as(self.bias, x))


class ScaledLinear(QuantizedLinear):
    """W = weight * weight_scale; weight [N, K] in 8 bits, weight_scale [N, 1] or [1]."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)

    def dequantized(self) -> Tensor:
        return self.weight.float() * self.weight_scale.float()

    def scaled_weight(self, dtype: torch.dtype) -> Tensor:
        """W in a floating dtype."""
        return self.weight.to(dtype) * self.weight_scale.to(dtype)

    def scaled_first(self, x: Tensor) -> Tensor:
        """y from W, each weight of which is rounded to x's dtype."""
        return F.linear(x, self.scaled_weight(x.dtype), _as(self.bias, x))

    def forward(self, x: Tensor) -> Tensor:
        """8-bit values are exact in every float that computes here, so the scale can wait for the result,
        where it is the smaller product. In fp16 the unscaled sums would overflow."""
        if x.dtype == torch.float16:
            return self.scaled_first(x)
        y = F.linear(x, self.weight.to(x.dtype)).mul_(self.weight_scale.to(x.dtype).flatten())
        return y if self.bias is None else y.add_(self.bias.to(x.dtype))


class Int8Linear(ScaledLinear):
    """optimum-quanto's qint8: weight int8, one scale per row."""

    kind = "int8"

    def scaled_weight(self, dtype: torch.dtype) -> Tensor:
        return self.weight * self.weight_scale.to(dtype)  # a card casts within the product; not from fp8

    def forward(self, x: Tensor) -> Tensor:
        """On a card the scaled weights are one kernel, where the result would need a pass of its own, and are
        as exact: the rounding of each weight stands for one of each result. A CPU casts into a copy first."""
        if kernel := kernels.find("int8_linear", x.device):
            return kernel(x, self.weight, self.weight_scale, self.bias)
        return super().forward(x) if x.device.type == "cpu" else self.scaled_first(x)


class Fp8Linear(ScaledLinear):
    """Scaled fp8: weight float8_e4m3fn or float8_e5m2, fp32 scale; without a scale in the file it is 1."""

    kind = "fp8"


class SvdqLinear(QuantizedLinear):
    """Nunchaku's SVDQuant (arXiv 2411.05007): y = (x / smooth) @ Wq.T + (x @ down.T) @ up.T + bias.

    Wq[n, k] = value(code[n, k]) * wscales[n, k // group] * channel_scale[n]
    qweight: uint8 [N, K/2], two codes per byte, the low nibble is the even k. wscales: [N, K/64] bf16 for
    "int4", [N, K/16] fp8 for "fp4". smooth: [K]. down: [R, K]. up: [N, R]. channel_scale: [N] or None.
    """

    qweight: Tensor
    wscales: Tensor
    smooth: Tensor
    down: Tensor
    up: Tensor
    channel_scale: Tensor | None
    code_pairs: Tensor

    def __init__(
        self,
        codes: str,
        qweight: Tensor,
        wscales: Tensor,
        smooth: Tensor,
        down: Tensor,
        up: Tensor,
        channel_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(qweight.shape[1] * 2, qweight.shape[0], bias)
        self.codes, self.kind = codes, f"svdq-{codes}"
        for name, tensor in (("qweight", qweight), ("wscales", wscales), ("smooth", smooth), ("down", down),
                             ("up", up), ("channel_scale", channel_scale)):  # fmt: skip
            self.register_buffer(name, tensor)
        # byte -> its two values, exact in bf16; a buffer so that it is where the codes are
        self.register_buffer("code_pairs", code_pairs(codes), persistent=False)

    def quantized_part(self, dtype: torch.dtype) -> Tensor:
        """Wq [N, K]: the 4-bit weights, of the smoothed input."""
        values = F.embedding(self.qweight.int(), self.code_pairs.to(dtype)).flatten(1)
        scales = self.wscales
        if self.channel_scale is not None:
            scales = scales.float() * self.channel_scale.float()[:, None]
        return (values.unflatten(1, (scales.shape[1], -1)) * scales.to(dtype)[..., None]).flatten(1)

    def dequantized(self) -> Tensor:
        smooth, down, up = self.smooth.float(), self.down.float(), self.up.float()
        return self.quantized_part(torch.float32) / smooth + up @ down

    def forward(self, x: Tensor) -> Tensor:
        """The low-rank branch computes on the activations, as Nunchaku's kernels do. Adding up @ down to the
        weights costs as much, an fp32 matrix of N x K (160 MB for a Z-Image w2) and a cast that rounds small
        corrections away."""
        if kernel := kernels.find(f"svdq_{self.codes}_linear", x.device):
            return kernel(
                x, self.qweight, self.wscales, self.smooth, self.down, self.up, self.channel_scale, self.bias
            )
        y = F.linear(x / self.smooth.to(x.dtype), self.quantized_part(x.dtype), _as(self.bias, x))
        low = F.linear(x, self.down.to(x.dtype)).reshape(-1, len(self.down))
        y.view(-1, self.out_features).addmm_(low, self.up.to(x.dtype).t())
        return y


def _as(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(x.dtype)


def code_pairs(codes: str) -> Tensor:
    """[256, 2] bf16: the values of a byte's low and high nibble."""
    values = torch.tensor(CODES[codes], dtype=torch.bfloat16)
    return torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [N, K], scale [N, 1] in the weight's dtype): optimum-quanto's qint8, whose rows are scaled by
    their largest magnitude / 127. None of its optional kernels is asked for, so nothing is compiled.
    """
    from optimum.quanto import AbsmaxOptimizer, qint8, quantize_weight  # takes seconds

    scale = AbsmaxOptimizer()(weight, qtype=qint8, axis=0)
    codes = quantize_weight(weight, qtype=qint8, axis=0, scale=scale, optimized=False)._data
    # 0 / 0 in a row whose scale is 0: what becomes of NaN as an int8 is the processor's affair
    return codes.masked_fill_(weight == 0, 0), scale.reshape(-1, 1)


# ---- from the files' layouts -------------------------------------------------------------------------------
# Nunchaku stores tensors in the order in which its kernels' lanes load them (nunchaku, deepcompressor's
# packers). These undo that, once, when a file is loaded. What is never torn apart is moved as one word.


def _reorder(stored: Tensor, word_bytes: int, tiles: Sequence[int], axes: Sequence[int]) -> Tensor:
    """The words of `stored`, seen as an array `tiles`, in the order of `axes`: flat, in stored's dtype. By
    numpy, which moves short runs several times faster than torch's permute."""
    words = stored.reshape(-1).view(torch.uint8).numpy().view(f"i{word_bytes}").reshape(tiles)
    moved = np.ascontiguousarray(words.transpose(axes)).reshape(-1).view(np.uint8)
    return torch.from_numpy(moved).view(stored.dtype)


def unpack_qweight(stored: Tensor) -> Tensor:
    """int8 [N, K/2] in tiles of 128 x 64 codes -> uint8 [N, K/2], the low nibble the even k. Eight codes of
    a row are one word."""
    n, half = stored.shape
    tiles = (
        n // 128,
        half // 32,
        8,
        8,
        4,
        2,
        2,
    )  # row tile, column tile, 16 rows, row, 8 columns, 8 rows, 32
    return _reorder(stored, 4, tiles, (0, 2, 5, 3, 1, 6, 4)).view(torch.uint8).reshape(n, half)


def unpack_int4_scales(stored: Tensor) -> Tensor:
    """[K/64, N] -> [N, K/64]."""
    groups, n = stored.shape
    tiles = (n // 128, groups, 8, 4, 2, 2)
    return _reorder(stored, stored.itemsize, tiles, (0, 2, 4, 3, 5, 1)).reshape(n, groups)


def unpack_fp4_scales(stored: Tensor) -> Tensor:
    """fp8 [K/16, N] -> [N, K/16]. Four groups of a row are one word."""
    groups, n = stored.shape
    return _reorder(stored, 4, (n // 128, groups // 4, 8, 4, 4), (0, 4, 3, 2, 1)).reshape(n, groups)


def unpack_vector(stored: Tensor) -> Tensor:
    """[N], reordered by pairs inside each sixteen -> [N]."""
    return _reorder(stored, 2 * stored.itemsize, (-1, 4, 2), (0, 2, 1))


def unpack_up(stored: Tensor) -> Tensor:
    """[N, R] in tiles of 16 x 16 -> [N, R]. Pairs along R are one word."""
    n, rank = stored.shape
    tiles = (n // 16, rank // 16, 8, 4, 2, 2)
    return _reorder(stored, 2 * stored.itemsize, tiles, (0, 4, 2, 1, 5, 3)).reshape(n, rank)


def unpack_down(stored: Tensor) -> Tensor:
    """[K, R] in tiles of 16 x 16 -> [R, K]. Pairs along K are one word: not a transpose."""
    k, rank = stored.shape
    tiles = (k // 16, rank // 16, 8, 4, 2, 2)
    return _reorder(stored, 2 * stored.itemsize, tiles, (1, 4, 2, 0, 5, 3)).reshape(rank, k)


_UNPACK_BOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "qweight": unpack_qweight, "smooth": unpack_vector, "wcscales": unpack_vector,
    "down": unpack_down, "up": unpack_up,
}  # fmt: skip
#: kind -> attribute -> stored tensor to row-major; what is not here is stored as it is used
UNPACK: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "svdq-int4": {**_UNPACK_BOTH, "wscales": unpack_int4_scales},
    "svdq-fp4": {**_UNPACK_BOTH, "wscales": unpack_fp4_scales},
}


def make(kind: str, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """The layer of this kind from its unpacked tensors, named as in `formats.Checkpoint.entries`."""
    bias = tensors.get("bias")
    if not kind.startswith("svdq-"):
        weight, scale = tensors["weight"], tensors.get("weight_scale")
        if kind == "fp8":
            return Fp8Linear(weight, torch.ones(1) if scale is None else scale.float().reshape(-1, 1), bias)
        assert scale is not None
        return Int8Linear(weight, scale.reshape(-1, 1).expand(len(weight), 1).contiguous(), bias)
    channel_scale = None
    for name in ("wtscale", "wcscales"):
        if name in tensors:
            factor = tensors[name].float().reshape(-1).expand(tensors["qweight"].shape[0])
            channel_scale = factor if channel_scale is None else channel_scale * factor
    row_major = {name: tensors[name] for name in ("qweight", "wscales", "smooth", "down", "up")}
    if channel_scale is not None:
        channel_scale = channel_scale.contiguous()
    return SvdqLinear(kind.removeprefix("svdq-"), **row_major, channel_scale=channel_scale, bias=bias)
