import pytest
import torch

from mmprefix.errors import InputError
from mmprefix.sequence import PromptLayout, Region, TokenSequence
from tests.reference import sequence_by_loops

LAYOUT = PromptLayout(image=99, bos=1, separator=(7,), eos=2)
IMG, INS, TGT = (int(r) for r in (Region.IMAGE, Region.INSTRUCTION, Region.TARGET))


def test_one_target_gives_exactly_these_ids_and_labels():
    s = TokenSequence.build(LAYOUT, 3, [10, 11], [[20, 21]])
    assert s.ids.tolist() == [99, 99, 99, 1, 10, 11, 7, 20, 21, 2]
    assert s.regions.tolist() == [IMG] * 3 + [INS] * 4 + [TGT] * 3
    assert s.branches.tolist() == [-1] * 7 + [0] * 3
    assert s.positions.tolist() == list(range(10))
    # The last prefix position predicts the first target token, and EOS is predicted, too.
    assert s.label_positions.tolist() == [6, 7, 8]
    assert s.labels.tolist() == [20, 21, 2]
    assert s.target_lengths.tolist() == [3, 3, 3]
    assert s.prefix_length == 7
    assert s.num_targets == 1


def test_several_targets_branch_off_the_same_prefix():
    s = TokenSequence.build(LAYOUT, 1, [10], [[20], [30, 31]])
    assert s.ids.tolist() == [99, 1, 10, 7, 20, 2, 30, 31, 2]
    assert s.branches.tolist() == [-1, -1, -1, -1, 0, 0, 1, 1, 1]
    assert s.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    assert s.label_positions.tolist() == [3, 4, 3, 6, 7]
    assert s.labels.tolist() == [20, 2, 30, 31, 2]
    assert s.target_lengths.tolist() == [2, 2, 3, 3, 3]


def test_without_bos_and_separator():
    s = TokenSequence.build(PromptLayout(image=99, bos=None, separator=(), eos=2), 0, [10], [[20]])
    assert s.ids.tolist() == [10, 20, 2]
    assert s.labels.tolist() == [20, 2]
    assert s.label_positions.tolist() == [0, 1]


@pytest.mark.parametrize("targets", [[], [[7]], [[7, 8, 9], [8], [9, 9]]])
@pytest.mark.parametrize("end", [[], [2], [3, 2]])
def test_a_sequence_of_ids_matches_loops(targets, end):
    prefix = [0, 0, 5, 0, 6, 6, 0]
    sequence = TokenSequence.from_ids(0, prefix, targets, end)
    expected = sequence_by_loops(0, prefix, targets, end)
    for name, column in expected.items():
        assert getattr(sequence, name).dtype == torch.int64
        assert getattr(sequence, name).tolist() == column, name


def test_split_gives_what_each_target_builds_alone():
    whole = TokenSequence.build(LAYOUT, 1, [10], [[20], [30, 31], [40]])
    parts = whole.split()
    assert len(parts) == 3
    for part, target in zip(parts, ([20], [30, 31], [40]), strict=True):
        alone = TokenSequence.build(LAYOUT, 1, [10], [target])
        for name in vars(alone):
            assert torch.equal(getattr(part, name), getattr(alone, name)), name


def test_prefix_is_the_sequence_without_its_targets():
    s = TokenSequence.build(LAYOUT, 2, [10], [[20]])
    bare = TokenSequence.build(LAYOUT, 2, [10])
    for name in ("ids", "regions", "branches", "positions", "labels", "label_positions"):
        assert torch.equal(getattr(s.prefix(), name), getattr(bare, name))
    assert bare.num_targets == 0


@pytest.mark.parametrize(
    ("instruction", "targets", "message"),
    [
        ([10], [[20], []], "target 1: expected at least one token"),
        ([10, 99], [[20]], "instruction: expected text without the image placeholder"),
        ([10], [[20, 99]], "target 0: expected text without the image placeholder"),
    ],
)
def test_bad_input_is_refused(instruction, targets, message):
    with pytest.raises(InputError, match=message):
        TokenSequence.build(LAYOUT, 1, instruction, targets)


def test_empty_prefix_is_refused():
    with pytest.raises(InputError, match="prefix of at least one token"):
        TokenSequence.build(PromptLayout(99, None, (), 2), 0, [], [[20]])
