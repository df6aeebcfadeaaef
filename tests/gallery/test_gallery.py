"""The collection of all pictures: what a search finds, the trash, and pictures that nobody knows."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shared.engine.engine import EngineConfig
from shared.errors import UserError
from shared.gallery.collection import TRASH, TRASH_FOLDER, Collection, Found, Wanted
from shared.jobs.database import MIGRATIONS
from shared.jobs.store import JobStore
from tests.support.waiting import until

PROMPTS = (
    "A red lighthouse at dawn",
    "a RED fox in the snow",
    "Ein Fuchs, größer als Łódź, café",
    "一只红色的狐狸在雪地里",
    'lights "OFF" (night:1.2) NOT day*',
    "100% cotton_dress, red-brown",
)


def settings(prompt: str, **others) -> dict:
    return {"model_type": "mini", "prompt": prompt, "seed": 5, **others}


def write(path: Path, meta: dict | None = None, age: float = 60, name: str = "comment") -> Path:
    """A PNG of 6 x 4 pixels with the settings in the text chunk in which they are kept."""
    chunks = PngInfo()
    if meta is not None:
        chunks.add_text(name, meta if isinstance(meta, str) else json.dumps(meta))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (9, len(path.name), 7)).save(path, pnginfo=chunks)
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture
def root(tmp_path):
    return tmp_path / "outputs"


@pytest.fixture
def store(root):
    return JobStore(root / ".zgp" / "zgp.sqlite3")


@pytest.fixture
def collection(store, root):
    return Collection(store, root)


def add(store, root, prompt="a circle", width=6, height=4, created=None, **others) -> int:
    """A picture that a job has made."""
    job = store.submit({"prompt": prompt})
    path = write(root / "day" / f"{job}.png", settings(prompt, **others))
    image = store.add_image(
        job, index=0, path=str(path), seed=5, width=width, height=height, metadata=settings(prompt, **others)
    )
    if created is not None:
        with store.database.transaction() as cx:
            cx.execute("UPDATE images SET created = ? WHERE id = ?", (created, image))
    return image


def found(collection, limit=60, **wanted) -> list[int]:
    """The numbers of all pictures of that kind, page by page."""
    ids, after = [], None
    while True:
        page = collection.page(Wanted(**wanted), after, limit)
        ids += [tile.id for tile in page.tiles]
        after = page.after
        if after is None:
            return ids


# ---------------------------------------------------------------- looking


def test_pictures_of_the_folder_of_before_stay(store, root, tmp_path):
    old = add(store, root)
    new = add(store, tmp_path / "elsewhere", "a square")
    config = EngineConfig.at(tmp_path, output_dir=tmp_path / "elsewhere")
    assert config.database == store.path
    collection = Collection(store, *config.picture_folders)
    assert set(found(collection)) == {old, new}
    assert found(Collection(JobStore(store.path), root, tmp_path / "elsewhere"), words="circle") == [old]
    (path,) = [Path(one.path) for one in collection.records([old])]
    assert collection.discard([old]).ids == [old] and found(collection) == [new] and not path.exists()
    assert collection.restore([old]).ids == [old] and path.exists()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """One picture for each of PROMPTS, numbered from 1."""
    root = tmp_path_factory.mktemp("prompts")
    store = JobStore(root / ".zgp" / "zgp.sqlite3")
    for prompt in PROMPTS:
        add(store, root, prompt)
    return Collection(store, root)


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", {1, 2, 3, 4, 5, 6}),
        ("red", {1, 2, 6}),
        ("red fox", {2}),
        ("fox red", {2}),
        ("light", {1, 5}),  # by their beginnings
        ('"light"', set()),  # in quotes: just so
        ('"red fox"', {2}),
        ('"fox red"', set()),
        ("FUCHS grosser", set()),
        ("CAFE", {3}),
        ("Größer", {3}),
        ("狐狸", {4}),
        ("红色 雪", {4}),
        ("狐狸 red", set()),
        ("OFF", {5}),
        ("NOT", {5}),
        ("red NOT fox", set()),  # NOT is a word like any other
        ("red OR fox", set()),
        ("day*", {5}),
        ('"', {1, 2, 3, 4, 5, 6}),
        ("- ( ) * : ^", {1, 2, 3, 4, 5, 6}),
        ("prompt:red", set()),
        ("red-brown", {6}),
        ("cotton_dress", {6}),
        ("zebra", set()),
        ("'; DROP TABLE images; --", set()),
    ],
)
def test_words_of_the_prompt(prompts, words, expected):
    assert set(found(prompts, words=words)) == expected
    assert prompts.count(Wanted(words=words)) == len(expected)


def test_marks_of_a_pattern_are_letters_like_any_other(collection, store, root):
    add(store, root, "雪%地")
    add(store, root, "雪山地")
    assert found(collection, words="雪%地") == [1]


def test_filters_leave_what_is_asked_for(collection, store, root):
    made = []
    for number in range(24):
        one = dict(
            prompt="red" if number % 3 else "blue",
            model_type=("mini", "big")[number % 2],
            activated_loras=["a.safetensors", "b.safetensors"][: number % 3],
            created=1_700_000_000.0 + 86_400 * (number // 2),
            width=6 if number % 4 else 8,
            height=4,
        )
        made.append((add(store, root, **one), one, number % 5 == 0))
    collection.favour([image for image, _, favourite in made if favourite], True)
    day = datetime.fromtimestamp(made[12][1]["created"]).strftime("%Y-%m-%d")
    checks = {
        "model": ("big", lambda one, _: one["model_type"] == "big"),
        "lora": ("b.safetensors", lambda one, _: "b.safetensors" in one["activated_loras"]),
        "words": ("blue", lambda one, _: one["prompt"] == "blue"),
        "size": ("8x4", lambda one, _: one["width"] == 8),
        "favourites": (True, lambda _, favourite: favourite),
        "since": (day, lambda one, _: one["created"] >= made[12][1]["created"]),
        "until": (day, lambda one, _: one["created"] < made[14][1]["created"]),
    }
    asked = [(name,) for name in checks] + [
        ("model", "lora"),
        ("words", "since", "favourites"),
        tuple(checks),
    ]
    for names in asked:
        wanted = {name: checks[name][0] for name in names}
        right = [image for image, one, star in made if all(checks[name][1](one, star) for name in names)]
        assert sorted(found(collection, **wanted)) == right, names
        assert collection.count(Wanted(**wanted)) == len(right)
    choices = collection.choices()
    assert choices.models == [("big", 12), ("mini", 12)]
    assert choices.loras == [("a.safetensors", 16), ("b.safetensors", 8)]
    assert choices.sizes == [("6x4", 18), ("8x4", 6)]


def test_pages_hold_every_picture_once_and_in_order(collection, store, root):
    times = [5.0, 1.0, 3.0, 3.0, 3.0, 3.0, 2.0, 5.0, 4.0]
    for moment in times:
        add(store, root, created=1.7e9 + moment)
    order = sorted(range(len(times)), key=lambda i: (times[i], i))
    ids = [number + 1 for number in order]
    for limit in (1, 2, 3, 4, 60):
        assert found(collection, limit, oldest_first=True) == ids
        assert found(collection, limit) == ids[::-1]
    first = collection.page(Wanted(), limit=3)
    add(store, root, created=1.7e9 + 9)  # made while somebody looks through the list
    rest = collection.page(Wanted(), first.after, 60)
    assert [tile.id for tile in (*first.tiles, *rest.tiles)] == ids[::-1]


@pytest.mark.parametrize("day", ["yesterday", "2026-13-01", "9999-12-31"])
def test_a_date_that_is_none_is_one_sentence(collection, day):
    with pytest.raises(UserError, match="expected a day such as"):
        collection.page(Wanted(until=day))


def test_odd_metadata_keep_no_picture_out(collection, store, root):
    path = write(root / "odd.png")
    for meta in ({"prompt": ["x"], "activated_loras": "a"}, {"cfg": float("nan"), "prompt": "x"}, {}):
        job = store.submit({})
        store.add_image(job, index=0, path=str(path), seed=1, width=1, height=1, metadata=meta)
    assert len(found(collection)) == 3 and collection.choices().models == []


def test_a_database_of_before_becomes_one_of_now(tmp_path, root):
    path = root / ".zgp" / "zgp.sqlite3"
    path.parent.mkdir(parents=True)
    old = sqlite3.connect(path)
    for statement in MIGRATIONS[0]:
        old.execute(statement)
    old.execute("INSERT INTO jobs (status, settings, source, created) VALUES ('done', '{}', 'ui', 1)")
    for number in range(3):
        file = write(root / f"{number}.png")
        meta = settings(PROMPTS[number], activated_loras=["a.safetensors"])
        values = (number, str(file), number, 6, 4, 1.7e9 + number, json.dumps(meta))
        old.execute(
            "INSERT INTO images (job_id, number, path, seed, width, height, created, metadata)"
            " VALUES (1, ?, ?, ?, ?, ?, ?, ?)",
            values,
        )
    old.execute("PRAGMA user_version = 1")
    old.commit()
    old.close()
    store = JobStore(path)
    collection = Collection(store, root)
    assert found(collection, words="red") == [2, 1]
    assert found(collection, lora="a.safetensors", model="mini") == [3, 2, 1]
    assert [image.seed for image in store.images(1)] == [0, 1, 2]
    assert add(store, root, "new") == 4  # numbers are never given twice


# ---------------------------------------------------------------- favourites and the trash


def test_a_deleted_picture_lies_in_the_trash_and_comes_back(collection, store, root):
    kept, image = add(store, root, "kept"), add(store, root, "fox")
    file = Path(store.image(image).path)
    data = file.read_bytes()
    collection.favour([image], True)
    assert collection.discard([image, 99]).ids == [image]
    assert not file.exists() and Path(store.image(image).path).read_bytes() == data
    assert Path(store.image(image).path).is_relative_to(root / TRASH_FOLDER)
    assert found(collection) == [kept] and found(collection, place=TRASH, words="fox") == [image]
    assert [one.id for one in store.images()] == [kept] and collection.choices().trash == 1
    assert collection.discard([image]).ids == []  # it is there already
    assert collection.restore([image, kept]).ids == [image]
    assert file.read_bytes() == data and found(collection, favourites=True) == [image]


def test_a_name_that_is_taken_by_now_is_not_overwritten(collection, store, root):
    image = add(store, root)
    file = Path(store.image(image).path)
    collection.discard([image])
    file.write_bytes(b"another")
    collection.restore([image])
    back = Path(store.image(image).path)
    assert file.read_bytes() == b"another" and back.name == f"{file.stem}_1.png" and back.exists()


def test_emptying_the_trash_deletes_for_good_and_nothing_else(collection, store, root):
    kept, *gone = (add(store, root) for _ in range(3))
    collection.discard(gone)
    files = collection.trash_files()
    unknown = write(root / TRASH_FOLDER / "99" / "a.png")
    assert [file.exists() for file in files] == [True, True]
    assert collection.empty_trash() == 2 and not any(file.exists() for file in files)
    assert unknown.exists()
    assert found(collection) == [kept] and found(collection, place=TRASH) == []
    with pytest.raises(UserError, match="no image"):
        store.image(gone[0])
    assert collection.empty_trash() == 0


def test_a_file_that_cannot_be_moved_is_named_and_stays(collection, store, root, monkeypatch):
    first, second = add(store, root), add(store, root)

    def refuse(source, folder, stem, suffix):
        if stem == "1":
            raise PermissionError(13, "Permission denied")
        return source.rename(folder / source.name)

    monkeypatch.setattr("shared.gallery.collection.move_to_free_name", refuse)
    moved = collection.discard([first, second])
    assert moved.ids == [second] and moved.problems == ["1.png could not be moved: Permission denied."]
    assert found(collection) == [first]


def test_files_deleted_by_hand_drop_out(collection, store, root):
    images = [add(store, root) for _ in range(5)]
    for image in (images[1], images[3]):
        Path(store.image(image).path).unlink()
    assert found(collection, limit=3) == [5, 3, 1]
    assert collection.count(Wanted()) == 3
    assert collection.discard([2]).ids == []


def test_pictures_of_other_folders_are_not_shown(collection, store, root, tmp_path):
    image = add(store, root)
    path = write(tmp_path / "elsewhere.png")
    store.add_image(1, index=1, path=str(path), seed=1, width=6, height=4, metadata=settings("x"))
    assert found(collection) == [image]


# ---------------------------------------------------------------- pictures that the database does not know


def find(collection) -> Found:
    looked = Found()
    collection.find(looked)
    return looked


A1111 = (
    "a heron\nNegative prompt: fog\nSteps: 9, Sampler: Euler, CFG scale: 1, Seed: 77, Size: 6x4, Model: turbo"
)


def test_the_folder_is_read_in(collection, store, root):
    add(store, root, "known")
    write(root / "2026-01-02" / "2026-01-02-03h04m05s_seed8_a.png", settings("a swan", seed=8))
    write(root / "from elsewhere" / "b.png", A1111, name="parameters")
    write(root / "plain.png")
    (root / "broken.png").write_bytes(b"no picture")
    os.utime(root / "broken.png", (1.7e9,) * 2)
    write(root / ".thumbnails" / "c.png", settings("hidden"))
    write(root / "fresh.png", settings("a worker has just written it"), age=0)
    looked = find(collection)
    assert (looked.added, looked.left_out, looked.again, looked.gone) == (2, 2, 0, 0)
    [swan] = collection.records(found(collection, words="swan", model="mini"))
    assert (swan.seed, swan.width, swan.height, swan.job_id) == (8, 6, 4, 0)
    assert datetime.fromtimestamp(swan.created) == datetime(2026, 1, 2, 3, 4, 5)
    [heron] = collection.records(found(collection, words="heron"))
    assert (heron.seed, heron.metadata["model_type"]) == (77, "turbo")
    assert find(collection).added == 0
    assert [one.metadata["prompt"] for one in store.images()] == ["known"]  # those of jobs


def test_what_lies_in_the_trash_is_not_found_again(collection, store, root):
    collection.discard([add(store, root)])
    assert find(collection).added == 0


def test_a_file_moved_by_hand_keeps_its_record(collection, store, root):
    name = "2026-01-02-03h04m05s_seed8_a.png"
    write(root / "a" / name, settings("a swan"))
    find(collection)
    [image] = found(collection)
    collection.favour([image], True)
    (root / "b").mkdir()
    (root / "a" / name).rename(root / "b" / name)
    assert found(collection) == []
    looked = find(collection)
    assert (looked.added, looked.again, looked.gone) == (0, 1, 0)
    assert found(collection, favourites=True) == [image]
    (root / "b" / name).unlink()
    assert find(collection).gone == 1 and found(collection) == []


def test_a_folder_that_was_away_and_is_back(collection, store, root):
    ids = [add(store, root) for _ in range(3)]
    (root / "day").rename(root / ".away")
    assert found(collection) == [] and collection.count(Wanted()) == 0
    (root / ".away").rename(root / "day")
    looked = find(collection)
    assert (looked.again, looked.added, looked.gone) == (3, 0, 0)
    assert sorted(found(collection)) == ids


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_no_text_is_left_out(collection, root):
    write(root / "a.png", settings("a swan"))
    name = os.fsencode(root) + b"/\xff.png"
    try:
        os.link(root / "a.png", name)
    except OSError:
        pytest.skip("this disk takes no such name")
    looked = find(collection)
    assert (looked.added, looked.left_out) == (1, 1)


def test_the_search_runs_beside_the_page(collection, root):
    write(root / "a.png", settings("a swan"))
    collection.find_in_background()
    until(lambda: not collection.found.running)
    assert (collection.found.added, collection.found.problem) == (1, "")
