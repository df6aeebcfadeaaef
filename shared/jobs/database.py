"""The SQLite file behind the job store: opening it, its schema, and setting a damaged one aside."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path

from shared.errors import UserError
from shared.files.lock import ProcessLock

log = logging.getLogger(__name__)

BUSY_SECONDS = 10.0
FULL_CHECK_SECONDS = 7 * 24 * 3600.0  # how long a look at the whole file counts

# MIGRATIONS[n] brings a file from user_version n to n + 1.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE jobs (
            id INTEGER PRIMARY KEY AUTOINCREMENT, status TEXT NOT NULL,
            position REAL NOT NULL DEFAULT 0, settings TEXT NOT NULL, source TEXT NOT NULL, output_dir TEXT,
            attempts INTEGER NOT NULL DEFAULT 0, cancel INTEGER NOT NULL DEFAULT 0,
            phase TEXT NOT NULL DEFAULT '', step INTEGER NOT NULL DEFAULT 0,
            steps INTEGER NOT NULL DEFAULT 0, seconds_left REAL, error TEXT, notes TEXT NOT NULL DEFAULT '[]',
            created REAL NOT NULL, started REAL, finished REAL)""",
        "CREATE INDEX jobs_in_order ON jobs (status, position, id)",
        """CREATE TABLE events (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, job_id INTEGER NOT NULL REFERENCES jobs (id),
            kind TEXT NOT NULL, data TEXT NOT NULL, time REAL NOT NULL)""",
        "CREATE INDEX events_of_job ON events (job_id, seq)",
        """CREATE TABLE previews (
            job_id INTEGER PRIMARY KEY REFERENCES jobs (id), seq INTEGER NOT NULL, jpeg BLOB NOT NULL)""",
        """CREATE TABLE images (
            id INTEGER PRIMARY KEY AUTOINCREMENT, job_id INTEGER NOT NULL REFERENCES jobs (id),
            number INTEGER NOT NULL, path TEXT NOT NULL, seed INTEGER NOT NULL, width INTEGER NOT NULL,
            height INTEGER NOT NULL, created REAL NOT NULL, metadata TEXT NOT NULL)""",
        "CREATE INDEX images_of_job ON images (job_id, number)",
    ),
    (
        """CREATE TABLE grids (
            id INTEGER PRIMARY KEY AUTOINCREMENT, axes TEXT NOT NULL, settings TEXT NOT NULL,
            created REAL NOT NULL)""",
        "ALTER TABLE jobs ADD COLUMN grid INTEGER REFERENCES grids (id)",
        "ALTER TABLE jobs ADD COLUMN cell INTEGER",
        "CREATE INDEX jobs_of_grid ON jobs (grid, cell) WHERE grid IS NOT NULL",
    ),
    (  # the queue as a whole can be paused; a job can wait for its user; an event may concern all jobs
        "CREATE TABLE queue (id INTEGER PRIMARY KEY CHECK (id = 1), paused INTEGER NOT NULL DEFAULT 0)",
        "INSERT INTO queue (id) VALUES (1)",
        "ALTER TABLE jobs ADD COLUMN held INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE jobs ADD COLUMN client TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE jobs ADD COLUMN dismissed INTEGER NOT NULL DEFAULT 0",
        """CREATE TABLE events_of_all (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, job_id INTEGER REFERENCES jobs (id),
            kind TEXT NOT NULL, data TEXT NOT NULL, time REAL NOT NULL)""",
        "INSERT INTO events_of_all SELECT seq, job_id, kind, data, time FROM events",
        "DROP TABLE events",
        "ALTER TABLE events_of_all RENAME TO events",
        "CREATE INDEX events_of_job ON events (job_id, seq)",
    ),
    (
        # The gallery. Pictures that were found in the folder have no job. place: "here", "trash" (home: where
        # the file was before), or "gone": not in the folder any more. The long metadata stand last, so that
        # the other columns are read without them.
        """CREATE TABLE pictures (
            id INTEGER PRIMARY KEY AUTOINCREMENT, job_id INTEGER REFERENCES jobs (id),
            number INTEGER NOT NULL, path TEXT NOT NULL, seed INTEGER NOT NULL, width INTEGER NOT NULL,
            height INTEGER NOT NULL, created REAL NOT NULL, place TEXT NOT NULL DEFAULT 'here', home TEXT,
            favourite INTEGER NOT NULL DEFAULT 0, metadata TEXT NOT NULL,
            known AS (CASE WHEN json_valid(metadata) THEN metadata ELSE '{}' END),
            model AS (COALESCE(json_extract(known, '$.model_type'), '')),
            prompt AS (COALESCE(json_extract(known, '$.prompt'), '')))""",
        """INSERT INTO pictures (id, job_id, number, path, seed, width, height, created, metadata)
            SELECT id, job_id, number, path, seed, width, height, created, metadata FROM images""",
        "DROP TABLE images",
        "ALTER TABLE pictures RENAME TO images",
        "CREATE INDEX images_of_job ON images (job_id, number)",
        "CREATE INDEX images_in_order ON images (place, created, id, favourite, model, width, height)",
        "CREATE VIRTUAL TABLE image_words USING fts5(prompt, tokenize = 'unicode61 remove_diacritics 2')",
        """CREATE TABLE image_loras (
            name TEXT NOT NULL, image_id INTEGER NOT NULL, PRIMARY KEY (name, image_id)) WITHOUT ROWID""",
        "CREATE INDEX loras_of_image ON image_loras (image_id)",
        "INSERT INTO image_words (rowid, prompt) SELECT id, prompt FROM images",
        """INSERT OR IGNORE INTO image_loras (name, image_id) SELECT one.value, images.id
            FROM images, json_each(known, '$.activated_loras') AS one WHERE one.type = 'text'""",
        """CREATE TRIGGER image_added AFTER INSERT ON images BEGIN
            INSERT INTO image_words (rowid, prompt) VALUES (NEW.id, NEW.prompt);
            INSERT OR IGNORE INTO image_loras (name, image_id) SELECT one.value, NEW.id
                FROM json_each(NEW.known, '$.activated_loras') AS one WHERE one.type = 'text';
            END""",
        """CREATE TRIGGER image_deleted AFTER DELETE ON images BEGIN
            DELETE FROM image_words WHERE rowid = OLD.id;
            DELETE FROM image_loras WHERE image_id = OLD.id;
            END""",
    ),
    ("CREATE INDEX images_by_path ON images (path)",),
    ("CREATE TABLE agreed_downloads (source TEXT PRIMARY KEY, time REAL NOT NULL)",),
)


class _Handle:
    """Closes its connection when the thread that opened it goes away."""

    def __init__(self, connection: sqlite3.Connection):
        self.connection = connection

    def __del__(self) -> None:
        self.connection.close()


class Database:
    """One SQLite file, one connection per thread; UserError when it cannot be opened.

    `notice` is a sentence when a damaged file was set aside, else None. check: False where another process
    has just looked for damage.
    """

    def __init__(self, path: Path, check: bool = True):
        self.path = path
        self._local = threading.local()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.notice = set_aside_if_damaged(path) if check else None
            self._migrate()
        except (OSError, sqlite3.OperationalError) as error:
            raise UserError(
                f"The queue file {path} cannot be opened ({error}): check its folder and the free space."
            ) from error

    def connection(self) -> sqlite3.Connection:
        """This thread's connection, opened on first use."""
        handle: _Handle | None = getattr(self._local, "handle", None)
        if handle is None:
            handle = self._local.handle = _Handle(_connect(self.path))
        return handle.connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A short write transaction: all of it is kept, or on any exception none of it.

        Within another one of the same thread it is a part of that one.
        """
        connection = self.connection()
        if connection.in_transaction:
            yield connection
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException as error:
            if type(error) is sqlite3.DatabaseError:  # "malformed": the next start looks at the whole file
                _marker(self.path).unlink(missing_ok=True)
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _migrate(self) -> None:
        if _version(self.connection()) == len(MIGRATIONS):
            return
        with self.transaction() as connection:
            version = _version(connection)
            if version > len(MIGRATIONS):
                raise UserError(
                    f"The queue file {self.path} was written by a newer ZGP (schema {version}, this one "
                    f"knows {len(MIGRATIONS)}): start the newer ZGP, or move that file away."
                )
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def set_aside_if_damaged(path: Path) -> str | None:
    """Rename a damaged database file (never delete it) and return the sentence that says so."""
    if not path.exists() or _is_sound(path):
        return None
    lock = ProcessLock(path.with_name(path.name + ".repair"))
    if not lock.acquire(timeout=BUSY_SECONDS):
        raise UserError(f"The queue file {path} is damaged and another process is mending it: start again.")
    try:
        if _is_sound(path):  # another process was faster
            return None
        aside = _free_name(path)
        for suffix in ("", "-wal", "-shm"):
            part = path.with_name(path.name + suffix)
            if part.exists():
                os.rename(part, aside.with_name(aside.name + suffix))
    finally:
        lock.release()
    notice = f"The queue file {path} is damaged: it was kept as {aside.name}, and an empty queue was begun."
    log.warning(notice)
    return notice


def _free_name(path: Path) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d-%Hh%Mm%Ss")
    aside = path.with_name(f"{path.stem}.damaged-{stamp}{path.suffix}")
    number = 1
    while aside.exists():
        aside = path.with_name(f"{path.stem}.damaged-{stamp}-{number}{path.suffix}")
        number += 1
    return aside


def _is_sound(path: Path) -> bool:
    """Whether the file is whole: its header and length, its schema, and the beginning of each table.

    All of it is looked at after an unclean stop, and when that was last done long ago: that takes longer with
    each picture.
    """
    full = _left_open(path) or not _looked_at_lately(path)
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
            if full and connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                return False
            if not full:
                _look_at_beginnings(connection)
    except sqlite3.OperationalError:  # locked, no permission, disk full: not the file's contents
        raise
    except sqlite3.DatabaseError:
        return False
    if full:
        _marker(path).touch()
    return True


def _left_open(path: Path) -> bool:
    """Whether the last one to use the file did not close it: SQLite would have emptied its log."""
    log_file = path.with_name(path.name + "-wal")
    return log_file.exists() and log_file.stat().st_size > 0


def _marker(path: Path) -> Path:
    """A file that says by its time when the whole database was last looked at."""
    return path.with_name(path.name + ".checked")


def _looked_at_lately(path: Path) -> bool:
    marker = _marker(path)
    return marker.exists() and abs(time.time() - marker.stat().st_mtime) < FULL_CHECK_SECONDS


def _look_at_beginnings(connection: sqlite3.Connection) -> None:
    """DatabaseError for a file that is none, that was cut off, or whose schema or tables cannot be read.

    SQLite itself compares the file's length with what its header says.
    """
    # of a virtual table the parts are tables of their own
    tables = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT LIKE 'CREATE VIRTUAL%'"
    )
    for (name,) in tables.fetchall():
        connection.execute(f'SELECT * FROM "{name}" LIMIT 1').fetchone()


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    _switch_to_wal(connection)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    # SQLite does not wait its busy timeout when two processes change the journal mode at the same moment.
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
