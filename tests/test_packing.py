import pickle

import pytest
import torch

from mmprefix.data.parcel import Parcel
from mmprefix.masks import PADDING_SEGMENT, dense_mask
from mmprefix.packing import (
    EvaluationBatch,
    PrefixPlan,
    Reference,
    collate,
    collate_prompts,
    first_fit,
    group_by_length,
    map_tensors,
)
from mmprefix.sequence import IGNORE_INDEX, PREFIX_BRANCH, PromptLayout, Region, TokenSequence

LAYOUT = PromptLayout(image=99, bos=1, separator=(7,), eos=2)


@pytest.fixture
def sequences():
    return [
        TokenSequence.build(LAYOUT, 2, [10, 11], [[20, 21]]),
        TokenSequence.build(LAYOUT, 2, [12], [[30], [31, 32]]),
    ]


def test_rows_of_their_own(sequences):
    batch = collate(sequences, [0, 1], torch.zeros(2, 3, 4, 4), pad_id=0)
    assert batch.input_ids.tolist() == [
        [99, 99, 1, 10, 11, 7, 20, 21, 2, 0],
        [99, 99, 1, 12, 7, 30, 2, 31, 32, 2],
    ]
    assert batch.attention_mask.tolist() == [[1] * 9 + [0], [1] * 10]
    assert batch.position_ids[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7]
    assert batch.plan.segment[0].tolist() == [0] * 9 + [PADDING_SEGMENT]
    # Label positions point into the flattened rows of 10: the last prefix position predicts each first token.
    assert batch.plan.label_positions.tolist() == [5, 6, 7, 14, 15, 14, 17, 18]
    assert batch.labels.tolist() == [20, 21, 2, 30, 2, 31, 32, 2]
    assert batch.target_lengths.tolist() == [3, 3, 3, 2, 2, 3, 3, 3]
    assert batch.plan.image_positions.tolist() == [0, 1, 10, 11]
    assert batch.plan.image_sources.tolist() == [0, 1, 2, 3]
    assert batch.num_tokens == 19
    assert batch.padding_share == pytest.approx(1 / 20)


def test_packed_row_has_prefixes_first_and_a_call_for_each_level(sequences):
    batch = collate(sequences, [0, 0], torch.zeros(1, 3, 4, 4), pad_id=0, packed=True)
    # Shorter prefix first; then targets, by what they see and their own length.
    assert batch.input_ids.tolist() == [[99, 99, 1, 12, 7, 99, 99, 1, 10, 11, 7, 30, 2, 31, 32, 2, 20, 21, 2]]
    assert batch.plan.segment.tolist() == [[1] * 5 + [0] * 6 + [1] * 5 + [0] * 3]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 5, 6, 5, 6, 7, 6, 7, 8]]
    # Labels keep the order of the sequences, wherever their tokens stand.
    assert batch.labels.tolist() == [20, 21, 2, 30, 2, 31, 32, 2]
    assert batch.plan.label_positions.tolist() == [10, 16, 17, 4, 11, 4, 13, 14]
    assert batch.plan.image_positions.tolist() == [5, 6, 0, 1]
    assert batch.plan.image_sources.tolist() == [0, 1, 0, 1]
    assert batch.padding_share == 0
    assert batch.num_samples == 2
    prefixes, targets = batch.plan.calls
    assert (prefixes.start, prefixes.stop, prefixes.key_index, prefixes.causal) == (0, 11, None, False)
    assert prefixes.cu_q.tolist() == prefixes.cu_k.tolist() == [0, 5, 11]
    assert (targets.start, targets.stop, targets.causal) == (11, 19, True)
    assert targets.cu_q.tolist() == [0, 2, 5, 8]
    assert targets.cu_k.tolist() == [0, 7, 15, 24]
    keys = targets.key_index.tolist()
    assert keys[:7] == [0, 1, 2, 3, 4, 11, 12]
    assert keys[7:15] == [0, 1, 2, 3, 4, 13, 14, 15]
    assert keys[15:] == [5, 6, 7, 8, 9, 10, 16, 17, 18]


def test_nested_questions_share_the_image_in_three_calls(sequences):
    joined = TokenSequence.on_one_image(sequences)
    batch = collate([joined], [0], torch.zeros(1, 3, 4, 4), pad_id=0, visibility="nested", packed=True)
    assert batch.input_ids.tolist() == [[99, 99, 1, 12, 7, 1, 10, 11, 7, 30, 2, 31, 32, 2, 20, 21, 2]]
    assert batch.plan.question.tolist() == [[0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch.num_samples == 2
    image, instructions, targets = batch.plan.calls
    assert (image.start, image.stop, instructions.stop, targets.stop) == (0, 2, 9, 17)
    assert [call.causal for call in batch.plan.calls] == [False, False, True]
    assert instructions.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8]
    assert targets.key_index.tolist()[:7] == [0, 1, 2, 3, 4, 9, 10]
    assert targets.key_index.tolist()[-9:] == [0, 1, 5, 6, 7, 8, 14, 15, 16]


@pytest.mark.parametrize("visibility", ["full", "nested", "causal"])
def test_calls_are_the_rule(sequences, visibility):
    """Whom the calls let each token see, pair by pair, is what the rule says."""
    if visibility == "nested":
        sequences = [TokenSequence.on_one_image(sequences), sequences[0]]
    plan = collate(sequences, [0, 1], None, pad_id=0, visibility=visibility, packed=True, bucket=4).plan
    total = plan.segment.shape[1]
    seen = torch.zeros(total, total, dtype=torch.bool)
    for call in plan.calls:
        keys = torch.arange(call.start, call.stop) if call.key_index is None else call.key_index
        for block in range(len(call.cu_q) - 1):
            queries = torch.arange(call.start, call.stop)[call.cu_q[block] : call.cu_q[block + 1]]
            of_block = keys[call.cu_k[block] : call.cu_k[block + 1]]
            assert len(queries) <= call.max_q
            assert len(of_block) <= call.max_k
            for i, query in enumerate(queries):
                last = len(of_block) - len(queries) + i + 1 if call.causal else len(of_block)
                seen[query, of_block[:last]] = True
    real = plan.segment[0] != PADDING_SEGMENT
    assert not real.all(), "there must be padding"
    expected = dense_mask(plan.tokens, visibility)[0]
    assert torch.equal(seen[real], expected[real]), "padding must not be seen either"


def test_a_question_without_text_follows_its_image():
    bare = PromptLayout(image=99, bos=None, separator=(), eos=2)
    questions = [TokenSequence.build(bare, 2, text, [[5, 6]]) for text in ([10, 11], [], [12])]
    joined = TokenSequence.on_one_image(questions)
    assert joined.label_positions.tolist() == [3, 4, 5, 1, 7, 8, 10, 11, 12]
    batch = collate([joined], [0], None, pad_id=0, visibility="nested", packed=True)
    targets = batch.plan.calls[-1]
    lengths = sorted((targets.cu_k[1:] - targets.cu_k[:-1]).tolist())
    assert lengths == [2 + 3, 2 + 1 + 3, 2 + 2 + 3], "its target sees the image and itself"
    assert batch.visible_pairs == int(dense_mask(batch.plan.tokens, "nested").sum())


def test_buckets_round_up_parts_labels_and_bounds(sequences):
    batch = collate(sequences, [0, 1], torch.zeros(2, 3, 4, 4), pad_id=0, packed=True, bucket=8)
    assert [call.stop - call.start for call in batch.plan.calls] == [16, 8]
    assert batch.plan.calls[1].key_index.numel() % 8 == 0
    assert batch.labels.tolist() == [20, 21, 2, 30, 2, 31, 32, 2]
    ragged = collate(sequences[:1], [0], torch.zeros(1, 3, 4, 4), pad_id=0, packed=True, bucket=8)
    assert ragged.labels.tolist() == [20, 21, 2] + [IGNORE_INDEX] * 5
    assert ragged.plan.label_positions.numel() == 8
    assert all(call.max_q % 64 == 0 for call in batch.plan.calls)


def test_first_fit_puts_each_item_into_one_bin_that_holds_it():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (500,), generator=generator).tolist()
    bins = first_fit(lengths, 100, 7)
    assert sorted(item for one in bins for item in one) == list(range(500))
    assert max(sum(lengths[item] for item in one) for one in bins) <= 100
    assert max(map(len, bins)) <= 7
    assert first_fit([60, 50, 40, 40, 10], 100, 9) == [[0, 2], [1, 3, 4]]
    assert first_fit([1] * 5, 100, 2) == [[0, 1], [2, 3], [4]]
    assert first_fit([], 10, 1) == []
    with pytest.raises(ValueError, match="at most 10 tokens, got one of 11"):
        first_fit([3, 11], 10, 4)


def test_first_fit_leaves_little_room_on_ragged_captions():
    """An image of 196 tokens, an instruction of 4, five captions of 8 to 20 tokens and their ends."""
    generator = torch.Generator().manual_seed(0)
    captions = torch.randint(9, 22, (2000, 5), generator=generator).sum(1)
    lengths = (200 + captions).tolist()
    for max_tokens in (4096, 8192):
        bins = first_fit(lengths, max_tokens, 64)
        assert 1 - sum(lengths) / (len(bins) * max_tokens) < 0.05, max_tokens


def test_group_by_length_counts_the_padding():
    lengths, rows = [10, 3, 9, 2, 10], [1, 2, 1, 1, 1]
    bins = group_by_length(lengths, rows, 20, 9)
    assert bins == [[0, 4], [2], [1, 3]] or bins == [[0, 4], [2, 1], [3]] or bins == [[4, 0], [2], [1, 3]]
    for one in bins:
        assert sum(rows[i] for i in one) * max(lengths[i] for i in one) <= 20
    with pytest.raises(ValueError, match="at most 20 tokens, got one of 24"):
        group_by_length([12], [2], 20, 9)


def test_prompts_end_in_the_same_column(sequences):
    prompts = collate_prompts(sequences, [0, 1], None, pad_id=0)
    assert prompts.input_ids.tolist() == [[99, 99, 1, 10, 11, 7], [0, 99, 99, 1, 12, 7]]
    assert prompts.attention_mask.tolist() == [[1] * 6, [0] + [1] * 5]


def test_plan_of_a_prompt_and_its_generated_tokens():
    mask = torch.tensor([[0, 1, 1]])
    plan = PrefixPlan.from_prompt(mask, torch.tensor([[False, True, False]]))
    assert plan.segment.tolist() == [[PADDING_SEGMENT, 0, 0]]
    assert plan.region.tolist() == [[int(Region.INSTRUCTION), int(Region.IMAGE), int(Region.INSTRUCTION)]]
    assert (plan.branch == PREFIX_BRANCH).all()
    longer = plan.padded_to(5)
    assert longer.segment.tolist() == [[PADDING_SEGMENT, 0, 0, 0, 0]]
    assert longer.branch[0, 3:].tolist() == [0, 0]
    assert longer.region[0, 3:].tolist() == [int(Region.TARGET)] * 2
    assert longer.position.tolist() == [[0, 1, 2, 3, 4]]
    assert plan.padded_to(2) is plan


def test_empty_batch(sequences):
    batch = collate([], [], None, pad_id=0)
    assert batch.num_samples == 0
    assert batch.labels.numel() == 0
    assert batch.padding_share == 1.0


@pytest.mark.parametrize("packed", [False, True])
def test_a_parcel_holds_the_batch_in_one_tensor(sequences, packed):
    """Odd shapes and dtypes, an empty one, a transposed one, and a batch within a batch."""
    pixels = torch.arange(2 * 3 * 5 * 7, dtype=torch.uint8).view(2, 3, 7, 5).transpose(2, 3)
    targets = collate(sequences, [0, 1], None, pad_id=0, packed=packed)
    targets.image_features = torch.randn(1, 3, 3).bfloat16()
    targets.label_datasets = torch.zeros(0, dtype=torch.int64)
    prompts = collate_prompts(sequences, [(0,), (1,)], pixels, pad_id=0)
    batch = EvaluationBatch(prompts, targets, tuple(Reference(str(n), "", "", "", (), (0, n)) for n in range(2)))
    parcel = pickle.loads(pickle.dumps(Parcel.of(batch)))
    opened = parcel.opened()

    def columns(batch):
        plan = [vars(call) for call in batch.targets.plan.calls] + [vars(batch.targets.plan)]
        return [pair for part in (vars(batch.prompts), vars(batch.targets), *plan) for pair in part.items()]

    count = 0
    for (name, expected), (same, found) in zip(columns(batch), columns(opened), strict=True):
        assert name == same
        if isinstance(expected, torch.Tensor):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), name
            assert found.untyped_storage().data_ptr() == parcel.content.untyped_storage().data_ptr()
            count += 1
        elif name not in ("plan", "calls"):
            assert found == expected
    assert count == (26 if packed else 20)
    assert opened.references == batch.references


def test_map_tensors_reaches_every_tensor(sequences):
    batch = collate(sequences, [0, 1], torch.zeros(2, 3, 4, 4), pad_id=0, packed=True)
    moved = map_tensors(batch, lambda t: t.to("meta"))
    parts = (moved, moved.plan, *moved.plan.calls)
    tensors = [v for part in parts for v in vars(part).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 21
    assert all(t.device.type == "meta" for t in tensors)
    assert batch.input_ids.device.type == "cpu"
