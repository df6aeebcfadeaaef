"""The one list of generation parameters: the page, the command line, REST and the metadata all read it.

Field names are Wan2GP's, so its settings files and image metadata import. Beside it: validation.py checks
values, parsing.py reads texts with a form of their own, wan2gp.py translates.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import UserError
from shared.settings.messages import printable

MAX_SEED = 2**53 - 1  # the largest whole number that survives JSON and JavaScript unchanged
MAX_PATH = 4096
MAX_PROBLEM = 600  # characters of one problem; what came is shortened where a sentence is made
#: names of shared.imaging.preprocess.PREPROCESSORS, which needs OpenCV
PREPROCESSORS = ("as_it_is", "canny", "lines", "scribble", "gray", "tile", "depth", "pose")
#: sampler presets that take so many steps, whatever num_inference_steps says
FIXED_STEPS = {"unified_2s": 2, "unified_4s": 4}
#: attention methods beside PyTorch's own, and the package that each needs
ATTENTION_PACKAGES = {"flash": "flash_attn", "_flash_3": "flash_attn_interface", "sage": "sageattention"}
ANY_PRECISION = "auto"
#: values of multi_prompts_gen_type
ALL_ONE, LINES, PARAGRAPHS = "FG", "G", "PG"
#: what follows the user, and not the model, from one model to the next
OF_THE_USER = ("prompt", "negative_prompt", "multi_prompts_gen_type", "seed", "batch_size", "image_format")
#: texts with choices and wildcards -> where they are kept once drawn
TEMPLATES = {"prompt": "prompt_template", "negative_prompt": "negative_prompt_template"}


def solver_name(text: str) -> str:
    """A sampler preset as the table has it: any other unified_* is the documents' word for unified."""
    name = text.strip().lower()
    return "unified" if name.startswith("unified_") and name not in FIXED_STEPS else name


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One generation parameter. For texts, `minimum` and `maximum` count characters; for lists, entries."""

    name: str
    kind: type  # str, int, float, bool, or list: of texts
    default: object
    label: str
    help: str
    group: str = "main"  # or prompt, guidance, sampler, pictures, hires, loras, advanced, output
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    more_choices: str = ""  # the model's capability that lists further ones
    needs: str = ""  # the model's capability that makes it act; "" = every model
    numbers: bool = False  # a text of numbers: one number, or a list of them, is written out
    pairs: bool = False  # a text of name=value pairs: an object is written out
    picture: bool = False  # a text that is the path of a picture; "" = none
    companions: tuple[str, ...] = ()  # it acts while one of these is above `above`, or given, or true
    above: float = 0
    levels: int = 0  # the unified sampler's: it acts from so many noise levels on, that the companions make


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting(
            name="model_type", kind=str, default="z_image_mini", label="Model", minimum=1, maximum=200,
            help="The model that paints the picture. Turbo models need few steps; Base models follow "
            "guidance and negative prompts.",
        ),
        Setting(
            name="precision", kind=str, default=ANY_PRECISION, label="Precision",
            choices=(ANY_PRECISION,), more_choices="precisions", needs="precisions",
            help="Which of the model's files paints: bf16 is the most exact, int8 is half its size. auto "
            "takes one that is here, else the one that suits this computer best.",
        ),
        Setting(
            name="prompt", kind=str, default="", label="Prompt", minimum=1, maximum=100_000,
            help="Describe the picture in plain words: subject, setting, light, style. English and Chinese "
            "work best with the large models.",
        ),
        Setting(
            name="negative_prompt", kind=str, default="", label="Negative prompt", maximum=100_000,
            needs="negative_prompt",
            companions=("guidance_scale", "NAG_scale"), above=1,
            help="What the picture should not show. It acts only while guidance (or NAG, on Turbo models) is "
            "on.",
        ),
        Setting(
            name="multi_prompts_gen_type", kind=str, default=ALL_ONE, label="The box is", group="prompt",
            choices=(ALL_ONE, LINES, PARAGRAPHS),
            help="Whether the text is one prompt (FG), or each line (G) or each paragraph (PG) makes "
            "pictures of its own.",
        ),
        Setting(
            name="prompt_template", kind=str, default="", label="Template of the prompt", group="prompt",
            maximum=100_000,
            help="The text that the prompt was drawn from. With it, the prompt is taken as it stands.",
        ),
        Setting(
            name="negative_prompt_template", kind=str, default="", label="Template of the negative prompt",
            group="prompt", maximum=100_000, needs="negative_prompt",
            help="The text that the negative prompt was drawn from.",
        ),
        Setting(
            name="resolution", kind=str, default="1024x1024", label="Resolution",
            help="Width x height in pixels, both multiples of 16. Larger pictures show more detail and take "
            "more time and memory.",
        ),
        Setting(
            name="num_inference_steps", kind=int, default=8, label="Steps", minimum=1, maximum=100, step=1,
            help="How many times the picture is refined. More steps add detail up to the model's usual "
            "number and cost time in proportion.",
        ),
        Setting(
            name="seed", kind=int, default=-1, label="Seed", minimum=-1, maximum=MAX_SEED, step=1,
            help="The start noise: the same seed and settings give the same picture, another seed another "
            "picture. -1 picks a random one.",
        ),
        Setting(
            name="batch_size", kind=int, default=1, label="Images", minimum=1, maximum=16, step=1,
            help="How many pictures to make. Each uses the next seed, so every one of them can be made again "
            "alone.",
        ),
        Setting(
            name="guidance_scale", kind=float, default=4.0, label="Guidance", minimum=0, maximum=20, step=0.1,
            group="guidance", needs="guidance",
            help="How strongly the picture follows the prompt and avoids the negative prompt. Too much burns "
            "colours; 1 or less turns guidance off and halves the time.",
        ),
        Setting(
            name="flow_shift", kind=float, default=3.0, label="Flow shift", minimum=1, maximum=10, step=0.1,
            group="guidance", needs="flow_shift",
            help="Where the steps are spent: higher values work longer on the composition, lower values on "
            "fine detail.",
        ),
        Setting(
            name="cfg_normalization", kind=float, default=0.0, label="Guidance limit", minimum=0, maximum=2,
            step=0.05, group="guidance", needs="guidance",
            companions=("guidance_scale",), above=1,
            help="Limits how far guidance may push contrast and colour; lower values tame harsh pictures, "
            "0 turns the limit off. Acts while guidance is above 1.",
        ),
        Setting(
            name="cfg_truncation", kind=float, default=1.0, label="Guidance end", minimum=0, maximum=1,
            step=0.05, group="guidance", needs="guidance",
            companions=("guidance_scale",), above=1,
            help="The part of the way from noise to picture that is guided. 1 guides to the end; less gives "
            "softer detail and saves time. Acts while guidance is above 1.",
        ),
        Setting(
            name="NAG_scale", kind=float, default=1.0, label="NAG scale", minimum=1, maximum=20, step=0.05,
            group="guidance", needs="NAG",
            help="How strongly the picture moves away from the negative prompt. 1 is off and costs nothing; "
            "start with 3 to 6.",
        ),
        Setting(
            name="NAG_tau", kind=float, default=3.5, label="NAG limit", minimum=1, maximum=10, step=0.1,
            group="guidance", needs="NAG",
            companions=("NAG_scale",), above=1,
            help="How far one place of the picture may be pushed. Lower values keep the picture closer to "
            "the one without NAG. Acts while the NAG scale is above 1.",
        ),
        Setting(
            name="NAG_alpha", kind=float, default=0.5, label="NAG blend", minimum=0, maximum=1, step=0.05,
            group="guidance", needs="NAG",
            companions=("NAG_scale",), above=1,
            help="How much of the pushed picture is mixed in: 0 none, 1 all of it. Acts while the NAG scale "
            "is above 1.",
        ),
        Setting(
            name="seed_variety", kind=float, default=0.0, label="Seed variety", minimum=0, maximum=2,
            step=0.05, group="guidance", needs="seed_variety",
            help="Makes pictures of one prompt differ more, at the price of following it less closely: noise "
            "on what the model reads, another one for each seed. 0 is off; begin with 0.5 to 1.",
        ),
        Setting(
            name="seed_variety_share", kind=float, default=50.0, label="Seed variety: share (%)", minimum=0,
            maximum=100, step=5, group="guidance", needs="seed_variety",
            companions=("seed_variety",),
            help="How much of what the model reads gets noise. Acts with seed variety.",
        ),
        Setting(
            name="seed_variety_until", kind=float, default=50.0, label="Seed variety: end (%)", minimum=0,
            maximum=100, step=5, group="guidance", needs="seed_variety",
            companions=("seed_variety",),
            help="The part of the steps that sees the noise; the steps after it see the clean prompt. Acts "
            "with seed variety.",
        ),
        Setting(
            name="sample_solver", kind=str, default="unified", label="Sampler preset", group="sampler",
            choices=("", "unified", "unified_2s", "unified_4s", "twinflow"), needs="unified",
            help="unified suits the number of steps; unified_2s and unified_4s always take 2 and 4 steps.",
        ),
        Setting(
            name="sampling_style", kind=str, default="", label="Aim of a step", group="sampler",
            choices=("", "few", "any", "mul"), needs="unified",
            help="few jumps to the finished picture each time (1-2 steps), any to the next step (3-4), mul "
            "follows the path closely (5 and more).",
        ),
        Setting(
            name="stochast_ratio", kind=str, default="1", label="Fresh noise", group="sampler", maximum=40,
            needs="unified", numbers=True,
            companions=("num_inference_steps", "sampling_order"), levels=2,
            help="How much of the noise is new at each step: 0 none, 1 all, up to 2 for more than all, or "
            "SDE to let the step's size decide. Acts from 2 noise levels on: steps / order, rounded up.",
        ),
        Setting(
            name="extrapol_ratio", kind=float, default=0.0, label="Extrapolation", minimum=0, maximum=1,
            step=0.05, group="sampler", needs="unified",
            companions=("num_inference_steps", "sampling_order"), levels=4,
            help="How far each step goes on in the direction of the change since the last one. Acts from 4 "
            "noise levels on: steps / order, rounded up.",
        ),
        Setting(
            name="sampling_order", kind=int, default=1, label="Order", minimum=1, maximum=3, step=1,
            group="sampler", needs="unified",
            help="Predictions that one step combines. Orders 2 and 3 make fewer, more exact steps in about "
            "the same time; best with mul.",
        ),
        Setting(
            name="time_dist_ctrl", kind=str, default="1,1,1", label="Time curve", group="sampler",
            maximum=100, needs="unified", numbers=True,
            help="Three numbers from 0.1 to 10 that bend the times of the steps, drawn below. 1,1,1 is "
            "straight.",
        ),
        Setting(
            name="rfba_gap_steps", kind=str, default="", label="Time gaps", group="sampler", maximum=100,
            needs="unified", numbers=True,
            help="Two numbers: what the times leave out at the noisy and at the clean end. Empty is the "
            "preset's, for example 0.001,0.6.",
        ),
        Setting(
            name="image_start", kind=str, default="", label="Picture", group="pictures", maximum=MAX_PATH,
            needs="image", picture=True,
            help="A picture to start from: it is changed as far as the strength of the change lets it.",
        ),
        Setting(
            name="denoising_strength", kind=float, default=0.75, label="Strength of the change", minimum=0,
            maximum=1, step=0.01, group="pictures", needs="image",
            companions=("image_start",),
            help="0 gives the picture back as it is, 1 paints without looking at it. Acts with a picture, or "
            "where its mask is white.",
        ),
        Setting(
            name="image_mask", kind=str, default="", label="Mask", group="pictures", maximum=MAX_PATH,
            needs="inpaint", picture=True,
            companions=("image_start",),
            help="White where the picture is painted anew; every pixel elsewhere stays exactly as it is.",
        ),
        Setting(
            name="mask_expand", kind=int, default=0, label="Grow the mask", minimum=-50, maximum=50, step=1,
            group="pictures", needs="inpaint",
            companions=("image_mask",),
            help="Pixels that the mask grows on all sides; below 0 it shrinks. Acts with a mask.",
        ),
        Setting(
            name="mask_feather", kind=float, default=8.0, label="Soft edge", minimum=0, maximum=100, step=1,
            group="pictures", needs="inpaint",
            companions=("image_mask",),
            help="Pixels over which the new part fades in, inside of the mask. Acts with a mask.",
        ),
        Setting(
            name="mask_only", kind=bool, default=False, label="Paint only around the mask", group="pictures",
            needs="inpaint",
            companions=("image_mask",),
            help="That part is painted alone, in full detail, and the picture keeps its own size. Acts with "
            "a mask.",
        ),
        Setting(
            name="mask_margin", kind=int, default=64, label="Surroundings", minimum=0, maximum=1024, step=8,
            group="pictures", needs="inpaint",
            companions=("mask_only",),
            help="Pixels around the mask that are looked at. Acts where only that part is painted.",
        ),
        Setting(
            name="outpaint", kind=str, default="", label="Extend beyond the borders", group="pictures",
            maximum=60, needs="inpaint", numbers=True,
            companions=("image_start",),
            help="How far the picture is painted on to the left, top, right and bottom, in pixels or, with a "
            "% sign, in parts of it: 0,0,64,0 or 25%,0,25%,0. What is there stays exactly as it is.",
        ),
        Setting(
            name="image_guide", kind=str, default="", label="Control picture", group="pictures",
            maximum=MAX_PATH, needs="control", picture=True,
            help="A picture whose lines, depth or poses the new one follows.",
        ),
        Setting(
            name="control_preprocessor", kind=str, default="canny", label="What to follow", group="pictures",
            choices=PREPROCESSORS, needs="control",
            companions=("image_guide",),
            help="What is taken from the control picture. as_it_is is for pictures that are control maps "
            "already.",
        ),
        Setting(
            name="control_parameters", kind=str, default="", label="Details of it", group="pictures",
            maximum=1000, needs="control", pairs=True,
            companions=("image_guide",),
            help="Thresholds and the like, for example low=50, high=150; what is left out is as usual.",
        ),
        Setting(
            name="control_net_weight", kind=float, default=0.75, label="Control strength", minimum=0,
            maximum=2, step=0.01, group="pictures", needs="control",
            companions=("image_guide",),
            help="How closely the picture follows: 0.65 to 1 is usual, 0 turns control off.",
        ),
        Setting(
            name="control_start", kind=float, default=0.0, label="Control start (%)", minimum=0, maximum=100,
            step=1, group="pictures", needs="control",
            companions=("image_guide",),
            help="Control acts from this part of the steps on; the steps before are free, and faster.",
        ),
        Setting(
            name="control_end", kind=float, default=100.0, label="Control end (%)", minimum=0, maximum=100,
            step=1, group="pictures", needs="control",
            companions=("image_guide",),
            help="Control acts up to this part of the steps; ending early frees the fine detail.",
        ),
        Setting(
            name="hires_scale", kind=float, default=1.0, label="Enlarge", minimum=1, maximum=4, step=0.05,
            group="hires", needs="hires",
            help="How many times wider and higher the finished picture becomes; 1 leaves it as it is. A "
            "picture to start from with strength 0 is enlarged from its own size.",
        ),
        Setting(
            name="hires_upscaler", kind=str, default="lanczos", label="Enlarged by", maximum=200,
            choices=("lanczos",), more_choices="upscalers", group="hires", needs="hires",
            companions=("hires_scale",), above=1,
            help="Lanczos, which adds nothing of its own, or an upscaler model of the folder "
            "ckpts/upscalers. Acts when the picture is enlarged.",
        ),
        Setting(
            name="hires_denoising_strength", kind=float, default=0.3, label="New detail", minimum=0,
            maximum=1, step=0.01, group="hires", needs="hires",
            companions=("hires_scale",), above=1,
            help="How far the enlarged picture is painted anew: 0 not at all, 0.2 to 0.4 adds detail, more "
            "changes the picture. Acts when the picture is enlarged.",
        ),
        Setting(
            name="hires_steps", kind=int, default=0, label="Steps of the second pass", minimum=0, maximum=100,
            step=1, group="hires", needs="hires",
            companions=("hires_scale",), above=1,
            help="0 is as many as the first pass. Of these it takes the part that its strength says. Acts "
            "when new detail is painted.",
        ),
        Setting(
            name="hires_tile", kind=int, default=0, label="Tile of the second pass", minimum=0, maximum=4096,
            step=16, group="hires", needs="hires",
            companions=("hires_scale",), above=1,
            help="0 paints the enlarged picture as a whole; a number in overlapping tiles of so many pixels, "
            "which takes less memory. With little new detail (0.1 to 0.3), or every tile shows the prompt.",
        ),
        Setting(
            name="activated_loras", kind=list, default=[], label="LoRAs", group="loras", maximum=100,
            needs="loras",
            help="Small files that teach the model a style, a person or an accelerator: files of the LoRA "
            "folder, or https addresses that are fetched when they are used.",
        ),
        Setting(
            name="loras_multipliers", kind=str, default="", label="LoRA strengths", group="loras",
            maximum=10_000, needs="loras",
            companions=("activated_loras",),
            help="One number for each LoRA, in their order, with blanks between; missing ones are 1. "
            "1,0.5 goes from 1 to 0.5 over the steps; # begins a comment.",
        ),
        Setting(
            name="loras_optional", kind=bool, default=False, label="Go on without LoRAs that cannot be used",
            group="loras", needs="loras",
            companions=("activated_loras",),
            help="When a LoRA is missing or does not fit the model, make the picture without it and say so, "
            "instead of refusing the job.",
        ),
        Setting(
            name="override_attention", kind=str, default="", label="Attention method", group="advanced",
            choices=("", "sdpa", *ATTENTION_PACKAGES), needs="attention",
            help="Which program compares all places of the picture with each other. sdpa is exact and always "
            "there; sage is faster and slightly less exact.",
        ),
        Setting(
            name="image_format", kind=str, default="png", label="File format", group="output",
            choices=("png", "jpeg", "webp"),
            help="PNG keeps every pixel exactly; JPEG and WebP files are smaller and lose a little. All "
            "three carry the settings.",
        ),
    )
}  # fmt: skip


class SettingsError(UserError):
    """Every problem of one set of settings, one sentence each, in `problems`. What came may be part of it, so
    it is cleaned here.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = [printable(problem, MAX_PROBLEM) for problem in problems]
        super().__init__("; ".join(self.problems))


def applies(setting: Setting, capabilities: Mapping[str, Any]) -> bool:
    """Whether the setting acts on a model with these capabilities."""
    return not setting.needs or bool(capabilities.get(setting.needs))


def idle(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings that do nothing beside these others, each with the sentence that says so."""
    solver = settings.get("sample_solver")
    steps = FIXED_STEPS.get(str(solver), settings.get("num_inference_steps"))
    values = {**settings, "num_inference_steps": steps}
    reasons = {}
    for setting in (SETTINGS[name] for name in settings if name in SETTINGS):
        companions = [SETTINGS[name] for name in setting.companions if name in settings]
        if setting.levels:
            order = values.get("sampling_order") or 1
            fewest = (setting.levels - 1) * order + 1
            if steps and steps < fewest:
                reasons[setting.name] = f"Acts from {fewest} steps on with order {order}."
        elif companions and not any(_is_on(values[one.name], setting.above) for one in companions):
            reasons[setting.name] = f"Acts {_while(companions, setting.above)}."
    if solver in FIXED_STEPS:
        reasons["num_inference_steps"] = f"The sampler preset {solver} always takes {steps} steps."
    return reasons


def _is_on(value: Any, above: float) -> bool:
    return value > above if isinstance(value, (int, float)) else bool(value)


def _while(companions: Iterable[Setting], above: float) -> str:
    names = " or ".join(one.label for one in companions)
    kind = next(iter(companions)).kind
    if kind in (int, float):
        return f"while {names} is above {above:g}"
    return f"while {names} is on" if kind is bool else f"with: {names}"


def levels_of(steps: int, order: int) -> int:
    """The noise levels above 0 that a run of the unified sampler visits."""
    return math.ceil(steps / order)


def random_seed() -> int:
    """A seed that leaves room for a whole batch below MAX_SEED and is short enough to be typed."""
    return secrets.randbelow(2**32)
