"""The documents name no flag and no file that does not exist, and the README's promises are the program's."""

import re
import subprocess
import sys

import pytest

from shared.cli.flags import build_parser
from tests.support.mini import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "training" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
START_FLAGS = {"--test", "--setup-only"}
OF_OTHERS = {"--torch-backend", "--local-dir"}  # uv, hf


def known_flags() -> set[str]:
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    for module in (
        "training.train",
        "training.score",
        "training.export",
        "training.twinflow",
        "training.lora",
        "training.style",
        "training.control",
        "training.control_score",
        "benchmarks.cpu",
        "benchmarks.gpu",
        "benchmarks.vram",
        "benchmarks.card",
        "benchmarks.page",
        "benchmarks.gallery",
        "benchmarks.full_size",
        "benchmarks.sampler",
        "benchmarks.warm_job",
    ):
        text = (ROOT / (module.replace(".", "/") + ".py")).read_text("utf-8")
        flags |= set(re.findall(r'add_argument\(\s*(?:"[a-z]+",\s*)?"(--[a-z-]+)"', text))
    return flags | START_FLAGS | OF_OTHERS


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_flag_in_the_documents_exists(path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", path.read_text("utf-8")))
    assert named <= known_flags()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_linked_file_exists(path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8"))
    for link in links:
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link


def test_the_readme_has_a_row_for_every_flag_of_loras() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    [group] = [group for group in build_parser()._action_groups if group.title == "LoRAs"]
    flags = [action.option_strings[0] for action in group._group_actions] + ["--config"]
    assert len(flags) == 8 and all(re.search(rf"^\| `{flag}[` ]", text, re.M) for flag in flags)


def test_help_has_a_sentence_for_every_flag() -> None:
    assert all(action.help for action in build_parser()._actions)


def test_the_models_table_names_every_visible_card() -> None:
    done = subprocess.run(
        [sys.executable, "wgp.py", "--list-models", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    readme = (ROOT / "README.md").read_text("utf-8")
    for name in re.findall(r'"name": "([^"]+)"', done.stdout):
        assert f"| {name} |" in readme
