"""start.py: what it plans for each machine, its stamps, and real set-ups in a copy and in a clone."""

import ast
import io
import os
import queue
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import start as front
from shared import installing as start
from shared.cli import start as starting
from shared.cli import testing
from shared.cli.testing import Check, Outcome
from shared.installing import Machine, StartError

PYTHON = Path("python")
FILES = [Path("requirements.txt")]
ROOT = Path(front.__file__).parent
# One that has no environment around it, so that the copies below make their own from the bottom up.
BASE_PYTHON = getattr(sys, "_base_executable", sys.executable)


@pytest.mark.parametrize("version", [(3, 10), (3, 11, 7), (3, 13)])
def test_supported_pythons_pass(version: tuple[int, ...]):
    assert front.refusal("start.py", version) == ""


@pytest.mark.parametrize("script", ["start.py", "wgp.py"])
@pytest.mark.parametrize("version", [(3, 0), (3, 6), (3, 9), (3, 14), (4, 0)])
def test_other_pythons_are_refused_in_one_sentence(script: str, version: tuple[int, ...]):
    code = f"import runpy, sys; sys.version_info = {version}; runpy.run_path({script!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    this = f"{version[0]}.{version[1]}"
    assert done.stderr == (
        f"{script}: ZGP needs Python 3.10 to 3.13 and this is {this}: start it with one of those.\n"
    )
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("script", ["start.py", "wgp.py"])
def test_any_python_3_understands_the_front_doors(script: str):
    """They have no syntax and, up to the check, no import that an older Python 3 does not know."""
    tree = ast.parse((ROOT / script).read_text("utf-8"))
    newer = (ast.JoinedStr, ast.NamedExpr, ast.AnnAssign, ast.Match, ast.AsyncFunctionDef)
    assert not [node for node in ast.walk(tree) if isinstance(node, newer)]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert all(node.returns is None and not node.decorator_list for node in functions)
    assert not [one for node in functions for one in node.args.args if one.annotation]
    at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {ast.unparse(node) for node in at_once} <= {"import sys", "from start import main"}


@pytest.mark.parametrize("module", ["installing", "cli/start", "cli/testing"])
def test_what_start_needs_is_in_every_python(module: str):
    tree = ast.parse((ROOT / "shared" / f"{module}.py").read_text("utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {one.name for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names}
    ours = {"shared", "shared.cli", "shared.installing"}
    assert {str(name).partition(".")[0] for name in imported - ours} <= sys.stdlib_module_names


def test_wgp_without_its_packages_names_start():
    code = (
        "import runpy, sys; sys.modules['psutil'] = None; sys.argv = ['wgp.py', '--version']; "
        "runpy.run_path('wgp.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == "wgp.py: the package psutil is not installed: start with start.py, which installs it.\n"
    )


SERVED_BY_PIP = [
    Machine("Linux"),
    Machine("Linux", nvidia=True),
    Machine("Linux", nvidia=True, amd=True),
    Machine("Darwin"),
]
SERVED_BY_UV = [Machine("Windows"), Machine("Windows", nvidia=True), Machine("Linux", amd=True)]


@pytest.mark.parametrize("machine", SERVED_BY_PIP, ids=str)
def test_pip_installs_where_the_index_has_the_right_torch(machine: Machine):
    (command,) = start.install_commands(machine, PYTHON, FILES, (23, 0))
    assert command[:4] == ["python", "-m", "pip", "install"]
    wanted = ["-r", "requirements.txt", *kernels(machine)]
    assert command[-len(wanted) :] == wanted


@pytest.mark.parametrize("machine", SERVED_BY_UV, ids=str)
def test_uv_picks_the_torch_elsewhere(machine: Machine):
    first, second = start.install_commands(machine, PYTHON, FILES, (23, 0))
    assert first[:4] == ["python", "-m", "pip", "install"] and first[-1] == "uv"
    assert second[:5] == ["python", "-m", "uv", "pip", "install"]
    wanted = ["-r", "requirements.txt", *kernels(machine)]
    assert "--torch-backend=auto" in second and second[-len(wanted) :] == wanted


def kernels(machine: Machine) -> list[str]:
    """What is installed for the card besides."""
    return [start.KERNELS] if machine.nvidia else []


@pytest.mark.parametrize("system", ["Linux", "Windows", "Darwin"])
def test_no_command_has_the_address_of_an_index(system: str):
    commands = start.install_commands(Machine(system, amd=True), PYTHON, FILES, (25, 0))
    assert not any("://" in part or "index" in part for command in commands for part in command)


@pytest.mark.parametrize(("pip", "raw"), [((0,), False), ((24, 0), False), ((24, 1), True), ((26, 0), True)])
def test_bytes_are_shown_if_pip_can(pip: tuple[int, ...], raw: bool):
    (command,) = start.install_commands(Machine("Linux"), PYTHON, FILES, pip)
    assert ("raw" in command) is raw


@pytest.mark.parametrize(
    ("arguments", "environment", "opens"),
    [
        ([], {"DISPLAY": ":0"}, True),
        (["--server-port", "7861"], {"WAYLAND_DISPLAY": "wayland-0"}, True),
        ([], {"DISPLAY": ":0", "CI": "true"}, False),
        ([], {"DISPLAY": ":10", "SSH_CONNECTION": "1.2.3.4"}, False),
        ([], {}, False),
        (["--process", "x.json"], {"DISPLAY": ":0"}, False),
        (["--process=x.json"], {"DISPLAY": ":0"}, False),
        (["--list-models"], {"DISPLAY": ":0"}, False),
        (["--open-browser"], {"DISPLAY": ":0"}, False),
    ],
)
def test_the_browser_opens_for_somebody_at_a_display(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: dict[str, str], opens: bool
):
    monkeypatch.setattr(start.platform, "system", lambda: "Linux")
    assert start.opens_page(arguments, environment) is opens


def test_windows_and_macos_have_a_display(monkeypatch: pytest.MonkeyPatch):
    for system in ("Windows", "Darwin"):
        monkeypatch.setattr(start.platform, "system", lambda system=system: system)
        assert start.opens_page([], {})


def test_a_python_without_venv_names_the_package(monkeypatch: pytest.MonkeyPatch, place: Path):
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartError, match="python3-venv"):
        start.make_venv()
    assert not start.VENV.exists()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """start.py's folders in tmp_path, with a requirements.txt and commands that are only written down."""
    monkeypatch.setattr(start, "ROOT", tmp_path)
    monkeypatch.setattr(start, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(start, "LOG", tmp_path / ".venv" / "log")
    monkeypatch.setattr(start, "UNFINISHED", tmp_path / ".venv" / "unfinished")
    monkeypatch.setattr(start, "REQUIREMENTS", tmp_path / "requirements.txt")
    (tmp_path / "requirements.txt").write_text("torch\n")
    return tmp_path


class Installer:
    """Stands for start.install: notes what is run, makes the environment's Python, fails where told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.fails_at = ""
        monkeypatch.setattr(start, "install", self)
        monkeypatch.setattr(start, "pip_version", lambda: (0,))
        monkeypatch.setattr(start.Machine, "here", staticmethod(lambda: Machine("Linux")))

    def __call__(self, command: list[str]) -> None:
        self.ran.append(command[2])
        if command[2] == self.fails_at:
            raise StartError("failed")
        start.venv_python().parent.mkdir(parents=True, exist_ok=True)
        start.venv_python().touch()


@pytest.fixture
def installer(place: Path, monkeypatch: pytest.MonkeyPatch) -> Installer:
    return Installer(monkeypatch)


@pytest.mark.parametrize(
    ("machine", "needed"),
    [(Machine("Darwin"), 3), (Machine("Linux"), 6), (Machine("Windows", nvidia=True), 6)],
)
def test_a_disk_without_room_is_told_before_anything_is_installed(
    machine: Machine,
    needed: int,
    installer: Installer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(start.Machine, "here", staticmethod(lambda: machine))
    monkeypatch.setattr(start.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, int(1.2e9)))
    assert starting.main(["--setup-only"], "") == 2
    said = capsys.readouterr().err
    assert f"has 1.2 GB free, and the installation needs about {needed} GB: make room" in said
    assert said.count("\n") == 1 and installer.ran == []


def test_a_folder_that_cannot_be_written_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (place / "file").touch()
    monkeypatch.setattr(start, "VENV", place / "file" / ".venv")
    monkeypatch.setattr(start, "UNFINISHED", place / "file" / ".venv" / "unfinished")
    assert starting.main(["--setup-only"], "") == 2
    said = capsys.readouterr().err
    assert "cannot be used (Not a directory): move ZGP to a folder that you may write to" in said
    assert said.count("\n") == 1


def test_the_second_start_installs_nothing(installer: Installer):
    assert start.set_up([start.REQUIREMENTS]) is True
    assert start.set_up([start.REQUIREMENTS]) is False
    assert installer.ran == ["venv", "pip"]


@pytest.mark.parametrize("step", ["venv", "pip"])
def test_a_set_up_that_was_cut_off_begins_anew(installer: Installer, step: str):
    installer.fails_at = step
    with pytest.raises(StartError):
        start.set_up([start.REQUIREMENTS])
    installer.fails_at, installer.ran = "", []
    (start.VENV / "half").touch()
    assert start.set_up([start.REQUIREMENTS]) is True
    assert installer.ran == ["venv", "pip"] and not (start.VENV / "half").exists()


def test_new_requirements_are_installed_into_the_same_environment(installer: Installer, place: Path):
    start.set_up([start.REQUIREMENTS])
    start.REQUIREMENTS.write_text("torch\nmore\n")
    assert start.set_up([start.REQUIREMENTS]) is True
    assert installer.ran == ["venv", "pip", "pip"]


def test_an_upgrade_that_was_cut_off_is_not_taken_for_the_old_state(installer: Installer):
    start.set_up([start.REQUIREMENTS])
    start.REQUIREMENTS.write_text("more\n")
    installer.fails_at = "pip"
    with pytest.raises(StartError):
        start.set_up([start.REQUIREMENTS])
    start.REQUIREMENTS.write_text("torch\n")
    assert not start.is_set_up(start.REQUIREMENTS)


def test_another_python_gets_a_new_environment(installer: Installer, monkeypatch: pytest.MonkeyPatch):
    start.set_up([start.REQUIREMENTS])
    monkeypatch.setattr(start.sys, "version_info", (4, 0))
    assert start.set_up([start.REQUIREMENTS]) is True
    assert installer.ran == ["venv", "pip", "venv", "pip"]


def test_an_environment_of_the_user_is_not_thrown_away(installer: Installer):
    start.venv_python().parent.mkdir(parents=True)
    start.venv_python().touch()
    assert start.set_up([start.REQUIREMENTS]) is True
    assert installer.ran == ["pip"]


def test_tools_for_tests_are_added_to_the_environment(installer: Installer, place: Path):
    tools = place / "requirements-dev.txt"
    tools.write_text("pytest\n")
    start.set_up([start.REQUIREMENTS])
    start.set_up([start.REQUIREMENTS, tools])
    assert installer.ran == ["venv", "pip", "pip"]
    assert start.set_up([start.REQUIREMENTS, tools]) is False


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("ERROR: [Errno 28] No space left on device", "make room"),
        ("Failed to establish a new connection: NewConnectionError", "internet connection"),
        ("[Errno 13] Permission denied: 'x'", "allow writing"),
        ("something else", "mend the cause"),
    ],
)
def test_a_failed_installation_gives_advice(said: str, advice: str):
    sentence = start.failure(1, said)
    assert advice in sentence and "start again" in sentence and "\n" not in sentence


def test_a_failed_command_shows_its_last_lines(place: Path, capsys: pytest.CaptureFixture[str]):
    start.VENV.mkdir()
    with pytest.raises(StartError, match="exit code 3"):
        start.install([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"])
    assert "the reason" in capsys.readouterr().err


def test_without_a_network_the_connection_is_named(place: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("PIP_INDEX_URL", "HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "1")
    start.VENV.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-input", "a-package-of-the-index"]
    with pytest.raises(StartError, match="check the internet connection, then start again"):
        start.install(command)


def test_a_terminal_gets_one_line_that_is_written_over(place: Path, monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    start.VENV.mkdir()
    terminal = Terminal()
    monkeypatch.setattr(start.sys, "stdout", terminal)
    lines = ["Collecting torch==2.13.0 (from -r requirements.txt (line 1))", "Progress 5 of 10", "noise"]
    start.install([BASE_PYTHON, "-c", f"print({chr(10).join(lines)!r})"])
    shown = [text.rstrip() for text in terminal.getvalue().split("\r")]
    assert shown == ["", "Collecting torch==2.13.0", "Collecting torch==2.13.0 50%", "", ""]
    assert "noise" in start.LOG.read_text() and "Progress" not in start.LOG.read_text().partition("\n")[2]


def outcomes(closings: Iterable[str]) -> list[Outcome]:
    return [Outcome(Check("tests", [], tests=True), "passed", 1.5, closing) for closing in closings]


def test_the_closing_line_adds_up_the_runs_of_pytest():
    closings = ["=== 1 failed, 300 passed, 2 skipped in 3s ===", "= 5 passed, 9 deselected, 2 errors in 9s ="]
    added = "===== 2 error, 1 failed, 305 passed, 2 skipped in 3.00s ====="
    assert testing.total(outcomes(closings)) == added
    assert testing.total(outcomes([""])) == "===== no tests ran in 1.50s ====="


def test_the_summary_ends_with_the_closing_line_and_tells_of_skipped_browser_tests():
    ruff = Outcome(Check("ruff", []), "FAILED", 0.2, "Found 1 error.")
    checks = [ruff, *outcomes(["=== 3 passed in 1s ==="])]
    text = testing.summary(checks, browser="")
    assert re.search(r"^ruff +FAILED +0.2 s$", text, re.M)
    assert "browser tests were skipped" in text
    assert text.splitlines()[-1] == "===== 3 passed in 1.50s ====="
    assert "skipped" not in testing.summary(checks, browser="/usr/bin/chromium")


def run_python(code: str) -> Check:
    return Check("tests", [sys.executable, "-c", code], tests=True)


class Piecewise:
    """Stands for sys.stdout: hands each piece that is written to whoever waits for it."""

    def __init__(self) -> None:
        self.pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.buffer = self

    def write(self, piece: bytes) -> None:
        self.pieces.put(piece)

    def flush(self) -> None:
        pass


def test_what_runs_is_shown_before_its_line_ends(monkeypatch: pytest.MonkeyPatch):
    shown = Piecewise()
    monkeypatch.setattr(start.sys, "stdout", shown)
    reading, writing = os.pipe()
    with open(reading, "rb") as output, ThreadPoolExecutor(1) as pool:
        with open(writing, "wb", buffering=0) as child:
            closing = pool.submit(testing.pass_on, output)
            child.write(b"tests/ui/test_page.py ..")
            assert shown.pieces.get(timeout=60) == b"tests/ui/test_page.py .."
            child.write(b".\n= 5 passed =\n\n")
        assert closing.result(timeout=60) == "= 5 passed ="


PROGRESS = r"\[1 of 2\] (\S*/)?test_(one|two).py\n(.*\n)?\[2 of 2\] (\S*/)?test_(one|two).py"
FAILED = r" {11}FAILED (\S*/)?test_two.py::test_b"


@pytest.mark.parametrize(
    ("flags", "shown"),
    [(["-n", "0"], True), (["-n", "2"], True), (["-n", "0", "-q"], False), (["-n", "0", "-v"], False)],
)
def test_each_file_of_tests_has_a_line(tmp_path: Path, flags: list[str], shown: bool):
    (tmp_path / "test_one.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): pass\ndef test_c(): pytest.skip('c')\n"
    )
    (tmp_path / "test_two.py").write_text("def test_a(): pass\ndef test_b(): assert not 'b'\n")
    (*_, check, _) = testing.checks(Path(sys.executable), [*flags, "-p", "no:cacheprovider"])
    command = [*check.command, "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    for line in (PROGRESS, FAILED):
        assert bool(re.search(f"^{line}$", done.stdout, re.M)) is shown, done.stdout
    assert "1 failed, 3 passed, 1 skipped in" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("environment", "end"), [({}, None), ({"CI": ""}, None), ({"CI": "true"}, 100 + 45 * 60)]
)
def test_only_ci_has_a_limit(environment: dict[str, str], end: float | None):
    assert testing.end_of_time(environment, 100) == end


def test_a_check_passes_its_output_on(capfd: pytest.CaptureFixture[str]):
    outcome = testing.run_check(run_python("print('1 passed in 1s\\n')"), None, [])
    assert (outcome.verdict, outcome.closing) == ("passed", "1 passed in 1s")
    assert "1 passed" in capfd.readouterr().out


EXIT_CODES = [(1, [], "FAILED"), (5, [], "FAILED"), (5, ["-k", "x"], "passed")]


@pytest.mark.parametrize(("code", "flags", "verdict"), EXIT_CODES)
def test_the_exit_code_decides(code: int, flags: list[str], verdict: str):
    outcome = testing.run_check(run_python(f"raise SystemExit({code})"), None, flags)
    assert outcome.verdict == verdict


def test_a_check_that_hangs_is_stopped():
    outcome = testing.run_check(run_python("import time; time.sleep(600)"), time.monotonic() + 0.5, [])
    assert outcome.verdict == "out of time"


def test_without_root_no_browser_is_installed(monkeypatch: pytest.MonkeyPatch, installer: Installer):
    monkeypatch.setattr(start.shutil, "which", lambda name: name if name == "apt-get" else None)
    monkeypatch.setattr(testing, "is_root", lambda: False)
    assert testing.find_browser() == ""
    assert installer.ran == []


def test_ci_runs_the_same_command():
    text = (ROOT / ".ci" / "run").read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
    assert "python start.py --test\n" in text


def copy_start(folder: Path) -> None:
    """start.py and what it runs, without the rest of ZGP."""
    for file in ("start.py", "shared/installing.py", "shared/cli/start.py", "shared/cli/testing.py"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)


def run_start(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    command = [BASE_PYTHON, "start.py", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=1200
    )


@pytest.mark.slow
def test_a_copy_sets_itself_up_once_and_passes_flags_and_exit_code_on(tmp_path: Path):
    copy_start(tmp_path)
    (tmp_path / "requirements.txt").write_text("# nothing\n")
    (tmp_path / "wgp.py").write_text("import sys; print(sys.prefix, sys.argv[1:]); sys.exit(7)\n")
    first = run_start(tmp_path, "--process", "a file.json")
    assert "Installed in" in first.stdout and first.stderr == ""
    assert first.stdout.splitlines()[-1] == f"{tmp_path / '.venv'} ['--process', 'a file.json']"
    assert first.returncode == 7
    second = run_start(tmp_path, "--list-models")
    assert second.stdout == f"{tmp_path / '.venv'} ['--list-models']\n"


@pytest.mark.slow
def test_a_requirement_that_cannot_be_had_is_told_and_tried_again(tmp_path: Path):
    copy_start(tmp_path)
    (tmp_path / "requirements.txt").write_text("./absent-package\n")
    for _ in range(2):
        result = run_start(tmp_path, "--setup-only")
        assert result.returncode == 2 and "start.py: the installation failed" in result.stderr
        assert not list((tmp_path / ".venv").glob(".zgp-requirements*"))


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="this is no git checkout")
def test_a_clone_sets_itself_up_and_runs(tmp_path: Path):
    clone = tmp_path / "zgp"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    try:
        setup = run_start(clone, "--setup-only")
        assert setup.returncode == 0, setup.stdout + setup.stderr
        assert run_start(clone, "--version").stdout.startswith("ZGP ")
        models = run_start(clone, "--list-models")
        assert models.returncode == 0 and "z_image" in models.stdout, models.stderr
        imports = "import gradio, torch, diffusers, transformers"
        subprocess.run([start_python(clone), "-c", imports], check=True, cwd=clone)
    finally:
        shutil.rmtree(clone / ".venv", ignore_errors=True)  # pytest keeps three runs of these gigabytes


def start_python(clone: Path) -> str:
    return str(clone / ".venv" / start.venv_python().relative_to(start.VENV))
