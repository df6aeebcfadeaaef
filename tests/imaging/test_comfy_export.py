"""Settings as a workflow of ComfyUI: checked against its nodes' definitions, and read back."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from PIL import Image

from shared.engine.comfyui import comfyui_workflow
from shared.errors import UserError
from shared.imaging import metadata, saving
from shared.imaging.foreign import reader
from shared.library.translation import translated
from shared.settings.table import idle
from tests.support.browser import ROOT

ANY_FILE = "any file of a folder"
MAX = 16384

# The definitions of ComfyUI's nodes, written down from its nodes.py and comfy_extras/, October 2025:
# input -> a type of a link, a list of choices, or (type, lowest, highest); what each output is.
NODES = {
    "UNETLoader": (
        {"unet_name": ANY_FILE, "weight_dtype": ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"]},
        {}, ["MODEL"],
    ),
    "CLIPLoader": (
        {
            "clip_name": ANY_FILE,
            "type": [
                "stable_diffusion", "stable_cascade", "sd3", "stable_audio", "mochi", "ltxv", "pixart",
                "cosmos", "lumina2", "wan", "hidream", "chroma", "ace", "omnigen2", "qwen_image",
                "hunyuan_image",
            ],
        },
        {"device": ["default", "cpu"]}, ["CLIP"],
    ),
    "VAELoader": ({"vae_name": ANY_FILE}, {}, ["VAE"]),
    "LoraLoaderModelOnly": (
        {"model": "MODEL", "lora_name": ANY_FILE, "strength_model": (float, -100, 100)}, {}, ["MODEL"],
    ),
    "ModelSamplingAuraFlow": ({"model": "MODEL", "shift": (float, 0, 100)}, {}, ["MODEL"]),
    "ModelPatchLoader": ({"name": ANY_FILE}, {}, ["MODEL_PATCH"]),
    "QwenImageDiffsynthControlnet": (
        {
            "model": "MODEL", "model_patch": "MODEL_PATCH", "vae": "VAE", "image": "IMAGE",
            "strength": (float, -10, 10),
        },
        {"mask": "MASK"}, ["MODEL"],
    ),
    "CLIPTextEncode": ({"text": (str, 0, 0), "clip": "CLIP"}, {}, ["CONDITIONING"]),
    "ConditioningZeroOut": ({"conditioning": "CONDITIONING"}, {}, ["CONDITIONING"]),
    "EmptySD3LatentImage": (
        {"width": (int, 16, MAX), "height": (int, 16, MAX), "batch_size": (int, 1, 4096)}, {}, ["LATENT"],
    ),
    "KSampler": (
        {
            "model": "MODEL", "seed": (int, 0, 2**64 - 1), "steps": (int, 1, 10000), "cfg": (float, 0, 100),
            "sampler_name": ["euler", "euler_ancestral", "heun", "dpmpp_2m", "lcm", "res_multistep", "ddim"],
            "scheduler": [
                "simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal",
                "linear_quadratic", "kl_optimal",
            ],
            "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT",
            "denoise": (float, 0, 1),
        },
        {}, ["LATENT"],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, {}, ["IMAGE"]),
    "VAEEncode": ({"pixels": "IMAGE", "vae": "VAE"}, {}, ["LATENT"]),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": (str, 0, 0)}, {}, []),
    "LoadImage": ({"image": ANY_FILE}, {}, ["IMAGE", "MASK"]),
    "ImageScale": (
        {
            "image": "IMAGE", "upscale_method": ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"],
            "width": (int, 0, MAX), "height": (int, 0, MAX), "crop": ["disabled", "center"],
        },
        {}, ["IMAGE"],
    ),
    "ImageScaleBy": (
        {
            "image": "IMAGE", "upscale_method": ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"],
            "scale_by": (float, 0.01, 8),
        },
        {}, ["IMAGE"],
    ),
    "ImageInvert": ({"image": "IMAGE"}, {}, ["IMAGE"]),
    "ImageToMask": ({"image": "IMAGE", "channel": ["red", "green", "blue", "alpha"]}, {}, ["MASK"]),
    "GrowMask": (
        {"mask": "MASK", "expand": (int, -MAX, MAX), "tapered_corners": (bool, 0, 1)}, {}, ["MASK"],
    ),
    "SetLatentNoiseMask": ({"samples": "LATENT", "mask": "MASK"}, {}, ["LATENT"]),
    "RepeatLatentBatch": ({"samples": "LATENT", "amount": (int, 1, 64)}, {}, ["LATENT"]),
    "Canny": (
        {"image": "IMAGE", "low_threshold": (float, 0.01, 0.99), "high_threshold": (float, 0.01, 0.99)},
        {}, ["IMAGE"],
    ),
}  # fmt: skip


def wrong(graph) -> list[str]:
    """What ComfyUI's own check of a prompt would refuse."""
    found = []
    for name, node in graph.items():
        if node["class_type"] not in NODES:
            found.append(f"{name}: no node {node['class_type']}")
            continue
        required, optional, _ = NODES[node["class_type"]]
        given = node["inputs"]
        found += [f"{name}: lacks {one}" for one in required if one not in given]
        found += [f"{name}: has no {one}" for one in given if one not in {**required, **optional}]
        known = {one: kind for one, kind in {**required, **optional}.items() if one in given}
        found += [
            f"{name}.{one} is {given[one]!r}, not {kind}"
            for one, kind in known.items()
            if not _fits(graph, given[one], kind)
        ]
    return found


def _fits(graph, value, kind) -> bool:
    if kind == ANY_FILE:
        return isinstance(value, str) and bool(value)
    if isinstance(kind, str):
        if not (isinstance(value, list) and len(value) == 2 and value[0] in graph):
            return False
        outputs = NODES[graph[value[0]]["class_type"]][2]
        return value[1] < len(outputs) and outputs[value[1]] == kind
    if isinstance(kind, list):
        return value in kind
    wanted, low, high = kind
    if wanted in (str, bool):
        return type(value) is wanted
    return type(value) in ((int,) if wanted is int else (int, float)) and low <= value <= high


BASE, TURBO, CONTROL = "z_image_base", "z_image", "z_image_base_control"
SETTINGS = [
    {},
    {"model_type": TURBO, "num_inference_steps": 9, "flow_shift": 4.5, "seed": 2**53 - 1},
    {"negative_prompt": "fog, rain"},
    {"guidance_scale": 2.5, "resolution": "832x1216"},
    {"guidance_scale": 0.0},
    {"flow_shift": 1.5, "num_inference_steps": 50},
    {"prompt": "a (red:1.3) \\ heart {a|b}\non two lines, \u732b"},
    {"activated_loras": ["one.safetensors", "sub/two.safetensors"], "loras_multipliers": "0.8 -0.25"},
    {"image_start": "/pictures/cat.png", "denoising_strength": 0.5},
    {"image_start": "C:\\pictures\\cat.png", "denoising_strength": 0.3, "num_inference_steps": 20},
    {"image_start": "cat.png", "image_mask": "mask.png", "mask_expand": 12, "denoising_strength": 1.0},
    {"image_start": "cat.png", "denoising_strength": 0.75, "batch_size": 3},
    {"hires_scale": 1.5, "hires_denoising_strength": 0.3},
    {"hires_scale": 2.0, "hires_denoising_strength": 0.0},
    {"model_type": CONTROL, "image_guide": "edges.png", "control_preprocessor": "as_it_is"},
    {"model_type": CONTROL, "image_guide": "cat.png", "control_parameters": "low=50, high=150"},
    {"model_type": "z_image_control", "image_guide": "x.png", "control_net_weight": 0.6,
     "control_preprocessor": "as_it_is", "control_parameters": "invert=true"},
    {"model_type": "z_image_control2_1", "image_guide": "c.png", "activated_loras": ["one.safetensors"],
     "image_start": "cat.png", "denoising_strength": 0.4, "num_inference_steps": 10},
]  # fmt: skip
#: what a workflow does not carry: pictures and the mask, and what concerns this program or another pass
NOT_CARRIED = {
    "image_start", "image_mask", "mask_expand", "mask_feather", "image_guide", "control_parameters",
    "batch_size", "hires_scale", "hires_denoising_strength", "activated_loras", "loras_multipliers",
    "loras_optional",
}  # fmt: skip


def complete(models, given):
    usual = {"model_type": BASE, "prompt": "a red heart", "seed": 7, "loras_optional": True}
    return models.validate({**usual, **given}).settings


@pytest.mark.parametrize("given", SETTINGS, ids=range(len(SETTINGS)))
def test_comfyui_takes_it_and_it_reads_back(models, given):
    settings = complete(models, given)
    made = comfyui_workflow(settings, models)
    assert wrong(made.nodes) == []
    saved = [node for node in made.nodes.values() if node["class_type"] == "SaveImage"]
    assert len(saved) == 1
    found = reader.from_graph(made.nodes)
    back, lines = translated(found, models, "z_image_mini")
    again = models.validate({**back, "loras_optional": True}).settings
    expected = {
        name: value
        for name, value in settings.items()
        if name not in NOT_CARRIED and name not in idle(settings) and name in again
    }
    if not settings.get("image_guide"):
        expected = {name: value for name, value in expected.items() if not name.startswith("control_")}
    if settings.get("guidance_scale", 4) <= 1:
        expected["guidance_scale"] = 0.0
    strength = settings["denoising_strength"] if settings["image_start"] else 1
    taken = math.ceil(expected.pop("num_inference_steps") * strength)
    assert math.ceil(again["num_inference_steps"] * strength) == taken
    assert {name: again[name] for name in expected} == expected
    for name in ("image_start", "image_guide"):
        file = settings.get(name, "").replace("\\", "/").rsplit("/", 1)[-1]
        assert any(file in line for line in [*made.lines]) and any(file in line for line in lines)


def test_loras_are_a_chain_in_their_order(models):
    given = {"activated_loras": ["a.safetensors", "b/c.safetensors"], "loras_multipliers": "0.8 -0.25"}
    found = reader.from_graph(comfyui_workflow(complete(models, given), models).nodes)
    assert found.loras == (("a.safetensors", 0.8), ("b/c.safetensors", -0.25))


def test_the_scale_is_counted_from_one_there_and_the_shift_is_the_model_s(models):
    nodes = comfyui_workflow(complete(models, {}), models).nodes
    sampler = next(one["inputs"] for one in nodes.values() if one["class_type"] == "KSampler")
    assert (sampler["cfg"], sampler["steps"], sampler["sampler_name"], sampler["scheduler"]) == (
        5.0, 30, "euler", "simple",
    )  # fmt: skip
    shift = next(one["inputs"] for one in nodes.values() if one["class_type"] == "ModelSamplingAuraFlow")
    assert shift["shift"] == 6.0 and nodes[sampler["model"][0]]["inputs"] == shift
    names = [one["inputs"] for one in nodes.values() if one["class_type"].endswith("Loader")]
    assert [next(iter(one.values())) for one in names] == [
        "z_image_bf16.safetensors", "qwen_3_4b.safetensors", "ae.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model_type": TURBO, "NAG_scale": 4.0, "negative_prompt": "fog"}, "NAG scale 4"),
        ({"seed_variety": 0.5}, "Seed variety 0.5"),
        ({"cfg_truncation": 0.5, "cfg_normalization": 1.0}, "Guidance limit 1, Guidance end 0.5"),
        ({"image_start": "a.png", "outpaint": "0,0,64,0"}, 'Extend beyond the borders "0,0,64,0"'),
        ({"activated_loras": ["a.safetensors"], "loras_multipliers": "1,0.5"}, "LoRA strengths that change"),
        ({"model_type": CONTROL, "image_guide": "a.png", "control_preprocessor": "pose"}, "map pose"),
        ({"model_type": CONTROL, "image_guide": "a.png", "control_end": 60}, "Control end (%) 60"),
        ({"model_type": "z_image_mini", "resolution": "128x128"}, "ComfyUI does not know it"),
        ({"seed": -1}, "random"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_has_no_node_is_said(models, given, said):
    lines = comfyui_workflow(complete(models, given), models).lines
    assert any(said in line for line in lines), lines
    assert not any(said in line for line in comfyui_workflow(complete(models, {}), models).lines)


def test_what_does_nothing_is_not_said(models):
    lines = comfyui_workflow(complete(models, {"cfg_truncation": 0.5, "guidance_scale": 1.0}), models).lines
    assert not any("Left out" in line for line in lines), lines


def test_twinflow_is_refused(models):
    with pytest.raises(UserError, match="no node for TwinFlow"):
        comfyui_workflow(complete(models, {"model_type": "z_image_mini_twinflow"}), models)


def test_a_control_network_that_is_not_here_is_said(models):
    nodes = comfyui_workflow(complete(models, SETTINGS[14]), models).nodes
    loader = next(one for one in nodes.values() if one["class_type"] == "ModelPatchLoader")
    loader["inputs"]["name"] = "somebody_s.safetensors"
    back, lines = translated(reader.from_graph(nodes), models, "z_image_mini")
    assert back["model_type"] == BASE and "control_net_weight" not in back
    assert any("somebody_s.safetensors" in line for line in lines)


# ---------------------------------------------------------------- where it is offered


def run(*flags):
    return subprocess.run([sys.executable, "wgp.py", *flags], cwd=ROOT, capture_output=True, text=True)


def test_the_command_prints_it(models, tmp_path):
    settings = complete(models, {"seed_variety": 0.5})
    meta = metadata.build(
        settings, seed=7, index=0, model_name="x", model_files={}, notes=[], extra={}
    )
    picture = saving.save_image(Image.new("RGB", (16, 16)), tmp_path, "a", "png", meta)
    done = run("--to-comfyui", str(picture))
    assert done.returncode == 0 and json.loads(done.stdout) == comfyui_workflow(settings, models).nodes
    assert "wgp.py: Left out, as ComfyUI itself has no node for it: Seed variety 0.5." in done.stderr


def test_a_picture_without_settings_is_one_sentence(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "plain.png")
    done = run("--to-comfyui", str(tmp_path / "plain.png"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "wgp.py: plain.png holds no settings: take a picture as it was saved.\n"


@pytest.fixture(scope="module")
def server(shared_server):
    return shared_server


def made(page):
    page.set_number("seed", 41)
    page.generate("a red heart")
    page.tab.wait_for_selector("#viewer img")
    page.wait_until_idle()


@pytest.mark.browser
def test_the_page_and_programs_get_it(visit, server, tmp_path):
    page = visit()
    made(page)
    button = page.tab.locator("#viewer").get_by_role("button", name="ComfyUI workflow")
    with page.tab.expect_download() as download:
        button.click()
    assert download.value.suggested_filename.endswith(".comfyui.json")
    download.value.save_as(tmp_path / "flow.json")
    nodes = json.loads((tmp_path / "flow.json").read_text("utf-8"))
    assert wrong(nodes) == [] and reader.from_graph(nodes).settings["seed"] == 41
    page.tab.locator("#notice").get_by_text("has a size of its own").wait_for()
    number = button.get_attribute("data-id")
    with urllib.request.urlopen(f"{server.url}api/v1/images/{number}/comfyui") as answer:
        told = json.load(answer)
    assert told["prompt"] == nodes and any("size of its own" in note for note in told["notes"])
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{server.url}api/v1/images/999999/comfyui")
    page.tab.get_by_role("tab", name="Gallery").click()
    page.tab.locator("#gallery .zgp-shot").first.click()
    with page.tab.expect_download() as download:
        page.tab.locator("#gallery").get_by_role("button", name="ComfyUI workflow").click()
    assert download.value.suggested_filename.endswith(".comfyui.json")
    page.tab.locator("#gallery").get_by_text("is a workflow for ComfyUI").wait_for()
