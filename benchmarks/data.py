#!/usr/bin/env python3
"""Making, opening and reading shards, beside the plainest thing that does the same.

    python benchmarks/data.py
    python benchmarks/data.py --cases loader --repeats 5
    python benchmarks/data.py --smoke                  seconds: checks that the benchmark works
    python benchmarks/data.py --json rows.json

Cases:
    convert   `prepare coco` of many small images with five captions each, against `tar` of the same files. Counted with
              everything: Python's start, reading the annotations, checking each picture, JSON, checksums, index.
              Small images, then photographs; `cpu_seconds` are those of all processes, user and system, which a busy
              machine disturbs less. `peak_memory` is that of the main process, for four times as many small images
              beside these. (Fewer than these all wait in memory together, and need less.)
    loader    images per second of our loader with two processes (decode, resize, normalise, tokenize, collate), against
              two processes that decode and resize the same files with Pillow and do nothing else
    resume    seconds from nothing to the first batch's records behind sample 1,000,000, on an index of 2,000 shards;
              the shards are empty files of the right size, so that reading any of them would fail

Before any time is taken: the shards hold the same bytes as the files; the loader's pixels are those of the loop.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from side_by_side import Row, compare, print_header, print_row, take_turns, write_json
from sklearn.datasets import load_sample_images

from mmprefix.data.index import write_split
from mmprefix.data.loading import BatchLoader, Collator, EpochBatchSampler, Parcelled, RecordDataset, TextLimits
from mmprefix.data.mixture import EpochOrder
from mmprefix.data.shards import ShardCollection
from mmprefix.processing import (
    IMAGE_TOKEN,
    MMPrefixImageProcessor,
    MMPrefixProcessor,
    TokenizerArgs,
    load_tokenizer,
)

PROCESSES = 2
SIDE = 224
SEEN = 1_000_000


class Size(NamedTuple):
    """How much of everything."""

    name: str
    small_images: int
    photos: int
    shards: int
    records_per_shard: int


FULL = Size("full", small_images=20_000, photos=2000, shards=2000, records_per_shard=600)
SMOKE = Size("smoke", small_images=60, photos=8, shards=4, records_per_shard=300_000)

Measured = tuple[str, str, list[float], list[float]]
"""Peer, metric, the peer's values and ours."""


_WITH_MEMORY = """
import sys
arguments, sys.argv = sys.argv[1:], ["-m"]  # as `python -m mmprefix` finds it
from mmprefix.__main__ import main
status = main(arguments)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""
"""Runs a command and prints the most memory of its process in KiB. (What a parent is told is the most before exec, too.)"""


def timed(command: list[str]) -> dict[str, float]:
    """Seconds of a command, those of its processes on a core, and the number in its last line if that is one."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    last = done.stdout.splitlines()[-1:]
    return {
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "memory": 1024.0 * int(last[0]) if last and last[0].isdigit() else 0.0,
    }


# convert --------------------------------------------------------------------------------------------------------------


def write_small(folder: Path, number: int, linked: Path | None = None) -> Path:
    """So many JPEGs of 64 pixels and their captions, in no order; returns the captions.

    Images are links to those of ``linked``, in turn, if that is given.
    """
    originals = sorted((linked / "images").iterdir()) if linked else []
    (folder / "images").mkdir(parents=True)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    images, captions = [], []
    for n in range(number):
        path = folder / "images" / f"{n:012d}.jpg"
        if originals:
            path.hardlink_to(originals[n % len(originals)])
        else:
            noise.rotate(n % 360).save(path, quality=75)
        images.append({"id": n, "file_name": f"{n:012d}.jpg"})
        captions += [{"id": 5 * n + k, "image_id": n, "caption": f"picture number {n}, caption {k}"} for k in range(5)]
    order = np.random.default_rng(1).permutation(len(captions))
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": [captions[n] for n in order]}))
    return path


def write_photos(folder: Path, number: int) -> None:
    """So many photographs, each another one: what is the same is encoded once."""
    folder.mkdir(parents=True)
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    for n in range(number):
        photos[n % 2].rotate(n / 50, resample=Image.Resampling.BICUBIC).save(folder / f"{n:05d}.jpg", quality=90)


def convert(size: Size, work: Path, repeats: int) -> Iterator[Measured]:
    """Against `tar`."""

    def prepare(folder: Path, python: Sequence[str] = ("-m", "mmprefix")) -> dict[str, float]:
        out = folder / "shards"
        command = [sys.executable, *python, "prepare", "coco", "--annotations", str(folder / "captions.json"),
                   "--images", str(folder / "images"), "--out", str(out), "--overwrite"]  # fmt: skip
        return timed(command)

    many, more = work / "many", work / "more"
    write_small(many, size.small_images)
    write_small(more, 4 * size.small_images, linked=many)
    memory = [prepare(folder, ("-c", _WITH_MEMORY))["memory"] for folder in (many, more)]
    shutil.rmtree(more)  # otherwise each image of `many` would be one of several links, which tar looks after
    shards = ShardCollection(str(many / "shards"), "shards")
    assert len(shards) == size.small_images
    assert shards.num_samples == size.small_images
    for index in range(0, len(shards), max(1, len(shards) // 50)):
        (sample,) = shards.samples(index)
        assert len(sample.targets) == 5
        assert shards.image_bytes(index) == (many / "images" / f"{int(sample.image_id):012d}.jpg").read_bytes()
    photos = work / "photos"
    write_photos(photos / "images", size.photos)
    captions = [{"image_id": n, "caption": f"photograph {n}, {k}"} for n in range(size.photos) for k in range(5)]
    images = [{"id": n, "file_name": f"{n:05d}.jpg"} for n in range(size.photos)]
    (photos / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    for folder, peer in ((many, "tar"), (photos, "tar, photographs")):
        tar = ["tar", "-cf", str(work / "plain.tar"), "-C", str(folder), "images"]
        values = take_turns({"tar": partial(timed, tar), "mmprefix": partial(prepare, folder)}, repeats)
        for metric in ("seconds", "cpu_seconds"):
            yield peer, metric, values["tar"][metric], values["mmprefix"][metric]
    yield "a quarter of the images", "peak_memory", [memory[0]], [memory[1]]


# loader ---------------------------------------------------------------------------------------------------------------


def decode_and_resize(path: str) -> np.ndarray:
    """The bare loop's work on a file."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _only_decode(paths: list[str]) -> int:
    return sum(decode_and_resize(path).shape[0] > 0 for path in paths)


def loader(size: Size, work: Path, repeats: int) -> Iterator[Measured]:
    """Against Pillow alone."""
    folder = work / "photos"
    write_photos(folder, size.photos)
    for n in range(size.photos):
        (folder / f"{n:05d}.txt").write_text(f"a photograph of a temple or a flower, number {n}")
    subprocess.run(
        [sys.executable, "-m", "mmprefix", "prepare", "folder", "--images", str(folder), "--out", str(work / "loader")],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    paths = sorted(map(str, folder.glob("*.jpg")))
    tokenizer = load_tokenizer(TokenizerArgs(name="byte"), None)
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) is not None
    processor = MMPrefixProcessor(MMPrefixImageProcessor((SIDE, SIDE)), tokenizer, num_image_tokens=196)
    shards = ShardCollection(str(work / "loader"), "loader")
    dataset = RecordDataset(shards, processor, TextLimits(None, None, "none"))
    assert len(shards) == len(paths) == size.photos
    for n in range(0, len(paths), max(1, len(paths) // 10)):
        pixels = dataset[0, n].images[0].pixels  # type: ignore[union-attr]
        bare = torch.tensor(decode_and_resize(paths[n])).permute(2, 0, 1)
        assert (pixels[0].int() - bare.int()).abs().max() <= 1, "more than a level apart"

    def ours() -> dict[str, float]:
        start = time.perf_counter()
        sampler = EpochBatchSampler(EpochOrder.of(len(shards)), 16)
        collate = Parcelled(Collator(processor.pad_id, "full", packed=True).train)
        batches = BatchLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=PROCESSES)
        count = sum(batch.pixel_values.shape[0] for batch in batches)
        assert count == len(paths)
        return {"images_per_s": count / (time.perf_counter() - start)}

    def bare() -> dict[str, float]:
        start = time.perf_counter()
        with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
            count = sum(pool.map(_only_decode, [paths[n::PROCESSES] for n in range(PROCESSES)]))
        assert count == len(paths)
        return {"images_per_s": count / (time.perf_counter() - start)}

    values = take_turns({"Pillow alone": bare, "mmprefix": ours}, repeats)
    yield "Pillow alone", "images_per_s", values["Pillow alone"]["images_per_s"], values["mmprefix"]["images_per_s"]


# resume ---------------------------------------------------------------------------------------------------------------


def resume(size: Size, work: Path, repeats: int) -> Iterator[Measured]:
    """Against reading the index's JSON and nothing else."""
    folder = work / "indexed"
    folder.mkdir()
    image, payload, block = 150_000, 300, 512
    step = block + image + -image % block + 2 * block
    starts = np.arange(size.records_per_shard) * step + block
    members = np.stack([starts, np.full_like(starts, image), starts + step - block, np.full_like(starts, payload)], 1)
    entry = {
        "bytes": size.records_per_shard * step + 2 * block, "sha256": "", "records": size.records_per_shard,
        "samples": size.records_per_shard, "targets": size.records_per_shard, "members": members.flatten().tolist(),
    }  # fmt: skip
    shards = [{"name": f"train-{n:06d}.tar", **entry} for n in range(size.shards)]
    for shard in shards:
        (folder / shard["name"]).touch()
        os.truncate(folder / shard["name"], shard["bytes"])
    write_split(folder, "train", {"shards": shards})

    def read_json() -> dict[str, float]:
        start = time.perf_counter()
        json.loads((folder / "index.json").read_bytes())
        return {"seconds": time.perf_counter() - start}

    def ours() -> dict[str, float]:
        start = time.perf_counter()
        collection = ShardCollection(str(folder / "train-*.tar"), "data.train")
        batch = next(iter(EpochBatchSampler(EpochOrder.of(len(collection)), 32, seen=lambda epoch: SEEN)))
        seconds = time.perf_counter() - start
        order = np.arange(len(collection))
        np.random.default_rng((0, 0)).shuffle(order)
        assert [index for _, index in batch] == order[SEEN : SEEN + 32].tolist()
        return {"seconds": seconds}

    values = take_turns({"json": read_json, "mmprefix": ours}, repeats)
    yield "reading index.json", "seconds", values["json"]["seconds"], values["mmprefix"]["seconds"]


CASES: dict[str, Callable[[Size, Path, int], Iterator[Measured]]] = {
    "convert": convert,
    "loader": loader,
    "resume": resume,
}


def main() -> None:
    """All cases, each in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the rows")
    options = parser.parse_args()
    size, repeats = (SMOKE, 1) if options.smoke else (FULL, options.repeats)
    print_header(torch.device("cpu"))
    rows: list[Row] = []
    for case in options.cases:
        with tempfile.TemporaryDirectory() as work:
            for peer, metric, baseline, value in CASES[case](size, Path(work), repeats):
                rows.append(compare(
                    baseline, value, metric=metric, peer=peer, case=case, size=size.name, device="cpu", dtype="uint8",
                    vocab=0,
                ))  # fmt: skip
                print_row(rows[-1])
                write_json(options.json, rows)


if __name__ == "__main__":
    main()
