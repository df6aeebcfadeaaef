"""A second ZGP where one runs: what it asks of a worker is done or refused, never left out in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.cli.engine_config import configuration
from shared.cli.flags import build_parser
from shared.engine import second_start
from shared.engine.engine import Engine
from shared.errors import UserError
from tests.support.fake_family import handler_for, make_root
from tests.support.fake_worker import FAKE_WORKER

NOTHING = build_parser().parse_args([])


@pytest.fixture
def start(tmp_path: Path):
    """Starts a ZGP with these flags, as another process would; its worker is a fake."""
    root, engines = make_root(tmp_path / "project"), []

    def run(*flags: str) -> None:
        given = build_parser().parse_args(flags)
        options = {"worker_command": FAKE_WORKER, "restart_seconds": 0.01, "warm": False}
        config = configuration(given, root, options)
        second_start.check(config, given, NOTHING)
        engines.append(engine := Engine(config, handler_for))
        engine.start()

    yield run
    for engine in engines:
        engine.stop()


@pytest.mark.parametrize(
    "flags",
    [
        ("--lora-dir-z-image", "elsewhere"), ("--loras", "elsewhere"), ("--gpu", "cpu"), ("--profile", "4"),
        ("--bf16",), ("--fp16",), ("--offload", "stream"), ("--preload", "500"), ("--attention", "sdpa"),
        ("--compile",), ("--save-quantized",), ("--perc-reserved-mem-max", "0.2"),
        ("--vram-safety-coefficient", "0.5"),
    ],
)  # fmt: skip
def test_a_flag_for_a_worker_is_refused_where_one_runs_without_it(start, flags):
    start()
    with pytest.raises(UserError) as refused:
        start(*flags)
    said = str(refused.value)
    assert flags[0] in said and "stop it first" in said and "--output-dir DIR" in said


def test_every_flag_that_reaches_a_worker_is_known():
    """What is not listed would be left out in silence."""
    page = {
        "server_port", "server_name", "listen", "share", "auth", "auth_file", "api_token", "allowed_host",
        "open_browser", "theme", "advanced", "profiles_dir", "lock_config", "lock_model", "verbose",
    }  # fmt: skip
    task = {
        "process", "model", "dry_run", "list_models", "json", "download", "plan", "vram", "ram", "markdown",
        "check_loras", "convert_lora", "to_comfyui", "lora_preset", "output_dir", "seed", "steps", "settings",
    }  # fmt: skip
    worker = {name for names in second_start.WORKER_FLAGS for name in names} | {"lora_dir_z_image"}
    assert set(vars(NOTHING)) == page | task | worker


def test_the_same_flags_and_none_at_all_are_welcome(start):
    start("--profile", "4", "--lora-dir-z-image", "mine")
    start("--profile", "4", "--lora-dir-z-image", "mine")
    start()
    start("--seed", "5", "--steps", "3")


def test_another_output_dir_has_a_queue_of_its_own(start, tmp_path):
    start()
    start("--gpu", "cpu", "--output-dir", str(tmp_path / "mine"))
    assert (tmp_path / "mine" / ".zgp" / "zgp.sqlite3").exists()
    with pytest.raises(UserError, match="--profile"):
        start("--profile", "1", "--output-dir", str(tmp_path / "mine"))


def test_what_stopped_is_no_hindrance(tmp_path):
    root = make_root(tmp_path / "project")
    options = {"worker_command": FAKE_WORKER, "warm": False}
    first = Engine(configuration(NOTHING, root, options), handler_for)
    first.start()
    first.stop()
    given = build_parser().parse_args(["--gpu", "cpu"])
    second_start.check(configuration(given, root, options), given, NOTHING)
