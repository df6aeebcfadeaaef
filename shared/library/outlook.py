"""What a job takes on this computer: its plan and its files. The page shows it, programs are told it, and the
worker does it: there is no second answer. No torch, no network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shared.errors import UserError
from shared.gpu import planner
from shared.gpu.footprint import Offers, Variant
from shared.gpu.planner import NO_OVERRIDES, Machine, Overrides, Plan
from shared.library.model_info import ModelInfo
from shared.settings.table import ANY_PRECISION
from shared.weights.files import Folders, Required, arrived, describe, file_name, is_url

NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Missing:
    """A file that is fetched for a job.

    size: its bytes, from its name and the published models; 0 for small files and where nobody knows.
    arrived: bytes of it that are here from a download that was interrupted.
    """

    role: str
    source: str
    size: int
    arrived: int = 0

    @property
    def name(self) -> str:
        return file_name(self.source)

    @property
    def left(self) -> int:
        """Bytes to come."""
        return max(0, self.size - self.arrived)


@dataclass(frozen=True)
class Outlook:
    """plan: None for families that say nothing of their memory. files: what the job needs, each with the
    alternative that is used. missing: those of them that are fetched first.
    """

    plan: Plan | None
    files: tuple[Required, ...]
    missing: tuple[Missing, ...]

    @property
    def left(self) -> int:
        """Bytes to come."""
        return sum(one.left for one in self.missing)

    @property
    def kind(self) -> str:
        """How the weights are stored that are to come: "int8"; "" while that is unknown or no matter."""
        roles = {one.role for one in self.missing}
        if self.plan is None or not roles & {"transformer", "module0"}:
            return ""
        return self.plan.transformer.kind.removeprefix("svdq-")


def outlook(
    info: ModelInfo,
    folders: Folders,
    settings: Mapping[str, Any],
    read_machine: Callable[[], Machine],
    overrides: Overrides = NO_OVERRIDES,
    *,
    rung: int = 0,
    lora_bytes: int = 0,
    careful: bool = False,
    agreed: Collection[str] = NOTHING,
) -> Outlook:
    """Of a job with these settings. UserError when it cannot be made on that machine.

    careful: see planner.careful; on a CPU the rung says it.
    agreed: addresses that the user has said yes to. Of a file that is not here and has several addresses, the
    one of which some has come is fetched, else one of these, else the one that the plan prefers.
    """
    settled = [_settled(one, folders, agreed) for one in info.required]
    plan = _plan(info, folders, settings, read_machine, overrides, settled, rung, lora_bytes, careful)
    return _with_files(info, folders, plan, settled)


def unplanned(info: ModelInfo, folders: Folders, agreed: Collection[str] = NOTHING) -> Outlook:
    """The files of a model that cannot be planned here, for whoever wants them anyway."""
    return _with_files(info, folders, None, [_settled(one, folders, agreed) for one in info.required])


def chosen(required: Sequence[Required], plan: Plan) -> list[Required]:
    """The required files with the plan's choice as the only alternative."""
    sources = {"transformer": plan.transformer.source}
    if plan.transformer.module is not None:
        sources["module0"] = plan.transformer.module.source
    if plan.text_encoder is not None:
        sources["text_encoder"] = plan.text_encoder.source
    return [
        replace(one, alternatives=[sources[one.role]]) if sources.get(one.role) in one.alternatives else one
        for one in required
    ]


def _with_files(info: ModelInfo, folders: Folders, plan: Plan | None, settled: list[Required]) -> Outlook:
    planned = info.required if plan is None else chosen(info.required, plan)
    pairs = zip(info.required, planned, settled, strict=True)
    files = [known if best == one else best for one, best, known in pairs]
    missing = [_missing(info, one, folders) for one in files if not describe(one, folders).on_disk]
    return Outlook(plan, tuple(files), tuple(missing))


def _missing(info: ModelInfo, one: Required, folders: Folders) -> Missing:
    source = next(filter(is_url, one.alternatives), one.alternatives[0])
    if not is_url(source):
        return Missing(one.role, source, 0)
    size = info.handler.query_download_bytes(info.architecture, info.card.model, one, source, folders)
    return Missing(one.role, source, size, arrived(source, folders, one.target))


def _settled(one: Required, folders: Folders, agreed: Collection[str]) -> Required:
    """With the only alternative that has been begun or agreed to; as it is when a file of it is here."""
    if describe(one, folders).on_disk:
        return one
    urls = [source for source in one.alternatives if is_url(source)]
    come = {source: arrived(source, folders, one.target) for source in urls}
    begun = max(come, key=come.__getitem__, default="")
    known = [begun] if begun and come[begun] else [source for source in urls if source in agreed]
    return replace(one, alternatives=known[:1]) if known else one


# ---- the plan ----------------------------------------------------------------------------------------------


def _plan(
    info: ModelInfo,
    folders: Folders,
    settings: Mapping[str, Any],
    read_machine: Callable[[], Machine],
    overrides: Overrides,
    settled: Sequence[Required],
    rung: int,
    lora_bytes: int,
    careful: bool,
) -> Plan | None:
    """Among the settled files, or, where those do not fit, among all."""
    needs = info.handler.query_memory(
        info.architecture, info.card.model, settings, folders, lora_bytes=lora_bytes
    )
    if needs is None:
        return None
    here = read_machine()
    float_bytes = 2 if overrides.dtype else here.float_bytes
    offers = _offers(info, folders, float_bytes, settings.get("precision", ANY_PRECISION))
    if careful and here.capability is not None:
        offers, overrides = planner.careful(offers, overrides)
    narrowed = _among(offers, settled)
    if narrowed != offers:
        try:
            return planner.plan(here, narrowed, needs, overrides, rung=rung)
        except UserError:  # the computer has changed since: what fits now is asked for anew
            pass
    return planner.plan(here, offers, needs, overrides, rung=rung)


def _offers(info: ModelInfo, folders: Folders, float_bytes: int | None, precision: str) -> Offers:
    """What the card offers in this precision. UserError when that is nothing."""
    offers = info.handler.query_offers(info.architecture, info.card.model, folders, float_bytes)
    if not offers.transformer:
        raise UserError(
            f"{' or '.join(info.missing)} is in none of the folders of models and the card of {info.name} "
            f"gives no address to download it from: put it into {folders.ckpts}, or correct the card."
        )
    if precision == ANY_PRECISION:
        return offers
    fitting = tuple(one for one in offers.transformer if one.kind == precision)
    if not fitting:
        kinds = ", ".join(dict.fromkeys(one.kind for one in offers.transformer))
        raise UserError(
            f"precision came as {precision}, {info.name} is here as {kinds}: choose one of these, or "
            f"{ANY_PRECISION}."
        )
    return replace(offers, transformer=fitting)


def _among(offers: Offers, settled: Sequence[Required]) -> Offers:
    """Without the alternatives that are out of the question; a part keeps all of them if none would stay."""
    left = {one.role: set(one.alternatives) for one in settled}

    def stays(one: Variant) -> bool:
        module = one.module is None or one.module.source in left.get("module0", (one.module.source,))
        return module and one.source in left.get("transformer", (one.source,))

    transformer = tuple(filter(stays, offers.transformer))
    encoder = tuple(one for one in offers.text_encoder if one.source in left.get("text_encoder", ()))
    return replace(
        offers,
        transformer=transformer or offers.transformer,
        text_encoder=encoder or offers.text_encoder,
    )
