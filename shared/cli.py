"""The command line: its flags, and what each way of starting does."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from shared import cli_loras
from shared import config as config_file
from shared.engine.batch import Reporter, Valid, run_tasks, validate_tasks
from shared.engine.catalog import Catalog, HandlerFor, LoraFolders, ModelInfo
from shared.engine.engine import Engine, EngineConfig, read_catalog
from shared.engine.host import plan_job
from shared.engine.loras import bytes_here
from shared.engine.machine import survey
from shared.engine.planner import PROFILES, RESERVED, Machine, Overrides
from shared.engine.tasks import Task, read_tasks
from shared.errors import UserError
from shared.imaging.saving import Rules
from shared.loras.presets import find_preset, read_preset
from shared.server.access import SHORTEST_TOKEN, TOKEN_VARIABLE, Access, read_access
from shared.server.hosts import host_name, is_loopback
from shared.settings import ATTENTION_PACKAGES, SETTINGS
from shared.version import VERSION

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_PORT = 7860
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
LOG_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


def main(
    arguments: Sequence[str] | None = None,
    *,
    root: Path = ROOT,
    handler_for: HandlerFor | None = None,
    **engine_options: Any,
) -> int:
    """Run ZGP and return the exit code. What follows `arguments` is for tests: other folders and families."""
    _make_output_printable()
    parser = build_parser()
    options = parser.parse_args(arguments)
    _check_combinations(parser, options)
    signal.signal(signal.SIGTERM, _interrupt)
    logging.basicConfig(level=LOG_LEVELS[options.verbose], format="%(levelname)s: %(message)s")
    try:
        if options.config:
            _make_config(options.config)
        config = configuration(options, root, engine_options)
        for notice in config.notices:
            print(f"wgp.py: {notice}", file=sys.stderr)
        if options.check_loras:
            return OK if cli_loras.check(read_catalog(config, handler_for), options.model or "") else FAILED
        if options.convert_lora:
            cli_loras.convert(read_catalog(config, handler_for), options.model or "", *options.convert_lora)
            return OK
        if options.lora_preset:
            config = _with_preset(config, handler_for, options)
        if options.list_models:
            return list_models(config, handler_for, options.json)
        if options.process is not None:
            return process(config, handler_for, options)
        return serve(config, handler_for, options)
    except UserError as error:
        print(f"wgp.py: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The parser; its help texts are the documentation of the flags."""
    parser = argparse.ArgumentParser(
        prog="wgp.py",
        description="ZGP makes images with the Z-Image models, on a local page or from a list of tasks.",
    )
    parser.add_argument("--version", action="version", version=f"ZGP {VERSION}")
    parser.add_argument(
        "--verbose",
        type=int,
        choices=range(len(LOG_LEVELS)),
        default=0,
        metavar="LEVEL",
        help="how much is logged: 0 warnings and errors (the default), 1 what happens, 2 details",
    )
    _add_page_flags(parser.add_argument_group("the page"))
    _add_task_flags(parser.add_argument_group("without a page"))
    _add_generation_flags(parser.add_argument_group("generation"))
    _add_lora_flags(parser.add_argument_group("LoRAs"))
    _add_memory_flags(parser.add_argument_group("memory"))
    return parser


def _add_page_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--server-port",
        type=_port,
        default=0,
        metavar="PORT",
        help=f"port of the page; 0 (the default) takes the variable SERVER_PORT, else {DEFAULT_PORT}",
    )
    group.add_argument(
        "--server-name",
        default="",
        metavar="HOST",
        help="address the page listens on; without it the variable SERVER_NAME, else 127.0.0.1, which only "
        "this computer reaches",
    )
    group.add_argument(
        "--listen",
        action="store_true",
        help="let other computers reach the page (0.0.0.0); they have to log in",
    )
    group.add_argument(
        "--share",
        action="store_true",
        help="make the page public through a Gradio tunnel; everybody has to log in",
    )
    group.add_argument(
        "--auth",
        action="append",
        default=[],
        metavar="USER:PASSWORD",
        help="who may log in; may be given several times. Without --auth and --auth-file, a password is made "
        "up and shown when a login is needed: with --listen, --share, --api-token or a --server-name that "
        "other computers reach",
    )
    group.add_argument(
        "--auth-file",
        type=Path,
        metavar="FILE",
        help="a file with a line user:password for each who may log in; # begins a comment",
    )
    group.add_argument(
        "--api-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help=f"what programs show instead of logging in, at least {SHORTEST_TOKEN} characters; may be given "
        f"several times, or once as the variable {TOKEN_VARIABLE}",
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name under which browsers find the page, such as that of a reverse proxy; may be "
        "given several times",
    )
    group.add_argument("--open-browser", action="store_true", help="open the page in the browser")
    group.add_argument(
        "--theme",
        choices=("default", "gradio"),
        default="default",
        help="the page's looks: default is ZGP's own, gradio is Gradio's",
    )
    group.add_argument("--advanced", action="store_true", help="open the page with Advanced unfolded")
    group.add_argument(
        "--lock-config",
        action="store_true",
        help="nobody changes the settings of the program, saved defaults or models over the page",
    )
    group.add_argument(
        "--lock-model",
        action="store_true",
        help="only the model of the start is used; others are refused, on the page and over the network",
    )


def _add_task_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--process",
        type=Path,
        metavar="FILE",
        help="run the tasks of FILE and exit: .json (one object of settings or a list of them), .zip (a "
        "queue saved on the page or by Wan2GP) or .txt (one prompt per line, # begins a comment). Exit code "
        "0: all done, 1: something failed or was invalid, 2: bad usage, 130: stopped with Ctrl-C",
    )
    group.add_argument("--model", metavar="ID", help="with --process: the model of tasks that name none")
    group.add_argument("--dry-run", action="store_true", help="with --process: check the tasks, run none")
    group.add_argument(
        "--list-models",
        action="store_true",
        help="list the models, what of them is on disk, their licences and how they would run here",
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="with --process or --list-models: print one JSON object per line and result",
    )


def _add_generation_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="save the images in DIR (default: outputs/, with a folder for each day)",
    )
    group.add_argument(
        "--seed", type=_value_of("seed"), metavar="N", help="default seed of every model; -1 is random"
    )
    group.add_argument(
        "--steps",
        type=_value_of("num_inference_steps"),
        metavar="N",
        help="default number of steps of every model",
    )
    group.add_argument(
        "--config",
        type=Path,
        metavar="DIR",
        help="folder of wgp_config.json, the program's settings (default: this folder); a new one gets a "
        "file with the defaults",
    )
    group.add_argument(
        "--settings",
        type=Path,
        metavar="DIR",
        help="folder of the defaults that were saved for each model (default: settings)",
    )
    group.add_argument("--gpu", type=_device, metavar="DEVICE", help="where to compute: cuda:N or cpu")
    dtypes = group.add_mutually_exclusive_group()
    dtypes.add_argument(
        "--bf16", action="store_true", help="compute the transformer in bfloat16, from its 16-bit file"
    )
    dtypes.add_argument(
        "--fp16", action="store_true", help="compute the transformer in float16, from its 16-bit file"
    )
    group.add_argument(
        "--attention",
        choices=("auto", "sdpa", *ATTENTION_PACKAGES),
        default="",
        help="attention method: sdpa (PyTorch's own, the default), flash (package flash-attn), _flash_3 "
        "(flash_attn_interface) or sage (sageattention); one that is not installed is replaced by sdpa",
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the transformer: a slow start, faster steps"
    )
    group.add_argument(
        "--save-quantized",
        action="store_true",
        help="write an int8 file, half the size, beside a 16-bit transformer when it is loaded",
    )


def _add_lora_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--loras",
        type=Path,
        metavar="DIR",
        help="folder with a folder of LoRAs for each family of models (default: wgp_config.json's, or loras)",
    )
    import models as families

    for family in families.FAMILIES:
        family.register_lora_cli_args(group)
    group.add_argument(
        "--lora-preset",
        metavar="NAME",
        help="a preset in the LoRA folder (.lset, .json, .zip): its LoRAs and strengths become the defaults",
    )
    group.add_argument(
        "--check-loras",
        action="store_true",
        help="say of every file in the LoRA folders what it is, one line each, and exit: 0 when all can be "
        "used, 1 when one is refused; with --model ID for that model only",
    )
    group.add_argument(
        "--convert-lora",
        nargs=2,
        type=Path,
        metavar=("IN", "OUT"),
        help="write any LoRA file as one that diffusers and ComfyUI read, and exit",
    )


def _add_memory_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--profile",
        choices=tuple(PROFILES),
        default="",
        help="what lies where, instead of ZGP's own plan: 1 models whole on the card, RAM page-locked; 2 "
        "weights streamed, RAM page-locked; 3 as 1 and 4 as 2, but only the transformer page-locked; 3.5 as "
        "3, nothing page-locked; 4.5 as 4, one layer on the card at a time; 5 as 2, nothing page-locked",
    )
    group.add_argument(
        "--preload",
        type=_number(0, 1_000_000, whole=True),
        metavar="MB",
        help="MB of the transformer that stay on the card while it computes; the rest is streamed",
    )
    group.add_argument(
        "--perc-reserved-mem-max",
        type=_number(0, 1),
        metavar="SHARE",
        help=f"share of the RAM that may be page-locked, 0 to 1 (default: {RESERVED}); lower it when RAM is "
        "short",
    )
    group.add_argument(
        "--vram-safety-coefficient",
        type=_number(0.1, 1),
        metavar="SHARE",
        help=f"share of the card's memory that a plan may use, 0.1 to 1 (default: {Overrides.safety})",
    )


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port: expected a number from 0 to 65535")
    return int(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda:\d{1,3}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a device: expected cpu, or cuda:N such as cuda:0")
    return text


def _value_of(name: str) -> Callable[[str], int]:
    low, high = SETTINGS[name].minimum, SETTINGS[name].maximum
    assert low is not None and high is not None

    def convert(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,30}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {low:.0f} to {high:.0f}")
        return int(text)

    return convert


def _number(low: float, high: float, whole: bool = False) -> Callable[[str], Any]:
    def convert(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            kind = "whole number" if whole else "number"
            raise argparse.ArgumentTypeError(f"'{text}' is not a {kind} from {low} to {high}")
        return value

    return convert


#: flag -> (those of which it needs one, in words)
NEEDS = {
    "dry_run": (("process",), "--process FILE"),
    "model": (("process", "check_loras", "convert_lora"), "--process FILE, --check-loras or --convert-lora"),
    "json": (("process", "list_models"), "--process FILE or --list-models"),
}


def _check_combinations(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse flags that would do nothing."""
    tasks = ("list_models", "process", "check_loras", "convert_lora")
    chosen = [f"--{task.replace('_', '-')}" for task in tasks if getattr(options, task)]
    if len(chosen) > 1:
        parser.error(f"{' and '.join(chosen)} exclude each other: give one of them")
    for flag, (wanted, words) in NEEDS.items():
        if getattr(options, flag) and not any(getattr(options, task) for task in wanted):
            parser.error(f"--{flag.replace('_', '-')} needs {words}")
    if options.listen and options.server_name:
        parser.error("--listen and --server-name exclude each other: give one of them")


def configuration(options: argparse.Namespace, root: Path, engine_options: Mapping[str, Any]) -> EngineConfig:
    """What wgp_config.json and the flags, which win, say now. UserError when a folder cannot be used."""
    folder = (options.config or root).absolute()
    found, notices = config_file.read(folder)
    given = {
        "notices": tuple(notices),
        "file_folder": folder,
        "saved": (options.settings or root / "settings").absolute(),
        "lock_config": options.lock_config,
        "lock_model": options.lock_model,
        "advanced": options.advanced,
        "reread": partial(configuration, options, root, engine_options),
        **_places(found, options, root),
        **_engine_flags(found, options),
        **engine_options,
    }
    return EngineConfig.at(root, **given)


def _make_config(folder: Path) -> None:
    """A new folder gets a file with the defaults. UserError when it is none or cannot be made."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--config came as {folder}, which is a file; expected a folder.")
    config_file.create(folder)


def _places(found: config_file.Config, options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """The folders of models, LoRAs and pictures."""
    ckpts, *others = found.folders(root)
    given = {
        name: str(Path(value).absolute())
        for name, value in vars(options).items()
        if name.startswith("lora_dir_") and value
    }
    loras = root / found.loras_root if options.loras is None else options.loras
    return {
        "ckpts": ckpts,
        "others": tuple(others),
        "lora_folders": LoraFolders(loras.absolute(), given),
        "output_dir": (root / found.save_path).absolute(),
    }


def _with_preset(
    config: EngineConfig, handler_for: HandlerFor | None, options: argparse.Namespace
) -> EngineConfig:
    """With the LoRAs of --lora-preset as defaults. UserError when it cannot be read."""
    models = read_catalog(config, handler_for)
    folder = models.model(options.model or models.default_model).loras().folder
    preset = read_preset(find_preset(folder, options.lora_preset))
    wanted = {"activated_loras": list(preset.loras), "loras_multipliers": preset.multipliers}
    return replace(config, default_settings={**config.default_settings, **wanted})


def _engine_flags(found: config_file.Config, options: argparse.Namespace) -> dict[str, Any]:
    wanted = {"seed": options.seed, "num_inference_steps": options.steps}
    fmt, quality = config_file.CODECS[found.image_output_codec]
    flags = {
        "gpu": options.gpu or "",
        "overrides": _overrides(found, options),
        "save_quantized": options.save_quantized or found.save_quantized,
        "verbose": options.verbose,
        "default_settings": {name: value for name, value in wanted.items() if value is not None},
        "house_settings": {"image_format": fmt},
        "saving": Rules(found.output_filename, found.metadata_type == "metadata", fmt, quality),
        "default_model": found.default_model,
    }
    if options.output_dir is not None:
        flags |= {"output_dir": options.output_dir.absolute(), "dated_folders": False}
    return flags


def _overrides(found: config_file.Config, options: argparse.Namespace) -> Overrides:
    """What the planner is to obey; a flag that is given wins over the file."""
    profile = f"{found.profile:g}" if found.profile > 0 else ""
    preload = found.preload_in_VRAM or None if options.preload is None else options.preload
    safety = options.vram_safety_coefficient
    return Overrides(
        profile=options.profile or profile,
        preload=None if preload is None else preload << 20,
        dtype="bf16" if options.bf16 else "fp16" if options.fp16 else "",
        attention=options.attention or found.attention_mode,
        reserved=options.perc_reserved_mem_max or RESERVED,
        safety=found.vram_safety_coefficient if safety is None else safety,
        compile=options.compile or bool(found.compile),
    )


def _interrupt(number: int, frame: FrameType | None) -> None:
    """A polite request to end is handled like Ctrl-C."""
    raise KeyboardInterrupt


def _make_output_printable() -> None:
    """A prompt in another script must not end the program because the terminal cannot show it."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


# -- the page ---------------------------------------------------------------------------------------------


def serve(config: EngineConfig, handler_for: HandlerFor | None, options: argparse.Namespace) -> int:
    """Show the page until Ctrl-C. UserError when its address cannot be used."""
    host, port = page_address(options)
    access, invented = page_access(options, host)
    allowed = [host_name(name) for name in options.allowed_host]
    check_address(host, port)
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
            invented=invented,
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
        port = _port(os.environ.get("SERVER_PORT", "") or str(DEFAULT_PORT))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"The variable SERVER_PORT: {error}.") from error
    return host or "127.0.0.1", port or DEFAULT_PORT


def page_access(options: argparse.Namespace, host: str) -> tuple[Access, str]:
    """Who may come in, and the password that was made up for it or ""."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    tokens = [*options.api_token, *([token] if token else [])]
    exposed = options.share or not is_loopback(host)
    return read_access(options.auth, options.auth_file, tokens, exposed)


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
    with tempfile.TemporaryDirectory(prefix="zgp-") as folder:
        return _process(read_tasks(options.process, Path(folder)), config, handler_for, options)


def _process(
    tasks: Sequence[Task],
    config: EngineConfig,
    handler_for: HandlerFor | None,
    options: argparse.Namespace,
) -> int:
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
    all_done = run_tasks(valid, Engine(config, handler_for), reporter, folder)
    return OK if all_valid and all_done else FAILED


def dry_run(task: Valid, models: Catalog, config: EngineConfig, reporter: Reporter) -> bool:
    """Say what would run and how; False when it does not fit on this machine."""
    settings = task.validated.settings
    info = models.model(settings["model_type"])
    try:
        plan = plan_job(
            info,
            config.folders,
            settings,
            lambda: survey(config.gpu),
            config.overrides,
            lora_bytes=bytes_here(info, settings),
        )
    except UserError as error:
        reporter.invalid(task.number, [str(error)])
        return False
    reporter.planned(task, "" if plan is None else plan.sentence())
    return True


def list_models(config: EngineConfig, handler_for: HandlerFor | None, as_json: bool) -> int:
    """Print the models, what is on disk, sizes, terms, how a job would be made here, and the cards that
    cannot be used.
    """
    models, machine = read_catalog(config, handler_for), survey(config.gpu)
    if as_json:
        for model in models.models.values():
            names = ("id", "name", "architecture", "available", "missing", "size_bytes")
            said = {name: getattr(model, name) for name in names}
            said |= {name: model.card.model.get(name, "") for name in ("license", "license_page")}
            print(json.dumps({**said, "plan": _plan_text(model, config, machine)}))
        for sentence in models.errors:
            print(json.dumps({"error": sentence}))
        return OK
    rows = [("id", "name", "architecture", "on disk", "size", "licence", "plan")]
    for model in models.models.values():
        on_disk = "yes" if model.available else f"{len(model.missing)} of {len(model.required)} files missing"
        size, terms = size_text(model.size_bytes), model.card.model.get("license", "-")
        plan = _plan_text(model, config, machine)
        rows.append((model.id, model.name, model.architecture, on_disk, size, terms, plan))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for sentence in models.errors:
        print(f"broken: {sentence}")
    return OK


def _plan_text(model: ModelInfo, config: EngineConfig, machine: Machine) -> str:
    """How a job with the model's defaults is made here, or why it cannot be."""
    try:
        plan = plan_job(model, config.folders, model.defaults, lambda: machine, config.overrides)
    except UserError as error:
        return str(error)
    return "" if plan is None else plan.sentence()


def size_text(size: int) -> str:
    """A number of bytes for people: "7.3 MB", "12.3 GB", "-" for none."""
    if size == 0:
        return "-"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
