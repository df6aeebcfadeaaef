"""The one list of generation parameters: the page, the command line, REST and the metadata all read it.

Field names are Wan2GP's, so its settings files and image metadata import. Nothing here is clamped: a value
that cannot be used is reported, all of them at once.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shared.errors import UserError

MAX_SEED = 2**53 - 1  # the largest whole number that survives JSON and JavaScript unchanged
MAX_ENTRY = 2000  # characters of one text of a list
MAX_PATH = 4096
#: names of shared.imaging.preprocess.PREPROCESSORS, which needs OpenCV
PREPROCESSORS = ("as_it_is", "canny", "lines", "scribble", "gray", "tile", "depth", "pose")
#: sampler presets that take so many steps, whatever num_inference_steps says
FIXED_STEPS = {"unified_2s": 2, "unified_4s": 4}
#: letters of Wan2GP's video_prompt_type -> what to follow in the control picture
WAN2GP_GUIDES = {"P": "pose", "D": "depth", "E": "canny"}
#: values of multi_prompts_gen_type
ALL_ONE, LINES, PARAGRAPHS = "FG", "G", "PG"
#: how Wan2GP writes them besides; its W are lines and paragraphs of videos
WAN2GP_PROMPT_MODES = {
    "": ALL_ONE, "2": ALL_ONE, "0": LINES, "1": LINES, "W": LINES, "P": PARAGRAPHS, "PW": PARAGRAPHS,
}  # fmt: skip
#: texts with choices and wildcards -> where they are kept once drawn
TEMPLATES = {"prompt": "prompt_template", "negative_prompt": "negative_prompt_template"}


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


#: attention methods beside PyTorch's own, and the package that each needs
ATTENTION_PACKAGES = {"flash": "flash_attn", "_flash_3": "flash_attn_interface", "sage": "sageattention"}

SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting(
            name="model_type", kind=str, default="z_image_mini", label="Model", minimum=1, maximum=200,
            help="The model that paints the picture. Turbo models need few steps; Base models follow "
            "guidance and negative prompts.",
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
            companions=("num_inference_steps",), above=1,
            help="How much of the noise is new at each step: 0 none, 1 all, up to 2 for more than all, or "
            "SDE to let the step's size decide. Acts from 2 steps on.",
        ),
        Setting(
            name="extrapol_ratio", kind=float, default=0.0, label="Extrapolation", minimum=0, maximum=1,
            step=0.05, group="sampler", needs="unified",
            companions=("num_inference_steps",), above=3,
            help="How far each step goes on in the direction of the change since the last one. Acts from 4 "
            "steps on.",
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

_NOTE = "a note of the program that wrote the file"
# Names that Wan2GP writes into its settings files and images, by the reason they do nothing here.
# A name that also stands in SETTINGS acts: SETTINGS is asked first.
_WAN2GP_NAMES = {
    "ZGP does not offer it yet": """
        unified_sampler_config loras_choices
        control_net_weight2 masking_strength image_refs image_prompt_type video_prompt_type
        spatial_upsampling film_grain_intensity film_grain_saturation prompt_enhancer
        multi_images_gen_type repeat_generation output_filename override_profile""",
    "no Z-Image model uses it": """
        control_net_weight_alt embedded_guidance_scale guidance2_scale guidance3_scale guidance_phases
        switch_threshold switch_threshold2 model_switch_phase alt_guidance_scale alt_scale slg_switch
        slg_layers slg_start_perc slg_end_perc apg_switch cfg_star_switch cfg_zero_step perturbation_switch
        perturbation_layers perturbation_start_perc perturbation_end_perc skip_steps_cache_type
        skip_steps_multiplier skip_steps_start_step_perc tea_cache_setting tea_cache_start_step_perc
        self_refiner_setting self_refiner_plan self_refiner_f_uncertainty self_refiner_certain_percentage
        remove_background_images_ref image_refs_relative_size model_mode custom_settings config temperature
        top_k top_p""",
    "it concerns videos": """
        video_length duration_seconds force_fps video_source video_guide video_mask video_guide_outpainting
        video_guide_outpainting_ratio keep_frames_video_source keep_frames_video_guide frames_positions
        frames_relative_positions_list image_end motion_amplitude sliding_window_size sliding_window_overlap
        sliding_window_overlap_noise sliding_window_color_correction_strength
        sliding_window_discard_last_frames temporal_upsampling RIFLEx_setting min_frames_if_references
        input_video_strength custom_guide""",
    "it concerns sound": """
        audio_guide audio_guide2 audio_source audio_prompt_type audio_guidance_scale audio_scale
        speakers_locations MMAudio_setting MMAudio_prompt MMAudio_neg_prompt pace exaggeration""",
    _NOTE: """
        zgp type settings_version base_model_type model_filename image_mode mode state lset_name client_id
        creation_date creation_timestamp generation_time extra_info quantization""",
}
WAN2GP_SETTINGS: dict[str, str] = {
    name: reason for reason, names in _WAN2GP_NAMES.items() for name in names.split()
}


class SettingsError(UserError):
    """Every problem of one set of settings, one sentence each, in `problems`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Validated:
    """What `validate` found: the complete settings, what does nothing here and why, what was substituted."""

    settings: dict[str, Any]
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def validate(
    values: Mapping[str, Any], defaults: Mapping[str, Any], capabilities: Mapping[str, Any]
) -> Validated:
    """Check `values` and complete them with the model's `defaults`, then with the table's; null = not given.

    `capabilities` is what the handler's query_model_def returns. Raises SettingsError with every problem.
    """
    if not isinstance(values, Mapping):
        raise SettingsError([f"Settings came as {_show(values)}; expected one object of names and values"])
    given = _in_our_words({str(name): value for name, value in values.items() if value is not None})
    settings: dict[str, Any] = {}
    problems: list[str] = []
    for setting in SETTINGS.values():
        if not applies(setting, capabilities):
            continue
        default = _first(defaults.get(setting.name), setting.default)
        if setting.more_choices:
            more = tuple(capabilities.get(setting.more_choices, ()))
            setting = replace(setting, choices=(*setting.choices, *more))
        try:
            settings[setting.name] = _convert(setting, given.get(setting.name, default), default)
        except _Unusable as error:
            problems.append(str(error))
    problems += _resolution_problems(settings, capabilities) + _batch_problems(settings)
    if problems:
        raise SettingsError(problems)
    return Validated(settings, _ignored(given, capabilities))


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
        if companions and not any(_is_on(values[one.name], setting.above) for one in companions):
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


def _in_our_words(given: dict[str, Any]) -> dict[str, Any]:
    """Wan2GP's spellings of what has another one here."""
    mode = str(given.get("multi_prompts_gen_type", ALL_ONE)).upper()
    if mode in WAN2GP_PROMPT_MODES:
        given = given | {"multi_prompts_gen_type": WAN2GP_PROMPT_MODES[mode]}
    return _without_outpainting(_without_letters(_without_upsampling(given)))


def _without_upsampling(given: dict[str, Any]) -> dict[str, Any]:
    """spatial_upsampling "lanczos2" enlarges the finished picture and paints nothing."""
    match = re.fullmatch(r"lanczos(\d(?:\.\d+)?)", str(given.get("spatial_upsampling", "")))
    if match is None or "hires_scale" in given:
        return given
    others = {name: value for name, value in given.items() if name != "spatial_upsampling"}
    return others | {"hires_scale": float(match[1]), "hires_denoising_strength": 0.0}


def _without_outpainting(given: dict[str, Any]) -> dict[str, Any]:
    """video_guide_outpainting "10 0 25 0" extends its picture to the top, bottom, left and right, in percent;
    with a # before it, it is switched off.
    """
    text = given.get("video_guide_outpainting")
    parts = text.split() if isinstance(text, str) else []
    if len(parts) != 4 or not all(part.isdecimal() for part in parts) or "outpaint" in given:
        return given
    others = {name: value for name, value in given.items() if name != "video_guide_outpainting"}
    picture = given.get("image_start") or given.get("image_guide")
    if not any(map(int, parts)) or not picture:
        return others if picture else given
    if given.get("control_preprocessor") == "as_it_is":
        others.pop("image_guide", None)  # a photograph is no map
    top, bottom, left, right = parts
    painted = {"outpaint": f"{left}%,{top}%,{right}%,{bottom}%", "denoising_strength": 1.0}
    return {"image_start": picture} | painted | others


def _without_letters(given: dict[str, Any]) -> dict[str, Any]:
    """Wan2GP says in letters what the pictures of its settings files are for; ours say it by their names.

    V: image_guide is a control picture, P, D, E made into a map first. A with it: image_mask is a mask on
    that same picture.
    """
    letters = given.get("video_prompt_type")
    if not isinstance(letters, str) or "control_preprocessor" in given:
        return given
    pictures = {name: given.get(name) for name in ("image_guide", "image_mask")}
    others = {name: value for name, value in given.items() if name not in {*pictures, "video_prompt_type"}}
    if "V" not in letters or not pictures["image_guide"]:
        return others
    followed = next((name for letter, name in WAN2GP_GUIDES.items() if letter in letters), "as_it_is")
    translated: dict[str, Any] = {"control_preprocessor": followed, "image_guide": pictures["image_guide"]}
    if "A" in letters and pictures["image_mask"]:
        translated |= {"image_start": pictures["image_guide"], "image_mask": pictures["image_mask"]}
        translated["denoising_strength"] = 1.0
        if followed == "as_it_is":
            del translated["image_guide"]  # a photograph is no map
    return translated | others


def random_seed() -> int:
    """A seed that leaves room for a whole batch below MAX_SEED and is short enough to be typed."""
    return secrets.randbelow(2**32)


def parse_resolution(text: str) -> tuple[int, int]:
    """(width, height) in pixels of "WxH"; raises SettingsError when the text has another form."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*[xX×*]\s*(\d{1,9})\s*", text)
    if match is None:
        raise SettingsError(
            [f'resolution came as {_show(text)}; expected width x height in pixels, for example "1024x1024"']
        )
    return int(match[1]), int(match[2])


def parse_parameters(text: str) -> dict[str, int | float | bool]:
    """The pairs of a text such as "low=50, invert=true"; SettingsError when it has another form."""
    values: dict[str, int | float | bool] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\w+)\s*=\s*(true|false|[-+]?\d{1,9}(\.\d{1,9})?)", pair, re.IGNORECASE)
        if match is None:
            raise SettingsError(
                [f'control_parameters has {_show(pair)}; expected pairs such as "low=50, high=150"']
            )
        number = float if match[3] else int
        values[match[1]] = _FLAGS[flag] if (flag := match[2].lower()) in _FLAGS else number(flag)
    return values


def parse_outpaint(text: str, width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels, of a text such as "0,0,64,0" or "25%,0,25%,0" for a picture of
    width x height; SettingsError when it has another form.
    """
    parts = re.findall(r"\s*(\d{1,5})\s*(%?)\s*(?:,|$)", text)
    if not text.strip():
        return 0, 0, 0, 0
    if len(parts) != 4 or text.count(",") != 3 or not re.fullmatch(r"[\d\s,%]+", text):
        raise SettingsError(
            [
                f"outpaint came as {_show(text)}; expected how far to go on to the left, top, right and "
                'bottom, in pixels or percent, for example "0,0,64,0" or "25%,0,25%,0"'
            ]
        )
    sides = (width, height, width, height)
    left, top, right, bottom = (
        round(side * int(number) / 100) if percent else int(number)
        for (number, percent), side in zip(parts, sides, strict=True)
    )
    return left, top, right, bottom


_FLAGS = {"true": True, "false": False}


def nearest(name: str, known: Iterable[str]) -> str:
    """The name of `known` most like `name`, whatever its case; "" when none is alike."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    holding = [candidate for candidate in by_lower if len(name) > 2 and name.lower() in candidate]
    found = holding or difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[found[0]] if found else ""


# ---------------------------------------------------------------- one value


class _Unusable(Exception):
    """One value cannot be used; the text is the whole sentence."""


def _convert(setting: Setting, value: Any, example: Any) -> Any:
    if setting.numbers:
        value = _written_out(value)
    if setting.pairs and isinstance(value, dict):
        value = ", ".join(f"{name}={json.dumps(x, default=str)}" for name, x in value.items())
    try:
        converted = _CONVERTERS[setting.kind](value)
    except (TypeError, ValueError, OverflowError):
        raise _Unusable(_sentence(setting, value, example)) from None
    _CHECKERS.get(setting.kind, _check_number)(setting, converted, example)
    return converted


def _written_out(value: Any) -> Any:
    """Numbers as the text that a user would type; anything else as it is."""
    if isinstance(value, (list, tuple)) and all(type(x) in (int, float) for x in value):
        return ",".join(map(str, value))
    return str(value) if type(value) in (int, float) else value


def _to_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _to_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _to_integer(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _to_number(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _to_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _to_texts(value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
        raise TypeError
    return [text.strip() for text in value if text.strip()]


_CONVERTERS: dict[type, Callable[[Any], Any]] = {
    str: _to_text,
    int: _to_integer,
    float: _to_number,
    bool: _to_flag,
    list: _to_texts,
}
_KIND_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list of texts",
}


def _check_number(setting: Setting, value: Any, example: Any) -> None:
    low = -math.inf if setting.minimum is None else setting.minimum
    high = math.inf if setting.maximum is None else setting.maximum
    if not low <= value <= high:
        raise _Unusable(_sentence(setting, value, example))


def _check_text(setting: Setting, value: str, example: Any) -> None:
    if setting.choices and value not in setting.choices:
        raise _Unusable(_sentence(setting, value, example))
    problem = ""
    if setting.minimum and not value.strip():
        problem = f'is empty; expected some text, fill in "{setting.label}"'
    elif setting.maximum is not None and len(value) > setting.maximum:
        problem = f"is {len(value):,} characters long; expected at most {setting.maximum:,.0f}, shorten it"
    elif any("\ud800" <= character <= "\udfff" for character in value):
        problem = "holds half a character (a lone surrogate); expected valid text, type or paste it again"
    if problem:
        raise _Unusable(f"{setting.name} {problem}")


def _check_texts(setting: Setting, value: list[str], example: Any) -> None:
    if setting.maximum is not None and len(value) > setting.maximum:
        raise _Unusable(
            f"{setting.name} has {len(value):,} entries; expected at most {setting.maximum:,.0f}, shorten it"
        )
    for text in value:
        _check_text(replace(setting, maximum=MAX_ENTRY), text, example)


_CHECKERS: dict[type, Callable[[Setting, Any, Any], None]] = {str: _check_text, list: _check_texts}


def _sentence(setting: Setting, value: Any, example: Any) -> str:
    """What came, what was expected, what to do."""
    came = f"{setting.name} came as {_show(value)}; expected "
    if setting.choices:
        return f"{came}one of {', '.join(filter(None, setting.choices))}"
    expected = _KIND_WORDS[setting.kind]
    if setting.kind in (int, float) and setting.minimum is not None and setting.maximum is not None:
        expected += f" from {setting.minimum} to {setting.maximum}"
    return f"{came}{expected}" + (f", for example {_show(example)}" if example not in ("", [], value) else "")


def _show(value: Any) -> str:
    """The value as JSON users know it, printable and short enough for a sentence."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        shown = json.dumps(value if len(value) <= 60 else value[:57] + "…", ensure_ascii=False)
        return shown.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int) and abs(value) >= 10**40:  # Python refuses to print thousands of digits
        return f"a number of about {int(value.bit_length() * math.log10(2)) + 1:,} digits"
    if isinstance(value, (int, float)):
        return str(value)
    return _CONTAINER_WORDS.get(type(value), f"a value of type {type(value).__name__}")


_CONTAINER_WORDS: dict[type, str] = {dict: "an object", list: "a list", tuple: "a list"}


# ---------------------------------------------------------------- values together


def _resolution_problems(settings: dict[str, Any], capabilities: Mapping[str, Any]) -> list[str]:
    """Write the resolution in its one spelling, or say what is wrong with it."""
    if "resolution" not in settings:
        return []
    try:
        width, height = parse_resolution(settings["resolution"])
    except SettingsError as error:
        return error.problems
    settings["resolution"] = f"{width}x{height}"
    multiple = int(capabilities.get("size_multiple", 16))
    low, high = int(capabilities.get("min_size", 64)), int(capabilities.get("max_size", 8192))
    if all(low <= side <= high and side % multiple == 0 for side in (width, height)):
        return []
    valid = [_nearest_side(side, multiple, low, high) for side in (width, height)]
    return [
        f'resolution came as "{width}x{height}"; expected multiples of {multiple} from {low} to {high} '
        f'pixels, the nearest is "{valid[0]}x{valid[1]}"'
    ]


def _batch_problems(settings: Mapping[str, Any]) -> list[str]:
    """Image k uses seed + k, and each of these must itself be a valid seed."""
    seed, images = settings.get("seed", -1), settings.get("batch_size", 1)
    highest = MAX_SEED - images + 1
    if seed <= highest:
        return []
    return [f"seed came as {seed}; expected at most {highest} for {images} images, lower it"]


def _nearest_side(side: int, multiple: int, low: int, high: int) -> int:
    lowest, highest = -(-low // multiple), high // multiple
    return min(max(round(side / multiple), lowest), highest) * multiple


def _ignored(given: Mapping[str, Any], capabilities: Mapping[str, Any]) -> dict[str, str]:
    reasons = {name: _why_ignored(name, capabilities) for name in given}
    return {name: reason for name, reason in reasons.items() if reason}


def _why_ignored(name: str, capabilities: Mapping[str, Any]) -> str:
    """Why this name does nothing; "" when it acts."""
    if name in SETTINGS:
        return "" if applies(SETTINGS[name], capabilities) else "does not act on this model"
    if reason := WAN2GP_SETTINGS.get(name):
        return reason if reason == _NOTE else f"a setting of Wan2GP; {reason}"
    known = nearest(name, SETTINGS)
    return f'unknown setting; the nearest known one is "{known}"' if known else "unknown setting"


def _first(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
