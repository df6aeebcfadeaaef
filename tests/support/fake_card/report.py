"""What a run on the card that is not there came to. No torch: the tests' own process reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FIRST_STEP = "first step"  # a phase that prepares the prompt, too
STEP = "step "  # begins the names of the others'
WAITS = ("wait", "down")


class Refused(Exception):
    """What torch or the card refused, and where: torch's own exceptions cannot leave their process."""


@dataclass(frozen=True)
class Note:
    """kind: "up" or "down" (a copy to the card, from it), "wait" (Python asked for a value), "host" (the
    processor computed on a large tensor). where: lines of the program, the innermost first."""

    phase: str
    kind: str
    what: str
    where: str


@dataclass(frozen=True)
class Report:
    """sizes: of the pictures. kernels: by phase. notes: how often each."""

    sizes: list[tuple[int, int]]
    kernels: Mapping[str, int]
    notes: Mapping[Note, int]

    @property
    def step_kernels(self) -> int:
        """The most kernels of a step after the first."""
        return max(n for phase, n in self.kernels.items() if phase.startswith(STEP))

    @property
    def step_copies(self) -> int:
        """The most copies to the card in a step after the first."""
        ups = [(note.phase, n) for note, n in self.notes.items() if note.kind == "up"]
        steps = {phase for phase, _ in ups if phase.startswith(STEP)}
        return max((sum(n for where, n in ups if where == step) for step in steps), default=0)

    def in_steps(self, *kinds: str) -> list[Note]:
        """Notes of these kinds in any step, the first with its preparing included."""
        return [
            note for note in self.notes
            if note.kind in kinds and (note.phase == FIRST_STEP or note.phase.startswith(STEP))
        ]  # fmt: skip

    def count(self, *kinds: str) -> int:
        """Notes of these kinds in the whole run, after loading."""
        return sum(n for note, n in self.notes.items() if note.kind in kinds and note.phase != "load")
