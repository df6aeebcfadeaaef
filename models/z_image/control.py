"""Z-Image's control networks (VideoX-Fun's "Fun-Controlnet" files): further blocks beside the base model.

They see a control context (latents of a control picture, in newer files also of what is to be repainted) and
add a hint to the results of some of the base's layers. Which generation a file is, its keys say:

* v1: 16 channels; two plain blocks refine the control tokens; hints for every fifth main layer.
* 2.0: 33 channels; hints for the noise refiner, too, from a first pass of the very blocks that serve the main
  layers. The file's own refiner blocks were never trained and are left out.
* 2.1 and lite: 33 channels, refiner blocks of their own; hints for every second, in lite every tenth layer.

Source of the arithmetic: VideoX-Fun, the training code's own model class. diffusers 0.42 adds no hints to the
base's noise refiner, with which these weights were trained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.arguments import check, default
from models.z_image.checkpoints import control_layout, weight_names
from models.z_image.checkpoints.control_layout import (
    INPAINT_CHANNELS,
    LATENT_CHANNELS,
    OWN,
    PLAIN,
    SHARED,
    ControlLayout,
)
from models.z_image.transformer_z_image import (
    HALF_MAX,
    HintsAt,
    Run,
    Split,
    ZImageConfig,
    ZImageTransformer2DModel,
    ZImageTransformerBlock,
    compile_blocks,
    in_range,
    padded,
    patchify,
    use_attention,
    use_fused,
    wide,
)
from shared.weights.loading import build, load_weights

GREY = 0.5  # of the area to repaint; 0 where pixels reach from -1 to 1


class ControlBlock(ZImageTransformerBlock):
    """A block over the control tokens that also gives a hint. Only the first of a pass sees the base's."""

    def __init__(self, dim: int, heads: int, eps: float, first: bool) -> None:
        super().__init__(dim, heads, eps)
        if first:
            self.before_proj = nn.Linear(dim, dim)
        self.after_proj = nn.Linear(dim, dim)

    def forward(  # type: ignore[override]
        self,
        c: Tensor,
        rope: Tensor,
        temb: Tensor,
        split: Split | None = None,
        base: Tensor | None = None,
        hint: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """c: [1, T, dim] control tokens -> (the next block's, the hint for the base: [1, T, dim]).

        base: the base's tokens, for the first block. hint: whether it is wanted. Without gradients c is
        overwritten, but for the first block's.
        """
        if base is not None:
            c = base + self._projected(self.before_proj, c)
        c = super().forward(c, rope, temb, split)
        return c, self._projected(self.after_proj, c) if hint else None

    def _projected(self, layer: nn.Module, x: Tensor) -> Tensor:
        half = self.attention_norm1.weight.dtype == torch.float16
        return wide(in_range(layer(x.clamp(-HALF_MAX, HALF_MAX).half() if half else x)))


class ZImageControlModel(nn.Module):
    """A control network's own weights; the names are those of its checkpoints."""

    streamed_blocks = ("control_noise_refiner", "control_layers")

    def __init__(self, config: ZImageConfig, layout: ControlLayout) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        values = config.patch_size**2 * layout.channels
        self.control_all_x_embedder = nn.ModuleDict({config.key: nn.Linear(values, config.dim)})
        shape = (config.dim, config.n_heads, config.norm_eps)
        self.control_layers = nn.ModuleList(ControlBlock(*shape, first=p == 0) for p in layout.places)
        refiner: dict[str, Callable[[int], nn.Module]] = {
            PLAIN: lambda i: ZImageTransformerBlock(*shape),
            OWN: lambda i: ControlBlock(*shape, first=i == 0),
        }
        make = refiner.get(layout.refiner)
        count = config.n_refiner_layers if make else 0
        self.control_noise_refiner = nn.ModuleList(make(i) for i in range(count) if make)
        self._compiled_with: Any = None

    def follow(self, base: ZImageTransformer2DModel) -> None:
        """Compute with the base's kernels and attention, and compiled where it is."""
        use_fused(self, base.fused)
        use_attention(self, base.attention_backend)
        if base.compiled_with is not None and self._compiled_with != base.compiled_with:
            self._compiled_with = args, options = base.compiled_with
            compile_blocks((*self.control_noise_refiner, *self.control_layers), *args, **options)

    def embed(self, context: Tensor, x_pad_token: Tensor) -> Tensor:
        """The control tokens of a context [channels, h, w]: [1, N, dim], padded as the image's; no step
        changes them. x_pad_token: the base's, [1, dim].
        """
        embedder: Any = self.control_all_x_embedder[self.config.key]
        tokens = patchify(context, self.config.patch_size)
        embedded = embedder(tokens.to(x_pad_token))
        pads = x_pad_token.expand(padded(len(embedded)) - len(embedded), -1)
        return wide(torch.cat((embedded, pads)))[None]


def load(file: Path, config: ZImageConfig, dtype: torch.dtype) -> ZImageControlModel:
    """The control network of a file, for a base of that configuration. UserError when it does not fit."""
    _, layout = control_layout.read(file, config)
    model = build(lambda: ZImageControlModel(config, layout))
    load_weights(model, [file], dtype=dtype, names=weight_names.CONTROL, unused=layout.unused)
    return model


# ---- one forward -------------------------------------------------------------------------------------------


class Hints:
    """A control network beside the base's forwards (`transformer_z_image.Control`), one after the other."""

    def __init__(self, model: ZImageControlModel, embedded: Sequence[Tensor], scale: float) -> None:
        """embedded: each sequence's control tokens, from `embed`. scale: of every hint."""
        self.model, self.embedded, self.scale = model, embedded, scale
        self._tokens: list[Tensor] = []  # on their way through the blocks
        self._first_hints: list[Tensor] = []

    def refiner(self, run: Run) -> HintsAt:
        self._tokens = list(self.embedded)
        passes = {PLAIN: self._refined, SHARED: self._first_pass, OWN: self._own_pass}
        return functools.partial(passes[self.model.layout.refiner], run)

    def layers(self, run: Run) -> HintsAt:
        return functools.partial(self._main_pass, run)

    def _refined(self, run: Run, number: int, base: list[Tensor]) -> None:
        """v1: the plain blocks, before the base's first; no hints."""
        if number:
            return
        self._tokens = [c.clone() for c in self._tokens]  # such blocks overwrite what they get
        for block in self.model.control_noise_refiner:
            for i, rope, temb, split in run.each():
                self._tokens[i] = block(self._tokens[i], rope, temb, split)

    def _own_pass(self, run: Run, number: int, base: list[Tensor]) -> list[Tensor]:
        """2.1: a refiner block beside each of the base's."""
        return self._step(self.model.control_noise_refiner[number], run, base if number == 0 else None)

    def _first_pass(self, run: Run, number: int, base: list[Tensor]) -> list[Tensor]:
        """2.0: all main blocks over the image tokens; the first hints are for the refiner."""
        if number == 0:
            count = len(base) * self.model.config.n_refiner_layers
            self._first_hints = []
            for n, block in enumerate(self.model.control_layers):
                wanted = len(self._first_hints) < count
                self._first_hints += self._step(block, run, base if n == 0 else None, hint=wanted)
        hints, self._first_hints = self._first_hints[: len(base)], self._first_hints[len(base) :]
        return hints

    def _main_pass(self, run: Run, number: int, base: list[Tensor]) -> list[Tensor] | None:
        """Each block just before the layer that its hint is for. The first sees the base's tokens as they
        enter the main layers; the control tokens continue with the same caption."""
        if number == 0:
            pairs = zip(self._tokens, base, strict=True)
            self._tokens = [torch.cat((c, x[:, c.shape[1] :]), dim=1) for c, x in pairs]
        places = self.model.layout.places
        if number not in places:
            return None
        block = self.model.control_layers[places.index(number)]
        hints = self._step(block, run, base if number == 0 else None)
        if number == places[-1]:
            self._tokens = []
        return hints

    def _step(self, block: nn.Module, run: Run, base: list[Tensor] | None, hint: bool = True) -> list[Tensor]:
        """One block over all sequences' control tokens; their hints."""
        hints = []
        for i, rope, temb, split in run.each():
            seen = None if base is None else base[i]
            self._tokens[i], result = block(self._tokens[i], rope, temb, split, seen, hint)
            hints += [] if result is None else [result]
        return hints


# ---- the context -------------------------------------------------------------------------------------------


def context(
    channels: int, control: Tensor | None = None, kept: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """The control context [channels, h, w] in fp32.

    control: latents of the control picture, [16, h, w]. kept: latents of `without_painted`. mask: bool
    [8h, 8w], true where the picture is repainted. What is not there is zeros, as in the training: a mask
    channel of 0 means that everything is painted. So does a mask that is true everywhere.
    """
    given = control if control is not None else kept
    assert given is not None, "a context of nothing has no size"
    size = given.shape[1:]
    zeros = torch.zeros(LATENT_CHANNELS, *size)
    parts = [zeros if control is None else control.float().cpu()]
    if channels == INPAINT_CHANNELS:
        keep = torch.zeros(1, *size)
        if kept is not None and mask is not None and not mask.all():
            keep = 1 - F.interpolate(mask[None, None].float().cpu(), size=size, mode="nearest")[0]
            zeros = kept.float().cpu()
        parts += [keep, zeros]
    return torch.cat(parts)


def without_painted(picture: Tensor, mask: Tensor) -> Tensor:
    """picture [3, H, W] in 0..1, grey where the mask [H, W] (bool) is true."""
    return torch.where(mask, GREY, picture)


# ---- when it acts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ControlSchedule:
    """The part of a run that control acts on: steps i of N with start <= i / N and (i + 1) / N <= end.

    scale: of the hints. start, end: 0 to 1. UserError for numbers out of the settings' ranges.
    """

    scale: float = default("control_context_scale")
    start: float = default("control_start")
    end: float = default("control_end")

    def __post_init__(self) -> None:
        check(control_context_scale=self.scale, control_start=self.start, control_end=self.end)

    def steps(self, count: int) -> set[int]:
        """The numbers, from 0, of those of `count` steps that control acts on."""
        if not self.scale:
            return set()
        return {i for i in range(count) if self.start <= i / count and (i + 1) / count <= self.end}


@dataclass(frozen=True)
class Guide:
    """A control network beside a whole run. sigmas: the run's noise levels; acting: numbers of its steps."""

    model: ZImageControlModel
    embedded: Tensor
    scale: float
    sigmas: Sequence[float]
    acting: Set[int]

    def at(self, sigma: float, sequences: int) -> Hints | None:
        """For one forward of so many sequences at a noise level; None where control does not act."""
        if step_of(self.sigmas, sigma) not in self.acting:
            return None
        return Hints(self.model, [self.embedded] * sequences, self.scale)


def step_of(sigmas: Sequence[float], sigma: float) -> int:
    """Which step of falling noise levels a prediction at `sigma` belongs to."""
    return max(sum(x >= sigma for x in sigmas) - 1, 0)
