"""What Wan2GP says in other words: its names, letters and spellings, as its files and pictures have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shared.settings.messages import nearest, show
from shared.settings.table import ALL_ONE, LINES, PARAGRAPHS, SETTINGS, SettingsError, solver_name

#: letters of video_prompt_type -> what to follow in the control picture
GUIDES = {"P": "pose", "D": "depth", "E": "canny"}
#: how multi_prompts_gen_type is written besides; W are lines and paragraphs of videos
PROMPT_MODES = {
    "": ALL_ONE, "2": ALL_ONE, "0": LINES, "1": LINES, "W": LINES, "P": PARAGRAPHS, "PW": PARAGRAPHS,
}  # fmt: skip

#: key of unified_sampler_config -> the setting that it is
SAMPLER_KEYS = {"sampling_steps": "num_inference_steps"} | {
    name: name for name, one in SETTINGS.items() if one.group == "sampler" and name != "sample_solver"
}

NOTE = "a note of the program that wrote the file"
# Names that Wan2GP writes into its settings files and images, by the reason they do nothing here.
# A name that also stands in SETTINGS acts: SETTINGS is asked first.
_WAN2GP_NAMES = {
    "ZGP does not offer it": """
        loras_choices
        control_net_weight2 masking_strength image_refs image_prompt_type video_prompt_type
        spatial_upsampling film_grain_intensity film_grain_saturation prompt_enhancer
        multi_images_gen_type repeat_generation output_filename override_profile""",
    "on TwinFlow models its keys act as settings": "unified_sampler_config",
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
    NOTE: """
        zgp type settings_version base_model_type model_filename image_mode mode state lset_name client_id
        creation_date creation_timestamp generation_time extra_info quantization""",
}
WAN2GP_SETTINGS: dict[str, str] = {
    name: reason for reason, names in _WAN2GP_NAMES.items() for name in names.split()
}


def why_idle(name: str) -> str:
    """Why a name of Wan2GP's does nothing here; "" when it is none."""
    reason = WAN2GP_SETTINGS.get(name, "")
    return reason if reason in ("", NOTE) else f"a setting of Wan2GP; {reason}"


def in_our_words(given: dict[str, Any], unified: bool = False) -> dict[str, Any]:
    """Wan2GP's spellings of what has another one here. unified: for a model of the unified sampler.

    Raises SettingsError for a unified_sampler_config that cannot be used.
    """
    if unified:
        given = _without_sampler_config(given)
    mode = str(given.get("multi_prompts_gen_type", ALL_ONE)).upper()
    if mode in PROMPT_MODES:
        given = given | {"multi_prompts_gen_type": PROMPT_MODES[mode]}
    return _without_outpainting(_without_letters(_without_upsampling(given)))


def _without_sampler_config(given: dict[str, Any]) -> dict[str, Any]:
    """The keys of unified_sampler_config replace the settings that they are; None and "" leave those as they
    are.
    """
    if isinstance(given.get("sample_solver"), str):
        given = given | {"sample_solver": solver_name(given["sample_solver"])}
    if "unified_sampler_config" not in given:
        return given
    config = given["unified_sampler_config"] or {}
    if not isinstance(config, Mapping):
        raise SettingsError(
            [f"unified_sampler_config came as {show(config)}; expected an object of names and values"]
        )
    if unknown := [str(name) for name in config if name not in SAMPLER_KEYS]:
        near = nearest(unknown[0], SAMPLER_KEYS) or next(iter(SAMPLER_KEYS))
        sentence = f"has the unknown key {show(unknown[0])}; the nearest known one is {near}"
        raise SettingsError([f"unified_sampler_config {sentence}"])
    set_ = {SAMPLER_KEYS[name]: value for name, value in config.items() if value is not None and value != ""}
    others = {name: value for name, value in given.items() if name != "unified_sampler_config"}
    return others | set_


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
    followed = next((name for letter, name in GUIDES.items() if letter in letters), "as_it_is")
    translated: dict[str, Any] = {"control_preprocessor": followed, "image_guide": pictures["image_guide"]}
    if "A" in letters and pictures["image_mask"]:
        translated |= {"image_start": pictures["image_guide"], "image_mask": pictures["image_mask"]}
        translated["denoising_strength"] = 1.0
        if followed == "as_it_is":
            del translated["image_guide"]  # a photograph is no map
    return translated | others


def letters_of(preprocessor: str) -> str:
    """The video_prompt_type of a control picture that is followed so."""
    return "".join(letter for letter, guide in GUIDES.items() if guide == preprocessor) + "V"
