"""What only a GPU shows: its kernels on whole models, steps that never wait for the host, graphs compiled for it."""

from dataclasses import replace

import pytest
import torch

from mmprefix.attention import only_mask_free
from mmprefix.decoding import answers
from mmprefix.packing import map_tensors
from mmprefix.probe import mask_free_refusal
from mmprefix.training.layers import checkpoint_activations, compile_layers
from tests.architectures import config_of
from tests.test_decoding import NEW, SAMPLING, alone, ending, prompts_for
from tests.test_mask_free import batch_of, model_of, ragged_batches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(batch):
    return map_tensors(batch, lambda t: t.cuda())


def gradient_of(model, batch):
    """The loss, and all gradients as one float64 vector."""
    model.zero_grad()
    loss, count = model.target_loss(batch)
    (loss / count).backward()
    parts = [p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None]
    return float(loss / count), torch.cat(parts)


@pytest.mark.parametrize("visibility", ["full", "nested", "causal"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "cohere"])
def test_packed_loss_and_gradients_in_bfloat16_match_exact_ones(name, visibility, photos):
    """gemma3's window of 4 is shorter than its longest targets: there, the rows need their mask after all."""
    model, processor = model_of(name, visibility)
    batch = batch_of(processor, photos)
    # Weights rounded as they will be: what is left is what is computed with them.
    model.to(torch.bfloat16).to(torch.float64)
    exact, expected = gradient_of(model, batch)
    model.cuda().to(torch.bfloat16)
    apart = batch_of(processor, photos, packed=False)
    _, of_rows = gradient_of(model, on_gpu(apart))
    loss, found = gradient_of(model, on_gpu(batch))
    if name != "gemma3":
        with only_mask_free(), torch.no_grad():
            model.target_loss(on_gpu(batch))
    assert abs(loss - exact) <= 2e-2 * exact
    rounding = float((of_rows - expected).norm() / expected.norm())
    assert rounding < 0.2, "the dense mask must be near, or nothing is compared"
    assert float((found - expected).norm() / expected.norm()) <= 1.5 * rounding + 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "cohere", "mixtral"])
def test_the_kernel_is_taken(name, dtype):
    assert mask_free_refusal(config_of(name), "sdpa", torch.device("cuda"), dtype) is None


@pytest.mark.parametrize("visibility", ["full", "nested"])
def test_a_step_never_waits_for_the_gpu(visibility, photos):
    model, processor = model_of("llama", visibility)
    model.cuda().to(torch.bfloat16)
    batch = on_gpu(batch_of(processor, photos))
    model.target_loss(batch, reduction="mean")[0].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.target_loss(batch, reduction="mean")[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("how", ["layers", "model"])
def test_compiled_step_matches_and_is_not_compiled_again(how, photos):
    model, processor = model_of("llama", "nested")
    model.cuda().to(torch.bfloat16)
    batches = [on_gpu(batch) for batch in ragged_batches(processor, photos, 6, bucket=32)]
    expected = [gradient_of(model, batch) for batch in batches]
    torch._dynamo.reset()
    if how == "layers":
        compile_layers(model)
    else:
        model.compile(fullgraph=True)
    for batch, (loss, gradient) in zip(batches, expected, strict=True):
        compiled_loss, compiled = gradient_of(model, batch)
        assert abs(compiled_loss - loss) <= 2e-2 * loss
        assert float((compiled - gradient).norm() / gradient.norm()) < 0.1
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "something was compiled"
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in [*batches, *map(on_gpu, ragged_batches(processor, photos, 12, bucket=32))]:
            model.target_loss(batch)[0].backward()
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("which", [True, "selective", "elementwise"])
def test_recomputed_layers_match(which, compiled, photos):
    """CUDA's backward, which recomputes, runs in another thread than forward."""
    model, processor = model_of("llama", "nested")
    model.cuda().to(torch.bfloat16).train()
    batches = [on_gpu(batch) for batch in ragged_batches(processor, photos, 3, bucket=32)]
    expected = [gradient_of(model, batch)[1] for batch in batches]
    checkpoint_activations(model, which)
    torch._dynamo.reset()
    if compiled:
        compile_layers(model)
    for batch, gradient in zip(batches, expected, strict=True):
        _, found = gradient_of(model, batch)
        assert float((found - gradient).norm() / gradient.norm()) < (0.1 if compiled else 1e-2)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("error:answers are decoded")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "cohere"])
def test_answers_from_a_graph_match_those_of_each_prompt_alone(name, precision, monkeypatch):
    """In bfloat16, those without a graph stand in: padding and packing round differently."""
    model, _ = model_of(name, "full")
    prompts = prompts_for(ending(model))
    prompts = [replace(p, ids=p.ids.cuda(), images=tuple(image.cuda() for image in p.images)) for p in prompts]
    model.cuda()
    if precision == "bfloat16":
        model.to(torch.bfloat16)
        prompts = [replace(p, images=tuple(image.bfloat16() for image in p.images)) for p in prompts]
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    how = {"rows": 4, "max_new_tokens": NEW, "packed": precision != "float32"}
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
        found = answers(model, prompts, **how)
        assert len(replays) > NEW
        if precision == "float32":
            assert found == [alone(model, prompt) for prompt in prompts]
        else:
            eager = answers(model, prompts, **how, in_places=False)
            assert sum(a == b for a, b in zip(found, eager, strict=True)) > len(prompts) // 2
        sampled = answers(model, prompts, **how, sampling=SAMPLING, seed=1)
        assert sampled == answers(model, prompts, **how, sampling=SAMPLING, seed=1)
        assert sampled != found
