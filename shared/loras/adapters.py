"""The changes that a LoRA file makes to a model, one dataclass for each kind, in the model's own terms.

Every tensor keeps the file's precision; `delta` computes in float32. `weight` is the untouched weight
[out, in] of the module, which DoRA and OFT need and the others ignore. `rows` cuts out the part of a stacked
layer that belongs to one module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """LoRA: scale * up @ down. down [r, in], up [out, r]."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.scale * (self.up.float() @ self.down.float())

    def rows(self, start: int, stop: int) -> LowRank:
        """Ranks that do not reach these rows are dropped: stacked files may be block-diagonal."""
        up = self.up[start:stop]
        used = up.ne(0).any(dim=0)
        if used.all() or not used.any():
            return LowRank(self.down, up, self.scale)
        return LowRank(self.down[used], up[:, used], self.scale)


@dataclass(frozen=True, eq=False)
class LoHa:
    """scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise between the products. _a [out, r], _b [r, in]."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float

    def delta(self, weight: Tensor | None = None) -> Tensor:
        one, two = self.w1_a.float() @ self.w1_b.float(), self.w2_a.float() @ self.w2_b.float()
        return one.mul_(two).mul_(self.scale)

    def rows(self, start: int, stop: int) -> LoHa:
        return replace(self, w1_a=self.w1_a[start:stop], w2_a=self.w2_a[start:stop])

    def low_rank(self) -> LowRank:
        """The same delta as a LoRA of rank r1 * r2, exactly: row-wise Kronecker products of the factors."""
        up = (self.w1_a.float()[:, :, None] * self.w2_a.float()[:, None, :]).flatten(1)
        down = (self.w1_b.float()[:, None, :] * self.w2_b.float()[None, :, :]).flatten(0, 1)
        return LowRank(down, up, self.scale)


@dataclass(frozen=True, eq=False)
class LoKr:
    """scale * kron(w1, w2); each is a matrix or the product of two."""

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float

    def sides(self) -> tuple[Tensor, Tensor]:
        """w1 [out1, in1] and w2 [out2, in2] in float32; out = out1 * out2, in = in1 * in2."""
        return _chain(self.w1), _chain(self.w2)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.scale * torch.kron(*self.sides())

    def rows(self, start: int, stop: int) -> LoKr | Diff:
        height = self.w2[0].shape[0]
        if start % height or stop % height:
            return Diff(self.delta()[start:stop])
        first, *rest = self.w1
        return replace(self, w1=(first[start // height : stop // height], *rest))

    def low_rank(self) -> LowRank | None:
        """The same delta as a LoRA, exactly, where w2 is a product; None where both matrices are full.

        kron(w1, a @ b) = kron(w1, a) @ kron(I, b) = kron(I, a) @ kron(w1, b).
        """
        if len(self.w2) == 1:
            return None
        w1, (a, b) = _chain(self.w1), (factor.float() for factor in self.w2)
        if w1.shape[1] <= w1.shape[0]:
            return LowRank(torch.kron(torch.eye(w1.shape[1]), b), torch.kron(w1, a), self.scale)
        return LowRank(torch.kron(w1, b), torch.kron(torch.eye(w1.shape[0]), a), self.scale)


@dataclass(frozen=True, eq=False)
class Diff:
    """A weight's full delta [out, in]."""

    value: Tensor

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.value.float()

    def rows(self, start: int, stop: int) -> Diff:
        return Diff(self.value[start:stop])


@dataclass(frozen=True, eq=False)
class Oft:
    """An orthogonal rotation of the weight's outputs or inputs, in blocks along that side, one stage after
    the other: OFT has one stage, a BOFT's stages are a butterfly.

    rotation [stages, blocks, b, b], float32. side "out": each block of rows becomes rotation @ rows. side
    "in": the layer sees x @ rotation; one block may serve all. pairing: (distance, run) of each stage, see
    `paired`. rescale [out]: multiplies the outputs.
    """

    rotation: Tensor
    side: str
    rescale: Tensor | None = None
    pairing: tuple[tuple[int, int], ...] = ((1, 1),)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        assert weight is not None
        weight = weight.float()
        turned = self.turn(weight.T).T if self.side == "out" else self.turn(weight, backwards=True)
        if self.rescale is not None:
            turned = turned * self.rescale.float()[:, None]
        return turned - weight

    def turn(self, x: Tensor, backwards: bool = False) -> Tensor:
        """The blocks of the last axis of x, turned as the layer's side is; `backwards`: the other way."""
        return turn(x, self.rotation, self.pairing, self.side, backwards)

    def rows(self, start: int, stop: int) -> Oft:
        rescale = None if self.rescale is None else self.rescale[start:stop]
        if self.side == "in":
            return replace(self, rescale=rescale)
        size = self.rotation.shape[-1]
        return replace(self, rotation=self.rotation[:, start // size : stop // size], rescale=rescale)


@dataclass(frozen=True, eq=False)
class Dora:
    """A weight with new lengths: magnitude * V / |V|, V = weight + inner's delta.

    axis "out": magnitude [out], a length is a row's. axis "in": magnitude [in], a length is a column's.
    """

    inner: LowRank | LoHa | LoKr | Oft | Diff
    magnitude: Tensor
    axis: str

    def delta(self, weight: Tensor | None = None) -> Tensor:
        assert weight is not None
        changed = weight.float() + self.inner.delta(weight)
        gain = self.gain(weight)
        return changed * (gain[:, None] if self.axis == "out" else gain) - weight.float()

    def gain(self, weight: Tensor) -> Tensor:
        """magnitude / |V|: what each row (or column) of V is multiplied by. float32."""
        changed = weight.float() + self.inner.delta(weight)
        lengths = changed.norm(dim=1 if self.axis == "out" else 0)
        return self.magnitude.float().flatten() / lengths.clamp_min(torch.finfo(torch.float32).tiny)

    def rows(self, start: int, stop: int) -> Dora:
        return replace(
            self, inner=self.inner.rows(start, stop), magnitude=self.magnitude.flatten()[start:stop]
        )


@dataclass(frozen=True, eq=False)
class DiffBias:
    """What is added to a linear's bias (none counts as zeros). value [out]."""

    value: Tensor

    def rows(self, start: int, stop: int) -> DiffBias:
        return DiffBias(self.value[start:stop])


@dataclass(frozen=True, eq=False)
class NormDiff:
    """What is added to a norm's weight. value [dim]."""

    value: Tensor


WeightAdapter: TypeAlias = LowRank | LoHa | LoKr | Diff | Oft | Dora
Adapter: TypeAlias = WeightAdapter | DiffBias | NormDiff


def tensors(adapter: Adapter) -> Iterator[Tensor]:
    """Every tensor that an adapter holds."""
    for field in fields(adapter):
        value = getattr(adapter, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Tensor):
                yield item
            elif hasattr(item, "delta"):
                yield from tensors(item)


def turn(
    x: Tensor,
    rotation: Tensor,
    pairing: tuple[tuple[int, int], ...],
    side: str,
    backwards: bool = False,
) -> Tensor:
    """x [..., n * b] turned by every stage of rotation [stages, n or 1, b, b], block by block: x @ rotation,
    on the side "out" x @ rotation^T. backwards: the inverse, so the last stage first, and transposed.
    """
    form = "...nb,ncb->...nc" if (side == "out") != backwards else "...nb,nbc->...nc"
    stages = list(zip(rotation, pairing, strict=True))
    for blocks, (distance, run) in reversed(stages) if backwards else stages:
        gathered = paired(x, distance, run).unflatten(-1, (-1, blocks.shape[-1]))
        turned = torch.einsum(form, gathered, blocks.expand(gathered.shape[-2], -1, -1))
        x = paired(turned.flatten(-2), distance, run, back=True)
    return x


def paired(x: Tensor, distance: int, run: int, back: bool = False) -> Tensor:
    """The last axis of x with runs of `run` elements that are `distance` runs apart brought side by side."""
    if distance == 1:
        return x
    apart = (-1, distance, 2, run) if back else (-1, 2, distance, run)
    return x.unflatten(-1, apart).transpose(-3, -2).flatten(-4)


def butterfly(stages: int, run: int, size: int) -> tuple[tuple[int, int], ...]:
    """The pairing of a BOFT's stages: stage i mixes runs within 2^i blocks of `size` elements."""
    return tuple((2**i * max(size // 2, 1) // run, run) for i in range(stages))


def output_rotation(blocks: Tensor, constraint: float) -> Tensor:
    """LyCORIS's rotation [..., b, b] of a weight's rows from oft_blocks [..., b, b]: Cayley's transform.

    Q = blocks - blocks^T, all of them shortened to a norm of `constraint` where that is above 0; rows become
    ((I + Q) (I - Q)^-1)^T @ rows.
    """
    skew = blocks.float() - blocks.float().mT
    length = skew.norm() + 1e-8
    if 0 < constraint < length:
        skew = skew * (constraint / length)
    eye = torch.eye(skew.shape[-1])
    return ((eye + skew) @ torch.linalg.inv(eye - skew)).mT


def input_rotation(triangles: Tensor, size: int, neumann: int, limit: float = 0.0) -> Tensor:
    """PEFT's rotation [n, b, b] of a layer's inputs from the upper triangles [n, b (b - 1) / 2] of Q.

    neumann: how many terms of a series, I + 2Q + 2Q^2 + 2Q^3 + Q^4 (PEFT's default: 5). 0 for
    (I - Q) (I + Q)^-1: PEFT gives the two opposite signs, and so must we. Its series of 3 terms is that of 4,
    and the shorter ones are I and I + 2Q. limit: the norm that each Q of n is shortened to, times sqrt(n)
    ("coft"); 0 for none.
    """
    skew = torch.zeros(len(triangles), size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = triangles.float()
    skew = skew - skew.transpose(1, 2)
    if limit:
        lengths = skew.norm(dim=(1, 2), keepdim=True)
        most = limit / math.sqrt(len(skew))
        skew = torch.where(lengths > most, skew * (most / lengths), skew)
    eye = torch.eye(size).expand_as(skew)
    if not neumann:
        return cayley(skew)
    if neumann < 3:
        return eye + 2 * (neumann - 1) * skew
    powers = [eye]
    for _ in range(1, max(neumann, 4)):
        powers.append(powers[-1] @ skew)
    return powers[0] + 2 * sum(powers[1:-1]) + powers[-1]


def cayley(skew: Tensor) -> Tensor:
    """PEFT's (I - Q) (I + Q)^-1 of skew matrices Q [..., b, b]."""
    eye = torch.eye(skew.shape[-1]).expand_as(skew)
    return torch.linalg.solve(eye + skew, eye - skew, left=False)


def _chain(factors: tuple[Tensor, ...]) -> Tensor:
    """The product of one or two matrices, in float32."""
    return factors[0].float() if len(factors) == 1 else factors[0].float() @ factors[1].float()
