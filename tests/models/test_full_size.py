"""The whole road at full size: `load_model`, then a job at 1024x1024, on a card that is not there.

Files are holes with real headers, tensors have no values (see `fake_card.card`). What mixes devices or dtypes
fails; kernels, copies and waits of a step are counted. With all 30 layers where numbers of a whole step are
meant, with three of the same width where a case only varies options.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.support.fake_card.cases import CASES, COUNTED, REFUSED
from tests.support.fake_card.report import WAITS, Refused, Report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None, reason="needs g++: a torch without CUDA lacks a guard for the card"
    ),
]
Drive = Callable[..., Report]


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Drive:
    """`fake_card.drive.run`, in a process of its own: the card changes torch for good."""
    from tests.support.fake_card import drive as driven

    folder, spawn = tmp_path_factory.mktemp("holes"), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, driven.begin, (folder,)) as process:
        yield lambda *arguments: process.submit(driven.run, *arguments).result()


@pytest.mark.parametrize("name", CASES)
def test_a_job_runs_and_no_step_waits(drive: Drive, name: str) -> None:
    case, report = CASES[name], drive(name)
    side = round(case.size * case.settings.get("hires_scale", 1))
    assert report.sizes == [(side, side)] * case.pictures
    assert report.in_steps(*WAITS, "host") == []
    assert report.step_kernels <= case.kernels
    assert report.step_copies <= case.copies
    assert report.count(*WAITS) <= case.waits


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_card_refuses_is_refused(drive: Drive, name: str) -> None:
    with pytest.raises(Refused, match=r"same device|of torch.bfloat16 and torch.float32|Input type"):
        drive(REFUSED[name].case, name)


@pytest.mark.parametrize("name", COUNTED)
def test_what_a_card_would_wait_for_is_counted(drive: Drive, name: str) -> None:
    case, report = CASES[COUNTED[name].case], drive(COUNTED[name].case, name)
    beyond = {
        "wait": bool(report.in_steps("wait")), "down": bool(report.in_steps("down")),
        "copies": report.step_copies > case.copies, "kernels": report.step_kernels > case.kernels,
    }  # fmt: skip
    assert tuple(kind for kind, is_beyond in beyond.items() if is_beyond) == COUNTED[name].beyond
