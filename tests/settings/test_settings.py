"""Settings: what is accepted, what is refused and in which words."""

import json
import subprocess
import sys

import pytest

from shared.errors import UserError
from shared.imaging.preprocess import PREPROCESSORS
from shared.settings import table as settings
from shared.settings.parsing import parse_parameters, parse_resolution
from shared.settings.table import SETTINGS, SettingsError
from shared.settings.validation import validate

TURBO = {"guidance": False, "flow_shift": False, "negative_prompt": False}
BASE = {"guidance": True, "flow_shift": True, "negative_prompt": True, "loras": True}
EVERY_MODEL = set("model_type prompt resolution num_inference_steps seed batch_size image_format".split())
EVERY_MODEL |= {"multi_prompts_gen_type", "prompt_template"}
NEGATIVE = {"negative_prompt", "negative_prompt_template"}
BASE_ONLY = {"negative_prompt", "guidance_scale", "flow_shift", "cfg_normalization", "cfg_truncation"}
LORAS = {"activated_loras", "loras_multipliers", "loras_optional"}


def check(capabilities=BASE, defaults=None, **values):
    return validate({"prompt": "a red circle", **values}, defaults or {}, capabilities)


def problems(capabilities=BASE, **values):
    with pytest.raises(SettingsError) as caught:
        check(capabilities, **values)
    return caught.value.problems


def test_the_table_is_complete_and_consistent():
    assert SETTINGS.keys() >= EVERY_MODEL | BASE_ONLY
    for name, setting in SETTINGS.items():
        assert setting.name == name
        assert setting.help and setting.label and setting.help.endswith(".")
        assert isinstance(setting.default, setting.kind)
        assert setting.group in (
            "main",
            "prompt",
            "guidance",
            "sampler",
            "pictures",
            "hires",
            "loras",
            "output",
            "advanced",
        )
        assert not setting.choices or setting.default in setting.choices


def test_a_prompt_alone_is_completed_from_the_table():
    turbo = check(TURBO)
    assert turbo.settings == {
        "model_type": "z_image_mini",
        "prompt": "a red circle",
        "multi_prompts_gen_type": "FG",
        "prompt_template": "",
        "resolution": "1024x1024",
        "num_inference_steps": 8,
        "seed": -1,
        "batch_size": 1,
        "image_format": "png",
    }
    assert turbo.ignored == {} and turbo.notes == []
    assert check(BASE).settings.keys() == EVERY_MODEL | BASE_ONLY | LORAS | NEGATIVE


def test_the_models_defaults_stand_between_the_values_and_the_table():
    model = {"num_inference_steps": 30, "resolution": "128x128", "guidance_scale": 3}
    settings = check(defaults=model, num_inference_steps=12).settings
    assert settings["num_inference_steps"] == 12
    assert settings["resolution"] == "128x128"
    assert settings["guidance_scale"] == 3.0 and isinstance(settings["guidance_scale"], float)


def test_null_means_the_default():
    assert check(defaults={"num_inference_steps": 30}, num_inference_steps=None, seed=None).settings == (
        check(defaults={"num_inference_steps": 30}).settings
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_inference_steps", "8", 8),
        ("num_inference_steps", 8.0, 8),
        ("num_inference_steps", "12.0", 12),
        ("guidance_scale", "4.5", 4.5),
        ("guidance_scale", 4, 4.0),
        ("guidance_scale", 0, 0.0),
        ("seed", 2**53 - 1, 9007199254740991),
        ("seed", "9007199254740991", 9007199254740991),
        ("seed", -1, -1),
        ("resolution", " 1024 X 768 ", "1024x768"),
        ("resolution", "1024×768", "1024x768"),
        ("negative_prompt", "", ""),
        ("image_format", "webp", "webp"),
        ("prompt", "一个红色的圆 🔴\n第二行", "一个红色的圆 🔴\n第二行"),
    ],
)
def test_values_that_mean_a_valid_one_are_accepted(name, value, expected):
    result = check(**{name: value}).settings[name]
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("resolution", "100x100", '"96x96"'),
        ("resolution", "1000x700", '"992x704"'),
        ("resolution", "16x1024", '"64x1024"'),
        ("resolution", "1024x999999", '"1024x8192"'),
        ("resolution", "0x0", '"64x64"'),
        ("resolution", "big", "width x height"),
        ("resolution", "-64x64", "width x height"),
        ("resolution", "9" * 5000 + "x64", "width x height"),
        ("resolution", [1024, 1024], "expected a text"),
        ("num_inference_steps", 0, "from 1 to 100"),
        ("num_inference_steps", -3, "from 1 to 100"),
        ("num_inference_steps", 101, "from 1 to 100"),
        ("num_inference_steps", 8.5, "a whole number"),
        ("num_inference_steps", True, "a whole number"),
        ("num_inference_steps", "many", '"many"'),
        ("num_inference_steps", "", "a whole number"),
        ("num_inference_steps", [8], "came as a list"),
        ("guidance_scale", float("nan"), "nan"),
        ("guidance_scale", float("inf"), "inf"),
        ("guidance_scale", "-inf", "from 0 to 20"),
        ("guidance_scale", -0.5, "from 0 to 20"),
        pytest.param("guidance_scale", 10**400, "from 0 to 20", id="guidance_scale-huge"),
        ("guidance_scale", {"a": 1}, "came as an object"),
        ("guidance_scale", False, "came as false"),
        ("seed", 10**30, "9007199254740991"),
        ("seed", 1e30, "9007199254740991"),
        pytest.param("seed", 10**6000, "about 6,001 digits", id="seed-huge"),
        ("seed", "9007199254740992", "9007199254740991"),
        ("seed", -2, "from -1"),
        ("batch_size", 17, "from 1 to 16"),
        ("prompt", "", "prompt is empty"),
        ("prompt", " \n\t", "prompt is empty"),
        ("prompt", ["a", "b"], "came as a list"),
        ("prompt", 5, "came as 5"),
        ("prompt", "x" * 100_001, "100,001 characters"),
        ("prompt", "half \ud83d", "half a character"),
        ("image_format", "gif", "one of png, jpeg, webp"),
        ("image_format", "\ud83d\n", "one of png, jpeg, webp"),
        ("model_type", "", "model_type is empty"),
    ],
)
def test_what_cannot_be_used_gets_one_clear_sentence(name, value, said):
    (sentence,) = problems(**{name: value})
    assert sentence.startswith(name) and said in sentence
    assert "expected" in sentence and "\n" not in sentence and len(sentence) < 200
    sentence.encode()  # printable anywhere


@pytest.mark.parametrize(
    "value", [float("inf"), float("nan"), "-inf", 10**400], ids=["inf", "nan", "-inf", "huge"]
)
def test_infinity_is_refused_without_limits_too(monkeypatch, value):
    monkeypatch.setitem(
        SETTINGS, "free", settings.Setting(name="free", kind=float, default=0.0, label="F", help="F.")
    )
    assert "expected a number" in problems(free=value)[0]


def test_all_problems_are_reported_at_once():
    found = problems(prompt="", resolution="100x100", num_inference_steps=0, guidance_scale="x", seed=10**30)
    assert [sentence.split()[0] for sentence in found] == [
        "prompt", "num_inference_steps", "seed", "guidance_scale", "resolution",
    ]  # fmt: skip
    error = SettingsError(found)
    assert isinstance(error, UserError) and str(error) == "; ".join(found)


def test_the_models_own_size_limits_count():
    mini = {**TURBO, "size_multiple": 32, "min_size": 128, "max_size": 256}
    assert '"128x256"' in problems(mini, resolution="120x300")[0]
    assert check(mini, resolution="160x256").settings["resolution"] == "160x256"


def test_every_seed_of_a_batch_is_itself_a_valid_seed():
    assert check(seed=2**53 - 4, batch_size=4)
    assert "9007199254740988" in problems(seed=2**53 - 3, batch_size=4)[0]


def test_a_setting_that_does_not_act_is_reported_and_left_out_whatever_its_value():
    result = check(TURBO, guidance_scale="nonsense", flow_shift=5)
    assert result.ignored == dict.fromkeys(["guidance_scale", "flow_shift"], "does not act on this model")
    assert not BASE_ONLY & result.settings.keys()


def test_unknown_keys_name_the_nearest_known_one():
    ignored = check(num_inference_step=3, Seed=1, steps=4, qqqq=1).ignored
    assert '"num_inference_steps"' in ignored["num_inference_step"]
    assert '"seed"' in ignored["Seed"]
    assert '"num_inference_steps"' in ignored["steps"]
    assert ignored["qqqq"] == "unknown setting"


def test_words_of_other_programs_are_named_in_ours():
    ignored = check(cfg=5, width=64, height=64, sampler="euler", lora="x", shift=3, qqqq=1, flow=2).ignored
    assert '"guidance_scale", where a CFG scale of 5 is 4' in ignored["cfg"]
    assert '"resolution", such as "1024x768"' in ignored["width"] and '"resolution"' in ignored["height"]
    assert '"activated_loras"' in ignored["lora"] and '"flow_shift"' in ignored["shift"]
    assert ignored["qqqq"] == ignored["flow"] == "unknown setting"  # no hint rather than a wrong one
    with pytest.raises(SettingsError) as refused:
        validate({"positive_prompt": "a red heart", "Steps": 2}, {}, {})
    assert '"positive_prompt" is "prompt" here, "Steps" is "num_inference_steps" here' in str(refused.value)


def test_empty_values_of_wan2gp_s_files_are_not_listed():
    empty = {"image_refs": [], "MMAudio_prompt": "", "custom_settings": {}, "skip_steps_start_step_perc": 0,
             "slg_switch": False, "audio_guide": None, "temporal_upsampling": "", "new_in_13": "",
             "control_net_weight2": 0.0, "image_mask": ""}  # fmt: skip
    assert check(TURBO, **empty).ignored == {}
    assert check(slg_switch=1, cfg=0).ignored.keys() == {"slg_switch", "cfg"}


def test_a_settings_file_of_wan2gp_is_accepted_and_its_other_keys_are_listed():
    wan2gp = json.loads("""{"type": "WanGP v12.60 - Z-Image Base 6B", "settings_version": 2.74,
        "model_type": "z_image_base", "image_mode": 1, "prompt": "a lighthouse", "negative_prompt": "people",
        "resolution": "1280x720", "video_length": 81, "batch_size": 2, "seed": 7, "num_inference_steps": 30,
        "guidance_scale": 4, "flow_shift": 6, "activated_loras": [], "loras_multipliers": "", "NAG_scale": 1,
        "video_guide": null, "creation_date": "2026-08-21T10:00:00"}""")
    result = validate(wan2gp, {}, BASE)
    kept = EVERY_MODEL | {"negative_prompt", "guidance_scale", "flow_shift"} | LORAS
    kept -= {"image_format", "loras_optional", "multi_prompts_gen_type", "prompt_template"}
    assert {name: result.settings[name] for name in kept} == {name: wan2gp[name] for name in kept}
    assert result.ignored.keys() == wan2gp.keys() - kept - {"video_guide"}  # null asks for nothing
    assert result.ignored.pop("NAG_scale") == "does not act on this model"
    notes = {"type", "settings_version", "image_mode", "creation_date"}
    assert {result.ignored.pop(name) for name in notes} == {"a note of the program that wrote the file"}
    assert all(reason.startswith("a setting of Wan2GP; ") for reason in result.ignored.values())


def test_what_a_picture_says_beside_its_settings_is_not_called_a_setting():
    ignored = check(type="ZGP 0.1.0 - Z-Image Mini", zgp={"version": "0.1.0"}).ignored
    assert ignored == dict.fromkeys(["type", "zgp"], "a note of the program that wrote the file")


NAG = {"NAG": True, "negative_prompt": True}
UNIFIED = {"unified": True}


def test_nag_and_the_sampler_act_where_the_model_has_them():
    named = {"NAG_scale", "NAG_tau", "NAG_alpha"}
    assert check(NAG).settings.keys() == EVERY_MODEL | NEGATIVE | named
    sampler = {name for name, setting in SETTINGS.items() if setting.group == "sampler"}
    assert check(UNIFIED, negative_prompt="x").settings.keys() == EVERY_MODEL | sampler
    assert check(UNIFIED, negative_prompt="x").ignored.keys() == {"negative_prompt"}
    assert [check(NAG).settings[name] for name in ("NAG_scale", "NAG_tau", "NAG_alpha")] == [1.0, 3.5, 0.5]


def test_numbers_are_written_out_where_a_text_of_numbers_is_expected():
    given = check(UNIFIED, stochast_ratio=0.5, time_dist_ctrl=[1, 2, 0.5], rfba_gap_steps="0.1,0.2").settings
    assert (given["stochast_ratio"], given["time_dist_ctrl"]) == ("0.5", "1,2,0.5")
    assert given["rfba_gap_steps"] == "0.1,0.2"
    assert problems(UNIFIED, time_dist_ctrl=[1, "x"]) == [
        'time_dist_ctrl came as a list; expected a text, for example "1,1,1"'
    ]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("unified_mul", "unified"),
        (" unified ", "unified"),
        ("Unified_anything", "unified"),
        ("UNIFIED_2S", "unified_2s"),
        ("TwinFlow", "twinflow"),
    ],
)
def test_the_samplers_other_names_are_understood(name, meant):
    assert check(UNIFIED, sample_solver=name).settings["sample_solver"] == meant


def test_unified_sampler_config_sets_what_its_keys_say():
    two = {
        "sampling_steps": 2, "stochast_ratio": 0.5, "extrapol_ratio": None, "sampling_order": 1,
        "time_dist_ctrl": [1.0, 1.0, 2.0], "rfba_gap_steps": [0.001, 0.6], "sampling_style": "",
    }  # fmt: skip
    found = check(UNIFIED, {"num_inference_steps": 8}, unified_sampler_config=two, sampling_order=3)
    assert found.ignored == {} and found.settings["num_inference_steps"] == 2
    expected = ("0.5", 0.0, 1, "1.0,1.0,2.0", "0.001,0.6", "")
    names = ("stochast_ratio", "extrapol_ratio", "sampling_order", "time_dist_ctrl", "rfba_gap_steps")
    assert tuple(found.settings[name] for name in (*names, "sampling_style")) == expected
    assert check(UNIFIED, unified_sampler_config="").settings == check(UNIFIED).settings
    elsewhere = check(TURBO, unified_sampler_config=two)
    assert elsewhere.settings == check(TURBO).settings
    assert "TwinFlow" in elsewhere.ignored["unified_sampler_config"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([1], "unified_sampler_config came as a list; expected an object"),
        ({"style": "few"}, 'unknown key "style"; the nearest known one is sampling_style'),
        ({"prompt": "no"}, 'unknown key "prompt"'),
        ({"sampling_order": 4}, "sampling_order came as 4; expected a whole number from 1 to 3"),
        ({"sampling_steps": 0}, "num_inference_steps came as 0; expected a whole number from 1 to 100"),
    ],
)
def test_a_sampler_config_that_cannot_be_used_gets_one_sentence(config, said):
    [problem] = problems(UNIFIED, unified_sampler_config=config)
    assert said in problem


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("sampling_style", "xyz", "one of few, any, mul"),
        ("sampling_order", 4, "a whole number from 1 to 3"),
        ("extrapol_ratio", 1.5, "a number from 0 to 1"),
        ("sample_solver", "euler", "one of unified, unified_2s, unified_4s, twinflow"),
        ("num_inference_steps", 1000, "a whole number from 1 to 100"),
        ("num_inference_steps", 0, "a whole number from 1 to 100"),
    ],
)
def test_the_samplers_ranges_are_named(name, value, said):
    [problem] = problems(UNIFIED, **{name: value})
    assert problem.startswith(f"{name} came as") and said in problem


@pytest.mark.parametrize(
    "name, value", [("NAG_scale", 0.9), ("NAG_scale", 21), ("NAG_tau", 0), ("NAG_alpha", 2)]
)
def test_nags_ranges_are_named(name, value):
    [problem] = problems(NAG, **{name: value})
    assert problem.startswith(f"{name} came as {float(value)}; expected a number from")


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("stochast_ratio", "abc", "from 0 to 2, or SDE"),
        ("stochast_ratio", "3", "from 0 to 2, or SDE"),
        ("rfba_gap_steps", [0.9, 0.6], "less than 1 together"),
        ("time_dist_ctrl", "1,1", "three numbers from 0.1 to 10"),
    ],
)
def test_the_family_checks_what_only_it_knows(name, value, said):
    from shared.library.catalog import catalog
    from tests.support.mini import ROOT

    models = catalog(ROOT, ROOT / "ckpts")
    with pytest.raises(SettingsError) as caught:
        models.validate({"model_type": "z_image_mini_twinflow", "prompt": "a star", name: value})
    [problem] = caught.value.problems
    assert problem.startswith(f"{name} came as") and said in problem


def test_extrapolation_that_drifts_away_is_not_offered():
    """The bounds are those of the scores in docs/twinflow.md."""
    from shared.library.catalog import catalog
    from tests.support.mini import ROOT

    models = catalog(ROOT, ROOT / "ckpts")
    both = {"model_type": "z_image_mini_twinflow", "prompt": "a star", "num_inference_steps": 4}
    both |= {"stochast_ratio": 2, "extrapol_ratio": 1}
    with pytest.raises(SettingsError, match="4 noise levels and stochast_ratio 2 drifts .* at most 0.5"):
        models.validate(both)
    fine = ({"stochast_ratio": 1}, {"stochast_ratio": "SDE"}, {"extrapol_ratio": 0.5}, {"sampling_order": 2})
    for change in fine:
        models.validate(both | change)  # order 2 has two levels here, where nothing is extrapolated
    long = both | {"num_inference_steps": 6, "stochast_ratio": 1}
    with pytest.raises(SettingsError, match="came as 1, which with 6 noise levels drifts .* at most 0.5"):
        models.validate(long)
    models.validate(long | {"extrapol_ratio": 0.5})
    with pytest.raises(SettingsError, match="expected at most 0"):
        models.validate(long | {"stochast_ratio": 2, "extrapol_ratio": 0.5})


@pytest.mark.parametrize("values", [None, [], "prompt", 3])
def test_settings_must_be_one_object(values):
    with pytest.raises(SettingsError, match="expected one object"):
        validate(values, {}, BASE)


def test_validated_settings_validate_to_themselves():
    once = check(seed="12", guidance_scale="2", resolution="64 x 80").settings
    assert validate(once, {}, BASE).settings == once
    assert validate(json.loads(json.dumps(once)), {}, BASE).settings == once


def test_parse_resolution():
    assert parse_resolution("1024x768") == (1024, 768)


def test_random_seeds_differ_and_leave_room_for_a_batch():
    seeds = {settings.random_seed() for _ in range(50)}
    assert len(seeds) > 45
    assert all(check(seed=seed, batch_size=16) for seed in seeds)


def test_importing_is_light():
    heavy = "{'torch', 'PIL', 'gradio'}"
    code = f"import sys, shared.settings.table, shared.library.cards; print({heavy} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


CONTROL = {**TURBO, "image": True, "inpaint": True, "control": True}


def test_pictures_act_where_the_model_can_use_them():
    assert "image_guide" not in check(TURBO).settings and "image_start" not in check(TURBO).settings
    given = check(
        CONTROL, image_guide="a.png", control_end=50, control_parameters={"low": 50, "invert": True}
    )
    assert given.settings["control_parameters"] == "low=50, invert=true"
    assert given.settings["control_end"] == 50.0 and given.ignored == {}
    assert check(TURBO, image_guide="a.png").ignored == {"image_guide": "does not act on this model"}


def test_the_preprocessors_are_those_there_are():
    assert settings.PREPROCESSORS == tuple(PREPROCESSORS)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("low=50, high = 150", {"low": 50, "high": 150}),
        ("length=2.5,invert=True,certainty=-1", {"length": 2.5, "invert": True, "certainty": -1}),
    ],
)
def test_parameters_are_read(text, values):
    read = parse_parameters(text)
    assert read == values and [type(x) for x in read.values()] == [type(x) for x in values.values()]


@pytest.mark.parametrize("text", ["low", "low=", "=3", "low=a", "low=50 high=3", "low=1e9", "low=__import__"])
def test_parameters_that_are_none_are_refused(text):
    with pytest.raises(SettingsError, match="expected pairs such as"):
        parse_parameters(text)


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("PV", {"image_guide": "a.png", "control_preprocessor": "pose"}),
        ("DV", {"image_guide": "a.png", "control_preprocessor": "depth"}),
        ("EV", {"image_guide": "a.png", "control_preprocessor": "canny"}),
        ("V", {"image_guide": "a.png", "control_preprocessor": "as_it_is"}),
        ("VA", {"image_guide": "", "image_start": "a.png", "image_mask": "m.png", "denoising_strength": 1.0}),
        ("PVA", {"image_guide": "a.png", "image_start": "a.png", "control_preprocessor": "pose"}),
        ("", {"image_guide": "", "image_mask": "", "image_start": ""}),
    ],
)
def test_the_letters_of_wan2gp_are_understood(letters, expected):
    given = check(CONTROL, video_prompt_type=letters, image_guide="a.png", image_mask="m.png")
    assert given.settings.items() >= expected.items() and given.ignored == {}
    own = {"control_preprocessor": "gray", "image_guide": "a.png", "video_prompt_type": "PV"}
    assert check(CONTROL, **own).settings["control_preprocessor"] == "gray"
