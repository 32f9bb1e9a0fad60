"""Attention over packed sequences against the loops of `tests/reference.py`, values and gradients."""

import pytest
import torch

from mmprefix import varlen
from mmprefix.varlen import NO_WINDOW, unsupported, varlen_attention
from tests.reference import attention_by_loops

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

LENGTHS = [(3, 5), (3, 5), (7, 7), (1, 9), (0, 4), (5, 20)]
"""Queries and keys of each sample: two of one shape side by side, an empty one, a single query."""


def starts(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def case(heads, groups, size, value_size, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    queries, keys = (sum(n) for n in zip(*LENGTHS, strict=True))
    shapes = ((queries, heads, size), (keys, groups, size), (keys, groups, value_size))
    return [torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def run(tensors, attend, **kwargs):
    out = attend(*tensors, **kwargs)
    projection = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, torch.autograd.grad(out, tensors, projection)


@pytest.mark.parametrize(
    ("heads", "groups", "size", "value_size"),
    [(8, 1, 16, 16), (4, 4, 8, 8), (4, 2, 24, 16), (4, 2, 8, 16), (4, 1, 24, 16), (4, 1, 8, 16)],
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [NO_WINDOW, 3])
@pytest.mark.parametrize("prefix_in_window", [False, True])
def test_varlen_attention_matches_loops(heads, groups, size, value_size, causal, window, prefix_in_window):
    tensors = case(heads, groups, size, value_size)
    how = {"causal": causal, "window": window, "prefix_in_window": prefix_in_window}
    cu_q, cu_k = (starts(n) for n in zip(*LENGTHS, strict=True))
    fast, fast_gradients = run(tensors, varlen_attention, cu_q=cu_q, cu_k=cu_k, max_q=64, max_k=64, **how)
    slow, slow_gradients = run(tensors, attention_by_loops, lengths=LENGTHS, **how)
    torch.testing.assert_close(fast, slow)
    for found, expected in zip(fast_gradients, slow_gradients, strict=True):
        torch.testing.assert_close(found, expected)
    if causal and window != NO_WINDOW:
        without, _ = run(tensors, attention_by_loops, lengths=LENGTHS, causal=True)
        assert (slow - without).abs().max() > 1e-2, "the window must hide something"


@pytest.mark.parametrize("causal", [False, True])
def test_queries_of_no_sample_get_zeros_and_keys_of_none_no_gradient(causal):
    tensors = case(4, 2, 8, 8)
    inner = LENGTHS[1:4]
    outside = [len(tensors[0]) - 1, len(tensors[1]) - 1]
    cu_q, cu_k = (starts(n) + 1 for n in zip(*inner, strict=True))
    ends = int(cu_q[-1]), int(cu_k[-1])
    assert all(end < last for end, last in zip(ends, outside, strict=True))
    fast, gradients = run(tensors, varlen_attention, cu_q=cu_q, cu_k=cu_k, max_q=64, max_k=64, causal=causal)
    within = [t[1:end] for t, end in zip(tensors, (ends[0], ends[1], ends[1]), strict=True)]
    slow = attention_by_loops(*within, lengths=inner, causal=causal)
    torch.testing.assert_close(fast[1 : ends[0]], slow)
    for x, end in zip((fast, *gradients), (ends[0], *ends, ends[1]), strict=True):
        assert not x[0].any()
        assert not x[end:].any()
        assert x[1:end].any()


def test_inputs_of_any_strides():
    """As a decoder that keeps heads in front of positions has them."""
    tensors = case(4, 2, 8, 8)
    cu_q, cu_k = (starts(n) for n in zip(*LENGTHS, strict=True))
    how = {"cu_q": cu_q, "cu_k": cu_k, "max_q": 64, "max_k": 64, "causal": True}
    expected = run(tensors, varlen_attention, **how)
    strided = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in tensors]
    assert not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(run(strided, varlen_attention, **how), expected)
    torch.testing.assert_close(run(strided, torch.compile(varlen_attention, fullgraph=True), **how), expected)


@pytest.mark.parametrize("window", [NO_WINDOW, 2, 5])
@pytest.mark.parametrize("prefix_in_window", [False, True])
def test_long_causal_samples_are_cut_up_and_match_loops(window, prefix_in_window, monkeypatch):
    monkeypatch.setattr(varlen, "_CHUNK", 3)
    assert max(q for q, _ in LENGTHS) > 2 * 3
    test_varlen_attention_matches_loops(4, 2, 8, 8, True, window, prefix_in_window)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_varlen_attention_matches_loops_on_any_number_of_threads(threads):
    """With fewer heads than threads, the queries of a head are cut up for the backward pass."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        tensors = [
            torch.randn(n, h, 8, generator=generator, dtype=torch.float64).requires_grad_()
            for n, h in ((48, 4), (60, 1), (60, 1))
        ]
        cu = torch.tensor([0, 48], dtype=torch.int32), torch.tensor([0, 60], dtype=torch.int32)
        for causal in (False, True):
            fast = run(tensors, varlen_attention, cu_q=cu[0], cu_k=cu[1], max_q=64, max_k=64, causal=causal)
            slow = run(tensors, attention_by_loops, lengths=[(48, 60)], causal=causal)
            torch.testing.assert_close(fast, slow)
    finally:
        torch.set_num_threads(before)


def test_operators_keep_the_contract_of_custom_operators():
    """Fake tensors, autograd registration and schema, as torch.compile relies on them."""
    query, key, value = case(4, 2, 8, 8, torch.float32)
    cu_q, cu_k = (starts(n) for n in zip(*LENGTHS, strict=True))
    bounds = [0, len(query), 0, len(key)]
    arguments = (query, key, value, [cu_q], [cu_k], [cu_q], [False], bounds, [True], 3, False, 0.5)
    torch.library.opcheck(torch.ops.mmprefix.varlen_attention, arguments)
    query, key, value = (
        t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in (query, key, value)
    )
    torch.library.opcheck(torch.ops.mmprefix.varlen_attention, (query, key, value, *arguments[3:]))


def test_what_no_kernel_takes_is_said_in_words():
    on_cuda = torch.empty(2, 4, 64, device="meta")  # stands for any device but the CPU
    assert unsupported(on_cuda, on_cuda, on_cuda) == "no kernel for meta"
    here = torch.empty(2, 4, 64, dtype=torch.float16)
    assert unsupported(here, here, here) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("causal", "window"), [(False, NO_WINDOW), (True, NO_WINDOW), (True, 3)])
def test_varlen_attention_on_cuda_matches_loops(dtype, causal, window):
    exact = case(8, 2, 64, 64, torch.float64)
    tensors = [t.detach().to("cuda", dtype).requires_grad_() for t in exact]
    how = {"causal": causal, "window": window, "prefix_in_window": window != NO_WINDOW}
    cu_q, cu_k = (starts(n).cuda() for n in zip(*LENGTHS, strict=True))
    fast, fast_gradients = run(tensors, varlen_attention, cu_q=cu_q, cu_k=cu_k, max_q=64, max_k=64, **how)
    slow, slow_gradients = run(exact, attention_by_loops, lengths=LENGTHS, **how)
    # What rounding the inputs does to the exact computation bounds what the kernel may be off by.
    rounded = [t.detach().cpu().double().requires_grad_() for t in tensors]
    near, near_gradients = run(rounded, attention_by_loops, lengths=LENGTHS, **how)
    for found, reference, other in zip(
        (fast, *fast_gradients), (slow, *slow_gradients), (near, *near_gradients), strict=True
    ):
        allowed = 4 * (reference - other).abs().max() + 2e-2 * reference.abs().max()
        assert (found.cpu().double() - reference).abs().max() <= allowed
