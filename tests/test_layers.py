"""What is done to each layer: recomputing some of them, compiling them one by one."""

import pytest
import torch

from mmprefix.accounting import Layout, MemoryEstimate, Precision, Record, meta_model
from mmprefix.errors import InputError
from mmprefix.training.layers import checkpoint_activations, layers_by_part, recomputed_shares
from tests.conftest import TINY_DECODER, make_batch, make_model

FOUR = {**TINY_DECODER, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("which", "vision", "decoder"),
    [
        (False, [1] * 6, [1] * 4), (True, [2] * 6, [2] * 4), ("selective", [2, 1] * 3, [2, 1] * 2),
        (3, [2, 1, 1] * 2, [2, 1, 1, 2]), (1, [2] * 6, [2] * 4),
    ],
)  # fmt: skip
def test_layers_that_are_recomputed_and_gradients_as_without(which, vision, decoder, photos):
    model, processor = make_model(FOUR)
    model.train()
    batch = make_batch(processor, photos)
    model.target_loss(batch)[0].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    checkpoint_activations(model, which)
    layers = layers_by_part(model)
    calls = {name: [0] * len(part) for name, part in layers.items()}

    def count(name, i):
        def hook(*_):
            calls[name][i] += 1

        return hook

    for name, part in layers.items():
        for i, layer in enumerate(part):  # inside of the layer: its own hooks are outside of what is recomputed
            next(layer.children()).register_forward_hook(count(name, i))
    model.target_loss(batch)[0].backward()
    assert calls == {"vision": vision, "decoder": decoder}
    for name, parameter in model.named_parameters():
        if name in expected:
            assert torch.equal(parameter.grad, expected[name]), name
    shares = recomputed_shares(model, which)
    assert shares == {
        name: sum(n == 2 for n in of) / len(of) for name, of in (("vision", vision), ("decoder", decoder))
    }


def test_memory_lies_between():
    def peak(which):
        model = meta_model(make_model(FOUR)[0].config).train()
        checkpoint_activations(model, which)
        estimate = MemoryEstimate(model, Record(64, 16), Precision.from_name("32-true"), Layout())
        return estimate.step_peak(16)["activations"]

    all_kept, third, half, none_kept = (peak(which) for which in (False, 3, "selective", True))
    assert none_kept < half < third < all_kept
    assert (half - none_kept) / (all_kept - none_kept) == pytest.approx(0.5, abs=0.15)


def test_what_can_not_be_recomputed_in_part_is_refused():
    model, _ = make_model()
    with pytest.raises(
        InputError, match="model.gradient_checkpointing: expected false, true, selective or a number, got -1"
    ):
        checkpoint_activations(model, -1)
