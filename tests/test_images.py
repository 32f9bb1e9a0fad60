"""Samples with several images, with images between words, and without any: in one batch, and equal to each alone."""

import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mmprefix.cli import run
from mmprefix.data.index import INDEX_NAME
from mmprefix.data.loading import Collator, EncodedImage, EncodedRecord, RecordDataset, TextLimits
from mmprefix.data.shards import ShardCollection
from mmprefix.decoding import answers
from mmprefix.errors import InputError
from mmprefix.masks import dense_mask, visible_pairs
from mmprefix.packing import Reference, collate
from mmprefix.sequence import PREFIX_BRANCH, Region, TokenSequence
from mmprefix.training.module import prompts_of
from tests.conftest import colour_record, make_model, png
from tests.reference import losses_of_ids
from tests.test_resume import fit

# (pictures, instruction, targets): pictures between words, in front, twice the same, none.
SAMPLES = [
    ((0, 1), "first <image> and then <image>?", ["a temple", "two"]),
    ((0,), "what is this?", ["a temple"]),
    ((), "two and two?", ["four", "4"]),
    ((2, 1, 0), "which is odd?", ["the first"]),
    ((0, 1), "which <image> or <image> is red?", ["the second"]),
    ((1,), "<image>", ["a flower"]),
]
NO_LIMITS = TextLimits(None, None, "none")


def records_of(processor, photos, samples=SAMPLES):
    return [
        EncodedRecord(
            tuple(EncodedImage(str(n), processor.transform.views(photos[n])) for n in pictures),
            (processor.encode(instruction, targets, views=[1] * len(pictures)),),
            (),
        )
        for pictures, instruction, targets in samples
    ]


def written_out(processor, pictures, instruction):
    """The prefix by hand: pictures in front of all text stand before BOS."""
    image, text = [processor.layout.image] * processor.num_image_tokens, processor.format.text_ids
    parts = instruction.split("<image>")
    if len(parts) == 1 or instruction == "<image>":
        ids = image * len(pictures) + [processor.tokenizer.bos_token_id, *text("".join(parts))]
    else:
        ids = [processor.tokenizer.bos_token_id, *text(parts[0])]
        for part in parts[1:]:
            ids += [*image, *text(part)]
    return [*ids, *text("\n")]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("visibility", ["full", "nested", "causal"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_batch_of_all_kinds_matches_each_sample_alone(name, visibility, packed, photos):
    gemma = {
        "model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    model, processor = make_model(gemma if name == "gemma3" else None, visibility=visibility)
    batch = Collator(processor.pad_id, visibility, packed=packed).train(records_of(processor, photos))
    assert batch.pixel_values.shape[0] == 3, "each picture is encoded once"
    assert bool(batch.plan.calls) == packed
    total, count = model.target_loss(batch)
    model.zero_grad()
    (total / count).backward()
    fast = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    losses = []
    for pictures, instruction, targets in SAMPLES:
        pixels = torch.stack([processor.transform(photos[n]) for n in pictures]) if pictures else None
        scored = [[*processor.format.text_ids(target), processor.layout.eos] for target in targets]
        losses += losses_of_ids(model, written_out(processor, pictures, instruction), pixels, scored)
    expected = torch.cat(losses).mean()
    torch.testing.assert_close(total / count, expected, atol=1e-5, rtol=1e-5)
    model.zero_grad()
    expected.backward()
    for parameter, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(
                fast[parameter], p.grad, atol=3e-5, rtol=2e-3, msg=lambda m, q=parameter: f"{q}: {m}"
            )


def test_questions_share_pictures_only_where_these_stand_at_the_same_places(photos):
    _, processor = make_model(visibility="nested")
    samples = [
        ((0, 1), "which is red?", ["b"]), ((0, 1), "and which is not?", ["a"]),  # shared
        ((0, 1), "is <image> or <image> red?", ["b"]), ((0, 1), "no <image> or <image>?", ["b"]),  # same places
        ((0, 1), "<image> <image> later", ["b"]), ((1, 0), "which is red?", ["a"]),
        ((), "1?", ["1"]), ((), "2?", ["2"]),
    ]  # fmt: skip
    batch = Collator(processor.pad_id, "nested", packed=True).train(records_of(processor, photos, samples))
    assert batch.image_of.tolist() == [[0, 1], [0, 1], [0, 1], [1, 0], [-1, -1], [-1, -1]]
    assert batch.num_samples == 8
    assert int((batch.plan.region == int(Region.IMAGE)).sum()) == 4 * 2 * processor.num_image_tokens


def test_visible_pairs_are_the_area_of_the_mask_wherever_pictures_stand():
    prefix = [5, 5, 99, 99, 6, 99, 7]
    for ids in (prefix, [99, *prefix], [5, 6], [*prefix, 99]):
        sequence = TokenSequence.from_ids(99, ids, [[8], [9, 9]], (2,))
        assert sequence.num_image_tokens == ids.count(99)
        assert (sequence.branches == PREFIX_BRANCH).sum() == len(ids)
        for visibility in ("full", "nested", "causal"):
            tokens = collate([sequence], [range(1)], None, pad_id=0, visibility=visibility).plan.tokens
            assert visible_pairs(sequence, visibility) == int(dense_mask(tokens, visibility).sum())


def test_pictures_and_their_tokens_must_match():
    sequence = TokenSequence.from_ids(99, [99, 99, 99, 5], [[8]], (2,))
    with pytest.raises(ValueError, match="expected images for 3 image tokens, got 2"):
        collate([sequence], [(0, 1)], None, pad_id=0)
    with pytest.raises(ValueError, match="expected images for 3 image tokens, got 0"):
        collate([sequence], [()], None, pad_id=0)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("visibility", ["full", "nested"])
def test_ragged_prompts_generate_what_each_does_alone(visibility, num_beams, photos):
    model, processor = make_model(visibility=visibility)
    batch = Collator(processor.pad_id, visibility).evaluate(records_of(processor, photos))
    batch = replace(batch, references=tuple(Reference(str(n)) for n in range(len(SAMPLES))))
    settings = {"max_new_tokens": 6, "num_beams": num_beams, "do_sample": False}
    with torch.no_grad():
        prompts = prompts_of(batch, model.image_tokens_of(batch.prompts))
        ids = answers(model, prompts, rows=len(SAMPLES) - 1, max_new_tokens=6, num_beams=num_beams)
    texts = processor.decode_ids(ids)
    through_pixels = model.generate(
        **processor([[photos[n] for n in pictures] for pictures, _, _ in SAMPLES], [text for _, text, _ in SAMPLES]),
        **settings,
    )[:, batch.prompts.input_ids.shape[1] :]
    assert processor.decode_generated(through_pixels) == texts
    for (pictures, instruction, _), text in zip(SAMPLES, texts, strict=True):
        inputs = processor([photos[n] for n in pictures] or None, instruction)
        assert inputs["input_ids"][0].tolist() == written_out(processor, pictures, instruction)
        alone = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        assert processor.decode_generated(alone) == [text]
    assert len(set(texts)) > 1


def test_marks_must_be_as_many_as_images(model_and_processor, photos):
    _, processor = model_and_processor
    with pytest.raises(InputError, match=r"expected <image> once for each image \(1\), or not at all, got it 2 times"):
        processor(photos[0], "<image> and <image>")
    with pytest.raises(InputError, match=r"each image \(0\), or not at all, got it 1 times"):
        processor(text="an <image>")
    with pytest.raises(ValueError, match="expected the images of each text, got those of 3 for 2 texts"):
        processor(photos, ["a", "b"])


# In shards


def tar_of(path, members):
    import tarfile

    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def as_json(**fields):
    return json.dumps({"instruction": "what?", "target": "a", **fields}).encode()


@pytest.fixture
def mixed_shard(tmp_path, photos):
    def colour(*rgb):
        return png(Image.new("RGB", (8, 8), rgb))

    # Ten of them: by name, .10. would stand before .2.
    many = [(f"b.{n}.png", colour(n, 0, 0)) for n in range(11)]
    return tar_of(tmp_path / "x.tar", [
        ("a.png", colour(1, 2, 3)), ("a.json", as_json()),
        *sorted(many), ("b.json", as_json(images=11, instruction="which?")),
        ("c.json", as_json(images=0)),
    ])  # fmt: skip


def test_records_hold_several_images_or_none(mixed_shard, model_and_processor):
    _, processor = model_and_processor
    shards = ShardCollection(mixed_shard, "data.train")
    assert shards.describe() == "1 shard, 3 records, 12 images, 3 samples"
    assert [shards.num_images(n) for n in range(3)] == [1, 11, 0]
    assert [shards.key(n) for n in range(3)] == ["a", "b", "c"]
    reds = [Image.open(io.BytesIO(shards.image_bytes(1, n))).getpixel((0, 0))[0] for n in range(11)]
    assert reds == list(range(11)), "in the order of their numbers"
    dataset = RecordDataset(shards, processor, NO_LIMITS)
    batch = Collator(processor.pad_id, "full", packed=True).train([dataset[0, n] for n in range(3)])
    assert batch.image_of.tolist() == [[0, *[-1] * 10], list(range(1, 12)), [-1] * 11]
    only_text = Collator(processor.pad_id, "full", packed=True).train([dataset[0, 2]])
    assert only_text.pixel_values is None
    assert only_text.image_of.shape == (1, 0)


def test_an_index_of_such_records_is_what_a_scan_finds(mixed_shard, tmp_path):
    scanned = ShardCollection(mixed_shard, "data.train")
    members = scanned._members
    shard = {
        "name": "x.tar", "bytes": (tmp_path / "x.tar").stat().st_size, "records": 3, "samples": 3,
        "images": [1, 11, 0], "members": members.flatten().tolist(),
    }  # fmt: skip
    index = tmp_path / INDEX_NAME
    index.write_text(json.dumps({"version": 1, "splits": {"x": {"shards": [shard]}}}))
    indexed = ShardCollection(mixed_shard, "data.train")
    assert indexed.indexed == 1
    for n in range(3):
        assert indexed.samples(n) == scanned.samples(n)
        assert indexed.num_images(n) == scanned.num_images(n)
        for k in range(scanned.num_images(n)):
            assert indexed.image_bytes(n, k) == scanned.image_bytes(n, k)
    for wrong, message in (
        ([1, 10, 1], "x.tar: b.json: expected JSON"),
        ([1, 11], "expected a number in `images` for each of 3 records"),
        ([1, 12, -1], "expected numbers of images in `images`"),
        ([1, 11, 1], "expected 32 numbers in `members`, for 13 images and 3 records"),
    ):
        index.write_text(json.dumps({"version": 1, "splits": {"x": {"shards": [{**shard, "images": wrong}]}}}))
        with pytest.raises(InputError, match=message):
            _ = [ShardCollection(mixed_shard, "data.train").samples(n) for n in range(3)]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["a.json"], "a: expected an image"),
        (["a.0.png", "a.json"], None),
        (["a.0.png", "a.1.png", "a.json"], r"expected an image .*, got .0.png, .1.png, .json"),
    ],
)
def test_images_that_a_record_should_have_are_not_missed_in_silence(members, message, tmp_path):
    content = {"json": as_json()}
    path = tar_of(tmp_path / "x.tar", [(m, content.get(m[2:], png(Image.new("RGB", (2, 2))))) for m in members])
    if message is None:
        assert len(ShardCollection(path, "data.train")) == 1
        return
    with pytest.raises(InputError, match=message):
        ShardCollection(path, "data.train")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": -1}, "expected a number of `images` from 0 to 1024, got int '-1'"),
        ({"images": True}, "expected a number of `images`"),
        ({"images": "2"}, "expected a number of `images`"),
        ({"instruction": "<image><image>"}, "expected <image> once for each image"),
        ({"instruction": ["a", "b"]}, "expected turns of user and assistant, the user's last, got 2 turns"),
        ({"instruction": []}, "expected a string `instruction`, or a list of turns"),
        ({"instruction": ["a", 3, "b"]}, "expected a string `instruction`, or a list of turns"),
    ],
)
def test_bad_samples_with_images_and_turns_are_named(fields, message, tmp_path):
    path = tar_of(tmp_path / "x.tar", [("a.png", png(Image.new("RGB", (2, 2)))), ("a.json", as_json(**fields))])
    with pytest.raises(InputError, match=message) as error:
        ShardCollection(path, "data.train")
    assert "x.tar: a" in str(error.value)


# In a run


def test_ranks_without_a_picture_wait_for_nobody_and_learn_the_same(tmp_path):
    """Real processes with gloo: most steps have a rank with text only, some have only such."""
    records = []
    for n in range(10):
        key, image, payload = colour_record(n)
        if n % 3 == 0:
            records += [(f"{key}.png", image), (f"{key}.json", payload)]
        else:
            records.append((f"{key}.json", as_json(images=0, instruction=f"{n} and one?", target=f"{n + 1}")))
    tar_of(tmp_path / "a.tar", records)
    once = ["--trainer.max_epochs", "1", "--trainer.limit_val_batches", "1.0"]
    ids = {}
    for name, arguments in (
        ("one", ["--data.batch_size", "2"]),
        ("two", ["--data.batch_size", "1", "--trainer.devices", "2", "--trainer.strategy", "ddp"]),
    ):
        ids[name] = [i for line in fit(tmp_path, name, 5, *arguments, *once) for i in line["ids"]]
    assert sorted(ids["one"]) == sorted(ids["two"])
    weights = [
        torch.load(next((tmp_path / name).glob("*.ckpt")), weights_only=True)["state_dict"] for name in ("one", "two")
    ]
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, atol=2e-5, rtol=1e-4)
    lines = (tmp_path / "two-run" / "predictions.jsonl").open().readlines()
    assert len(lines) == 4 * 2 + 6, "text-only samples are answered, too"


def test_generate_takes_several_pictures_or_none(tmp_path, photos, capfd):
    model, processor = make_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for n, photo in enumerate(photos):
        photo.save(tmp_path / f"{n}.png")
    start = ["generate", "--checkpoint", str(tmp_path / "model"), "--max_new_tokens", "5"]
    for number, instruction in ((3, "which?"), (2, "is <image> <image>?"), (0, "1 + 1?")):
        pictures = [str(tmp_path / f"{n}.png") for n in range(number)]
        assert run([*start, "--instruction", instruction, *(["--image", *pictures] if pictures else [])]) == 0
        inputs = processor(photos[:number] or None, instruction)
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert capfd.readouterr().out.strip() == processor.decode_generated(expected)[0].strip()
    assert (
        run(
            [
                *start,
                "--instruction",
                "a <image>",
                "--image",
                *pictures,
                str(tmp_path / "0.png"),
                str(tmp_path / "1.png"),
            ]
        )
        == 2
    )
    assert "expected <image> once for each image (2), or not at all, got it 1 times" in capfd.readouterr().err
