"""The pictures of jobs: copied when they are submitted, so that a job outlives its source."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.imaging.sources import load_picture
from shared.jobs.inputs import check_pictures, keep_picture, keep_pictures, without_folders
from shared.settings.table import SettingsError
from tests.support.fake_family import Handler, make_root


class Painter(Handler):
    @staticmethod
    def query_model_def(base_type, model_def):
        return {**Handler.query_model_def(base_type, model_def), "image": True, "inpaint": True}


@pytest.fixture
def photo(tmp_path):
    """Lies on its side, as a camera held upright saves it, with a transparent corner."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 4)).astype(np.uint8)
    pixels[..., 3] = 255
    pixels[:5, :5, 3] = 0
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def test_the_copy_is_named_by_its_bytes_and_upright(photo, tmp_path):
    folder = tmp_path / "inputs"
    copy, notes = keep_picture(photo, folder)
    assert copy.parent == folder and copy.stem == hashlib.sha256(copy.read_bytes()).hexdigest()
    assert any("upright" in note for note in notes)
    expected, again = load_picture(photo), load_picture(copy)
    assert again.image.size == (20, 30) and again.image.tobytes() == expected.image.tobytes()
    assert again.alpha.tobytes() == expected.alpha.tobytes()
    before = copy.stat().st_mtime_ns
    assert keep_picture(photo, folder)[0] == keep_picture(copy, folder)[0] == copy
    assert copy.stat().st_mtime_ns == before and [*folder.iterdir()] == [copy]


def test_pictures_are_checked_without_keeping_any(photo, tmp_path):
    folder = tmp_path / "inputs"
    (tmp_path / "text.png").write_text("not a picture")
    given = {"image_start": str(photo), "image_mask": str(tmp_path / "text.png"), "image_guide": "gone.png"}
    first, second = sorted(check_pictures(given, folder))
    assert first.startswith("image_guide: gone.png does not exist")
    assert second.startswith("image_mask: text.png cannot be read")
    assert not folder.exists()


def test_a_job_outlives_its_source(photo, tmp_path):
    config = EngineConfig.at(make_root(tmp_path / "project"), warm=False)
    engine = Engine(config, lambda architecture: Painter)
    values = {"model_type": "fake", "prompt": "x", "image_start": str(photo)}
    job_id, validated = engine.submit(values)
    photo.unlink()
    kept = engine.store.job(job_id).settings["image_start"]
    assert validated.settings["image_start"] == kept and load_picture(kept).image.size == (20, 30)
    assert str(config.output_dir / ".zgp" / "inputs") in kept
    assert any("upright" in note for note in engine.store.job(job_id).notes)
    carried = without_folders(validated.settings)  # as the picture's own metadata has it
    assert str(tmp_path) not in str(carried) and carried["image_mask"] == ""
    again, _ = engine.submit({**values, "image_start": carried["image_start"]})
    assert engine.store.job(again).settings["image_start"] == kept
    with pytest.raises(SettingsError, match="image_start: photo.png does not exist"):
        engine.submit(values)


def test_every_picture_that_cannot_be_used_is_said(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    settings = {"image_start": str(tmp_path / "a.png"), "image_mask": str(tmp_path / "text.png"), "seed": 1}
    with pytest.raises(SettingsError) as caught:
        keep_pictures(settings, tmp_path / "inputs")
    assert len(caught.value.problems) == 2 and not (tmp_path / "inputs").exists()
    assert keep_pictures({"image_start": "", "seed": 1}, tmp_path) == ({"image_start": "", "seed": 1}, [])


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(UserError):
        keep_picture(tmp_path, tmp_path / "inputs")


def test_a_request_over_the_network_reads_no_other_picture_of_this_computer(photo, tmp_path):
    uploads, folder = tmp_path / "uploads", tmp_path / "inputs"
    uploads.mkdir()
    sent = photo.rename(uploads / photo.name)
    kept, _ = keep_pictures({"image_start": str(sent)}, folder, [uploads])
    assert keep_pictures({"image_start": kept["image_start"]}, folder, [uploads])[0] == kept
    (private := tmp_path / "private.png").write_bytes(sent.read_bytes())
    (uploads / "link.png").symlink_to(private)
    for path in (private, uploads / ".." / "private.png", uploads / "link.png", tmp_path / "absent.png"):
        with pytest.raises(SettingsError, match="upload it first"):
            keep_pictures({"image_start": str(path)}, folder, [uploads])
