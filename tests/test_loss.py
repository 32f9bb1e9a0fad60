import pytest
import torch
import torch.nn.functional as F

from mmprefix.loss import target_cross_entropy

LENGTHS = [3, 1, 4]


@pytest.fixture
def case():
    torch.manual_seed(0)
    lengths = torch.tensor([n for n in LENGTHS for _ in range(n)])
    return torch.randn(8, 11), torch.randint(11, (8,)), lengths


def test_tokens_is_the_mean_over_all_tokens(case):
    logits, labels, lengths = case
    total, count = target_cross_entropy(logits, labels, lengths)
    assert count == 8
    torch.testing.assert_close(total / count, F.cross_entropy(logits, labels))


def test_per_sample_is_the_mean_of_each_targets_mean(case):
    logits, labels, lengths = case
    total, count = target_cross_entropy(logits, labels, lengths, "per_sample")
    torch.testing.assert_close(count, torch.tensor(3.0))
    means = [F.cross_entropy(x, y) for x, y in zip(logits.split(LENGTHS), labels.split(LENGTHS), strict=True)]
    torch.testing.assert_close(total / count, torch.stack(means).mean())
    assert abs(total / count - F.cross_entropy(logits, labels)) > 1e-3, "the two must differ on ragged targets"


@pytest.mark.parametrize("normalization", ["tokens", "per_sample"])
def test_sums_and_counts_add_up_over_any_grouping_of_targets(case, normalization):
    logits, labels, lengths = case
    whole = target_cross_entropy(logits, labels, lengths, normalization)
    parts = [
        target_cross_entropy(logits[a:b], labels[a:b], lengths[a:b], normalization) for a, b in ((0, 3), (3, 4), (4, 8))
    ]
    torch.testing.assert_close(whole[0], sum(total for total, _ in parts))
    torch.testing.assert_close(whole[1], sum(count for _, count in parts))


def test_half_precision_logits_are_summed_in_float32(case):
    logits, labels, lengths = case
    total, _ = target_cross_entropy(logits.bfloat16(), labels, lengths)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, F.cross_entropy(logits.bfloat16().float(), labels, reduction="sum"))
