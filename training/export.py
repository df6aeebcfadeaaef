"""Writes a training run as the built-in Mini models.

    python -m training.export --from RUN [--to models/z_image/mini]

The parts are ordinary files of the family: fp16 safetensors, JSON configurations, a tokenizer folder.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from training.networks import TRANSFORMER, VAE, make_vae
from training.text import make_encoder

TRANSFORMERS = {
    "base": "transformer_base.safetensors",
    "turbo": "transformer.safetensors",
    "twinflow": "transformer_twinflow.safetensors",
}


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().to("cpu", torch.float16).contiguous() for name, x in state.items()}


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def export_transformers(run: Path, to: Path) -> None:
    config = asdict(TRANSFORMER) | {"all_patch_size": [2], "all_f_patch_size": [1], "qk_norm": True}
    del config["patch_size"]
    write_json(to / "transformer.json", config | {"n_kv_heads": TRANSFORMER.n_heads})
    for stage, name in TRANSFORMERS.items():
        source = run / f"{stage}.pt"
        if source.exists():
            save_file(half(torch.load(source, map_location="cpu")["average"]), to / name)


def export_text_encoder(run: Path, to: Path) -> None:
    folder = to / "text_encoder"
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    tokenizer.save_pretrained(folder)
    encoder = make_encoder(len(tokenizer))
    encoder.config.save_pretrained(folder)
    save_file({f"model.{k}": x for k, x in half(encoder.state_dict()).items()}, folder / "model.safetensors")


def export_vae(run: Path, to: Path) -> None:
    folder = to / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    vae = make_vae()
    state = run / "vae.pt"
    if state.exists():
        vae.load_state_dict(torch.load(state, map_location="cpu")["vae"])
    save_file(half(vae.state_dict()), folder / "model.safetensors")
    write_json(folder / "config.json", VAE)
    code = torch.load(run / "code.pt", map_location="cpu")
    # the mean colour of an 8x8 patch, channel by channel: 192 values are 3 channels of 64 pixels
    factors = code["decode"].unflatten(1, (3, 64)).mean(2)
    bias = code["mean"].unflatten(0, (3, 64)).mean(1)
    rounded = {"factors": [[round(v, 4) for v in row] for row in factors.tolist()]}
    write_json(folder / "latent_rgb.json", rounded | {"bias": [round(v, 4) for v in bias.tolist()]})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="run", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--to", type=Path, default=Path("models/z_image/mini"))
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    export_transformers(args.run, args.to)
    export_text_encoder(args.run, args.to)
    export_vae(args.run, args.to)
    total = sum(f.stat().st_size for f in args.to.rglob("*") if f.is_file())
    print(f"{args.to}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
