"""`JsonStream` reads what `json.loads` reads, whatever the pieces, and refuses what it refuses."""

import io
import json
import random

import pytest

from mmprefix.data import json_stream
from mmprefix.data.json_stream import JsonStream


def read(content):
    """A whole document by way of members and elements."""
    document = JsonStream(io.BytesIO(content))

    def whole():
        if document.peek() == "{":
            return {name: whole() for name in document.members()}
        if document.peek() == "[":
            return [element for block in document.elements() for element in block]
        return document.value()

    value = whole()
    document.end()
    return value


@pytest.fixture(params=[1, 2, 7, 64, 1 << 18])
def piece(request, monkeypatch):
    """Bytes that are read at a time: everything falls on the border of two pieces."""
    monkeypatch.setattr(json_stream, "_PIECE", request.param)
    return request.param


DOCUMENTS = [
    {"info": {"year": 2014}, "images": [{"id": n, "file_name": f"é{n}}}.jpg"} for n in range(30)], "more": [[], {}, ""]},
    {"annotations": [{"answers": [{"answer": "} ,]"}, {"answer": '"\\'}], "n": 1.5e3}] * 9, "last": 12345},
    [{"a": [{"b": {"c": [None, True, False]}}]}, 12, "x", [1, {"y": 2}], {}],
    [], {}, [[]], [{}], [1, 22, 333], -12.5, "\ud83d\ude00 \ud800", True, None, {"": {"": []}},
]  # fmt: skip


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("document", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_reading_in_pieces_matches_json(piece, document, indent):
    for ascii_only in (True, False):
        content = json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "replace")
        assert read(content) == json.loads(content)
        assert read(b"\xef\xbb\xbf \n" + content + b" \r\n") == json.loads(content)


def test_verdicts_on_damaged_documents_match_json(piece):
    draw, refused = random.Random(piece), 0
    for number in range(600):
        content = bytearray(json.dumps(DOCUMENTS[number % 4], separators=(",", ":") if number % 2 else None).encode())
        for _ in range(draw.choice((1, 1, 2))):
            at = draw.randrange(len(content) + 1)
            content[at : at + draw.choice((0, 1, 1, 30))] = draw.choice(
                (b"", b",", b"]", b"}", b"{", b'"', b":", b"1", b"\xff", b"[]")
            )
        try:
            expected = json.loads(bytes(content))
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match=r"character|codec"):
                read(bytes(content))
        else:
            assert read(bytes(content)) == expected
    assert 100 < refused < 600


@pytest.mark.parametrize(
    "content", [b"", b" ", b"[NaN]", b"[1,]", b"[{},]", b'{"a":1,}', b"[] []", b"{1:2}", b"[{}", b"[-Infinity]"]
)
def test_what_is_no_json_is_refused(piece, content):
    with pytest.raises(ValueError):  # noqa: PT011
        read(content)


def test_an_array_of_objects_comes_in_blocks_and_little_of_it_is_in_memory():
    content = json.dumps({"a": [{"n": n} for n in range(100_000)], "b": 1}).encode()
    document, longest, total = JsonStream(io.BytesIO(content)), 0, 0
    for name in document.members():
        if name == "a":
            for block in document.elements():
                longest, total = max(longest, len(block)), total + len(block)
                assert len(document._text) < 3 * json_stream._PIECE
        else:
            document.skip()
    document.end()
    assert total == 100_000
    assert 1000 < longest < 50_000


def test_a_broken_value_is_not_read_to_the_end_of_the_file(monkeypatch):
    monkeypatch.setattr(json_stream, "_PIECE", 100)
    monkeypatch.setattr(json_stream, "_MAX_VALUE", 1000)
    file = io.BytesIO(b'["' + b"x" * 100_000)
    with pytest.raises(ValueError, match="character 1: expected JSON"):
        list(JsonStream(file).elements())
    assert file.tell() < 20_000
