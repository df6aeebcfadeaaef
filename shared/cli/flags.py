"""The flags of the command line; their help texts are the documentation."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shared.gpu.offload_engines import SLOTS
from shared.gpu.planner import PROFILES, RESERVED, Overrides
from shared.server.credentials import SHORTEST_TOKEN, TOKEN_VARIABLE
from shared.settings.table import ATTENTION_PACKAGES, SETTINGS
from shared.version import VERSION

DEFAULT_PORT = 7860
LOG_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


def read_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of the command line; ends the program when they cannot be understood, or would do nothing."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    _check_combinations(parser, options)
    return options


def build_parser() -> argparse.ArgumentParser:
    """The parser; its help texts are the documentation of the flags."""
    parser = argparse.ArgumentParser(
        prog="wgp.py",
        usage="%(prog)s [flags]",  # argparse's own list of them all buries the sentence of an error
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
        type=port_number,
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
    group.add_argument(
        "--model",
        metavar="ID",
        help="with --process: the model of tasks that name none; with --plan: the one to plan, or several "
        "with commas between",
    )
    group.add_argument("--dry-run", action="store_true", help="with --process: check the tasks, run none")
    group.add_argument(
        "--download",
        action="store_true",
        help="with --process: fetch the models' missing files, however large; without it a terminal is asked "
        "about more than 1 GB, and other programs are refused",
    )
    group.add_argument(
        "--list-models",
        action="store_true",
        help="list the models, what of them is on disk, their licences and how they would run here",
    )
    _add_plan_flags(group)
    group.add_argument(
        "--json",
        action="store_true",
        help="with --process, --list-models or --plan: print one JSON object per line and result",
    )


def _add_plan_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--plan",
        action="store_true",
        help="say of each model which file is used, what stays on the card, what a picture with the model's "
        "defaults takes at its peak and what is downloaded: planned by arithmetic, nothing is loaded",
    )
    group.add_argument(
        "--vram",
        type=_sizes,
        action="append",
        metavar="GB",
        help="with --plan: plan for a card of so many GB instead of this computer's, or for several "
        "(6,8,12); each is taken to be a usual one of its size, which is named",
    )
    group.add_argument(
        "--ram",
        type=_number(2, 4096),
        metavar="GB",
        help="with --plan: plan for so many GB of RAM instead of this computer's",
    )
    group.add_argument(
        "--markdown", action="store_true", help="with --plan: print the table as the README has it"
    )


def _add_generation_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="save the images in DIR, with a queue of its own (default: outputs/, a folder for each day)",
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
    group.add_argument(
        "--profiles-dir",
        type=Path,
        metavar="DIR",
        help="folder with a folder of profiles for each family (default: wgp_config.json's, or profiles)",
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
    group.add_argument(
        "--to-comfyui",
        type=Path,
        metavar="PICTURE",
        help="print a picture's settings as a ComfyUI workflow (API form; what has no node there goes to "
        "standard error), and exit",
    )


def _add_memory_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--offload",
        choices=tuple(SLOTS),
        default="",
        help="what moves the weights between RAM and card: mmgp (the default), as in Wan2GP, or stream, "
        "which is ZGP's own and needs no mmgp",
    )
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
        help="MB of the card for the transformer's weights while it computes; what does not fit is streamed "
        "(with mmgp the layers in transit count)",
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


def port_number(text: str) -> int:
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


def _sizes(text: str) -> list[float]:
    """ "6,8,12" as numbers of GB."""
    return [_number(1, 1024)(part.strip()) for part in text.split(",")]


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
    "download": (("process",), "--process FILE"),
    "vram": (("plan",), "--plan"),
    "ram": (("plan",), "--plan"),
    "markdown": (("plan",), "--plan"),
    "model": (
        ("process", "plan", "check_loras", "convert_lora"),
        "--process FILE, --plan, --check-loras or --convert-lora",
    ),
    "json": (("process", "list_models", "plan"), "--process FILE, --list-models or --plan"),
}


def _check_combinations(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse flags that would do nothing."""
    tasks = ("list_models", "plan", "process", "check_loras", "convert_lora", "to_comfyui")
    chosen = [f"--{task.replace('_', '-')}" for task in tasks if getattr(options, task)]
    if len(chosen) > 1:
        parser.error(f"{' and '.join(chosen)} exclude each other: give one of them")
    for flag, (wanted, words) in NEEDS.items():
        if getattr(options, flag) and not any(getattr(options, task) for task in wanted):
            parser.error(f"--{flag.replace('_', '-')} needs {words}")
    for one, other in (("vram", "gpu"), ("markdown", "json")):
        if getattr(options, one) and getattr(options, other):
            parser.error(f"--{one} and --{other} exclude each other: give one of them")
    if options.listen and options.server_name:
        parser.error("--listen and --server-name exclude each other: give one of them")
