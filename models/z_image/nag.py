"""Normalized attention guidance: a negative prompt for models without classifier-free guidance.

In every attention of the main layers the image asks twice, [image, positive caption] and [image, negative
caption], and moves away from the second answer; no second forward is needed. Both captions keep streams of
their own. Source: Chen et al., "Normalized Attention Guidance" (arXiv 2505.21179).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.arguments import check, default
from shared.gpu.attention import Attend


@dataclass(frozen=True)
class Nag:
    """scale: how far to move away (1 = not at all). tau: how much longer an answer may get. alpha: the share
    of the guided answer in the result. UserError for numbers out of the settings' ranges.
    """

    scale: float = default("NAG_scale")
    tau: float = default("NAG_tau")
    alpha: float = default("NAG_alpha")

    def __post_init__(self) -> None:
        check(NAG_scale=self.scale, NAG_tau=self.tau, NAG_alpha=self.alpha)

    @property
    def on(self) -> bool:
        return self.scale > 1

    def combine(self, positive: Tensor, negative: Tensor) -> Tensor:
        """The image rows' result. positive, negative: Z+ and Z-, [B, T, heads * head_dim]."""
        if self.alpha == 0:
            return positive
        plus = positive.float()
        guided = torch.lerp(negative.float(), plus, self.scale)  # scale * Z+ - (scale - 1) * Z-
        length, own = (torch.linalg.vector_norm(x, ord=1, dim=-1, keepdim=True) for x in (guided, plus))
        # min(R, tau) / R for R = length / own, written so that it holds for an answer of zeros too
        guided = guided * (self.tau * own / length.clamp_min(1e-30)).clamp(max=1)
        return torch.lerp(plus, guided, self.alpha).to(positive.dtype)


@dataclass(frozen=True)
class NagAttend:
    """Attention over a sequence [image, positive caption, negative caption] in the place of `attend`.

    image, positive: their numbers of rows; the rest is the negative caption.
    """

    nag: Nag
    attend: Attend
    image: int
    positive: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, end = self.image, self.image + self.positive
        plus = self.attend(q[:, :end], k[:, :end], v[:, :end])
        minus = self.attend(*(torch.cat((x[:, :n], x[:, end:]), dim=1) for x in (q, k, v)))
        guided = self.nag.combine(plus[:, :n], minus[:, :n])
        return torch.cat((guided, plus[:, n:], minus[:, n:]), dim=1)
