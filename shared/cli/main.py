"""The command line: what each way of starting does."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from shared import config as config_file
from shared.cli import loras
from shared.cli import plan as cli_plan
from shared.cli.engine_config import configuration
from shared.cli.flags import DEFAULT_PORT, LOG_LEVELS, build_parser, port_number, read_flags
from shared.engine.configuration import EngineConfig, read_catalog
from shared.errors import UserError
from shared.gpu.machine import survey
from shared.gpu.planner import Machine
from shared.jobs.agreements import agreed_in
from shared.library.catalog import Catalog
from shared.library.consent import Ask, NotAgreed, amount
from shared.library.job_loras import bytes_here
from shared.library.model_info import HandlerFor, ModelInfo
from shared.library.outlook import Outlook, outlook, unplanned
from shared.loras.presets import find_preset, read_preset
from shared.server.credentials import TOKEN_VARIABLE, Credentials, read_credentials
from shared.server.origin import host_name, is_loopback
from shared.settings.messages import size_text

if TYPE_CHECKING:  # what lists and plans do without is imported where it is used: it takes half a second
    from shared.cli.batch import Reporter, Valid
    from shared.engine.engine import Engine
    from shared.jobs.task_file import Task

ROOT = Path(__file__).resolve().parents[2]
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(
    arguments: Sequence[str] | None = None,
    *,
    root: Path = ROOT,
    handler_for: HandlerFor | None = None,
    **engine_options: Any,
) -> int:
    """Run ZGP and return the exit code. What follows `arguments` is for tests: other folders and families."""
    _make_output_printable()
    options = read_flags(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    logging.basicConfig(level=LOG_LEVELS[options.verbose], format="%(levelname)s: %(message)s")
    try:
        if options.config:
            _make_config(options.config)
        config = configuration(options, root, engine_options)
        for notice in config.notices:
            print(f"wgp.py: {notice}", file=sys.stderr)
        if options.check_loras:
            return OK if loras.check(read_catalog(config, handler_for), options.model or "") else FAILED
        if options.convert_lora:
            loras.convert(read_catalog(config, handler_for), options.model or "", *options.convert_lora)
            return OK
        if options.to_comfyui:
            print_workflow(read_catalog(config, handler_for), options.to_comfyui)
            return OK
        if options.lora_preset:
            config = _with_preset(config, handler_for, options)
        if options.list_models:
            return list_models(config, handler_for, options.json)
        if options.plan:
            cli_plan.show(config, read_catalog(config, handler_for), options, print_table)
            return OK
        if options.process is not None:
            return process(config, handler_for, options)
        return serve(config, handler_for, options)
    except UserError as error:
        print(f"wgp.py: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return INTERRUPTED


def _interrupt(number: int, frame: FrameType | None) -> None:
    """A polite request to end is handled like Ctrl-C."""
    raise KeyboardInterrupt


def _make_output_printable() -> None:
    """A prompt in another script must not end the program because the terminal cannot show it."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _make_config(folder: Path) -> None:
    """A new folder gets a file with the defaults. UserError when it is none or cannot be made."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--config came as {folder}, which is a file; expected a folder.")
    config_file.create(folder)


def _with_preset(
    config: EngineConfig, handler_for: HandlerFor | None, options: argparse.Namespace
) -> EngineConfig:
    """With the LoRAs of --lora-preset as defaults. UserError when it cannot be read."""
    models = read_catalog(config, handler_for)
    folder = models.model(options.model or models.default_model).loras().folder
    preset = read_preset(find_preset(folder, options.lora_preset))
    wanted = {"activated_loras": list(preset.loras), "loras_multipliers": preset.multipliers}
    return replace(config, default_settings={**config.default_settings, **wanted})


# -- the page ---------------------------------------------------------------------------------------------


def serve(config: EngineConfig, handler_for: HandlerFor | None, options: argparse.Namespace) -> int:
    """Show the page until Ctrl-C. UserError when its address cannot be used."""
    host, port = page_address(options)
    access, generated_password = page_access(options, host)
    allowed = [host_name(name) for name in options.allowed_host]
    check_address(host, port)
    from shared.engine import second_start
    from shared.engine.engine import Engine

    second_start.check(config, options, build_parser().parse_args([]))
    engine = Engine(config, handler_for)
    try:
        engine.start()  # before Gradio is imported: the worker loads torch meanwhile
        from shared.server.launch import launch

        launch(
            engine,
            host=host,
            port=port,
            share=options.share,
            open_browser=options.open_browser,
            theme=options.theme,
            access=access,
            generated_password=generated_password,
            allowed_hosts=allowed,
        )
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
    finally:
        engine.stop()
    return OK


def page_address(options: argparse.Namespace) -> tuple[str, int]:
    """Host and port from the flags, then from the environment, then the defaults."""
    host = "0.0.0.0" if options.listen else options.server_name or os.environ.get("SERVER_NAME", "")
    if options.server_port:
        return host or "127.0.0.1", options.server_port
    try:
        port = port_number(os.environ.get("SERVER_PORT", "") or str(DEFAULT_PORT))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"The variable SERVER_PORT: {error}.") from error
    return host or "127.0.0.1", port or DEFAULT_PORT


def page_access(options: argparse.Namespace, host: str) -> tuple[Credentials, str]:
    """Who may come in, and the password that was made up for it or ""."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    tokens = [*options.api_token, *([token] if token else [])]
    exposed = options.share or not is_loopback(host)
    return read_credentials(options.auth, options.auth_file, tokens, exposed)


def check_address(host: str, port: int) -> None:
    """UserError when no server can listen there: another program does, or the name is not this computer's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if sys.platform != "win32":  # there the option would let two servers share a port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"Port {port} is in use, perhaps by a ZGP that runs already: see http://localhost:{port} "
                    "or name another port with --server-port PORT."
                ) from error
            raise UserError(
                f"The page cannot listen on {host}, port {port} ({error.strerror or error}): choose another "
                "address with --server-name HOST or another port with --server-port PORT."
            ) from error


# -- without a page ---------------------------------------------------------------------------------------


def process(config: EngineConfig, handler_for: HandlerFor | None, options: argparse.Namespace) -> int:
    """Run a task file; UserError when it cannot be read."""
    from shared.jobs.task_file import read_tasks

    with tempfile.TemporaryDirectory(prefix="zgp-") as folder:
        return _process(read_tasks(options.process, Path(folder)), config, handler_for, options)


def _process(
    tasks: Sequence[Task],
    config: EngineConfig,
    handler_for: HandlerFor | None,
    options: argparse.Namespace,
) -> int:
    from shared.cli.batch import Reporter, run_tasks, validate_tasks
    from shared.engine import second_start
    from shared.engine.engine import Engine

    models = read_catalog(config, handler_for)
    for sentence in models.errors:
        print(f"wgp.py: {sentence}", file=sys.stderr)
    model_id = models.model(options.model).id if options.model else models.default_model
    reporter = Reporter(options.process, options.json)
    valid = validate_tasks(tasks, models, model_id, reporter, config.inputs)
    all_valid = len(valid) == len(tasks)
    if options.dry_run:
        all_fit = all([dry_run(job, models, config, reporter) for task in valid for job in task.jobs])
        return OK if all_valid and all_fit else FAILED
    if not valid:
        return FAILED
    folder = None if options.output_dir is None else config.output_dir
    second_start.check(config, options, build_parser().parse_args([]))
    engine = Engine(config, handler_for)
    ask_for_downloads(valid, engine, options)
    all_done = run_tasks(valid, engine, reporter, folder)
    return OK if all_valid and all_done else FAILED


def ask_for_downloads(tasks: Sequence[Valid], engine: Engine, options: argparse.Namespace) -> None:
    """Get the yes that the tasks' downloads need: by the flag, else on a terminal. UserError without it."""
    try:
        jobs = [job.validated.settings for task in tasks for job in task.jobs]
        engine.questions.permit(jobs, "cli", options.download)
    except NotAgreed as error:
        if options.json or not (sys.stdin.isatty() and sys.stderr.isatty()) or not _yes_to(error.ask):
            raise
        engine.agreed.give(error.ask.sources)


def _yes_to(ask: Ask) -> bool:
    """Whether somebody at the terminal wants this download."""
    for one in ask.files:
        print(f"  {size_text(one.left):>8}  {one.source}", file=sys.stderr)
    print(f"{' and '.join(ask.models)}: download {ask.amount} first? [y/N] ", end="", file=sys.stderr)
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def dry_run(task: Valid, models: Catalog, config: EngineConfig, reporter: Reporter) -> bool:
    """Say what would run and how; False when it does not fit on this machine."""
    settings = task.validated.settings
    info = models.model(settings["model_type"])
    try:
        found = outlook(
            info,
            config.folders,
            settings,
            lambda: survey(config.gpu),
            config.overrides,
            lora_bytes=bytes_here(info, settings),
            agreed=agreed_in(config.database),
        )
    except UserError as error:
        reporter.invalid(task.number, [str(error)])
        return False
    reporter.planned(task, found)
    return True


def print_workflow(models: Catalog, picture: Path) -> None:
    """Print a picture's settings as a workflow of ComfyUI. UserError when that cannot be."""
    from shared.engine.comfyui import comfyui_workflow, settings_in

    made = comfyui_workflow(settings_in(picture, models, models.default_model), models)
    for line in made.lines:
        print(f"wgp.py: {line}", file=sys.stderr)
    print(json.dumps(made.nodes, indent=2))


def list_models(config: EngineConfig, handler_for: HandlerFor | None, as_json: bool) -> int:
    """Print the models, what is on disk and to come, terms, how a job would be made here, and the cards that
    cannot be used.
    """
    models, machine, agreed = (
        read_catalog(config, handler_for), survey(config.gpu), agreed_in(config.database)
    )  # fmt: skip
    rows = [("id", "name", "architecture", "on disk", "size", "to download", "licence", "plan")]
    for model in models.models.values():
        found, plan = _outlook(model, config, machine, agreed)
        if as_json:
            names = ("id", "name", "architecture", "available", "missing", "size_bytes")
            said = {name: getattr(model, name) for name in names}
            said |= {name: model.card.model.get(name, "") for name in ("license", "license_page")}
            fetched = {"download_bytes": found.left, "download": [one.source for one in found.missing]}
            print(json.dumps({**said, "plan": plan, **fetched}))
            continue
        on_disk = "yes" if model.available else f"{len(model.missing)} of {len(model.required)} files missing"
        size = size_text(model.size_bytes) if model.size_bytes else "-"
        terms = model.card.model.get("license", "-")
        to_come = amount(found.left, found.kind) if found.left else "-"
        rows.append((model.id, model.name, model.architecture, on_disk, size, to_come, terms, plan))
    if not as_json:
        print_table(rows)
    for sentence in models.errors:
        print(json.dumps({"error": sentence}) if as_json else f"broken: {sentence}")
    return OK


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """In columns as wide as what stands in them."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _outlook(
    model: ModelInfo, config: EngineConfig, machine: Machine, agreed: Collection[str]
) -> tuple[Outlook, str]:
    """How a job with the model's defaults is made here, and that in words; or why it cannot be."""
    folders = config.folders
    try:
        found = outlook(
            model, folders, model.defaults, lambda: machine, config.overrides, agreed=agreed
        )
    except UserError as error:
        return unplanned(model, folders, agreed), str(error)
    return found, "" if found.plan is None else found.plan.report()
