"""Saved queues: what Wan2GP writes is read, what is written comes back the same, and no file leads astray."""

import io
import json
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.jobs import queue_file
from shared.jobs.queue_file import read_queue, write_queue
from shared.jobs.task_file import read_tasks
from shared.library.catalog import catalog
from tests.support.fake_family import Handler, make_root
from tests.support.mini import ROOT


class Painter(Handler):
    @staticmethod
    def query_model_def(base_type, model_def):
        acting = {"image": True, "inpaint": True, "control": True}
        return {**Handler.query_model_def(base_type, model_def), **acting}


@pytest.fixture
def engine(tmp_path):
    """Validates and queues; nothing runs."""
    return Engine(EngineConfig.at(make_root(tmp_path / "project"), warm=False), lambda name: Painter)


def png(colour=(200, 30, 30, 255), size=(32, 16)) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", size, colour).save(file, "PNG")
    return file.getvalue()


def packed(path: Path, manifest, **files) -> Path:
    """A zip as Wan2GP writes it: queue.json, and the files beside it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("queue.json", manifest if isinstance(manifest, str) else json.dumps(manifest))
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def task(**params):
    return {"id": 7, "params": {"model_type": "fake", "prompt": "a circle", **params}}


def test_a_queue_of_wan2gp_becomes_jobs_with_its_pictures(engine, tmp_path):
    first = task(
        seed=3, image_start=["task7_image_start_0.png"], video_length=81, settings_version=2.79,
        video_prompt_type="", denoising_strength=0.5,
    )  # fmt: skip
    path = packed(
        tmp_path / "q.zip",
        [first, task(seed=4)],
        **{"task7_image_start_0.png": png(), "clip.mp4": b"no picture"},
    )
    tasks = read_tasks(path, tmp_path / "pictures")
    jobs = [engine.submit(one.values, uploads=tmp_path / "pictures") for one in tasks]
    settings = [engine.store.job(job).settings for job, _ in jobs]
    assert [one["seed"] for one in settings] == [3, 4]
    assert settings[0]["denoising_strength"] == 0.5
    with Image.open(settings[0]["image_start"]) as kept:
        assert kept.convert("RGB").getpixel((3, 3)) == (200, 30, 30) and kept.size == (32, 16)
    assert "it concerns videos" in jobs[0][1].ignored["video_length"]
    assert not any(path.suffix == ".mp4" for path in (tmp_path / "pictures").rglob("*"))


@pytest.mark.parametrize("kind", ["queue", "settings"])
def test_a_file_with_unified_sampler_config_sets_the_sampler(tmp_path, kind):
    config = {"sampling_steps": 4, "sampling_order": 2, "time_dist_ctrl": [1.0, 1.0, 1.0]}
    params = {"model_type": "z_image_mini_twinflow", "prompt": "a star", "num_inference_steps": 2}
    params |= {"sample_solver": " unified_mul ", "unified_sampler_config": config}
    path = tmp_path / "one.json"
    path.write_text(json.dumps(params))
    if kind == "queue":
        path = packed(tmp_path / "q.zip", [task(**params)])
    [one] = read_tasks(path, tmp_path / "pictures")
    found = catalog(ROOT, ROOT / "ckpts").validate(one.values)
    names = ("sample_solver", "num_inference_steps", "sampling_order", "time_dist_ctrl")
    assert tuple(found.settings[name] for name in names) == ("unified", 4, 2, "1.0,1.0,1.0")
    assert found.ignored == {}


def test_what_is_written_comes_back_the_same(engine, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 255, (16, 32, 4)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "soft.png")
    Image.new("L", (32, 16), 255).save(tmp_path / "mask.png")
    common = {"model_type": "fake", "prompt": "绿色 <b> 🟢", "image_start": str(tmp_path / "soft.png")}
    engine.submit({**common, "seed": 2**53 - 9, "batch_size": 3, "num_inference_steps": 5})
    engine.submit({**common, "image_mask": str(tmp_path / "mask.png"), "denoising_strength": 0.4})
    engine.submit({"model_type": "other", "prompt": "x", "seed": -1})
    jobs = engine.store.queue()
    path = write_queue(jobs, tmp_path / "saved.zip")

    elsewhere = Engine(EngineConfig.at(make_root(tmp_path / "elsewhere"), warm=False), lambda name: Painter)
    for one in read_tasks(path, tmp_path / "pictures"):
        _, validated = elsewhere.submit(one.values, uploads=tmp_path / "pictures")
        assert validated.ignored == {} and validated.notes == []
    again = elsewhere.store.queue()
    assert len(again) == 3
    for job, copy in zip(jobs, again, strict=True):
        for name, value in job.settings.items():
            if name in ("image_start", "image_mask") and value:
                assert Path(copy.settings[name]).read_bytes() == Path(value).read_bytes()
                assert str(elsewhere.config.inputs) in copy.settings[name]
            else:
                assert copy.settings[name] == value


def test_the_file_is_what_wan2gp_reads(engine, tmp_path):
    Image.new("RGB", (32, 16)).save(tmp_path / "a.png")
    engine.submit({"model_type": "fake", "prompt": "x", "image_start": str(tmp_path / "a.png")})
    path = write_queue(engine.store.queue(), tmp_path / "saved.zip")
    with zipfile.ZipFile(path) as archive:
        [item] = json.loads(archive.read("queue.json"))
        assert set(item) == {"id", "params"} and item["params"]["model_type"] == "fake"
        name = item["params"]["image_start"]
        assert "/" not in name and Image.open(io.BytesIO(archive.read(name))).size == (32, 16)
        assert str(tmp_path) not in archive.read("queue.json").decode()


def test_a_control_picture_says_what_it_is_in_wan2gp_s_letters():
    params, _ = queue_file._params({"image_guide": "/x/a.png", "control_preprocessor": "depth"})
    assert (params["video_prompt_type"], params["image_guide"]) == ("DV", "a.png")


@pytest.mark.parametrize(
    "content",
    [
        [{"id": 1, "params": {"prompt": "a"}}, {"id": 2, "params": {"prompt": "b"}}],
        [{"prompt": "a"}, {"prompt": "b"}],
    ],
)
def test_a_manifest_and_a_plain_list_are_the_same_tasks(tmp_path, content):
    path = tmp_path / "queue.json"
    path.write_text(json.dumps(content))
    assert [one.values for one in read_tasks(path, tmp_path)] == [{"prompt": "a"}, {"prompt": "b"}]


def test_pictures_beside_a_manifest_are_found(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    path = tmp_path / "queue.json"
    path.write_text(json.dumps([task(image_start="a.png", image_mask="gone.png")]))
    [one] = read_tasks(path, tmp_path / "unused")
    assert one.values["image_start"] == str(tmp_path / "a.png")
    assert one.values["image_mask"] == "gone.png"


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"model_type": "wan_t2v"}, "no model 'wan_t2v'"),
        ({"image_start": "gone.png"}, "gone.png does not exist"),
        ({"image_start": "broken.png"}, "broken.png cannot be read"),
        ({"image_start": "/etc/passwd"}, "passwd does not exist"),
        ({"image_start": "../../secret.png"}, "secret.png does not exist"),
        ({"image_start": ["a.png", "a.png"]}, "image_start came as"),
    ],
)
def test_a_job_that_cannot_run_is_refused_alone(engine, tmp_path, wrong, sentence):
    (tmp_path / "secret.png").write_bytes(png())
    files = {"a.png": png(), "broken.png": png()[:60]}
    path = packed(tmp_path / "q.zip", [task(**wrong), task(image_start="a.png")], **files)
    folder = tmp_path / "deep" / "deeper" / "pictures"
    bad, good = read_tasks(path, folder)
    with pytest.raises(UserError, match=sentence):
        engine.submit(bad.values, uploads=folder)
    assert engine.submit(good.values, uploads=folder)[0]


# -- files that are made to do harm -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../a.png", "/a.png", "x/../../a.png", "C:/a.png", "..\\a.png", "aux.png", "x/COM1", "a\x07.png"]
)
def test_names_that_lead_out_are_refused(tmp_path, name):
    path = packed(tmp_path / "q.zip", [task(image_start=name)], **{name: png()})
    with pytest.raises(UserError, match="leads out of the file|name of a device"):
        read_queue(path, tmp_path / "pictures")
    assert [*tmp_path.iterdir()] == [path]


def test_a_link_is_refused(tmp_path):
    path = packed(tmp_path / "q.zip", [task(image_start="a.png")])
    link = zipfile.ZipInfo("a.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="is a link"):
        read_queue(path, tmp_path / "pictures")


def test_a_bomb_is_refused_by_what_it_says(tmp_path):
    path = packed(tmp_path / "q.zip", [task(image_start="a.png")], **{"a.png": bytes(8 << 20)})
    with pytest.raises(UserError, match="more than 200 times its size"):
        read_queue(path, tmp_path / "pictures")


def with_declared_size(path: Path, name: str, size: int) -> Path:
    """The archive with another unpacked size in the directory entry of `name` and in its local header."""
    data = bytearray(path.read_bytes())
    for signature, field, at in ((b"PK\1\2", 24, 46), (b"PK\3\4", 22, 30)):
        start = -1
        while (start := data.find(signature, start + 1)) >= 0:
            if data[start + at : start + at + len(name)] == name.encode():
                data[start + field : start + field + 4] = struct.pack("<I", size)
    path.write_bytes(data)
    return path


def test_a_bomb_that_says_it_is_small_unpacks_to_no_more(tmp_path):
    path = packed(tmp_path / "q.zip", [task(image_start="a.png")], **{"a.png": bytes(8 << 20)})
    with_declared_size(path, "a.png", 100)
    with pytest.raises(UserError, match="not a saved queue"):
        read_queue(path, tmp_path / "pictures")
    assert not [file for file in tmp_path.rglob("a.png") if file.stat().st_size > 100]


def test_sizes_and_counts_are_limited(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).bytes(3000)
    path = packed(tmp_path / "q.zip", [task(image_start="a.png")], **{"a.png": noise})
    for limit, value, sentence in (
        ("MAX_PICTURE", 2999, "a.png unpacks to more"),
        ("MAX_MANIFEST", 10, "queue.json unpacks to more"),
        ("MAX_TOTAL", 2999, "unpacks to more"),
        ("MAX_ENTRIES", 1, "holds 2 files"),
        ("MAX_JOBS", 0, "holds 1 jobs"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(queue_file, limit, value)
            with pytest.raises(UserError, match=sentence):
                read_queue(path, tmp_path / limit)
    assert len(read_queue(path, tmp_path / "pictures")) == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"not a zip", "not a saved queue"),
        (b"", "not a saved queue"),
        ("{", "not a saved queue"),
        ("[" * 100_000, "not a saved queue"),
        ("[]", "holds no tasks"),
    ],
)
def test_what_is_no_queue_is_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "q.zip"
    path.write_bytes(content) if isinstance(content, bytes) else packed(path, content)
    with pytest.raises(UserError, match=sentence):
        read_tasks(path, tmp_path / "pictures")


def test_an_archive_without_a_manifest_or_with_two_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("settings.json", "{}")
    with pytest.raises(UserError, match="no queue.json"):
        read_queue(tmp_path / "none.zip", tmp_path)
    path = packed(tmp_path / "two.zip", [task()])
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("queue.json", "[]")
    with pytest.raises(UserError, match="the same name"):
        read_queue(path, tmp_path)


def test_a_flipped_byte_anywhere_is_a_sentence_or_harmless(tmp_path):
    path = packed(tmp_path / "q.zip", [task(image_start="a.png")], **{"a.png": png()})
    data = path.read_bytes()
    for place in range(0, len(data), 5):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            read_queue(path, tmp_path / f"pictures{place}")
        except UserError as error:
            assert "\n" not in str(error)


def test_a_queue_that_cannot_be_saved_is_a_sentence(engine, tmp_path):
    engine.submit({"model_type": "fake", "prompt": "x"})
    with pytest.raises(UserError, match="cannot be saved"):
        write_queue(engine.store.queue(), Path(__file__) / "q.zip")


def test_a_job_whose_picture_is_gone_is_said_and_leaves_no_half_file(engine, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    job, _ = engine.submit({"model_type": "fake", "prompt": "x", "image_start": str(tmp_path / "a.png")})
    Path(engine.store.job(job).settings["image_start"]).unlink()
    with pytest.raises(UserError, match="pictures are still there"):
        write_queue(engine.store.queue(), tmp_path / "q.zip")
    assert not [*tmp_path.glob("q.zip*")]
