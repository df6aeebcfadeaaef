"""The downloads that somebody said yes to; a yes outlives jobs, tabs and restarts."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from shared.jobs import rows as job_rows
from shared.jobs.database import Database


class Agreed:
    """The addresses that somebody said yes to, in the file of the queue."""

    def __init__(self, database: Database):
        self._db = database

    def given(self) -> frozenset[str]:
        rows = self._db.connection().execute("SELECT source FROM agreed_downloads")
        return frozenset(row["source"] for row in rows)

    def give(self, sources: Iterable[str]) -> None:
        """Pages look again, so that jobs which wait for it go on."""
        with self._db.transaction() as cx:
            cx.executemany(
                "INSERT OR IGNORE INTO agreed_downloads (source, time) VALUES (?, ?)",
                [(source, time.time()) for source in sources],
            )
            job_rows.add_event(cx, None, "agreed")

    def withdraw(self, sources: Iterable[str]) -> None:
        """Ask again before these are fetched another time."""
        with self._db.transaction() as cx:
            cx.executemany(
                "DELETE FROM agreed_downloads WHERE source = ?", [(source,) for source in sources]
            )


def agreed_in(file: Path) -> frozenset[str]:
    """What is agreed to in the file of a queue, which need not exist."""
    return Agreed(Database(file, check=False)).given() if file.exists() else frozenset()
