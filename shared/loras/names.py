"""Which module of the model a key of a LoRA file means, whatever its trainer's habits.

Trainers write `layers.0.attention.to_q` with dots or with underscores, behind one or several prefixes, under
diffusers' names or the original ones. All spellings are brought to one (underscores) and looked up in a table
built from the model's own module names, so nothing is guessed from the text of a key. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

# What trainers put in front of a module's name, after dots became underscores; any of them, repeatedly.
PREFIXES = (
    "base_model_model_", "model_diffusion_model_", "diffusion_model_", "transformer_", "model_",
    "lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_",
)  # fmt: skip
PREFIX = re.compile("|".join(PREFIXES))  # the first that fits
MAX_PREFIXES = 6  # in front of one name
MAX_MARK = 20  # characters, the longest beginning of a text encoder's names
MAX_JUDGED = 2000  # names that are looked through for another family's marks
TEXT_ENCODER = (
    "lora_te",
    "text_encoder",
    "te_",
    "te1_",
    "te2_",
    "clip_",
    "cond_stage_model_",
    "conditioner_",
)


@dataclass(frozen=True)
class Alias:
    """Another name of a module, or of several whose rows were stacked in this order: `attention.qkv`."""

    name: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A module, and the rows of the file's tensor that are its own (None: all of them)."""

    module: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Target:
    """What one name stands for. `shape`: of the weight that the file's adapter changes, parts stacked."""

    name: str
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    direct: bool  # the model's own name, not an alias

    @property
    def fused(self) -> bool:
        return len(self.parts) > 1


@dataclass(frozen=True)
class Foreign:
    """How to tell another family's LoRA: any of `marks` in a module's name, and `width` where it is given."""

    family: str
    marks: tuple[str, ...]
    width: int | None = None  # an input width that one of its modules has


FOREIGN = (
    Foreign("Stable Diffusion 1.5", ("_attn2_to_k", "_attn2_to_v"), 768),
    Foreign("Stable Diffusion XL", ("_attn2_to_k", "_attn2_to_v"), 2048),
    Foreign(
        "Stable Diffusion",
        ("input_blocks_", "output_blocks_", "middle_block_", "down_blocks_", "up_blocks_", "mid_block_"),
    ),
    Foreign("Stable Diffusion 3", ("joint_blocks_",)),
    Foreign("Flux", ("single_transformer_blocks_", "double_blocks_", "single_blocks_")),
    Foreign("Qwen-Image", ("_img_mlp_", "_txt_mlp_", "_img_mod_", "_txt_mod_", "transformer_blocks_59_")),
    Foreign("Wan", ("blocks_0_self_attn_", "blocks_0_cross_attn_", "blocks_0_ffn_")),
    Foreign("another diffusion transformer", ("transformer_blocks_",)),
)


def normal(name: str) -> str:
    """The one spelling that names are compared in. As long as `name` itself."""
    return name.replace(".", "_").replace("-", "_")


@dataclass(frozen=True, eq=False)
class ModelNames:
    """Every name that a LoRA file may use for the modules of one model.

    family: the model's name in sentences. shapes: of each module's weight, by the module's name.
    targets: by normal spelling.
    """

    family: str
    shapes: Mapping[str, tuple[int, ...]]
    targets: Mapping[str, Target]

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        aliases: Iterable[Alias] = (),
        family: str = "this model",
    ) -> ModelNames:
        """The table of a model. An alias counts wherever its modules stand beside each other.

        shapes: module name -> shape of its weight: [out, in] of a linear, [dim] of a norm.
        ValueError when two names become one.
        """
        targets: dict[str, Target] = {}
        named = [Target(name, (Part(name),), tuple(shape), True) for name, shape in shapes.items()]
        for target in (*named, *(found for alias in aliases for found in _places(alias, shapes))):
            known = targets.setdefault(normal(target.name), target)
            if known != target:
                raise ValueError(f"'{known.name}' and '{target.name}' cannot be told apart")
        return cls(family, dict(shapes), targets)

    def resolve(self, name: str) -> tuple[str, Target] | None:
        """(prefix as written, target) of a module's name in a file; None when it is no module of ours."""
        rest = normal(name)
        for _ in range(MAX_PREFIXES + 1):
            if rest in self.targets:
                return name[: len(name) - len(rest)], self.targets[rest]
            prefix = PREFIX.match(rest)
            if prefix is None:
                return None
            rest = rest[prefix.end() :]
        return None


def _places(alias: Alias, shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Target]:
    """The targets that an alias has in a model: one for each parent that has all of its modules."""
    first = alias.modules[0]
    for name in shapes:
        if name != first and not name.endswith("." + first):
            continue
        modules = [name[: len(name) - len(first)] + module for module in alias.modules]
        if not all(module in shapes for module in modules):
            continue
        parts, start = [], 0
        for module in modules:
            parts.append(Part(module, (start, start + shapes[module][0])))
            start += shapes[module][0]
        if len(parts) == 1:
            parts = [Part(name)]
        shape = (start, *shapes[name][1:])
        yield Target(name[: len(name) - len(first)] + alias.name, tuple(parts), shape, False)


def is_text_encoder(name: str) -> bool:
    return normal(name[:MAX_MARK]).startswith(TEXT_ENCODER)


def foreign_family(names: Iterable[str], widths: Iterable[int]) -> str:
    """The family whose marks these module names and input widths bear; "" when none is known."""
    spelled, widths = [normal(name) for name in islice(names, MAX_JUDGED)], set(widths)
    for rule in FOREIGN:
        if rule.width is not None and rule.width not in widths:
            continue
        if any(mark in name for mark in rule.marks for name in spelled):
            return rule.family
    return ""
