"""What other programs call our settings: never translated in silence, since their units may differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shared.settings.messages import nearest
from shared.settings.table import SETTINGS

MAX_NAMED = 8
ALIKE = 0.75  # of difflib: what is less alike is another word

#: our setting, and what a sentence adds about it -> the words of ComfyUI, A1111, SwarmUI, InvokeAI, diffusers
_WORDS = {
    ("prompt", ""): "positive_prompt positive text caption user_prompt",
    ("negative_prompt", ""): "negative negativeprompt uc",
    ("num_inference_steps", ""): "steps sampling_steps num_steps inference_steps",
    ("guidance_scale", ", where a CFG scale of 5 is 4"): "cfg cfg_scale cfgscale guidance scale",
    ("resolution", ', such as "1024x768"'): "width height size image_size w h aspect_ratio aspectratio",
    ("seed", ""): "noise_seed rand_seed random_seed",
    ("batch_size", ""): "n num_images num_images_per_prompt images batch_count n_iter batchsize",
    ("flow_shift", ""): "shift sigma_shift sigmashift mu",
    ("sample_solver", ", for TwinFlow models"): "sampler sampler_name sampler_index scheduler",
    ("activated_loras", ""): "lora loras lora_name lora_paths lora_names",
    ("loras_multipliers", ""): "lora_weight lora_weights lora_strength lora_scales loraweights",
    ("model_type", ""): "model checkpoint ckpt sd_model_checkpoint unet_name ckpt_name model_name",
    ("image_start", ""): "image init_image init_images input_image image_path",
    ("denoising_strength", ""): "denoise strength denoising image_strength",
    ("image_mask", ""): "mask mask_image",
    ("image_guide", ""): "control_image controlnet_image",
    ("control_net_weight", ""): "control_strength controlnet_conditioning_scale control_scale",
    ("hires_scale", ""): "upscale hr_scale upscale_by enable_hr",
    ("image_format", ""): "format output_format",
}  # fmt: skip
OTHER_WORDS: dict[str, tuple[str, str]] = {
    word: ours for ours, words in _WORDS.items() for word in words.split()
}


def unknown(name: str) -> str:
    """Why a name that is no setting does nothing, and the setting that was meant where that is certain."""
    if word := OTHER_WORDS.get(name.lower()):
        return f'unknown setting; here it is "{word[0]}"{word[1]}'
    like = nearest(name, SETTINGS, ALIKE)
    return f'unknown setting; the nearest known one is "{like}"' if like else "unknown setting"


def hints(given: Mapping[str, object], known: Iterable[str]) -> list[str]:
    """A sentence for the words of other programs in settings that cannot be used, since they may be why."""
    words = [name for name in given if name not in known and name.lower() in OTHER_WORDS][:MAX_NAMED]
    pairs = ", ".join(f'"{name}" is "{OTHER_WORDS[name.lower()][0]}" here' for name in words)
    return [f"words of other programs are not read: {pairs}"] if pairs else []
