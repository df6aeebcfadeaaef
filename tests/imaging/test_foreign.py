"""Settings out of other programs' pictures. The files are written here after the formats' descriptions."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shared.errors import UserError
from shared.imaging import metadata
from shared.imaging.foreign import reader
from shared.jobs.task_file import read_tasks
from shared.library.catalog import catalog
from shared.library.translation import as_task
from shared.ui.create import import_settings
from tests.support.browser import ROOT
from tests.support.other_programs import CLIP, LATENT, MODEL, SIZED, SWARM, graph, node, subgraph, workflow

MINI, BASE = "z_image_mini", "z_image_mini_base"


@pytest.fixture(scope="module")
def models():
    return catalog(ROOT, ROOT / "ckpts")


def png(path, texts, size=(8, 8)):
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text if isinstance(text, str) else json.dumps(text))
    Image.new("RGB", size).save(path, pnginfo=chunks)
    return path


def with_comment(path, comment: bytes):
    tags = Image.Exif()
    tags.get_ifd(0x8769)[0x9286] = comment
    Image.new("RGB", (8, 8)).save(path, exif=tags)
    return path


# ---------------------------------------------------------------- A1111 and Forge


def infotext(prompt, negative="", *, lines=(), **fields) -> str:
    """As A1111 writes it: values with a comma, a colon or a line end stand in quotes, as JSON."""
    named = {name.replace("_", " "): str(value) for name, value in fields.items()}
    quoted = {n: json.dumps(v) if set(v) & set(",:\n") else v for n, v in named.items()}
    parts = [prompt, *([f"Negative prompt: {negative}"] if negative else [])]
    return "\n".join([*parts, ", ".join(f"{n}: {v}" for n, v in quoted.items()), *lines])


USUAL = {"Steps": 20, "Sampler": "Euler", "CFG scale": 5, "Seed": 1234567890, "Size": "832x1216"}


def test_every_field_finds_its_setting(tmp_path):
    text = infotext(
        "a heron,\nat dawn", "fog,\nrain", **USUAL, Shift=6, Model_hash="0123456789", Model="z_image_bf16",
        VAE="ae", Clip_skip=2, RNG="CPU", Module_1="qwen_3_4b", Version="neo",
    )  # fmt: skip
    found = reader.read(png(tmp_path / "a.png", {"parameters": text}))
    assert found.settings == {
        "prompt": "a heron,\nat dawn", "negative_prompt": "fog,\nrain", "num_inference_steps": 20,
        "seed": 1234567890, "guidance_scale": 4.0, "flow_shift": 6.0, "resolution": "832x1216",
    }  # fmt: skip
    assert (found.model, found.loras) == ("z_image_bf16", ())
    assert found.lines == ("CFG scale 5 became guidance 4: here the count begins at 0.",)


@pytest.mark.parametrize(
    "scale, guidance, said", [(1, 0.0, 0), (7.5, 6.5, 1), (0, 0.0, 0), ("high", None, 0), (1.5, 0.5, 1)]
)
def test_the_scale_is_counted_from_zero(scale, guidance, said):
    text = infotext("x", **{**USUAL, "CFG scale": scale})
    found = reader.from_texts({"parameters": text})
    assert found.settings.get("guidance_scale") == guidance
    assert len([line for line in found.lines if "CFG scale" in line]) == said


def test_our_own_text_keeps_its_guidance():
    meta = {
        "prompt": "x", "seed": 3, "guidance_scale": 4.0, "num_inference_steps": 30, "resolution": "512x256",
        "zgp": {"version": "1.0", "model_name": "Z-Image Base", "model_files": {}},
    }  # fmt: skip
    found = reader.from_texts({"parameters": metadata.to_parameters_text(meta)})
    assert found.settings["guidance_scale"] == 4.0 and found.lines == ()
    assert found.settings["resolution"] == "512x256" and found.model == "Z-Image Base"


def test_loras_leave_the_prompt():
    text = infotext(
        "a cat <lora:detail:0.8>, <lora:my, style v2:-1.25:lbw=1>, sitting <lora:x:a>", **USUAL,
        Lora_hashes="detail: 0123, my: 4567",
    )  # fmt: skip
    found = reader.from_texts({"parameters": text})
    assert found.settings["prompt"] == "a cat, sitting <lora:x:a>"
    assert found.loras == (("detail", 0.8), ("my, style v2", -1.25))


def test_what_is_not_taken_over_is_named():
    others = {f"ControlNet {number}": "a: b, c" for number in range(20)}
    text = infotext(
        "a (big:1.3) cat", **{**USUAL, "Sampler": "DPM++ 2M", "Schedule type": "Karras"},
        Hires_upscale=2, **others, lines=['Civitai resources: [{"type":"lora","weight":1}]'],
    )  # fmt: skip
    lines = reader.from_texts({"parameters": text}).lines
    assert "Its sampler DPM++ 2M Karras is not here: the model's own is used." in lines
    assert any("(word:1.2)" in line for line in lines)
    [named] = [line for line in lines if line.startswith("Not taken over: Hires upscale, ControlNet 0,")]
    assert named.endswith("and 9 more.") and "Civitai" not in named


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_the_exif_comment_of_jpeg_and_webp(tmp_path, order, suffix):
    text = infotext("一只猫", "雾", **USUAL)
    found = reader.read(with_comment(tmp_path / f"a{suffix}", b"UNICODE\0" + text.encode(order)))
    assert found.settings["prompt"] == "一只猫" and found.settings["seed"] == 1234567890


# ---------------------------------------------------------------- ComfyUI


def test_the_graph_is_walked_from_the_sampler(tmp_path):
    found = reader.read(png(tmp_path / "a.png", {"prompt": graph(), "workflow": {"nodes": 3}}))
    assert found.program == "ComfyUI"
    assert found.settings == {
        "prompt": "a lamp", "num_inference_steps": 9, "seed": 1071208483241017, "guidance_scale": 0.0,
        "flow_shift": 3.5, "resolution": "1024x768",
    }  # fmt: skip
    assert found.model == "z_image_turbo_bf16.safetensors"
    assert found.loras == (("styles\\pixel.safetensors", 0.7),)
    assert found.lines == ("Its sampler res_multistep is not here: the model's own is used.",)


def sampled(**inputs) -> dict:
    return {"n1": node("KSampler", **{**graph()["1"]["inputs"], **inputs})}


@pytest.mark.parametrize(
    "change, expected",
    [
        (sampled(seed=["20", 0]) | {"n20": node("PrimitiveInt", value=42)}, {"seed": 42}),
        (sampled(cfg=4.5, negative=["21", 0]) | {"n21": node("CLIPTextEncode", text="fog", clip=CLIP)},
         {"guidance_scale": 3.5, "negative_prompt": "fog"}),
        ({"n7": node("CLIPTextEncode", text=["22", 0], clip=CLIP),
          "n22": node("StringConcatenate", string_a=["23", 0], string_b="at night", delimiter=", "),
          "n23": node("PrimitiveStringMultiline", value="a boat")}, {"prompt": "a boat, at night"}),
        (sampled(positive=["24", 0], negative=["24", 1])
         | {"n24": node("ControlNetApplyAdvanced", strength=1.0, positive=["7", 0], negative=["25", 0],
                        control_net=["26", 0], image=["27", 0]),
            "n25": node("CLIPTextEncode", text="blur", clip=CLIP)},
         {"prompt": "a lamp", "negative_prompt": "blur"}),
        ({"n6": node("EmptySD3LatentImage", width=["28", 0], height=["28", 0]),
          "n28": node("INTConstant", value=640)}, {"resolution": "640x640"}),
        (sampled(positive=["7", 0], seed=True), {"seed": None}),
        (sampled(steps=8.0), {"num_inference_steps": 8}),
        (sampled(positive=["99", 0]), {"prompt": ""}),
    ],
)  # fmt: skip
def test_values_come_from_wherever_they_are_linked_to(change, expected):
    found = reader.from_texts({"prompt": json.dumps(graph(**change))})
    assert {name: found.settings.get(name) for name in expected} == expected


def test_a_sampler_that_is_put_together_from_nodes():
    parts = {
        "n1": node("SamplerCustomAdvanced", noise=["30", 0], guider=["31", 0], sampler=["32", 0],
                   sigmas=["33", 0], latent_image=LATENT),
        "n30": node("RandomNoise", noise_seed=7),
        "n31": node("CFGGuider", cfg=3.0, model=["2", 0], positive=["7", 0], negative=["8", 0]),
        "n32": node("KSamplerSelect", sampler_name="euler"),
        "n33": node("BasicScheduler", scheduler="simple", steps=12, denoise=1.0, model=["2", 0]),
    }  # fmt: skip
    found = reader.from_texts({"prompt": json.dumps(graph(**parts))})
    wanted = {"seed": 7, "num_inference_steps": 12, "guidance_scale": 2.0, "prompt": "a lamp"}
    assert {name: found.settings[name] for name in wanted} == wanted
    assert found.loras and found.model and len(found.lines) == 1  # of the guidance alone


def encoded(kind, **inputs):
    """The text comes from a node 70; 71 and 72 say "a boat" and "at night"."""
    said = {f"n{n}": node("PrimitiveStringMultiline", value=t) for n, t in ((71, "a boat"), (72, "at night"))}
    return said | {"n7": node("CLIPTextEncode", text=["70", 0], clip=CLIP), "n70": node(kind, **inputs)}


BOAT, NIGHT = ["71", 0], ["72", 0]


@pytest.mark.parametrize(
    "kind, inputs, prompt",
    [
        ("StringReplace", {"string": "<<s>>, faded", "find": "<<s>>", "replace": BOAT}, "a boat, faded"),
        ("StringTrim", {"string": "  a boat ", "mode": "Right"}, "a boat"),
        ("CaseConverter", {"string": BOAT, "mode": "UPPERCASE"}, "A BOAT"),
        ("easy promptConcat", {"prompt1": BOAT, "prompt2": NIGHT, "separator": ", "}, "a boat, at night"),
        ("JoinStrings", {"string1": BOAT, "string2": NIGHT, "delimiter": " "}, "a boat at night"),
        ("JoinStringMulti", {"inputcount": 2, "string_1": BOAT, "string_2": NIGHT, "delimiter": "; "},
         "a boat; at night"),
        ("Text Concatenate", {"delimiter": "\\n", "clean_whitespace": "true", "text_a": BOAT, "text_b": " ",
                              "text_c": NIGHT}, "a boat\nat night"),
        ("CR Text Concatenate", {"text1": BOAT, "text2": BOAT, "separator": "+"}, "a boat+a boat"),
        ("ImpactWildcardProcessor", {"wildcard_text": "a __x__", "populated_text": "a boat", "seed": 3},
         "a boat"),
        ("ShowText|pysssssss", {"text": ["73", 0], "text_0": "a boat"}, "a boat"),
        ("ComfySwitchNode", {"switch": True, "on_false": BOAT, "on_true": NIGHT}, "at night"),
    ],
)  # fmt: skip
def test_nodes_that_make_texts_are_computed(kind, inputs, prompt):
    found = reader.from_texts({"prompt": json.dumps(graph(**encoded(kind, **inputs)))})
    assert found.settings["prompt"] == prompt
    assert not any("went through" in line for line in found.lines)


def test_a_node_that_is_not_known_is_named_and_the_rest_stays():
    made = encoded("LLMRewrite", text=BOAT, instructions="make it longer", temperature=0.7)
    found = reader.from_texts({"prompt": json.dumps(graph(**made))})
    assert found.lines[0] == "Its prompt went through LLMRewrite, not computed here: compare the text."
    assert found.settings["prompt"] == "a boat" and found.settings["flow_shift"] == 3.5


def put_together(**others):
    parts = {
        "n1": node("SamplerCustomAdvanced", noise=["30", 0], guider=["31", 0], sampler=["32", 0],
                   sigmas=["34", 0], latent_image=LATENT),
        "n30": node("RandomNoise", noise_seed=7),
        "n31": node("CFGGuider", cfg=3.0, model=["2", 0], positive=["7", 0], negative=["8", 0]),
        "n32": node("KSamplerSelect", sampler_name="euler"),
        "n33": node("BasicScheduler", scheduler="simple", steps=12, denoise=1.0, model=["2", 0]),
        "n34": node("SplitSigmas", sigmas=["35", 0], step=3),
        "n35": node("ExtendIntermediateSigmas", sigmas=["33", 0], number=2),
    }  # fmt: skip
    return {"prompt": json.dumps(graph(**parts, **others))}


@pytest.mark.parametrize(
    "others, steps",
    [
        ({}, 12),
        ({"n36": node("ManualSigmas", sigmas="1.0, 0.75, 0.5, 0.25, 0")}, 4),
        ({"n36": node("SecretSigmas", curve="bent")}, None),
    ],
)
def test_noise_levels_may_come_through_any_nodes(others, steps):
    texts = put_together(**others)
    if others:
        texts["prompt"] = texts["prompt"].replace('"sigmas": ["34", 0]', '"sigmas": ["36", 0]')
    found = reader.from_texts(texts)
    assert found.settings.get("num_inference_steps") == steps
    assert (found.settings["seed"], found.settings["prompt"]) == (7, "a lamp")


def test_a_number_that_was_computed_is_named():
    made = sampled(steps=["60", 0]) | {"n60": node("MathOp", a=3, b=4, op="add")}
    found = reader.from_texts({"prompt": json.dumps(graph(**made))})
    assert "num_inference_steps" not in found.settings and found.settings["seed"] == 1071208483241017
    assert "Its steps came through nodes whose results are not in the file." in found.lines


def test_of_two_passes_the_first_counts():
    second = {**graph()["1"]["inputs"], "steps": 4, "denoise": 0.4, "latent_image": ["41", 0]}
    more = {
        "n40": node("KSampler", **second),
        "n41": node("LatentUpscaleBy", samples=["1", 0], scale_by=1.5),
        "n9": node("VAEDecode", samples=["40", 0], vae=["10", 0]),
    }
    found = reader.from_texts({"prompt": json.dumps(graph(**more))})
    assert found.settings["num_inference_steps"] == 9 and found.settings["resolution"] == "1024x768"
    assert any("2 passes" in line for line in found.lines)


def test_loras_stand_in_the_order_in_which_they_are_applied():
    stacked = {
        "n3": node(
            "Power Lora Loader (rgthree)",
            model=["50", 0],
            lora_1={"on": True, "lora": "b", "strength": 2},
            lora_2={"on": False, "lora": "off", "strength": 1},
            lora_3="text",
        ),
        "n50": node(
            "LoraLoader", lora_name="a", strength_model=["51", 0], strength_clip=1, model=MODEL, clip=CLIP
        ),
        "n51": node("PrimitiveFloat", value=0.25),
    }
    found = reader.from_texts({"prompt": json.dumps(graph(**stacked))})
    assert found.loras == (("a", 0.25), ("b", 2.0))


@pytest.mark.parametrize("mode, loras", [(0, (("pixel.safetensors", 0.5),)), (4, ())])
def test_the_form_of_the_editor(mode, loras):
    found = reader.from_texts({"workflow": json.dumps(workflow(mode))})
    assert found.settings == {
        "prompt": "a lamp", "negative_prompt": "fog", "num_inference_steps": 8, "seed": 99,
        "guidance_scale": 1.5, "resolution": "640x512",
    }  # fmt: skip
    assert (found.loras, found.model) == (loras, "z_image_turbo_bf16.safetensors")


PORTS = [["-1", "text"], ["-1", "width"], ["-1", "height"]]


@pytest.mark.parametrize(
    "made, prompt, size, steps",
    [
        (subgraph(PORTS, ["a fox", 320, 256]), "a fox", "320x256", 8),
        (subgraph(PORTS, ["a fox", 320, 256], outer_link=63), "a kite", "320x256", 8),
        (subgraph([*PORTS, ["1", "steps"]], ["a fox", 320, 256, 5]), "a fox", "320x256", 5),
        (subgraph(PORTS, ["a fox", 320, 256], depth=3), "a fox", "320x256", 8),
    ],
)
def test_subgraphs_are_laid_open(made, prompt, size, steps):
    found = reader.from_texts({"workflow": json.dumps(made)})
    expected = {"prompt": prompt, "resolution": size, "num_inference_steps": steps, "seed": 99}
    assert {name: found.settings.get(name) for name in expected} == expected
    assert found.model == "z_image_turbo_bf16.safetensors" and found.loras == (("pixel.safetensors", 0.5),)


def test_subgraphs_without_end_do_no_harm():
    many = [{"id": n, "type": "s"} for n in range(300)]
    for inner in ("s", "t"):
        kinds = [{"id": a, "nodes": [{**one, "type": b} for one in many], "links": []}
                 for a, b in (("s", inner), ("t", "s"))]  # fmt: skip
        made = {"nodes": many, "links": [], "definitions": {"subgraphs": kinds}}
        assert reader.from_texts({"workflow": json.dumps(made)}) is None


def test_a_text_that_doubles_at_every_node_does_no_harm():
    doubled = {
        f"n{n}": node("StringConcatenate", string_a=[f"{n + 1}", 0], string_b=[f"{n + 1}", 0], delimiter="")
        for n in range(70, 140)
    }
    made = encoded("x") | doubled | {"n140": node("PrimitiveString", value="x" * 50)}
    found = reader.from_texts({"prompt": json.dumps(graph(**made))})
    assert len(found.settings["prompt"]) <= 200_000 and found.settings["seed"]


def test_links_that_have_a_name():
    made = workflow()
    made["links"][2] = [3, 30, 0, 1, 1, "CONDITIONING"]
    made["links"].append([7, 7, 0, 31, 0, "CONDITIONING"])
    made["nodes"] += [
        {"id": 30, "type": "GetNode", "inputs": [], "widgets_values": ["text"]},
        {"id": 31, "type": "SetNode", "inputs": [{"name": "x", "link": 7}], "widgets_values": ["text"]},
    ]
    assert reader.from_texts({"workflow": json.dumps(made)}).settings["prompt"] == "a lamp"


def test_webp_files_of_comfy(tmp_path):
    tags = Image.Exif()
    tags[0x0110] = "prompt:" + json.dumps(graph())
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", exif=tags)
    assert reader.read(tmp_path / "a.webp").settings["prompt"] == "a lamp"


# ---------------------------------------------------------------- InvokeAI


def test_invoke(tmp_path):
    meta = {
        "app_version": "6.10.0", "generation_mode": "z_image_txt2img", "positive_prompt": "a lamp",
        "negative_prompt": "", "seed": 5, "steps": 8, "cfg_scale": 3.0, "width": 1024, "height": 512,
        "scheduler": "euler", "model": {"key": "k", "hash": "h", "name": "Z-Image Turbo", "base": "z-image"},
        "loras": [{"model": {"name": "pixel"}, "weight": 0.75}],
    }  # fmt: skip
    found = reader.read(png(tmp_path / "a.png", {"invokeai_metadata": meta}))
    assert found.settings == {
        "prompt": "a lamp", "num_inference_steps": 8, "seed": 5, "guidance_scale": 2.0,
        "resolution": "1024x512",
    }  # fmt: skip
    assert (found.program, found.model, found.loras) == ("InvokeAI", "Z-Image Turbo", (("pixel", 0.75),))


def test_invoke_s_shift_and_seed_variance_are_settings_here():
    meta = {
        "positive_prompt": "a lamp", "z_image_shift": 4.0, "z_image_seed_variance_enabled": True,
        "z_image_seed_variance_strength": 0.4, "z_image_seed_variance_randomize_percent": 35,
    }  # fmt: skip
    found = reader.from_texts({"invokeai_metadata": json.dumps(meta)})
    assert found.settings == {
        "prompt": "a lamp", "flow_shift": 4.0, "seed_variety": 0.4, "seed_variety_share": 35.0,
        "seed_variety_until": 100.0,
    }  # fmt: skip
    assert any("seed variance" in line for line in found.lines)
    off = meta | {"z_image_seed_variance_enabled": False, "z_image_shift": "auto"}
    assert reader.from_texts({"invokeai_metadata": json.dumps(off)}).settings == {"prompt": "a lamp"}


# ---------------------------------------------------------------- programs that write one JSON object

COMMON = {
    "prompt": "a lamp", "num_inference_steps": 9, "seed": 42, "guidance_scale": 0.0, "resolution": "128x192",
}  # fmt: skip
MFLUX = {
    **SIZED, "mflux_version": "0.13.1", "model": "z-image-turbo", "guidance": 0.0, "prompt": "a lamp",
    "negative_prompt": None, "lora_paths": ["/x/style.safetensors"], "lora_scales": [0.5],
}  # fmt: skip
FOOOCUS = {
    **SIZED, "Prompt": "a lamp", "Negative": "", "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
    "base_model_name": "z_image_turbo_bf16.safetensors", "loras": [["0f", "0.7 - style.safetensors"]],
    "software": "RuinedFooocus",
}  # fmt: skip


def exif_png(path, comment):
    tags = Image.Exif()
    tags.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + comment.encode()
    Image.new("RGB", (8, 8)).save(path, exif=tags.tobytes())
    return path


def test_swarm(tmp_path):
    for found in (
        reader.read(png(tmp_path / "a.png", {"parameters": SWARM})),
        reader.read(with_comment(tmp_path / "a.jpg", b"UNICODE\0" + json.dumps(SWARM).encode("utf-16-le"))),
    ):
        assert found.settings == {**COMMON, "flow_shift": 3.0} and found.program == "SwarmUI"
        assert (found.model, found.loras) == ("z_image_turbo_bf16", (("style", 0.8), ("b", 1.0)))
        assert found.lines == ("Not taken over: refinerupscale.",)


def test_mflux_writes_into_the_exif_of_png(tmp_path):
    path = exif_png(tmp_path / "a.png", json.dumps(MFLUX))
    found = reader.read(path)
    assert metadata.read(path) is None and found.settings == COMMON and found.lines == ()
    assert (found.program, found.model) == ("mflux", "z-image-turbo")
    assert found.loras == (("/x/style.safetensors", 0.5),)


def test_ruined_fooocus(tmp_path):
    found = reader.read(png(tmp_path / "a.png", {"parameters": FOOOCUS}))
    assert found.settings == COMMON and found.program == "RuinedFooocus"
    assert (found.model, found.loras) == (FOOOCUS["base_model_name"], (("style.safetensors", 0.7),))


def test_civitai_s_own_generator():
    made = [
        {"type": "checkpoint", "modelVersionId": 1, "modelName": "Z Image Turbo", "modelVersionName": "v1"},
        {"type": "lora", "modelName": "Pixel, Art", "weight": 0.6},
        {"type": "embed", "modelName": "easy"},
    ]
    site = f'Civitai resources: {json.dumps(made)}, Civitai metadata: {{"remixOfId":1,"Seed: 5, x":2}}'
    text = infotext("a lamp", "", **{**USUAL, "Sampler": "Undefined"}) + f", {site}"
    found = reader.from_texts({"parameters": text})
    assert (found.program, found.model) == ("Civitai", "Z Image Turbo")
    assert found.loras == (("Pixel, Art", 0.6),) and found.settings["seed"] == USUAL["Seed"]
    assert "Not taken over: embed easy." in found.lines and not any("Undefined" in x for x in found.lines)


def test_the_first_field_of_a_name_wins():
    text = infotext(
        "a lamp", **{**USUAL, "Seed": 42, "Size": "128x192"}, Guidance="3.5", TE="Qwen3.gguf",
        Unet="z_image_turbo-Q4_0.gguf", Version="stable-diffusion.cpp",
    )  # fmt: skip
    for trail in (', SDCPP: {"seed": 42, "note": "Seed: 7, Size: 8x8,"}', ", Seed: 7, Size: 8x8"):
        found = reader.from_texts({"parameters": text + trail})
        assert (found.settings["seed"], found.settings["resolution"]) == (42, "128x192")
        assert found.model == "z_image_turbo-Q4_0.gguf" and found.program == "stable-diffusion.cpp"
        assert not any("Not taken over" in line for line in found.lines)


# ---------------------------------------------------------------- into the form


@pytest.mark.parametrize(
    "name, model",
    [
        ("z_image_turbo_bf16.safetensors", "z_image"),
        ("z-image-turbo-fp8-e4m3fn", "z_image"),
        ("Z-Image Turbo", "z_image"),
        ("diffusion_models\\z_image_bf16.safetensors", "z_image_base"),
        ("z_image_turbo-Q8_0.gguf", "z_image"),
        ("v1-5-pruned-emaonly", MINI),
        ("", MINI),
    ],
)
def test_models_are_known_by_their_files(models, name, model):
    found = import_settings.from_foreign(
        reader.Foreign("ComfyUI", {"prompt": "x"}, model=name), "a.png", models, MINI
    )
    assert found.settings["model_type"] == model
    assert ("stays" in " ".join(found.report)) == (model == MINI)


def test_loras_are_found_by_name(models):
    loras = (("Mini_Outlines", 0.8), ("styles\\gone.safetensors", 1.0))
    other = reader.Foreign("ComfyUI", {"prompt": "x"}, loras=loras)
    found = import_settings.from_foreign(other, "a.png", models, MINI)
    assert found.settings["activated_loras"] == ["mini/mini_outlines.safetensors"]
    assert found.settings["loras_multipliers"] == "0.8"
    assert any("gone.safetensors" in line and "left out" in line for line in found.report)


def test_what_cannot_be_used_is_left_out_and_named(models):
    given = {
        "prompt": "x", "seed": 2**60, "num_inference_steps": 5000, "guidance_scale": 3.0,
        "resolution": "1000x513",
    }  # fmt: skip
    found = import_settings.from_foreign(reader.Foreign("A1111 or Forge", given), "a.png", models, BASE)
    defaults = models.model(BASE).defaults
    assert found.settings["num_inference_steps"] == defaults["num_inference_steps"]
    assert (found.settings["seed"], found.settings["guidance_scale"]) == (-1, 3.0)
    report = "\n".join(found.report)
    assert "seed came as" in report and "num_inference_steps came as 5000" in report and "1000x513" in report


def test_a_dropped_picture_of_nobody_is_one_sentence(tmp_path, models):
    with pytest.raises(UserError, match="a.png holds no settings: .*ComfyUI"):
        import_settings.from_file(png(tmp_path / "a.png", {"Software": "GIMP"}), "a.png", models, MINI)


def test_differences_are_one_line():
    before = {"prompt": "a" * 40, "seed": -1, "num_inference_steps": 8, "activated_loras": []}
    after = {"prompt": "b", "seed": 5, "num_inference_steps": 8, "activated_loras": ["x"]}
    differences = import_settings.differences
    assert differences(before, after) == ["Changed: Prompt · Seed -1 → 5 · LoRAs none → ['x']."]
    assert differences(before, before) == []
    assert differences({"flow_shift": 5}, {"flow_shift": 6.0}) == ["Changed: Flow shift 5 → 6."]


# ---------------------------------------------------------------- workflows as files


@pytest.mark.parametrize("made", [graph(), workflow(), subgraph(PORTS, ["a lamp", 640, 512])])
def test_a_workflow_fills_the_form_and_is_a_task(tmp_path, models, made):
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(made))
    settings = import_settings.from_file(path, "flow.json", models, MINI).settings
    assert (settings["prompt"], settings["model_type"]) == ("a lamp", "z_image")
    [task] = read_tasks(path, tmp_path)
    values, lines = as_task(task.values, models, MINI)
    assert all(settings.get(name, value) == value for name, value in values.items()) and len(lines) > 1


def test_a_workflow_runs_without_a_page(tmp_path):
    (tmp_path / "flow.json").write_text(json.dumps(graph(n4=node("UNETLoader", unet_name="none.gguf"))))
    done = subprocess.run(
        [sys.executable, "wgp.py", "--process", str(tmp_path / "flow.json"), "--dry-run", "--json",
         "--output-dir", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and json.loads(done.stdout)["settings"]["prompt"] == "a lamp"
    assert "item 1: Its model 'none.gguf' is not here" in done.stderr


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"name": "x"}', "flow.json holds no settings: expected a workflow of ComfyUI"),
        ("[" * 90_000, "flow.json cannot be read ("),
        ("{", "flow.json cannot be read ("),
        ("\xff", "flow.json cannot be read ("),
        ('{"nodes": [], "links": []}', "flow.json holds no settings: expected a workflow of ComfyUI"),
        ('{"positive_prompt": "x", "cfg": 1}', '"positive_prompt" is "prompt" here, "cfg" is "guidance'),
    ],
)
def test_what_is_no_workflow_is_one_sentence(tmp_path, models, content, said):
    path = tmp_path / "flow.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as refused:
        import_settings.from_file(path, "flow.json", models, MINI)
    assert said in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 300


# ---------------------------------------------------------------- malformed


def broken_graphs():
    yield from ([], 3, "x", None, {}, {"1": 3}, {"1": {"class_type": 3, "inputs": {}}}, {"nodes": []})
    yield graph(n1=node("KSampler"))
    yield graph(n7=node("CLIPTextEncode", text=["7", 0], clip=CLIP))  # a circle
    yield graph(n2=node("ModelSamplingAuraFlow", shift=["2", 0], model=["2", 0]))
    yield graph(n6=node("EmptyLatentImage", width="wide", height=None))
    yield {
        **graph(),
        **{str(n): node("LoraLoader", lora_name="l", model=[str(n + 1), 0]) for n in range(3, 900)},
    }
    long = {str(n): node("A", text=[str(n + 1), 0], conditioning=[str(n + 1), 0]) for n in range(100, 4000)}
    yield {**graph(**sampled(positive=["100", 0])), **long}
    yield {str(n): node("KSampler", steps=1, positive=[str(n), 0]) for n in range(6000)}
    yield {
        "nodes": [{"id": [], "type": "KSampler", "inputs": 3, "widgets_values": "x"}],
        "links": [[1, 2], 3],
    }


@pytest.mark.parametrize("name", ["prompt", "workflow", "invokeai_metadata"])
def test_broken_graphs_do_no_harm(models, name):
    for broken in broken_graphs():
        found = reader.from_texts({name: json.dumps(broken)})
        if found:
            import_settings.from_foreign(found, "a.png", models, MINI)


HOSTILE = [
    "",
    "Steps: 1,",
    "\nSteps: 1, " + "a: " * 5000,
    "x\nSteps: 1, " + " " * 300_000 + "b",
    "Steps: 1, " + '"' * 99_999,
    "Steps: 9, Size: 99999999999999x1, Seed: " + "9" * 5000 + ", CFG scale: nan",
    "(" * 200_000 + "\nSteps: 2, x: y",
    "<lora:" * 50_000 + "\nSteps: 2, x: y",
    "Civitai " * 60_000 + "\nSteps: 2, x: y",
    "[" * 100_000,
    "9" * 5000,
    '{"positive_prompt": ' * 9000,
    "\0Steps: 3, a: \ud800",
    '{"sui_image_params": {"loras": 3, "loraweights": [[]], "seed": {}, "\\ud800": 1}}',
    '{"sui_image_params": {"loras": [[], {}, 3], "width": "9e9", "height": 1e300, "prompt": []}}',
    '{"mflux_version": [], "lora_paths": [null, {}], "guidance": "nan"}',
    '{"software": "RuinedFooocus", "loras": [[1, {}], ["a", "b - c"], [[], []]], "sampler_name": 3}',
    'x\nSteps: 3, Civitai resources: [{"modelName": "a", "type": [], "weight": {}}, 3, ' + "[" * 90_000,
    'x\nSteps: 3, Civitai resources: [{"modelName": "a", "type": [], "weight": {}}, 3]',
    "Steps: 3, CFG scale: 1e999, Seed: -5, Model: " + "m" * 9999,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_do_no_harm(models, text):
    for name in ("parameters", "UserComment", "prompt", "workflow", "invokeai_metadata", "Make"):
        found = reader.from_texts({name: text})
        if found:
            recalled = import_settings.from_foreign(found, "a.png", models, MINI)
            assert all(len(line) < 600 for line in recalled.report)


def test_pieces_put_together_at_random_do_no_harm(models):
    draw = random.Random(5)
    pieces = [
        "Steps: 2,",
        "\n",
        "Negative prompt:",
        '"',
        "<lora:a:1>",
        "Size: 8x8,",
        ":",
        ",",
        "\\",
        "{",
        "Seed: x,",
    ]
    for _ in range(400):
        found = reader.from_texts({"parameters": "".join(draw.choices(pieces, k=30))})
        if found:
            import_settings.from_foreign(found, "a.png", models, MINI)


def test_a_text_of_unusual_length_is_not_looked_at():
    assert reader.from_texts({"parameters": infotext("x" * 1_000_001, **USUAL)}) is None
