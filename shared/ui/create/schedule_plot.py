"""The small plot of a sampler's time grid: how noisy the picture is at each step."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 320, 120
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 18, 22  # room around the curve, for the labels
MOST_LABELS = 6


def time_grid_html(levels: Sequence[float]) -> str:
    """levels: from the first step's noise level (1 is noise) down to 0, the picture."""
    steps = len(levels) - 1
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    points = [(LEFT + wide * i / steps, TOP + high * (1 - level)) for i, level in enumerate(levels)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points)
    labels = "".join(
        f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="{_anchor(i, steps)}">{level:.3g}</text>'
        for i, ((x, y), level) in enumerate(zip(points, levels, strict=True))
        if steps <= MOST_LABELS
    )
    said = ", ".join(f"{level:.3g}" for level in levels)
    base = TOP + high
    return (
        f'<svg class="zgp-grid" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Noise level at each step: {said}">'
        f'<path class="zgp-axis" d="M{LEFT} {TOP}V{base}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{TOP + 4}" text-anchor="end">noise</text>'
        f'<text x="{LEFT - 6}" y="{base + 4}" text-anchor="end">picture</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 4}">begin</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{_steps(steps)}</text>'
        f'<polyline points="{line}"/>{dots}{labels}</svg>'
    )


def problem_html(sentence: str) -> str:
    """In the place of the plot: why there is none."""
    return f'<p class="zgp-grid-problem" role="alert">{escape(sentence)}</p>'


def _anchor(i: int, steps: int) -> str:
    return "start" if i == 0 else "end" if i == steps else "middle"


def _steps(count: int) -> str:
    return "end of the only step" if count == 1 else f"end of {count} steps"
