"""Decides, before anything is loaded, how a job is made on this machine: which file of the model, what stays
on the card, what is streamed, how the VAE is tiled, and how much memory that takes at its peak.

Pure arithmetic over records: no torch, no files. Sizes are bytes; "GB" in sentences is GiB, as cards are
sold.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shared.errors import UserError
from shared.gpu.footprint import Needs, Offers, PartSize, Variant
from shared.gpu.offload_engines import SLOTS

GIB = 1 << 30
OVERHEAD = 3 * GIB // 8  # workspaces of cuBLAS and cuDNN, and what the allocator cannot use
PROCESS = GIB // 2  # RAM that Python, torch and their libraries take
NEAR = 1.10  # up to this many times the fastest step, precision is worth more than speed
MIN_KEPT_TILE = 512  # keeping a part on the card is worth tiles of this size, not smaller ones

RESERVED = 0.4 if sys.platform == "win32" else 0.5  # share of the RAM that systems let programs page-lock

#: bytes per second into the card: page-locked RAM (PCIe 3.0 x16 or 4.0 x8), other RAM, a disk
PINNED_RATE, PAGED_RATE, DISK_RATE = 12.5e9, 5e9, 1.5e9

#: compute capability from which on -> bf16 operations per second that a usual card of it reaches
BF16_RATES = {
    (0, 0): 5e12, (7, 5): 8e12, (8, 0): 220e12, (8, 6): 40e12, (8, 9): 80e12, (9, 0): 650e12,
    (10, 0): 1000e12, (12, 0): 100e12,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How weights are stored. speed: of linear layers relative to bf16 with a kernel for them, and without,
    where they are unpacked for every product.
    """

    bits: int
    speed: float
    unpacked: float = 1.0


KINDS = {
    "fp64": Kind(64, 1.0),
    "fp32": Kind(32, 1.0),
    "bf16": Kind(17, 1.0),  # before fp16, whose range does not suffice for every model
    "fp16": Kind(16, 1.0),
    "int8": Kind(9, 2.0, 0.8),
    "fp8": Kind(8, 0.9, 0.9),
    "svdq-fp4": Kind(5, 3.0, 0.5),
    "svdq-int4": Kind(4, 3.0, 0.5),
}


@dataclass(frozen=True)
class Machine:
    """What there is to compute on. capability: of the card, None on a machine that computes on its CPU.

    vram_free, ram_free: what this process can have, its own weights from earlier jobs included.
    kernels: kinds of quantized weights that fused kernels are installed for.
    fast_bf16: whether the CPU multiplies bf16. mmgp: whether it is installed.
    """

    name: str
    ram_total: int
    ram_free: int
    vram_total: int = 0
    vram_free: int = 0
    capability: tuple[int, int] | None = None
    kernels: frozenset[str] = frozenset()
    fast_bf16: bool = False
    mmgp: bool = True

    @property
    def float_bytes(self) -> int | None:
        """Of weights once loaded, where they are not quantized; None: 2 where the file has bf16, else 4."""
        return 2 if self.capability else None if self.fast_bf16 else 4


@dataclass(frozen=True)
class Overrides:
    """What the user decided; the defaults leave it to the planner.

    offload: one of SLOTS; "" is mmgp where it is installed. profile: one of PROFILES. preload: bytes of the
    transformer that stay on the card; with mmgp its budget, which what passes through counts against. dtype:
    "bf16" or "fp16". attention: a backend's name. reserved: share of the RAM that may be page-locked. safety:
    share of the card that may be used.
    """

    offload: str = ""
    profile: str = ""
    preload: int | None = None
    dtype: str = ""
    attention: str = "auto"
    reserved: float = RESERVED
    safety: float = 0.8
    compile: bool = False


NO_OVERRIDES = Overrides()


@dataclass(frozen=True)
class Profile:
    """A memory profile of Wan2GP. whole: parts go to the card whole. pinned: parts in page-locked RAM."""

    whole: bool
    pinned: tuple[str, ...]
    prefetch: bool = True


MMGP_BUDGET = 100 << 20  # of each part that profiles 2, 4 and 5 stream: Wan2GP's, with which nothing stays

PARTS = ("transformer", "text_encoder", "vae")
PROFILES = {
    "1": Profile(True, PARTS),
    "2": Profile(False, PARTS),
    "3": Profile(True, ("transformer",)),
    "3.5": Profile(True, ()),
    "4": Profile(False, ("transformer",)),
    "4.5": Profile(False, ("transformer",), prefetch=False),
    "5": Profile(False, ()),
}


@dataclass(frozen=True)
class Plan:
    """How a job is made.

    transformer, text_encoder: the chosen files. engine: one of SLOTS, "" on a CPU; profile: what the user
    gave it. resident_layers: blocks of the transformer that stay on the card while it computes; the other
    ones are streamed. encoder_whole: else every block of it is streamed. vae_tile: pixels, None for the whole
    picture. keep: parts that stay on the card afterwards. pinned: parts in page-locked RAM; streamed_only: of
    them, those of which only the streamed blocks are.
    peak, ram: expected bytes. seconds: of a step, by estimate. rung: 0 is the plan of choice, each further
    one needs less memory; last: there is no further one. warning: what makes it slow here, and what to do.
    """

    transformer: Variant
    text_encoder: Variant | None
    machine: Machine = field(compare=False)  # its free memory changes without changing a plan
    engine: str = ""
    profile: str = ""
    dtype: str = ""
    resident_layers: int = 0
    encoder_whole: bool = True
    vae_tile: int | None = None
    keep: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()
    streamed_only: tuple[str, ...] = ()
    prefetch: bool = True
    compile: bool = False
    peak: int = 0
    ram: int = 0
    seconds: float = field(default=0.0, compare=False)
    rung: int = 0
    last: bool = True
    warning: str = field(default="", compare=False)

    @property
    def total_layers(self) -> int:
        return len(self.transformer.size.block_bytes)

    @property
    def on_card(self) -> bool:
        return self.machine.capability is not None

    def sentence(self) -> str:
        """ "mmgp, int8, 14 of 34 layers resident, VAE tiled: about 7.1 of 8 GB"."""
        if not self.on_card:
            return f"computes on the CPU, {self.dtype}, about {_gb(self.ram)} GB of RAM"
        layers = f"{self.resident_layers} of {self.total_layers} layers resident"
        if self.resident_layers == self.total_layers:
            layers = "all on the card"
        engine = f"{self.engine} profile {self.profile}" if self.profile else self.engine
        words = [engine, self.transformer.kind.removeprefix("svdq-"), layers]
        module = self.transformer.module
        if module is not None and module.kind != self.transformer.kind:
            words[1] += f" with {module.kind} control"
        words += [] if self.encoder_whole else ["text encoder streamed"]
        words += [] if self.vae_tile is None else ["VAE tiled"]
        return f"{', '.join(words)}: about {_gb(self.peak)} of {_gb(self.machine.vram_total, 0)} GB"

    def report(self) -> str:
        """The sentence with the warning."""
        return f"{self.sentence()}; {self.warning}" if self.warning else self.sentence()

    def placements(self) -> dict[str, dict[str, Any]]:
        """Part -> arguments of a placement.Placement."""
        resident: dict[str, int | None] = dict.fromkeys(PARTS)
        if self.resident_layers < self.total_layers:
            resident["transformer"] = self.resident_layers
        if not self.encoder_whole:
            resident["text_encoder"] = 0
        return {
            part: {
                "resident_blocks": resident[part],
                "keep": part in self.keep,
                "pinned": part in self.pinned,
                "streamed_only": part in self.streamed_only,
                "prefetch": self.prefetch,
            }
            for part in PARTS
        }


def engine_of(machine: Machine, offload: str) -> str:
    """What moves the weights on a card. offload: the user's choice, "" for none."""
    return offload or ("mmgp" if machine.mmgp else "stream")


def plan(
    machine: Machine,
    offers: Offers,
    needs: Needs,
    overrides: Overrides = NO_OVERRIDES,
    *,
    rung: int = 0,
) -> Plan:
    """The plan of choice (rung 0), or a more careful one for a job that did not fit; the last one for any
    rung beyond.
    Raises UserError when nothing that the card offers can run here.
    """
    if machine.capability is None:
        return _cpu_plan(machine, offers, needs, overrides, rung)
    if overrides.offload == "mmgp" and not machine.mmgp:
        raise UserError(
            "mmgp is to move the weights and is not installed: run start.py, which installs it, or choose "
            "--offload stream."
        )
    planner = _Planner(machine, offers, needs, overrides)
    ladder = planner.ladder(planner.best())
    step = min(rung, len(ladder) - 1)
    chosen = replace(ladder[step], rung=step, last=step == len(ladder) - 1)
    streamed = sum(chosen.transformer.size.block_bytes[: chosen.total_layers - chosen.resident_layers])
    return replace(chosen, warning=_ram_warning(chosen, offers, streamed, machine.ram_free))


def careful(offers: Offers, overrides: Overrides) -> tuple[Offers, Overrides]:
    """What to choose from on a card once a worker was killed at a job: the smallest files on disk, and no
    page-locked RAM.
    """

    def least(variants: Sequence[Variant]) -> tuple[Variant, ...]:
        return tuple(sorted(_here(variants), key=lambda v: v.size.total)[:1])

    smallest = replace(
        offers, transformer=least(offers.transformer), text_encoder=least(offers.text_encoder)
    )
    return smallest, replace(overrides, reserved=0.0)


# ---- on a card ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Limits:
    """What a rung of the ladder still allows, as parts of what the plan of choice has."""

    layers: float = 1.0
    tile: int | None = None
    keeps: bool = True
    whole_encoder: bool = True


#: sets of parts to keep on the card, the most useful one for consecutive images first
KEEPS: tuple[tuple[str, ...], ...] = (PARTS, ("transformer", "vae"), ("transformer",), ())

FREE = _Limits()
STREAMED = _Limits(layers=0, tile=256, keeps=False, whole_encoder=False)
LADDER = (
    _Limits(layers=0.75, tile=512, keeps=False),
    _Limits(layers=0.5, tile=384, keeps=False, whole_encoder=False),
    STREAMED,
)


@dataclass(frozen=True)
class _Planner:
    machine: Machine
    offers: Offers
    needs: Needs
    overrides: Overrides

    @property
    def budget(self) -> int:
        """Bytes that a plan may take."""
        return min(int(self.machine.vram_total * self.overrides.safety), self.machine.vram_free)

    @property
    def profile(self) -> Profile | None:
        return PROFILES.get(self.overrides.profile)

    @property
    def engine(self) -> str:
        return engine_of(self.machine, self.overrides.offload)

    @property
    def as_wan2gp(self) -> Profile | None:
        """The profile where it means all that it means there: mmgp's budgets, and one part at a time."""
        return self.profile if self.engine == "mmgp" else None

    @property
    def prefetch(self) -> bool:
        return self.profile.prefetch if self.profile else True

    @property
    def slots(self) -> int:
        """Places on the card that streamed blocks take turns in."""
        return SLOTS[self.engine] if self.prefetch else 1

    def best(self) -> Plan:
        """The fastest of the files on disk, else of those to download; precision wins near ties."""
        plans = [self.place(variant, FREE) for variant in self.candidates()]
        fitting = [p for p in plans if p.peak <= self.budget or self.obeys]
        here = [p for p in fitting if p.transformer.on_disk]
        pool = here or fitting
        if not pool:
            raise self.too_small(plans)
        fastest = min(p.seconds for p in pool)
        near = [p for p in pool if p.seconds <= fastest * NEAR]
        return max(near, key=lambda p: _precision(p.transformer))

    @property
    def obeys(self) -> bool:
        """The user fixed what stays on the card: that is tried whatever the estimate says."""
        return bool(self.profile) or self.overrides.preload is not None

    def candidates(self) -> list[Variant]:
        offered = list(self.offers.transformer)
        plain = [v for v in offered if KINDS[v.kind].bits >= 16]
        return plain if self.overrides.dtype and plain else offered

    def ladder(self, best: Plan) -> list[Plan]:
        """The plan of choice and more careful ones: smaller tiles, fewer layers on the card, nothing kept,
        all streamed, and at last the smallest file on disk.
        """
        steps = [best, *(self.place(best.transformer, limits) for limits in LADDER)]
        here = [v for v in self.offers.transformer if v.on_disk]
        smallest = min(here, key=lambda v: v.size.total, default=best.transformer)
        if smallest.size.total < best.transformer.size.total:
            steps.append(self.place(smallest, STREAMED))
        ladder = [best]
        for step in steps:
            if step.peak < ladder[-1].peak:
                ladder.append(step)
        return ladder

    def place(self, variant: Variant, limits: _Limits) -> Plan:
        """The plan for one file: as many layers resident and as large tiles as fit, parts kept if they all
        do. A peak above the budget says that even the least does not fit.
        """
        encoder = self.encoder(variant)
        layers = self.resident(variant, limits)
        draft = self.with_memory(Plan(variant, encoder, self.machine, self.engine, resident_layers=layers))
        keeps = limits.keeps and not self.as_wan2gp
        may_be_whole = limits.whole_encoder and not (self.as_wan2gp and not self.as_wan2gp.whole)
        for keep in KEEPS if keeps else KEEPS[-1:]:
            for tile in self.tiles(limits, bool(keep)):
                for whole in (True, False) if may_be_whole else (False,):
                    trial = replace(draft, keep=keep, vae_tile=tile, encoder_whole=whole)
                    trial = replace(trial, peak=self.peak(trial))
                    if trial.peak <= self.budget and (whole or "text_encoder" not in keep):
                        return trial
        return trial

    def encoder(self, transformer: Variant) -> Variant | None:
        """The best file on disk (else to download) that fits in RAM beside the transformer."""
        offered = self.offers.text_encoder
        pool = [v for v in offered if v.on_disk] or list(offered)
        room = self.machine.ram_free - transformer.size.total
        fitting = [v for v in pool if v.size.total + v.size.ram_bytes <= room]
        smallest = min(pool, key=lambda v: v.size.total, default=None)
        return max(fitting, key=lambda v: KINDS[v.kind].bits, default=smallest)

    def resident(self, variant: Variant, limits: _Limits) -> int:
        """Layers of the transformer on the card."""
        size, count = variant.size, len(variant.size.block_bytes)
        if limits == FREE and self.obeys:
            return self.within_budget(size) if self.engine == "mmgp" else self.as_told(size)
        room = self.budget - OVERHEAD - self.activations(variant) - self.offers.transformer_modules
        fitting = max((k for k in range(count + 1) if size.on_card(k, self.slots) <= room), default=0)
        return int(fitting * limits.layers)

    def as_told(self, size: PartSize) -> int:
        """Layers that stay by the user's profile, or by the bytes that they may take."""
        count, preload = len(size.block_bytes), self.overrides.preload
        if self.profile and self.profile.whole and preload is None:
            return count
        return max(k for k in range(count + 1) if k == 0 or sum(size.block_bytes[-k:]) <= (preload or 0))

    def within_budget(self, size: PartSize) -> int:
        """Layers that stay within mmgp's budget, by its own rule: what is no block and two blocks in transit
        count, and without prefetching nothing stays. Whole parts have the share of the card that is safe.
        """
        budget = self.overrides.preload or MMGP_BUDGET
        if self.profile and self.profile.whole and self.overrides.preload is None:
            budget = int(self.machine.vram_total * self.overrides.safety)
        if budget >= size.total:
            return len(size.block_bytes)
        largest = max(size.block_bytes, default=1)
        left = budget - size.base_bytes - 2 * largest
        return max(0, left // largest) if self.prefetch else 0

    def tiles(self, limits: _Limits, keeps: bool) -> list[int | None]:
        """Tiles of the VAE to try, the largest first."""
        offered = list(self.needs.decode)
        if limits.tile is not None:
            small = [tile for tile in offered if tile is not None and tile <= limits.tile]
            return [*small] or offered[-1:]
        least = MIN_KEPT_TILE if keeps else 0
        return [tile for tile in offered if tile is None or tile >= least]

    def activations(self, variant: Variant) -> int:
        plain = KINDS[variant.kind].bits >= 16
        return self.needs.denoise if plain else self.needs.denoise_quantized

    def peak(self, draft: Plan) -> int:
        """The most bytes on the card over the job's phases: what computes, and what is kept beside it."""
        encoder = draft.text_encoder.size if draft.text_encoder else PartSize(0)
        held = {
            "transformer": self.offers.transformer_modules
            + draft.transformer.size.on_card(draft.resident_layers, self.slots),
            "text_encoder": encoder.total if draft.encoder_whole else encoder.on_card(0, self.slots),
            "vae": self.offers.vae.total,
        }
        work = {
            "transformer": self.activations(draft.transformer),
            "text_encoder": self.needs.encode,
            "vae": self.needs.decode[draft.vae_tile],
        }
        phases = (
            work[part] + sum(held[other] for other in PARTS if other == part or other in draft.keep)
            for part in PARTS
        )
        return OVERHEAD + max(phases)

    def with_memory(self, draft: Plan) -> Plan:
        """What of it lies in page-locked RAM, what a step then takes, and the rest of the user's choices."""
        size = draft.transformer.size
        streamed = sum(size.block_bytes[: draft.total_layers - draft.resident_layers])
        encoder = draft.text_encoder.size.total if draft.text_encoder else 0
        ram = encoder + size.total + self.offers.transformer_modules + self.offers.vae.total
        ram += draft.text_encoder.size.ram_bytes if draft.text_encoder else 0
        pinnable = min(self.overrides.reserved * self.machine.ram_total, self.machine.ram_free)
        pinned, streamed_only = [], []
        for part, count, least in (("transformer", size.total, streamed), ("text_encoder", encoder, encoder)):
            if self.profile is not None and part not in self.profile.pinned or min(count, least) > pinnable:
                continue
            pinned.append(part)
            if count > pinnable:
                streamed_only.append(part)
            pinnable -= min(count, pinnable)
        rate = PINNED_RATE if "transformer" in pinned else PAGED_RATE
        rate = rate if streamed <= self.machine.ram_free else DISK_RATE
        return replace(
            draft,
            dtype=self.overrides.dtype
            or ("bf16" if (self.machine.capability or (0, 0)) >= (8, 0) else "fp16"),
            pinned=tuple(pinned),
            streamed_only=tuple(streamed_only),
            profile=self.overrides.profile,
            prefetch=self.prefetch,
            compile=self.overrides.compile,
            ram=ram,
            seconds=max(self.compute_seconds(draft.transformer), streamed / rate),
        )

    def compute_seconds(self, variant: Variant) -> float:
        capability = self.machine.capability or (0, 0)
        rate = BF16_RATES[max(c for c in BF16_RATES if c <= capability)]
        kind = KINDS[variant.kind]
        speed = kind.speed if variant.kind in self.machine.kernels or kind.bits >= 16 else kind.unpacked
        return (self.needs.linear_flops / speed + self.needs.attention_flops) / rate

    def too_small(self, plans: Sequence[Plan]) -> UserError:
        least = min(p.peak for p in plans)
        machine = self.machine
        return UserError(
            f"This job needs about {_gb(least)} GB of the graphics card's memory even with everything "
            f"streamed; {_gb(self.budget)} GB of the {_gb(machine.vram_total, 0)} GB of {machine.name} may "
            "be used: choose a smaller resolution or fewer images at once, close other programs that use "
            "the card, or start with a higher --vram-safety-coefficient."
        )


# ---- on a CPU ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CpuMemory:
    """Bytes of RAM that a transformer's file and all that goes with it take on a CPU.

    held: by what nothing can take back: activations, the VAE, weights that were unpacked. encoder, mapped: of
    the files that the text encoder and a step read. They lie in the system's cache while there is room, and
    take turns there.
    """

    held: int
    encoder: int
    mapped: int

    @property
    def at_once(self) -> int:
        return self.held + max(self.encoder, self.mapped)

    @property
    def together(self) -> int:
        return self.held + self.encoder + self.mapped


def _cpu_memory(variant: Variant, encoder: Variant | None, offers: Offers, work: int) -> _CpuMemory:
    unpacked = variant.size.total if _is_unpacked(variant) else 0
    return _CpuMemory(
        held=PROCESS + work + offers.vae.total + unpacked,
        encoder=encoder.size.total + encoder.size.ram_bytes if encoder else 0,
        mapped=variant.size.total - unpacked + offers.transformer_modules,
    )


def _cpu_plan(machine: Machine, offers: Offers, needs: Needs, overrides: Overrides, rung: int = 0) -> Plan:
    """The most precise file on disk (else to download) that has room in RAM beside the text encoder's; else,
    and from rung 1 on, the smallest. The VAE's tiles are the largest that fit. UserError when not even that
    fits which must lie in RAM.
    """
    encoder = min(_here(offers.text_encoder), key=lambda v: v.size.total, default=None)
    computing = max(needs.encode, 2 * needs.denoise, needs.denoise_quantized)

    def memory(variant: Variant, tile: int | None) -> _CpuMemory:
        return _cpu_memory(variant, encoder, offers, max(computing, needs.decode[tile]))

    tiles = list(needs.decode)
    offered, room = _here(offers.transformer), machine.ram_free
    roomy = [v for v in offered if memory(v, tiles[-1]).together <= room]
    smallest = min(offered, key=lambda v: (memory(v, tiles[-1]).held, v.size.total))
    best = max(roomy, key=_precision, default=smallest)
    variant = smallest if rung else best
    fitting = [tile for tile in tiles if memory(variant, tile).at_once <= room]
    tile = tiles[-1] if rung or not fitting else fitting[0]
    takes = memory(variant, tile)
    if takes.held > room:
        raise _no_room(takes.held, room, variant, offers)
    dtype = "bf16" if machine.fast_bf16 and variant.kind not in ("fp32", "fp16") else "fp32"
    drafted = Plan(
        variant,
        encoder,
        machine,
        dtype=overrides.dtype or dtype,
        vae_tile=tile,
        compile=overrides.compile,
        ram=takes.at_once,
        rung=1 if rung and variant != best else 0,
        last=bool(rung) or best == smallest,
    )
    short = _ram_warning(drafted, offers, takes.mapped, room - takes.held)
    slow = _dtype_warning(machine, overrides.dtype)
    return replace(drafted, warning="; ".join(filter(None, (slow, short))))


def _no_room(needed: int, free: int, variant: Variant, offers: Offers) -> UserError:
    mapped = [v for v in offers.transformer if not _is_unpacked(v)] if _is_unpacked(variant) else []
    advice = f", or take {_name(mapped[-1])}, whose weights need not all lie in RAM" if mapped else ""
    return UserError(
        f"This job needs about {_gb(needed)} GB of RAM and {_gb(free)} GB are free: choose a smaller "
        f"resolution or fewer images at once, or close other programs{advice}."
    )


def _ram_warning(plan: Plan, offers: Offers, read: int, room: int) -> str:
    """What a plan costs where RAM is short; "" where it is not. read: bytes of files that each step reads,
    for which there is `room`.
    """
    if plan.ram <= plan.machine.ram_free:
        return ""
    free = f"{_gb(plan.machine.ram_free)} GB of RAM are free"
    if read <= room:
        return f"its files take {_gb(plan.ram)} GB of RAM and {free}, so some are read from the disk again"
    advice = _instead(plan, offers)
    return f"{free}, so every step reads up to {_gb(read)} GB from the disk{advice}"


def _dtype_warning(machine: Machine, dtype: str) -> str:
    """Of a 16-bit dtype that the user asked for and the processor is slow at."""
    slow = dtype == "fp16" or dtype == "bf16" and not machine.fast_bf16
    return f"this processor is several times slower in {dtype}: leave --{dtype} out" if slow else ""


def _instead(plan: Plan, offers: Offers) -> str:
    """The advice to take the smallest file that the card offers, where it is much smaller."""
    useful = [v for v in offers.transformer if plan.on_card or not _is_unpacked(v)]
    least, taken = min(useful, key=lambda v: v.size.total, default=plan.transformer), plan.transformer
    if least.size.total > 0.75 * taken.size.total:
        return ""
    return f": take {_name(least)}, {_gb(least.size.total)} GB instead of {_gb(taken.size.total)}"


def _is_unpacked(variant: Variant) -> bool:
    """Nunchaku's weights are put in another order when they are loaded, so they cannot stay in their file."""
    return variant.kind.startswith("svdq-")


def _name(variant: Variant) -> str:
    return variant.source.rsplit("/", 1)[-1]


# ---- small things ------------------------------------------------------------------------------------------


def _here(variants: Sequence[Variant]) -> list[Variant]:
    """Those on disk; all of them when none is."""
    return [v for v in variants if v.on_disk] or list(variants)


def _precision(variant: Variant) -> tuple[int, int]:
    """Of the transformer first, then of its control network."""
    return KINDS[variant.kind].bits, KINDS[variant.module.kind].bits if variant.module else 0


def _gb(count: float, digits: int = 1) -> str:
    return f"{max(count / GIB, 0.1):.{digits}f}"
