"""Each of these mutations of our own code makes the named check fail: the checks can."""

import pytest
import torch

from mmprefix import attention
from mmprefix.masks import PADDING_SEGMENT
from mmprefix.packing import PackedBatch
from mmprefix.probe import PREFIX, probe_decoder, tiny_copy
from mmprefix.sequence import PREFIX_BRANCH
from tests import test_modeling
from tests.architectures import config_of

RULE = attention.prefix_lm_visible


def failing(name):
    report = probe_decoder(tiny_copy(config_of(name)))
    return {p.number for p in report.properties if not p.holds}


def test_unmutated_code_passes():
    assert failing("mistral") == set()


def test_a_prefix_row_that_sees_one_target_token(monkeypatch):
    def leaking(q, k, visibility, own):
        return RULE(q, k, visibility, own) | (
            (q.segment == k.segment) & (q.branch == PREFIX_BRANCH) & (q.position == 0) & (k.position == PREFIX)
        )

    monkeypatch.setattr(attention, "prefix_lm_visible", leaking)
    assert 1 in failing("mistral")


@pytest.mark.parametrize("shift", [1, -1])
def test_a_window_that_is_off_by_one(monkeypatch, shift):
    original = attention.plan_mask_function

    def shifted(plan, own_rule):
        def rule(batch, head, q, k):
            causal = attention.causal_mask_function(batch, head, q, k)
            return causal & (own_rule(batch, head, q + shift, k) | (q == k))

        return original(plan, rule)

    monkeypatch.setattr(attention, "plan_mask_function", shifted)
    assert 5 in failing("mistral")
    assert failing("llama") == set(), "the control: where there is no window, nothing is off"


def test_a_lost_padding_mask(monkeypatch):
    def blind(q, k, visibility, own):
        q, k = (t._replace(segment=t.segment.masked_fill(t.segment == PADDING_SEGMENT, 0)) for t in (q, k))
        return RULE(q, k, visibility, own)

    monkeypatch.setattr(attention, "prefix_lm_visible", blind)
    assert 3 in failing("llama")


def test_samples_of_a_row_that_see_each_other(monkeypatch):
    def mixing(q, k, visibility, own):
        return RULE(q._replace(segment=q.segment * 0), k._replace(segment=k.segment * 0), visibility, own)

    monkeypatch.setattr(attention, "prefix_lm_visible", mixing)
    assert 4 in failing("llama")


def test_a_prefix_that_stays_causal(monkeypatch):
    monkeypatch.setattr(attention, "prefix_lm_visible", lambda q, k, v, own: RULE(q, k, "causal", own))
    assert 2 in failing("llama")


def test_shifted_labels(monkeypatch, model_and_processor, photos):
    test_modeling.test_target_logits_match_full_logits(model_and_processor, photos)
    original = test_modeling.make_batch

    def shifted(*args, **kwargs):
        batch = original(*args, **kwargs)
        batch.labels.copy_(batch.labels.roll(1))
        assert isinstance(batch, PackedBatch)
        return batch

    monkeypatch.setattr(test_modeling, "make_batch", shifted)
    with pytest.raises(AssertionError):
        test_modeling.test_target_logits_match_full_logits(model_and_processor, photos)


def test_shifted_label_positions(monkeypatch, model_and_processor, photos):
    original = test_modeling.make_batch

    def shifted(*args, **kwargs):
        batch = original(*args, **kwargs)
        batch.plan.label_positions.add_(1)
        return batch

    monkeypatch.setattr(test_modeling, "make_batch", shifted)
    with pytest.raises(AssertionError):
        test_modeling.test_target_logits_match_full_logits(model_and_processor, photos)


def test_a_forgotten_prefix_in_cached_decoding(monkeypatch):
    """Layers that keep a window only, as the library would make them."""
    from mmprefix import generation

    monkeypatch.setattr(generation, "keep_everything", lambda cache, max_cache_length: None)
    assert 6 in failing("mistral")
    assert torch.is_grad_enabled()


def test_a_buffer_that_is_opened_but_for_the_next_token(monkeypatch):
    """Later layers would pass on what a position does not see itself."""
    original = torch.Tensor.triu
    monkeypatch.setattr(torch.Tensor, "triu", lambda self, diagonal=0: original(self, diagonal + (self.ndim == 4)))
    assert 2 in failing("gpt_neo")
