#!/usr/bin/env python3
"""Where the time of `prepare coco` goes: each step by itself, in one process, on the small images of `data.py`.

    python benchmarks/convert_steps.py
    python benchmarks/convert_steps.py --images 200 --repeats 1     seconds: checks that the benchmark works

Seconds of a core (user and system), not of the wall: least of the repeats, because what else runs on the machine only
adds. Steps of the main process come one after the other; those of workers run on as many cores as there are, beside
`records` and `sending`.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from data import write_small

from mmprefix.data import reading, sources
from mmprefix.data.headers import ordinary_header
from mmprefix.data.records import SourceRecord
from mmprefix.data.samples import check_sample
from mmprefix.data.staging import Staging
from mmprefix.data.writing import Job, _as_json, _header, _read, write_chunk

CHUNK = 1000
Result = TypeVar("Result")


class Steps:
    """The least seconds of a core that each step took."""

    def __init__(self) -> None:
        self.least: dict[str, float] = {}

    def timed(self, name: str, step: Callable[[], Result]) -> Result:
        """Runs a step."""
        start = time.process_time()
        result = step()
        seconds = time.process_time() - start
        self.least[name] = min(seconds, self.least.get(name, seconds))
        return result


def start() -> float:
    """Seconds of a core from nothing to the parsed command line."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "mmprefix", "prepare", "--help"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main_process(steps: Steps, work: Path) -> list[SourceRecord]:
    """What happens in front of the workers; returns all records."""
    captions, images = work / "captions.json", work / "images"
    options = sources.SourceOptions(images, (captions,))
    steps.timed(
        "main: JSON alone", lambda: sum(len(b) for _, b in reading.json_lists(captions, "images", "annotations"))
    )
    with Staging(work / "staging", "steps") as staging:
        steps.timed("main: reading and staging (with JSON)", lambda: sources.coco(options, staging))
        steps.timed("main: joining", lambda: len(staging))
        records = steps.timed("main: records", lambda: list(sources.staged_records(images, staging)))
    steps.timed("main: sending", lambda: [
        pickle.loads(pickle.dumps(records[n : n + CHUNK], -1)) for n in range(0, len(records), CHUNK)
    ])  # fmt: skip
    return records


def workers(steps: Steps, work: Path, records: list[SourceRecord]) -> None:
    """What workers do: all of it, and its parts."""
    job = Job(work / "shards", "steps")
    chunks = [records[n : n + CHUNK] for n in range(0, len(records), CHUNK)]
    steps.timed("workers: all", lambda: [write_chunk(job, number, chunk) for number, chunk in enumerate(chunks)])
    contents = steps.timed("workers: reading images", lambda: [_read(record, 0) for record in records])
    steps.timed("workers: headers of images", lambda: [ordinary_header(content) for content in contents])
    samples = steps.timed("workers: reading samples", lambda: [record.read_samples()[0] for record in records])
    steps.timed("workers: checking samples", lambda: [check_sample(sample) for sample in samples])
    steps.timed("workers: writing JSON", lambda: [_as_json(sample).encode() for sample in samples])
    steps.timed("workers: headers of tar", lambda: [_header("00000000000.jpg", len(c)) for c in contents * 2])
    shards = [path.read_bytes() for path in sorted(job.folder.glob("*.tar"))]
    steps.timed("workers: hashing", lambda: [hashlib.sha256(shard).digest() for shard in shards])
    steps.timed("workers: writing, as one file", lambda: (work / "copy").write_bytes(b"".join(shards)))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    gc.freeze()  # torch came with the package: its objects are not to be looked through in the middle of a step
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_small(work, options.images)
        steps.least["main: start, imports, options"] = min(start() for _ in range(options.repeats))
        for _ in range(options.repeats):
            workers(steps, work, main_process(steps, work))
        (work / "copy").unlink()
        tar = ["tar", "-cf", os.fspath(work / "plain.tar"), "-C", folder, "images"]
        least = float("inf")
        for _ in range(options.repeats):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(tar, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            least = min(least, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        steps.least["tar"] = least
    print("| step | core seconds | microseconds an image |\n|---|---|---|")
    for name, seconds in steps.least.items():
        print(f"| {name} | {seconds:.3f} | {1e6 * seconds / options.images:.1f} |")


if __name__ == "__main__":
    main()
