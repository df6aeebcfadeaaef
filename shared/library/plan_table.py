"""What each model takes on this computer, or on a card that one does not have yet: by arithmetic over headers
and published sizes, never measured. The command line, the tab Models and the README show it. No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from shared.errors import UserError
from shared.gpu import kernel_packages
from shared.gpu.planner import GIB, NO_OVERRIDES, Machine, Overrides, Plan
from shared.library.model_info import ModelInfo
from shared.library.outlook import NOTHING, Outlook, outlook, unplanned
from shared.settings.messages import size_text
from shared.weights.files import Folders

#: GB of a card's memory -> (a usual card of that size, its compute capability)
USUAL_CARDS = {
    4: ("RTX 3050 Laptop", (8, 6)), 6: ("RTX 3050", (8, 6)), 8: ("RTX 4060", (8, 9)),
    10: ("RTX 3080", (8, 6)), 12: ("RTX 3060", (8, 6)), 16: ("RTX 4060 Ti", (8, 9)),
    24: ("RTX 4090", (8, 9)), 32: ("RTX 5090", (12, 0)),
}  # fmt: skip
DESKTOP = GIB // 2  # of the card, that the screen takes
SYSTEM = 4 * GIB  # of the RAM, that the system, a browser and the page take
STREAMED_ENCODER = "encoder streamed"
HEADINGS = (
    "model", "card", "file", "engine", "on the card", "VAE", "peak VRAM", "RAM", "download", "settings"
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One model on one computer. problem: why it cannot be made there, "" when it can."""

    model: ModelInfo
    machine: Machine
    found: Outlook
    problem: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """Under HEADINGS."""
        settings = self._settings()
        download = size_text(self.found.left) if self.found.left else "-"
        if self.problem or self.found.plan is None:
            why = self.problem or "its family says nothing of its memory"
            return (self.model.id, card_words(self.machine), why, *["-"] * 5, download, settings)
        plan = self.found.plan
        encoder = "" if plan.encoder_whole else f", {STREAMED_ENCODER}"
        return (
            self.model.id, card_words(self.machine), file_words(plan), engine_words(plan),
            layer_words(plan) + encoder, tile_words(plan), peak_words(plan), f"{_gb(plan.ram)} GB", download,
            settings,
        )  # fmt: skip

    def line(self, download: bool = False) -> str:
        """The same words in one line: "int8 file, 27 of 34 layers on the card, VAE whole, …". download: with
        the size of what is fetched.
        """
        plan = self.found.plan
        if self.problem or plan is None:
            return self.problem
        words = [f"{file_words(plan)} file"]
        if plan.on_card:
            words += [f"engine {engine_words(plan)}", f"{layer_words(plan)} on the card"]
            words += [] if plan.encoder_whole else [STREAMED_ENCODER]
            words += [f"VAE {tile_words(plan)}", f"peak VRAM {peak_words(plan)}"]
        else:
            words.append(f"computes on the CPU in {plan.dtype}")
        words.append(f"{_gb(plan.ram)} GB of RAM")
        words += [f"{size_text(self.found.left)} to download"] if download and self.found.left else []
        return ", ".join(words)

    def record(self) -> dict[str, object]:
        """As JSON has it; sizes in bytes."""
        plan, machine = self.found.plan, self.machine
        said: dict[str, object] = {
            "model": self.model.id, "card": machine.name, "vram_bytes": machine.vram_total,
            "ram_bytes": machine.ram_total, "capability": machine.capability, "problem": self.problem,
            "download_bytes": self.found.left, "download": [one.source for one in self.found.missing],
        }  # fmt: skip
        if plan is None:
            return said
        return said | {
            "file": file_words(plan), "engine": engine_words(plan), "resident_layers": plan.resident_layers,
            "layers": plan.total_layers, "vae_tile": plan.vae_tile, "peak_vram_bytes": plan.peak,
            "plan_ram_bytes": plan.ram, "plan": plan.sentence(),
        }  # fmt: skip

    def _settings(self) -> str:
        """What of the model's defaults memory depends on."""
        defaults = self.model.defaults
        count = defaults.get("batch_size", 1)
        return str(defaults.get("resolution", "-")) + (f", {count} images" if count > 1 else "")


def file_words(plan: Plan) -> str:
    """ "int8", with the control network's kind where it is another one."""
    kind, module = plan.transformer.kind, plan.transformer.module
    beside = f" + {module.kind} control" if module is not None and module.kind != kind else ""
    return kind.removeprefix("svdq-") + beside


def engine_words(plan: Plan) -> str:
    """What moves the weights; "-" on a CPU, where nothing is moved."""
    return plan.engine or "-"


def layer_words(plan: Plan) -> str:
    """What of the transformer stays on the card while it computes."""
    if not plan.on_card:
        return "-"
    whole = plan.resident_layers == plan.total_layers
    return "all layers" if whole else f"{plan.resident_layers} of {plan.total_layers} layers"


def tile_words(plan: Plan) -> str:
    return "whole" if plan.vae_tile is None else f"tiles of {plan.vae_tile}"


def peak_words(plan: Plan) -> str:
    if not plan.on_card:
        return "-"
    return f"{_gb(plan.peak)} of {plan.machine.vram_total / GIB:.0f} GB"


def _gb(count: int) -> str:
    return f"{max(count / GIB, 0.1):.1f}"


def card_words(machine: Machine) -> str:
    return f"{machine.vram_total / GIB:.0f} GB" if machine.capability else "CPU"


# ---- the computers -----------------------------------------------------------------------------------------


def pretended(vram: float, here: Machine, ram: float | None = None) -> Machine:
    """This computer with a card of `vram` GB, of a usual kind of that size, with the kernels that start.py
    installs for it.

    ram: GB, by default what is here.
    """
    size = max((known for known in USUAL_CARDS if known <= vram), default=min(USUAL_CARDS))
    name, capability = USUAL_CARDS[size]
    total = int(vram * GIB)
    free = max(0, total - DESKTOP)
    card = replace(
        here, name=f"a card like {name}", vram_total=total, vram_free=free, capability=capability,
        kernels=kernel_packages.expected(capability, kernel_packages.INSTALLED_WITH_A_CARD),
    )  # fmt: skip
    return with_ram(card, ram)


def with_ram(machine: Machine, ram: float | None) -> Machine:
    """With so many GB of RAM, of which the system takes some; None: as it is."""
    if ram is None:
        return machine
    total = int(ram * GIB)
    return replace(machine, ram_total=total, ram_free=max(total // 4, total - SYSTEM))


def machine_words(machine: Machine) -> str:
    """ "8 GB card like RTX 4060 (compute capability 8.9, 7.5 GB free), 16 GB of RAM (12.0 free)"."""
    ram = f"{machine.ram_total / GIB:.0f} GB of RAM ({machine.ram_free / GIB:.1f} free)"
    if machine.capability is None:
        return f"{machine.name}, {ram}"
    major, minor = machine.capability
    return (
        f"{machine.vram_total / GIB:.0f} GB, {machine.name} (compute capability {major}.{minor}, "
        f"{machine.vram_free / GIB:.1f} GB free), {ram}"
    )


# ---- the rows ----------------------------------------------------------------------------------------------


def rows(
    models: Iterable[ModelInfo],
    machines: Sequence[Machine],
    folders: Folders,
    overrides: Overrides = NO_OVERRIDES,
    agreed: Collection[str] = NOTHING,
) -> list[Row]:
    """Each model on each computer, with the model's default settings."""
    return [row(model, machine, folders, overrides, agreed) for model in models for machine in machines]


def row(
    model: ModelInfo,
    machine: Machine,
    folders: Folders,
    overrides: Overrides = NO_OVERRIDES,
    agreed: Collection[str] = NOTHING,
) -> Row:
    try:
        found = outlook(model, folders, model.defaults, lambda: machine, overrides, agreed=agreed)
    except (UserError, OSError) as error:
        return Row(model, machine, unplanned(model, folders, agreed), str(error))
    return Row(model, machine, found)


def markdown(found: Sequence[Row]) -> str:
    """The rows as a table of a Markdown file."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(one.cells for one in found)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
