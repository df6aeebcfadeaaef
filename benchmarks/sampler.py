"""Every option of the unified sampler, scored on the built-in Mini TwinFlow: what share of the pictures shows
all that its prompt says (see training.score)?

Every value of an option with every value of the others. Prints the table of docs/twinflow.md and every
configuration below 90 % of what order 1 reaches with the same style and steps.

    python -m benchmarks.sampler --count 16
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from models.z_image.pipeline_z_image import ZImagePipeline
from models.z_image.unified_sampler import STYLES
from shared.errors import UserError
from shared.settings.table import levels_of
from training.grammar import Scene, held_out
from training.sampling import CardPainter
from training.score import judge, summarize

CARD = "z_image_mini_twinflow"
STEPS = (1, 2, 3, 4, 6, 8)
ORDERS = (1, 2, 3)
ENOUGH = 0.9  # of order 1's score
#: option -> (fewest noise levels at which it acts, its values besides the usual one)
OPTIONS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "stochast_ratio": (2, (0, "SDE", 2)),
    "extrapol_ratio": (4, (0.5, 1)),
    "time_dist_ctrl": (2, ("0.5,1,1", "2,1,1")),
}

Config = Mapping[str, Any]


def configurations(steps: int, style: str, order: int) -> list[dict[str, Any]]:
    """unified_sampler_config with style and order alone, then with every combination of the options."""
    plain = {"sampling_style": style, "sampling_order": order}
    acting = {
        name: (None, *values) for name, (least, values) in OPTIONS.items() if levels_of(steps, order) >= least
    }
    return [
        plain | {name: value for name, value in zip(acting, chosen, strict=True) if value is not None}
        for chosen in itertools.product(*acting.values())
    ]


def everything_right(
    pipe: ZImagePipeline, scenes: Sequence[Scene], steps: int, config: Config
) -> float | None:
    """The share of the pictures, one for each scene, seed = its number; None for a refused time grid."""
    try:
        pictures = pipe(
            [scene.caption for scene in scenes],
            height=128,
            width=128,
            num_inference_steps=steps,
            sample_solver="unified",
            unified_sampler_config=config,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(scenes))],
        ).images
    except UserError:
        return None
    return summarize(
        [judge(np.asarray(one), scene) for one, scene in zip(pictures, scenes, strict=True)]
    ).everything


def text_of(config: Config) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=16, help="held-out prompts")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    args = parser.parse_args()

    torch.set_num_threads(1)  # the same numbers on every computer
    pipe, scenes = CardPainter(CARD, {}).processor.pipe, held_out(args.count)
    first: dict[tuple[int, str], float] = {}
    low: list[str] = []
    print("| steps | order | levels | " + " | ".join(STYLES) + " |")
    print("|---|---|---|" + "---|" * len(STYLES))
    for steps, order in itertools.product(args.steps, ORDERS):
        cells = []
        for style in STYLES:
            found = {
                text_of(config): score
                for config in configurations(steps, style, order)
                if (score := everything_right(pipe, scenes, steps, config)) is not None
            }
            plain = next(iter(found.values()))
            usual = first.setdefault((steps, style), plain)
            low += [f"{steps} steps, {k}: {x:.0%}" for k, x in found.items() if x < ENOUGH * usual]
            cells.append(f"{plain:.0%}, {min(found.values()):.0%}")
        print(f"| {steps} | {order} | {levels_of(steps, order)} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{len(low)} below {ENOUGH:.0%} of order 1:", *low, sep="\n")


if __name__ == "__main__":
    main()
