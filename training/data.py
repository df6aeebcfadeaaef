"""Training data: a pool of captioned scenes as tensors, drawn anew (with jitter) every time they are used."""

from __future__ import annotations

import multiprocessing
import os
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from models.z_image.pipeline_inputs import DEFAULT_NEGATIVE_PROMPT
from training.grammar import COLOURS, Scene, sample
from training.render import Batch, scene_arrays
from training.text import tokenize

LONGEST = 96  # tokens; longer captions are not used in training


@dataclass
class Pool:
    """n scenes. ids: [n, LONGEST]; lengths: [n]; shape, colour, place, back: the arrays of `scene_arrays`."""

    ids: Tensor
    lengths: Tensor
    shape: Tensor
    colour: Tensor
    place: Tensor
    back: Tensor

    def to(self, device: str) -> Pool:
        return Pool(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def scenes(self, index: Tensor) -> Batch:
        palette = torch.tensor(list(COLOURS.values()), device=index.device) / 127.5 - 1
        return Batch(
            self.shape[index].long(),
            palette[self.colour[index].long()],
            self.place[index],
            palette[self.back[index].long()],
        )


def _part(job: tuple[str, int, int]) -> list[np.ndarray]:
    folder, count, seed = job
    torch.set_num_threads(1)
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample(rng)
        if not scene.held_out:
            scenes.append(scene)
    ids, lengths = tokenize(AutoTokenizer.from_pretrained(folder), [s.caption for s in scenes])
    wide = torch.zeros(count, LONGEST, dtype=torch.long)
    width = min(LONGEST, ids.shape[1])
    wide[:, :width] = ids[:, :width]
    keep = (lengths <= LONGEST).numpy()
    arrays = [wide.numpy().astype(np.int16), lengths.numpy(), *scene_arrays(scenes)]
    return [a[keep] for a in arrays]


def make_pool(tokenizer_folder: str, count: int, seed: int = 0) -> Pool:
    """`count` scenes that are not held out, made on all cores."""
    workers = min(os.cpu_count() or 1, 16)
    jobs = [(tokenizer_folder, count // workers, seed * 1000 + i) for i in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as processes:
        parts = processes.map(_part, jobs)
    return Pool(*(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True)))


def unconditional(tokenizer: AutoTokenizer) -> dict[str, tuple[Tensor, int]]:
    """The captions that stand for 'no prompt': the empty one and the pipeline's default negative prompt."""
    result = {}
    for name, text in (("empty", ""), ("negative", DEFAULT_NEGATIVE_PROMPT)):
        ids, lengths = tokenize(tokenizer, [text])
        result[name] = (ids[0], int(lengths[0]))
    return result
