import pytest
import torch

from mmprefix.errors import InputError
from mmprefix.processing import (
    IMAGE_TOKEN,
    MMPrefixProcessor,
    TokenizerArgs,
    load_tokenizer,
    text_vocab_size,
)
from mmprefix.sequence import IGNORE_INDEX


def test_byte_tokenizer_needs_no_download_and_covers_all_text():
    tokenizer = load_tokenizer(TokenizerArgs("byte"), None)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 259)
    text = "Straße 日本 🙂\n\t"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [byte + 3 for byte in text.encode()]
    assert tokenizer.decode(ids) == text
    assert text_vocab_size(tokenizer) == 260
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == 260, "the placeholder needs no place in the vocabulary"


def test_special_tokens_in_text_are_characters(model_and_processor):
    _, processor = model_and_processor
    sequence = processor.encode("a</s><image><pad>", ["b</s>"])
    image, eos = processor.layout.image, processor.layout.eos
    assert sequence.ids.tolist().count(image) == processor.num_image_tokens
    assert sequence.ids.tolist().count(eos) == 1


def test_training_inputs_for_transformers_users(model_and_processor, photos):
    _, processor = model_and_processor
    inputs = processor(photos[:2], ["what?", "and now?"], ["a", "bcd"])
    assert inputs["input_ids"].shape == inputs["labels"].shape == inputs["token_type_ids"].shape
    for row, target in enumerate(("a", "bcd")):
        scored = inputs["labels"][row] != IGNORE_INDEX
        assert torch.equal(scored, inputs["token_type_ids"][row].bool())
        expected = [*(byte + 3 for byte in target.encode()), processor.layout.eos]
        assert inputs["labels"][row][scored].tolist() == expected
        assert torch.equal(inputs["labels"][row][scored], inputs["input_ids"][row][scored])


@pytest.mark.parametrize(
    "call",
    [
        lambda p, images: p(images[:1], ["a", "b"]),
        lambda p, images: p(images[:1], ["a"], ["b", "c"]),
        lambda p, images: p(images[:1]),
    ],
)
def test_unequal_numbers_are_refused(model_and_processor, photos, call):
    with pytest.raises(ValueError, match="expected"):
        call(model_and_processor[1], photos)


def test_limits(model_and_processor):
    _, processor = model_and_processor
    with pytest.raises(
        InputError, match=r"instruction: expected at most 3 tokens \(data.max_instruction_tokens\), got 4: 'abcd'"
    ):
        processor.encode("abcd", ["x"], max_instruction_tokens=3)
    n = processor.num_image_tokens
    both = processor.encode("abcd", ["xyz"], max_instruction_tokens=3, max_target_tokens=1, truncate="both")
    assert both.prefix_length == n + 1 + 3 + 1
    assert both.labels.tolist() == [ord("x") + 3, processor.layout.eos]
    assert processor.encode("abcd", ["xyz"], max_instruction_tokens=4, max_target_tokens=3).prefix_length == n + 6


def test_generated_ids_are_cut_at_eos(model_and_processor):
    _, processor = model_and_processor
    eos = processor.layout.eos
    rows = torch.tensor([[ord("a") + 3, eos, ord("b") + 3], [ord("c") + 3, ord(" ") + 3, ord("d") + 3]])
    assert processor.decode_generated(rows) == ["a", "c d"]


def test_files_in_a_checkpoint_restore_the_processor(model_and_processor, photos):
    _, processor = model_and_processor
    files = processor.to_files()
    assert all(content.dtype == torch.uint8 for content in files.values())
    again = MMPrefixProcessor.from_files(files)
    assert again.layout == processor.layout
    assert again.num_image_tokens == processor.num_image_tokens
    assert again.prefix_visibility == processor.prefix_visibility
    assert torch.equal(again.transform(photos[0]), processor.transform(photos[0]))
