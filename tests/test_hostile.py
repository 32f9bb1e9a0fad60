"""Corrupt shards and images, a thousand of them: every loss has a name, nothing crashes and nothing hangs."""

import io
import json
import random
import re
import tarfile
import time
import zlib

import pytest
from PIL import Image

from mmprefix.data.images import UndecodableImageError, decode_image, decode_levels
from mmprefix.data.index import write_split
from mmprefix.data.loading import EncodedRecord, RecordDataset, TextLimits
from mmprefix.data.shards import ShardCollection
from mmprefix.errors import InputError
from mmprefix.packing import BadSample
from mmprefix.vision import as_levels
from tests.conftest import make_model

NUM_RECORDS = 4
NUM_MUTANTS = 1000


def member(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def shard_of(records):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for names in records:
            for name, content in names:
                member(tar, name, content)
    return buffer.getvalue()


def huge_png(chosen):
    """A few bytes that claim to be a picture of up to 2^31 pixels a side."""
    buffer = io.BytesIO()
    Image.new("L", (3, 3)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = chosen.choice([2**15, 2**20, 2**31 - 1]).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


BAD_JSON = [b"", b"{", b"[" * 5000, b"null", b"NaN", b"[]", b'{"instruction": 1, "target": "x"}', b'{"instruction": "q"}',
            b'{"instruction": "q", "target": ""}', b"\xff\xfe", b'{"instruction": "\\ud800", "target": "x"}',
            b'{"instruction": "q", "targets": {"a": 1}}', b"1e999", b'{"__reduce__": ["os.system", "true"]}']  # fmt: skip
PICKLE = b"cos\nsystem\n(S'touch /tmp/mmprefix-was-here'\ntR."


@pytest.fixture(scope="module")
def records(photos):
    """Names and contents of a shard's members."""
    made = []
    for n, form in enumerate(("JPEG", "PNG", "WEBP", "GIF")):
        buffer = io.BytesIO()
        photos[n % 3].resize((40, 30)).save(buffer, form)
        payload = json.dumps({"instruction": f"what {n}?", "target": f"answer {n}"}).encode()
        made.append([(f"{n:04d}.{form.lower()}", buffer.getvalue()), (f"{n:04d}.json", payload)])
    return made


def mutant(records, chosen):
    """A shard with something wrong in it, and what."""
    records = [list(record) for record in records]
    n = chosen.randrange(len(records))
    (image_name, image), (json_name, _) = records[n]
    how = chosen.choice([
        "bits", "header bits", "truncated shard", "truncated image", "image bits", "wrong suffix", "huge", "bad json",
        "no image", "no json", "pickle", "path", "link", "twice", "garbage", "size field",
    ])  # fmt: skip
    if how == "truncated image":
        records[n][0] = (image_name, image[: chosen.randrange(len(image))])
    elif how == "image bits":
        content = bytearray(image)
        for _ in range(chosen.randrange(1, 30)):
            content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
        records[n][0] = (image_name, bytes(content))
    elif how == "wrong suffix":
        records[n][0] = (f"{n:04d}.{chosen.choice(['txt', 'jpg', 'png', 'tiff', 'npy'])}", image)
    elif how == "huge":
        records[n][0] = (image_name, huge_png(chosen))
    elif how == "bad json":
        records[n][1] = (json_name, chosen.choice(BAD_JSON))
    elif how == "no image":
        del records[n][0]
    elif how == "no json":
        del records[n][1]
    elif how == "pickle":
        suffix = chosen.choice(["pkl", "pyd", "pth", "npy", "json", "jpg"])
        records[n].append((f"{n:04d}.{suffix}", PICKLE))
    elif how == "path":
        prefix = chosen.choice(["/etc/", "../../", "a/../../b/", "\\\\host\\"])
        records[n] = [(prefix + name, content) for name, content in records[n]]
    elif how == "twice":
        records.append(records[n])
    content = bytearray(shard_of(records))
    if how == "bits":
        for _ in range(chosen.randrange(1, 20)):
            content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
    elif how in ("header bits", "size field"):
        starts = [start for start in range(0, len(content), 512) if content[start + 257 : start + 262] == b"ustar"]
        start = chosen.choice(starts)
        if how == "size field":
            content[start + 124 : start + 136] = chosen.choice(
                [b"77777777777\0", b"\x80" + b"\xff" * 11, b"-0000000001\0", b"abc\0" * 3]
            )
            content[start + 148 : start + 156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
        else:
            content[start + chosen.randrange(512)] ^= 1 << chosen.randrange(8)
    elif how == "truncated shard":
        del content[chosen.randrange(len(content)) :]
    elif how == "link":
        start = 0
        content[start + 156] = ord(chosen.choice("12345678xgLKS"))
        content[start + 148 : start + 156] = b" " * 8
        content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    elif how == "garbage":
        content = bytearray(chosen.randbytes(chosen.randrange(1, 3000)))
    return how, bytes(content)


def read_all(path, processor):
    """``(good, bad)``, or the error that the whole shard was refused with."""
    try:
        shards = ShardCollection(str(path), "data.train")
    except InputError as error:
        return error
    dataset = RecordDataset(shards, processor, TextLimits(None, None, "none"))
    items = [dataset[0, n] for n in range(len(shards))]
    return [i for i in items if isinstance(i, EncodedRecord)], [i for i in items if isinstance(i, BadSample)]


@pytest.mark.parametrize("indexed", [False, True], ids=["scanned", "indexed"])
def test_a_thousand_mutants(tmp_path, records, indexed):
    processor = make_model()[1]
    good = shard_of(records)
    path = tmp_path / "x.tar"
    path.write_bytes(good)
    whole = ShardCollection(str(path), "data.train")
    assert len(read_all(path, processor)[0]) == NUM_RECORDS
    entry = {
        "name": "x.tar",
        "records": NUM_RECORDS,
        "samples": NUM_RECORDS,
        "members": whole._members.flatten().tolist(),
    }
    chosen = random.Random(0)
    outcomes, slowest = {}, 0.0
    for number in range(NUM_MUTANTS // 2):
        how, content = mutant(records, chosen)
        path.write_bytes(content)
        if indexed:  # an index that was made for the shard before it was harmed
            write_split(tmp_path, "x", {"shards": [{**entry, "bytes": len(content)}]})
        start = time.monotonic()
        outcome = read_all(path, processor)
        slowest = max(slowest, time.monotonic() - start)
        if isinstance(outcome, InputError):
            assert path.name in str(outcome), f"the shard is not named: {outcome}"
            outcomes.setdefault(how, set()).add("refused")
            continue
        usable, lost = outcome
        outcomes.setdefault(how, set()).add("bad samples" if lost else "read")
        assert all(bad.shard == str(path) and bad.key and bad.reason for bad in lost), (number, how)
        assert len(usable) + len(lost) == NUM_RECORDS, f"{number}: {how}: a loss without a name"
    assert slowest < 5, "a mutant hung"
    assert len(outcomes) == 16, "each way to harm a shard was tried"
    for how in ("no image", "no json", "garbage", "bad json"):
        assert "read" not in outcomes[how], how
    assert outcomes["huge"] == {"bad samples"} or indexed
    import pathlib

    assert not pathlib.Path("/tmp/mmprefix-was-here").exists(), "a pickle was loaded"


def test_decoding_takes_no_picture_for_what_it_is_not(photos):
    """2,000 harmed pictures of each format: a picture, or one line that says why not."""
    chosen = random.Random(1)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        buffer = io.BytesIO()
        photos[0].resize((24, 18)).save(buffer, form)
        whole = buffer.getvalue()
        failed, lines = 0, set()
        for _ in range(300):
            content = bytearray(whole)
            for _ in range(chosen.randrange(1, 10)):
                content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
            if chosen.random() < 0.3:
                del content[chosen.randrange(len(content)) :]
            try:
                picture = decode_image(bytes(content))
                assert picture.mode == "RGB"
            except UndecodableImageError as error:
                failed += 1
                lines.add(str(error).count("\n"))
                with pytest.raises(UndecodableImageError, match=re.escape(str(error))):
                    decode_levels(bytes(content))
            else:
                apart = decode_levels(bytes(content)).int() - as_levels(picture).int()
                assert apart.abs().max() <= 1, "what can be guessed of a harmed picture is guessed alike"
        assert lines <= {0}
        assert failed > 5, f"{form}: nothing was harmed"
