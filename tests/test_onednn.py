"""Linear layers by oneDNN: the same values, only where they gain, and only for as long as they are asked for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmprefix import onednn
from mmprefix.decoding import answers
from mmprefix.onednn import linear, linears_by_onednn
from tests.test_decoding import NEW, ending, prompts_for
from tests.test_mask_free import model_of


@pytest.fixture
def products(monkeypatch):
    """Rows of each product by oneDNN; layers of any size gain."""
    monkeypatch.setattr(onednn, "_WORTHWHILE", 0)
    rows = []
    monkeypatch.setattr(onednn, "linear", lambda x, *rest: rows.append(x.shape[:-1].numel()) or linear(x, *rest))
    return rows


@pytest.mark.parametrize("shape", [(1, 8), (5, 8), (8,), (2, 3, 8), (0, 8), (2, 0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_matches(shape, dtype):
    rows = torch.randn(*shape, dtype=dtype)
    columns = torch.randn(8, 16, dtype=dtype)
    for weight in (torch.randn(16, 8, dtype=dtype), columns.T, torch.randn(16, 16, dtype=dtype)[::1, ::2]):
        for bias in (None, torch.randn(16, dtype=dtype)):
            torch.testing.assert_close(linear(rows, weight, bias), F.linear(rows, weight, bias))
    torch.testing.assert_close(linear(columns.T, columns.T), F.linear(columns.T, columns.T))


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_only_plain_layers_for_as_long_as_asked(products):
    model = nn.Sequential(nn.Linear(8, 16), nn.Sequential(nn.Linear(16, 4, bias=False)), Scaled(4, 4))
    with torch.no_grad():
        expected = model(torch.ones(3, 8))
        with linears_by_onednn(model):
            torch.testing.assert_close(model(torch.ones(3, 8)), expected)
            assert isinstance(model[0], nn.Linear)
        assert products == [3, 3]
        with pytest.raises(ZeroDivisionError), linears_by_onednn(model):
            raise ZeroDivisionError
        model(torch.ones(3, 8))
    assert products == [3, 3]
    assert [type(layer) for layer in (model[0], model[1][0], model[2])] == [nn.Linear, nn.Linear, Scaled]


def test_passes_inside_each_other(products):
    """Of `generate` in decoding, or of two threads: the first to end takes back what it did, and nothing fails."""
    model = nn.Sequential(nn.Linear(8, 16))
    with torch.no_grad(), linears_by_onednn(model):
        with linears_by_onednn(model):
            model(torch.ones(3, 8))
        model(torch.ones(2, 8))
    assert products == [3, 2]
    assert type(model[0]) is nn.Linear


def test_what_learns_is_small_or_has_its_own_dtype_stays(products, monkeypatch):
    model = nn.Sequential(nn.Linear(8, 16))
    rows = torch.randn(3, 8, requires_grad=True)
    with linears_by_onednn(model):
        model(rows).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert model(rows).dtype == torch.bfloat16
        assert products == []
        with torch.no_grad():
            model(rows)
            assert products == [3]
            monkeypatch.setattr(onednn, "_WORTHWHILE", 8 * 16 + 1)
            model(rows)
    assert products == [3]
    torch.testing.assert_close(rows.grad, model[0].weight.sum(0).expand(3, -1))


def test_compiled_layers_are_not_compiled_again(products):
    layer = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
    model = nn.Sequential(layer, nn.Linear(16, 4))
    layer.compile(backend="eager")
    with torch.no_grad():
        expected = model(torch.ones(3, 8))
        with torch.compiler.set_stance("fail_on_recompile"), linears_by_onednn(model):
            torch.testing.assert_close(model(torch.ones(3, 8)), expected)
    assert products == [3], "only the one that isn't compiled"
    torch._dynamo.reset()


def test_answers_and_generate_are_decoded_by_it(products):
    model, _ = model_of("llama", "full")
    prompts = prompts_for(ending(model))
    with torch.no_grad():
        found = answers(model, prompts, rows=4, max_new_tokens=NEW)
        assert min(products) <= 4, "steps of few rows"
        products.clear()
        for prompt, expected in zip(prompts[:2], found, strict=False):
            ids = prompt.ids.unsqueeze(0)
            images = torch.cat(prompt.images).unsqueeze(0) if prompt.images else None
            new = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), image_tokens=images, max_new_tokens=NEW,
                do_sample=False,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
            assert new[: len(expected)] == expected
        assert 1 in products
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}


class OfItsOwn(torch.Tensor):
    """As weights in four bits or in shards are."""


def test_tensors_of_another_class_compute_in_their_own_way(products):
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(OfItsOwn))
    with torch.no_grad(), linears_by_onednn(model):
        assert type(model(torch.ones(3, 8))) is OfItsOwn, "and so is what the second layer is given"
    assert products == []
