"""Generate forever, with a family that needs no torch; and the prompts that were used before."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.jobs.records import DONE, RUNNING
from shared.jobs.repeat import ENDED_WITH_THE_PROGRAM, Forever
from shared.settings.table import SettingsError
from tests.support.fake_family import handler_for, make_root
from tests.support.fake_worker import FAKE_WORKER
from tests.support.waiting import until

VALUES = {"model_type": "fake", "seed": 5}


def config_in(folder):
    return EngineConfig.at(make_root(folder), worker_command=FAKE_WORKER, restart_seconds=0.01, warm=False)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    engine = Engine(config_in(tmp_path_factory.mktemp("forever") / "project"), handler_for)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture
def engine(running):
    running.forever.stop()
    until(lambda: not running.store.queue())
    return running


@pytest.fixture
def jobs(engine):
    """A function: the jobs since the beginning of the test, oldest first."""
    before = len(engine.store.jobs(limit=10_000))
    return lambda: engine.store.jobs(limit=10_000)[::-1][before:]


def test_it_goes_on_with_other_seeds_and_draws_until_it_is_stopped(engine, jobs):
    engine.forever.start({**VALUES, "prompt": "a {1|2|3|4|5|6|7|8|9} b", "multi_prompts_gen_type": "G"})
    until(lambda: len(jobs()) >= 7)
    assert engine.forever.on
    engine.forever.stop()
    assert not engine.forever.on and engine.forever.ended == ""
    until(lambda: not engine.store.queue())
    made = jobs()
    time.sleep(0.3)
    assert len(jobs()) == len(made)
    assert made[0].settings["seed"] == 5 and len({job.settings["seed"] for job in made}) == len(made)
    assert len({job.settings["prompt"] for job in made}) > 2
    assert all(job.source == "forever" and job.status == DONE for job in made)


def test_of_two_pages_that_start_at_once_one_does(engine):
    both = threading.Barrier(2)

    def submit(values, **options):
        with pytest.raises(threading.BrokenBarrierError):  # the other one never comes as far
            both.wait(0.3)
        return engine.submit_all(values, **options)

    forever = Forever(engine.store, submit)
    with ThreadPoolExecutor(2) as pages:
        starts = [pages.submit(forever.start, {**VALUES, "prompt": "a"}) for _ in range(2)]
        ends = [start.exception() for start in starts]
    forever.stop()
    assert sorted(end is None for end in ends) == [False, True]
    assert any(isinstance(end, UserError) for end in ends)


def test_a_round_waits_behind_what_others_submit(engine, jobs, tmp_path):
    gate = tmp_path / "gate"
    engine.forever.start({**VALUES, "prompt": f"hold {gate}"})
    until(lambda: engine.store.jobs([RUNNING]))
    other, _ = engine.submit({**VALUES, "prompt": "mine"})
    gate.touch()
    until(lambda: len(jobs()) >= 3)
    engine.forever.stop()
    until(lambda: not engine.store.queue())
    ended = sorted(jobs(), key=lambda job: job.finished)
    assert ended[1].id == other


@pytest.mark.parametrize(
    "prompt, reason", [("user_error", "The fake model cannot do that"), ("memory_error", "memory")]
)
def test_a_failure_ends_it_with_its_reason(engine, jobs, prompt, reason):
    engine.forever.start({**VALUES, "prompt": prompt})
    until(lambda: not engine.forever.on)
    assert engine.forever.ended.startswith("Generate forever ended: ") and reason in engine.forever.ended
    assert len(jobs()) == 1
    engine.forever.start({**VALUES, "prompt": "a cat"})
    assert engine.forever.ended == "" and engine.forever.on
    engine.forever.stop()


def test_cancelling_its_job_ends_it(engine, jobs, tmp_path):
    [(job_id, _)] = engine.forever.start({**VALUES, "prompt": f"hold {tmp_path / 'never'}"})
    with pytest.raises(UserError, match="on already"):
        engine.forever.start({**VALUES, "prompt": "a cat"})
    engine.cancel(job_id)
    until(lambda: not engine.forever.on)
    assert "cancelled" in engine.forever.ended and len(jobs()) == 1


def test_what_can_no_longer_be_drawn_ends_it(engine, tmp_path):
    file = engine.config.root / "wildcards" / "pet.txt"
    file.parent.mkdir()
    file.write_text("cat")
    engine.forever.start({**VALUES, "prompt": f"hold {tmp_path / 'gate'} __pet__"})
    file.unlink()
    for name in ("gate", "gate cat"):
        (tmp_path / name).touch()
    until(lambda: not engine.forever.on)
    assert "no wildcard file for __pet__" in engine.forever.ended


def test_what_is_wrong_is_said_before_anything_is_queued(engine, jobs):
    with pytest.raises(SettingsError, match="draws no dragons"):
        engine.forever.start({**VALUES, "prompt": "a dragon"})
    assert not engine.forever.on and jobs() == []


def test_it_ends_with_the_program_and_the_next_start_says_so(tmp_path):
    config, gate = config_in(tmp_path / "project"), tmp_path / "gate"
    engine = Engine(config, handler_for)
    engine.start()
    engine.forever.start({**VALUES, "prompt": f"hold {gate}"})
    until(lambda: engine.store.jobs([RUNNING]))
    engine.stop()
    assert not engine.forever.on
    gate.touch()
    engine = Engine(config, handler_for)
    engine.start()
    try:
        until(lambda: not engine.store.queue())
        [job] = engine.store.jobs()
        assert job.status == DONE and ENDED_WITH_THE_PROGRAM in job.notes
    finally:
        engine.stop()


def test_earlier_prompts_are_distinct_newest_first_and_as_they_were_typed(tmp_path):
    engine = Engine(config_in(tmp_path / "project"), handler_for)
    for prompt in ("a cat", "a {red|blue} dog", "a cat", "fox\nhen"):
        engine.submit_all({**VALUES, "prompt": prompt, "batch_size": 2, "multi_prompts_gen_type": "G"})
    engine.submit({**VALUES, "prompt": "a c"}, source="live")
    assert engine.store.texts("prompt", source="live") == ["hen", "fox", "a cat", "a {red|blue} dog"]
    assert engine.store.texts("prompt", limit=2) == ["a c", "hen"]
    assert engine.store.texts("negative_prompt") == []
