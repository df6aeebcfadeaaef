"""The command line: its flags, task files, the list of models, and how it ends."""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

from shared.cli import main
from shared.cli.flags import build_parser
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.gpu.planner import Machine, Overrides
from shared.jobs.records import CANCELLED
from shared.jobs.store import JobStore
from shared.jobs.task_file import read_tasks
from shared.server.credentials import Credentials
from shared.version import VERSION
from tests.support.fake_family import Planned, handler_for, make_root
from tests.support.fake_worker import FAKE_WORKER
from tests.support.waiting import LIMIT, until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path / "project")


@pytest.fixture
def wgp(root, monkeypatch):
    """Runs the command line on the fake family; returns the exit code."""
    for name in ("SERVER_PORT", "SERVER_NAME"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        return main.main(
            [str(argument) for argument in arguments],
            root=root,
            handler_for=handler_for,
            worker_command=FAKE_WORKER,
            restart_seconds=0.01,
        )

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def tasks(tmp_path):
    def write(content, name="tasks.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def objects(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# -- usage --------------------------------------------------------------------------------------------------


def test_help_and_listing_import_nothing_heavy():
    code = (
        "import sys; from shared.cli import main as cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'gradio', 'transformers', 'diffusers', 'mmgp', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for flag in ("--help", "--list-models"):
        subprocess.run(
            [sys.executable, "-c", code, flag],
            cwd=ROOT,
            check=True,
            timeout=LIMIT,
            stdout=subprocess.DEVNULL,
        )


def test_the_front_door_answers_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "wgp.py", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert (done.returncode, done.stdout) == (0, f"ZGP {VERSION}\n")


def test_every_flag_says_what_it_does():
    for action in build_parser()._actions:
        assert action.help and action.help is not argparse.SUPPRESS, action.option_strings


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--bogus"], "--bogus"),
        (["--gpu", "cuda"], "cuda:0"),
        (["--server-port", "99999"], "65535"),
        (["--steps", "0"], "from 1 to 100"),
        (["--seed", "1e3"], "whole number"),
        (["--seed", str(10**30)], "whole number"),
        (["--bf16", "--fp16"], "not allowed with"),
        (["--attention", "fastest"], "sdpa"),
        (["--profile", "6"], "4.5"),
        (["--preload", "1.5"], "'1.5' is not a whole number from 0"),
        (["--preload", "-1"], "whole number from 0"),
        (["--perc-reserved-mem-max", "40"], "number from 0 to 1"),
        (["--vram-safety-coefficient", "0"], "number from 0.1 to 1"),
        (["--vram-safety-coefficient", "nan"], "number from 0.1 to 1"),
        (["--dry-run"], "--dry-run needs --process"),
        (["--model", "fake"], "--model needs --process"),
        (["--json"], "--json needs"),
        (["--listen", "--server-name", "localhost"], "exclude each other"),
        (["--process", "a.txt", "--list-models"], "exclude each other"),
    ],
)
def test_bad_usage_ends_with_2_and_a_sentence(wgp, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as end:
        wgp(*arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and sentence in said and len(said.splitlines()) == 2


# -- task files ---------------------------------------------------------------------------------------------


def test_a_json_file_holds_one_task_or_a_list(tasks, tmp_path):
    assert [task.values for task in read_tasks(tasks({"prompt": "a"}), tmp_path)] == [{"prompt": "a"}]
    found = read_tasks(tasks([{"prompt": "a"}, 3]), tmp_path)
    assert [(task.number, task.values) for task in found] == [(1, {"prompt": "a"}), (2, 3)]


def test_a_text_file_holds_a_prompt_per_line(tasks, tmp_path):
    content = "\ufeffa red circle\n\n# a comment\n  绿色 🟢  \r\n"
    found = read_tasks(tasks(content, "prompts.TXT"), tmp_path)
    assert [task.values for task in found] == [{"prompt": "a red circle"}, {"prompt": "绿色 🟢"}]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tasks.zip", "PK", "not a saved queue"),
        ("tasks.tar", "x", ".zip, .json or .txt"),
        ("tasks", "{}", ".json or .txt"),
        ("tasks.json", "{", "not JSON"),
        ("tasks.json", "[" * 100_000, "nested too deeply|not JSON"),
        ("tasks.json", "[]", "holds no tasks"),
        ("tasks.txt", "# nothing\n", "holds no tasks"),
    ],
)
def test_an_unreadable_file_is_one_sentence_and_ends_with_2(
    wgp, tasks, capsys, tmp_path, name, content, sentence
):
    path = tasks(content, name)
    with pytest.raises(UserError, match=sentence) as error:
        read_tasks(path, tmp_path)
    assert wgp("--process", path) == 2
    assert capsys.readouterr().err == f"wgp.py: {error.value}\n"


def test_a_missing_file_and_a_binary_one_end_with_2(wgp, tmp_path, capsys):
    assert wgp("--process", tmp_path / "none.json") == 2
    assert "none.json cannot be read" in capsys.readouterr().err
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\xd8")
    assert wgp("--process", tmp_path / "binary.txt") == 2
    assert "not UTF-8" in capsys.readouterr().err


# -- running them -------------------------------------------------------------------------------------------


def test_process_makes_the_images_and_ends_with_0(wgp, tasks, tmp_path, capsys):
    path = tasks(
        [{"prompt": "a", "seed": 1}, {"prompt": "b", "seed": 2, "model_type": "other", "video_length": 9}]
    )
    assert wgp("--process", path, "--output-dir", tmp_path / "out") == 0
    output = capsys.readouterr()
    first, second = output.out.splitlines()
    assert first.startswith("item 1: done in") and second.startswith("item 2: done in")
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert "item 2: 'video_length' is ignored" in output.err


def test_valid_tasks_run_though_others_are_invalid(wgp, tasks, capsys):
    path = tasks(
        [{"prompt": "", "seed": -5}, {"prompt": "a", "seed": 1}, "text", {"prompt": "a", "model_type": "x"}]
    )
    assert wgp("--process", path) == 1
    output = capsys.readouterr()
    assert output.out.startswith("item 2: done") and len(output.out.splitlines()) == 1
    for start in ("item 1: prompt", "item 1: seed", "item 3: ", "item 4: There is no model 'x'"):
        assert f"{path}, {start}" in output.err


def test_a_failed_task_is_named_and_the_next_runs(wgp, tasks, capsys):
    assert wgp("--process", tasks("user_error\na circle\n", "p.txt")) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == "item 1: failed: The fake model cannot do that: ask for something else."
    assert second.startswith("item 2: done")


def test_a_saved_queue_is_run_and_what_cannot_run_is_named(wgp, tmp_path, capsys):
    manifest = [
        {"id": 4, "params": {"model_type": "fake", "prompt": "a", "seed": 1, "video_length": 81}},
        {"id": 9, "params": {"model_type": "wan_t2v_14B", "prompt": "b"}},
    ]
    with zipfile.ZipFile(tmp_path / "queue.zip", "w") as archive:
        archive.writestr("queue.json", json.dumps(manifest))
    assert wgp("--process", tmp_path / "queue.zip", "--dry-run") == 1
    assert capsys.readouterr().out == "item 1: fake, 64x64, 3 steps, 1 image(s), seed 1: a\n"
    assert wgp("--process", tmp_path / "queue.zip") == 1
    output = capsys.readouterr()
    assert output.out.startswith("item 1: done in") and "no model 'wan_t2v_14B'" in output.err


def test_a_paused_queue_is_said_and_nothing_is_queued(wgp, tasks, root, capsys):
    store = JobStore(root / "outputs" / ".zgp" / "zgp.sqlite3")
    store.pause()
    assert wgp("--process", tasks({"prompt": "a"})) == 2
    assert "is paused" in capsys.readouterr().err and store.jobs() == []


def test_a_task_that_cannot_be_queued_any_more_fails_alone(wgp, tasks, monkeypatch, capsys):
    real = Engine.submit

    def submit(self, values, *others, **options):
        if values["prompt"] == "b":
            raise UserError("b.png does not exist; choose another picture")
        return real(self, values, *others, **options)

    monkeypatch.setattr(Engine, "submit", submit)
    assert wgp("--process", tasks("a\nb\nc\n", "p.txt")) == 1
    output = capsys.readouterr()
    assert [line[:12] for line in output.out.splitlines()] == ["item 1: done", "item 3: done"]
    assert "item 2: b.png does not exist" in output.err


def test_json_output_is_one_object_per_result(wgp, tasks, capsys):
    path = tasks([{"prompt": "a", "seed": 1, "batch_size": 2, "mode": "x"}, {"prompt": "surprise"}, 3])
    assert wgp("--process", path, "--json") == 1
    results = {result["item"]: result for result in objects(capsys)}
    assert results[1]["status"] == "done" and list(results[1]["ignored"]) == ["mode"]
    assert [image["seed"] for image in results[1]["images"]] == [1, 2]
    assert all(Path(image["path"]).is_file() for image in results[1]["images"])
    assert results[2]["status"] == "failed" and "LookupError" in results[2]["error"]
    assert results[3]["status"] == "invalid" and results[3]["error"]


def test_dry_run_starts_nothing(wgp, tasks, root, capsys):
    assert wgp("--process", tasks([{"prompt": "a tree", "seed": 7}]), "--dry-run") == 0
    assert capsys.readouterr().out == "item 1: fake, 64x64, 3 steps, 1 image(s), seed 7: a tree\n"
    assert wgp("--process", tasks([{"prompt": ""}]), "--dry-run") == 1
    assert not (root / "outputs").exists()


def test_defaults_from_flags_yield_to_the_file(wgp, tasks, capsys):
    path = tasks([{"prompt": "a"}, {"prompt": "b", "seed": 1, "num_inference_steps": 2}])
    flags = ("--dry-run", "--json", "--seed", 9, "--steps", 4, "--model", "other")
    assert wgp("--process", path, *flags) == 0
    settings = [result["settings"] for result in objects(capsys)]
    assert [(s["seed"], s["num_inference_steps"], s["model_type"]) for s in settings] == [
        (9, 4, "other"),
        (1, 2, "other"),
    ]


def test_an_unknown_model_flag_ends_with_2(wgp, tasks, capsys):
    assert wgp("--process", tasks("a", "p.txt"), "--model", "fakk") == 2
    assert "did you mean 'fake'" in capsys.readouterr().err


RUN_CLI = """
import sys; from pathlib import Path; from shared.cli.main import main
from tests.support.fake_worker import FAKE_WORKER
from tests.support.fake_family import handler_for
command = (sys.executable, "-m", "tests.support.fake_family")
sys.exit(main(sys.argv[2:], root=Path(sys.argv[1]), handler_for=handler_for, worker_command=command))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl-C to one process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_cancels_and_ends_with_130(root, tasks, tmp_path, number):
    path = tasks([{"prompt": f"hold {tmp_path / 'never'}"}, {"prompt": "b"}])
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_CLI, root, "--process", path, "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    store = JobStore(root / "outputs" / ".zgp" / "zgp.sqlite3")
    until(lambda: any(job.step for job in store.jobs()) or process.poll() is not None)
    process.send_signal(number)
    output, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and b"Traceback" not in errors
    assert [json.loads(line)["status"] for line in output.splitlines()] == [CANCELLED, CANCELLED]
    assert {job.status for job in store.jobs()} == {CANCELLED}


# -- the models ---------------------------------------------------------------------------------------------


def test_the_list_of_models_shows_what_is_here_and_what_is_broken(wgp, root, capsys):
    (root / "finetunes" / "torn.json").write_text("{")
    assert wgp("--list-models") == 0
    header, *rows, broken = capsys.readouterr().out.splitlines()
    assert header.split() == "id name architecture on disk size to download licence plan".split()
    assert {row.split()[0] for row in rows} == {"fake", "other", "absent"}
    assert any("1 of 1 files missing" in row for row in rows if row.startswith("absent"))
    assert broken.startswith("broken: ") and "torn.json" in broken


def test_the_list_of_models_as_json(wgp, root, capsys):
    (root / "finetunes" / "torn.json").write_text("{")
    assert wgp("--list-models", "--json") == 0
    models = {line.get("id"): line for line in objects(capsys)}
    assert models["fake"]["available"] and models["fake"]["size_bytes"] == len("weights of fake.bin")
    assert models["absent"]["missing"] == ["absent.bin"]
    assert models["fake"]["license"] == models["fake"]["plan"] == ""
    assert "torn.json" in models[None]["error"]


# -- the page -----------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Replaces the page; holds the engine and what it was launched with."""
    calls = []
    page = types.ModuleType("shared.server.launch")
    page.launch = lambda engine, **options: calls.append((engine, engine.supervises, options))
    monkeypatch.setitem(sys.modules, "shared.server.launch", page)
    return calls


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_page_gets_an_engine_that_already_runs(wgp, launched, free_port):
    assert wgp("--server-port", free_port, "--open-browser", "--theme", "gradio") == 0
    [(engine, supervised, options)] = launched
    assert options == {
        "host": "127.0.0.1", "port": free_port, "share": False, "open_browser": True, "theme": "gradio",
        "access": Credentials(), "generated_password": "", "allowed_hosts": [],
    }  # fmt: skip
    assert supervised and not engine.supervises and engine.worker_pid is None


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        ([], {}, ("127.0.0.1", 7860)),
        ([], {"SERVER_PORT": "8000", "SERVER_NAME": "localhost"}, ("localhost", 8000)),
        (["--server-port", "9000", "--server-name", "0.0.0.0"], {"SERVER_PORT": "8000"}, ("0.0.0.0", 9000)),
        (["--listen"], {"SERVER_NAME": "localhost"}, ("0.0.0.0", 7860)),
    ],
)
def test_the_address_comes_from_flags_then_environment(monkeypatch, flags, environment, expected):
    for name in ("SERVER_PORT", "SERVER_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main.page_address(build_parser().parse_args(flags)) == expected


def test_a_wrong_port_in_the_environment_is_a_sentence(wgp, launched, monkeypatch, capsys):
    monkeypatch.setenv("SERVER_PORT", "http")
    assert wgp() == 2 and not launched
    assert "SERVER_PORT: 'http' is not a port" in capsys.readouterr().err


def test_a_port_in_use_is_a_sentence_and_starts_nothing(wgp, launched, root, capsys):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        assert wgp("--server-port", port) == 2
    sentence = capsys.readouterr().err
    assert str(port) in sentence and "--server-port" in sentence and "Traceback" not in sentence
    assert not launched and not (root / "outputs").exists()


def test_an_address_of_another_computer_is_a_sentence(wgp, launched, free_port, capsys):
    assert wgp("--server-name", "192.0.2.1", "--server-port", free_port) == 2
    assert "--server-name" in capsys.readouterr().err and not launched


def test_ctrl_c_on_the_page_is_a_usual_end(wgp, monkeypatch, launched, free_port, capsys):
    def interrupted(engine, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["shared.server.launch"], "launch", interrupted)
    assert wgp("--server-port", free_port) == 0
    assert capsys.readouterr().err == "Stopped.\n"


@pytest.mark.parametrize(
    ("machine", "sentence"),
    [
        (Machine("CPU", 8 << 30, 8 << 30), "computes on the CPU, fp32, about "),
        (
            Machine("Card", 64 << 30, 60 << 30, 8 << 30, 8 << 30, (8, 6)),
            "mmgp, bf16, 8 of 20 layers resident, VAE tiled: about 6.4 of 8 GB",
        ),
    ],
)
def test_a_dry_run_says_how_it_would_be_made(root, monkeypatch, capsys, tasks, machine, sentence):
    monkeypatch.setattr(main, "survey", lambda gpu: machine)
    file = tasks({"prompt": "a", "model_type": "fake"})
    arguments = {"root": root, "handler_for": lambda architecture: Planned}
    assert main.main(["--process", str(file), "--dry-run"], **arguments) == 0
    assert sentence in capsys.readouterr().out
    assert main.main(["--process", str(file), "--dry-run", "--json"], **arguments) == 0
    assert objects(capsys)[0]["plan"].startswith(sentence)


def test_a_dry_run_says_what_would_not_fit(root, monkeypatch, capsys, tasks):
    monkeypatch.setattr(
        main, "survey", lambda gpu: Machine("Card", 1 << 36, 1 << 36, 1 << 30, 1 << 30, (8, 6))
    )
    file = tasks({"prompt": "a", "model_type": "fake"})
    arguments = {"root": root, "handler_for": lambda architecture: Planned}
    assert main.main(["--process", str(file), "--dry-run"], **arguments) == 1
    assert "item 1: This job needs about" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("free", "code", "said"),
    [
        (16, 0, "computes on the CPU, fp32, about 11.5 GB of RAM\n"),
        (8, 0, "8.0 GB of RAM are free, so every step reads up to 10.0 GB from the disk\n"),
        (0.5, 1, "This job needs about 1.5 GB of RAM and 0.5 GB are free: choose a smaller resolution"),
    ],
)
def test_a_dry_run_on_a_cpu_compares_the_ram(root, monkeypatch, capsys, tasks, free, code, said):
    monkeypatch.setattr(main, "survey", lambda gpu: Machine("CPU", 16 << 30, int(free * 2**30)))
    file = tasks({"prompt": "a", "model_type": "fake"})
    arguments = {"root": root, "handler_for": lambda architecture: Planned}
    assert main.main(["--process", str(file), "--dry-run"], **arguments) == code
    assert said in "".join(capsys.readouterr())


def test_flags_reach_the_worker(wgp, launched, free_port, tmp_path):
    flags = ["--gpu", "cpu", "--fp16", "--attention", "sdpa", "--output-dir", tmp_path / "out", "--steps", 5]
    flags += ["--profile", "4.5", "--preload", 1200, "--perc-reserved-mem-max", 0.3, "--compile"]
    flags += ["--vram-safety-coefficient", 0.9, "--save-quantized"]
    assert wgp("--server-port", free_port, *flags) == 0
    engine = launched[0][0]
    assert engine.config.gpu == "cpu"
    assert engine.config.overrides == Overrides(
        dtype="fp16",
        attention="sdpa",
        profile="4.5",
        preload=1200 << 20,
        reserved=0.3,
        safety=0.9,
        compile=True,
    )
    assert engine.config.save_quantized
    assert engine.catalog.models["fake"].defaults["num_inference_steps"] == 5
    job_id, _ = engine.submit({"model_type": "fake", "prompt": "a"})
    assert engine.store.job(job_id).output_dir == str(tmp_path / "out")


@pytest.mark.parametrize("mode", [{}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_names_in_any_script_work_whatever_the_locale(tmp_path, mode):
    """The second is what a locale such as KOI8-R gives: a Python that writes names of files in ASCII only."""
    folder = tmp_path / "папка"
    folder.mkdir()
    shutil.copy(ROOT / "loras/z_image/mini/mini_outlines.safetensors", folder / " мой стиль.safetensors")
    task = {"prompt": "красное сердце", "activated_loras": [" мой стиль.safetensors"], "seed": 3}
    (folder / "задача.json").write_text(json.dumps(task, ensure_ascii=False), "utf-8")
    done = subprocess.run(
        [sys.executable, "wgp.py", "--process", folder / "задача.json", "--lora-dir-z-image", folder,
         "--output-dir", folder / "выход", "--dry-run"],
        cwd=ROOT, capture_output=True, encoding="utf-8", env={**os.environ, "LC_ALL": "C", **mode},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "красное сердце" in done.stdout
