"""TwinFlow's unified sampler: pictures in one to four predictions.

Coordinates: t = 1 is noise, t = 0 the image, x_t = t * z + (1 - t) * x. A prediction F at t is the velocity
z - x, hence x_hat = x_t - t * F and z_hat = x_t + (1 - t) * F. Sources: TwinFlow (arXiv 2512.05150) and UCGM
(arXiv 2505.07447). The configuration and the time grid need no torch, so that the page can check and draw
them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from models.arguments import default, setting_of
from shared.errors import UserError
from shared.settings.table import FIXED_STEPS, SETTINGS, levels_of, solver_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STYLES = tuple(filter(None, SETTINGS["sampling_style"].choices))

#: (most steps, style, gap at both ends) of unified_2s, unified_4s and unified_mul
PRESETS = ((2, "few", (0.001, 0.6)), (4, "any", (0.001, 0.5)), (math.inf, "mul", (0.001, 0.0)))

#: sampling_order -> where each prediction is made (part of the step), from the one before, and its weight in
#: the step's mean velocity: Euler's, Heun's and Ralston's rules
RULES = {
    1: ((0.0, 1.0),),
    2: ((0.0, 1 / 2), (1.0, 1 / 2)),
    3: ((0.0, 2 / 9), (0.5, 1 / 3), (0.75, 4 / 9)),
}

#: velocities of all samples at noise level t, asked to jump to noise level tt
Predict = Callable[["list[Tensor]", float, float], "list[Tensor]"]


@dataclass(frozen=True)
class UnifiedConfig:
    """The sampler's parameters, under the names of its authors. Values are checked by `resolve`.

    sampling_steps: predictions at order 1. stochast_ratio: share of fresh noise per step (0-2), or "SDE" to
    follow the reverse diffusion. extrapol_ratio: how far a prediction moves on from the one before.
    sampling_order: a key of RULES. sampling_style: what a prediction aims at: "few" the image, "any" the next
    time, "mul" its own. time_dist_ctrl: a, b, c of the Kumaraswamy curve. rfba_gap_steps: what the time grid
    leaves out at its noisy and its clean end.
    """

    sampling_steps: int = 2
    stochast_ratio: float | str = 1.0
    extrapol_ratio: float = default("extrapol_ratio")
    sampling_order: int = int(default("sampling_order"))
    sampling_style: str = "few"
    time_dist_ctrl: tuple[float, ...] = (1.0, 1.0, 1.0)
    rfba_gap_steps: tuple[float, ...] = (0.001, 0.6)


def is_unified(sample_solver: str | None) -> bool:
    """Whether a solver's name means this sampler: unified, twinflow, or any unified_*."""
    return solver_name(sample_solver or "") in ("unified", "twinflow", *FIXED_STEPS)


def resolve(
    sample_solver: str = "unified",
    num_inference_steps: int = 2,
    overrides: Mapping[str, Any] | None = None,
) -> UnifiedConfig:
    """The preset of the step count with single keys replaced; None and "" leave a key at its preset. Their
    sampling_steps are the step count, in the place of num_inference_steps.

    Raises UserError: an unknown key, or a value outside its range.
    """
    if overrides is not None and not isinstance(overrides, Mapping):
        raise UserError(
            f"unified_sampler_config came as {overrides!r}; expected an object of names and values."
        )
    chosen: dict[str, Any] = {}
    for name, value in (overrides or {}).items():
        if name not in _CHECKS:
            near = difflib.get_close_matches(str(name), _CHECKS, n=1, cutoff=0)
            raise UserError(
                f"unified_sampler_config has the unknown key '{name}'; the nearest known one is '{near[0]}'."
            )
        if value is not None and value != "":
            chosen[name] = _CHECKS[name](name, value)
    steps = _CHECKS["sampling_steps"]("num_inference_steps", num_inference_steps)
    steps = FIXED_STEPS.get(solver_name(sample_solver), chosen.get("sampling_steps", steps))
    style, gap = next((style, gap) for most, style, gap in PRESETS if steps <= most)
    preset = {"sampling_steps": steps, "sampling_style": style, "rfba_gap_steps": gap}
    config = UnifiedConfig(**preset | chosen)
    time_grid(config)
    return config


def time_grid(config: UnifiedConfig) -> list[float]:
    """The noise levels from the first prediction's down to 0, one more than there are steps.

    Raises UserError for curves and gaps that leave no falling line of levels.
    """
    count = levels_of(config.sampling_steps, config.sampling_order)
    first, last = config.rfba_gap_steps[0], 1 - config.rfba_gap_steps[1]
    points = count + 1 if last == 1 else count  # without a gap the line ends at the image, which is not asked
    line = [first + (last - first) * i / max(points - 1, 1) for i in range(points)][:count]
    a, b, c = config.time_dist_ctrl
    sigmas = [1 - (1 - (1 - u**a) ** b) ** c for u in line] + [0.0]
    if any(now <= after for now, after in zip(sigmas, sigmas[1:], strict=False)):
        raise UserError(
            f"time_dist_ctrl {_numbers(config.time_dist_ctrl)} and rfba_gap_steps "
            f"{_numbers(config.rfba_gap_steps)} put several steps at the same time; expected values nearer "
            "to 1,1,1 and 0.001,0.5."
        )
    return sigmas


#: from so many noise levels on -> the largest extrapol_ratio, and that with a stochast_ratio above 1
MOST_EXTRAPOLATION = ((6, 0.5, 0.0), (4, 1.0, 0.5))


def check_offered(config: UnifiedConfig) -> None:
    """UserError for options that draw less than 90 % as well as none (docs/twinflow.md); programs may still
    `sample` with them.
    """
    levels = levels_of(config.sampling_steps, config.sampling_order)
    ratio = config.stochast_ratio
    more_noise = isinstance(ratio, float) and ratio > 1
    most = next((limits[1 + more_noise] for limits in MOST_EXTRAPOLATION if levels >= limits[0]), math.inf)
    if config.extrapol_ratio > most:
        beside = f" and stochast_ratio {ratio:g}" if more_noise else ""
        raise UserError(
            f"extrapol_ratio came as {config.extrapol_ratio:g}, which with {levels} noise levels{beside} "
            f"drifts away from the prompt; expected at most {most:g}."
        )


def without_effect(config: UnifiedConfig) -> str:
    """A sentence that names what was chosen and changes nothing at so few noise levels; "" for nothing."""
    levels = levels_of(config.sampling_steps, config.sampling_order)
    chosen = {
        "sampling_order": config.sampling_order == 2 and levels == 1,  # its last level is one prediction
        "stochast_ratio": config.stochast_ratio != 1 and levels < SETTINGS["stochast_ratio"].levels,
        "extrapol_ratio": config.extrapol_ratio > 0 and levels < SETTINGS["extrapol_ratio"].levels,
    }
    names = [name for name, idle in chosen.items() if idle]
    if not names:
        return ""
    return (
        f"With {config.sampling_steps} steps and order {config.sampling_order} the sampler visits {levels} "
        f"noise level{'s' if levels > 1 else ''}, where {', '.join(names)} "
        f"change{'s' if len(names) == 1 else ''} nothing: more steps let them act."
    )


def sample(
    predict: Predict,
    noises: Sequence[Tensor],
    config: UnifiedConfig,
    generators: Sequence[torch.Generator | None],
    callback: Callable[[int, int, list[Tensor]], None] | None = None,
    sigmas: Sequence[float] | None = None,
) -> list[Tensor]:
    """The images (latents, fp64) that the noises become.

    generators: one for each image; its step noise comes from there alone. callback: (step, steps, x_hats)
    after each step. sigmas: noise levels instead of the configuration's, for starts that are not all noise.
    """
    sigmas = sigmas or time_grid(config)
    steps = len(sigmas) - 1
    xs = [noise.double() for noise in noises]
    previous: tuple[list[Tensor], list[Tensor]] = ([], [])
    answer: list[Tensor] = []

    for i, (t, t_next) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        velocities = _velocities(predict, xs, t, t_next, config)
        x_hats = [x - t * v for x, v in zip(xs, velocities, strict=True)]
        z_hats = [x + (1 - t) * v for x, v in zip(xs, velocities, strict=True)]
        answer = x_hats
        if callback is not None:
            callback(i + 1, steps, answer)
        if i + 1 == steps:
            break

        if config.extrapol_ratio > 0:
            current = (x_hats, z_hats)
            if i > 1:
                x_hats, z_hats = (
                    [now + config.extrapol_ratio * (now - before) for now, before in zip(*pair, strict=True)]
                    for pair in zip(current, previous, strict=True)
                )
            previous = current

        ratio = noise_ratio(config.stochast_ratio, t, t_next)
        kept, added = math.sqrt(1 - min(ratio, 1)), math.sqrt(ratio)
        fresh = [_noise(x, g) if ratio > 0 else 0.0 for x, g in zip(xs, generators, strict=True)]
        xs = [
            (1 - t_next) * x_hat + t_next * (kept * z_hat + added * noise)
            for x_hat, z_hat, noise in zip(x_hats, z_hats, fresh, strict=True)
        ]
    return answer


def noise_ratio(stochast_ratio: float | str, t: float, t_next: float) -> float:
    """The share of fresh noise in the step from t to t_next > 0."""
    if stochast_ratio == "SDE":
        return min(max(abs(t_next - t) * 2 * t / t_next**2, 0.0), 1.0)
    return float(stochast_ratio)


def _velocities(
    predict: Predict, xs: list[Tensor], t: float, t_next: float, config: UnifiedConfig
) -> list[Tensor]:
    """The velocities of a step, averaged over it by the order's rule. Its points lie on the way without fresh
    noise; none is asked at the image itself (t = 0), where there is nothing to predict.
    """
    rule = RULES[1 if config.sampling_order == 2 and t_next == 0 else config.sampling_order]
    mean = velocities = [0.0 * x for x in xs]
    for part, weight in rule:
        now = t + part * (t_next - t)
        points = [x + (now - t) * v for x, v in zip(xs, velocities, strict=True)]
        velocities = predict(points, now, _target(config.sampling_style, now, t_next))
        mean = [m + weight * v for m, v in zip(mean, velocities, strict=True)]
    return mean


def _target(style: str, t: float, t_next: float) -> float:
    return {"few": 0.0, "any": t_next, "mul": t}[style]


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """fp32 numbers from the image's own generator, wherever that lives (usually on the CPU)."""
    import torch

    device = generator.device if generator else "cpu"
    return torch.randn(like.shape, generator=generator, device=device, dtype=torch.float32).to(like)


# ---------------------------------------------------------------- one value


def _refuse(name: str, value: Any, expected: str) -> UserError:
    return UserError(f"{name} came as {value!r}; expected {expected}.")


def _number(value: Any) -> float:
    """nan for what is no number: it lies in no range."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _in_range(argument: str) -> Callable[[str, Any], Any]:
    """A check for a number that is a setting: whole where the setting is."""
    setting = setting_of(argument)
    low, high, whole = setting.minimum or 0, setting.maximum or 0, setting.kind is int

    def check(name: str, value: Any) -> float:
        number = _number(value)
        if not low <= number <= high or (whole and not number.is_integer()):
            raise _refuse(name, value, f"a {'whole ' if whole else ''}number from {low:g} to {high:g}")
        return setting.kind(number)

    return check


def _stochast(name: str, value: Any) -> float | str:
    if isinstance(value, str) and value.strip().upper() == "SDE":
        return "SDE"
    number = _number(value)
    if not 0 <= number <= 2:
        raise _refuse(name, value, "a number from 0 to 2, or SDE")
    return number


def _style(name: str, value: Any) -> str:
    if value not in STYLES:
        raise _refuse(name, value, f"one of {', '.join(STYLES)}")
    return value


def _list(value: Any) -> tuple[float, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(map(_number, parts)) if isinstance(parts, (list, tuple)) else ()


def _curve(name: str, value: Any) -> tuple[float, ...]:
    numbers = _list(value)
    if len(numbers) != 3 or not all(0.1 <= x <= 10 for x in numbers):
        raise _refuse(name, value, "three numbers from 0.1 to 10, for example 1,1,1")
    return numbers


def _gap(name: str, value: Any) -> tuple[float, ...]:
    numbers = _list(value)
    if len(numbers) != 2 or not all(0 <= x < 1 for x in numbers) or sum(numbers) >= 1:
        raise _refuse(
            name, value, "two numbers from 0 to 1 that are less than 1 together, for example 0.001,0.5"
        )
    return numbers


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{x:g}" for x in values)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "sampling_steps": _in_range("sampling_steps"),
    "stochast_ratio": _stochast,
    "extrapol_ratio": _in_range("extrapol_ratio"),
    "sampling_order": _in_range("sampling_order"),
    "sampling_style": _style,
    "time_dist_ctrl": _curve,
    "rfba_gap_steps": _gap,
}
assert list(_CHECKS) == [field.name for field in fields(UnifiedConfig)]
