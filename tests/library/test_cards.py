"""Model cards: how two files become one card, and which sentence a mistake gets."""

import json

import pytest

from shared.errors import UserError
from shared.files.urls import source_problem
from shared.library.cards import CardError, load_cards
from shared.library.catalog import look_up
from shared.weights.files import Folders, destination

KNOWN = ["prompt", "resolution", "num_inference_steps", "guidance_scale", "batch_size"]
HF = "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main"


def model(**keys):
    return {"name": "A model", "architecture": "z_image", "URLs": [f"{HF}/a.safetensors"], **keys}


@pytest.fixture
def project(tmp_path):
    """Write card files and load them: project({"defaults/a": content, …}) -> (cards, errors as texts)."""

    def load(files):
        for name, content in files.items():
            path = tmp_path / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        cards, errors = load_cards(tmp_path, KNOWN)
        assert all(isinstance(error, CardError) and isinstance(error, UserError) for error in errors)
        return cards, [str(error) for error in errors]

    return load


def the_error(project, files):
    cards, errors = project(files)
    assert len(errors) == 1, errors
    return errors[0]


# ---------------------------------------------------------------- good cards


def test_a_card_is_read(project, tmp_path):
    content = {"model": model(description="Fast"), "num_inference_steps": 8, "resolution": "128x128"}
    cards, errors = project({"defaults/z_image": content})
    card = cards["z_image"]
    assert not errors
    assert (card.id, card.name, card.architecture, card.description) == (
        "z_image", "A model", "z_image", "Fast",
    )  # fmt: skip
    assert card.model == content["model"]
    assert card.defaults == {"num_inference_steps": 8, "resolution": "128x128"}
    assert card.path == tmp_path / "defaults" / "z_image.json"
    assert card.visible is True and card.ignored == {}


def test_a_finetune_of_the_same_name_overrides_property_by_property(project, tmp_path):
    cards, errors = project(
        {
            "defaults/z": {
                "model": model(description="Old", attention={"<89": "sdpa"}), "num_inference_steps": 8,
                "guidance_scale": 0,
            },
            "finetunes/z": {
                "model": {"attention": {">90": "flash"}, "visible": False},
                "num_inference_steps": 4,
            },
            "finetunes/own": {"model": model(name="Mine")},
        }
    )  # fmt: skip
    assert not errors and cards.keys() == {"z", "own"}
    assert cards["z"].model == model(description="Old", attention={">90": "flash"}, visible=False)
    assert cards["z"].defaults == {"num_inference_steps": 4, "guidance_scale": 0}
    assert cards["z"].visible is False
    assert cards["z"].path == tmp_path / "finetunes" / "z.json"


def test_a_finetune_without_model_changes_only_the_settings(project):
    cards, errors = project({"defaults/z": {"model": model()}, "finetunes/z": {"num_inference_steps": 4}})
    assert not errors and cards["z"].defaults == {"num_inference_steps": 4}


def test_no_folders_means_no_cards(tmp_path):
    assert load_cards(tmp_path, KNOWN) == ({}, [])


def test_cards_of_wan2gp_load_unchanged(project):
    control = {
        "model": {
            "name": "Z-Image Turbo Control", "architecture": "z_image_control2", "description": "Control",
            "URLs": "z_image", "modules": [[f"{HF}/control.safetensors", f"{HF}/control_int8.safetensors"]],
            "preload_URLs": [f"{HF}/pose.onnx|pose"], "infos": "help", "profile_type": "image",
            "resolutions": [["1024x1024 (1:1)", "1024x1024"]], "guidance_max_phases": 0,
            "text_prompt_enhancer_instructions": "Rewrite.",
        },
        "prompt": "", "control_net_weight_alt": 0.65, "video_length": 1, "batch_size": 1,
    }  # fmt: skip
    twinflow = {"model": model(unified_solver=True, attention={"<89": "sdpa"}, group="z_image")}
    turbo = {"model": model(URLs=[f"{HF}/bf16.safetensors", f"{HF}/int8.safetensors"])}
    cards, errors = project(
        {"defaults/z_image": turbo, "defaults/z_image_twinflow": twinflow, "finetunes/control": control}
    )
    assert not errors
    card = cards["control"]
    assert card.model["URLs"] == turbo["model"]["URLs"]
    assert card.model["modules"] == control["model"]["modules"]
    assert card.model["preload_URLs"] == control["model"]["preload_URLs"]
    assert card.defaults == {"prompt": "", "batch_size": 1}
    assert card.ignored.keys() == {
        "control_net_weight_alt", "video_length", "model.infos", "model.profile_type",
        "model.guidance_max_phases", "model.text_prompt_enhancer_instructions",
    }  # fmt: skip
    assert cards["z_image_twinflow"].model["unified_solver"] is True


def test_references_are_resolved_through_several_cards(project):
    cards, errors = project(
        {
            "defaults/a": {
                "model": model(
                    text_encoder_URLs=["te.safetensors"], VAE_URLs=["v.safetensors"], loras=["l.safetensors"],
                    loras_multipliers=[0.5, "1;0"], modules=[["m1.safetensors", "m2.safetensors"]],
                )
            },
            "defaults/b": {
                "model": model(
                    URLs="a", text_encoder_URLs="a", VAE_URLs="a", loras="a", loras_multipliers="a",
                    modules=["a", "extra/m.safetensors", {"URLs": "a", "URLs2": "a"}],
                )
            },
            "finetunes/c": {"model": model(URLs="b", loras="b", modules="b", text_encoder_URLs="b")},
        }
    )  # fmt: skip
    assert not errors
    weights = [f"{HF}/a.safetensors"]
    modules = [["m1.safetensors", "m2.safetensors"], ["extra/m.safetensors"], weights]
    for card in (cards["b"].model, cards["c"].model):
        assert card["URLs"] == weights
        assert card["loras"] == ["l.safetensors"]
        assert card["text_encoder_URLs"] == ["te.safetensors"]
        assert card["modules"] == modules
    assert cards["b"].model["VAE_URLs"] == ["v.safetensors"]
    assert cards["b"].model["loras_multipliers"] == [0.5, "1;0"]


def test_configs_are_objects_or_paths_inside_the_project(project):
    configs = {"transformer_config": {"dim": 64}, "vae_config": "models/z_image/mini/vae.json"}
    cards, errors = project({"defaults/a": {"model": model(**configs, scheduler_config={"shift": 3.0})}})
    assert not errors and cards["a"].model["vae_config"] == configs["vae_config"]


def test_a_byte_order_mark_is_no_mistake(project):
    cards, errors = project({"defaults/a": b"\xef\xbb\xbf" + json.dumps({"model": model()}).encode()})
    assert not errors and "a" in cards


# ---------------------------------------------------------------- mistakes


def test_broken_json_names_file_line_and_column_and_the_others_load(project):
    broken = '{\n  "model": {\n    "name": "x",,\n  }\n}'
    cards, errors = project({"defaults/broken": broken, "defaults/good": {"model": model()}})
    assert cards.keys() == {"good"}
    assert len(errors) == 1
    assert errors[0].startswith("defaults/broken.json: not valid JSON at line 3, column 17: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "came an empty list"),
        ("3", "came a number"),
        (b"\xff\xfe{", "not UTF-8"),
        ("[" * 100_000, "cannot be read"),
        ('{"model": 3}', '"model" came as a number; expected an object'),
        ('{"model": null}', '"model" came as null; expected an object'),
    ],
)
def test_files_that_are_no_card(project, content, said):
    assert said in the_error(project, {"defaults/x": content})


def test_a_broken_finetune_leaves_the_default_card_in_place(project):
    cards, errors = project({"defaults/z": {"model": model()}, "finetunes/z": {"model": {"URLz": []}}})
    assert cards["z"].model == model()
    assert errors == ['finetunes/z.json: unknown key "model.URLz"; the nearest known key is "URLs"']


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": model(URL=[])}, 'unknown key "model.URL"; the nearest known key is "URLs"'),
        (
            {"model": model(vae_urls=["a"])},
            'unknown key "model.vae_urls"; the nearest known key is "VAE_URLs"',
        ),
        (
            {"model": model(), "num_steps": 4},
            'unknown key "num_steps"; the nearest known key is "num_inference',
        ),
        ({"model": model(), "loras": []}, '"loras" belongs inside "model"'),
        ({"model": model(prompt="x")}, '"model.prompt" belongs beside "model"'),
        ({"model": model(qqqqqqq=1)}, 'unknown key "model.qqqqqqq"; remove it'),
        ({"model": model(name=3)}, '"model.name" came as a number; expected a text'),
        ({"model": model(URLs=[])}, '"model.URLs" came as an empty list; expected a list of URLs'),
        ({"model": model(URLs=[1])}, '"model.URLs" came as a list; expected a list of URLs'),
        ({"model": model(URLs={})}, '"model.URLs" came as an object; expected a list of URLs'),
        ({"model": model(URLs=None)}, '"model.URLs" came as null; expected a list of URLs'),
        ({"model": model(visible="no")}, '"model.visible" came as a text; expected true or false'),
        ({"model": model(auto_quantize=1)}, '"model.auto_quantize" came as a number; expected true or false'),
        ({"model": model(attention={"<89": 1})}, '"model.attention" came as an object'),
        ({"model": model(modules=[[]])}, '"model.modules" came as a list'),
        ({"model": model(modules=[{"URL": []}])}, '"model.modules" came as a list'),
        (
            {"model": model(vae_config=[])},
            '"model.vae_config" came as an empty list; expected an object, or the path',
        ),
        ({"model": model(resolutions="1024x1024")}, '"model.resolutions" came as a text; expected a list'),
        ({"model": model(loras_multipliers=[True])}, '"model.loras_multipliers" came as a list'),
        ({"model": {"name": "x", "URLs": ["a"]}}, '"model.architecture" is missing; expected a text'),
        ({"model": model(URLs=["http://example.com/a.safetensors"])}, "expected an https:// URL"),
        ({"model": model(modules=[["../a.safetensors"]])}, '"model.modules" holds "../a.safetensors"'),
        ({"model": model(modules=[{"URLs": ["/a"]}])}, '"model.modules" holds "/a"'),
        ({"model": model(vae_config="C:\\vae.json")}, "inside the project"),
        ({"model": model(text_encoder_folder="../../etc")}, "inside the project"),
        ({"model": model(preload_URLs=["ftp://x/a|b"])}, "expected an https:// URL"),
        (
            {"model": model(URLs="zzz")},
            '"model.URLs" refers to "zzz" (x -> zzz), which is not the id of a card',
        ),
        ({"model": model(URLs=f"{HF}/a.safetensors")}, "put an address in a list"),
        ({"model": model(VAE_URLs="x")}, "is a reference loop: x -> x"),
    ],
)
def test_a_mistake_names_file_key_and_what_was_expected(project, content, said):
    error = the_error(project, {"defaults/x": content})
    assert error.startswith("defaults/x.json: ") and said in error


def test_every_mistake_of_a_card_is_reported(project):
    _, errors = project({"defaults/x": {"model": model(name=3, visible=0, nmae="x"), "prmpt": ""}})
    assert len(errors) == 4


def test_reference_loops_name_the_cards_on_the_way(project):
    cards, errors = project(
        {
            "defaults/a": {"model": model(URLs="b")},
            "defaults/b": {"model": model(URLs="c")},
            "defaults/c": {"model": model(URLs="b")},
            "defaults/fine": {"model": model()},
        }
    )
    assert cards.keys() == {"fine"}
    assert [error.split(";")[0] for error in errors] == [
        'defaults/a.json: "model.URLs" is a reference loop: a -> b -> c -> b',
        'defaults/b.json: "model.URLs" is a reference loop: b -> c -> b',
        'defaults/c.json: "model.URLs" is a reference loop: c -> b -> c',
    ]


def test_loops_through_modules_are_found(project):
    _, errors = project(
        {"defaults/a": {"model": model(modules=["b"])}, "defaults/b": {"model": model(modules=["a"])}}
    )
    assert len(errors) == 2 and "a -> b -> a" in errors[0]


def test_long_chains_of_references_end(project):
    chain = {f"defaults/c{n:02}": {"model": model(URLs=f"c{n + 1:02}")} for n in range(12)}
    cards, errors = project({**chain, "defaults/c12": {"model": model()}})
    assert cards.keys() == {f"c{n:02}" for n in range(2, 13)}
    assert all("more than 10 cards" in error for error in errors)


def test_an_unknown_id_names_the_nearest_and_the_file_that_set_it(project):
    cards, errors = project(
        {
            "defaults/z_image": {"model": model()},
            "defaults/b": {"model": model()},
            "finetunes/b": {"model": {"URLs": "z_imag"}},
        }
    )
    assert cards.keys() == {"z_image"}
    assert errors == [
        'finetunes/b.json: "model.URLs" refers to "z_imag" (b -> z_imag), which is not the id of a card; '
        'the nearest one is "z_image"'
    ]


def test_a_reference_to_a_card_without_that_key(project):
    _, errors = project({"defaults/a": {"model": model()}, "defaults/b": {"model": model(loras="a")}})
    assert errors == [
        'defaults/b.json: "model.loras" refers to "a" (b -> a), which has no "loras"; '
        "add it there or list the files here"
    ]


@pytest.mark.parametrize(
    "source",
    [
        "https://huggingface.co/a/b.safetensors",
        "HTTPS://example.com/a",
        "http://localhost:8000/a.safetensors",
        "http://127.0.0.1/a",
        "models/z_image/mini/a.safetensors",
        "a..b.safetensors",
        "模型/a.safetensors",
    ],
)
def test_sources_that_are_allowed(source):
    assert source_problem(source) == ""


@pytest.mark.parametrize(
    "source",
    [
        "", " ", "http://example.com/a", "http://localhost.example.com/a", "http://127.0.0.1@example.com/a",
        "file:///etc/passwd", "ftp://example.com/a", "https://", "https:///a", "https://[bad/a", "file:a",
        "/etc/passwd", "\\\\server\\share", "..", "../a", "a/../../b", "a\\..\\b", "C:\\a", "C:a", "c:/a",
        "~/a", "a\0b", "a\nb", "a:stream",
    ],
)  # fmt: skip
def test_sources_that_are_not(source):
    assert source_problem(source).startswith("expected ")


def test_a_licence_has_a_page_that_can_be_linked(project):
    cards, errors = project(
        {"defaults/a": {"model": model(license="Apache-2.0", license_page=f"{HF}/LICENSE")}}
    )
    assert not errors and cards["a"].model["license"] == "Apache-2.0"
    error = the_error(project, {"defaults/a": {"model": model(license_page="javascript:alert(1)")}})
    assert "model.license_page" in error


def test_a_draft_is_judged_as_the_card_that_it_would_be(project, tmp_path):
    project({"defaults/a": {"model": model()}, "finetunes/b": {"model": model(name="Old")}})
    drafts = {"b": {"model": model(name="New")}, "c": {"model": {**model(), "URLs": "a"}}, "d": {"model": {}}}
    cards, errors = load_cards(tmp_path, KNOWN, drafts)
    assert (cards["b"].name, cards["c"].model["URLs"]) == ("New", cards["a"].model["URLs"])
    assert "d" not in cards and all(str(error).startswith("finetunes/d.json") for error in errors)
    assert [path.name for path in (tmp_path / "finetunes").iterdir()] == ["b.json"]


def test_what_a_card_preloads_comes_with_the_model(project, tmp_path) -> None:
    preloads = [f"{HF}/pose.onnx|pose", f"{HF}/more.safetensors"]
    project({"defaults/mine": {"model": model(preload_URLs=preloads)}})
    root, folders = tmp_path, Folders(tmp_path, tmp_path / "ckpts")
    info = look_up("mine", folders)
    wanted = {one.role: one for one in info.required if one.role.startswith("preload")}
    assert [destination(one.alternatives[0], folders, one.target) for one in wanted.values()] == [
        root / "ckpts" / "pose" / "pose.onnx",
        root / "ckpts" / "more.safetensors",
    ]
    assert set(info.missing) >= {f"{HF}/pose.onnx", f"{HF}/more.safetensors"}


@pytest.mark.parametrize("folder", ["../above", "/root", "a\\..\\b"])
def test_a_preload_stays_in_the_folder_of_models(project, folder: str) -> None:
    error = the_error(project, {"defaults/mine": {"model": model(preload_URLs=[f"{HF}/pose.onnx|{folder}"])}})
    assert "path inside the project" in error
