"""Pictures and workflows as other programs write them."""

from __future__ import annotations

MODEL, CLIP, LATENT = ["4", 0], ["5", 0], ["6", 0]


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def graph(**others) -> dict:
    """Text to picture with one LoRA, as the program saves it; `others` replace nodes by their numbers."""
    usual = {
        "1": node("KSampler", seed=1071208483241017, steps=9, cfg=1, sampler_name="res_multistep",
                  scheduler="simple", denoise=1, model=["2", 0], positive=["7", 0], negative=["8", 0],
                  latent_image=LATENT),
        "2": node("ModelSamplingAuraFlow", shift=3.5, model=["3", 0]),
        "3": node("LoraLoaderModelOnly", lora_name="styles\\pixel.safetensors", strength_model=0.7,
                  model=MODEL),
        "4": node("UNETLoader", unet_name="z_image_turbo_bf16.safetensors", weight_dtype="default"),
        "5": node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2"),
        "6": node("EmptySD3LatentImage", width=1024, height=768, batch_size=1),
        "7": node("CLIPTextEncode", text="a lamp", clip=CLIP),
        "8": node("ConditioningZeroOut", conditioning=["7", 0]),
        "9": node("VAEDecode", samples=["1", 0], vae=["10", 0]),
        "10": node("VAELoader", vae_name="ae.safetensors"),
        "11": node("SaveImage", filename_prefix="z", images=["9", 0]),
    }  # fmt: skip
    return {**usual, **{name.lstrip("n"): one for name, one in others.items()}}


def workflow(switched_off=0) -> dict:
    """The editor's form of the same; two nodes name their fields, as newer versions of it do."""
    links = [
        [1, 4, 0, 3, 0, "MODEL"],
        [2, 3, 0, 1, 0, "MODEL"],
        [3, 7, 0, 1, 1, "CONDITIONING"],
        [4, 8, 0, 1, 2, "CONDITIONING"],
        [5, 6, 0, 1, 3, "LATENT"],
        [6, 1, 0, 11, 0, "LATENT"],
    ]

    def one(number, kind, inputs, values, mode=0):
        slots = [{"name": name, "type": "*", "link": link} for name, link in inputs.items()]
        return {"id": number, "type": kind, "mode": mode, "inputs": slots, "widgets_values": values}

    own = one(6, "EmptyQwenImageLatent", {}, [640, 512, 1])
    own["inputs"] = [
        {"name": n, "widget": {"name": n}, "link": None} for n in ("width", "height", "batch_size")
    ]
    nodes = [
        one(
            1,
            "KSampler",
            {"model": 2, "positive": 3, "negative": 4, "latent_image": 5},
            [99, "randomize", 8, 2.5, "euler", "simple", 1],
        ),
        one(3, "LoraLoaderModelOnly", {"model": 1}, ["pixel.safetensors", 0.5], switched_off),
        one(4, "UNETLoader", {}, ["z_image_turbo_bf16.safetensors", "default"]),
        own,
        one(7, "CLIPTextEncode", {"clip": None}, ["a lamp"]),
        one(8, "CLIPTextEncode", {"clip": None}, ["fog"]),
        one(11, "SaveImage", {"images": 6}, ["z"]),
        {"id": 12, "type": "MarkdownNote", "widgets_values": {"a": 1}},
    ]
    return {"last_node_id": 12, "nodes": nodes, "links": links, "version": 0.4}


def subgraph(proxies, values, outer_link=None, depth=1):
    """One node that stands for a whole graph, as the editor's templates have them; `depth` of them nested."""
    inner = workflow()
    ports = [{"name": n} for n in ("text", "width", "height")]
    links = [
        dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot"), link[:5], strict=True))
        for link in inner["links"][:5]
    ]
    links += [
        {"id": 20, "origin_id": -10, "origin_slot": 0, "target_id": 7, "target_slot": 1},
        {"id": 21, "origin_id": -10, "origin_slot": 1, "target_id": 6, "target_slot": 0},
        {"id": 22, "origin_id": -10, "origin_slot": 2, "target_id": 6, "target_slot": 1},
        {"id": 23, "origin_id": 1, "origin_slot": 0, "target_id": -20, "target_slot": 0},
    ]
    nodes = inner["nodes"][:6]
    nodes[3]["inputs"][0]["link"], nodes[3]["inputs"][1]["link"] = 21, 22
    nodes[4]["inputs"].append({"name": "text", "widget": {"name": "text"}, "link": 20})
    made = [{"id": "s1", "inputs": ports, "nodes": nodes, "links": links}]
    for level in range(2, depth + 1):
        one = {"id": 5, "type": f"s{level - 1}", "inputs": [
            {"name": port["name"], "link": 30 + i} for i, port in enumerate(ports)], "widgets_values": []}
        between = [{"id": 30 + i, "origin_id": -10, "origin_slot": i, "target_id": 5, "target_slot": i}
                   for i in range(3)]
        between.append({"id": 40, "origin_id": 5, "origin_slot": 0, "target_id": -20, "target_slot": 0})
        made.append({"id": f"s{level}", "inputs": ports, "nodes": [one], "links": between})
    slots = [{"name": "text", "widget": {"name": "text"}, "link": outer_link}]
    instance = {"id": 57, "type": f"s{depth}", "mode": 0, "inputs": slots, "widgets_values": values,
                "properties": {"proxyWidgets": proxies}}
    save = {"id": 9, "type": "SaveImage", "inputs": [{"name": "images", "link": 62}], "widgets_values": ["z"]}
    text = {"id": 10, "type": "PrimitiveStringMultiline", "inputs": [], "widgets_values": ["a kite"]}
    outer = [[62, 57, 0, 9, 0, "IMAGE"], [63, 10, 0, 57, 0, "STRING"]]
    return {"nodes": [save, instance, text], "links": outer, "definitions": {"subgraphs": made}}


SIZED = {"steps": 9, "seed": 42, "width": 128, "height": 192}
SWARM = {"sui_image_params": {
    **SIZED, "prompt": "a lamp", "negativeprompt": "", "model": "z_image_turbo_bf16", "images": 1,
    "cfgscale": 1.0, "aspectratio": "Custom", "sampler": "euler", "scheduler": "simple", "sigmashift": 3.0,
    "loras": ["style", "b"], "loraweights": ["0.8"], "swarm_version": "0.9.8.0", "refinerupscale": 2.0,
}, "sui_extra_data": {"date": "2026-02-03"}}  # fmt: skip
