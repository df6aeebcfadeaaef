"""Profiles: the shipped ones are valid for their models, and they come and go without the user's LoRAs."""

import json
from pathlib import Path

import pytest

from shared.cli.main import ROOT
from shared.library import profiles
from shared.library.catalog import catalog
from shared.library.profiles import Profile, apply, list_profiles
from shared.loras.strengths import parse
from shared.settings.validation import validate

SHIPPED = ROOT / "profiles" / "z_image"


def test_the_shipped_profiles_are_settings_of_their_models() -> None:
    found, broken = list_profiles(SHIPPED)
    assert len(found) >= 7 and broken == []
    for card in catalog(ROOT, ROOT / "ckpts").models.values():
        for profile in list_profiles(SHIPPED, card.architecture)[0]:
            assert profile.help and not profile.ignored
            settings = apply(profile, {**card.defaults, "prompt": "x"})
            given = validate(settings, card.defaults, card.capabilities).settings
            assert {
                name: given[name] for name in profile.settings if name in given
            }.items() <= settings.items()
            assert all("checked" in profile.help for url in profile.loras)
    names = [profile.name for profile in list_profiles(SHIPPED, "z_image")[0]]
    assert names == ["Turbo draft", "Turbo quality"]


ONE = Profile("one", ("fast.safetensors",), "0.8", {"num_inference_steps": 8})
TWO = Profile("two", ("a.safetensors", "b.safetensors"), "1,0", {"num_inference_steps": 4})
COMMENTED = Profile("three", ("c.safetensors",), "0.5 # weak")
PLAIN = Profile("plain", settings={"num_inference_steps": 50})


def test_a_profile_goes_in_front_and_another_takes_its_place() -> None:
    mine = {"activated_loras": ["me.safetensors"], "loras_multipliers": "0.7", "prompt": "x"}
    one = apply(ONE, mine)
    assert one == {
        "activated_loras": ["fast.safetensors", "me.safetensors"],
        "loras_multipliers": "0.8|0.7", "prompt": "x", "num_inference_steps": 8,
    }  # fmt: skip
    two = apply(TWO, one)
    assert two["activated_loras"] == ["a.safetensors", "b.safetensors", "me.safetensors"]
    assert parse(two["loras_multipliers"], 3).tokens == (((1.0, 0.0),), ((1.0,),), ((0.7,),))
    three = apply(COMMENTED, two)
    assert three["activated_loras"] == ["c.safetensors", "me.safetensors"]
    assert parse(three["loras_multipliers"], 2).tokens == (((0.5,),), ((0.7,),))
    for profile in (None, PLAIN):
        back = apply(profile, apply(ONE, three))
        assert (back["activated_loras"], back["loras_multipliers"]) == (["me.safetensors"], "0.7")
    assert mine["activated_loras"] == ["me.safetensors"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"), ("[1]", "not one object"), ('{"activated_loras": "x"}', "other than texts"),
        ('{"loras_multipliers": 1}', "no text"),
        ('{"activated_loras": ["../x.safetensors"]}', "cannot be used"),
        ("[" * 100_000, "is not JSON"), (" " * (profiles.MAX_BYTES + 1), "larger than"),
    ],
)  # fmt: skip
def test_broken_profiles_are_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "broken.json").write_text(text)
    (tmp_path / "good.json").write_text(json.dumps({"num_inference_steps": 4, "image_mode": 1}))
    found, (problem,) = list_profiles(tmp_path)
    assert [(p.name, p.settings, p.ignored) for p in found] == [
        ("good", {"num_inference_steps": 4}, ("image_mode",))
    ]
    assert "broken.json" in problem and reason in problem
