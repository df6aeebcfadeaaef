"""The command line's work on LoRA files: --check-loras and --convert-lora."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shared.library.catalog import Catalog
from shared.library.model_info import ModelInfo
from shared.loras.inspection import Verdict
from shared.loras.library import Library
from shared.settings.messages import printable


def check(models: Catalog, model_id: str) -> bool:
    """Print one line for every LoRA file of every folder; True when all can be used. Imports no torch.

    model_id: judge for this model only; "" for any model that the file fits.
    """
    all_usable = True
    for libraries in _by_folder(_models(models, model_id)).values():
        for entry in libraries[0][0].entries():
            verdict, names = _judge(libraries, entry.path)
            all_usable &= verdict.usable
            words = f"{verdict.sentence} ({names})" if verdict.usable else f"refused: {verdict.sentence}"
            name = printable(entry.name, 200)
            print(f"{name}: {words}")
            for left_out in verdict.left_out if verdict.usable else ():
                print(f"{name}: left out {left_out}")
    return all_usable


def convert(models: Catalog, model_id: str, source: Path, out: Path) -> None:
    """Write `source` to `out` under the names that other programs read. UserError when that cannot be."""
    libraries = [pair for pairs in _by_folder(_models(models, model_id)).values() for pair in pairs]
    fitting = next((library for library, _ in libraries if library.verdict(source).usable), libraries[0][0])
    from shared.loras.convert import convert as convert_file  # brings torch

    verdict = convert_file(source, out, fitting.names)
    print(f"{out}: {verdict.sentence}")


def _models(models: Catalog, model_id: str) -> list[ModelInfo]:
    """The models that have LoRAs. UserError when there is none, or the named one has none."""
    found = [info for info in models.models.values() if info.lora_folder is not None]
    if model_id or not found:
        chosen = models.model(model_id or models.default_model)
        chosen.loras()  # says it when it has none
        return [chosen]
    return found


def _by_folder(infos: Sequence[ModelInfo]) -> dict[Path, list[tuple[Library, list[str]]]]:
    """folder -> its libraries, one for each shape of model, and the names of the models of that shape."""
    folders: dict[Path, dict[Library, list[str]]] = {}
    for info in infos:
        library = info.loras()
        folders.setdefault(library.folder, {}).setdefault(library, []).append(info.name)
    return {folder: list(libraries.items()) for folder, libraries in folders.items()}


def _judge(libraries: Sequence[tuple[Library, list[str]]], path: Path) -> tuple[Verdict, str]:
    """The verdict for the models that the file fits best, and their names; else the first models' reason, but
    for that of a model of another size.
    """

    def fit(verdict: Verdict) -> tuple[int, bool]:
        return verdict.matched, not verdict.other_size

    judged = [(library.verdict(path), names) for library, names in libraries]
    most = max(fit(verdict) for verdict, _ in judged)
    best = [(verdict, names) for verdict, names in judged if fit(verdict) == most]
    return best[0][0], "for " + ", ".join(name for _, names in best for name in names)
