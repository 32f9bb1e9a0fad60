"""`index.json`: what a folder of shards holds and where, so that nothing has to be read to know it.

Written by `prepare` beside the shards it describes, one file for all splits of the folder::

    {"version": 1, "splits": {"train": {
        "shards": [{"name": "train-000000.tar", "bytes": ..., "sha256": "...", "records": 1000, "samples": 1000,
                    "targets": 5003, "members": [512, 70251, 71680, 340, ...]}, ...],
        "images": 118287, "samples": ..., "targets": ..., "kinds": {"all": ...},
        "lengths": {"unit": "bytes", "instruction": {...}, "target": {...}},
        "refused": {"no file": 3}, "made_by": {...}}}}

``members`` holds the offset and the size of each member, in bytes of the shard: for each record its image, then its JSON.
Where records have several images, or none, ``images`` holds how many each has. Shards stay plain webdataset tars: without
the index they are read all the same, and scanned at each start.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmprefix.data import storage
from mmprefix.errors import InputError
from mmprefix.files import replacing

INDEX_NAME = "index.json"
VERSION = 1


def read_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The splits that a folder's index describes, by name; {} where there is no index.

    Raises:
        InputError: a file that is no index, or one of a later version.
    """
    path = storage.join(str(folder), INDEX_NAME)
    try:
        content = json.loads(storage.read_whole(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected an index of shards, got {' '.join(str(error).split())[:200]}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION or not isinstance(content.get("splits"), dict):
        raise InputError(
            f"{path}: expected an index of shards of version {VERSION}, got version {version!r}; "
            "without the file, shards are scanned at each start"
        )
    splits: dict[str, Any] = content["splits"]
    for split, entry in splits.items():
        problem = _problem(entry)
        if problem:
            raise InputError(f"{path}: {split}: {problem}; without the file, shards are scanned at each start")
    return splits


def _problem(entry: Any) -> str | None:
    """What is wrong with a split's entry: it may come from strangers, and offsets are read from."""
    shards = entry.get("shards") if isinstance(entry, dict) else None
    if not isinstance(shards, list):
        return "expected a list `shards`"
    for shard in shards:
        if not isinstance(shard, dict) or not isinstance(shard.get("name"), str):
            return "expected shards with a `name`"
        counts = [shard.get(name) for name in ("bytes", "records", "samples")]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            return f"{shard['name']}: expected numbers `bytes`, `records` and `samples`, got {counts}"
        images, num_images = shard.get("images"), shard["records"]
        if images is not None:
            if not isinstance(images, list) or not all(type(n) is int and 0 <= n < 2**31 for n in images):
                return f"{shard['name']}: expected numbers of images in `images`"
            if len(images) != shard["records"]:
                return f"{shard['name']}: expected a number in `images` for each of {shard['records']} records"
            num_images = sum(images)
        members, expected = shard.get("members"), 2 * (num_images + shard["records"])
        if not isinstance(members, list) or len(members) != expected:
            of = f"{num_images} images and {shard['records']} records"
            return f"{shard['name']}: expected {expected} numbers in `members`, for {of}"
    return None


def forget_split(folder: Path, split: str) -> None:
    """Takes a split out of a folder's index; the last one takes the file with it."""
    splits = read_index(folder)
    if splits.pop(split, None) is not None:
        if splits:
            _write(folder, splits)
        else:
            (folder / INDEX_NAME).unlink()


def write_split(folder: Path, split: str, entry: dict[str, Any]) -> None:
    """Enters a split into a folder's index, in the place of what stood there for it."""
    _write(folder, {**read_index(folder), split: entry})


def _write(folder: Path, splits: dict[str, Any]) -> None:
    with replacing(folder / INDEX_NAME) as temporary, temporary.open("w") as file:
        # A line for each shard: a diff and a pager can cope, and offsets don't take a line each.
        file.write(f'{{"version": {VERSION}, "splits": {{')
        for number, (name, content) in enumerate(splits.items()):
            file.write(f"{',' if number else ''}\n{json.dumps(name)}: {{")
            for key, value in content.items():
                if key != "shards":  # they come last
                    file.write(f"{json.dumps(key)}: {json.dumps(value)}, ")
            file.write('"shards": [\n')
            for place, shard in enumerate(content["shards"]):
                # One at a time; `members` may be an array.
                file.write((",\n" if place else "") + json.dumps(shard, default=list))
            file.write("]}")
        file.write("\n}}\n")
        file.flush()
        os.fsync(file.fileno())
