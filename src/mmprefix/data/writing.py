"""Records -> shards, on all cores, in memory that does not grow with the set, going on where it was interrupted.

The main process hands chunks of records, `shard_size` each, to worker processes; each becomes one shard, complete or
absent. A record names its image by path: workers read it, look at its header and copy its bytes as they are. What
can't be used is refused by name, never skipped: `Refusal`.

While a conversion is unfinished, ``.SPLIT.progress/`` beside the shards holds what each finished shard holds; at the
end it becomes `index.json` (`index.py`) and ``refused.jsonl``.

This module knows no data set: `sources` reads those.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmprefix.data.headers import ordinary_header
from mmprefix.data.index import forget_split, read_index, write_split
from mmprefix.data.records import Refusal, SourceRecord
from mmprefix.data.samples import MAX_IMAGE_BYTES, SURROGATE, check_sample
from mmprefix.errors import InputError
from mmprefix.files import replacing

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "MPO": "jpg"}
"""Formats that are copied, as Pillow names them, and the suffix of their members."""
MAX_PIXELS = 178_956_970
"""Twice Pillow's own limit, where it raises: a small file may claim to be enormous."""
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_PIECE = 1 << 20
"""Bytes of a shard that are hashed and written together."""
_FIRST_READ = 1 << 16
"""Bytes of a picture that are asked for first."""
_LOOK = 0.5
"""Seconds between looks for Ctrl-C."""
_AHEAD = 2
"""Chunks for each worker that are at work or wait, at most: their texts are in memory, their images are not."""
_QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass
class ShardReport:
    """What a finished shard holds; `shard` is None where nothing of the chunk could be used."""

    number: int
    shard: dict[str, Any] | None = None
    kinds: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    refused: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """What workers need beside the records.

    Attributes:
        folder, split: where shards go, and how their names begin.
        resize: longest side in pixels of images that are larger; None copies all as they are.
        tokenizer: name of a tokenizer that lengths are counted with; None counts UTF-8 bytes.
        needs_target: whether a sample without target is refused.
    """

    folder: Path
    split: str
    resize: int | None = None
    tokenizer: str | None = None
    needs_target: bool = True


class _Unusable(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


# In a worker ----------------------------------------------------------------------------------------------------------

_count_tokens: Callable[[str], int] | None = None
_locked: list[int] = []
"""Descriptors of folders that the main process keeps for itself (`alone_in`)."""
_start_error = ""


def _start_worker(tokenizer: str | None) -> None:
    global _count_tokens
    for file in _locked:  # or the lock outlives the main process, with us
        os.close(file)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # what was there before the fork is never looked at, which would copy its pages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the main process ends us
    if tokenizer is not None:
        from transformers import AutoTokenizer

        try:
            encode = AutoTokenizer.from_pretrained(tokenizer).encode
        except Exception as error:  # an initialiser that fails breaks the pool, without a word of why
            global _start_error
            _start_error = " ".join(str(error).split())[:300] or type(error).__name__
            return
        _count_tokens = lambda text: len(encode(text, add_special_tokens=False))  # noqa: E731


def _end_with_parent() -> None:
    """Nobody is left to count what a worker writes when the main process was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _how_it_started() -> str:
    return _start_error


def _length(text: str) -> int:
    return len(text.encode()) if _count_tokens is None else _count_tokens(text)


def write_chunk(job: Job, number: int, records: Sequence[SourceRecord]) -> ShardReport:
    """Writes one shard and says what it holds."""
    report, kinds, name = ShardReport(number), Counter[str](), f"{job.split}-{number:06d}.tar"
    # Counted at the end, all at once: a Counter takes longer for each text than its length does.
    instruction_lengths: list[int] = []
    target_lengths: list[int] = []
    members: list[int] = []
    num_images: list[int] = []

    def refuse(what: str, reason: str, detail: str) -> None:
        report.refused.append(Refusal(what, reason, detail)._asdict())

    with (
        suppress(_NothingUsable),
        replacing(job.folder / name) as temporary,
        open(temporary, "wb", buffering=0) as file,
    ):
        shard = _HashingTar(file)
        for place, record in enumerate(records):
            try:
                samples = _usable(record, job.needs_target, refuse)
                images = [_image_of(record, of_record, job.resize) for of_record in range(len(record.images))]
            except _Unusable as error:
                refuse(record.name, error.reason, error.detail)
                continue
            key = f"{number:06d}{place:05d}"
            for of_record, (content, suffix) in enumerate(images):
                of_several = f"{of_record}." if len(images) > 1 else ""
                members += shard.add(f"{key}.{of_several}{suffix}", content), len(content)
            payload = samples[0][1] if len(samples) == 1 else b"[%b]" % b", ".join([text for _, text in samples])
            members += shard.add(f"{key}.json", payload), len(payload)
            num_images.append(len(images))
            for sample, _ in samples:
                kinds[sample.get("kind", "all")] += 1
                turns = sample["instruction"]
                instruction_lengths.append(_length(turns) if isinstance(turns, str) else sum(map(_length, turns)))
                target_lengths += map(_length, sample["targets"])
        shard.close()
        if not members:
            raise _NothingUsable
        os.fsync(file.fileno())
        report.shard = {
            "name": name, "bytes": shard.size, "sha256": shard.digest.hexdigest(), "records": len(num_images),
            "samples": len(instruction_lengths), "targets": len(target_lengths),
            # Said only where it isn't one each.
            **({} if set(num_images) == {1} else {"images": num_images}), "members": members,
        }  # fmt: skip
    report.kinds = dict(kinds)
    lengths = {"instruction": Counter(instruction_lengths), "target": Counter(target_lengths)}
    report.lengths = {what: {str(k): n for k, n in counts.items()} for what, counts in lengths.items()}
    with replacing(_progress(job.folder, job.split) / f"{number:06d}.json") as temporary:
        temporary.write_text(json.dumps(vars(report)))
    return report


class _NothingUsable(Exception):
    """Of a whole chunk: the file that was begun is removed on the way out."""


# The ustar header of a file, in pieces: time 0, no owner, so that equal content makes equal bytes. (POSIX.1-1988.)
_MODE_OWNER = b"0000644\0" + 2 * b"0000000\0"
_TIME = 11 * b"0" + b"\0"
_REST = b"0".ljust(101, b"\0") + b"ustar\00000".ljust(255, b"\0")
_CONSTANT_SUM = sum(_MODE_OWNER + _TIME + _REST) + 8 * ord(" ")
"""What the checksum adds up that is the same for all; its own field counts as eight spaces."""


def _header(name: str, size: int) -> bytes:
    """The ustar header of a file. `tarfile` takes longer for it than reading a small picture does."""
    encoded = name.encode("ascii")
    assert len(encoded) < 100
    assert size < 8**11
    octal = b"%011o\0" % size
    checksum = _CONSTANT_SUM + sum(encoded) + sum(octal)
    return b"%b%b%b%b%06o\0 %b" % (encoded.ljust(100, b"\0"), _MODE_OWNER, octal, _TIME, checksum, _REST)


class _HashingTar:
    """A ustar file, written once from front to back and hashed on the way, a good piece at a time."""

    def __init__(self, file: io.FileIO) -> None:
        self._file, self.size, self.digest = file, 0, hashlib.sha256()
        self._waiting: list[bytes] = []
        self._written = 0

    def add(self, name: str, content: bytes) -> int:
        """Returns the offset of the content."""
        padding = -len(content) % _BLOCK
        self._waiting += _header(name, len(content)), content, _ZEROS[:padding]
        offset = self.size + _BLOCK
        self.size = offset + len(content) + padding
        if self.size - self._written >= _PIECE:
            self._write()
        return offset

    def _write(self) -> None:
        piece = memoryview(b"".join(self._waiting))
        self._waiting.clear()
        self._written = self.size
        self.digest.update(piece)
        while piece:
            piece = piece[self._file.write(piece) :]

    def close(self) -> None:
        """Ends the archive; the file stays open."""
        self._waiting.append(_ZEROS * 2)
        self.size += 2 * _BLOCK
        self._write()


_as_json = json.JSONEncoder(ensure_ascii=False).encode  # `json.dumps` would make an encoder each time


def _usable(
    record: SourceRecord, needs_target: bool, refuse: Callable[[str, str, str], None]
) -> list[tuple[dict[str, Any], bytes]]:
    """The record's samples, normalised, and the JSON of each; the others are refused one by one."""
    usable: list[tuple[dict[str, Any], bytes]] = []
    ids: set[Any] = set()
    for number, entry in enumerate(record.read_samples()):
        alone = len(record.images) == 1
        if "image_id" in entry:
            image_id = entry["image_id"]
        else:
            image_id = Path(record.name).stem if alone else record.name
        sample = {"image_id": image_id, **entry}
        if not alone:
            sample["images"] = len(record.images)
        if entry.get("id") in ids:
            refuse(f"{record.name}: {entry['id']}", "id twice", "")
            continue
        given = entry.get("targets") or ()
        sample["targets"] = []
        for text in given:
            if isinstance(text, str) and not text.strip():
                refuse(f"{record.name}: {entry.get('id', number)}", "empty target", "")
            elif isinstance(text, str) and not text.isascii() and SURROGATE.search(text):
                refuse(
                    f"{record.name}: {entry.get('id', number)}",
                    "bad target",
                    f"half of a surrogate pair in {text[:40]!a}",
                )
            else:
                sample["targets"].append(text)
        if needs_target and not sample["targets"]:
            if not given:
                refuse(f"{record.name}: {entry.get('id', number)}", "no target", "")
            continue
        try:
            payload = _as_json(sample).encode()
            check_sample(sample, needs_target=needs_target)
        except (InputError, UnicodeEncodeError) as error:  # half of a surrogate pair, in whatever field
            refuse(f"{record.name}: {entry.get('id', number)}", "bad sample", str(error))
            continue
        usable.append((sample, payload))
        if "id" in entry:
            ids.add(entry["id"])
    if not usable:
        raise _Unusable("image without a usable sample" if record.images else "text without a usable sample")
    return usable


def _image_of(record: SourceRecord, number: int, resize: int | None) -> tuple[bytes, str]:
    """One of a record's images, encoded, and the suffix of its format."""
    content = _read(record, number)
    header = ordinary_header(content)
    if (
        header is not None
        and len(content) <= MAX_IMAGE_BYTES
        and header.width * header.height <= MAX_PIXELS
        and (resize is None or max(header.width, header.height) <= resize)
    ):
        return content, header.suffix
    return _seen_by_pillow(content, resize)


def _seen_by_pillow(content: bytes, resize: int | None) -> tuple[bytes, str]:
    if len(content) > MAX_IMAGE_BYTES:
        raise _Unusable("image too large", f"{len(content)} bytes, at most {MAX_IMAGE_BYTES}")
    from PIL import Image  # not at the start: a set of ordinary pictures needs none of it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # Reads the header only: to decode every image would cost more than everything else.
            image = Image.open(io.BytesIO(content))
            width, height = image.size
            suffix = SUFFIXES.get(str(image.format))
            if suffix is None:
                raise _Unusable("image format", f"{image.format}, expected one of {', '.join(SUFFIXES)}")
            if width * height > MAX_PIXELS:
                raise _Unusable("image too large", f"{width} x {height} pixels, at most {MAX_PIXELS}")
            if resize is None or max(width, height) <= resize:
                return content, suffix
            return _resized(image, resize), "jpg" if suffix == "jpg" else "png"
    except _Unusable:
        raise
    except Image.DecompressionBombError as error:
        raise _Unusable("image too large", str(error)) from error
    except Exception as error:  # Pillow raises much besides OSError on broken files
        message = " ".join(str(error).split()).split(" <_io.BytesIO")[0] or type(error).__name__
        raise _Unusable("image unreadable", message) from error


def _resized(image: Image.Image, longest: int) -> bytes:
    """Upright, the longest side as given, in the format it came in or as PNG."""
    from PIL import Image, ImageOps

    jpeg = image.format in ("JPEG", "MPO")
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "P":
        upright = upright.convert("RGBA" if "transparency" in upright.info else "RGB")
    scale = longest / max(upright.size)
    size = max(1, round(upright.width * scale)), max(1, round(upright.height * scale))
    buffer = io.BytesIO()
    if jpeg:
        upright.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).save(buffer, "JPEG", quality=95)
    else:
        upright.resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def _read(record: SourceRecord, number: int) -> bytes:
    if record.row is not None:
        return _from_parquet(record)
    path = record.images[number]
    try:
        # Not `open`: its buffers and questions take longer than reading a small picture.
        file = os.open(path, os.O_RDONLY)
        try:
            content = os.read(file, _FIRST_READ)
            # As much again each time: what is asked for is allocated, whatever comes.
            while more := os.read(file, min(len(content), MAX_IMAGE_BYTES + 1 - len(content))):
                content += more
        finally:
            os.close(file)
        return content
    except FileNotFoundError as error:
        raise _Unusable("no file", path) from error
    except OSError as error:
        raise _Unusable("image unreadable", f"{path}: {error.strerror}") from error


_row_group: tuple[Any, Any] = (None, None)


def _from_parquet(record: SourceRecord) -> bytes:
    global _row_group
    import pyarrow.parquet

    assert record.row is not None
    group, row = record.row
    wanted = (record.images[0], group, record.column)
    if _row_group[0] != wanted:  # rows come in order: one group is held at a time
        _row_group = (
            wanted,
            pyarrow.parquet.ParquetFile(record.images[0]).read_row_group(group, [record.column]).column(0),
        )
    value = _row_group[1][row].as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise _Unusable("no image", f"row {row} of row group {group} holds {type(content).__name__}")
    return content


# In the main process --------------------------------------------------------------------------------------------------


def _progress(folder: Path, split: str) -> Path:
    return folder / f".{split}.progress"


@contextmanager
def _interrupts_noted() -> Iterator[list[int]]:
    """Ctrl-C adds to the list that this yields, to be looked at where nothing is half done.

    An exception in the middle of the executor's own work may leave it in a state in which it waits forever.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield noted
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def workers(processes: int, tokenizer: str | None) -> Iterator[ProcessPoolExecutor]:
    """Worker processes for `convert`, running from the start.

    They are forked, so begin them before there are threads: spawned ones would import the package anew, and with it
    torch. What they were doing is thrown away where the block ends by an exception.

    Args:
        processes: how many.
        tokenizer: as in `Job`.
    """
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start_worker, (tokenizer,))
    try:
        problem = pool.submit(_how_it_started).result()  # forks all of them
        if problem:
            raise InputError(f"--tokenizer: cannot load {tokenizer!r}: {problem}")
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class Converted:
    """What a conversion came to.

    Attributes:
        entry: the split's entry in `index.json`.
        resumed: shards that were there before.
    """

    entry: dict[str, Any]
    resumed: int = 0


def finished_entry(folder: Path, split: str, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """The split's entry, if this very conversion was finished before; None if there is none.

    Raises:
        InputError: the split was made from something else.
    """
    entry = read_index(folder).get(split)
    if entry is None:
        return None
    if entry.get("made_by") == fingerprint and all((folder / s["name"]).is_file() for s in entry["shards"]):
        return entry  # type: ignore[no-any-return]
    raise InputError(
        f"--out: {folder} holds a split {split!r} that was made otherwise ({_difference(entry.get('made_by'), fingerprint)}); "
        "give --overwrite to replace it, or another --split or --out"
    )


def _difference(before: Any, now: dict[str, Any]) -> str:
    before = before if isinstance(before, dict) else {}
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    parts = []
    for name in names:
        one, other = before.get(name), now.get(name)
        if name == "files" and isinstance(one, list) and isinstance(other, list):  # digests say nothing to anyone
            changed = dict.fromkeys(
                file for pair in zip_longest(one, other) if pair[0] != pair[1] for file, _ in filter(None, pair)
            )
            parts.append(f"{name}: {', '.join(changed)}")
        else:
            parts.append(f"{name}: {one!r}, now {other!r}")
    return ", ".join(parts)[:300] or "shards are missing"


def remove_split(folder: Path, split: str) -> None:
    """Removes the shards, progress, refusals and index entry of a split."""
    shutil.rmtree(_progress(folder, split), ignore_errors=True)
    forget_split(folder, split)
    for path in (*shards_of(folder, split), folder / f"{split}.refused.jsonl"):
        path.unlink(missing_ok=True)


def check_strangers(folder: Path, split: str) -> None:
    """Whether shards lie where those of a split will, and nothing says that they are of a conversion.

    Raises:
        InputError: naming them.
    """
    if _progress(folder, split).is_dir() or split in read_index(folder):
        return
    strangers = sorted(path.name for path in shards_of(folder, split))
    if strangers:
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise InputError(
            f"--out: {folder} holds shards of a split {split!r} that no index describes ({', '.join(strangers[:3])}{more}); "
            "give --overwrite to replace them, or another --split or --out"
        )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other conversions out of a folder, whose index all of its splits share.

    Raises:
        InputError: another one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out: another prepare is at work in {folder}") from None
        except OSError:  # some network folders know no locks
            pass
        _locked.append(file)
        yield
    finally:
        if file in _locked:
            _locked.remove(file)
        os.close(file)


def shards_of(folder: Path, split: str) -> list[Path]:
    """Files that are named as a split's shards are; those of `val-2014` are not `val`'s."""
    return sorted(path for path in folder.glob("*.tar") if re.fullmatch(rf"{re.escape(split)}-\d+\.tar", path.name))


def convert(
    job: Job,
    records: Iterable[SourceRecord],
    fingerprint: dict[str, Any],
    *,
    shard_size: int,
    pool: ProcessPoolExecutor,
    processes: int,
    overwrite: bool = False,
    refused: Callable[[], Iterable[Refusal]] = tuple,
    advance: Callable[[int], None] = lambda number: None,
) -> Converted:
    """Writes all shards of a split, its index and what was refused.

    Args:
        job: where to and how.
        records: in an order that is the same each time.
        fingerprint: of the input and options: an unfinished conversion goes on only where it is the same.
        shard_size: records of a chunk; what is refused makes shards smaller. Part of the fingerprint.
        pool: from `workers`.
        processes: how many those are.
        overwrite: whether what the folder holds of the split is removed first; what an interrupted call of the same kind has
            finished is not.
        refused: what never became a record; asked at the end.
        advance: told the number of records done, now and then.

    Raises:
        InputError: the folder holds an unfinished conversion of something else.
        ChildProcessError: a worker died.
    """
    progress = _progress(job.folder, job.split)
    if overwrite and not _is_begun(progress, fingerprint):
        remove_split(job.folder, job.split)
    for stale in job.folder.glob(".*.tar.*.part"):  # of a run that was killed
        if re.match(rf"\.{re.escape(job.split)}-\d+\.tar\.", stale.name):
            stale.unlink()
    _begin(progress, fingerprint, overwrite)
    done: dict[int, ShardReport] = {}
    for path in sorted(progress.glob("[0-9]*.json")):
        report = ShardReport(**json.loads(path.read_text()))
        shard = report.shard
        if shard is None or _has_size(job.folder / shard["name"], shard["bytes"]):
            done[report.number] = _compact(report)
    resumed = len(done)
    pending: dict[Future[ShardReport], int] = {}

    def collect(most: int) -> None:
        while len(pending) > most:
            for future in wait(pending, _LOOK, FIRST_COMPLETED).done:
                report = future.result()
                done[report.number] = _compact(report)
                advance(pending.pop(future))
            if interrupted:
                raise KeyboardInterrupt

    try:
        with _interrupts_noted() as interrupted:
            for number, chunk in enumerate(_chunks(records, shard_size)):
                if number in done:
                    advance(len(chunk))
                    continue
                pending[pool.submit(write_chunk, job, number, chunk)] = len(chunk)
                collect(_AHEAD * processes)
            collect(0)
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process died; was memory short? the same command goes on from where it stopped"
        ) from error
    entry = _entry(job, [done[number] for number in sorted(done)], fingerprint, list(refused()))
    if entry["samples"]:  # a split of nothing would stand in the way of the next attempt
        write_split(job.folder, job.split, entry)
    shutil.rmtree(progress)
    return Converted(entry, resumed)


def _compact(report: ShardReport) -> ShardReport:
    """Numbers as numbers: a list of them takes five times the memory, and millions of records have four each."""
    if report.shard is not None:
        for name in ("members", "images"):
            if name in report.shard:
                report.shard[name] = array("q", report.shard[name])
    return report


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _is_begun(progress: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether a call that overwrites has begun, and what it replaces is gone."""
    plan = progress / "plan.json"
    return plan.is_file() and json.loads(plan.read_text()) == {"made_by": fingerprint, "overwrite": True}


def _begin(progress: Path, fingerprint: dict[str, Any], overwrite: bool) -> None:
    plan = progress / "plan.json"
    if plan.is_file():
        before = json.loads(plan.read_text()).get("made_by")
        if before != fingerprint:
            raise InputError(
                f"--out: {progress.parent} holds an unfinished conversion of something else "
                f"({_difference(before, fingerprint)}); give --overwrite to begin anew"
            )
        return
    progress.mkdir(parents=True, exist_ok=True)
    with replacing(plan) as temporary:
        temporary.write_text(json.dumps({"made_by": fingerprint, "overwrite": overwrite}))


def _chunks(records: Iterable[SourceRecord], size: int) -> Iterator[list[SourceRecord]]:
    chunk: list[SourceRecord] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _entry(
    job: Job, reports: list[ShardReport], fingerprint: dict[str, Any], refusals: list[Refusal]
) -> dict[str, Any]:  # fmt: skip
    shards = [report.shard for report in reports if report.shard is not None]
    kinds: Counter[str] = sum((Counter(report.kinds) for report in reports), Counter())
    lengths: dict[str, Any] = {"unit": job.tokenizer or "bytes"}
    for what in ("instruction", "target"):
        counts: Counter[int] = Counter()
        for report in reports:
            counts.update({int(length): n for length, n in report.lengths.get(what, {}).items()})
        lengths[what] = quantiles(counts)
    refused = [refusal._asdict() for refusal in refusals] + [entry for report in reports for entry in report.refused]
    path = job.folder / f"{job.split}.refused.jsonl"
    if refused:
        # Names may be anything: what isn't Unicode is written as its number.
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in refused)
    else:
        path.unlink(missing_ok=True)
    return {
        "images": sum(sum(shard["images"]) if "images" in shard else shard["records"] for shard in shards),
        "samples": sum(shard["samples"] for shard in shards),
        "targets": sum(shard["targets"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "kinds": dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0]))),
        "lengths": lengths,
        "refused": dict(Counter(entry["reason"] for entry in refused).most_common()),
        "made_by": fingerprint,
        "shards": shards,
    }


def quantiles(counts: Counter[int]) -> dict[str, int]:
    """Lengths at a few shares of all, nearest rank; {} of nothing."""
    total, result = sum(counts.values()), {}
    for name, share in _QUANTILES.items():
        seen = 0
        for length in sorted(counts):
            seen += counts[length]
            if seen >= share * total:
                result[name] = length
                break
    return result
