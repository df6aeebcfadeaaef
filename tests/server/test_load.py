"""Many clients at once on one queue, while its page is in use."""

import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from tests.support.browser import ROOT, serve
from tests.support.waiting import LIMIT, until

CLIENTS, EACH = 20, 10


@pytest.mark.slow
def test_200_jobs_of_20_clients_run_once_each_and_in_order(tmp_path):
    folder = tmp_path / "outputs"
    config = EngineConfig.at(ROOT, output_dir=folder, database=folder / ".zgp" / "zgp.sqlite3")
    watcher, start = Engine(config), threading.Barrier(CLIENTS)
    watcher.store.pause()  # so that they all wait at once

    def submit(client):
        engine = Engine(config)
        start.wait()
        values = {"model_type": "z_image_mini", "num_inference_steps": 1, "resolution": "128x128"}
        return [
            engine.submit({**values, "prompt": f"{client} {number}", "seed": 100 * client + number})[0]
            for number in range(EACH)
        ]

    with serve(folder) as server:
        with ThreadPoolExecutor(CLIENTS) as pool:
            by_client = list(pool.map(submit, range(CLIENTS)))
        jobs = sorted(job for submitted in by_client for job in submitted)
        assert len(set(jobs)) == CLIENTS * EACH == watcher.store.counts().queued
        assert all(submitted == sorted(submitted) for submitted in by_client)
        watcher.store.resume()

        def look():
            with urllib.request.urlopen(server.url, timeout=LIMIT) as answer:
                assert answer.status == 200 and b"gradio" in answer.read()
            time.sleep(0.1)

        until(lambda: not watcher.store.queue(limit=1), look)
    assert [event.job_id for event in watcher.store.events(0, kinds=["started"])] == jobs
    assert [event.job_id for event in watcher.store.events(0, kinds=["done"])] == jobs
    images = [watcher.store.images(job) for job in jobs]
    assert [len(made) for made in images] == [1] * len(jobs)
    assert len({made[0].path for made in images}) == len(jobs) == len([*folder.glob("*/*.png")])
    for client, submitted in enumerate(by_client):
        for number, job in enumerate(submitted):
            [image] = watcher.store.images(job)
            assert (image.seed, image.metadata["prompt"]) == (100 * client + number, f"{client} {number}")
