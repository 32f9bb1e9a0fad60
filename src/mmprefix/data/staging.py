"""Annotations of any order, grouped by image on disk: memory does not grow with the set.

Published annotation files list captions and questions in an order of their own, and some keep a question in one file
and its answers in another. A temporary SQLite file takes them in as they come and gives them back image by image, in
the order of each image's first appearance.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any

from mmprefix.data.writing import Refusal

_TABLES = """
CREATE TABLE images (number INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE samples (number INTEGER PRIMARY KEY, image INTEGER, payload TEXT);
CREATE TABLE notes (id TEXT PRIMARY KEY, payload TEXT) WITHOUT ROWID;
CREATE TABLE refused (what TEXT, reason TEXT, detail TEXT);
"""


class Staging:
    """A temporary store; a context manager, which removes it."""

    def __init__(self, folder: Path, name: str) -> None:
        """Makes the store in ``folder``, where there is room for the set anyway.

        Args:
            folder: made, if need be.
            name: what a run of the same name was killed over is removed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f".{name}.staging-*"):
            stale.unlink()
        self._file = tempfile.NamedTemporaryFile(prefix=f".{name}.staging-", dir=folder)  # noqa: SIM115
        self._db = sqlite3.connect(self._file.name, isolation_level=None)
        # What a crash leaves behind is of no use.
        self._db.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN;" + _TABLES)

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
        self._file.close()

    def note(self, key: str, payload: Any) -> None:
        """Keeps something that is wanted again, by a key; a later one of the same key takes its place."""
        self._db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (key, json.dumps(payload)))

    def noted(self, key: str) -> Any:
        """What was kept under a key; None for nothing."""
        row = self._db.execute("SELECT payload FROM notes WHERE id = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def forget(self, key: str) -> None:
        """Drops what was kept under a key."""
        self._db.execute("DELETE FROM notes WHERE id = ?", (key,))

    def left_over(self, prefix: str) -> Iterator[str]:
        """Keys that begin so and were not dropped, without the beginning."""
        rows = self._db.execute("SELECT id FROM notes WHERE id >= ? AND id < ?", (prefix, prefix + "\U0010ffff"))
        for (key,) in rows:
            yield key.removeprefix(prefix)

    def add(self, image: str, sample: dict[str, Any]) -> None:
        """A sample of an image, by the image's name."""
        row = self._db.execute(
            "INSERT INTO images (name) VALUES (?) ON CONFLICT (name) DO UPDATE SET name = name RETURNING number",
            (image,),
        ).fetchone()
        self._db.execute("INSERT INTO samples (image, payload) VALUES (?, ?)", (row[0], json.dumps(sample)))

    def refuse(self, what: str, reason: str, detail: str = "") -> None:
        """Something that is no sample of an image, and why."""
        self._db.execute("INSERT INTO refused VALUES (?, ?, ?)", (what, reason, detail[:500]))

    def refused(self) -> Iterator[Refusal]:
        """All of those."""
        for row in self._db.execute("SELECT what, reason, detail FROM refused"):
            yield Refusal(*row)

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM images").fetchone()[0])

    def __iter__(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Images and their samples. Those with the same id, kind and instruction are one, with all of their targets."""
        self._db.execute("CREATE INDEX IF NOT EXISTS of_image ON samples (image, number)")
        rows = self._db.execute(
            "SELECT name, payload FROM images JOIN samples ON samples.image = images.number "
            "ORDER BY images.number, samples.number"
        )
        for name, of_image in groupby(rows, key=itemgetter(0)):
            yield name, _joined([json.loads(payload) for _, payload in of_image])


def _joined(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    joined: dict[tuple[Any, ...], dict[str, Any]] = {}
    for sample in samples:
        same = tuple(str(sample.get(name)) for name in ("id", "kind", "instruction"))
        first = joined.setdefault(same, {**sample, "targets": []})
        first["targets"] = [*first["targets"], *(sample.get("targets") or [])]
        if first is not sample and sample.get("answers") and sample["answers"] != first.get("answers"):
            first["answers"] = [*(first.get("answers") or []), *sample["answers"]]
    return list(joined.values())
