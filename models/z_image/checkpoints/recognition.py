"""What a checkpoint file that a user has would be to a model, told by its tensors and never by its name. No
torch: the page asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.family import Fit
from models.z_image.checkpoints import control_layout, weight_names
from models.z_image.checkpoints.control_layout import ControlLayout
from models.z_image.checkpoints.lora_names import module_shapes
from models.z_image.checkpoints.part_configs import Shape
from shared.errors import UserError
from shared.weights import formats

SECOND_TIME = "t_embedder_2."  # only TwinFlow's transformers have it


def fit(file: Path, config: Mapping[str, Any], unified: bool, control: ControlLayout | None) -> Fit:
    """What `file` is to a model with this transformer. UserError when it is nothing to it, or damaged.

    unified: the model samples as TwinFlow does. control: the layout of its control network, if it has one.
    """
    if control_layout.is_control(file):
        return _control_fit(file, config, control)
    return _transformer_fit(file, config, unified)


def _control_fit(file: Path, config: Mapping[str, Any], wanted: ControlLayout | None) -> Fit:
    checkpoint, layout = control_layout.read(file, Shape.of(config))
    width = checkpoint.entries[control_layout.EMBEDDER].shape[0]
    if wanted is None:
        raise UserError(f"{file.name} is a control network; none of the models here has one like it.")
    if layout != wanted or width != config["dim"]:
        raise UserError(f"{file.name} is a control network for another model or of another generation.")
    return Fit("module0", "a control network", checkpoint.label)


def _transformer_fit(file: Path, config: Mapping[str, Any], unified: bool) -> Fit:
    checkpoint = formats.inspect([file], weight_names.TRANSFORMER)
    twin = any(name.startswith(SECOND_TIME) for name in checkpoint.entries)
    shapes = module_shapes(config, twin)
    for module in ("all_x_embedder.2-1", "cap_embedder.1"):
        entry = checkpoint.entries.get(f"{module}.weight")
        if entry is not None and tuple(entry.shape) != shapes[module]:
            raise UserError(
                f"{file.name} is a Z-Image transformer of another size: {module} is {list(entry.shape)}, "
                f"expected {list(shapes[module])}."
            )
    if twin != unified:
        kind = "a TwinFlow transformer" if twin else "a transformer without TwinFlow's second time embedder"
        raise UserError(f"{file.name} is {kind}; none of the models here of its size is.")
    modules = {name.rpartition(".")[0] for name in checkpoint.entries}
    missing = [module for module in shapes if module not in modules]
    more = [m for m in modules if m.startswith(("layers.", "noise_refiner.")) and m not in shapes]
    if missing or more:
        what = f"lacks {missing[0]}" if missing else f"has {more[0]}, which is one layer too many"
        raise UserError(f"{file.name} {what}: it is incomplete, or a transformer of another size.")
    return Fit("transformer", "a TwinFlow transformer" if twin else "a transformer", checkpoint.label)
