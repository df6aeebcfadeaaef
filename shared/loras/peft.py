"""PEFT's configuration of a LoRA: in the file's header, or in adapter_config.json beside it. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.settings.messages import printable

MAX_CONFIG_BYTES = 1_000_000


# What PEFT calls the algorithms that have an alpha.
KINDS = {"LoRA": "LORA", "LoHa": "LOHA", "LoKr": "LOKR"}
NEUMANN_TERMS, COFT_EPS = 5, 6e-5  # PEFT's defaults
# An expression that may take for ever on a name: a group that is repeated.
ENDLESS = re.compile(r"\)[*+?{]")
MAX_PATTERN, MAX_NEUMANN_TERMS = 300, 100
MAX_REPEATS = 4  # in one expression


@dataclass(frozen=True)
class PeftConfig:
    """What of PEFT's configuration changes an adapter whose file has no alpha.

    kind: PEFT's peft_type, "" where it says none. alphas, ranks: by an expression for modules' names.
    neumann: terms of the series that an OFT's rotations are computed by; 0: by the inverse.
    limit: of an OFT's angles, PEFT's "eps" where its "coft" is chosen; 0: none.
    """

    alpha: float | None = None
    alphas: tuple[tuple[re.Pattern[str], float], ...] = ()
    rank: int | None = None
    ranks: tuple[tuple[re.Pattern[str], float], ...] = ()
    kind: str = ""
    root_rank: bool = False  # "rslora": alpha / sqrt(rank)
    neumann: int = NEUMANN_TERMS
    limit: float = 0.0

    def scale(self, module: str, algorithm: str, rank: int | None) -> float:
        """What PEFT multiplies a module's delta by: alpha / rank. rank: as the factors have it.

        PEFT divides a LoKr's by the rank of the configuration, even where both of its factors are full.
        """
        if self.kind not in ("", KINDS.get(algorithm)):
            return 1.0
        alpha = _of(module, self.alphas, self.alpha)
        if algorithm == "LoKr":
            rank = int(_of(module, self.ranks, self.rank) or rank or 0)
        if alpha is None or not rank:
            return 1.0
        return alpha / (math.sqrt(rank) if self.root_rank else rank)


def _of(
    module: str, patterns: tuple[tuple[re.Pattern[str], float], ...], otherwise: float | None
) -> float | None:
    return next((value for pattern, value in patterns if pattern.match(module)), otherwise)


def read_config(path: Path, metadata: Mapping[str, str], prefixes: Iterable[str]) -> PeftConfig | None:
    """PEFT's configuration: from the header, or from adapter_config.json beside a file that PEFT saved.

    Sources: diffusers packs a LoraConfig as JSON into "lora_adapter_metadata", each key behind the name of
    its model and a dot; PEFT writes it to adapter_config.json.
    """
    if "lora_adapter_metadata" in metadata:
        text, name = metadata["lora_adapter_metadata"], printable(path.name, 100)
        if len(text) > MAX_CONFIG_BYTES:
            raise UserError(f"The lora_adapter_metadata of {name} is longer than a configuration.")
        config = _object(text, f"the lora_adapter_metadata of {name}")
        names = ("transformer.", "diffusion_model.", "")
        config = {
            key.removeprefix(prefix): value
            for prefix in reversed(names)
            for key, value in config.items()
            if key.startswith(prefix)
        }
        return _config(config, f"the lora_adapter_metadata of {name}")
    beside = path.with_name("adapter_config.json")
    saved_by_peft = path.stem == "adapter_model" or any(p.startswith("base_model.model.") for p in prefixes)
    if not saved_by_peft or not beside.is_file():
        return None
    where = printable(str(beside), 150)
    if beside.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"{where} is larger than a configuration: put the right one there or remove it.")
    return _config(_object(beside.read_bytes(), where), where)


def _object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}): mend it or remove it.") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object: mend it or remove it.")
    return value


def _config(config: Mapping[str, Any], where: str) -> PeftConfig:
    alpha, rank = config.get("lora_alpha", config.get("alpha")), config.get("r")
    return PeftConfig(
        float(alpha) if _is_number(alpha) else None,
        _patterns(config.get("alpha_pattern"), where),
        rank if type(rank) is int and 0 < rank < 1 << 31 else None,
        _patterns(config.get("rank_pattern"), where),
        str(config.get("peft_type") or "").rpartition(".")[2].upper(),
        bool(config.get("use_rslora")),
        _neumann(config, where) if config.get("use_cayley_neumann", True) else 0,
        _limit(config, where) if config.get("coft") else 0.0,
    )


def _neumann(config: Mapping[str, Any], where: str) -> int:
    """The terms of an OFT's series; PEFT takes 0 and less for 1."""
    terms = config.get("num_cayley_neumann_terms", NEUMANN_TERMS)
    if type(terms) is not int or terms > MAX_NEUMANN_TERMS:
        given = f"num_cayley_neumann_terms {printable(repr(terms), 40)}"
        raise UserError(f"{where} has {given}; expected a whole number of at most {MAX_NEUMANN_TERMS}.")
    return max(terms, 1)


def _limit(config: Mapping[str, Any], where: str) -> float:
    """The eps of a constrained OFT."""
    eps = config.get("eps", COFT_EPS)
    if not _is_number(eps) or eps <= 0:
        raise UserError(f"{where} has eps {printable(repr(eps), 40)}; expected a number above 0.")
    return float(eps)


def _patterns(given: Any, where: str) -> tuple[tuple[re.Pattern[str], float], ...]:
    """PEFT's expressions, each of which means the end of a module's name, and their numbers.

    UserError for one that cannot be read: without it the module would be scaled by another number.
    """
    found = []
    for text, value in given.items() if isinstance(given, dict) else ():
        repeats = sum(text.count(sign) for sign in "*+{")
        try:
            if len(text) > MAX_PATTERN or repeats > MAX_REPEATS or ENDLESS.search(text):
                raise re.error("it may take for ever")
            pattern = re.compile(rf"(.*\.)?({text})$")
        except (re.error, OverflowError, RecursionError) as error:
            shown = f"the expression '{printable(text)}' ({printable(str(error))})"
            raise UserError(f"{where} has {shown}: mend it or remove it.") from error
        if _is_number(value):
            found.append((pattern, float(value)))
    return tuple(found)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30
