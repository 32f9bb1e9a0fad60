"""Attention over packed sequences against the loops of `tests/reference.py`, values and gradients."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmprefix import varlen
from mmprefix.varlen import NO_WINDOW, AttentionCall, attention_calls, unsupported
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


def by_call(query, key, value, lengths, causal, skipped=0, function=attention_calls, **how):
    """`attention_calls` as `attention_by_loops` is called; all keys are gathered, so that there may be any number."""
    cu_q, cu_k = ((starts(n) + skipped).to(query.device) for n in zip(*lengths, strict=True))
    columns = torch.arange(len(key), device=query.device)
    longest = [max(n) for n in zip(*lengths, strict=True)]
    call = AttentionCall(0, len(query), columns, cu_q, cu_k, *longest, causal)
    return function(query, key, value, [call], **how)


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
def test_one_call_matches_loops(heads, groups, size, value_size, causal, window, prefix_in_window):
    tensors = case(heads, groups, size, value_size)
    how = {"causal": causal, "window": window, "prefix_in_window": prefix_in_window}
    fast, fast_gradients = run(tensors, by_call, lengths=LENGTHS, **how)
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
    ends = tuple(1 + sum(n) for n in zip(*inner, strict=True))
    assert all(end < last for end, last in zip(ends, outside, strict=True))
    fast, gradients = run(tensors, by_call, lengths=inner, skipped=1, causal=causal)
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
    how = {"lengths": LENGTHS, "causal": True}
    expected = run(tensors, by_call, **how)
    strided = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in tensors]
    assert not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(run(strided, by_call, **how), expected)
    compiled = torch.compile(attention_calls, fullgraph=True)
    # The caches know an operator's name, and not the strides that it promises.
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.testing.assert_close(run(strided, by_call, function=compiled, **how), expected)


@pytest.mark.parametrize("window", [NO_WINDOW, 2, 5])
@pytest.mark.parametrize("prefix_in_window", [False, True])
def test_long_causal_samples_are_cut_up_and_match_loops(window, prefix_in_window, monkeypatch):
    monkeypatch.setattr(varlen, "_CHUNK", 3)
    assert max(q for q, _ in LENGTHS) > 2 * 3
    test_one_call_matches_loops(4, 2, 8, 8, True, window, prefix_in_window)


@pytest.mark.parametrize(("threads", "key_heads"), [(1, 1), (2, 1), (3, 1), (8, 2), (16, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_call_matches_loops_on_any_number_of_threads(threads, key_heads, dtype):
    """With fewer heads than threads, the queries of a head are cut up for the backward pass."""
    lengths = [(48, 60)] * key_heads
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert varlen._spread(key_heads, key_heads, 48 * 4 // key_heads) == max(1, threads // key_heads**2)
        generator = torch.Generator().manual_seed(0)
        tensors = [
            torch.randn(key_heads * n, h, 8, generator=generator, dtype=torch.float64).requires_grad_()
            for n, h in ((48, 4), (60, key_heads), (60, key_heads))
        ]
        if dtype == torch.bfloat16:
            tensors = [t.detach().bfloat16().double().requires_grad_() for t in tensors]
        for causal in (False, True):
            _, slow = run(tensors, attention_by_loops, lengths=lengths, causal=causal)
            _, fast = run([t.to(dtype) for t in tensors], by_call, lengths=lengths, causal=causal)
            for found, expected in zip(fast, slow, strict=True):
                if dtype == torch.float64:
                    torch.testing.assert_close(found, expected)
                else:  # a few roundings to 8 bits, however many threads there are
                    assert float((found.double() - expected).norm() / expected.norm()) < 5e-3
    finally:
        torch.set_num_threads(before)


def test_gradients_that_are_one_number_for_all():
    """As `sum` hands them back: expanded, without memory of their own."""
    tensors = case(4, 2, 8, 8)
    found = torch.autograd.grad(by_call(*tensors, lengths=LENGTHS, causal=True).sum(), tensors)
    expected = torch.autograd.grad(attention_by_loops(*tensors, lengths=LENGTHS, causal=True).sum(), tensors)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"stop": 15}, r"expected calls over 20 rows in order, got \[0, 15\]"),
        ({"start": 1}, r"expected calls over 20 rows in order, got \[1, 20\]"),
        ({"cu_q": starts([3, 18])}, "expected at most 20 queries and 40 keys, got .* 21"),
        ({"cu_k": starts([40, 1])}, "expected at most 20 queries and 40 keys, got .* 41"),
        ({"cu_k": starts([40, 0])}, "expected keys for 17 queries, got 0"),
    ],
)
def test_calls_that_reach_too_far_are_refused(call, message):
    """They would read and write what is another call's."""
    query, key, value = row(40)
    as_it_should_be = AttentionCall(0, 20, torch.arange(40), starts([3, 17]), starts([5, 35]), 17, 35, causal=False)
    attention_calls(query[:20], key, value, [as_it_should_be])
    with pytest.raises(ValueError, match=message):
        attention_calls(query[:20], key, value, [replace(as_it_should_be, **call)])


def test_compiled_steps_are_not_compiled_anew_for_longer_blocks():
    """Bounds of blocks, which the CPU doesn't need, must be no inputs of its graphs."""
    compiled = torch.compile(attention_calls, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    query, key, value = (t.detach() for t in row(40))

    def step(longest):
        call = AttentionCall(
            0, 40, torch.arange(40), starts([3, 37]), starts([3, 37]), longest, 2 * longest, causal=True
        )
        return compiled(query, key, value, [call])

    first = step(64)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(step(128), first)
        torch.testing.assert_close(step(192), first)


def test_operators_keep_the_contract_of_custom_operators():
    """Fake tensors, autograd registration and schema, as torch.compile relies on them."""
    query, key, value = case(4, 2, 8, 8, torch.float32)
    cu_q, cu_k = (starts(n) for n in zip(*LENGTHS, strict=True))
    columns = torch.arange(len(key))
    arguments = (
        query, key, value, [cu_q], [cu_k], [columns], [True], [0, len(query)], [64, 64], [True], 3, False, 0.5,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.mmprefix.varlen_attention, arguments)
    query, key, value = (
        t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in (query, key, value)
    )
    torch.library.opcheck(torch.ops.mmprefix.varlen_attention, (query, key, value, *arguments[3:]))


@pytest.mark.parametrize("learns", [(True, True, True), (True, False, False), (False, False, True)])
def test_compiled_and_not_are_the_same_bits(learns):
    """Two ways to the same operators."""
    tensors = [t.detach().requires_grad_(is_learnt) for t, is_learnt in zip(row(), learns, strict=True)]
    found = []
    for function in (attention_calls, torch.compile(attention_calls, fullgraph=True, backend="aot_eager")):
        out = function(*tensors, CALLS)
        inputs = [t for t in tensors if t.requires_grad]
        found.append((out.detach(), *torch.autograd.grad(out, inputs, torch.linspace(-1, 1, 8).expand_as(out))))
    assert all(map(torch.equal, *found))


def flash_scores(query, key, value, cu_q, cu_k, max_q, max_k, dropout, is_causal, scale, left, right):
    """Of each sample as the kernel on CUDA documents them: its slices, its keys and values repeated, its scores."""
    assert dropout == 0
    assert is_causal == ((left, right) == (-1, 0)), "as `varlen_attn` has it"
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    groups = query.shape[1] // key.shape[1]
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        assert b - a <= max_q
        assert d - c <= max_k
        k, v = (x[c:d].repeat_interleave(groups, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[a:b], k) * scale
        behind = torch.arange(d - c) - torch.arange(d - c - (b - a), d - c).unsqueeze(1)
        hidden = behind < (-left if left >= 0 else -len(key))
        if right >= 0:
            hidden |= behind > right
        yield slice(a, b), slice(c, d), k, v, scores.masked_fill(hidden, -torch.inf)


def flash_forward(query, *rest, scale, window_size_left, window_size_right):
    *rest, debug = rest
    assert not debug
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
    for at, _, _, v, scores in flash_scores(query, *rest, scale, window_size_left, window_size_right):
        out[at] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        lse[:, at] = scores.logsumexp(-1)
    return out, lse, None, None, None


def flash_backward(grad, query, key, value, out, lse, *rest, scale, window_size_left, window_size_right):
    *rest, rng_state, _ = rest
    assert rng_state.dtype == torch.uint64
    assert lse.is_contiguous()
    gradients = [torch.empty_like(x) for x in (query, key, value)]
    for at, keys, k, v, scores in flash_scores(query, key, value, *rest, scale, window_size_left, window_size_right):
        p = (scores - lse[:, at].unsqueeze(-1)).exp()
        d_p = torch.einsum("qhd,khd->hqk", grad[at], v)
        d_scores = p * (d_p - (grad[at] * out[at]).sum(-1).t().unsqueeze(-1)) * scale
        d_k, d_v = torch.einsum("hqk,qhd->khd", d_scores, query[at]), torch.einsum("hqk,qhd->khd", p, grad[at])
        gradients[0][at] = torch.einsum("hqk,khd->qhd", d_scores, k)
        for gradient, d in ((gradients[1], d_k), (gradients[2], d_v)):
            gradient[keys] = d.unflatten(1, (key.shape[1], -1)).sum(2)
    return gradients


@pytest.fixture
def _as_on_cuda(monkeypatch):
    """The CPU goes the way of CUDA, with `flash_forward` and `flash_backward` as the kernel."""
    bounds = varlen._longest
    monkeypatch.setattr(varlen, "_longest", lambda calls, device: bounds(calls, torch.device("cuda")))
    monkeypatch.setattr(varlen, "_cpu_forward", varlen._cuda_forward)
    monkeypatch.setattr(varlen, "_cpu_backward", varlen._cuda_backward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_backward)


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize(("causal", "window"), [(False, NO_WINDOW), (True, NO_WINDOW), (True, 3)])
def test_the_way_of_cuda_matches_loops(causal, window):
    test_one_call_matches_loops(8, 2, 16, 16, causal, window, window != NO_WINDOW)


CALLS = [
    # Prefixes of 3 and 4, and of 5 and 2 tokens behind each of them, that see it; columns 0-6, 7-13.
    AttentionCall(0, 7, None, starts([3, 4]), starts([3, 4]), 4, 4, causal=False),
    AttentionCall(
        7, 14, torch.tensor([0, 1, 2, *range(7, 12), 3, 4, 5, 6, 12, 13]), starts([5, 2]), starts([8, 6]), 5, 8,
        causal=False,
    ),
    # Two targets of the first, of 3 and 1 tokens.
    AttentionCall(
        14, 18, torch.tensor([0, 1, 2, *range(7, 12), 14, 15, 16, 0, 1, 2, *range(7, 12), 17]), starts([3, 1]),
        starts([11, 9]), 3, 11, causal=True,
    ),
]  # fmt: skip


def calls_by_loops(query, key, value):
    """`CALLS`, each as a loop over its own columns."""
    outputs = []
    for call in CALLS:
        columns = torch.arange(call.start, call.stop) if call.key_index is None else call.key_index
        lengths = list(zip(call.cu_q.diff().tolist(), call.cu_k.diff().tolist(), strict=True))
        outputs.append(
            attention_by_loops(query[call.start : call.stop], key[columns], value[columns], lengths, call.causal)
        )
    return torch.cat(outputs)


def row(columns=18):
    generator = torch.Generator().manual_seed(0)
    shapes = ((columns, 4, 8), (columns, 2, 8), (columns, 2, 8))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_calls_over_a_row_match_loops(where, request):
    if where == "cuda":
        request.getfixturevalue("_as_on_cuda")
    tensors = row()
    torch.testing.assert_close(run(tensors, attention_calls, calls=CALLS), run(tensors, calls_by_loops))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [NO_WINDOW, 3])
def test_the_kernel_on_cuda_takes_what_it_is_given(dtype, window):
    """Its schema and shapes, as PyTorch checks them where there is no GPU."""
    how = varlen._How(window, window != NO_WINDOW, 0.5)
    with FakeTensorMode():
        query = torch.empty(18, 4, 64, dtype=dtype, device="cuda")
        key = torch.empty(18, 2, 64, dtype=dtype, device="cuda")
        (call,) = varlen._calls(
            18, 4, [torch.empty(3, dtype=torch.int32, device="cuda")], [torch.empty(3, dtype=torch.int32, device="cuda")],
            [torch.empty(20, dtype=torch.int64, device="cuda")], [True], [0, 18], [64, 64], [True],
        )  # fmt: skip
        lse = torch.empty(4 * 18, device="cuda")
        own = [query[call.at], call.keys(key), call.keys(key)]
        assert own[1].shape == (20, 2, 64)
        varlen._cuda_forward(call, *own, query.clone()[call.at], lse[call.lse], how)
        d_query = torch.empty_like(own[0])
        saved = (query[call.at], *own, query[call.at], lse[call.lse])
        for to in (None, tuple(torch.empty_like(x) for x in own[1:])):
            gradients = varlen._cuda_backward(call, *saved, d_query, to, how)
            assert [x.shape for x in gradients] == [x.shape for x in own[1:]]


def test_what_no_kernel_takes_is_said_in_words():
    on_cuda = torch.empty(2, 4, 64, device="meta")  # stands for any device but the CPU
    assert unsupported(on_cuda, on_cuda, on_cuda) == "no kernel for meta"
    here = torch.empty(2, 4, 64, dtype=torch.float16)
    assert unsupported(here, here, here) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("causal", "window"), [(False, NO_WINDOW), (True, NO_WINDOW), (True, 3)])
def test_one_call_on_cuda_matches_loops(dtype, causal, window):
    exact = case(8, 2, 64, 64, torch.float64)
    tensors = [t.detach().to("cuda", dtype).requires_grad_() for t in exact]
    how = {"causal": causal, "window": window, "prefix_in_window": window != NO_WINDOW}
    fast, fast_gradients = run(tensors, by_call, lengths=LENGTHS, **how)
    slow, slow_gradients = run(exact, attention_by_loops, lengths=LENGTHS, **how)
    # What rounding the inputs does to the exact computation bounds what the kernel may be off by.
    rounded = [t.detach().cpu().double().requires_grad_() for t in tensors]
    near, near_gradients = run(rounded, attention_by_loops, lengths=LENGTHS, **how)
    for found, reference, other in zip(
        (fast, *fast_gradients), (slow, *slow_gradients), (near, *near_gradients), strict=True
    ):
        allowed = 4 * (reference - other).abs().max() + 2e-2 * reference.abs().max()
        assert (found.cpu().double() - reference).abs().max() <= allowed
