"""Every picture ever made: searching, favourites, the trash, and pictures that the database does not know."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from shared.errors import UserError
from shared.imaging import metadata
from shared.imaging.foreign import reader
from shared.imaging.saving import move_to_free_name
from shared.jobs.records import ImageRecord, image_of
from shared.jobs.store import JobStore
from shared.settings.parsing import parse_resolution
from shared.settings.table import MAX_SEED

HERE, TRASH, GONE = "here", "trash", "gone"
TRASH_FOLDER = ".trash"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_WORDS = 20
ADD_AT_ONCE = 200  # found pictures of one transaction
JUST_SAVED = 10.0  # seconds in which a worker tells the database of a file that it has written

_WORD = re.compile(r'"([^"]*)"|(\S+)')
_STAMP = re.compile(r"(\d{4}-\d{2}-\d{2}-\d{2}h\d{2}m\d{2}s)_")  # how saving.output_stem begins


@dataclass(frozen=True)
class Wanted:
    """What to look for; an empty field asks for nothing. words: all of them, "in quotes" beside each other.

    since, until: days of the local calendar, YYYY-MM-DD, both included. size: "WxH" in pixels.
    """

    words: str = ""
    model: str = ""
    lora: str = ""
    since: str = ""
    until: str = ""
    size: str = ""
    favourites: bool = False
    oldest_first: bool = False
    place: str = HERE


@dataclass(frozen=True)
class Tile:
    """As much of a picture as a list shows; width and height in pixels, created since the epoch."""

    id: int
    path: Path
    width: int
    height: int
    seed: int
    created: float
    favourite: bool
    prompt: str


@dataclass(frozen=True)
class Page:
    """A part of a list. `after` asks for the next one; None when this was the last."""

    tiles: list[Tile]
    after: tuple[float, int] | None


@dataclass(frozen=True)
class Choices:
    """What pictures can be filtered by, most frequent first: (name, how many pictures)."""

    models: list[tuple[str, int]]
    loras: list[tuple[str, int]]
    sizes: list[tuple[str, int]]
    trash: int


@dataclass(frozen=True)
class Moved:
    """The pictures that a deletion or its undoing reached, and a sentence for each file that it did not."""

    ids: list[int]
    problems: list[str]


@dataclass
class Found:
    """What a look through the folder has come upon so far. left_out: files without settings."""

    seen: int = 0
    added: int = 0
    again: int = 0
    gone: int = 0
    left_out: int = 0
    running: bool = True
    problem: str = ""


@dataclass(frozen=True)
class _Condition:
    sql: str
    values: list[Any] = field(default_factory=list)


class Collection:
    """The pictures of a store whose files lie in a folder of `roots` or below; others are no part of it.

    The first of them is where new pictures are searched for, and where the trash is.
    """

    def __init__(self, store: JobStore, *roots: Path):
        self._db = store.database
        self._root = roots[0].absolute()
        self._roots = tuple(root.absolute() for root in roots)
        self._searching = threading.Lock()
        self.found: Found | None = None  # of the newest search of the folder

    # -- looking ------------------------------------------------------------------------------------------

    def page(self, wanted: Wanted, after: tuple[float, int] | None = None, limit: int = 60) -> Page:
        """The next `limit` pictures in order; UserError for a date or a size that is none.

        Pictures whose files have disappeared are noted as gone and are no part of any list from then on.
        """
        tiles: list[Tile] = []
        while (lacking := limit + 1 - len(tiles)) > 0:
            rows = self._rows(wanted, after, lacking)
            present = [row for row in rows if self.is_here(row["path"])]
            self._note_gone([row["id"] for row in rows if row not in present])
            tiles += map(_tile, present)
            if len(rows) < lacking:
                return Page(tiles, None)
            after = (rows[-1]["created"], rows[-1]["id"])
        last = tiles[limit - 1]
        return Page(tiles[:limit], (last.created, last.id))

    def count(self, wanted: Wanted) -> int:
        """How many pictures there are of that kind."""
        condition = _conditions(wanted)
        query = f"SELECT COUNT(*) FROM images WHERE {condition.sql}"
        return int(self._db.connection().execute(query, condition.values).fetchone()[0])

    def choices(self) -> Choices:
        """The models, LoRAs and sizes that pictures were made with."""
        one = "FROM images WHERE place = 'here'"
        return Choices(
            models=self._counted(f"SELECT model, COUNT(*) {one} AND model <> '' GROUP BY model"),
            loras=self._counted(
                "SELECT name, COUNT(*) FROM image_loras JOIN images ON id = image_id"
                " WHERE place = 'here' GROUP BY name"
            ),
            sizes=self._counted(f"SELECT width || 'x' || height, COUNT(*) {one} GROUP BY width, height"),
            trash=self.count(Wanted(place=TRASH)),
        )

    def records(self, ids: Sequence[int]) -> list[ImageRecord]:
        """Those of the pictures that there are, in the order asked for."""
        marks = ", ".join("?" * len(ids))
        rows = self._db.connection().execute(f"SELECT * FROM images WHERE id IN ({marks})", list(ids))
        by_id = {row["id"]: image_of(row) for row in rows}
        return [by_id[one] for one in ids if one in by_id]

    def _rows(self, wanted: Wanted, after: tuple[float, int] | None, limit: int) -> list[sqlite3.Row]:
        condition = _conditions(wanted)
        direction, further = ("ASC", ">") if wanted.oldest_first else ("DESC", "<")
        start = "" if after is None else f" AND (created, id) {further} (?, ?)"
        # The rows are chosen in the index alone; the table is looked at for these few.
        query = f"""SELECT images.id, path, width, height, seed, created, favourite, image_words.prompt
            FROM (SELECT id AS chosen FROM images WHERE {condition.sql}{start}
                ORDER BY created {direction}, id {direction} LIMIT ?)
            JOIN images ON images.id = chosen JOIN image_words ON image_words.rowid = chosen
            ORDER BY created {direction}, images.id {direction}"""
        values = [*condition.values, *(after or ()), limit]
        return self._db.connection().execute(query, values).fetchall()

    def _counted(self, query: str) -> list[tuple[str, int]]:
        rows = self._db.connection().execute(f"{query} ORDER BY 2 DESC, 1")
        return [(row[0], row[1]) for row in rows]

    def is_here(self, path: str) -> bool:
        """Whether a file is among the outputs, which the page may show."""
        file = Path(path).absolute()
        return os.path.isfile(path) and any(file.is_relative_to(root) for root in self._roots)

    def _note_gone(self, ids: Sequence[int]) -> None:
        if ids:
            with self._db.transaction() as cx:
                cx.executemany("UPDATE images SET place = ? WHERE id = ?", [(GONE, one) for one in ids])

    # -- favourites and the trash -------------------------------------------------------------------------

    def favour(self, ids: Sequence[int], favourite: bool) -> None:
        """Make the pictures favourites, or none."""
        with self._db.transaction() as cx:
            values = [(favourite, one) for one in ids]
            cx.executemany("UPDATE images SET favourite = ? WHERE id = ?", values)

    def discard(self, ids: Sequence[int]) -> Moved:
        """Move the pictures' files into the trash; their records stay."""
        return self._move(
            [one for one in self.records(ids) if one.place == HERE and self.is_here(one.path)],
            lambda record: self._root / TRASH_FOLDER / str(record.id),
            "UPDATE images SET home = path, path = ?, place = 'trash' WHERE id = ?",
        )

    def restore(self, ids: Sequence[int]) -> Moved:
        """Take pictures out of the trash again; where a name is taken by now, they get the next free one."""
        rows = self._db.connection().execute("SELECT id, home FROM images WHERE place = 'trash'")
        homes = {row["id"]: Path(row["home"]) for row in rows}
        moved = self._move(
            [one for one in self.records(ids) if one.place == TRASH],
            lambda record: homes[record.id].parent,
            "UPDATE images SET home = NULL, path = ?, place = 'here' WHERE id = ?",
        )
        for one in moved.ids:
            shutil.rmtree(self._root / TRASH_FOLDER / str(one), ignore_errors=True)
        return moved

    def empty_trash(self) -> int:
        """Delete what is in the trash for good: files and records. The number of pictures."""
        trash = self._root / TRASH_FOLDER
        try:
            for folder in (file.parent for file in self.trash_files() if file.exists()):
                shutil.rmtree(folder)
        except OSError as error:
            raise UserError(
                f"{trash} cannot be emptied ({error.strerror or error}): close what uses it."
            ) from error
        with self._db.transaction() as cx:
            return cx.execute("DELETE FROM images WHERE place = 'trash'").rowcount

    def trash_files(self) -> list[Path]:
        """The files in the trash."""
        rows = self._db.connection().execute("SELECT path FROM images WHERE place = 'trash'")
        return [Path(row["path"]) for row in rows]

    def _move(
        self, records: Sequence[ImageRecord], folder_of: Callable[[ImageRecord], Path], update: str
    ) -> Moved:
        moved: list[tuple[str, int]] = []
        problems = []
        for record in records:
            source, folder = Path(record.path), folder_of(record)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                moved.append((str(_moved(source, folder)), record.id))
            except OSError as error:
                problems.append(f"{source.name} could not be moved: {error.strerror or error}.")
        with self._db.transaction() as cx:
            cx.executemany(update, moved)
        return Moved([one for _, one in moved], problems)

    # -- pictures that the database does not know ---------------------------------------------------------

    def find_in_background(self) -> None:
        """Begin a search of the folder, unless one is going on; `found` says how far it is."""
        if self._searching.acquire(blocking=False):
            self.found = Found()
            threading.Thread(target=self._find, args=(self.found,), name="gallery", daemon=True).start()

    def _find(self, found: Found) -> None:
        try:
            self.find(found)
        except (OSError, sqlite3.Error) as error:
            found.problem = f"The search ended early: {error}."
        finally:
            found.running = False
            self._searching.release()

    def find(self, found: Found) -> None:
        """Read in the pictures of the folder that are not known yet, and count in `found`.

        A file that was moved by hand keeps its record.
        """
        rows = self._db.connection().execute("SELECT id, path, place FROM images").fetchall()
        lost = [row for row in rows if row["place"] != TRASH and not self.is_here(row["path"])]
        gone = {row["id"] for row in lost if row["place"] == HERE}
        self._note_gone(list(gone))
        known = {_same(row["path"]): row for row in rows}
        by_name = {os.path.basename(row["path"]): row["id"] for row in lost}
        batch: list[tuple[str, list[Any]]] = []
        for path in _pictures(self._root):
            found.seen += 1
            row = known.get(_same(path))
            if row is not None and row["place"] == HERE:
                continue
            moved = by_name.pop(path.name, None) if _STAMP.match(path.name) else None
            gone.discard(moved or 0)
            statement = _again(path, row["id"] if row else moved, found) or _addition(path, found)
            batch += [statement] if statement else []
            if len(batch) >= ADD_AT_ONCE:
                self._write(batch)
                batch = []
        self._write(batch)
        found.gone = len(gone)

    def _write(self, batch: list[tuple[str, list[Any]]]) -> None:
        with self._db.transaction() as cx:
            for statement, values in batch:
                cx.execute(statement, values)


# ---------------------------------------------------------------- conditions


def _conditions(wanted: Wanted) -> _Condition:
    """The part after WHERE."""
    parts = [_Condition("place = ?", [wanted.place])]
    parts += _word_conditions(wanted.words)
    if wanted.favourites:
        parts.append(_Condition("favourite = 1"))
    if wanted.model:
        parts.append(_Condition("model = ?", [wanted.model]))
    if wanted.lora:
        parts.append(_Condition("id IN (SELECT image_id FROM image_loras WHERE name = ?)", [wanted.lora]))
    if wanted.size:
        parts.append(_Condition("(width, height) = (?, ?)", list(parse_resolution(wanted.size))))
    if wanted.since:
        parts.append(_Condition("created >= ?", [_midnight(wanted.since)]))
    if wanted.until:
        parts.append(_Condition("created < ?", [_midnight(wanted.until, days=1)]))
    return _Condition(" AND ".join(part.sql for part in parts), [x for part in parts for x in part.values])


def _word_conditions(words: str) -> list[_Condition]:
    """Words by their beginnings; in scripts without blanks between words, any part of the text."""
    asked = [(quoted or word, bool(quoted)) for quoted, word in _WORD.findall(words)][:MAX_WORDS]
    asked = [(word, quoted) for word, quoted in asked if any(map(str.isalnum, word))]
    indexed = [(word, quoted) for word, quoted in asked if not _is_without_blanks(word)]
    match = " ".join('"' + word.replace('"', "") + '"' + ("" if quoted else "*") for word, quoted in indexed)
    found = "id IN (SELECT rowid FROM image_words WHERE "
    conditions = [_Condition(f"{found} image_words MATCH ?)", [match])] if indexed else []
    for word, _ in asked:
        if _is_without_blanks(word):
            conditions.append(_Condition(f"{found} prompt LIKE ? ESCAPE '\\')", [f"%{_plain(word)}%"]))
    return conditions


def _is_without_blanks(word: str) -> bool:
    """Whether the word has letters of a script without upper and lower case, such as Chinese."""
    return any(unicodedata.category(letter) == "Lo" for letter in word)


def _plain(word: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", word)


def _midnight(day: str, days: int = 0) -> float:
    try:
        wanted = date.fromisoformat(day) + timedelta(days=days)
        return datetime(wanted.year, wanted.month, wanted.day).timestamp()
    except (ValueError, OverflowError, OSError):
        raise UserError(f"The date came as '{day}': expected a day such as 2026-01-31.") from None


# ---------------------------------------------------------------- files


def _tile(row: sqlite3.Row) -> Tile:
    return Tile(
        id=row["id"],
        path=Path(row["path"]),
        width=row["width"],
        height=row["height"],
        seed=row["seed"],
        created=row["created"],
        favourite=bool(row["favourite"]),
        prompt=str(row["prompt"]),
    )


def _moved(source: Path, folder: Path) -> Path:
    if not source.is_file():
        raise FileNotFoundError(2, "the file is not there any more")
    target = move_to_free_name(source, folder, source.stem, source.suffix)
    source.unlink(missing_ok=True)  # where it was only given a second name
    return target


def _pictures(root: Path) -> Iterator[Path]:
    """Picture files below `root`, without hidden folders and files."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith("."):
                yield Path(folder, name)


def _same(path: Path | str) -> str:
    """One spelling for all spellings of a path."""
    return os.path.normcase(os.path.abspath(path))


def _again(path: Path, image_id: int | None, found: Found) -> tuple[str, list[Any]] | None:
    """The statement that gives a known picture its place; None when the picture is not known."""
    if image_id is None:
        return None
    found.again += 1
    return "UPDATE images SET path = ?, place = 'here' WHERE id = ?", [str(path), image_id]


def _addition(path: Path, found: Found) -> tuple[str, list[Any]] | None:
    """The statement that adds a picture of which only the file is known; None when it has no settings."""
    try:
        if path.stat().st_mtime > time.time() - JUST_SAVED:
            return None
        str(path).encode()  # a name that is no text has no place in the database
        meta = metadata.read(path) or reader.as_metadata(reader.read(path))
        with Image.open(path) as image:
            width, height = image.size
        created = _created(path)
    except (UserError, OSError, UnicodeError):
        meta = None
    if not meta:
        found.left_out += 1
        return None
    found.added += 1
    return (
        "INSERT INTO images (number, path, seed, width, height, created, metadata)"
        " VALUES (0, ?, ?, ?, ?, ?, ?)",
        [str(path), _seed(meta), width, height, created, json.dumps(meta, default=str)],
    )


def _seed(meta: dict[str, Any]) -> int:
    seed = meta.get("seed")
    return seed if type(seed) is int and -1 <= seed <= MAX_SEED else -1


def _created(path: Path) -> float:
    """When the picture was made: as its name says, or else when the file was written."""
    stamp = _STAMP.match(path.name)
    try:
        if stamp:
            return datetime.strptime(stamp[1], "%Y-%m-%d-%Hh%Mm%Ss").timestamp()
    except (ValueError, OverflowError):  # an impossible date is no date
        pass
    return min(path.stat().st_mtime, time.time())
