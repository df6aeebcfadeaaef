"""`--plan`: the table of what models take on cards that one does not have, and the one in the README."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from shared.cli import main
from shared.gpu.planner import GIB, Machine
from shared.library import plan_table
from shared.library.catalog import catalog
from tests.support.mini import ROOT
from tests.support.waiting import LIMIT

HERE = Machine("CPU", 64 * GIB, 50 * GIB)


@pytest.fixture
def wgp(tmp_path, monkeypatch):
    """The command line of the real project on a computer that has none of the large files."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def run(*arguments):
        return main.main(
            [str(one) for one in arguments], root=ROOT, ckpts=tmp_path / "ckpts", others=(),
            database=tmp_path / "q.sqlite3", saved=tmp_path / "settings",
        )  # fmt: skip

    return run


@pytest.fixture
def models(tmp_path):
    return catalog(ROOT, tmp_path / "ckpts").models


def test_the_readme_has_what_its_command_prints(wgp, capsys):
    readme = (ROOT / "README.md").read_text("utf-8")
    command = re.search(r"python wgp\.py (--plan .*--markdown.*)", readme)
    assert command, "the README names the command that makes its table"
    assert wgp(*command[1].split()) == 0
    table = capsys.readouterr().out.strip()
    assert table in readme, f"write this into README.md, Memory:\n{table}"
    assert "Planned by arithmetic, not measured" in readme
    sizes = {row.split("|")[2].strip() for row in table.splitlines()[2:]}
    assert sizes == {f"{size} GB" for size in (6, 8, 12, 16, 24)}


def test_one_line_for_each_model_and_card(wgp, models, capsys):
    arguments = "--plan --vram 8,12 --vram 24 --ram 32 --model z_image,z_image_mini"
    assert wgp(*arguments.split()) == 0
    told, *others = capsys.readouterr().out.splitlines()
    assert "8 GB, a card like RTX 4060 (compute capability 8.9, 7.5 GB free)" in told
    assert told.endswith("32 GB of RAM (28.0 free)")
    assert [line.split()[0] for line in others[3:]] == ["z_image"] * 3 + ["z_image_mini"] * 3
    assert [line.split()[1] for line in others[3:]] == ["8", "12", "24"] * 2
    assert wgp("--plan", "--vram", "8") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + sum(model.card.visible for model in models.values())


def test_the_words_of_a_row_are_those_of_its_plan(wgp, capsys):
    assert wgp("--plan", "--vram", "8", "--ram", "16", "--model", "z_image", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    layers = f"{record['resident_layers']} of {record['layers']}"
    assert record["plan"].startswith(f"mmgp, {record['file']}, {layers}")
    assert wgp("--plan", "--vram", "8", "--ram", "16", "--model", "z_image") == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert f"{record['resident_layers']} of {record['layers']} layers" in row
    assert f"{record['peak_vram_bytes'] / GIB:.1f} of 8 GB" in row
    assert f"{record['download_bytes'] / 1e9:.1f} GB" in row


def test_what_cannot_be_made_says_why(wgp, capsys):
    assert wgp("--plan", "--vram", "1", "--model", "z_image") == 0
    assert "This job needs about" in capsys.readouterr().out


def test_a_card_that_is_not_there_is_a_usual_one_of_its_size():
    found = [plan_table.pretended(size, HERE) for size in (3, 6, 8, 11, 24, 80)]
    assert [one.capability for one in found] == [(8, 6), (8, 6), (8, 9), (8, 6), (8, 9), (12, 0)]
    assert [round(one.vram_total / GIB) for one in found] == [3, 6, 8, 11, 24, 80]
    assert all(one.vram_free == one.vram_total - GIB // 2 for one in found)
    kernels = {"int8", "svdq-int4"}  # of the package that is installed with a card
    assert [one.kernels for one in found] == [kernels] * 5 + [{"int8"}]
    assert found[0].ram_total == HERE.ram_total
    small = plan_table.with_ram(HERE, 16)
    assert (small.ram_total, small.ram_free) == (16 * GIB, 12 * GIB)


def test_this_computer_is_planned_for_without_a_card(wgp, capsys):
    assert wgp("--plan", "--gpu", "cpu", "--model", "z_image_mini") == 0
    assert re.search(r"z_image_mini +CPU +fp16", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vram", "8"], "--vram needs --plan"),
        (["--plan", "--vram", "8x"], "'8x' is not a number from 1 to 1024"),
        (["--plan", "--vram", "8", "--gpu", "cpu"], "--vram and --gpu exclude each other"),
        (["--plan", "--markdown", "--json"], "--markdown and --json exclude each other"),
        (["--plan", "--list-models"], "exclude each other"),
        (["--download"], "--download needs --process FILE"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(wgp, capsys, arguments, said):
    with pytest.raises(SystemExit):
        wgp(*arguments)
    assert said in capsys.readouterr().err


def test_a_model_that_there_is_not_is_one_sentence(wgp, capsys):
    assert wgp("--plan", "--model", "z_imge") == 2
    assert "did you mean 'z_image'?" in capsys.readouterr().err


def test_lists_and_plans_load_no_large_library():
    """What they do without is why they take a second."""
    heavy = ("torch", "numpy", "gradio", "fastapi", "cv2", "transformers", "mmgp")
    code = (
        "import sys; from shared.cli import main as cli\ncli.main(['--plan', '--vram', '8'])\n"
        f"cli.main(['--list-models'])\nsys.exit(', '.join(m for m in {heavy} if m in sys.modules) or 0)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
