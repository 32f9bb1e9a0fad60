"""Small models from configs, real pictures from scikit-learn, shards written through the package's own writer."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from mmprefix.data.shards import write_shard
from mmprefix.decoder import DecoderArgs
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.packing import PackedBatch, collate
from mmprefix.prepare import run as prepare
from mmprefix.processing import (
    IMAGE_TOKEN,
    MMPrefixImageProcessor,
    MMPrefixProcessor,
    TokenizerArgs,
    load_tokenizer,
    text_vocab_size,
)
from mmprefix.sequence import TokenSequence
from mmprefix.vision import ConnectorArgs, VisionArgs

TINY_DECODER = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
TINY_VISION = VisionArgs("test_vit", image_size=32)


def make_model(
    decoder: dict[str, Any] | None = None,
    vision: VisionArgs = TINY_VISION,
    connector: ConnectorArgs = ConnectorArgs(),  # noqa: B008
    visibility: str = "full",
    attention: str | None = None,
) -> tuple[MMPrefixForConditionalGeneration, MMPrefixProcessor]:
    """A tiny random model in eval mode, and its processor with the byte tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(TokenizerArgs(name="byte"), None)
    model = MMPrefixForConditionalGeneration.from_parts(
        vision,
        connector,
        DecoderArgs(config=decoder or TINY_DECODER, attn_implementation=attention),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        prefix_visibility=visibility,
        special_tokens={name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        vocab_size=text_vocab_size(tokenizer),
    )
    # Initial weights give nearly uniform attention, under which a wrong mask hardly shows.
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    processor = MMPrefixProcessor(
        MMPrefixImageProcessor.from_spec(model.config.vision_spec), tokenizer,
        num_image_tokens=model.num_image_tokens, prefix_visibility=visibility,
        shared_prefix=model.config.shared_prefix,
    )  # fmt: skip
    return model.eval(), processor


if "PYTEST_XDIST_WORKER" in os.environ:  # cores are shared out already, also those of processes that tests start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the probe remembers stays out of the user's home; processes that tests start inherit it."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def uninitialized_memory_is_nan() -> Iterator[None]:
    """What a kernel forgets to write is seen, whatever was in that memory before."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="module")  # other modules' tests take transformers' masks back
def model_and_processor() -> tuple[MMPrefixForConditionalGeneration, MMPrefixProcessor]:
    return make_model()


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Two real photographs, 640x427, and an odd crop of one."""
    first, second = (Image.fromarray(image) for image in load_sample_images().images)
    return [first, second, first.crop((10, 20, 111, 53))]


QUESTIONS = [
    ("what is this?", ["a temple"]),
    ("describe", ["a flower", "a red flower in the sun"]),
    ("yes or no", ["no"]),
]


def encode_all(processor: MMPrefixProcessor, questions: Any = QUESTIONS) -> list[TokenSequence]:
    return [processor.encode(instruction, targets) for instruction, targets in questions]


def make_batch(
    processor: MMPrefixProcessor, photos: list[Image.Image], questions: Any = QUESTIONS, **kwargs: Any
) -> PackedBatch:
    """A batch of one photo for each question."""
    pixels = torch.stack([processor.transform(photo) for photo in photos[: len(questions)]])
    kwargs = {"pad_id": processor.pad_id, "visibility": processor.prefix_visibility, **kwargs}
    return collate(encode_all(processor, questions), list(range(len(questions))), pixels, **kwargs)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def colour_record(number: int, side: int = 24) -> tuple[str, bytes, bytes]:
    """A plain coloured picture with two questions about it."""
    colours = {"red": (200, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 200)}
    name = list(colours)[number % 3]
    pixels = np.full((side, side + number % 5, 3), colours[name], np.uint8)
    pixels[:: 2 + number % 3, ::2] //= 2
    samples = [
        {"id": f"{number}-colour", "kind": "colour", "instruction": "which colour?", "target": name},
        {"id": f"{number}-red", "kind": "red", "instruction": "is it red?", "target": "yes" if name == "red" else "no"},
    ]
    return f"{number:04d}", png(Image.fromarray(pixels)), json.dumps(samples).encode()


@pytest.fixture
def colour_shards(tmp_path: Path) -> Callable[..., Path]:
    """Writes train (2 shards) and val shards of coloured pictures and returns their folder."""

    def write(folder: str = "shards", num_train: int = 24, num_val: int = 6) -> Path:
        path = tmp_path / folder
        half = num_train // 2
        write_shard(path / "train-000.tar", [colour_record(n) for n in range(half)])
        write_shard(path / "train-001.tar", [colour_record(n) for n in range(half, num_train)])
        write_shard(path / "val-000.tar", [colour_record(n) for n in range(num_train, num_train + num_val)])
        return path

    return write


@pytest.fixture
def bucket(tmp_path: Path, photos: list[Image.Image]) -> Iterator[tuple[str, str]]:
    """A folder of two shards, and the same in a bucket; `(local folder, remote folder)`."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(5):
        (pictures / f"{n}.png").write_bytes(png(photos[2].rotate(n)))
        (pictures / f"{n}.txt").write_text(f"number {n}")
    assert prepare(["folder", "--images", str(pictures), "--out", str(tmp_path / "set"), "--shard-size", "3"]) == 0
    filesystem = fsspec.filesystem("memory")
    for path in (tmp_path / "set").iterdir():
        filesystem.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    yield str(tmp_path / "set"), "memory://bucket/set"
    filesystem.rm("/bucket", recursive=True)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A folder with a shard of nine records, of which six have no image."""
    from tests.test_images import as_json, tar_of

    members = []
    for n in range(9):
        key, image, payload = colour_record(n)
        if n % 3 == 0:
            members += [(f"{key}.png", image), (f"{key}.json", payload)]
        else:
            members.append((f"{key}.json", as_json(images=0, instruction=f"{n} and one?", target=f"{n + 1}")))
    tar_of(tmp_path / "a.tar", members)
    return tmp_path
