"""What a source hands to the writers of shards: records before anything of their images was read, and refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple


class SourceRecord(NamedTuple):
    """The images of a record with their samples, before anything of them was read.

    Attributes:
        images: paths of the files, mostly one; or, with ``row``, the path of a Parquet file.
        name: the image (or what stands for it) as its annotations call it, for messages and as its default id.
        samples: a JSON list of objects with the fields of `KEY.json`. As text they reach a worker process, which reads
            them, in a fraction of the time.
        row: row group and row of an image that a Parquet file holds.
        column: and the column.
    """

    images: tuple[str, ...]
    name: str
    samples: str
    row: tuple[int, int] | None = None
    column: str = ""

    def read_samples(self) -> list[dict[str, Any]]:
        """The samples; those with the same id, kind and instruction are one, with all of their targets."""
        samples: list[dict[str, Any]] = json.loads(self.samples)
        return samples if len(samples) == 1 else merged(samples)


class Refusal(NamedTuple):
    """Something that could not be used.

    Attributes:
        what: image or sample, as its annotations call it.
        reason: one of a few, to be counted.
        detail: what came instead.
    """

    what: str
    reason: str
    detail: str = ""


def identity(sample: dict[str, Any]) -> tuple[str, ...]:
    """What samples of an image that are one have in common."""
    return str(sample.get("id")), str(sample.get("kind")), str(sample.get("instruction"))


def absorb(first: dict[str, Any], sample: dict[str, Any]) -> None:
    """Adds the targets and answers of a sample to the first one of the same identity, whose lists grow."""
    if sample.get("targets"):
        if first.get("targets"):
            first["targets"] += sample["targets"]
        else:
            first["targets"] = sample["targets"]
    if sample.get("answers") and sample["answers"] != first.get("answers"):
        first["answers"] = [*(first.get("answers") or []), *sample["answers"]]


def merged(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples of an image, one of each identity, in the order of the first ones."""
    firsts: dict[tuple[str, ...], dict[str, Any]] = {}
    for sample in samples:
        first = firsts.setdefault(identity(sample), sample)
        if first is not sample:
            absorb(first, sample)
    return list(firsts.values())
