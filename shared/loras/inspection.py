"""What a LoRA file is, in one sentence, when it is chosen: from its header, in milliseconds. No torch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from shared.errors import UserError
from shared.loras.names import ModelNames
from shared.loras.parser import Layout, LeftOut, OtherSize, read_layout
from shared.settings.messages import printable

MAX_TRIGGERS = 20
MAX_TRIGGER = 100  # characters
MAX_TAGS = 2_000_000  # characters of captions' tags that are read for trigger words
MAX_SAID = 1000  # entries of the metadata, and characters of each, that are looked through for the trainer


@dataclass(frozen=True)
class Verdict:
    """What a file does to a model. `refused` is the whole reason when it does nothing, and None otherwise.
    other_size: whether that reason is that the model has another size.

    matched of total: modules of the file that are used. alphas: of the modules that have one.
    base_model, trigger_words: what the file's metadata says; often nothing.
    """

    refused: str | None = None
    other_size: bool = False
    matched: int = 0
    total: int = 0
    flavour: str = ""
    algorithms: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    base_model: str = ""
    trigger_words: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    bytes: int = field(default=0, compare=False)

    @property
    def usable(self) -> bool:
        return self.refused is None

    @property
    def sentence(self) -> str:
        """For example "210 of 210 modules, kohya, rank 16, alpha 8"."""
        if self.refused is not None:
            return self.refused
        parts = [f"{self.matched} of {self.total} modules", self.flavour]
        if self.algorithms != ("LoRA",):
            parts.append(" + ".join(self.algorithms))
        numbers = {"rank": self.ranks, "alpha": self.alphas}
        parts += [f"{name} {_span(values)}" for name, values in numbers.items() if values]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Flavour:
    """A trainer by its file's marks; all that are given must be there.

    prefix, spelling: how some key begins and ends. alpha: whether there are alphas. fused: stacked layers.
    software: a word in the metadata (in lower case).
    """

    name: str
    prefix: str | None = None
    spelling: str = ""
    alpha: bool | None = None
    fused: bool | None = None
    software: str = ""


# The first that fits. Trainers that leave no mark of their own go by the format they share.
FLAVOURS = (
    Flavour("ai-toolkit", software="ai-toolkit"),
    Flavour("OneTrainer", software="onetrainer"),
    Flavour("OneTrainer", software="ot_"),
    Flavour("musubi-tuner", software="musubi"),
    Flavour("VideoX-Fun", prefix="lora_unet__"),
    Flavour("kohya", prefix="lora_unet_"),
    Flavour("LyCORIS", prefix="lycoris_"),
    Flavour("PEFT", prefix="base_model.model."),
    Flavour("DiffSynth", spelling=".lora_A.weight default"),
    Flavour("PEFT", spelling=".lora_A.weight named"),
    Flavour("OneTrainer", prefix="transformer.", spelling=".lora_down.weight"),
    Flavour("OneTrainer", prefix="transformer.", spelling=".dora_scale"),
    Flavour("diffusers", prefix="transformer."),
    Flavour("ComfyUI", prefix="diffusion_model.", fused=True),
    Flavour("OneTrainer", prefix="diffusion_model.", spelling=".lora_A.weight", alpha=True),
    Flavour("ai-toolkit", prefix="diffusion_model.", spelling=".lora_A.weight"),
    Flavour("ai-toolkit", prefix="diffusion_model.", spelling=".lokr_w1"),
    Flavour("ComfyUI", prefix="diffusion_model."),
    Flavour("ComfyUI", prefix="model.diffusion_model."),
    Flavour("kohya", prefix="lora_transformer_"),
    Flavour("OneTrainer", prefix="", spelling=".lora_A.weight", alpha=True),
    Flavour("diffusers", prefix="", spelling=".lora_A.weight"),
    Flavour("LyCORIS", prefix=""),
)


def inspect(path: Path, names: ModelNames) -> Verdict:
    """The verdict on the file at `path` for the model of `names`; a file that is no use is `refused`."""
    try:
        layout = read_layout(path, names)
    except UserError as error:
        return Verdict(refused=str(error), other_size=isinstance(error, OtherSize))
    return verdict_of(layout)


def verdict_of(layout: Layout) -> Verdict:
    """The verdict on a file whose layout is known."""
    modules = layout.modules
    labels = Counter(module.label for module in modules)
    return Verdict(
        matched=len(modules),
        total=layout.total,
        flavour=_flavour(layout),
        algorithms=tuple(label for label, _ in labels.most_common()),
        ranks=tuple(sorted({module.rank for module in modules if module.rank is not None})),
        alphas=tuple(sorted({module.alpha for module in modules if module.alpha is not None})),
        base_model=printable(
            layout.metadata.get("ss_base_model_version") or layout.metadata.get("modelspec.architecture", "")
        ),
        trigger_words=_trigger_words(layout.metadata),
        left_out=layout.left_out,
        bytes=layout.path.stat().st_size,
    )


def _flavour(layout: Layout) -> str:
    fused = any(module.target.fused for module in layout.modules)
    first = islice(layout.metadata.items(), MAX_SAID)
    said = " ".join(text[:MAX_SAID] for pair in first for text in pair).lower()

    def fits(rule: Flavour) -> bool:
        return (
            (
                rule.prefix is None
                or any(
                    prefix.startswith(rule.prefix) if rule.prefix else not prefix
                    for prefix in layout.prefixes
                )
            )
            and (not rule.spelling or rule.spelling in layout.spellings)
            and (rule.alpha is None or rule.alpha == (".alpha" in layout.spellings))
            and (rule.fused is None or rule.fused == fused)
            and rule.software in said
        )

    return next((rule.name for rule in FLAVOURS if fits(rule)), "")


def _trigger_words(metadata: dict[str, str]) -> tuple[str, ...]:
    """Words that the file's author names, else the most frequent captions' tags of its training."""
    said = metadata.get("modelspec.trigger_phrase") or metadata.get("trigger_words") or ""
    words = [word for word in said[:MAX_TAGS].split(",") if word.strip()]
    if not words:
        words = _frequent_tags(metadata.get("ss_tag_frequency", ""))
    return tuple(printable(" ".join(word.split()), MAX_TRIGGER) for word in words[:MAX_TRIGGERS])


def _frequent_tags(text: str) -> list[str]:
    """kohya's {folder: {tag: count}}, most frequent first; nothing when it is damaged: it is only a hint."""
    try:
        folders = json.loads(text if 0 < len(text) <= MAX_TAGS else "{}")
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return []
    return [tag for tag, _ in counts.most_common(MAX_TRIGGERS)]


def _span(values: tuple[float, ...]) -> str:
    """One number, or the least and the greatest of several."""
    low, high = f"{min(values):g}", f"{max(values):g}"
    return low if low == high else f"{low} to {high}"
