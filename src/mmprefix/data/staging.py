"""Annotations of any order, grouped by image on disk: memory does not grow with the set.

Published annotation files list captions and questions in an order of their own, name images in one list and use them in
another, and some keep a question in one file and its answers in another. A temporary SQLite file takes all of it in as
it comes, joins it, and gives it back image by image, in the order of each image's first sample. Samples wait in memory
until there are `_ROOM` bytes of them, so that captions of one image mostly go to the file as one row.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any

from mmprefix.data.records import Refusal, absorb, identity

_TABLES = {
    "samples": "(number INTEGER PRIMARY KEY, image TEXT, id TEXT, payload TEXT)",
    "names": "(image TEXT PRIMARY KEY, name TEXT, other TEXT) WITHOUT ROWID",
    "answers": "(id TEXT PRIMARY KEY, payload TEXT, again INTEGER DEFAULT 0) WITHOUT ROWID",
    "refused": "(what TEXT, reason TEXT, detail TEXT)",
}
_INSERT = {
    "samples": "INSERT INTO samples (image, id, payload) VALUES (?, ?, ?)",
    "names": "INSERT INTO names (image, name) VALUES (?, ?) "
    "ON CONFLICT (image) DO UPDATE SET other = excluded.name WHERE name <> excluded.name",
    "answers": "INSERT INTO answers (id, payload) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET again = again + 1",
    "refused": "INSERT INTO refused VALUES (?, ?, ?)",
}
_BETWEEN = "\x1f"
"""Between the names of several images: ASCII's own separator. In front of what isn't one."""
_AT_ONCE = 2000
"""Rows that are inserted together: one by one they take ten times as long."""
_ROOM = 32 << 20
"""Bytes of samples that wait in memory, about."""
_OF_A_SAMPLE, _OF_A_TEXT = 800, 60
"""Bytes of a sample and of a text, without their characters: what CPython takes for the objects."""
_INSTRUCTION = 3
"""Its place behind an image's key and in front of what else tells samples apart."""


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
        self._db.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA temp_store = FILE; BEGIN")
        for table, columns in _TABLES.items():
            self._db.execute(f"CREATE TABLE {table} {columns}")
        self._waiting: dict[str, list[tuple[Any, ...]]] = {table: [] for table in _TABLES}
        self._held: dict[tuple[str, ...], dict[str, Any]] = {}  # samples, by image and identity
        self._growing: dict[str, list[str]] = {}  # targets of those that `add_target` began, by image
        self._room = _ROOM
        self._joined = False
        self._named = self._answered = False

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
        self._file.close()

    def _put(self, table: str, *row: str | None) -> None:
        rows = self._waiting[table]
        # Half of a surrogate pair, from JSON or from a file's name, is no text to SQLite. A payload is escaped already.
        rows.append(
            tuple([v if v is None or v.isascii() else v.encode("utf-8", "backslashreplace").decode() for v in row])
        )
        if len(rows) == _AT_ONCE:
            self._flush(table)

    def _flush(self, table: str) -> None:
        self._db.executemany(_INSERT[table], self._waiting[table])
        self._waiting[table].clear()

    def add(self, image: str | Sequence[str], sample: dict[str, Any], group: str = "") -> dict[str, Any]:
        """A sample of an image, of several or of none; it is this object's from now on.

        Args:
            image: its name; or its key, if `name` says what keys are called; or the names of several, or none.
            sample: with its ``id``, if `answer` says what is answered to it.
            group: of samples without an image, those that make up a record.

        Returns:
            The sample as it waits: this one, or the one of the same identity that it was added to.
        """
        if isinstance(image, str):
            key = image
        else:
            key = _BETWEEN.join(image) if image else _BETWEEN + group
        same = key, *identity(sample)
        if self._answered:  # a kind may come with the answers: what is one is seen only then
            same = *same, str(len(self._held))
        if self._room < 0:
            self._put_held()
        texts = *(sample.get("targets") or ()), *(sample.get("answers") or ())
        self._room -= sum([_OF_A_TEXT + len(text) for text in texts])
        first = self._held.setdefault(same, sample)
        if first is sample:
            self._room -= _OF_A_SAMPLE + 2 * len(same[_INSTRUCTION])
        else:
            absorb(first, sample)
        return first

    def add_target(self, image: str, target: str, begin: Callable[[str], dict[str, Any]]) -> None:
        """One more target of an image's only sample: for most captions, less work than `add`.

        Args:
            image: its name or key.
            target: a text.
            begin: makes the sample, with an empty list of ``targets``, for the image.
        """
        targets = self._growing.get(image)
        if targets is None or self._room < 0:
            targets = self.add(image, begin(image))["targets"]
            self._growing[image] = targets
        targets.append(target)
        self._room -= _OF_A_TEXT + len(target)

    def _put_held(self) -> None:
        for (key, number, *_), sample in self._held.items():
            self._put("samples", key, number, json.dumps(sample))
        self._held.clear()
        self._growing.clear()
        self._room = _ROOM

    def name(self, image: str, name: str) -> None:
        """What the image with a key is called. Once there is one, images without a name are refused."""
        self._named = True
        self._put("names", image, name)

    def answer(self, sample: str, fields: dict[str, Any]) -> None:
        """Fields (at least one) of the sample with an id, which comes later. Once there is one, samples without are
        refused."""
        self._answered = True
        self._put("answers", sample, json.dumps(fields))

    def times(self, name: str) -> int:
        """How often it was asked for this name before."""
        self._db.execute("CREATE TEMP TABLE IF NOT EXISTS seen (name TEXT PRIMARY KEY, n INTEGER) WITHOUT ROWID")
        text = name.encode("utf-8", "backslashreplace").decode()
        found = self._db.execute("SELECT n FROM seen WHERE name = ?", (text,)).fetchone()
        number = int(found[0]) if found else 0
        self._db.execute("INSERT OR REPLACE INTO seen VALUES (?, ?)", (text, number + 1))
        return number

    def refuse(self, what: str, reason: str, detail: str = "") -> None:
        """Something that is no sample of an image, and why."""
        self._put("refused", what, reason, detail[:500])

    def refused(self) -> Iterator[Refusal]:
        """All of those."""
        self._flush("refused")
        for row in self._db.execute("SELECT what, reason, detail FROM refused"):
            yield Refusal(*row)

    def unused_names(self) -> list[tuple[str, str]]:
        """Keys and names of images without a sample."""
        self._put_held()
        for table in ("samples", "names"):
            self._flush(table)
        self._db.execute("CREATE INDEX IF NOT EXISTS of_image ON samples (image, number)")
        query = "SELECT image, name FROM names WHERE image NOT IN (SELECT image FROM samples)"
        return self._db.execute(query).fetchall()

    def _join(self) -> None:
        """Refuses what has no partner, and finds out each image's first sample."""
        if self._joined:
            return
        self._joined = True
        self._put_held()
        for table in _TABLES:
            self._flush(table)
        self._db.execute("CREATE INDEX IF NOT EXISTS of_image ON samples (image, number)")
        refuse = "INSERT INTO refused SELECT"
        if self._named:  # which of two pictures an id means is anybody's guess
            clash = "FROM names WHERE other IS NOT NULL"
            self._db.execute(
                f"{refuse} name, 'id of another image, too', 'id ' || image || ', also of ' || other {clash}"
            )
            self._db.execute(f"DELETE {clash}")
            orphans = "image NOT IN (SELECT image FROM names)"
            self._db.execute(
                f"{refuse} 'image ' || image, 'unknown image', 'of sample ' || id FROM samples WHERE {orphans}"
            )
            self._db.execute(f"DELETE FROM samples WHERE {orphans}")
        if self._answered:
            self._db.execute("CREATE INDEX of_id ON samples (id)")
            unanswered = "id NOT IN (SELECT id FROM answers)"
            self._db.execute(f"{refuse} 'question ' || id, 'no answers', '' FROM samples WHERE {unanswered}")
            self._db.execute(f"DELETE FROM samples WHERE {unanswered}")
            again = "'the first was taken, ' || again || ' more came' FROM answers WHERE again"
            self._db.execute(f"{refuse} 'answers ' || id, 'id twice', {again}")
            # A question that is asked twice would get its answers twice.
            later = "number NOT IN (SELECT min(number) FROM samples GROUP BY id)"
            self._db.execute(f"{refuse} 'question ' || id, 'id twice', 'of image ' || image FROM samples WHERE {later}")
            self._db.execute(f"DELETE FROM samples WHERE {later}")
            unasked = "id NOT IN (SELECT id FROM samples)"
            self._db.execute(f"{refuse} 'answers ' || id, 'unknown question', '' FROM answers WHERE {unasked}")
        if not self._answered:
            # Samples of one image may stand in several rows; those of several images are others. Ids name predictions.
            self._db.execute(
                "CREATE TEMP TABLE shared AS SELECT id, min(number) AS first FROM samples WHERE id <> 'None' "
                "GROUP BY id HAVING min(image) <> max(image)"
            )
            later = "FROM samples JOIN shared USING (id) WHERE image <> (SELECT image FROM samples WHERE number = shared.first)"
            self._db.execute(
                f"{refuse} replace(ltrim(image, char(31)), char(31), ', '), 'id twice', 'id ' || id {later}"
            )
            self._db.execute(f"DELETE FROM samples WHERE number IN (SELECT number {later})")
        self._db.execute("CREATE TABLE firsts (number INTEGER PRIMARY KEY, image TEXT)")
        self._db.execute("INSERT INTO firsts SELECT min(number), image FROM samples GROUP BY image")

    def __len__(self) -> int:
        self._join()
        return int(self._db.execute("SELECT count(*) FROM firsts").fetchone()[0])

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], str, str]]:
        """Names of a record's images, what to call it, and its samples, as in `SourceRecord`."""
        self._join()
        rows = self._db.execute(
            "SELECT firsts.number, coalesce(names.name, firsts.image), samples.payload, answers.payload FROM firsts "
            "JOIN samples ON samples.image = firsts.image LEFT JOIN names ON names.image = firsts.image "
            "LEFT JOIN answers ON answers.id = samples.id ORDER BY firsts.number, samples.number"
        )
        for (_, name), of_image in groupby(rows, key=itemgetter(0, 1)):
            samples = [_united(sample, answers) for _, _, sample, answers in of_image]
            images = () if name.startswith(_BETWEEN) else tuple(name.split(_BETWEEN))
            yield images, name.strip(_BETWEEN).replace(_BETWEEN, ", "), f"[{','.join(samples)}]"


def _united(sample: str, answers: str | None) -> str:
    """JSON of a sample with the answers to it. Of a field that both have, JSON's readers take the last."""
    return sample if answers is None else f"{sample[:-1]},{answers[1:]}"
