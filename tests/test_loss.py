import pytest
import torch
import torch.nn.functional as F

from mmprefix import loss
from mmprefix.loss import LogitTransform, linear_cross_entropy, target_cross_entropy
from mmprefix.sequence import IGNORE_INDEX

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


def test_fillers_count_nothing(case):
    logits, labels, lengths = case
    expected = target_cross_entropy(logits[:5], labels[:5], lengths[:5], "per_sample")
    labels = labels.clone()
    labels[5:] = IGNORE_INDEX
    torch.testing.assert_close(target_cross_entropy(logits, labels, lengths, "per_sample"), expected)


@pytest.mark.parametrize("chunk", [1000, 33, 11])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5), LogitTransform(2.0, 3.0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normalization", ["tokens", "per_sample"])
def test_linear_cross_entropy_matches_logits(case, chunk, transform, bias, normalization, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk)
    _, labels, lengths = case
    labels[-1] = IGNORE_INDEX
    layer = torch.nn.Linear(6, 11, bias=bias).double()
    hidden = (3 * torch.randn(8, 6, dtype=torch.double)).requires_grad_()
    learns = [hidden, *layer.parameters()]
    fast, fast_count = linear_cross_entropy(hidden, layer.weight, layer.bias, labels, lengths, normalization, transform)
    losses = F.cross_entropy(transform(layer(hidden)), labels, reduction="none", ignore_index=IGNORE_INDEX)
    shares = (labels != IGNORE_INDEX) / (lengths if normalization == "per_sample" else 1)
    slow = (losses * shares).sum()
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(fast_count, shares.sum().float())
    # 1.5: the gradient that arrives is used, too.
    found, expected = (torch.autograd.grad(1.5 * value, learns) for value in (fast, slow))
    torch.testing.assert_close(found, expected)
    arguments = (labels, lengths, normalization)
    mean, _ = linear_cross_entropy(hidden, layer.weight, layer.bias, *arguments, transform, reduction="mean")
    torch.testing.assert_close(mean, slow / shares.sum())
    torch.testing.assert_close(torch.autograd.grad(mean, learns), tuple(g / 1.5 / shares.sum() for g in expected))
    torch.testing.assert_close(target_cross_entropy(transform(layer(hidden)), *arguments, "mean")[0], mean.float())


def test_linear_cross_entropy_of_frozen_layers_and_without_gradients(case):
    _, labels, lengths = case
    layer = torch.nn.Linear(6, 11).requires_grad_(False)
    hidden = torch.randn(8, 6, requires_grad=True)
    total, _ = linear_cross_entropy(hidden, layer.weight, layer.bias, labels, lengths)
    total.backward()
    assert hidden.grad is not None
    assert layer.weight.grad is None
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(hidden, layer.weight, layer.bias, labels, lengths)[0], total.detach()
        )


def test_linear_cross_entropy_under_autocast_matches_logits(case):
    _, labels, lengths = case
    layer = torch.nn.Linear(6, 11)
    hidden = torch.randn(8, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        fast, _ = linear_cross_entropy(hidden, layer.weight, layer.bias, labels, lengths)
        slow, _ = target_cross_entropy(layer(hidden), labels, lengths)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, slow, rtol=1e-2, atol=1e-2)
    learns = [hidden, *layer.parameters()]
    for found, expected in zip(torch.autograd.grad(fast, learns), torch.autograd.grad(slow, learns), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


def test_operator_keeps_the_contract_of_custom_operators(case):
    _, labels, _ = case
    hidden, weight = torch.randn(8, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    arguments = (hidden, weight, None, labels, torch.ones(8), 0.5, 3.0, 3, True, True, False)
    torch.library.opcheck(torch.ops.mmprefix.linear_cross_entropy, arguments)


@pytest.mark.parametrize(("dtype", "rows", "products"), [
    (torch.float32, 6, 3), (torch.bfloat16, 6, 1), (torch.bfloat16, 9, 5),
])  # fmt: skip
def test_few_labels_in_half_precision_are_one_chunk(dtype, rows, products, monkeypatch):
    """Sums over chunks would be float32 tensors of the weight's size: more than logits of fewer rows than columns."""
    vocab, width = 11, 8
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 2 * vocab)
    made = []
    linear = loss.linear

    def counted(rows, weight, *rest):
        if weight.shape == (vocab, width):  # logits; their gradients meet it transposed
            made.append(len(rows))
        return linear(rows, weight, *rest)

    monkeypatch.setattr(loss, "linear", counted)
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    labels, lengths = torch.arange(rows), torch.full((rows,), rows)
    loss.linear_cross_entropy(hidden, weight, None, labels, lengths)[0].backward()
    assert len(made) == products
    assert sum(made) == rows
    held = loss.transient_bytes(hidden, weight, None, labels, lengths, 1.0, 0.0, 2, True, True, False)
    assert held == max(made) * vocab * (4 if dtype == torch.float32 else 6)
    made.clear()
    frozen = weight.detach()
    loss.linear_cross_entropy(hidden, frozen, None, labels, lengths)[0].backward()
    assert max(made) == 2, "where the weight doesn't learn, nothing is summed"
