import pytest
import torch

from mmprefix.masks import PADDING_SEGMENT
from mmprefix.packing import PrefixPlan, collate, collate_prompts, map_tensors
from mmprefix.sequence import PREFIX_BRANCH, PromptLayout, Region, TokenSequence

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


def test_shared_row_and_shared_image(sequences):
    batch = collate(sequences, [0, 0], torch.zeros(1, 3, 4, 4), pad_id=0, rows=[[1, 0]])
    assert batch.input_ids.shape == (1, 19)
    assert batch.plan.segment.tolist() == [[0] * 10 + [1] * 9]
    assert batch.position_ids[0, 10:].tolist() == list(range(9))
    assert batch.plan.label_positions.tolist() == [4, 5, 4, 7, 8, 15, 16, 17]
    assert batch.labels.tolist() == [30, 2, 31, 32, 2, 20, 21, 2]
    assert batch.plan.image_positions.tolist() == [0, 1, 10, 11]
    assert batch.plan.image_sources.tolist() == [0, 1, 0, 1]
    assert batch.padding_share == 0


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
    assert batch.num_sequences == 0
    assert batch.labels.numel() == 0
    assert batch.padding_share == 1.0


def test_map_tensors_reaches_every_tensor(sequences):
    batch = collate(sequences, [0, 1], torch.zeros(2, 3, 4, 4), pad_id=0)
    moved = map_tensors(batch, lambda t: t.to("meta"))
    tensors = [v for part in (moved, moved.plan) for v in vars(part).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 14
    assert all(t.device.type == "meta" for t in tensors)
    assert batch.input_ids.device.type == "cpu"
