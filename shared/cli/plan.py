"""`--plan`: what the models take here, or would take on another card. Nothing is loaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

from shared.engine.configuration import EngineConfig
from shared.gpu.machine import survey
from shared.gpu.planner import Machine
from shared.jobs.agreements import agreed_in
from shared.library import plan_table
from shared.library.catalog import Catalog


def show(
    config: EngineConfig,
    models: Catalog,
    options: argparse.Namespace,
    print_table: Callable[[Sequence[Sequence[str]]], None],
) -> None:
    """Print a line for each model and card. SettingsError for a model that there is not."""
    machines = _machines(config, options)
    wanted = [models.model(name.strip()) for name in options.model.split(",")] if options.model else [
        model for model in models.models.values() if model.card.visible
    ]  # fmt: skip
    found = plan_table.rows(
        wanted, machines, config.folders, config.overrides, agreed_in(config.database)
    )
    if options.json:
        for one in found:
            print(json.dumps(one.record()))
        return
    if options.markdown:
        print(plan_table.markdown(found))
        return
    for machine in machines:
        print(f"Planned by arithmetic, not measured: {plan_table.machine_words(machine)}")
    print_table([plan_table.HEADINGS, *(one.cells for one in found)])
    for sentence in models.errors:
        print(f"broken: {sentence}")


def _machines(config: EngineConfig, options: argparse.Namespace) -> list[Machine]:
    here = survey("cpu" if options.vram else config.gpu)
    sizes = [size for group in options.vram or () for size in group]
    if not sizes:
        return [plan_table.with_ram(here, options.ram)]
    return [plan_table.pretended(size, here, options.ram) for size in sizes]
