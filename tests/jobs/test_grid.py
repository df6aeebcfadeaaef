"""Grids: what is typed, the sheet's pixels, and cells that are jobs like any other."""

import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from shared.cli.main import main
from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.imaging import metadata, sheet
from shared.jobs import grid
from shared.jobs.records import Job
from shared.settings.table import SettingsError
from tests.support.fake_family import handler_for, make_root
from tests.support.fake_worker import FAKE_WORKER, posix_only
from tests.support.waiting import until

ROOT = Path(__file__).resolve().parents[2]
MINI, BASE, TWIN = "z_image_mini", "z_image_mini_base", "z_image_mini_twinflow"


@pytest.fixture(scope="module")
def minis(tmp_path_factory):
    """An engine on the built-in models, with a worker."""
    folder = tmp_path_factory.mktemp("grids")
    engine = Engine(EngineConfig.at(ROOT, output_dir=folder, database=folder / "z.sqlite3", warm=False))
    yield engine
    engine.stop()


@pytest.fixture
def engine(tmp_path):
    root = make_root(tmp_path / "project")
    config = EngineConfig.at(root, worker_command=FAKE_WORKER, restart_seconds=0.01, warm=False)
    engine = Engine(config, handler_for)
    yield engine
    engine.stop()


# -- what is typed ----------------------------------------------------------------------------------------

TYPED = [
    ("num_inference_steps", "4, 8, 12", (4, 8, 12)),
    ("num_inference_steps", "1-5", (1, 2, 3, 4, 5)),
    ("num_inference_steps", "1-9 (+4)", (1, 5, 9)),
    ("num_inference_steps", "9-1 (-4)", (9, 5, 1)),
    ("num_inference_steps", "2, 10-20 [3]", (2, 10, 15, 20)),
    ("num_inference_steps", [4, 8], (4, 8)),
    ("Steps", "4,", (4,)),
    ("guidance_scale", "0.1-0.9 [5]", (0.1, 0.3, 0.5, 0.7, 0.9)),
    ("guidance_scale", "0.1-0.7 (+0.2)", (0.1, 0.3, 0.5, 0.7)),
    ("guidance_scale", "1-3", (1.0, 2.0, 3.0)),
    ("mask_expand", "-4-4 (+4)", (-4, 0, 4)),
    ("mask_expand", "-7", (-7,)),
    ("seed", "-1, -1", (-1, -1)),
    ("prompt", 'cat, "a dog, brown"\n, fox', ("cat", "a dog, brown", "", "fox")),
    ("negative_prompt", '"", blurry', ("", "blurry")),
    ("mask_only", "off, on", (False, True)),
    ("sample_solver", "unified, unified_2s", ("unified", "unified_2s")),
    ("stochast_ratio", "0, 0.5, SDE", ("0", "0.5", "SDE")),
    ("time_dist_ctrl", '"1,1,1", "1.5,1,1"', ("1,1,1", "1.5,1,1")),
    ("time_dist_ctrl", [[1, 1, 1], [2, 1, 1]], ("1,1,1", "2,1,1")),
    ("loras_multipliers", '1 0.5, "1,0.5 1"', ("1 0.5", "1,0.5 1")),
    ("model_type", f"Z-Image Mini, {BASE}", (MINI, BASE)),
    ("resolution", "128x128, 64x64", ("128x128", "64x64")),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "typed", "values"), TYPED)
def test_what_is_typed_becomes_values(minis, setting, typed, values):
    axis = grid.parse_axis("x", setting, typed, minis.catalog)
    assert axis.values == values and len(axis.labels) == len(values)
    assert [type(value) for value in axis.values] == [type(value) for value in values]
    again = grid.parse_axis("x", setting, axis.typed, minis.catalog)
    assert again.values == values, "what the picture's metadata say makes the same axis"


WRONG = [
    ("num_inference_steps", "", "Steps: no values came"),
    ("num_inference_steps", "4, 8, 4", "4 came twice"),
    ("num_inference_steps", "1-1000000000", "1,000,000,000 values"),
    ("num_inference_steps", "1-9 [0]", "expected 1 to 200"),
    ("guidance_scale", "0.1-0.9", r"names no step; expected 0.1-0.9 \[5\]"),
    ("guidance_scale", "1-2 (+0)", "names no step"),
    ("prompt", "cat", "came alone"),
    ("stepz", "4", "did you mean steps"),
    ("image_start", "a.png", "cannot vary image_start"),
    ("batch_size", "1, 2", "cannot vary batch_size"),
    ("model_type", "z_image_minni", "did you mean"),
]


@pytest.mark.parametrize(("setting", "typed", "words"), WRONG)
def test_what_cannot_be_read_is_one_sentence(minis, setting, typed, words):
    with pytest.raises(UserError, match=words):
        grid.parse_axis("x", setting, typed, minis.catalog)


@pytest.mark.parametrize("model_id", [MINI, BASE, TWIN, "z_image_mini_control2_1"])
def test_the_examples_on_the_page_are_values(minis, model_id):
    model = minis.catalog.model(model_id)
    models = [one for one in minis.catalog.models.values() if one.available]
    for setting in grid.axes_for(model):
        typed = grid.example(setting, model, models)
        needed = {"image_start": "a.png"} if setting.name == "outpaint" else {}
        for variant in typed.partition(":")[0].split(" or "):
            values = grid.parse_axis("x", setting.name, variant, minis.catalog).values
            for value in values if setting.name != "prompt" else ():
                minis.catalog.validate({"model_type": model_id, "prompt": "a", **needed, setting.name: value})


# -- cells ------------------------------------------------------------------------------------------------


def plan(engine, values=None, **axes):
    return grid.plan({"prompt": "a red circle", "model_type": MINI, **(values or {})}, axes, engine.catalog)


def test_cells_share_everything_else_and_models_change_once(minis):
    made = plan(
        minis,
        x=["num_inference_steps", "2, 4"],
        y=["model_type", f"{MINI}, {BASE}"],
        z=["prompt", "red, blue"],
    )
    settings = [cell.validated.settings for cell in made.cells]
    assert [one["model_type"] for one in settings] == [MINI] * 4 + [BASE] * 4
    assert len({one["seed"] for one in settings}) == 1 and settings[0]["seed"] >= 0
    assert [one["prompt"] for one in settings[:4]] == ["a red circle"] * 2 + ["a blue circle"] * 2
    # counted along columns, then rows, then sheets
    assert [cell.number for cell in made.cells] == [0, 1, 4, 5, 2, 3, 6, 7]
    assert {one["flow_shift"] for one in settings[4:]} == {5.0}, "each model has its own defaults"


def test_a_default_follows_the_model_and_a_choice_does_not(minis):
    form = {"model_type": BASE, "num_inference_steps": 30, "guidance_scale": 7.0}
    settings = {
        c.name: c.validated.settings for c in plan(minis, form, x=["model_type", f"{MINI}, {BASE}"]).cells
    }
    assert settings["Z-Image Mini"]["num_inference_steps"] == 8
    assert settings["Z-Image Mini Base"]["num_inference_steps"] == 30
    assert settings["Z-Image Mini Base"]["guidance_scale"] == 7.0


def test_a_random_seed_on_an_axis_is_drawn_for_each_cell(minis):
    cells = plan(minis, x=["seed", "-1, -1, 3"]).cells
    seeds = [cell.validated.settings["seed"] for cell in cells]
    assert len(set(seeds)) == 3 and seeds[2] == 3 and min(seeds) >= 0
    assert [cell.name for cell in cells] == ["Seed: random", "Seed: random", "Seed: 3"]


BAD_PLANS = [
    ({"x": ["num_inference_steps", "1-100"], "y": ["seed", "1-3"]}, ["300 cells; expected at most 200"]),
    (
        {"x": ["num_inference_steps", "0, 4"], "y": ["prompt", "dog, cat"]},
        [
            'Cell Steps: 0, dog (and 3 more cells): the prompt has no "dog"',
            "Cell Steps: 0, dog (and 1 more cell): num_inference_steps came as 0",
        ],
    ),
    (
        {"x": ["num_inference_steps", "4, 8, 0"], "y": ["resolution", "128x128, 100x100"]},
        [
            "Cell Steps: 4, Resolution: 100x100 (and 2 more cells): resolution came",
            "Cell Steps: 0, Resolution: 128x128 (and 1 more cell): num_inference_steps came as 0",
        ],
    ),
    ({"x": ["guidance_scale", "1, 2"]}, ["Guidance does not act on Z-Image Mini"]),
    ({"x": ["NAG_tau", "2, 3"]}, ["All pictures would be the same. NAG limit: Acts while NAG scale"]),
    ({"x": ["seed", "1"], "y": ["seed", "2"]}, ["Seed is on two axes"]),
    ({"x": ["nothing", "1"], "y": ["seed", "a-b"]}, ["axis x: A grid cannot vary 'nothing'"]),
    *((bad, ["grid came without axes"]) for bad in ({}, {"a": []}, [], None)),
    ({"x": "seed"}, ["axis x: it came in another form"]),
]  # fmt: skip


@pytest.mark.parametrize(("axes", "sentences"), BAD_PLANS)
def test_everything_wrong_is_said_before_anything_is_queued(minis, axes, sentences):
    with pytest.raises(SettingsError) as caught:
        grid.plan({"prompt": "a red circle", "model_type": MINI}, axes, minis.catalog)
    for sentence in sentences:
        assert any(sentence in problem for problem in caught.value.problems), caught.value.problems
    assert len(caught.value.problems) == len(sentences)


def test_one_axis_may_turn_on_what_another_varies(minis):
    assert len(plan(minis, x=["NAG_scale", "1, 4"], y=["NAG_tau", "2, 3"]).cells) == 4


def test_the_time_is_known_from_jobs_of_the_same_kind(minis):
    def job(seconds, **settings):
        known = {"model_type": MINI, "resolution": "128x128", "num_inference_steps": 8, "batch_size": 1}
        return Job(
            1,
            "done",
            known | settings,
            "ui",
            None,
            1,
            "",
            0,
            0,
            None,
            None,
            started=10.0,
            finished=10.0 + seconds,
        )

    made = plan(minis, x=["num_inference_steps", "4, 8"])
    assert grid.seconds(made, []) is None
    assert grid.seconds(made, [job(8, model_type=BASE), job(8, resolution="64x64")]) is None
    # 2 s for 8 steps is 0.25 s a step, and the grid has 12; the slow first job does not count
    assert grid.seconds(made, [job(2), job(2), job(100)]) == pytest.approx(3.0)
    assert grid.seconds(made, [job(2, num_inference_steps=4)]) == pytest.approx(6.0)


# -- the sheet's pixels -----------------------------------------------------------------------------------


def noise(seed, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def find(part, whole):
    """Where `part` stands in `whole`, pixel for pixel: (x, y)."""
    p, w = np.asarray(part), np.asarray(whole)
    places = [
        (int(x), int(y))
        for y, x in np.argwhere((w == p[0, 0]).all(axis=2))
        if np.array_equal(w[y : y + p.shape[0], x : x + p.shape[1]], p)
    ]
    assert len(places) == 1
    return places[0]


def tiles_of(images):
    return [
        sheet.Tile(one.size, lambda one=one: one) if one else sheet.Tile(reason="It failed.")
        for one in images
    ]


def drawn(images, columns=("",), rows=("",), panels=("",)):
    tiles = tiles_of(images)
    return sheet.draw(tiles, sheet.layout(tiles, columns, rows, panels))


def ink(image, left, top, right, bottom):
    """The box around what is dark there, in the image's own pixels."""
    dark = np.argwhere(np.asarray(image.convert("L"))[top:bottom, left:right] < 120)
    return None if not len(dark) else (*(dark.min(0)[::-1] + (left, top)), *(dark.max(0)[::-1] + (left, top)))


def test_every_picture_stands_in_its_column_row_and_panel():
    images = [noise(seed) for seed in range(12)]
    whole = drawn(images, ["a", "b", "c"], ["d", "e"], ["f", "g"])
    places = [find(image, whole) for image in images]
    for number, (x, y) in enumerate(places):
        panel, row, column = number // 6, number // 3 % 2, number % 3
        assert x == places[panel * 6 + column][0] and y == places[row * 3][1]
    xs = [places[panel * 6 + column][0] for panel in range(2) for column in range(3)]
    assert all(after - before > 40 for before, after in itertools.pairwise(xs))
    assert places[3][1] - places[0][1] > 30 and whole.width > xs[-1] + 40 and whole.height > places[3][1] + 30


def test_labels_are_over_their_columns_and_beside_their_rows():
    images = [noise(seed, (120, 60)) for seed in range(4)]
    labels = ["Steps: 4", "Steps: 12"]
    whole = drawn(images, labels, ["star", "a heart"], [""])
    places = [find(image, whole) for image in images]
    font = ImageFont.load_default(13)
    for label, (x, y) in zip(labels, places[:2], strict=True):
        left, top, right, bottom = ink(whole, x, 0, x + 120, y - 1)
        assert abs((left + right) / 2 - (x + 60)) <= 2 and bottom < y
        assert abs((right - left) - font.getlength(label)) <= 4
    for label, (x, y) in zip(["star", "a heart"], places[::2], strict=True):
        left, top, right, bottom = ink(whole, 0, y, x - 1, y + 60)
        assert abs((top + bottom) / 2 - (y + 30)) <= 5 and 0 < x - right < 14
        assert abs((right - left) - font.getlength(label)) <= 4
    bare = drawn(images, ["", ""], ["", ""])
    x, y = find(images[0], bare)
    assert ink(bare, 0, 0, bare.width, y) is None and ink(bare, 0, 0, x, bare.height) is None


def test_smaller_pictures_are_centred_and_empty_cells_say_why():
    large, small = noise(1, (80, 80)), noise(2, (32, 48))
    whole = drawn([large, small, None], ["a", "b", "c"])
    (x, y), (at, down) = find(large, whole), find(small, whole)
    assert (at - x - 24, down - y) == (whole_step(whole, large, x), 16)
    right = whole.getpixel((whole.width - 20, y + 2))
    assert right not in [sheet.PAPER, (255, 255, 255)] and ink(whole, at + 60, y, whole.width, y + 80)


def whole_step(whole, image, x):
    """From the first column to the second, as a sheet of two equal pictures has it."""
    other = noise(9, image.size)
    both = drawn([image, other, None], ["a", "b", "c"])
    return find(other, both)[0] - find(image, both)[0]


def test_large_sheets_are_made_smaller(monkeypatch):
    monkeypatch.setattr(sheet, "MAX_PIXELS", 4 * 50 * 50)
    images = [Image.new("RGB", (100, 100), color) for color in ("red", "green", "blue", "yellow")]
    tiles = tiles_of(images)
    where = sheet.layout(tiles, ["a", "b"], ["c", "d"], [""])
    assert where.scale == 0.5 and where.cell == (50, 50)
    whole = np.asarray(sheet.draw(tiles, where))
    assert (whole == (255, 0, 0)).all(axis=2).sum() == 2500
    assert sheet.layout(tiles_of([images[0]] * 200), ["x"] * 200, [""], [""]).size[0] < 20_000


ODD_LABELS = [
    "红色的圆在白色背景上" * 9, "🎈🦊👩‍👩‍👧", "a\tb\nc\0d\x1b[31m", "x" * 5000, "مرحبا", "́" * 40, "", " ",
]  # fmt: skip


@pytest.mark.parametrize("label", ODD_LABELS)
def test_labels_of_every_kind_are_drawn_inside_of_the_sheet(label):
    image = noise(1, (96, 64))
    whole = drawn([image] * 4, [label, "b"], [label, "d"], [label])
    assert whole.width < 700 and whole.height < 700
    assert max(len(line) for line in sheet.wrapped("word " * 50, 13, 90).split("\n")) < 20
    assert sheet.wrapped("word " * 50, 13, 90).endswith("…")


# -- jobs -------------------------------------------------------------------------------------------------


def submit(engine, values, **axes):
    return engine.submit_grid(engine.plan_grid({"seed": 5, **values}, axes))


def ended(engine, grid_id, sheets=1):
    """The grid's jobs once that many drawings of it have ended: (cells, drawings)."""

    def look():
        jobs = engine.store.grid_jobs(grid_id)
        drawings = [job for job in jobs if job.cell is None and job.finished]
        return ([job for job in jobs if job.cell is not None], drawings) if len(drawings) >= sheets else None

    return until(look)


def opened(engine, job):
    (record,) = engine.store.images(job.id)
    with Image.open(record.path) as image:
        assert (image.width, image.height) == (record.width, record.height)
        return image.convert("RGB"), metadata.read(record.path)


def test_a_grid_of_two_models_is_drawn_pixel_for_pixel(minis):
    base = {"prompt": "a red circle on a white background", "model_type": MINI, "resolution": "64x64"}
    axes = {"x": ["num_inference_steps", "1, 2, 3"], "y": ["model_type", f"{MINI}, {BASE}"]}
    grid_id, job_ids = submit(minis, base, **axes)
    assert [job.id for job in minis.store.queue()] == job_ids  # one job for each cell, and no more yet
    minis.start()
    cells, (drawing,) = ended(minis, grid_id)
    assert [job.status for job in cells] == ["done"] * 6 and drawing.status == "done"
    whole, meta = opened(minis, drawing)
    places = {job.cell: find(opened(minis, job)[0], whole) for job in cells}
    assert [places[i][1] for i in range(3)] == [places[0][1]] * 3 and places[0][1] < places[3][1]
    assert places[0][0] < places[1][0] < places[2][0] and places[3][0] == places[0][0]
    assert meta["zgp"]["grid"]["axes"] == axes and meta["zgp"]["grid"]["scale"] == 1
    assert metadata.settings_from(meta) == {**cells[0].settings, "seed": 5}
    names = [Path(minis.store.images(job.id)[0].path).name for job in cells]
    assert [[name] for name in names] == meta["zgp"]["grid"]["cells"]
    alone, _ = minis.submit({**base, "num_inference_steps": 2, "model_type": BASE, "seed": 5})
    until(lambda: minis.store.job(alone).finished)
    assert find(opened(minis, minis.store.job(alone))[0], whole) == places[4]


def test_cells_of_random_seeds_are_told_apart(engine):
    grid_id, _ = submit(engine, {"prompt": "a circle"}, x=["seed", "-1, -1, -1"])
    engine.start()
    cells, (drawing,) = ended(engine, grid_id)
    names = [[Path(engine.store.images(job.id)[0].path).name] for job in cells]
    meta = opened(engine, drawing)[1]
    assert len(names) == 3 and meta["zgp"]["grid"]["cells"] == names


def test_a_failed_cell_is_empty_and_a_second_try_draws_the_grid_again(engine, tmp_path):
    grid_id, _ = submit(
        engine, {"prompt": "surprise me", "batch_size": 3}, x=["prompt", "surprise, a circle for"]
    )
    engine.start()
    cells, (drawing,) = ended(engine, grid_id)
    assert [job.status for job in cells] == ["failed", "done"] and drawing.status == "done"
    whole, meta = opened(engine, drawing)
    assert any("surprise: LookupError" in note for note in meta["zgp"]["notes"])
    # a batch of three is a small sheet of two by two: (5, 0, 0), (6, 0, 0), (7, 0, 0) and black
    shades = {shade: (np.asarray(whole) == (shade, 0, 0)).all(axis=2).sum() for shade in (0, 5, 6, 7)}
    assert shades == {0: 4096, 5: 4096, 6: 4096, 7: 4096}
    with engine.store._db.transaction() as cx:  # as a second try does it
        settings = json.dumps({**cells[0].settings, "prompt": "a square"})
        again = "UPDATE jobs SET status = 'queued', finished = NULL, attempts = 0, settings = ? WHERE id = ?"
        cx.execute(again, (settings, cells[0].id))
    cells, drawings = ended(engine, grid_id, 2)
    again, meta = opened(engine, drawings[1])
    assert meta["zgp"]["notes"] == [] and again.size == whole.size
    assert (np.asarray(again) == (6, 0, 0)).all(axis=2).sum() == 2 * 4096
    assert Path(engine.store.images(drawings[0].id)[0].path).is_file()  # nothing is overwritten


@posix_only
def test_a_killed_worker_and_a_restart_lose_no_cell(engine, tmp_path):
    gate = tmp_path / "gate"
    grid_id, job_ids = submit(engine, {"prompt": f"hold {gate}"}, x=["seed", "10-40 (+10)"])
    engine.start()
    until(lambda: engine.store.preview(job_ids[0]))
    os.kill(engine.worker_pid, signal.SIGKILL)
    until(lambda: engine.store.job(job_ids[0]).attempts == 2 and engine.store.preview(job_ids[0]))
    engine.stop()
    gate.touch()
    again = Engine(engine.config, handler_for)
    again.start()
    try:
        cells, (drawing,) = ended(again, grid_id)
        whole, _ = opened(again, drawing)
    finally:
        again.stop()
    assert [job.status for job in cells] == ["done"] * 4
    assert all((np.asarray(whole) == (shade, 0, 0)).all(axis=2).sum() == 4096 for shade in (10, 20, 30, 40))


def test_cancelled_cells_are_empty_and_nothing_is_drawn_of_no_pictures(engine, tmp_path):
    gate = tmp_path / "gate"
    grid_id, job_ids = submit(engine, {"prompt": "a circle"}, x=["seed", "1-3"])
    for job_id in job_ids:
        engine.cancel(job_id)
    assert engine.store.queue() == []
    grid_id, job_ids = submit(engine, {"prompt": f"a {gate}"}, x=["prompt", "a, hold"])
    engine.start()
    until(lambda: engine.store.preview(job_ids[1]))
    engine.cancel(job_ids[1])
    cells, (drawing,) = ended(engine, grid_id)
    assert [job.status for job in cells] == ["done", "cancelled"]
    assert opened(engine, drawing)[1]["zgp"]["notes"] == ["hold: Cancelled."]


def test_a_drawing_without_its_pictures_fails_with_its_reason(engine):
    grid_id, _ = submit(engine, {"prompt": "a circle"}, x=["seed", "1-2"])
    engine.start()
    cells, (drawing,) = ended(engine, grid_id)
    for job in cells:
        Path(engine.store.images(job.id)[0].path).unlink()
    with engine.store._db.transaction() as cx:
        cx.execute("UPDATE jobs SET status = 'queued', finished = NULL WHERE id = ?", (drawing.id,))
        cx.execute("DELETE FROM images WHERE job_id = ?", (drawing.id,))
    (drawing,) = ended(engine, grid_id)[1]
    assert drawing.status == "failed" and "No picture of this grid is left" in drawing.error


def test_a_grid_in_a_file_of_settings(tmp_path, capsys):
    root = make_root(tmp_path / "project")

    def run(item, *flags):
        file = tmp_path / "tasks.json"
        file.write_text(json.dumps(item), encoding="utf-8")
        fake = {"root": root, "handler_for": handler_for, "worker_command": FAKE_WORKER, "warm": False}
        code = main(["--process", str(file), *flags], **fake)
        return code, *capsys.readouterr()

    good = {"prompt": "a circle", "grid": {"x": ["seed", "1-2"], "y": ["prompt", "circle, square"]}}
    code, out, _ = run(good, "--dry-run")
    assert code == 0 and out.count("\n") == 4 and "item 1, Seed: 2, square: fake, 64x64" in out
    code, out, err = run(good, "--json")
    results = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [one["status"] for one in results] == ["done"] * 5
    assert results[0]["cell"] == "Seed: 1, circle" and results[4]["cell"] == "the grid"
    assert Path(results[4]["images"][0]["path"]).is_file()
    code, out, err = run([{**good, "grid": {"x": ["seed", "1, x"]}}, {"prompt": "a star"}])
    assert code == 1 and "item 1: Cell Seed: x: seed came as" in err and "item 2: done" in out
    code, out, err = run({"prompt": "a user_error", "grid": {"x": ["prompt", '"a user_error", a star']}})
    assert code == 0  # the command is not the first word
    code, out, err = run({"prompt": "user_error", "grid": {"x": ["prompt", "user_error, star"]}})
    assert code == 1 and "item 1, user_error: failed" in out and "item 1, the grid: done" in out
