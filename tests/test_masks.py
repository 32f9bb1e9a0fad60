import pytest
import torch

from mmprefix.masks import PADDING_SEGMENT, TokenIndex, dense_mask, prefix_lm_mask, visible_pairs
from mmprefix.packing import collate
from mmprefix.sequence import PREFIX_BRANCH, PromptLayout, TokenSequence
from tests.reference import mask_by_loops

LAYOUT = PromptLayout(image=99, bos=1, separator=(7,), eos=2)


def rows(mask):
    return ["".join(str(int(v)) for v in row) for row in mask]


def test_worked_example_of_prefix_3_of_7():
    assert rows(prefix_lm_mask(prefix_len=3, total=7)) == [
        "1110000", "1110000", "1110000", "1111000", "1111100", "1111110", "1111111",
    ]  # fmt: skip


def test_nested_example_with_2_image_tokens():
    assert rows(prefix_lm_mask(3, 7, "nested", num_image_tokens=2)) == [
        "1100000", "1100000", "1110000", "1111000", "1111100", "1111110", "1111111",
    ]  # fmt: skip


def test_causal_is_lower_triangular():
    assert torch.equal(prefix_lm_mask(3, 7, "causal"), torch.ones(7, 7).tril().bool())


def sees_by_loops(plan, row, visibility):
    names = ("segment", "branch", "question", "region", "position")
    tokens = [
        dict(zip(names, (int(t[row, c]) for t in plan.tokens), strict=True)) for c in range(plan.segment.shape[1])
    ]
    return mask_by_loops(tokens, visibility)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("visibility", ["full", "nested", "causal"])
def test_dense_mask_matches_loops_on_packed_branched_and_padded_rows(visibility, packed):
    sequences = [
        TokenSequence.build(LAYOUT, 3, [10, 11], [[20], [30, 31]]),
        TokenSequence.build(LAYOUT, 2, [12], [[40, 41, 42]]),
        TokenSequence.build(LAYOUT, 0, [13], [[50]]),
    ]
    if visibility == "nested":
        sequences[1] = TokenSequence.on_one_image(
            [sequences[1], TokenSequence.build(LAYOUT, 2, [14, 15], [[60], [61]])]
        )
    plan = collate(sequences, [0, 0, 0], None, pad_id=0, packed=packed, bucket=4).plan
    assert len(plan.segment) == (1 if packed else 3)
    assert (plan.segment == PADDING_SEGMENT).any(), "a row must be padded"
    if visibility == "nested":
        assert plan.question.max() == 1, "two questions must share an image"
    fast = dense_mask(plan.tokens, visibility)
    for row in range(len(plan.segment)):
        assert torch.equal(fast[row], sees_by_loops(plan, row, visibility))


@pytest.mark.parametrize("visibility", ["full", "nested", "causal"])
def test_a_compiled_mask_is_the_same(visibility):
    questions = [TokenSequence.build(LAYOUT, 3, [10, 11], [[20], [30]]), TokenSequence.build(LAYOUT, 3, [12], [[40]])]
    if visibility == "nested":
        questions = [TokenSequence.on_one_image(questions)]
    tokens = collate(questions, [0] * len(questions), None, pad_id=0).plan.tokens
    compiled = torch.compile(dense_mask, backend="eager", fullgraph=True)
    assert torch.equal(compiled(tokens, visibility), dense_mask(tokens, visibility))


@pytest.mark.parametrize("visibility", ["full", "nested", "causal"])
def test_no_prefix_token_sees_a_target_token(visibility):
    mask = prefix_lm_mask(5, 9, visibility, num_image_tokens=3)
    assert mask[5:, 5:].any()
    assert not mask[:5, 5:].any()


def test_padding_sees_nothing_and_is_not_seen():
    segment = torch.tensor([0, 0, PADDING_SEGMENT])
    zero = torch.zeros(3, dtype=torch.long)
    mask = dense_mask(TokenIndex(segment, zero + PREFIX_BRANCH, zero, zero + 1, torch.arange(3)))
    assert not mask[2].any()
    assert not mask[:, 2].any()
    assert mask[:2, :2].all()


@pytest.mark.parametrize("visibility", ["full", "nested", "causal"])
@pytest.mark.parametrize("num_images", [0, 5])
@pytest.mark.parametrize("targets", [[], [[8]], [[8, 9, 8], [9], [9, 9]]])
def test_visible_pairs_matches_dense_mask(visibility, num_images, targets):
    sequence = TokenSequence.build(LAYOUT, num_images, [3, 4, 5], targets)
    zeros = torch.zeros_like(sequence.ids)
    tokens = TokenIndex(zeros, sequence.branches, sequence.questions, sequence.regions, sequence.positions)
    assert visible_pairs(sequence, visibility) == int(dense_mask(tokens, visibility).sum())


def test_a_batch_counts_the_visible_pairs_of_its_plan():
    sequences = [TokenSequence.build(LAYOUT, 2, [3], [[8], [9, 9]]), TokenSequence.build(LAYOUT, 2, [3, 4], [[8, 8]])]
    joined = [TokenSequence.on_one_image(sequences)]
    for parts, packed in ((sequences, False), (sequences, True), (joined, False), (joined, True)):
        batch = collate(parts, range(len(parts)), None, pad_id=0, visibility="nested", packed=packed, bucket=4)
        assert batch.visible_pairs == int(dense_mask(batch.plan.tokens, "nested").sum()) > 0
