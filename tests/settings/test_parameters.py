"""docs/parameters.md has every documented parameter with the default and the range of the settings table."""

import re

from shared.library.catalog import catalog
from shared.settings.table import SETTINGS, Setting
from tests.support.mini import ROOT

TEXT = (ROOT / "docs" / "parameters.md").read_text("utf-8")
ROWS = {
    match[1]: match[2].strip(" |").split(" | ") for match in re.finditer(r"^\| `(\w+)` \|(.*)$", TEXT, re.M)
}
BESIDE = ["negative_prompt", "resolution", "num_inference_steps", "seed", "batch_size", "override_attention"]
#: ranges that the table leaves to those who read the value, or that are shorter in words
IN_WORDS = {
    "seed": "-1 to 2^53 - 1",
    "stochast_ratio": "0 to 2, SDE",
    "time_dist_ctrl": "three numbers, 0.1 to 10",
    "rfba_gap_steps": "two numbers, 0 to 1",
}


def shown(value: object) -> str:
    return '""' if value == "" else f"{value:g}" if isinstance(value, (int, float)) else str(value)


def range_of(setting: Setting) -> str:
    if setting.name in IN_WORDS:
        return IN_WORDS[setting.name]
    if setting.choices:
        return ", ".join(map(shown, setting.choices))
    return "text" if setting.kind is str else f"{setting.minimum:g} to {setting.maximum:g}"


def test_every_parameter_of_guidance_and_sampler_has_its_row() -> None:
    grouped = [name for name, one in SETTINGS.items() if one.group in ("guidance", "sampler")]
    assert sorted(ROWS) == sorted([*grouped, *BESIDE])


def test_defaults_ranges_and_words_are_those_of_the_settings_table() -> None:
    for name, (default, range_, _, does) in ROWS.items():
        setting = SETTINGS[name]
        assert (default, range_, does) == (shown(setting.default), range_of(setting), setting.help), name


#: what the models' documents print as parameters of a call, a settings file or load_model
DOCUMENTED = """
guidance_scale flow_shift cfg_normalization cfg_truncation negative_prompt resolution num_inference_steps
seed batch_size NAG_scale NAG_tau NAG_alpha sample_solver sampling_style stochast_ratio extrapol_ratio
sampling_order time_dist_ctrl rfba_gap_steps unified_sampler_config sampling_steps quantizeTransformer
text_encoder_quantization VAE_dtype control_net_weight
""".split()


def test_the_documents_words_are_in_the_readme_and_in_the_table() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert [name for name in DOCUMENTED if f"`{name}`" not in readme] == []
    assert [name for name in DOCUMENTED if name not in TEXT] == []


ACTS_ON = {
    "all": {"z_image", "z_image_base", "z_image_control2_1", "z_image_twinflow_turbo"},
    "all but TwinFlow": {"z_image", "z_image_base", "z_image_control2_1"},
    "Base": {"z_image_base"},
    "Turbo, control": {"z_image", "z_image_control2_1"},
    "TwinFlow": {"z_image_twinflow_turbo"},
}


def test_each_acts_on_the_models_that_it_names() -> None:
    models = catalog(ROOT, ROOT / "ckpts").models
    for name, (_, _, acts_on, _) in ROWS.items():
        if acts_on in ACTS_ON:  # all but one, which needs a package
            acting = {model for model in ACTS_ON["all"] if name in models[model].settings}
            assert acting == ACTS_ON[acts_on], name
